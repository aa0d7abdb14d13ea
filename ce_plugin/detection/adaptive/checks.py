"""What is checked before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ce_plugin.detection.adaptive.directions import LOSSES
from ce_plugin.errors import AttackError, InputError, ModelError, TargetError, expected, unknown_name

__all__ = ["check_detector", "check_images", "check_settings", "norm_name", "whole_labels"]

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
        todo = "Bring them into image units."
        raise InputError(expected(name, f"images inside the clip values {clip}", f"values in [{low}, {high}]", todo))
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
