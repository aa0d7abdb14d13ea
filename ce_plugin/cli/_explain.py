"""``ce-plugin demo`` and ``ce-plugin explain``: check everything, run, and write the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ce_plugin.cli._session import network, progress
from ce_plugin.datasets import read_image, sample_photographs
from ce_plugin.designs import Design, LeaveOneIn, OneAtATime, RandomMask, RandomRegions
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.interventions import PixelMask
from ce_plugin.models import VisionModel, efficientnet_lite0
from ce_plugin.report import (
    ATTACKS,
    DetectorTrial,
    Plan,
    Study,
    build_manifest,
    check_out,
    digits_trial,
    file_sha256,
    named_layer,
    save_report,
    study,
    tensor_sha256,
)

__all__ = ["demo", "explain"]

# Training, fitting, clean digits, and the attacks.
_DIGITS_STEPS = 3 + len(ATTACKS)

_FILLS = {
    "mixed": ("zero", "mean", "blur"),
    "blur": ("blur",),
    "zero": ("zero",),
    "mean": ("mean",),
    "noise": ("noise",),
}
_WORDS = {
    "mixed": "set to black, set to the mean colour, or blurred",
    "blur": "blurred",
    "zero": "set to black",
    "mean": "set to the mean colour",
    "noise": "replaced by noise",
}


def demo(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Explain scikit-learn's two photographs, and try a detector on its handwritten digits."""
    check_out(arguments.out, force=arguments.force)
    net = efficientnet_lite0()
    photographs = sample_photographs()
    settings = argparse.Namespace(
        **vars(arguments),
        design="regions",
        mask_share=None,
        fill="mixed",
        grid=None,
        outcome="log_odds",
        eps=8 / 255,
        layer=None,
    )
    plan = _plan(net, settings, ATTACKS)
    prints = {name: {"sha256_of_pixels": tensor_sha256(image)} for name, image in photographs.items()}
    readers = {name: (lambda image=image: image) for name, image in photographs.items()}
    return _run(net, readers, plan, settings, words, prints, with_digits=True)


def explain(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Explain the user's photographs."""
    check_out(arguments.out, force=arguments.force)
    names = _names(arguments.images)
    for file in arguments.images:
        read_image(file)  # whatever cannot be read is said before the first trial
    net = network(arguments)
    attacks = tuple(a for a in dict.fromkeys(arguments.attack or ()) if a != "none")
    plan = _plan(net, arguments, tuple(a for a in ATTACKS if a in attacks))
    prints = {
        name: {"file": str(file), "sha256": file_sha256(file)}
        for name, file in zip(names, arguments.images, strict=True)
    }
    readers = {name: (lambda file=file: read_image(file)) for name, file in zip(names, arguments.images, strict=True)}
    return _run(net, readers, plan, arguments, words, prints)


def _run(
    net: VisionModel,
    readers: Mapping[str, Callable[[], Tensor]],
    plan: Plan,
    arguments: argparse.Namespace,
    words: Sequence[str],
    prints: Mapping[str, Any],
    *,
    with_digits: bool = False,
) -> int:
    target = getattr(arguments, "target", None)
    index = None if target is None else net.class_index(target)
    options = {key: value for key, value in vars(arguments).items() if key not in ("force", "quiet")}
    manifest = build_manifest(
        arguments={**options, "intervention": plan.intervention, "design": plan.design, "attacks": plan.attacks},
        command=["ce-plugin", *words],
        seed=plan.seed,
        inputs=prints,
        model=net.model,
    )
    studies: list[Study] = []
    digits: DetectorTrial | None = None

    def save(incomplete: str = "") -> Path:
        return save_report(
            studies,
            arguments.out,
            model=net.name,
            plan=plan,
            experiment=_experiment(plan, arguments.fill),
            manifest=manifest,
            force=arguments.force,
            incomplete=incomplete,
            digits=digits,
        )

    try:
        steps = len(readers) * (2 + 3 * len(plan.attacks)) + with_digits * _DIGITS_STEPS
        with progress(steps, quiet=arguments.quiet) as tell:
            for number, (name, read) in enumerate(readers.items()):
                inputs = net.inputs([read()])
                studies.append(study(net, inputs, name, plan, target=index, example_id=number, progress=tell))
            if with_digits:
                digits = digits_trial(seed=plan.seed, progress=tell)
    except BaseException:
        # Whatever happened, what is finished is not lost.
        if studies:
            page = save(f"stopped early: {len(studies)} of {len(readers)} photographs" + ", no detector" * with_digits)
            sys.stderr.write(f"What was finished is in {page.absolute()}\n")
        raise
    page = save()
    if not arguments.quiet:
        sys.stdout.write(_summary(studies) + ("" if digits is None else _detected(digits)))
    sys.stdout.write(f"Report: {page.absolute()}\n")
    return 0


def _plan(net: VisionModel, arguments: argparse.Namespace, attacks: tuple[str, ...]) -> Plan:
    if arguments.layer is not None:
        named_layer(net.model, arguments.layer)  # an unknown name is told before any photograph is explained
    design = _design(arguments)
    cells = arguments.grid or (10 if isinstance(design, RandomMask) else 14)
    if isinstance(design, RandomRegions) and cells != 14:
        raise ArgumentError(expected("grid", "14 for the design of regions", cells, "Choose --design random-mask."))
    if cells > net.framing.size:
        raise ArgumentError(expected("grid", f"at most {net.framing.size}, the network's pixels", cells))
    return Plan(
        attacks=attacks,
        eps=arguments.eps,
        intervention=PixelMask(_FILLS[arguments.fill], normalization=net.normalization),
        design=design,
        cells=cells,
        outcome=arguments.outcome,
        seed=arguments.seed,
        layer=arguments.layer,
    )


def _design(arguments: argparse.Namespace) -> Design:
    trials, seed, share = arguments.trials, arguments.seed, arguments.mask_share
    if arguments.design == "regions":
        return RandomRegions(share or 0.5, n_trials=trials, seed=seed)
    if arguments.design == "random-mask":
        return RandomMask(share or 0.1, n_trials=trials, seed=seed)
    return OneAtATime() if arguments.design == "one-at-a-time" else LeaveOneIn()


def _experiment(plan: Plan, fill: str) -> str:
    """What a trial is, for the reader of the report."""
    design, grid = plan.design, f"{plan.cells} × {plan.cells} patches of the photograph"
    done = _WORDS[fill]
    if isinstance(design, RandomRegions):
        return f"in each of {design.n_trials} trials random regions, about {design.p:.0%} of the {grid}, were {done}"
    if isinstance(design, RandomMask):
        return f"in each of {design.n_trials} trials a random {design.p:.0%} of the {grid} were {done}"
    if isinstance(design, LeaveOneIn):
        return f"in each trial all but one of the {grid} were {done}"
    return f"in each trial one of the {grid} was {done}"


def _names(files: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two files have the same name."""
    short = [file.name for file in files]
    if len(set(short)) == len(short):
        return short
    long = [str(file) for file in files]
    if len(set(long)) < len(long):
        twice = next(name for name in long if long.count(name) > 1)
        raise ArgumentError(expected("IMAGE", "each picture once", f"{twice!r} several times"))
    return long


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
            says = f"{case.top[0].name} ({case.top[0].probability:.2f})" if case.success else "unchanged"
            lines.append(f"  {case.name:5} {says}\n")
    return "".join(lines)
