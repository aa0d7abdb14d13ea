"""Kernel density of the predicted class in the last hidden layer, and the spread of predictions under dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.detectors.base import DifferentiablePeer, StatisticsPeer
from benchmarks.detectors.layers import LayerReader
from ce_plugin.errors import ArgumentError, ModelError, expected
from ce_plugin.randomness import generator, numpy_generator

__all__ = ["ClassDensity", "KernelDensity", "likeliest_bandwidth"]

_LEAST_OF_CLASS = 5
_SAMPLE = 500  # images on which the bandwidth is chosen
_GRID = np.logspace(-1.5, 0.5, 21)  # of the median distance within a class
_WHOLE = (nn.Dropout,)
_BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class ClassDensity:
    """A Gaussian kernel density for each class: ``log 1/N_c sum_{i in c} exp(-|f - f_i|^2 / (2 h^2))``.

    The factor common to all densities is left out. A class with fewer than five images has the density of all.

    Args:
        features: (R, D), of clean images.
        member: (classes, R), whether an image belongs to a class.
        bandwidth: h.
    """

    features: Tensor
    member: Tensor
    bandwidth: float

    def log_density(self, features: Tensor, classes: Tensor) -> Tensor:
        """Of features (N, D) in the density of their predicted classes (N,): (N,), float64."""
        squared = _squared(features, self.features)
        known = classes.clamp_max(len(self.member) - 1)  # unknown classes use the last row: all images
        member = self.member[known]
        exponent = (-squared / (2 * self.bandwidth**2)).masked_fill(~member, -torch.inf)
        return exponent.logsumexp(1) - member.sum(1).double().log()


class KernelDensity(DifferentiablePeer, StatisticsPeer):
    """Density of the last hidden layer among clean images of the predicted class (KD), and spread under dropout (BU).

    ``KD(x) = 1/|X_t| sum_{x_i in X_t} exp(-|phi(x) - phi(x_i)|^2 / (2 h^2))`` over clean images X_t predicted as the
    class t that x is, and ``BU(x) = 1/T sum_i p_i . p_i - mean(p) . mean(p)`` over T passes with dropout. With labels
    the score is a logistic regression on -log KD and BU; without, the sum of both standardised. A network without
    dropout has no BU: the name then is "KD", else "KD+BU".

    Differences from the paper: log densities are used, which do not underflow; the T dropout masks are the same for all
    images, so that a score does not depend on the batch; densities of fitting images are computed out of fold.

    Args:
        network: images (N, C, H, W) in image units to logits.
        layer: whose output phi is, a module or its dotted name; None means the input of the last linear layer.
        bandwidth: h; None chooses it by the leave-one-out likelihood of clean images, as the paper does.
        n_passes: T; the paper takes 50.
        seed: seed of the folds and of the dropout masks.

    Attributes:
        passes: T + 1; 2 if the only dropout is directly before the last layer, which is detected at the first images.

    Raises:
        ArgumentError: a bandwidth or number of passes that is not positive.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(16, 2))
        >>> images = np.random.default_rng(0).random((60, 1, 4, 4), dtype=np.float32)
        >>> detector = KernelDensity(net)
        >>> detector.name
        'KD'
        >>> detector.fit(images)
        >>> detector.score(images[:5]).shape
        (5,)

    Source: Feinman, Curtin, Shintre, Gardner 2017 (arXiv 1703.00410), sections 4 and 5. Tests hold KD against
        scikit-learn's KernelDensity and BU against its formula.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        layer: nn.Module | str | None = None,
        bandwidth: float | None = None,
        n_passes: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(network, seed=seed)
        if bandwidth is not None and not bandwidth > 0:
            raise ArgumentError(expected("bandwidth", "None or a positive number", bandwidth))
        if n_passes < 1:
            raise ArgumentError(expected("n_passes", "a positive number of passes with dropout", n_passes))
        self.reader = None if layer is None else LayerReader(network, [layer], pool=False)
        self.bandwidth, self.n_passes = bandwidth, n_passes
        self.dropouts = [m for m in network.modules() if isinstance(m, (*_WHOLE, *_BY_CHANNEL)) and m.p > 0]
        self.name = "KD+BU" if self.dropouts else "KD"
        self.passes = 1.0 + (n_passes if self.dropouts else 0)

    def _extract(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, features = self._last_hidden(images)
        return features, logits.argmax(1), self._uncertainty(images)

    def _learn(self, read: tuple[Tensor, ...]) -> ClassDensity:
        features, classes, _ = read
        counts = torch.bincount(classes)
        member = torch.arange(len(counts) + 1, device=classes.device)[:, None] == classes
        member[torch.cat([counts, counts.new_zeros(1)]) < _LEAST_OF_CLASS] = True
        bandwidth = self.bandwidth or likeliest_bandwidth(features, classes, seed=self.seed)
        return ClassDensity(features, member, bandwidth)

    def _statistics(self, images: Tensor, read: tuple[Tensor, ...], reference: ClassDensity) -> Tensor:
        features, classes, uncertainty = read
        density = -reference.log_density(features, classes)[:, None]
        return torch.cat([density, uncertainty], 1) if self.dropouts else density

    def _last_hidden(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.reader is not None:
            logits, (features,) = self.reader(images)
            return logits, features
        held: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            held[:] = [inputs[0]]

        linear = [m for m in self.network.modules() if isinstance(m, nn.Linear)]
        with ExitStack() as hooks:
            for module in linear:
                hooks.callback(module.register_forward_pre_hook(keep).remove)
            logits = self.network(images)
        if not held:
            hint = "Say where the last hidden layer is with `layer=`."
            raise ModelError(expected("network", "one with a linear layer at its end", "none", hint))
        return logits, held[0].flatten(1)

    def _uncertainty(self, images: Tensor) -> Tensor:
        """BU, (N, 1), float64; (N, 0) where the network has no dropout."""
        if not self.dropouts:
            return images.new_zeros((len(images), 0), dtype=torch.float64)
        squares = total = torch.zeros(1, dtype=torch.float64, device=images.device)
        tail = self._tail(images)
        for number in range(self.n_passes):
            if tail is None:
                with ExitStack() as hooks:
                    for place, module in enumerate(self.dropouts):
                        hooks.callback(module.register_forward_hook(self._dropping(module, number, place)).remove)
                    p = self.network(images).double().softmax(1)
            else:
                last, hidden = tail
                p = last(self._dropping(self.dropouts[0], number, 0)(last, None, hidden)).double().softmax(1)
            squares, total = squares + p.square(), total + p
        self.passes = 1.0 + self.n_passes if tail is None else 2.0
        return (squares / self.n_passes - (total / self.n_passes).square()).sum(1, keepdim=True)

    def _tail(self, images: Tensor) -> tuple[nn.Linear, Tensor] | None:
        """The last layer and its input, if the only dropout is directly before it: the rest then runs once."""
        linear = [m for m in self.network.modules() if isinstance(m, nn.Linear)]
        dropped: list[Tensor] = []
        found: list[tuple[nn.Linear, Tensor, Tensor]] = []
        with ExitStack() as hooks:
            for dropout in self.dropouts:
                hooks.callback(dropout.register_forward_hook(lambda m, i, value: dropped.append(value)).remove)
            for module in linear:
                hooks.callback(module.register_forward_hook(lambda m, i, value: found.append((m, i[0], value))).remove)
            logits = self.network(images)
        if len(dropped) != 1 or not found or found[-1][1] is not dropped[0] or found[-1][2] is not logits:
            return None
        return found[-1][0], dropped[0]

    def _dropping(self, module: nn.Module, number: int, place: int) -> Callable[..., Tensor]:
        """A hook that applies dropout as in training, with the same mask for every image of a pass."""
        share = float(getattr(module, "p", 0.0))

        def drop(_: nn.Module, inputs: object, value: Tensor) -> Tensor:
            shape = value.shape[1:2] + (1,) * (value.dim() - 2) if isinstance(module, _BY_CHANNEL) else value.shape[1:]
            drawn = torch.rand(shape, generator=generator(self.seed, "dropout", number, place))
            return value * (drawn >= share).to(value) / (1 - share) if share < 1 else value * 0

        return drop


def likeliest_bandwidth(features: Tensor, classes: Tensor, *, seed: int = 0) -> float:
    """The bandwidth h that maximises the leave-one-out likelihood of images within their class.

    Args:
        features: (N, D).
        classes: (N,); classes of one image are merged.
        seed: seed of the choice of 500 images, if there are more.

    Returns:
        One of 21 values from 0.03 to 3 times the median distance within a class.

    Example:
        >>> points = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
        >>> 0.1 < likeliest_bandwidth(points, torch.zeros(300, dtype=torch.long)) < 0.6
        True

    Source: Feinman et al. 2017, section 5.1: the bandwidth is that of the greatest likelihood.
    """
    rows = numpy_generator(seed, "bandwidth").permutation(len(features))[:_SAMPLE]
    some = torch.as_tensor(rows, device=features.device)
    f, c = features.detach()[some], classes[some].clone()
    c[torch.bincount(c)[c] < 2] = -1
    others = (c[:, None] == c) & ~torch.eye(len(c), dtype=torch.bool, device=c.device)
    kept = others.any(1)
    squared = _squared(f[kept], f)
    others = others[kept]
    inside = squared[others]
    typical = float(inside.median().sqrt()) if len(inside) else 0.0
    if not typical > 0:
        return 1.0  # all features are equal: any bandwidth will do
    best, bandwidth = -math.inf, typical
    for h in (typical * _GRID).tolist():
        density = (-squared / (2 * h**2)).masked_fill(~others, -torch.inf).logsumexp(1)
        likelihood = float(density.mean()) - f.shape[1] * math.log(h)
        if likelihood > best:
            best, bandwidth = likelihood, h
    return bandwidth


def _squared(features: Tensor, reference: Tensor) -> Tensor:
    """Squared distances (N, R), float64; the mean is subtracted first, which loses less precision."""
    mean = reference.mean(0)
    a, b = features - mean, reference - mean
    squared = a.square().sum(1, keepdim=True).double() - 2 * (a @ b.T).double() + b.square().sum(1).double()
    return squared.clamp_min(0)
