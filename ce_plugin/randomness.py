"""Random numbers determined by (seed, example id, stream name), not by the global state or the order of draws."""

from __future__ import annotations

import zlib

import numpy as np
import torch

__all__ = ["derived_seed", "generator", "numpy_generator"]


def _sequence(seed: int, keys: tuple[int | str, ...]) -> np.random.SeedSequence:
    entropy = []
    for key in (seed, *keys):
        value = zlib.crc32(key.encode()) if isinstance(key, str) else int(key)
        # SeedSequence takes non-negative integers only, so the sign is a separate one.
        entropy += [abs(value), int(value < 0)]
    # numpy pads to four words with zeros, so that (1,) and (1, 0) would give the same stream.
    return np.random.SeedSequence([*entropy, len(entropy)] if len(entropy) <= 4 else entropy)


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for the stream ``(seed, *keys)``: equal keys give equal numbers.

    Args:
        seed: the user's seed, any integer.
        keys: identify the stream, such as an example's id and a name like ``"fill"``.

    Example:
        >>> a = torch.rand(2, generator=generator(0, 7, "fill"))
        >>> b = torch.rand(2, generator=generator(0, 7, "fill"))
        >>> bool((a == b).all())
        True
    """
    state = _sequence(seed, keys).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def derived_seed(seed: int, *keys: int | str) -> int:
    """A seed for the stream ``(seed, *keys)``, for functions that take a seed instead of a generator.

    Example:
        >>> derived_seed(0, "evidence") == derived_seed(0, "evidence") != derived_seed(1, "evidence")
        True
    """
    return int(_sequence(seed, keys).generate_state(1, np.uint32)[0])


def numpy_generator(seed: int, *keys: int | str) -> np.random.Generator:
    """A numpy generator for the stream ``(seed, *keys)``, see :func:`generator`.

    Example:
        >>> bool(numpy_generator(0, "x").random() == numpy_generator(0, "x").random())
        True
    """
    return np.random.default_rng(_sequence(seed, keys))
