"""What is attacked, within what bounds, and in which direction: the target model, the ball, the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import ModelError, expected
from ce_plugin.networks.forward import widest


def margin_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Best other logit minus that of the label, (N,): positive where the label lost."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - own


@dataclass(frozen=True)
class Evaluation:
    """Outputs of classifier and detector on images, values only.

    Attributes:
        margin: best other logit minus that of the label, (N,).
        wrong: misclassified, by more than a batch of another size could round away, (N,).
        score: the detector's, (N,); infinite where it was not run.
        predicted: predicted classes, (N,).
    """

    margin: Tensor
    wrong: Tensor
    score: Tensor
    predicted: Tensor

    def select(self, rows: Tensor) -> Evaluation:
        """The outputs on some of the images."""
        return Evaluation(self.margin[rows], self.wrong[rows], self.score[rows], self.predicted[rows])

    @staticmethod
    def joined(parts: Sequence[Evaluation]) -> Evaluation:
        """The outputs on the images of several evaluations, one after the other."""
        columns = [(one.margin, one.wrong, one.score, one.predicted) for one in parts]
        return Evaluation(*map(torch.cat, zip(*columns, strict=True)))

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
    """An evaluation, and the gradients at the same images.

    Attributes:
        evaluated: the outputs.
        lead: the margin over the label, or of the target class over all others, (N,).
        classifier: gradient of ``lead``, (N, ...).
        detector: gradient of the score, (N, ...); zero where it was not run.
    """

    evaluated: Evaluation
    lead: Tensor
    classifier: Tensor
    detector: Tensor


class TargetModel:
    """Classifier and detector, evaluated and differentiated together.

    Args:
        network: images in image units to logits (N, C).
        detector: its ``score_tensor`` is all that is used.
        eot: draws of the detector's score that are averaged.
    """

    def __init__(self, network: nn.Module, detector: DifferentiableDetector, eot: int) -> None:
        self.network = network
        self.detector = detector
        self.eot = eot

    def evaluate(self, images: Tensor, labels: Tensor) -> Evaluation:
        """Outputs of both on images (N, ...) with these labels (N,)."""
        with torch.no_grad():
            logits = self.network(images)
            return _evaluation(logits, labels, self._score(images))

    def predict(self, images: Tensor) -> Tensor:
        """The classifier's logits (N, C)."""
        with torch.no_grad():
            logits: Tensor = self.network(images)
        return logits

    def differentiate(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, selective: Tensor | None
    ) -> Gradients:
        """Evaluation and gradients at images (N, ...).

        Args:
            images: stored images.
            labels: classes to leave, (N,).
            targets: classes to reach, (N,); None: any other class.
            selective: leads (N,) above which the detector is run; None runs it on all images. It always runs on
                misclassified images, as their score counts.
        """
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.network(leaf)
            lead = margin_of(logits, labels) if targets is None else -margin_of(logits, targets)
            (climb,) = torch.autograd.grad(lead.sum(), leaf)
        evaluated = _evaluation(logits.detach(), labels, torch.full_like(lead, torch.inf, requires_grad=False))
        lead = lead.detach()
        score, descent = evaluated.score, torch.zeros_like(images)
        run = torch.ones_like(evaluated.wrong) if selective is None else evaluated.wrong | (lead > selective)
        if run.any():
            some = images[run].detach().requires_grad_()
            with torch.enable_grad():
                values = self._score(some)
                if not values.requires_grad:
                    raise ModelError(expected("detector", "one whose `score_tensor` has a gradient", "none"))
                (gradient,) = torch.autograd.grad(values.sum(), some)
            score[run] = values.detach().to(score.dtype).nan_to_num(nan=torch.inf)
            descent[run] = gradient.to(descent.dtype)
        return Gradients(evaluated, lead, _finite(climb), _finite(descent))

    def _score(self, images: Tensor) -> Tensor:
        draws = [self.detector.score_tensor(images) for _ in range(self.eot)]
        for draw in draws:
            if draw.shape != images.shape[:1]:
                wanted = f"one whose `score_tensor` gives one score per image, ({len(images)},)"
                raise ModelError(expected("detector", wanted, tuple(draw.shape)))
        return draws[0] if self.eot == 1 else torch.stack(draws).mean(dim=0)


def _evaluation(logits: Tensor, labels: Tensor, score: Tensor) -> Evaluation:
    margin = margin_of(logits, labels)
    # Ties that a batch of another size breaks otherwise are no misclassifications.
    ties = 100 * torch.finfo(logits.dtype).eps * (1 + logits.abs().amax(dim=1))
    return Evaluation(
        margin, margin > ties, score.to(widest(score.device)).nan_to_num(nan=torch.inf), logits.argmax(dim=1)
    )


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


# Share of a level, and of eps, by which rounding of the arithmetic may miss.
_TOLERANCE = 1e-3
_SLACK = 1e-6


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) shaped to multiply images (N, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def flat_norm(images: Tensor) -> Tensor:
    """Euclidean norm of each image, (N,)."""
    norms: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms


class Ball:
    """The images within eps of the clean ones that lie inside the clip values.

    Args:
        clean: (N, ...), in image units, inside the clip values.
        eps: radius in image units; ``math.inf``: everything inside the clip values.
        norm: "inf" or "2".
        clip: lowest and highest value of an image.
        levels: how many values a stored pixel can take, equally spaced over the clip values; None is no rounding.
    """

    def __init__(self, clean: Tensor, eps: float, norm: str, clip: tuple[float, float], levels: int | None) -> None:
        self.clean = clean
        self.eps = eps
        self.norm = norm
        self.is_box = norm == "inf" or math.isinf(eps)
        self.clip = clip
        self.levels = levels
        self._steps = 1 if levels is None else levels - 1
        reach = eps if norm == "inf" else math.inf
        self.low = (clean - reach).clamp_min(clip[0])
        self.high = (clean + reach).clamp_max(clip[1])

    def select(self, rows: Tensor) -> Ball:
        """The ball of some of the images."""
        return Ball(self.clean[rows], self.eps, self.norm, self.clip, self.levels)

    @property
    def radius(self) -> float:
        """What a step is measured by: eps, but no more than the ball leaves room for."""
        span = self.clip[1] - self.clip[0]
        if self.is_box:
            return min(self.eps, span)
        return min(self.eps, span * math.sqrt(self.clean[0].numel()))

    @property
    def is_frozen(self) -> bool:
        """Whether rounding leaves no room for any change."""
        return self.levels is not None and self.eps * (self._steps + _TOLERANCE) < self.clip[1] - self.clip[0]

    def project(self, images: Tensor) -> Tensor:
        """The images brought into the ball: for both norms no farther from the clean ones than they were."""
        if self.is_box:
            return torch.minimum(torch.maximum(images, self.low), self.high)
        change = images - self.clean
        shrunk = self.clean + change * per_image((self.eps / flat_norm(change).clamp_min(1e-30)).clamp_max(1), change)
        return shrunk.clamp(*self.clip)

    def contains(self, images: Tensor) -> Tensor:
        """Whether each image lies inside, but for the rounding of the arithmetic, (N,)."""
        slack = _SLACK * (self.clip[1] - self.clip[0])
        inside = ((images >= self.low - slack) & (images <= self.high + slack)).flatten(1).all(dim=1)
        return inside if self.is_box else inside & (flat_norm(images - self.clean) <= self.eps * (1 + _SLACK) + slack)

    def store(self, images: Tensor) -> Tensor:
        """Images of the ball as a file would hold them: the nearest level that lies in the ball."""
        if self.levels is None:
            return images
        place = self._place(images)
        if self.is_box:
            lowest = (self._place(self.low) - _TOLERANCE).ceil()
            highest = (self._place(self.high) + _TOLERANCE).floor()
            return self._value(torch.minimum(torch.maximum(place.round(), lowest), highest))
        near = self._value(place.round())
        # Rounding up may leave a Euclidean ball; rounding towards the clean image does not.
        inward = torch.where(images >= self.clean, (place + _TOLERANCE).floor(), (place - _TOLERANCE).ceil())
        return torch.where(per_image(self.contains(near), near), near, self._value(inward))

    def random(self, generators: Sequence[torch.Generator]) -> Tensor:
        """A random point for each image: uniform in the box, or in direction and length in a Euclidean ball."""
        clean = self.clean
        shape = clean.shape[1:]
        if self.is_box:
            share = torch.stack([torch.rand(shape, generator=g, dtype=clean.dtype) for g in generators])
            return self.low + (self.high - self.low) * share.to(clean.device)
        noise = torch.stack([torch.randn(shape, generator=g, dtype=clean.dtype) for g in generators]).to(clean.device)
        length = torch.stack([torch.rand((), generator=g, dtype=clean.dtype) for g in generators]).to(clean.device)
        return self.project(clean + noise * per_image(self.radius * length / flat_norm(noise), noise))

    def _place(self, images: Tensor) -> Tensor:
        """Position on the scale of levels, 0 to levels - 1, not rounded."""
        return (images - self.clip[0]) * self._steps / (self.clip[1] - self.clip[0])

    def _value(self, place: Tensor) -> Tensor:
        """The value at a level: for clip values (0, 1) exactly level / (levels - 1)."""
        return place.clamp(0, self._steps) * (self.clip[1] - self.clip[0]) / self._steps + self.clip[0]


_HARDER, _SOFTER = 1.3, 0.8
_TRADED = 0.5
_LIGHTEST, _HEAVIEST = 1e-2, 1e2


def _unit(gradient: Tensor) -> Tensor:
    return gradient / per_image(flat_norm(gradient).clamp_min(1e-30), gradient)


def _without(vector: Tensor, other: Tensor) -> Tensor:
    """Unit vectors (N, ...) without their component along other unit vectors."""
    along = (vector * other).flatten(1).sum(dim=1)
    return vector - per_image(along, other) * other


class Objective:
    """The direction of one run's steps on a batch; it keeps what a loss adapts on the way.

    Args:
        loss: a name of :data:`LOSSES`.
        kappa: lead that the wrong class is to have at first, (N,); it falls to 0 over the first half of the
            steps, and is traded for a lower score.
    """

    def __init__(self, loss: str, kappa: Tensor) -> None:
        self.loss = loss
        self.first = kappa
        self.kappa = kappa
        self.weight = torch.ones_like(kappa)

    def move_to(self, share: float) -> None:
        """Set the lead that the wrong class is to have after this share of the steps."""
        self.kappa = self.first * max(0.0, 1 - share / _TRADED)

    @property
    def selective(self) -> Tensor | None:
        """Leads above which the detector's gradient is needed; None where it always is."""
        return self.kappa if self.loss == "selective" else None

    def direction(self, at: Gradients) -> Tensor:
        """Unit directions (N, ...) that lead to a wrong class and a low score; zero where both gradients are."""
        return _unit(LOSSES[self.loss](self, at))

    def _reached(self, at: Gradients) -> Tensor:
        return per_image(at.lead > self.kappa, at.classifier)

    def _selective(self, at: Gradients) -> Tensor:
        return torch.where(self._reached(at), -at.detector, at.classifier)

    def _orthogonal(self, at: Gradients) -> Tensor:
        climb, descent = _unit(at.classifier), -_unit(at.detector)
        return torch.where(self._reached(at), _without(descent, climb), _without(climb, descent))

    def _lagrangian(self, at: Gradients) -> Tensor:
        reached = at.lead > self.kappa
        self.weight = (self.weight * torch.where(reached, _SOFTER, _HARDER)).clamp(_LIGHTEST, _HEAVIEST)
        hinge = torch.where(reached, 0.0, self.weight)
        return per_image(hinge, at.classifier) * _unit(at.classifier) - _unit(at.detector)


LOSSES: dict[str, Callable[[Objective, Gradients], Tensor]] = {
    "selective": Objective._selective,
    "orthogonal": Objective._orthogonal,
    "lagrangian": Objective._lagrangian,
    "targeted": Objective._lagrangian,
}
