"""The attacks of a report, in the network's own units, and how a reader is told what they do."""

from __future__ import annotations

from typing import Any

from ce_plugin.interventions.adversarial import Adversarial
from ce_plugin.models import VisionModel
from ce_plugin.report.findings import Plan, share

__all__ = ["evidence_name", "planned_attack"]


def evidence_name(evidence: str) -> str:
    """What a report calls an evidence.

    Example:
        >>> evidence_name("clean"), evidence_name("pgd")
        ('Clean', 'PGD')
    """
    return "Clean" if evidence == "clean" else evidence.upper()


def planned_attack(net: VisionModel, name: str, plan: Plan) -> tuple[Adversarial, dict[str, Any]]:
    """An attack of a plan on a network.

    Args:
        net: the network; its ``value_range`` and normalization say what the attack may do.
        name: out of :data:`~ce_plugin.report.ATTACKS`.
        plan: its sizes.

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
    attack = Adversarial.preset(
        name, net.model, clip_values=net.value_range, normalization=net.normalization, **settings
    )
    return attack, shown
