"""What is attacked: a classifier and a detector, evaluated and differentiated together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import ModelError, expected

__all__ = ["Gradients", "Judgement", "Victim", "margin_of"]


def margin_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Best other logit minus that of the label, (N,): positive where the label lost."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - own


@dataclass(frozen=True)
class Judgement:
    """What classifier and detector say to images, values only.

    Attributes:
        margin: best other logit minus that of the label, (N,).
        wrong: misclassified, by more than a batch of another size could round away, (N,).
        score: the detector's, (N,); infinite where it was not asked for.
        predicted: predicted classes, (N,).
    """

    margin: Tensor
    wrong: Tensor
    score: Tensor
    predicted: Tensor

    def select(self, rows: Tensor) -> Judgement:
        """What they say to some of the images."""
        return Judgement(self.margin[rows], self.wrong[rows], self.score[rows], self.predicted[rows])

    def foremost(self, width: int) -> Tensor:
        """Of every ``width`` images side by side the place of the best, (N / width,): misclassified with the least
        score; failing that, with the greatest margin.
        """
        score = torch.where(self.wrong, self.score, torch.inf).reshape(-1, width)
        least, first = score.min(dim=1)
        first = torch.where(least.isinf(), self.margin.reshape(-1, width).argmax(dim=1), first)
        return first + width * torch.arange(len(first), device=first.device)


@dataclass(frozen=True)
class Gradients:
    """A judgement, and the gradients at the same images.

    Attributes:
        judged: the judgement.
        lead: what is climbed: the margin against the label, or of the target over all others, (N,).
        classifier: gradient of ``lead``, (N, ...).
        detector: gradient of the score, (N, ...); zero where it was not asked for.
    """

    judged: Judgement
    lead: Tensor
    classifier: Tensor
    detector: Tensor


class Victim:
    """Classifier and detector, as one thing to ask.

    Args:
        network: images in image units to logits (N, C).
        detector: its ``score_tensor`` is all that is used.
        eot: draws of the detector's score that are averaged.
    """

    def __init__(self, network: nn.Module, detector: DifferentiableDetector, eot: int) -> None:
        self.network = network
        self.detector = detector
        self.eot = eot

    def judge(self, images: Tensor, labels: Tensor) -> Judgement:
        """What both say to images (N, ...) with these labels (N,)."""
        with torch.no_grad():
            logits = self.network(images)
            return _judgement(logits, labels, self._score(images))

    def predict(self, images: Tensor) -> Tensor:
        """The classifier's logits (N, C)."""
        with torch.no_grad():
            logits: Tensor = self.network(images)
        return logits

    def differentiate(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, selective: Tensor | None
    ) -> Gradients:
        """Judgement and gradients at images (N, ...).

        Args:
            images: stored images.
            labels: classes to leave, (N,).
            targets: classes to reach, (N,); None: any other class.
            selective: leads (N,) above which the detector is asked; None asks it about all. Misclassified images
                are always asked about, as their score counts.
        """
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.network(leaf)
            lead = margin_of(logits, labels) if targets is None else -margin_of(logits, targets)
            (climb,) = torch.autograd.grad(lead.sum(), leaf)
        judged = _judgement(logits.detach(), labels, torch.full_like(lead, torch.inf, requires_grad=False))
        lead = lead.detach()
        score, descent = judged.score, torch.zeros_like(images)
        asked = torch.ones_like(judged.wrong) if selective is None else judged.wrong | (lead > selective)
        if asked.any():
            some = images[asked].detach().requires_grad_()
            with torch.enable_grad():
                values = self._score(some)
                if not values.requires_grad:
                    raise ModelError(expected("detector", "one whose `score_tensor` has a gradient", "none"))
                (gradient,) = torch.autograd.grad(values.sum(), some)
            score[asked] = values.detach().double().nan_to_num(nan=torch.inf)
            descent[asked] = gradient.to(descent.dtype)
        return Gradients(judged, lead, _finite(climb), _finite(descent))

    def _score(self, images: Tensor) -> Tensor:
        draws = [self.detector.score_tensor(images) for _ in range(self.eot)]
        for draw in draws:
            if draw.shape != images.shape[:1]:
                wanted = f"one whose `score_tensor` gives one score per image, ({len(images)},)"
                raise ModelError(expected("detector", wanted, tuple(draw.shape)))
        return draws[0] if self.eot == 1 else torch.stack(draws).mean(dim=0)


def _judgement(logits: Tensor, labels: Tensor, score: Tensor) -> Judgement:
    margin = margin_of(logits, labels)
    # Ties that a batch of another size breaks otherwise are no misclassifications.
    ties = 100 * torch.finfo(logits.dtype).eps * (1 + logits.abs().amax(dim=1))
    return Judgement(margin, margin > ties, score.double().nan_to_num(nan=torch.inf), logits.argmax(dim=1))


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
