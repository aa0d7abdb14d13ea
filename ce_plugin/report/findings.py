"""What is run for a report, and what comes out of it: numbers and tensors, before any of them is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ce_plugin.designs import Design
from ce_plugin.errors import ArgumentError, expected, unknown_name
from ce_plugin.interventions import Intervention

__all__ = [
    "ATTACKS",
    "OUTCOMES",
    "Answer",
    "Carried",
    "Case",
    "ClassMaps",
    "LayerCase",
    "LayerStudy",
    "Plan",
    "Study",
    "share",
]

ATTACKS = ("fgsm", "bim", "pgd", "jsma")
"""Names of the attacks that a report can hold as evidence, in the order in which it shows them."""

OUTCOMES = {
    "log_odds": "log-odds",
    "probability": "probability",
    "logit": "logit",
    "margin": "margin",
}
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
        outlined: the units that are significant, or, for exact designs, not zero.
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
        picture: what the network saw, (C, H, W), values in [0, 1].
        top: the most probable classes, best first.
        explained: how sure the network is of the class that is explained, under this evidence.
        maps: of the explained class and, where the attack changed the answer, of the new answer.
        perturbation: (C, H, W) as shares of the range; None for the clean photograph.
        success: whether the answer changed; None for the clean photograph.
        settings: of the attack.
        exact: the design has no sampling error, so that ``outlined`` means "not zero".
        trials: number of trials of the design.
        passes: forward passes by what they were for.
        seconds: wall-clock time by what it was for.
    """

    name: str
    picture: Tensor
    top: tuple[Answer, ...]
    explained: Answer
    maps: tuple[ClassMaps, ...]
    perturbation: Tensor | None
    success: bool | None
    settings: Mapping[str, Any]
    exact: bool
    trials: int
    passes: Mapping[str, int]
    seconds: Mapping[str, float]


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
        effect_map: the causal effect map, of the logit.
        correlation: Spearman's, of each method's map with its map of the clean photograph; empty for that one.
        carried: what the channels carry of the attack; None for the clean photograph.
        carried_map: where they do; positive where the attack takes support from the class.
    """

    effect_map: Tensor
    correlation: Mapping[str, float] = field(default_factory=dict)
    carried: Carried | None = None
    carried_map: Tensor | None = None


@dataclass(frozen=True)
class LayerStudy:
    """The channels of a layer under all evidences.

    Attributes:
        name: of the layer.
        cases: in the order of the study's; empty where the layer cannot be looked at.
        note: why it cannot.
        passes: passes through the whole network, by what they were for.
        seconds: wall-clock time by what it was for.
    """

    name: str
    cases: tuple[LayerCase, ...] = ()
    note: str = ""
    passes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One photograph under all evidences; ``layer`` is None for a network without a late convolution."""

    name: str
    cases: tuple[Case, ...]
    layer: LayerStudy | None = None


def share(value: float) -> str:
    """A share of the range in the way in which it is mostly written.

    Example:
        >>> share(8 / 255), share(0.3)
        ('8/255', '0.3')
    """
    levels = value * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{value:.3g}"
