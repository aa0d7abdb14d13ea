"""The adaptive attack as ART knows attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification.classifier import ClassifierMixin
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from torch import Tensor
from tqdm import tqdm

from ce_plugin.detection.adaptive.objective import LOSSES, Ball, TargetModel
from ce_plugin.detection.adaptive.results import AdaptiveReport, Curves, Incumbent, distances
from ce_plugin.detection.adaptive.search import Candidates, SearchBatch, SearchConfig, search
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import AttackError, InputError, ModelError, TargetError, expected, unknown_name
from ce_plugin.networks.forward import load_art, unwrap
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed

Array = npt.NDArray[Any]
_WRITE = "Give the class `score_tensor(images: Tensor) -> Tensor (N,)`, with a gradient, or use an attack without one."


def norm_name(norm: object) -> str:
    """ "inf" or "2", however it was written.

    Example:
        >>> norm_name(np.inf), norm_name(2)
        ('inf', '2')
    """
    if norm in ("inf", math.inf):
        return "inf"
    if norm in ("2", 2):
        return "2"
    raise AttackError(expected("norm", "'inf' or 2", repr(norm)))


def check_detector(detector: object) -> None:
    """A detector must have a score with a gradient."""
    if not callable(getattr(detector, "score_tensor", None)):
        name = type(detector).__name__
        raise ModelError(expected("detector", "one with a method `score_tensor`", f"{name}, which has none", _WRITE))


def check_settings(attack: Any) -> None:
    """The settings of an :class:`AdaptiveEvasion`, its attributes."""
    norm_name(attack.norm)
    if isinstance(attack.losses, str) or not len(attack.losses):
        raise AttackError(expected("losses", "a sequence of names", repr(attack.losses), f"All: {tuple(LOSSES)}."))
    for loss in attack.losses:
        if loss not in LOSSES:
            raise unknown_name("losses", loss, LOSSES)
    if not _number(attack.eps) or not attack.eps > 0:
        raise AttackError(expected("eps", "a number above 0, or math.inf", repr(attack.eps)))
    if not _number(attack.eps_step) or not 0 < attack.eps_step < math.inf:
        raise AttackError(expected("eps_step", "a share of eps, above 0", repr(attack.eps_step)))
    for name, least in (("steps", 1), ("restarts", 1), ("width", 1), ("eot", 1), ("batch_size", 1)):
        _check_count(name, getattr(attack, name), least)
    if attack.levels is not None:
        _check_count("levels", attack.levels, 2)
    if not isinstance(attack.seed, (int, np.integer)):
        raise AttackError(expected("seed", "an integer", repr(attack.seed)))
    if attack.threshold is not None and (not _number(attack.threshold) or math.isnan(attack.threshold)):
        raise AttackError(expected("threshold", "a score, or None", repr(attack.threshold)))


def check_images(name: str, images: object, clip: tuple[float, float], shape: tuple[int, ...] | None = None) -> Array:
    """Images (N, ...) of a floating type, finite, inside the clip values, and of a shape where that is given."""
    array = np.asarray(images)
    if array.ndim < 2 or not len(array) or not np.issubdtype(array.dtype, np.floating):
        wanted = "images (N, ...) of a floating type"
        raise InputError(
            expected(name, wanted, f"{array.dtype} of shape {array.shape}", "Write `x.astype('float32')`.")
        )
    if shape is not None and array.shape[1:] != shape:
        raise InputError(expected(name, f"images of shape {shape}", array.shape[1:]))
    low, high = float(array.min()), float(array.max())
    slack = 1e-6 * (clip[1] - clip[0])
    if not (clip[0] - slack <= low and high <= clip[1] + slack):
        hint = "Bring them into image units."
        raise InputError(expected(name, f"images inside the clip values {clip}", f"values in [{low}, {high}]", hint))
    return array


def whole_labels(y: Array | None, predicted: Array, n_classes: int) -> Array:
    """Labels (N,) as whole numbers, from indices, one-hot rows, or predictions where there are none."""
    if y is None:
        return predicted
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == n_classes:
        labels = labels.argmax(axis=1)
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != predicted.shape:
        raise TargetError(expected("y", f"labels ({len(predicted)},) or ({len(predicted)}, {n_classes})", labels.shape))
    whole = labels.astype(np.int64)
    if (whole != labels).any() or whole.min() < 0 or whole.max() >= n_classes:
        raise TargetError(expected("y", f"classes 0 to {n_classes - 1}", f"values {labels.min()} to {labels.max()}"))
    return whole


def check_ids(ids: Sequence[int] | None, n: int) -> list[int]:
    """One id per image: its position where none is given."""
    result = list(range(n)) if ids is None else [int(i) for i in ids]
    if len(result) != n:
        raise InputError(expected("ids", f"one id per image, {n}", len(result)))
    return result


def _number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise AttackError(expected(name, f"a whole number from {least}", repr(value)))


class AttackRun:
    """One call of ``generate``, with everything checked that can be checked without running the network."""

    def __init__(
        self,
        attack: AdaptiveEvasion,
        model: TargetModel,
        clip: tuple[float, float],
        images: Array,
        starts: Array | None,
        candidates: Array | None,
        ids: list[int],
    ) -> None:
        self.attack = attack
        self.model = model
        self.clip = clip
        self.images = images
        self.starts = starts
        self.ids = ids
        self.device = torch.device(attack.estimator.device)
        self.config = SearchConfig(
            losses=tuple(attack.losses),
            restarts=attack.restarts,
            width=attack.width,
            steps=attack.steps,
            step=attack.eps_step,
            seed=attack.seed,
            threshold=attack.threshold,
        )
        self.curves = Curves(self.config.losses, attack.restarts, attack.steps)
        self.candidates = None if candidates is None else Candidates(model, self._tensor(candidates), attack.batch_size)

    def run(self, y: Array | None) -> tuple[Array, AdaptiveReport]:
        """Attack all images, batch by batch."""
        size, n = max(1, self.attack.batch_size // self.config.width), len(self.images)
        slices = [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]
        logits = torch.cat([self.model.predict(self._tensor(self.images[rows])) for rows in slices])
        labels = whole_labels(y, logits.argmax(dim=1).cpu().numpy(), logits.shape[1])
        balls = [self._ball(rows) for rows in slices]
        ticks = len(slices) * self.config.restarts * len(self.config.losses)
        parts = []
        with tqdm(total=ticks, desc="AdaptiveEvasion", disable=not self.attack.verbose) as bar:
            for rows, ball in zip(slices, balls, strict=True):
                whole = torch.from_numpy(labels[rows]).to(self.device)
                parts.append(self._attack(ball, whole, logits[rows], rows, bar))
        found = np.concatenate([part[0] for part in parts])
        columns = {key: np.concatenate([part[1][key] for part in parts]) for key in parts[0][1]}
        return found, AdaptiveReport(**columns, curves=self.curves.means(), threshold=self.config.threshold)

    def _tensor(self, images: Array) -> Tensor:
        like = np.float64 if self.images.dtype == np.float64 else np.float32
        return torch.from_numpy(np.ascontiguousarray(images, dtype=like)).to(self.device).clamp(*self.clip)

    def _ball(self, rows: slice) -> Ball:
        norm = norm_name(self.attack.norm)
        ball = Ball(self._tensor(self.images[rows]), float(self.attack.eps), norm, self.clip, self.attack.levels)
        if ball.is_frozen or not ball.contains(ball.store(ball.clean)).all():
            step = (self.clip[1] - self.clip[0]) / ((self.attack.levels or 2) - 1)
            hint = "Allow more, or pass `levels=None`."
            raise AttackError(expected("eps", f"large enough for one level, {step:.4g}", self.attack.eps, hint))
        return ball

    def _attack(
        self, ball: Ball, labels: Tensor, logits: Tensor, rows: slice, bar: Any
    ) -> tuple[Array, dict[str, Array]]:
        stored = ball.store(ball.clean)
        incumbent = Incumbent(stored, self.model.evaluate(stored, labels), "clean")
        everything = torch.arange(len(stored), device=self.device)
        if self.starts is not None:
            stored = ball.store(ball.project(self._tensor(self.starts[rows])))
            incumbent.offer(stored, self.model.evaluate(stored, labels), everything, ("start", -1))
        ids = self.ids[rows]
        none = ball.clean[:, None][:, :0]
        near = none if self.candidates is None else self.candidates.near(ball, labels, ids, self.config, incumbent)
        search(
            self.model, SearchBatch(ball, labels, ids, logits, near), self.config, incumbent, self.curves, bar.update
        )
        evaluated = self.model.evaluate(incumbent.images, labels)
        columns = {
            "success": incumbent.success.cpu().numpy(),
            "score": evaluated.score.double().cpu().numpy(),
            "margin": evaluated.margin.double().cpu().numpy(),
            "norm": distances(ball.clean, incumbent.images, ball.norm),
            "prediction": evaluated.predicted.cpu().numpy(),
            "loss": np.array([name for name, _ in incumbent.origin], dtype=object),
            "restart": np.array([restart for _, restart in incumbent.origin]),
        }
        return incumbent.images.cpu().numpy().astype(self.images.dtype), columns


load_art()


class AdaptiveEvasion(EvasionAttack):  # type: ignore[misc]  # ART has no types
    """Fool the classifier and look clean to the detector, with the gradients of both.

    Sought is, for each image x of class y,

        x' = argmin s(x')  over  |x' - x| <= eps, x' inside the clip values and stored in ``levels`` values,
             subject to  argmax f(x') != y,

    with the logits f and the detector's score s. For every loss and from every start, projected steps (close to
    the gradient's sign in L-inf, along it in L2, with momentum, their length falling by a cosine) follow

    * ``"selective"``: the gradient of the margin until the image is misclassified, then that of the score;
    * ``"orthogonal"``: the same, each without its component along the other;
    * ``"lagrangian"``: both at once, the margin's weighted by what each image needs to stay misclassified;
    * ``"targeted"``: the same towards one class: each point another, or the one that a candidate or a find shows.

    Every image on the way is rounded to ``levels`` before it is evaluated, and gradients are those at the rounded
    image, so that one pass serves for both. The lead that is asked of the wrong class differs between points: large at
    first, or negative (the score falls first); it goes to zero over the first half of the steps. The first and the
    third restart start near the clean image, a share of its values replaced by random ones, the second at candidates,
    and all others between the best image so far and other good finds of the runs before: where two valleys are known,
    the way between them leads to lower ones. Each runs from ``width`` points at once. What is returned is the best
    image of all: misclassified with the least score, or, where none is misclassified, that with the greatest margin,
    which counts as a failure. A restart knows only of those before it, so that more restarts never weaken the attack.

    Only two things are asked of what is attacked: the network inside the classifier, and
    ``detector.score_tensor(images)``. Roundings inside a detector are its own affair (it passes gradients straight
    through); for one that draws random numbers, ``eot`` draws are averaged.

    A search that ends is no proof that nothing lower exists: look at ``report.late_gain()``, at whether the losses
    agree, and at what more restarts bring. Seen in development (a CNN for MNIST, Mahalanobis distance, eps 0.3, the
    stubborn ones among two dozen images): starts between finds led lower than as many starts between the best and
    random points, and starts with few values changed lower than uniformly random ones. Without the condition that the
    image be misclassified, nearly every start led down to one floor, below all that is found with it: it is the
    boundary that holds scores up and divides the valleys.

    Args:
        estimator: ART ``PyTorchClassifier`` with clip values, of at least two classes.
        detector: fitted, with ``score_tensor``; a greater score is more adversarial.
        norm: ``"inf"`` or 2.
        eps: largest distance from the clean image, in image units, above 0; ``math.inf``: anything inside the clip
            values. There, images of another class among ``candidates`` are results too, so that the attack always
            wins against a detector that lets clean images pass.
        eps_step: length of the first step, as a share of ``eps`` (and of the range of the clip values, if less).
        steps: of each run; one image costs ``steps * width * restarts * len(losses)`` forward and backward passes of
            classifier and detector, fewer where a ``threshold`` is given.
        restarts: runs of each loss.
        width: points that a run starts from at once.
        losses: which of the four.
        eot: draws of the detector's score that are averaged at each step.
        levels: values that a stored pixel can take, equally spaced over the clip values: 256 for files of 8 bits;
            None for images that are never stored.
        batch_size: images evaluated together, those of all starts counted; results do not depend on it beyond rounding.
        seed: of everything random, together with each image's id.
        threshold: score above which the detector raises an alarm. An image at or below it is not attacked further,
            which is quicker; None lowers every score as far as it goes. For an AUROC the least score of
            clean images is enough: nothing is won below it.
        candidates: images (M, ...) of other classes, such as those that the detector was fitted on. At most 128
            of them are tried for each image; brought into the ball they are also starts.
        verbose: show progress.

    Attributes:
        report: an :class:`AdaptiveReport` of the last ``generate``; None before.

    Raises:
        AttackError: a setting that cannot be.
        ModelError: the detector has no ``score_tensor``.
        UnknownNameError: no such loss.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from torch import nn
        >>> from ce_plugin.networks.art import build_classifier
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     _ = net[1].weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0]]))
        ...     _ = net[1].bias.copy_(torch.tensor([0.0, -1.3]))
        >>> class LooksUneven:
        ...     name = "uneven"
        ...     def fit(self, x, y=None): ...
        ...     def score(self, x, batch_size=128):
        ...         return self.score_tensor(torch.as_tensor(x)).double().numpy()
        ...     def score_tensor(self, images):
        ...         return images.flatten(1).var(dim=1)
        >>> classifier = build_classifier(net, (1, 2, 2), 2, (0.0, 1.0), torch.device("cpu"))
        >>> attack = AdaptiveEvasion(classifier, LooksUneven(), eps=0.2, steps=20, restarts=2)
        >>> grey = np.full((1, 1, 2, 2), 0.6, dtype=np.float32)
        >>> raised = attack.generate(grey)  # two values would do for the classifier; the others follow
        >>> bool((raised > 0.65).all()), bool(np.ptp(raised) < 0.01)
        (True, True)
        >>> attack.report
        AdaptiveReport(1 of 1 misclassified, median score ...)

    Source: Bryniarski et al., ICLR 2022 (arXiv 2106.15023): selective and orthogonal projected gradient; Carlini and
        Wagner 2017 (arXiv 1705.07263) and Tramer et al. 2020 (arXiv 2002.08347): one objective for both.
    """

    attack_params = [  # noqa: RUF012 - a list in every attack of ART
        "detector",
        "norm",
        "eps",
        "eps_step",
        "steps",
        "restarts",
        "width",
        "losses",
        "eot",
        "levels",
        "batch_size",
        "seed",
        "threshold",
        "candidates",
        "verbose",
    ]
    _estimator_requirements = (BaseEstimator, LossGradientsMixin, ClassifierMixin)

    def __init__(
        self,
        estimator: Any,
        detector: DifferentiableDetector,
        *,
        norm: str | float = "inf",
        eps: float = 0.1,
        eps_step: float = 1.4,
        steps: int = 50,
        restarts: int = 5,
        width: int = 4,
        losses: Sequence[str] = tuple(LOSSES),
        eot: int = 1,
        levels: int | None = 256,
        batch_size: int = 128,
        seed: int = 0,
        threshold: float | None = None,
        candidates: Array | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(estimator=estimator)
        self.detector = detector
        self.norm = norm
        self.eps = eps
        self.eps_step = eps_step
        self.steps = steps
        self.restarts = restarts
        self.width = width
        self.losses = losses
        self.eot = eot
        self.levels = levels
        self.batch_size = batch_size
        self.seed = seed
        self.threshold = threshold
        self.candidates = candidates
        self.verbose = verbose
        self.report: AdaptiveReport | None = None
        self._check_params()

    def generate(
        self,
        x: Array,
        y: Array | None = None,
        *,
        starts: Array | None = None,
        ids: Sequence[int] | None = None,
    ) -> Array:
        """The best image found for each image; :attr:`report` says what it reached.

        Args:
            x: images (N, ...) of a floating type, in image units, inside the clip values.
            y: classes to leave, (N,) or one-hot (N, C); None: those that the network predicts.
            starts: images (N, ...), such as the results for a smaller ``eps``: brought into the ball they are among
                the results from the first, so that the new ones are never worse.
            ids: one for each image, which names its random numbers; None: its position.

        Returns:
            Images of the shape and type of ``x``, in the ball.

        Raises:
            AttackError: the classifier has no clip values; ``eps`` leaves no room for one level.
            InputError: images of another shape or type, or outside the clip values.
            TargetError: labels that are no classes.
            ModelError: the classifier is not torch's; the score has no gradient, or is not one number per image.
        """
        network, clip = unwrap(self.estimator)
        if clip is None:
            raise AttackError(expected("estimator", "a classifier with clip values", "none", "Pass `clip_values=`."))
        images = check_images("x", x, clip)
        shape = images.shape[1:]
        given = None if starts is None else check_images("starts", starts, clip, shape)
        if given is not None and len(given) != len(images):
            raise InputError(expected("starts", f"one image for each of `x`, {len(images)}", len(given)))
        candidates = None if self.candidates is None else check_images("candidates", self.candidates, clip, shape)
        names = check_ids(ids, len(images))
        with state_guard(network, self.detector, seed=derived_seed(self.seed, "adaptive")):
            run = AttackRun(self, TargetModel(network, self.detector, self.eot), clip, images, given, candidates, names)
            found, self.report = run.run(y)
        return found

    def _check_params(self) -> None:
        super()._check_params()
        check_detector(self.detector)
        check_settings(self)
