"""What ``nodes`` and ``map`` have in common: one picture, one layer, one class, clean and under an attack."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ce_plugin.cli._session import class_index, intervention, layer_name, network
from ce_plugin.datasets import read_image
from ce_plugin.interventions import Intervention
from ce_plugin.models import VisionModel
from ce_plugin.report import Plan, check_out, file_sha256, planned_attack

__all__ = ["Question"]


@dataclass(frozen=True)
class Question:
    """The options of a command, resolved and checked before any work.

    Args:
        net: the network.
        inputs: the picture as the network takes it, (1, C, H, W).
        layer: dotted name.
        target: class index.
        logits: the network's answer to the clean picture, (1, C).
        intervention: what a channel is set to.
        prints: what identifies the picture, for the manifest.
        attack: settings of the attack, for the manifest; empty without one.
        attacked: the picture under the attack, or None.
    """

    net: VisionModel
    inputs: Tensor
    layer: str
    target: int
    logits: Tensor
    intervention: Intervention
    prints: dict[str, Any]
    attack: dict[str, Any] = field(default_factory=dict)
    attacked: Tensor | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Question:
        """Resolve the options.

        Raises:
            CEPluginError: whatever can be put right.
        """
        check_out(arguments.out, force=arguments.force)
        picture = read_image(arguments.image)
        net = network(arguments)
        done = intervention(arguments, net)
        inputs = net.inputs([picture])
        with torch.no_grad():
            logits = net.model(inputs)
        target = class_index(net, arguments.target, logits)
        layer = layer_name(net, inputs, arguments.layer)
        prints = {arguments.image.name: {"file": str(arguments.image), "sha256": file_sha256(arguments.image)}}
        if arguments.given is None:
            return cls(net, inputs, layer, target, logits, done, prints)
        attack, settings = planned_attack(net, arguments.given, Plan(attacks=(arguments.given,), eps=arguments.eps))
        attacked = attack.perturb(inputs, ids=[0], seed=arguments.seed)
        return cls(net, inputs, layer, target, logits, done, prints, settings, attacked)

    def classes(self, most: int | None) -> list[int]:
        """The target, and the other most probable classes, up to ``most`` (None: all)."""
        others = self.logits[0].argsort(descending=True, stable=True).tolist()
        return [self.target, *(c for c in others if c != self.target)][:most]

    def answers(self, inputs: Tensor) -> str:
        """What the network answers, in words."""
        with torch.no_grad():
            probability = self.net.model(inputs).double().softmax(1)[0]
        best = int(probability.argmax())
        words = f"{self.net.class_name(best)} ({float(probability[best]):.2f})"
        if best != self.target:
            words += f"; {self.net.class_name(self.target)} ({float(probability[self.target]):.2g})"
        return words
