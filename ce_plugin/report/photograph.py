"""The section of one photograph: answers and effects of its patches, clean and under attack; gradients beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

import torch
from captum.attr import LayerAttribution, LayerGradCam, Saliency
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from ce_plugin.attribution import CausalEffect
from ce_plugin.designs import Design
from ce_plugin.effects import Estimate, resolve_outcome
from ce_plugin.errors import ArgumentError, ModelError, TargetError, expected, unknown_name
from ce_plugin.interventions import Intervention
from ce_plugin.interventions.adversarial import Adversarial
from ce_plugin.models import VisionModel
from ce_plugin.networks.forward import double
from ce_plugin.networks.guard import state_guard, turn
from ce_plugin.networks.layers import in_this_thread
from ce_plugin.report.answer import Told, ToldChannels, told
from ce_plugin.report.sections import Section, cell, rendered
from ce_plugin.sites import InputSite, patch_grid
from ce_plugin.visualization import magnify, overlay

ATTACKS = ("fgsm", "bim", "pgd", "jsma")
"""Names of the attacks that a report can hold as evidence, in the order in which it shows them."""

ATTACK_NAMES = {
    "fgsm": "fast gradient sign method",
    "bim": "basic iterative method",
    "pgd": "projected gradient descent",
    "jsma": "Jacobian saliency map attack",
}
"""What the attacks are called, spelled out."""

OUTCOMES = {"log_odds": "log-odds", "probability": "probability", "logit": "logit", "margin": "margin"}
"""Outcomes that a report can show, one number per class, and what it calls them."""


@dataclass(frozen=True)
class Plan:
    """What is run for each photograph.

    Args:
        attacks: names out of :data:`ATTACKS`; the clean photograph always comes first.
        eps: size of FGSM, BIM and PGD in L-inf, as a share of the range from black to white, in (0, 1].
        max_iter: steps of BIM and PGD.
        jsma_pairs: how many pairs of values JSMA may set to the end of the range.
        intervention: what covers a patch; None means the default of :class:`CausalEffect`.
        design: which patches are covered in which trial; None means the default of :class:`CausalEffect`.
        cells: the photograph is cut into ``cells`` x ``cells`` patches.
        outcome: name of the outcome, one per class: "log_odds", "probability", "logit" or "margin".
        fdr: false discovery rate of the outlined patches.
        seed: of everything random.
        perturbations_per_eval: trials per forward pass; None means automatic.
        layer: dotted name of the layer at which Grad-CAM looks and whose channels are set; None means the last
            convolution.

    Raises:
        UnknownNameError: an attack or outcome of another name.
        ArgumentError: a value out of its range.

    Example:
        >>> Plan(attacks=("fgsm",), eps=0.3).eps
        0.3
    """

    attacks: tuple[str, ...] = ATTACKS
    eps: float = 8 / 255
    max_iter: int = 10
    jsma_pairs: int = 60
    intervention: Intervention | None = None
    design: Design | None = None
    cells: int = 14
    outcome: str = "log_odds"
    fdr: float = 0.05
    seed: int = 0
    perturbations_per_eval: int | None = None
    layer: str | None = None

    def __post_init__(self) -> None:
        for attack in self.attacks:
            if attack not in ATTACKS:
                raise unknown_name("attack", attack, ATTACKS)
        if self.outcome not in OUTCOMES:
            raise unknown_name("outcome", self.outcome, OUTCOMES)
        if not 0 < self.eps <= 1:
            hint = "It is a share of the range from black to white: 8/255, or the paper's 0.3."
            raise ArgumentError(expected("eps", "in (0, 1]", self.eps, hint))
        if not 0 < self.fdr < 1:
            raise ArgumentError(expected("fdr", "in (0, 1)", self.fdr))
        for name in ("max_iter", "jsma_pairs", "cells"):
            if getattr(self, name) < 1:
                raise ArgumentError(expected(name, "at least 1", getattr(self, name)))


@dataclass(frozen=True)
class Study:
    """One photograph: what its sections are given, and what they found.

    Attributes:
        name: of the photograph.
        net: the network.
        inputs: the photograph as the network takes it, (1, C, H, W).
        plan: what is run.
        target: class that is explained.
        grad_cam_layer: name and module of the layer at which Grad-CAM looks and whose channels are set; None for a
            network without a late convolution.
        example_id: names the photograph's random numbers, together with the plan's seed.
        progress: to be called with a few words before each step.
        sections: in the order in which they are run and shown.
        found: name of each section that has been run -> what it found.
    """

    name: str
    net: VisionModel
    inputs: Tensor = field(repr=False)
    plan: Plan
    target: int
    grad_cam_layer: tuple[str, nn.Module] | None
    example_id: int
    progress: Callable[[str], None] = field(repr=False)
    sections: tuple[Section[Any], ...]
    found: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def cases(self) -> tuple[Case, ...]:
        """The photograph clean and under each attack; other sections may look at these."""
        cases: tuple[Case, ...] = self.found[PhotographSection.name]
        return cases

    @property
    def layer(self) -> LayerStudy | None:
        """The channels of the layer; None for a network without a late convolution."""
        layer: LayerStudy | None = self.found.get("layer")
        return layer

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: strings, numbers, lists and dictionaries by the names of the sections."""
        return {section.name: section.record(self.found[section.name]) for section in self.sections}


@dataclass(frozen=True)
class Answer:
    """One class and how sure the network is of it."""

    index: int
    name: str
    probability: float
    log_odds: float


@dataclass(frozen=True)
class ClassMaps:
    """The maps of one class under one evidence; each (H, W).

    Attributes:
        answer: the class.
        contribution: minus the effect: positive supports the class; in units of the outcome.
        outlined: the units that are significant, or, for exact designs, not zero; none where no errors are known.
        n_outlined: how many units these are, of ``n_units``.
        saliency: greatest absolute gradient over the channels.
        grad_cam: None where the network has no layer for it.
    """

    answer: Answer
    contribution: Tensor
    outlined: Tensor
    n_outlined: int
    n_units: int
    saliency: Tensor
    grad_cam: Tensor | None


@dataclass(frozen=True)
class Case:
    """One photograph under one evidence.

    Attributes:
        name: "Clean", or the attack's.
        inputs: what the network saw, (1, C, H, W).
        picture: the same, (C, H, W), values in [0, 1].
        top: the most probable classes, best first.
        explained: how sure the network is of the class that is explained, under this evidence.
        maps: of the explained class and, where the attack changed the answer, of the new answer.
        perturbation: (C, H, W) as shares of the range; None for the clean photograph.
        success: whether the answer changed; None for the clean photograph.
        settings: of the attack.
        outlines: what outlined units are: "significant", "not zero" (exact designs), or "" where there are none.
        smoothed: colours are a smooth map of the effects.
        trials: number of trials of the design.
        passes: forward passes by what they were for.
        seconds: wall-clock time by what it was for.
        told: the answer in a sentence, and the numbers of all patches.
    """

    name: str
    inputs: Tensor = field(repr=False)
    picture: Tensor = field(repr=False)
    top: tuple[Answer, ...]
    explained: Answer
    maps: tuple[ClassMaps, ...]
    perturbation: Tensor | None
    success: bool | None
    settings: Mapping[str, Any]
    outlines: str
    smoothed: bool
    trials: int
    passes: Mapping[str, int]
    seconds: Mapping[str, float]
    told: Told | None = None


@dataclass(frozen=True)
class Carried:
    """Which channels carry an attack, on one image.

    Attributes:
        total: by how much the attack changes the outcome of the class.
        indirect: natural indirect effect of each channel, (U,): the change when that channel alone is as under attack.
        labels: of the channels.
        order: all channels, the strongest carrier first; empty where the attack has no effect.
        needed: for each share of the total effect how many of the best channels together reach it; None where none do.
        cut: everything passes through the layer, so that all channels together carry all of it by construction.
    """

    total: float
    indirect: Tensor
    labels: tuple[str, ...]
    order: tuple[int, ...]
    needed: Mapping[float, int | None]
    cut: bool

    def share(self, unit: int) -> float:
        """A channel's indirect effect as a share of the total one."""
        return float(self.indirect[unit]) / self.total


@dataclass(frozen=True)
class LayerCase:
    """The explained class at a layer under one evidence; maps are (H, W).

    Attributes:
        case: what the photograph's section found under the same evidence.
        effect_map: the causal effect map, of the logit.
        correlation: Spearman's, of each method's map with its map of the clean photograph; empty for that one.
        carried: what the channels carry of the attack; None for the clean photograph.
        carried_map: where they do; positive where the attack takes support from the class.
    """

    case: Case
    effect_map: Tensor
    correlation: Mapping[str, float] = field(default_factory=dict)
    carried: Carried | None = None
    carried_map: Tensor | None = None


@dataclass(frozen=True)
class LayerStudy:
    """The channels of a layer under all evidences.

    Attributes:
        name: of the layer.
        cases: the clean photograph first; empty where the layer cannot be looked at.
        note: why it cannot.
        told: the answer of the clean photograph, and the contributions of the channels.
        passes: passes through the whole network, by what they were for.
        seconds: wall-clock time by what it was for.
    """

    name: str
    cases: tuple[LayerCase, ...] = ()
    note: str = ""
    told: ToldChannels | None = None
    passes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PhotographSection(Section[tuple[Case, ...]]):
    """The answers and the effects of the patches, clean and under each attack."""

    plan: Plan
    name, template = "evidence", "photograph.html.j2"

    def run(self, study: Study) -> tuple[Case, ...]:
        """Attack the photograph, and explain each version of it."""
        return tuple(_case(study, evidence) for evidence in ("clean", *self.plan.attacks))

    def record(self, found: tuple[Case, ...]) -> dict[str, Any]:
        """Answers, and how many patches are outlined."""
        record = {}
        for case in found:
            record[case.name] = {
                "answer": asdict(case.top[0]),
                "explained": asdict(case.explained),
                "answer_changed": case.success,
                "outlined": {maps.answer.name: [maps.n_outlined, maps.n_units] for maps in case.maps},
                "answer_tested": None if case.told is None else case.told.record(),
            }
        return record

    def render(self, found: tuple[Case, ...]) -> dict[str, Any]:
        """The answer, a table of the answers under attack, and the maps."""
        first, outcome = found[0].told, OUTCOMES[self.plan.outcome]
        return {
            "head": "" if first is None else rendered("answer.html.j2", first.render(outcome)),
            "attacks": {name: ATTACK_NAMES[name] for name in self.plan.attacks},
            "explained": found[0].explained.name,
            "outlines": found[0].outlines,
            "cases": [{"case": case, "cells": _cells(case, OUTCOMES[self.plan.outcome])} for case in found],
        }


def _case(study: Study, evidence: str) -> Case:
    """The photograph under one evidence: "clean" or the name of an attack."""
    net, plan, inputs = study.net, study.plan, study.inputs
    attacked = evidence != "clean"
    name, settings, meter = evidence.upper() if attacked else "Clean", dict[str, Any](), Meter(net.model)
    if attacked:
        study.progress(f"{study.name}: {name} attack")
        attack, settings = planned_attack(net, evidence, plan)
        with meter("attack"):
            inputs = attack.perturb(inputs, ids=[study.example_id], seed=plan.seed)
    study.progress(f"{study.name}: {name}, effects")
    with torch.no_grad():
        clean_answer, output = int(net.model(study.inputs).argmax()), double(net.model(inputs))
    values = zip(output.softmax(1)[0].tolist(), resolve_outcome("log_odds")(output, output)[0].tolist(), strict=True)
    answers = [Answer(i, net.class_name(i), probability, odds) for i, (probability, odds) in enumerate(values)]
    top = sorted(answers, key=attrgetter("probability"), reverse=True)[:3]
    success = top[0].index != clean_answer if attacked else None
    shown = [answers[study.target], *([top[0]] if success else [])]
    # Asked for by the user, or the answer under this evidence.
    about = study.target if study.target != clean_answer else top[0].index
    maps, estimate, head = _maps(study, inputs, shown, [one.index for one in top], about, meter)
    span = net.value_range[1] - net.value_range[0]
    change = net.normalization.to_image(inputs) - net.normalization.to_image(study.inputs)
    return Case(
        name=name,
        inputs=inputs,
        picture=net.pictures(inputs)[0],
        top=tuple(top),
        explained=answers[study.target],
        maps=maps,
        perturbation=(change[0] / span).cpu() if attacked else None,
        success=success,
        settings=settings,
        outlines=_outlines(estimate),
        smoothed=estimate.smoothed is not None,
        trials=int(estimate.n_trials),
        passes=meter.passes,
        seconds=meter.seconds,
        told=head,
    )


def _outlines(estimate: Estimate) -> str:
    """What outlined units are."""
    if estimate.std_error is not None:
        return "significant"
    return "not zero" if estimate.smoothed is None else ""


def _maps(
    study: Study, inputs: Tensor, answers: list[Answer], top: list[int], about: int, meter: Meter
) -> tuple[tuple[ClassMaps, ...], Estimate, Told | None]:
    """The maps of each answer, the estimate that they show, and what is told first, about one class."""
    net, plan = study.net, study.plan
    explainer = CausalEffect(
        net.model, plan.intervention, plan.design, outcome=plan.outcome, normalization=net.normalization,
        seed=plan.seed, class_names=net.class_names,
    )  # fmt: skip
    # Designs over a grid know the default one only.
    mask = None if plan.cells == 14 else patch_grid(inputs.shape[2], inputs.shape[3], plan.cells)
    with meter("causal effects"):
        estimate = explainer.estimate(
            inputs,
            ids=[study.example_id],
            feature_mask=mask,
            perturbations_per_eval=plan.perturbations_per_eval,
            answer=True,
            answer_target=about,
        )
    what = _outlines(estimate)
    if what == "significant":
        outlined = estimate.significant(fdr=plan.fdr)
    elif what:
        outlined = estimate.effect.abs() > 10 * _float_noise(net.model, plan.outcome, inputs)
    else:
        outlined = torch.zeros_like(estimate.effect, dtype=torch.bool)
    units = InputSite(cells=plan.cells).units_of((inputs,))
    rows, columns = units.grid or (1, units.width)
    with meter("strongest patches alone"):
        head = told(
            net, explainer, inputs, estimate, classes=[*(one.index for one in answers), *top], grid=(rows, columns),
            mask=mask, example_id=study.example_id,
        )  # fmt: skip

    def plane(values: Tensor) -> Tensor:
        """One value per unit, (1, U), at its pixels, (H, W)."""
        return units.spread(values.to(inputs.device))[0][0].mean(dim=0).cpu()

    maps = []
    for answer in dict.fromkeys(answers):
        with meter("Grad-CAM and saliency"):
            gradients = saliency(net.model, inputs, answer.index)[0]
            cam = (
                None
                if study.grad_cam_layer is None
                else grad_cam(net.model, study.grad_cam_layer[1], inputs, answer.index)[0]
            )
        region = outlined[:, :, answer.index]
        maps.append(
            ClassMaps(
                answer=answer,
                contribution=plane(estimate.smoothed_contribution[:, :, answer.index]),
                outlined=plane(double(region)) > 0.5,
                n_outlined=int(region.sum()),
                n_units=region.shape[1],
                saliency=gradients,
                grad_cam=cam,
            )
        )
    return tuple(maps), estimate, head


def _float_noise(model: nn.Module, outcome: str, inputs: Tensor) -> float:
    """How far the same input's outcome moves when only the size of the batch changes."""
    measure = resolve_outcome(outcome)
    with torch.no_grad():
        rows = [model(inputs.expand(size, *inputs.shape[1:]).contiguous()) for size in (1, 2, 8)]
    values = [measure(row, row) for row in rows]
    moved = max(float((value - values[0]).abs().max()) for value in values)
    return max(moved, float(values[0].abs().max()) * torch.finfo(values[0].dtype).eps)


def check_class(output: object, target: int | None) -> int:
    """The class to explain, once the network's output for one example shows that there is one.

    Args:
        output: what the network returned.
        target: None means its answer.

    Raises:
        ModelError: the network does not return (N, C) with at least two classes.
        TargetError: there is no such class.

    Example:
        >>> check_class(torch.tensor([[0.1, 0.9]]), None)
        1
    """
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(expected("model", "a classifier that returns (N, C) with C > 1", got))
    if target is not None and not 0 <= target < output.shape[1]:
        raise TargetError(expected("target", f"from 0 to {output.shape[1] - 1}", target))
    return int(output[0].argmax()) if target is None else target


def planned_attack(
    net: VisionModel, name: str, plan: Plan, *, multi_label: bool = False
) -> tuple[Adversarial, dict[str, Any]]:
    """An attack of a plan on a network.

    Args:
        net: the network; its ``value_range`` and normalization say what the attack may do.
        name: out of :data:`ATTACKS`.
        plan: its sizes.
        multi_label: each output is a label of its own.

    Returns:
        The attack, and its settings for the reader.

    Example:
        >>> from torch import nn
        >>> net = VisionModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
        >>> planned_attack(net, "fgsm", Plan(eps=8 / 255))[1]
        {'norm': 'L-inf', 'eps': '8/255 of the range'}
    """
    span = net.value_range[1] - net.value_range[0]
    if name == "jsma":
        # JSMA is not bounded in L-inf: it changes few values, as much as it likes.
        settings: dict[str, Any] = {"eps": span, "max_iter": plan.jsma_pairs}
        shown = {"norm": "L0", "step": "the whole range", "pairs of values, at most": plan.jsma_pairs}
    else:
        settings = {"eps": plan.eps * span}
        shown = {"norm": "L-inf", "eps": f"{share(plan.eps)} of the range"}
        if name != "fgsm":
            settings["max_iter"] = plan.max_iter
            shown["steps"] = plan.max_iter
    settings |= {"clip_values": net.value_range, "normalization": net.normalization, "multi_label": multi_label}
    return Adversarial.preset(name, net.model, **settings), shown


def share(value: float) -> str:
    """A share of the range in the way in which it is mostly written.

    Example:
        >>> share(8 / 255), share(0.3)
        ('8/255', '0.3')
    """
    levels = value * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{value:.3g}"


@dataclass
class Meter:
    """Counts passes through the whole network (examples, not batches) and seconds, by purpose."""

    model: nn.Module
    passes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, purpose: str) -> Iterator[None]:
        """Count what is run inside the ``with`` block."""

        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.passes[purpose] = self.passes.get(purpose, 0) + (len(inputs[0]) if inputs else 1)

        start = time.perf_counter()
        try:
            with turn(self.model), self.model.register_forward_pre_hook(in_this_thread(note)):
                yield
        finally:
            self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - start


def grad_cam(model: nn.Module, layer: nn.Module, inputs: Tensor, target: int) -> Tensor:
    """Grad-CAM at a layer, enlarged to the size of the input.

    Args:
        model: the network.
        layer: one of its convolutions; see :func:`last_conv_layer`.
        inputs: (N, C, H, W).
        target: class index.

    Returns:
        (N, H, W), not negative.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> grad_cam(net, net[0], torch.rand(2, 3, 8, 8), target=1).shape
        torch.Size([2, 8, 8])

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), as ``captum.attr.LayerGradCam``.
    """
    with state_guard(model):
        small = LayerGradCam(model, layer).attribute(inputs.clone(), target=target, relu_attributions=True)
    enlarged: Tensor = LayerAttribution.interpolate(small, tuple(inputs.shape[-2:]), "bilinear")
    return enlarged.detach()[:, 0].cpu()


def saliency(model: nn.Module, inputs: Tensor, target: int) -> Tensor:
    """The size of the gradient: the greatest over the channels.

    Args:
        model: the network.
        inputs: (N, C, H, W).
        target: class index.

    Returns:
        (N, H, W), not negative.

    Example:
        >>> saliency(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2), target=0).shape
        torch.Size([1, 2, 2])

    Source: Simonyan et al. 2013 (arXiv 1312.6034), as ``captum.attr.Saliency``.
    """
    with state_guard(model):
        gradient: Tensor = Saliency(model).attribute(inputs.clone().requires_grad_(), target=target)
    return gradient.detach().amax(dim=1).cpu()


def _cells(case: Case, unit: str) -> list[dict[str, Any]]:
    """The pictures of one evidence, four to a row; ``unit`` is the outcome's name."""
    # One scale for both classes: which of two answers a patch moves more can then be seen.
    scale = max(float(maps.contribution.abs().max()) for maps in case.maps)
    title = "The photograph" if case.perturbation is None else f"After {case.name}"
    cells = [cell(title, f"{case.name} picture", case.picture, top=case.top), *_map_cells(case, 0, unit, scale)]
    if case.perturbation is not None:
        shown, caption = _visible(case.perturbation)
        cells.append(cell("What the attack changed", f"perturbation of {case.name}", shown, caption=caption))
        if len(case.maps) > 1:
            cells += _map_cells(case, 1, unit, scale)
        else:
            text = f"The answer is still “{case.top[0].name}”, so there is no second answer to explain."
            cells.append({"text": text})
    return cells


def _map_cells(case: Case, number: int, unit: str, scale: float) -> list[dict[str, Any]]:
    maps = case.maps[number]
    name = maps.answer.name
    effect = overlay(maps.contribution, case.picture, scale=scale or None, significant=maps.outlined)
    alone = " by themselves" if case.outlines == "significant" else ""
    counted = f"; {maps.n_outlined} of {maps.n_units} patches {case.outlines}{alone}" if case.outlines else ""
    caption = f"full colour is ±{scale:.2g} {unit}{counted}"
    cells = [cell(f"Causal effect on “{name}”", f"causal effects on {name}, {case.name}", effect, caption=caption)]
    for label, values in (("Grad-CAM", maps.grad_cam), ("Saliency", maps.saliency)):
        if values is None:
            cells.append({"text": f"{label} needs a late convolution; this network has none."})
        else:
            # A few pixels have gradients far above all others, which would leave the rest colourless.
            high = float(double(values).quantile(0.995))
            shown = overlay(values, case.picture, scale=high or None, sign="positive")
            empty = "" if values.any() else "zero everywhere"
            cells.append(cell(f"{label} of “{name}”", f"{label} of {name}, {case.name}", shown, caption=empty))
    return cells


def _visible(perturbation: Tensor) -> tuple[Tensor, str]:
    """A perturbation for the eye, and what was done to make it visible."""
    changed = perturbation.abs() > 1e-5
    if not changed.any():
        return magnify(perturbation)[0], "nothing was changed"
    if float(changed.any(dim=0).float().mean()) > 0.01:
        shown, factor = magnify(perturbation)
        return shown, f"shown {factor:g} times as large, on gray"
    # Single pixels are lost when the page is scaled: each is drawn three times as wide and high.
    up, down = max_pool2d(perturbation, 3, 1, 1), -max_pool2d(-perturbation, 3, 1, 1)
    shown, factor = magnify(torch.where(up > -down, up, down))
    return (
        shown,
        f"{int(changed.sum())} of {changed.numel():,} values changed; times {factor:g}, on gray, pixels drawn 3 × 3",
    )
