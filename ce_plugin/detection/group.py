"""What a group of interventions is: what it does to a batch of images, and from which sides that is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ce_plugin.detection.classifier import Protected
from ce_plugin.detection.view import View, effects_on_logits, margin_under, outcome_names
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.interventions import Smooth

__all__ = [
    "SIDES",
    "Group",
    "Response",
    "checked_sides",
    "in_image_units",
    "labels_of",
    "response_of",
    "smooth_settings",
]

# "distance": are the effects unlike those of clean images, in any way? "reversal": does an intervention take more of
# the predicted class's margin than the idle logits promise? "margin": does it leave less than to clean images?
SIDES = ("distance", "reversal", "margin")


@dataclass(frozen=True)
class Response:
    """What a group's interventions did to a batch of images.

    Args:
        effects: (N, F), judged from both sides by their distance from those of clean images; F may be 0.
        margins: of the predicted class under each of S interventions, (N, S), judged from one side: does an
            intervention take away more than usual? S may be 0.
        answers: the class that each of the S interventions leaves as the answer, (N, S).
        left: the margins once more where they are also judged whatever the idle logits promise, (N, S); else (N, 0),
            or None for that.
    """

    effects: Tensor
    margins: Tensor
    answers: Tensor
    left: Tensor | None = None

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors."""
        return self.effects, self.margins, self.answers, self.effects[:, :0] if self.left is None else self.left

    def select(self, rows: Tensor | slice) -> Response:
        """That of some of the images."""
        return Response(*(part[rows] for part in self.parts()))

    def detached(self) -> Response:
        """Without gradients, on the CPU."""
        return Response(*(part.detach().cpu() for part in self.parts()))

    @staticmethod
    def joined(parts: Sequence[Response]) -> Response:
        """Those of several batches, one after the other."""
        columns = zip(*(one.parts() for one in parts), strict=True)
        return Response(*(torch.cat(column) for column in columns))


class Group(ABC):
    """Interventions whose effects are judged together: one distance, one place in the report.

    Attributes:
        name: what reports call it.
        passes: what it costs for one image, in forward passes of the network (a backward pass counts as two), the
            idle run not included.
        differentiable: whether its effects have a gradient with respect to the images.
    """

    name: str
    passes: float
    differentiable: bool = True

    @abstractmethod
    def respond(self, view: View) -> Response:
        """What the group's interventions do to a batch of images."""

    @abstractmethod
    def labels(self, n_classes: int) -> list[str]:
        """What each of the F effects is, in words: "Smooth.gauss(1.0) on the logit of class 3"; none where F is 0."""

    @abstractmethod
    def interventions(self) -> list[str]:
        """The interventions in words; where margins are looked at, these are the S."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that make this group again, as JSON takes them."""

    def ranges(self) -> list[tuple[float, float]]:
        """Least and greatest value of the images that its interventions were made for, where they depend on it."""
        return []

    def prepared(self, protected: Protected, images: Tensor, *, n_epochs: int, seed: int) -> Group:
        """The group, having learned what it needs from clean images (N, C, H, W); most need nothing."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What it has learned."""
        return {}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Group:
        """The group with what :meth:`tensors` gave."""
        return self

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({inside})"


def response_of(view: View, runs: Sequence[Tensor], judged: tuple[str, ...]) -> Response:
    """Effects, margins and answers of interventions with these logits, as far as they are judged."""
    nothing = view.logits[:, :0]
    logits = torch.stack(list(runs), 1) if runs else None
    if logits is None:
        return Response(nothing, nothing, nothing.long())
    effects = torch.cat([effects_on_logits(run, view.logits) for run in runs], 1) if "distance" in judged else nothing
    margins, answers = margin_under(logits, view.logits), logits.argmax(2)
    sides = [margins if side in judged else nothing for side in SIDES[1:]]
    return Response(
        effects, sides[0], answers if any(side in judged for side in SIDES[1:]) else nothing.long(), sides[1]
    )


def checked_sides(judged: Sequence[str]) -> tuple[str, ...]:
    """From which sides a group is judged.

    Raises:
        ArgumentError: none, or unknown ones.
    """
    if isinstance(judged, str) or not judged or not set(judged) <= set(SIDES):
        raise ArgumentError(expected("judged", f"one or more of {SIDES}", repr(judged)))
    return tuple(side for side in SIDES if side in judged)


def in_image_units(smooth: Smooth | dict[str, Any]) -> Smooth:
    """A smoothing, or the arguments that make it, as a group can use it.

    Raises:
        ArgumentError: it expects normalised images, and would smooth images in image units wrongly.
    """
    made = smooth if isinstance(smooth, Smooth) else Smooth(**smooth)
    if not made.normalization.is_identity:
        todo = "Images come to a detector in image units: leave `normalization` out of the filter."
        raise ArgumentError(expected("filters", "in image units", repr(made), todo))
    return made


def smooth_settings(smooth: Smooth) -> dict[str, Any]:
    """The arguments that make a smoothing again, as JSON takes them."""
    return {"steps": [list(step) for step in smooth.steps], "value_range": list(smooth.value_range)}


def labels_of(interventions: Sequence[str], n_classes: int) -> list[str]:
    """One label for each intervention and outcome."""
    outcomes = outcome_names(n_classes, "class {}".format)
    return [f"{one} on {outcome}" for one in interventions for outcome in outcomes]
