"""Labels of a detector's training images, in any of the forms that ART's detectors take."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ce_plugin.errors import InputError, expected

__all__ = ["adversarial_labels"]

_FORMS = "None, or labels 0 (clean) and 1 (adversarial): (N,), (N, 1), or one-hot (N, 2)"


def adversarial_labels(y: npt.ArrayLike | None, n_images: int) -> npt.NDArray[np.bool_]:
    """Which images are adversarial.

    Args:
        y: None (all are clean), 0 / 1 of shape (N,) or (N, 1), or one-hot (N, 2): [1, 0] clean, [0, 1] adversarial.
        n_images: N.

    Returns:
        (N,), bool.

    Raises:
        InputError: another form, mixed forms, or not one label per image.

    Example:
        >>> adversarial_labels([[1, 0], [0, 1]], 2).tolist() == adversarial_labels([0, 1], 2).tolist() == [False, True]
        True
        >>> adversarial_labels([3, 7], 2)
        Traceback (most recent call last):
        ...
        ce_plugin.errors.InputError: Expected argument `y` to be None, or labels 0 (clean) and 1 (adversarial): (N,),
        (N, 1), or one-hot (N, 2), but got values 3 and 7. Classes of the images are not wanted here.
    """
    if y is None:
        return np.zeros(n_images, dtype=bool)
    try:
        labels = np.asarray(y, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(expected("y", _FORMS, "labels of mixed form", "Write all of them in one form.")) from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[1] != 2):
        todo = "Classes of the images are not wanted here."
        raise InputError(expected("y", _FORMS, f"shape {labels.shape}", todo))
    if len(labels) != n_images:
        raise InputError(expected("y", f"one label for each of the {n_images} images", f"{len(labels)} labels"))
    odd = np.setdiff1d(labels, [0.0, 1.0])
    if odd.size:
        got = "values " + " and ".join(f"{value:g}" for value in odd[:2])
        raise InputError(expected("y", _FORMS, got, "Classes of the images are not wanted here."))
    if labels.ndim == 2 and not (labels.sum(1) == 1).all():
        got = f"{int((labels.sum(1) != 1).sum())} rows that do not have exactly one 1"
        raise InputError(expected("y", _FORMS, got))
    adversarial: npt.NDArray[np.bool_] = (labels if labels.ndim == 1 else labels[:, 1]) == 1
    return adversarial
