"""The interface of published detectors ("peers"), and two ways to combine several statistics into a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ce_plugin.detection.protocol import Array
from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import numpy_generator

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
_STEPS = 2000
_FEW = 10  # with fewer images of one label the penalty is not chosen by cross-validation


@dataclass(frozen=True)
class Combination:
    """A score from statistics s, (N, K): b + sum_k w_k z_k with z = (s - mean) / scale, or the sum of z_k squared.

    Args:
        mean: (K,).
        scale: (K,), positive.
        weight: (K,), w.
        bias: b.
        two_sided: take the sum of squares, so that low values count like high ones.

    Example:
        >>> sum_of_two = Combination.of_clean(np.array([[0.0, 10.0], [2.0, 30.0]]))
        >>> sum_of_two(torch.tensor([[1.0, 20.0], [2.0, 20.0]])).tolist()
        [0.0, 1.0]
    """

    mean: Array
    scale: Array
    weight: Array
    bias: float = 0.0
    two_sided: bool = False

    @classmethod
    def of_clean(cls, statistics: Array, *, two_sided: bool = False) -> Combination:
        """The sum of statistics standardised on clean images (N, K)."""
        mean, scale = _moments(statistics)
        return cls(mean, scale, np.ones(len(mean)), 0.0, two_sided)

    @classmethod
    def of_labels(cls, statistics: Array, labels: Array, *, seed: int = 0) -> Combination:
        """The log odds of a logistic regression on standardised statistics (N, K); labels (N,), 0 or 1.

        The strength of its penalty is chosen by cross-validation of the log loss, as the papers' code does with
        scikit-learn's LogisticRegressionCV.
        """
        from sklearn.linear_model import LogisticRegression

        mean, scale = _moments(statistics)
        z = (statistics - mean) / scale
        few = min(np.bincount(labels, minlength=2)) < _FEW
        strength = 1.0 if few else _chosen_strength(z, labels, seed)
        model = LogisticRegression(C=strength, max_iter=_STEPS).fit(z, labels)
        return cls(mean, scale, model.coef_[0].astype(float), float(model.intercept_[0]))

    def __call__(self, statistics: Tensor) -> Tensor:
        """Statistics (N, K) to scores (N,), float64, with a gradient."""
        values = statistics.double()
        mean, scale, weight = (torch.as_tensor(a).to(values) for a in (self.mean, self.scale, self.weight))
        z = (values - mean) / scale
        return z.square().sum(1) if self.two_sided else z @ weight + self.bias


def _chosen_strength(z: Array, labels: Array, seed: int) -> float:
    """The inverse strength C of the penalty with the lowest log loss in five-fold cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    loss = np.zeros(len(_STRENGTHS))
    for fit, held in StratifiedKFold(5, shuffle=True, random_state=seed % 2**32).split(z, labels):
        # From the strongest penalty on, each fit starts from the previous solution.
        model = LogisticRegression(max_iter=_STEPS, warm_start=True)
        for k, strength in enumerate(_STRENGTHS):
            odds = model.set_params(C=strength).fit(z[fit], labels[fit]).decision_function(z[held])
            loss[k] += np.logaddexp(0, np.where(labels[held] == 1, -odds, odds)).sum()
    return _STRENGTHS[int(loss.argmin())]


def _moments(statistics: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each column; a column that never varies has scale 1."""
    mean, scale = statistics.mean(0), statistics.std(0)
    # With rounding the deviation of a constant is slightly above zero.
    return mean, np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)


_FIT_BATCH = 128
_FIT_VALUES = 2**22  # pixel values in a batch of large images while fitting: 27 photographs of 224 x 224
_FOLDS = 5


class Peer(ABC):
    """A published detector: ``fit`` and ``score`` take numpy images and do not change the network.

    Args:
        network: images (N, C, H, W) in image units to logits (N, classes).

    Attributes:
        name: its name in tables.
        needs_labels: whether fitting needs attacked images as well as clean ones.
        passes: forward passes of the network for each image that is scored.

    Raises:
        ArgumentError: ``network`` is not a module.
    """

    name: str = "peer"
    needs_labels: bool = False
    passes: float = 1.0
    least: int = 1  # clean images that fitting needs

    def __init__(self, network: nn.Module) -> None:
        if not isinstance(network, nn.Module):
            raise ArgumentError(expected("network", "a torch.nn.Module", type(network).__name__))
        self.network = network
        self._fitted = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.network).__name__}, name={self.name!r})"

    def fit(self, x: Array, y: Array | None = None) -> None:
        """Learn from clean images, or from clean and attacked ones.

        Args:
            x: images (N, C, H, W) in image units.
            y: (N,), 0 clean and 1 adversarial, or None where all images are clean.

        Raises:
            InputError: images or labels of another shape; too few clean images; no labels if they are needed.
        """
        images = self._images(x)
        labels = _labels(y, len(images))
        if labels is None and self.needs_labels:
            hint = "This detector learns from attacked images and cannot be fitted on clean ones alone."
            raise InputError(expected("y", f"labels (N,), 0 clean and 1 adversarial, for {self.name}", None, hint))
        clean = len(images) if labels is None else int((labels == 0).sum())
        if clean < self.least:
            raise InputError(expected("x", f"at least {self.least} clean images for {self.name}", clean))
        with state_guard(self.network):
            self._fit(images, labels)
        self._fitted = True

    def score(self, x: Array, batch_size: int = 128) -> npt.NDArray[np.float64]:
        """Scores (N,), higher is more adversarial; independent of the batch size up to rounding.

        Raises:
            InputError: images of another shape.
            ArgumentError: a batch size below 1, or the detector is not fitted.
        """
        images = self._images(x)
        self._ready()
        if batch_size < 1:
            raise ArgumentError(expected("batch_size", "a positive number of images", batch_size))
        with state_guard(self.network), torch.no_grad():
            parts = [self._scores(batch) for batch in self._batches(images, batch_size)]
        return torch.cat(parts).double().cpu().numpy()

    @abstractmethod
    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        """Called by ``fit`` after its arguments are checked."""

    @abstractmethod
    def _scores(self, images: Tensor) -> Tensor:
        """Scores (N,) of images on the network's device; higher is more adversarial."""

    def _ready(self) -> None:
        if not self._fitted:
            raise ArgumentError(expected("detector", "a fitted one", f"{self!r} before `fit`", "Call `fit` first."))

    def _images(self, x: Array) -> Array:
        shape = tuple(getattr(x, "shape", ()))
        if not isinstance(x, np.ndarray) or len(shape) != 4 or 0 in shape:
            got = f"{type(x).__name__} of shape {shape}"
            raise InputError(expected("x", "a numpy array of images (N, C, H, W), none of them 0", got))
        if not np.issubdtype(x.dtype, np.floating):
            raise InputError(expected("x", "floating-point images in image units", x.dtype, "Use .astype(np.float32)."))
        if not bool(np.isfinite(x).all()):
            raise InputError(expected("x", "finite", "NaN or infinity"))
        return x

    def _on_network(self, images: Tensor) -> Tensor:
        """The images with the device and dtype of the network's weights."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), images)
        return images.to(like.device, like.dtype)

    def _batches(self, images: Array, batch_size: int | None = None) -> Iterator[Tensor]:
        batch_size = batch_size or max(8, min(_FIT_BATCH, _FIT_VALUES // images[0].size))
        for start in range(0, len(images), batch_size):
            yield self._on_network(torch.as_tensor(np.array(images[start : start + batch_size])))


class DifferentiablePeer(Peer):
    """A peer whose score an attacker can differentiate."""

    def score_tensor(self, images: Tensor) -> Tensor:
        """Scores (N,) of images (N, C, H, W), with a gradient; rounding passes it straight through.

        Raises:
            ArgumentError: the detector is not fitted.
        """
        self._ready()
        with state_guard(self.network):
            return self._scores(self._on_network(images))


class StatisticsPeer(Peer):
    """A peer that combines a few statistics of an image, relative to clean images, into one score.

    With labels the score is the log odds of a logistic regression on the standardised statistics; without, the sum of
    the standardised ones (``two_sided``: of their squares). Statistics of fitting images are computed out of fold,
    because distances to a set that includes the image itself are too small.

    Args:
        network: as in :class:`Peer`.
        seed: seed of the folds.
    """

    two_sided: bool = False
    least = 20

    def __init__(self, network: nn.Module, *, seed: int = 0) -> None:
        super().__init__(network)
        self.seed = seed
        self.reference: Any = None
        self.combination: Combination | None = None

    @abstractmethod
    def _extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the statistics need from the network, a tuple of tensors (N, ...)."""

    @abstractmethod
    def _learn(self, read: tuple[Tensor, ...]) -> Any:
        """A reference for the statistics, from the extracted values of clean images; None if none is needed."""

    @abstractmethod
    def _statistics(self, images: Tensor, read: tuple[Tensor, ...], reference: Any) -> Tensor:
        """Statistics (N, K), each greater for adversarial images unless ``two_sided``; float64."""

    def _fit(self, images: Array, labels: npt.NDArray[np.int64] | None) -> None:
        with torch.no_grad():
            parts = [self._extract(batch) for batch in self._batches(images)]
            read = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
            clean = np.arange(len(images)) if labels is None else np.flatnonzero(labels == 0)
            statistics = self._out_of_fold(images, read, clean)
            self.reference = self._learn(_rows(read, clean))
        if labels is None:
            self.combination = Combination.of_clean(statistics, two_sided=self.two_sided)
        else:
            self.combination = Combination.of_labels(statistics, labels, seed=self.seed)

    def _out_of_fold(self, images: Array, read: tuple[Tensor, ...], clean: npt.NDArray[np.int64]) -> Array:
        """Statistics of each image against clean images of the other folds, (N, K)."""
        fold = numpy_generator(self.seed, "folds").permutation(len(images)) % _FOLDS
        order, parts = [], []
        for k in range(_FOLDS):
            rows = np.flatnonzero(fold == k)
            reference = self._learn(_rows(read, clean[fold[clean] != k]))
            start = 0
            for batch in self._batches(images[rows]):
                some = rows[start : start + len(batch)]
                parts.append(self._statistics(batch, _rows(read, some), reference).double().cpu().numpy())
                order.append(some)
                start += len(batch)
        found: Array = np.concatenate(parts)[np.argsort(np.concatenate(order))]
        return found

    def _scores(self, images: Tensor) -> Tensor:
        if self.combination is None:
            raise ArgumentError(expected("detector", "a fitted one", repr(self), "Call `fit` first."))
        read = self._extract(images)
        return self.combination(self._statistics(images, read, self.reference))


def _rows(read: tuple[Tensor, ...], rows: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
    index = torch.as_tensor(rows)
    return tuple(tensor[index.to(tensor.device)] for tensor in read)


def _labels(y: Array | None, n: int) -> npt.NDArray[np.int64] | None:
    """Labels as (N,) integers, checked."""
    if y is None:
        return None
    values = np.asarray(y)
    if values.shape != (n,) or not set(np.unique(values).tolist()) <= {0, 1}:
        got = f"shape {values.shape} with values {np.unique(values)[:5].tolist()}"
        raise InputError(expected("y", f"None or labels ({n},), 0 clean and 1 adversarial", got))
    if len(np.unique(values)) < 2:
        hint = "Pass y=None to fit on clean images alone."
        raise InputError(expected("y", "labels with both clean (0) and adversarial (1) images", "one kind only", hint))
    return values.astype(np.int64)
