"""``ce-plugin demo`` and ``ce-plugin explain``: check everything, run, and write the report."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ce_plugin.cli._commands import DemoOptions, ExplainOptions
from ce_plugin.cli._session import Pictures, manifest, network, progress, say, with_patterns
from ce_plugin.datasets import read_image, sample_photographs
from ce_plugin.designs import Design, LeaveOneIn, OneAtATime, RandomMask, RandomRegions
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.files import existing_file, printable
from ce_plugin.interventions import PixelMask
from ce_plugin.models import VisionModel, efficientnet_lite0
from ce_plugin.networks.layers import find_layer
from ce_plugin.report import (
    ATTACKS,
    DetectorTrial,
    Plan,
    Study,
    digits_trial,
    file_sha256,
    save_report,
    study,
    tensor_sha256,
)

# What covers a patch: the fills of the intervention, and what the report says.
_FILLS = {
    "mixed": (("zero", "mean", "blur"), "set to black, set to the mean colour, or blurred"),
    "blur": (("blur",), "blurred"),
    "zero": (("zero",), "set to black"),
    "mean": (("mean",), "set to the mean colour"),
    "noise": (("noise",), "replaced by noise"),
}


def demo(options: DemoOptions, argv: Sequence[str]) -> None:
    """Explain scikit-learn's two photographs, and try a detector on its handwritten digits."""
    net = efficientnet_lite0()
    photographs = sample_photographs()
    hashes = {name: {"sha256_of_pixels": tensor_sha256(image)} for name, image in photographs.items()}
    inputs = {name: net.inputs([image]) for name, image in photographs.items()}
    settings = ExplainOptions(images=[], attack=list(ATTACKS), **vars(options))
    _report(net, inputs, settings, argv, hashes, with_digits=True)


def explain(options: ExplainOptions, argv: Sequence[str]) -> dict[str, str]:
    """Explain the user's photographs; returns those that could not be read, and why."""
    paths = with_patterns(options.images)
    for file in paths:
        if not os.path.isdir(file):
            existing_file(file, "IMAGE")  # before the network is loaded
    net = network(options)
    pictures = Pictures(paths, net, name="IMAGE", quiet=options.quiet)
    # Two files may have the same name.
    every = [*pictures.files, *map(Path, pictures.unreadable)]
    short = len({file.name for file in every}) == len(every)
    files = {printable(file.name if short else file): file for file in pictures.files}
    hashes: dict[str, Any] = {}
    inputs = {}
    for name, file in files.items():
        hashes[name] = {"file": str(file), "sha256": file_sha256(file)}
        inputs[name] = net.inputs([read_image(file)])
    hashes |= {name: {"unreadable": why} for name, why in pictures.unreadable.items()}
    _report(net, inputs, options, argv, hashes, unreadable=pictures.unreadable)
    return pictures.unreadable


def _report(
    net: VisionModel,
    inputs: Mapping[str, Tensor],
    options: ExplainOptions,
    argv: Sequence[str],
    hashes: Mapping[str, Any],
    *,
    with_digits: bool = False,
    unreadable: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Study each photograph and write the report; after an interrupt, of those that are finished."""
    plan = _plan(net, options)
    target = None if options.target is None else net.class_index(options.target)
    resolved = {"intervention": plan.intervention, "design": plan.design, "attacks": plan.attacks}
    studies: list[Study] = []
    digits: DetectorTrial | None = None
    save = partial(
        save_report,
        studies,
        options.out,
        model=net.name,
        plan=plan,
        experiment=_experiment(plan, options.fill),
        manifest=manifest(options, argv, net, hashes, **resolved),
        force=True,  # it is reserved
        unreadable=unreadable,
    )
    try:
        # Of the digits: training, fitting, clean ones, and the attacks.
        steps = len(inputs) * (2 + 3 * len(plan.attacks)) + with_digits * (3 + len(ATTACKS))
        with progress(steps, quiet=options.quiet) as step:
            for number, (name, image) in enumerate(inputs.items()):
                studies.append(study(net, image, name, plan, target=target, example_id=number, progress=step))
            if with_digits:
                digits = digits_trial(seed=plan.seed, progress=step)
    except BaseException:
        # Whatever happened, what is finished is not lost.
        if studies:
            missing = f"stopped early: {len(studies)} of {len(inputs)} photographs" + ", no detector" * with_digits
            sys.stderr.write(f"What was finished is in {save(incomplete=missing).absolute()}\n")
        raise
    page = save(digits=digits)
    summary = _summary(studies) + ("" if digits is None else _detected(digits))
    say(summary.rstrip("\n"), quiet=options.quiet)
    say(f"Report: {page.absolute()}")


def _plan(net: VisionModel, options: ExplainOptions) -> Plan:
    if options.layer is not None:
        find_layer(net.model, options.layer)  # an unknown name is said before any photograph is explained
    design = _design(options)
    cells = options.grid or (10 if isinstance(design, RandomMask) else 14)
    if isinstance(design, RandomRegions) and cells != 14:
        raise ArgumentError(expected("grid", "14 for the design of regions", cells, "Choose --design random-mask."))
    if cells > net.framing.size:
        raise ArgumentError(expected("grid", f"at most {net.framing.size}, the network's pixels", cells))
    return Plan(
        attacks=tuple(sorted({*(options.attack or ())} - {"none"}, key=ATTACKS.index)),
        eps=options.eps,
        intervention=PixelMask(_FILLS[options.fill][0], normalization=net.normalization),
        design=design,
        cells=cells,
        outcome=options.outcome,
        seed=options.seed,
        layer=options.layer,
    )


def _design(options: ExplainOptions) -> Design:
    if options.design == "regions":
        return RandomRegions(options.mask_share or 0.5, n_trials=options.trials, seed=options.seed)
    if options.design == "random-mask":
        return RandomMask(options.mask_share or 0.1, n_trials=options.trials, seed=options.seed)
    return OneAtATime() if options.design == "one-at-a-time" else LeaveOneIn()


def _experiment(plan: Plan, fill: str) -> str:
    """What a trial is, for the reader of the report."""
    design, grid = plan.design, f"{plan.cells} × {plan.cells} patches of the photograph"
    done = _FILLS[fill][1]
    if isinstance(design, RandomRegions):
        found = design.independent(design.n_trials)
        alone = 0 if found is None else int(found[0].sum())
        single = f", in {alone} single patches," if alone else ","
        where = f"in {design.n_trials - alone} trials random regions{single}"
        return f"{where} about {design.p:.0%} of the {grid} each time, were {done}"
    if isinstance(design, RandomMask):
        return f"in each of {design.n_trials} trials a random {design.p:.0%} of the {grid} were {done}"
    if isinstance(design, LeaveOneIn):
        return f"in each trial all but one of the {grid} were {done}"
    return f"in each trial one of the {grid} was {done}"


def _detected(trial: DetectorTrial) -> str:
    """What the detector noticed of each attack on digits."""
    lines = [f"Detector on handwritten digits: flags {trial.false_alarms.share:.0%} of clean ones\n"]
    for one in trial.tried:
        figure = "" if one.figures.auroc is None else f", AUROC {one.figures.auroc.value:.3f}"
        flagged = 0.0 if one.flagged is None else one.flagged.share
        lines.append(f"  {one.attack:8} {flagged:.0%} of {len(one.scores)} successful attacks{figure}\n")
    return "".join(lines)


def _summary(studies: Sequence[Study]) -> str:
    lines = []
    for one in studies:
        lines.append(f"{one.name}: {one.cases[0].top[0].name} ({one.cases[0].top[0].probability:.2f})\n")
        for case in one.cases[1:]:
            answer = f"{case.top[0].name} ({case.top[0].probability:.2f})" if case.success else "unchanged"
            lines.append(f"  {case.name:5} {answer}\n")
    return "".join(lines)
