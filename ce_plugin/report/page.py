"""The report on photographs: sections run on each of them, on one page that stands alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.files import check_out, reserved, write_files
from ce_plugin.models import VisionModel
from ce_plugin.networks.layers import find_layer, last_conv_layer
from ce_plugin.report.evaluation import DetectorTrial, TrialSection
from ce_plugin.report.layer import LayerSection
from ce_plugin.report.photograph import OUTCOMES, PhotographSection, Plan, Study, check_class, share
from ce_plugin.report.sections import Section, rendered


def study(
    net: VisionModel,
    inputs: Tensor,
    name: str,
    plan: Plan | None = None,
    *,
    target: int | None = None,
    example_id: int = 0,
    sections: Sequence[Section[Any]] = (),
    progress: Callable[[str], None] | None = None,
) -> Study:
    """Explain one photograph, clean and under each attack.

    Args:
        net: the network.
        inputs: the photograph as the network takes it, (1, C, H, W), see :meth:`VisionModel.inputs`.
        name: what the report calls the photograph.
        plan: what is run.
        target: class to explain; None means the answer on the clean photograph.
        example_id: names the photograph's random numbers, together with the plan's seed.
        sections: of your own, run and shown after the others; see :class:`Section`.
        progress: called with a few words before each step.

    Returns:
        Everything that a report shows.

    Raises:
        InputError: not one photograph.
        ModelError: the network does not return (N, C) with at least two classes.
        TargetError: there is no such class.
        UnknownNameError: there is no layer of the plan's name.
        ArgumentError: two sections have one name.

    Example:
        >>> from torch import nn
        >>> layers = [nn.Conv2d(3, 2, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)]
        >>> found = study(VisionModel(nn.Sequential(*layers)), torch.rand(1, 3, 16, 16), "noise", Plan(attacks=()))
        >>> [case.name for case in found.cases]
        ['Clean']
    """
    plan = plan or Plan()
    if inputs.dim() != 4 or len(inputs) != 1:
        raise InputError(expected("inputs", "one photograph, (1, C, H, W)", tuple(inputs.shape)))
    layer = find_layer(net.model, plan.layer) if plan.layer else last_conv_layer(net.model, inputs)
    own: list[Section[Any]] = [PhotographSection(plan)]
    if layer is not None:
        own.append(LayerSection(plan, layer[0]))
    names = list(map(attrgetter("name"), (*own, *sections)))
    if len(set(names)) < len(names):
        raise ArgumentError(expected("sections", "of different names", ", ".join(names)))
    with torch.no_grad():
        explained = check_class(net.model(inputs), target)
    announce = progress or (lambda step: None)
    found = Study(name, net, inputs, plan, explained, layer, example_id, announce, (*own, *sections))
    for section in found.sections:
        found.found[section.name] = section.run(found)
    return found


def save_report(
    studies: Sequence[Study],
    out: str | Path,
    *,
    model: str,
    plan: Plan,
    experiment: str,
    manifest: Mapping[str, Any],
    force: bool = False,
    incomplete: str = "",
    digits: DetectorTrial | None = None,
    unreadable: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write ``report.html`` and ``manifest.json``; each appears only when it is complete.

    Args:
        studies: one per photograph.
        out: the folder, which is made for this call alone; see :func:`check_out`.
        model: the network's name.
        plan: what was run.
        experiment: a few words on what a trial is, for the reader.
        manifest: see :func:`ce_plugin.report.build_manifest`; the findings are added to it.
        force: whether an existing report is replaced.
        incomplete: what is missing, where something is.
        digits: a detector tried on handwritten digits, shown below the photographs.
        unreadable: names of photographs that could not be read, and why.

    Returns:
        Path of the page.

    Raises:
        FileError: see :func:`check_out`; or another run is writing to the folder.

    Example:
        >>> import tempfile
        >>> from ce_plugin.report import build_manifest
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=torch.nn.Linear(1, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = save_report([], Path(folder, "new"), model="net", plan=Plan(), experiment="", manifest=manifest)
        ...     page.name, page.stat().st_size > 0
        ('report.html', True)
    """
    # Of two calls for one new folder one fails. What may be replaced is the caller's, who may have reserved it.
    with nullcontext(check_out(out, force=True)) if force else reserved(out) as folder:
        findings = {study.name: study.record() for study in studies}
        if digits is not None:
            findings[TrialSection.name] = TrialSection(str).record(digits)
        full = {**manifest, "findings": findings}
        html = render(
            studies, model=model, plan=plan, experiment=experiment, manifest=full, incomplete=incomplete, digits=digits,
            unreadable=unreadable,
        )  # fmt: skip
        write_files(folder, {"manifest.json": full, "report.html": html})
    return folder / "report.html"


def render(
    studies: Sequence[Study],
    *,
    model: str,
    plan: Plan,
    experiment: str,
    manifest: Mapping[str, Any],
    incomplete: str = "",
    digits: DetectorTrial | None = None,
    unreadable: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The page as text; see :func:`save_report`.

    Example:
        >>> from ce_plugin.report import build_manifest
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=torch.nn.Linear(1, 1))
        >>> render([], model="net", plan=Plan(), experiment="", manifest=manifest).split()[:2]
        ['<!DOCTYPE', 'html>']
    """
    names = {
        "model": model,
        "studies": studies,
        "experiment": experiment,
        "incomplete": incomplete,
        "outcome": OUTCOMES[plan.outcome],
        "plan": plan,
        "eps": share(plan.eps),
        "unreadable": unreadable,
        "digits": None if digits is None else TrialSection(str).html(digits),
    }
    return str(rendered("report.html.j2", names, manifest))
