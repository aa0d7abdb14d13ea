"""Filter statistics: the effect of zeroing each filter of the last convolutional layer on the predicted class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.detectors.base import StatisticsPeer
from ce_plugin.attribution import LayerCausalEffect
from ce_plugin.errors import ModelError, expected

__all__ = ["FilterEffects", "filter_statistics"]

_LEAST_OF_CLASS = 5
_CAUSAL = 1e-6  # of probability: smaller effects are rounding


@dataclass(frozen=True)
class _Prototypes:
    """Mean counterfactual information of clean images, by predicted class, or over all if a class has few.

    Args:
        of_class: (classes, filters).
        of_all: (filters,).
    """

    of_class: Tensor
    of_all: Tensor

    def row(self, classes: Tensor) -> Tensor:
        """The prototypes of predicted classes (N,): (N, filters)."""
        table = torch.cat([self.of_class, self.of_all[None]])
        return table[classes.clamp_max(len(self.of_class))]


def filter_statistics(information: Tensor, prototype: Tensor) -> Tensor:
    """Seven numbers that describe the counterfactual information of an image's filters.

    Args:
        information: (N, filters), CI.
        prototype: (N, filters), the mean CI of clean images of the predicted class.

    Returns:
        (N, 7), float64: mean, standard deviation and largest of CI; the share of causal filters (CI > 0) and of those
        that work against the class (CI < 0); the share of the prototype's causal filters that are causal here; and the
        cosine of CI and prototype.

    Example:
        >>> filter_statistics(torch.tensor([[0.5, 0.0, 0.0, -0.1]]), torch.tensor([[0.5, 0.2, 0.0, 0.0]]))[0, 2:6]
        tensor([0.5000, 0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    ci, usual = information.double(), prototype.double()
    causal, expected_causal = ci > _CAUSAL, usual > _CAUSAL
    shared = (causal & expected_causal).sum(1) / expected_causal.sum(1).clamp_min(1)
    lengths = (ci.norm(dim=1) * usual.norm(dim=1)).clamp_min(1e-12)
    return torch.stack(
        [
            ci.mean(1),
            ci.std(1, correction=0),
            ci.amax(1),
            causal.double().mean(1),
            (ci < -_CAUSAL).double().mean(1),
            shared.double(),
            (ci * usual).sum(1) / lengths,
        ],
        1,
    )


class FilterEffects(StatisticsPeer):
    """Statistics of the counterfactual information of filters, ``CI_i = P(c | x) - P(c | x, do(filter i = 0))``.

    c is the predicted class. A filter is causal where CI > 0. The distribution of CI and the causal
    filters of attacked images differ from those of clean images of the predicted class. With labels the score is a
    logistic regression on the seven numbers of :func:`filter_statistics`; without, the sum of their squared deviations
    from clean images.

    The paper compares distributions and sets of causal filters; the combination of seven numbers into a score is ours.
    CI is exact, computed by this package's engine in a few forward passes if few layers follow.

    Args:
        network: images (N, C, H, W) in image units to logits.
        layer: a module or its dotted name; None means the last convolution that is run.
        seed: seed of the folds of the combination.

    Attributes:
        passes: cost of an image according to the engine; known after the first image.

    Raises:
        UnknownNameError: no layer of this name.

    Example:
        >>> import numpy as np
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> images = np.random.default_rng(0).random((40, 1, 4, 4), dtype=np.float32)
        >>> detector = FilterEffects(net)
        >>> detector.fit(images)
        >>> detector.score(images[:5]).shape
        (5,)

    Source: Debbi, "CausAdv: a causal-based framework for detecting adversarial examples", 2024 (arXiv 2411.00839).
        Tests hold CI against zeroing by hand.
    """

    name = "filter effects"
    two_sided = True

    def __init__(self, network: nn.Module, *, layer: nn.Module | str | None = None, seed: int = 0) -> None:
        super().__init__(network, seed=seed)
        self.layer = layer
        self._explainer = None if layer is None else LayerCausalEffect(network, layer)
        self._counted = False

    def information(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """CI (N, filters) and predicted classes (N,) of images on the network's device.

        Raises:
            ModelError: the network runs no two-dimensional convolution, and no ``layer`` was given.
        """
        with torch.no_grad():
            classes: Tensor = self.network(images).argmax(1)
        if self._explainer is None:
            self._explainer = LayerCausalEffect(self.network, self.layer or _last_convolution(self.network, images))
        if not self._counted:
            self.passes = 1.0 + float(self._explainer.estimate_cost(images[:1], target=classes[:1]).forward_passes)
            self._counted = True
        effect: Tensor = self._explainer.estimate(images, target=classes).effect
        return -effect.reshape(len(images), -1), classes

    def _extract(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.information(images)

    def _learn(self, read: tuple[Tensor, ...]) -> _Prototypes:
        information, classes = read
        overall = information.mean(0)
        rows = []
        for name in range(int(classes.max()) + 1):
            own = information[classes == name]
            rows.append(own.mean(0) if len(own) >= _LEAST_OF_CLASS else overall)
        return _Prototypes(torch.stack(rows), overall)

    def _statistics(self, images: Tensor, read: tuple[Tensor, ...], reference: _Prototypes) -> Tensor:
        information, classes = read
        return filter_statistics(information, reference.row(classes))


def _last_convolution(network: nn.Module, images: Tensor) -> nn.Module:
    run: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, *_: run.append(m)) for m in network.modules() if _is_convolution(m)]
    try:
        with torch.no_grad():
            network(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not run:
        hint = "Say with `layer=` whose channels are set to zero."
        raise ModelError(expected("network", "one with a two-dimensional convolution", "none", hint))
    return run[-1]


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)
