"""Quantus, both ways: our methods as its ``explain_func``, and its metrics as measures of a comparison.

Quantus (Hedström et al. 2023, arXiv 2202.06861) is an optional dependency, of the extra ``compare``; nothing here
imports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ce_plugin.evaluation.comparison import Case, Measure
from ce_plugin.evaluation.methods import PASSES, Method, Scene, resolve_method
from ce_plugin.interventions import Normalization
from ce_plugin.interventions.base import NormalizationLike

__all__ = ["quantus_explain_func", "quantus_measure"]

Explain = Callable[..., npt.NDArray[np.float32]]


def quantus_explain_func(
    method: object,
    *,
    normalization: NormalizationLike = None,
    outcome: str = "probability",
    passes: int = PASSES,
    ids: Sequence[int] | None = None,
) -> Explain:
    """A method as Quantus calls it: ``explain_func(model, inputs, targets, **kwargs)``, numpy in and out.

    Args:
        method: see :func:`~ce_plugin.evaluation.resolve_method`.
        normalization, outcome: see :class:`~ce_plugin.evaluation.Scene`.
        passes: that a map may take.
        ids: of the images, from which random numbers derive; None counts each batch from 0, so that an image is
            explained in the same way when it is asked for again.

    Returns:
        A function from images (N, C, H, W) and targets (N,) to maps (N, 1, H, W), float32. Quantus refuses constant
        maps.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> explain = quantus_explain_func("saliency")
        >>> explain(model=net, inputs=np.ones((3, 1, 4, 4), np.float32), targets=np.array([0, 1, 1])).shape
        (3, 1, 4, 4)
    """
    own, units = resolve_method(method), Normalization.of(normalization)

    def explain_func(model: nn.Module, inputs: Any, targets: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
        images, classes = torch.as_tensor(inputs), torch.as_tensor(targets).flatten().tolist()
        parameter = next(model.parameters(), None)
        if parameter is not None:
            images = images.to(parameter)
        maps = [
            own(Scene(x[None], int(target), model, units, number if ids is None else ids[number], outcome), passes)
            for number, (x, target) in enumerate(zip(images, classes, strict=True))
        ]
        found: npt.NDArray[np.float32] = torch.stack(maps)[:, None].numpy()
        return found

    return explain_func


def quantus_measure(metric: Any, name: str = "", *, larger: bool | None = None, **options: Any) -> Measure:
    """A metric of Quantus as a measure, to be added to :data:`~ce_plugin.evaluation.MEASURES` under a name of its own.

    Args:
        metric: an object such as ``quantus.FaithfulnessCorrelation(...)``, made with ``return_aggregate=False``,
            ``disable_warnings=True`` and ``display_progressbar=False``.
        name: of the value, in tables; None takes the class's.
        larger: whether larger values are better, smaller ones, or neither.
        options: further arguments of the call.

    Returns:
        A measure with one value, the mean of what the metric returns for an image.

    Example:
        >>> class Sum:
        ...     def __call__(self, model, x_batch, y_batch, a_batch, **kwargs):
        ...         return a_batch.sum((1, 2, 3)).tolist()
        >>> from ce_plugin.evaluation import Case, METHODS
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> scene = Scene(torch.rand(1, 1, 2, 2), 1, net)
        >>> quantus_measure(Sum()).run(METHODS["centre"], Case(scene), torch.ones(2, 2), 1)
        {'Sum': 4.0}
    """
    called = name or type(metric).__name__

    def run(method: Method, case: Case, map_: Tensor, passes: int) -> dict[str, float]:
        scene = case.scene

        def explain_func(model: nn.Module, inputs: Any, targets: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
            images = torch.as_tensor(inputs).to(scene.x)
            classes = torch.as_tensor(targets).flatten().tolist()
            # Metrics change the network or the image: what is asked is that one, in its own arithmetic.
            maps = [
                method(replace(scene, x=x[None], target=int(target), network=model, forward=None), passes)
                for x, target in zip(images, classes, strict=True)
            ]
            found: npt.NDArray[np.float32] = torch.stack(maps)[:, None].numpy()
            return found

        result = metric(
            model=scene.network,
            x_batch=scene.x.cpu().numpy(),
            y_batch=np.array([scene.target]),
            a_batch=map_[None, None].numpy(),
            explain_func=explain_func,
            device=str(scene.x.device),
            **options,
        )
        numbers = [float(value) for value in np.ravel(_flat(result)) if value is not None]
        return {called: float(np.mean(numbers)) if numbers else math.nan}

    return Measure(run, {called: larger})


def _flat(result: Any) -> list[Any]:
    """The numbers of a result: a list, or a dict of lists by layer or class."""
    if isinstance(result, dict):
        return [value for part in result.values() for value in _flat(part)]
    if isinstance(result, (list, tuple, np.ndarray)):
        return [value for part in result for value in _flat(part)]
    return [result]
