"""The adaptive attack as an attack of ART: its settings, its checks, and one call of `generate`."""

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
from tqdm.auto import tqdm

from ce_plugin.detection.adaptive.objective import LOSSES, Ball, TargetModel
from ce_plugin.detection.adaptive.results import AdaptiveReport, Curves
from ce_plugin.detection.adaptive.search import Candidates, Search, SearchBatch, SearchConfig
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import AttackError, InputError, ModelError, TargetError, expected, unknown_name
from ce_plugin.networks.forward import unwrap
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed

Array = npt.NDArray[Any]


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
    * ``"targeted"``: the same towards one class: each point another, or the one of a misclassified start.

    Every image on the way is rounded to ``levels`` before it is evaluated, and gradients are those at the rounded
    image, so that one pass serves for both. The lead that the wrong class is to have differs between points: large at
    first, or negative (the score falls first); it goes to zero over the first half of the steps. The first and the
    third restart start near the clean image, a share of its values replaced by random ones, the second at candidates,
    and all others between the best image so far and other good results of earlier runs: between two minima there are
    often lower ones. Each runs from ``width`` points at once. Returned is the best image of all: misclassified with the
    least score, or, where none is misclassified, the one with the greatest margin, which counts as a failure. A restart
    knows only of those before it, so that more restarts never weaken the attack.

    Only two things are used: the network inside the classifier, and ``detector.score_tensor(images)``. A detector that
    rounds should pass gradients straight through; for one that draws random numbers, ``eot`` draws are averaged.

    The search proves no lower bound: look at ``report.late_gain()``, at whether the losses agree, and at what more
    restarts bring. Measured in development (a CNN for MNIST, Mahalanobis distance, eps 0.3, the hardest of two dozen
    images): starts between earlier results led to lower scores than as many starts between the best and random points,
    and starts with few values changed to lower ones than uniformly random starts. Without the condition that the image
    be misclassified, nearly every start led to the same minimum, below all that are found with it: the decision
    boundary separates the local minima and keeps their scores up.

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
            clean images is enough.
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
        """The best result for each image; :attr:`report` holds what it reaches.

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
        images = _checked_images("x", x, clip)
        shape = images.shape[1:]
        given = None if starts is None else _checked_images("starts", starts, clip, shape)
        if given is not None and len(given) != len(images):
            raise InputError(expected("starts", f"one image for each of `x`, {len(images)}", len(given)))
        candidates = None if self.candidates is None else _checked_images("candidates", self.candidates, clip, shape)
        names = list(range(len(images))) if ids is None else [int(i) for i in ids]
        if len(names) != len(images):
            raise InputError(expected("ids", f"one id per image, {len(images)}", len(names)))

        def tensor(array: Array) -> Tensor:
            dtype = np.float64 if images.dtype == np.float64 else np.float32
            return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.estimator.device).clamp(*clip)

        with state_guard(network, self.detector, seed=derived_seed(self.seed, "adaptive")):
            model = TargetModel(network, self.detector, self.eot)
            known = None if candidates is None else Candidates(model, tensor(candidates), self.batch_size)
            size = max(1, self.batch_size // self.width)
            slices = [slice(begin, min(begin + size, len(images))) for begin in range(0, len(images), size)]
            logits = [model.predict(tensor(images[rows])) for rows in slices]
            labels = _checked_labels(y, torch.cat(logits))
            batches = []
            for rows, some in zip(slices, logits, strict=True):
                start = None if given is None else tensor(given[rows])
                ball = self._ball(tensor(images[rows]), clip)
                batches.append(SearchBatch(ball, labels[rows], names[rows], some, start))
            found, self.report = self._search(model, batches, known)
        return found.astype(images.dtype)

    def _search(
        self, model: TargetModel, batches: Sequence[SearchBatch], candidates: Candidates | None
    ) -> tuple[Array, AdaptiveReport]:
        """The best images, and what they reach."""
        config = SearchConfig(
            losses=tuple(self.losses),
            restarts=self.restarts,
            width=self.width,
            steps=self.steps,
            step=self.eps_step,
            seed=self.seed,
            threshold=self.threshold,
        )
        curves, images, columns = Curves(config.losses, config.restarts, config.steps), [], []
        n_runs = len(batches) * config.restarts * len(config.losses)
        with tqdm(total=n_runs, desc="AdaptiveEvasion", disable=not self.verbose) as bar:
            for batch in batches:
                incumbent = Search(model, batch, config, candidates).run(curves, lambda: bar.update())
                columns.append(incumbent.columns(model.evaluate(incumbent.images, batch.labels), batch.ball))
                images.append(incumbent.images.cpu().numpy())
        joined = {name: np.concatenate([some[name] for some in columns]) for name in columns[0]}
        return np.concatenate(images), AdaptiveReport(**joined, curves=curves.means(), threshold=config.threshold)

    def _ball(self, clean: Tensor, clip: tuple[float, float]) -> Ball:
        """Where the images of a batch may go."""
        ball = Ball(clean, float(self.eps), _norm_name(self.norm), clip, self.levels)
        if ball.is_frozen or not ball.contains(ball.store(ball.clean)).all():
            step = (clip[1] - clip[0]) / ((self.levels or 2) - 1)
            hint = "Allow more, or pass `levels=None`."
            raise AttackError(expected("eps", f"large enough for one level, {step:.4g}", self.eps, hint))
        return ball

    def _check_params(self) -> None:
        """Whether the settings can be; ART calls it after `set_params`."""
        super()._check_params()
        if not callable(getattr(self.detector, "score_tensor", None)):
            got = f"{type(self.detector).__name__}, which has none"
            method = "`score_tensor(images: Tensor) -> Tensor (N,)`"
            hint = f"Give the class {method}, with a gradient, or use an attack without one."
            raise ModelError(expected("detector", "one with a method `score_tensor`", got, hint))
        _norm_name(self.norm)
        if isinstance(self.losses, str) or not len(self.losses):
            raise AttackError(expected("losses", "a sequence of names", repr(self.losses), f"All: {tuple(LOSSES)}."))
        for loss in self.losses:
            if loss not in LOSSES:
                raise unknown_name("losses", loss, LOSSES)
        if not _is_number(self.eps) or not self.eps > 0:
            raise AttackError(expected("eps", "a number above 0, or math.inf", repr(self.eps)))
        if not _is_number(self.eps_step) or not 0 < self.eps_step < math.inf:
            raise AttackError(expected("eps_step", "a share of eps, above 0", repr(self.eps_step)))
        least = {"steps": 1, "restarts": 1, "width": 1, "eot": 1, "batch_size": 1, "levels": 2}
        for name, smallest in least.items():
            value = getattr(self, name)
            is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if (not is_whole or value < smallest) and not (name == "levels" and value is None):
                raise AttackError(expected(name, f"a whole number from {smallest}", repr(value)))
        if not isinstance(self.seed, (int, np.integer)):
            raise AttackError(expected("seed", "an integer", repr(self.seed)))
        if self.threshold is not None and (not _is_number(self.threshold) or math.isnan(self.threshold)):
            raise AttackError(expected("threshold", "a score, or None", repr(self.threshold)))


def _norm_name(norm: object) -> str:
    """ "inf" or "2", however it was written."""
    if norm in ("inf", math.inf):
        return "inf"
    if norm in ("2", 2):
        return "2"
    raise AttackError(expected("norm", "'inf' or 2", repr(norm)))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _checked_images(
    name: str, images: object, clip: tuple[float, float], shape: tuple[int, ...] | None = None
) -> Array:
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


def _checked_labels(y: Array | None, logits: Tensor) -> Tensor:
    """Labels (N,) as whole numbers, from indices or one-hot rows; the predicted classes where there are none."""
    if y is None:
        return logits.argmax(dim=1)
    n, n_classes = logits.shape
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == n_classes:
        labels = labels.argmax(axis=1)
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (n,):
        raise TargetError(expected("y", f"labels ({n},) or ({n}, {n_classes})", labels.shape))
    whole = labels.astype(np.int64)
    if (whole != labels).any() or whole.min() < 0 or whole.max() >= n_classes:
        raise TargetError(expected("y", f"classes 0 to {n_classes - 1}", f"values {labels.min()} to {labels.max()}"))
    return torch.from_numpy(whole).to(logits.device)
