"""Signatures of many images, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ce_plugin.detection.classifier import Protected
from ce_plugin.detection.fitted import Sample
from ce_plugin.detection.signature import Signature
from ce_plugin.detection.view import View
from ce_plugin.errors import ArgumentError, expected

__all__ = ["checked_count", "digests", "measured"]


def digests(images: Tensor) -> list[int]:
    """A number for each image that only an equal image has: 63 bits of a hash of its values in float32.

    Example:
        >>> one, two = digests(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]))
        >>> one == two
        False
    """
    values = images.detach().float().cpu().contiguous().numpy()
    return [int.from_bytes(hashlib.blake2b(value.tobytes(), digest_size=8).digest(), "big") >> 1 for value in values]


def measured(
    protected: Protected,
    signature: Signature,
    images: Tensor,
    *,
    batch_size: int,
    seed: int,
    altered: Callable[[Tensor, list[int]], Tensor] | None = None,
    ids: Sequence[int] | None = None,
) -> Sample:
    """What every group does to every image; the network and the random state stay as they are.

    Args:
        protected: the classifier.
        signature: what is measured.
        images: (N, C, H, W), image units, checked.
        batch_size: images at a time.
        seed: of interventions that draw random numbers.
        altered: applied to each batch first, with the images' ids.
        ids: one per image; None takes their digests, so that nothing depends on an image's place.
    """
    names = list(ids) if ids is not None else digests(images)
    parts = []
    # Inside inference mode no group could ask for a gradient.
    with protected.guarded(), torch.inference_mode(False), torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch, own = images[start : start + batch_size], names[start : start + batch_size]
            view = View(protected, batch if altered is None else altered(batch, own), own, seed)
            responses = {name: one.detached() for name, one in signature.measure(view).items()}
            parts.append(Sample(responses, view.logits.detach().cpu()))
    return Sample.joined(parts)


def checked_count(name: str, count: int) -> int:
    """A positive whole number that the user gave.

    Raises:
        ArgumentError: something else.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ArgumentError(expected(name, "a positive whole number", repr(count)))
    return count
