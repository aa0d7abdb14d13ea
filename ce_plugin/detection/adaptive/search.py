"""The search: restarts times losses of projected steps on one batch of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ce_plugin.detection.adaptive.objective import (
    Ball,
    Evaluation,
    Objective,
    TargetModel,
    flat_norm,
    margin_of,
    per_image,
)
from ce_plugin.detection.adaptive.results import Curves, Incumbent
from ce_plugin.networks.forward import widest
from ce_plugin.randomness import generator, numpy_generator

_KEPT = 8
# Results nearer to each other than this share of their change count as the same.
_SAME = 0.1


class Archive:
    """For each image of a batch the best results so far that differ from each other.

    Args:
        clean: the images, (N, ...).
    """

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean
        self.images = clean[:, None].repeat_interleave(_KEPT, dim=1)
        self.scores = torch.full((len(clean), _KEPT), torch.inf, dtype=widest(clean.device), device=clean.device)

    def offer(self, images: Tensor, scores: Tensor, rows: Tensor) -> None:
        """Take results (n, W, ...) with scores (n, W), infinite for failures, for some images (n,)."""
        scores, order = torch.cat([self.scores[rows], scores], 1).sort(dim=1, stable=True)
        images = _take(torch.cat([self.images[rows], images], 1), order)
        scores = torch.where(self._repeats(images, scores, rows), torch.inf, scores)
        scores, order = scores.sort(dim=1, stable=True)
        self.scores[rows] = scores[:, :_KEPT]
        self.images[rows] = _take(images, order[:, :_KEPT])

    def partners(self, rows: Tensor, share: Tensor, otherwise: Tensor) -> Tensor:
        """For some images a result other than the best, at a share (n,) of their list; ``otherwise`` where none is."""
        others = self.scores[rows].isfinite().sum(dim=1) - 1
        place = 1 + (share * others.clamp_min(0)).long()
        return torch.where(per_image(others > 0, otherwise), self.images[rows, place], otherwise)

    def _repeats(self, images: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
        """Which of the images (n, K, ...), best first, nearly equal an earlier one, (n, K)."""
        flat = (images - self.clean[rows][:, None]).flatten(2)
        # The quicker way by products would round equal images apart.
        distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        near = distance < _SAME * flat.norm(dim=2)[:, None]
        repeats = torch.zeros_like(scores, dtype=torch.bool)
        for place in range(1, scores.shape[1]):
            repeats[:, place] = (near[:, place, :place] & ~repeats[:, :place]).any(dim=1)
        return repeats


def _take(images: Tensor, order: Tensor) -> Tensor:
    """Images (n, K, ...) in another order, (n, K')."""
    return images[torch.arange(len(images), device=order.device)[:, None], order]


@dataclass(frozen=True)
class SearchConfig:
    """How the search is run.

    Attributes:
        losses: names of :data:`LOSSES`.
        restarts: runs of each loss.
        width: points that a run starts from at once.
        steps: steps of each run.
        step: first step as a share of the ball's radius.
        seed: seed of everything random.
        threshold: score at which an image is left alone; None never leaves one alone.
    """

    losses: Sequence[str]
    restarts: int
    width: int
    steps: int
    step: float
    seed: int
    threshold: float | None


@dataclass(frozen=True)
class SearchBatch:
    """Images that are attacked together; results do not depend on the batch.

    Attributes:
        ball: where images may go.
        labels: classes to leave, (N,).
        ids: one for each image, which names its random numbers.
        logits: of the clean images, (N, C).
        starts: images (N, ...) that are among the results from the first, or None.
    """

    ball: Ball
    labels: Tensor
    ids: Sequence[int]
    logits: Tensor
    starts: Tensor | None


_KINDS = ("clean", "candidate", "clean")
# Share of the values that differ from the clean image at the start. In the results few do.
_DENSITIES = (0.1, 0.02, 0.2, 0.05, 1.0)
# How far a start lies on the way from the best to another result.
_WAYS = (0.1, 0.3, 0.05, 0.5, 0.2)


def kind_of(restart: int) -> str:
    """What a restart starts from: after the first ones always the best so far."""
    return _KINDS[restart] if restart < len(_KINDS) else "best"


class Search:
    """The search on one batch: every loss from every start.

    Args:
        model: classifier and detector.
        batch: the images.
        config: how the search is run.
        candidates: images of other classes, or None.
    """

    def __init__(
        self, model: TargetModel, batch: SearchBatch, config: SearchConfig, candidates: Candidates | None
    ) -> None:
        self.model = model
        self.batch = batch
        self.config = config
        ball = batch.ball
        stored = ball.store(ball.clean)
        self.incumbent = Incumbent(stored, model.evaluate(stored, batch.labels), "clean")
        if batch.starts is not None:
            stored = ball.store(ball.project(batch.starts))
            everything = torch.arange(len(stored), device=stored.device)
            self.incumbent.offer(stored, model.evaluate(stored, batch.labels), everything, ("start", -1))
        self.candidates = None if candidates is None else candidates.near(batch, config.seed, self.incumbent)
        self.archive = Archive(ball.clean)
        # The least unlikely class first.
        likely = batch.logits.scatter(1, batch.labels[:, None], -torch.inf)
        self.classes = likely.argsort(dim=1, descending=True, stable=True)[:, : likely.shape[1] - 1]

    def run(self, curves: Curves, tick: Callable[[], object]) -> Incumbent:
        """The best images; a restart knows only of the restarts before it.

        Args:
            curves: take the scores of each run.
            tick: called after each run.
        """
        for restart in range(self.config.restarts):
            for loss in self.config.losses:
                rows = self.incumbent.open(self.config.threshold)
                if len(rows):
                    points, targets = self._starts(loss, restart, rows)
                    run = _Run(self.model, self.batch, self.config, loss, restart, rows)
                    curves.add(loss, restart, run(points, targets, self.incumbent, self.archive))
                tick()
        return self.incumbent

    def _starts(self, loss: str, restart: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Points (n * width, ...) for some images (n,), each image's side by side, and target classes (n * width,)."""
        kind = kind_of(restart)
        if kind == "candidate" and self.candidates is None:
            kind = "clean"
        ball, width = self.batch.ball.select(rows), range(self.config.width)
        points = [self._points(kind, loss, restart, copy, rows, ball) for copy in width]
        if loss != "targeted":
            return torch.stack(points, 1).flatten(0, 1), None
        targets = [self._targets(kind, restart, copy, rows, points[copy]) for copy in width]
        return torch.stack(points, 1).flatten(0, 1), torch.stack(targets, 1).flatten()

    def _points(self, kind: str, loss: str, restart: int, copy: int, rows: Tensor, ball: Ball) -> Tensor:
        """One point for each image, (n, ...)."""
        number = self.config.losses.index(loss)
        if kind == "candidate" and self.candidates is not None:
            candidates = self.candidates[rows]
            return candidates[:, (number * self.config.width + copy) % candidates.shape[1]]
        turn = restart * self.config.width + copy + number
        ids = [self.batch.ids[row] for row in rows.tolist()]
        randoms = [generator(self.config.seed, i, "start", loss, restart, copy) for i in ids]
        point = ball.random(randoms)
        if kind == "clean":
            place = torch.stack([torch.rand(ball.clean.shape[1:], generator=one) for one in randoms]).to(point.device)
            return ball.project(torch.where(place < _DENSITIES[turn % len(_DENSITIES)], point, ball.clean))
        share = torch.stack([torch.rand((), generator=one) for one in randoms]).to(point.device)
        best = self.incumbent.images[rows]
        way = _WAYS[turn % len(_WAYS)] * (self.archive.partners(rows, share, point) - best)
        return torch.where(per_image(self.incumbent.success[rows], best), best + way, point)

    def _targets(self, kind: str, restart: int, copy: int, rows: Tensor, points: Tensor) -> Tensor:
        """The class that each image is to reach, (n,): that of a misclassified start, and else one after another."""
        targets = self.classes[rows][:, (restart * self.config.width + copy) % self.classes.shape[1]]
        if kind not in ("candidate", "best"):
            return targets
        predicted = self.model.predict(points).argmax(dim=1)
        return torch.where(predicted == self.batch.labels[rows], targets, predicted)


# The lead that the wrong class is to have at first, as a share of the clean image's. Points differ in where they trade
# it for the score; a negative one lets the score fall first. From the best so far the boundary is near already.
_KAPPAS = (0.1, -0.5, 0.3, -0.25, 0.0)
_KAPPAS_OF_BEST = (0.0, 0.1, -0.25)
_PACE_OF_BEST = 0.5
_MOMENTUM = 0.5
_LAST = 0.005
_SOFT = 0.1


class _Run:
    """One loss from one start, or from several at once, of each image."""

    def __init__(
        self, model: TargetModel, batch: SearchBatch, config: SearchConfig, loss: str, restart: int, rows: Tensor
    ) -> None:
        self.model = model
        self.config = config
        self.loss = loss
        self.restart = restart
        self.rows = rows
        many = rows.repeat_interleave(config.width)
        self.ball = batch.ball.select(many)
        self.labels = batch.labels[many]
        self.names = [(batch.ids[row], copy) for row in rows.tolist() for copy in range(config.width)]
        is_best = kind_of(restart) == "best"
        self.pace = _PACE_OF_BEST if is_best else 1.0
        shares = _KAPPAS_OF_BEST if is_best else _KAPPAS
        first = restart * config.width + config.losses.index(loss)
        some = [shares[(first + copy) % len(shares)] for copy in range(config.width)]
        clean = margin_of(batch.logits[many], self.labels).abs()
        self.objective = Objective(
            loss, clean * torch.tensor(some, dtype=clean.dtype).repeat(len(rows)).to(clean.device)
        )

    def __call__(self, start: Tensor, targets: Tensor | None, incumbent: Incumbent, archive: Archive) -> Tensor:
        """Run, offer each point's best image to ``incumbent`` and ``archive``, and return scores (steps + 1, n)."""
        x, speed, width = start, torch.zeros_like(start), self.config.width
        points = torch.arange(len(start), device=start.device)
        best = Incumbent.placeholder(start)
        scores = []
        for step in range(self.config.steps + 1):
            self.objective.move_to(step / self.config.steps)
            stored = self.ball.store(x)
            at = self.model.differentiate(stored, self.labels, targets, self.objective.selective)
            best.offer(stored, at.evaluated, points, (self.loss, self.restart))
            scores.append(best.score.reshape(-1, width).amin(dim=1))
            speed = _MOMENTUM * speed + (1 - _MOMENTUM) * self._moving(self.objective.direction(at), step)
            x = self.ball.project(x + self._length(step) * self._shape(speed))
        evaluated = best.evaluation()
        first = evaluated.foremost(width)
        incumbent.offer(best.images[first], evaluated.select(first), self.rows, (self.loss, self.restart))
        archive.offer(best.images.reshape(-1, width, *start.shape[1:]), best.score.reshape(-1, width), self.rows)
        return torch.stack(scores)

    def _length(self, step: int) -> float:
        """From the first step's length down to a small part of it, along a half cosine."""
        falling = (1 + math.cos(math.pi * step / self.config.steps)) / 2
        return self.pace * self.config.step * self.ball.radius * (_LAST + (1 - _LAST) * falling)

    def _shape(self, speed: Tensor) -> Tensor:
        """Nearly one unit for each value in the box, the image by one unit in a Euclidean ball.

        Plain signs would step as far where the gradient hardly points anywhere, and never settle.
        """
        size = per_image(flat_norm(speed).clamp_min(1e-30), speed)
        if not self.ball.is_box:
            return speed / size
        return speed / (speed.abs() + _SOFT * size / math.sqrt(speed[0].numel()))

    def _moving(self, direction: Tensor, step: int) -> Tensor:
        """Random directions in the place of those that are zero, so that a plateau can be left."""
        stuck = flat_norm(direction) == 0
        for row in stuck.nonzero().flatten().tolist():
            draw = generator(self.config.seed, *self.names[row], "direction", self.loss, self.restart, step)
            noise = torch.randn(direction.shape[1:], generator=draw, dtype=direction.dtype).to(direction.device)
            direction[row] = noise / noise.norm()
        return direction


_TRIED = 128
_CANDIDATES_KEPT = 16


class Candidates:
    """Images of other classes, and their predicted classes.

    Args:
        model: classifier and detector.
        images: (M, ...).
        batch_size: images evaluated together.
    """

    def __init__(self, model: TargetModel, images: Tensor, batch_size: int) -> None:
        self.model = model
        self.images = images
        self.batch_size = batch_size
        parts = [model.predict(part).argmax(dim=1) for part in torch.split(images, batch_size)]
        self.predicted = torch.cat(parts).cpu().numpy()

    def near(self, batch: SearchBatch, seed: int, incumbent: Incumbent) -> Tensor:
        """Some candidates of each image in its ball, the most promising first, (N, K, ...).

        First come those that are misclassified, by their score, then the others, by their margin. The first of all is
        offered to ``incumbent``.
        """
        clean, rows = batch.ball.clean, []
        for row, name in enumerate(batch.ids):
            usable = (self.predicted != int(batch.labels[row])).nonzero()[0]
            if not len(usable):
                rows.append(clean[row].expand(_CANDIDATES_KEPT, *clean.shape[1:]))
                continue
            order = numpy_generator(seed, name, "candidates").permutation(len(usable))[:_TRIED]
            chosen = self.images[torch.from_numpy(usable[order]).to(self.images.device)]
            some = torch.full((len(chosen),), row, device=chosen.device)
            ball = batch.ball.select(some)
            stored = ball.store(ball.project(chosen))
            evaluated = self._evaluate(stored, batch.labels[some])
            ranks = _ranks(evaluated)
            rows.append(stored[ranks[torch.arange(_CANDIDATES_KEPT, device=ranks.device) % len(ranks)]])
            first = ranks[:1]
            incumbent.offer(stored[first], evaluated.select(first), some[:1], ("candidate", -1))
        return torch.stack(rows)

    def _evaluate(self, images: Tensor, labels: Tensor) -> Evaluation:
        parts = zip(torch.split(images, self.batch_size), torch.split(labels, self.batch_size), strict=True)
        return Evaluation.joined([self.model.evaluate(some, own) for some, own in parts])


def _ranks(evaluated: Evaluation) -> Tensor:
    """Positions, the most promising first."""
    by_margin = evaluated.margin.argsort(descending=True, stable=True)
    key = torch.where(evaluated.wrong, evaluated.score, torch.inf)[by_margin]
    return by_margin[key.argsort(stable=True)]
