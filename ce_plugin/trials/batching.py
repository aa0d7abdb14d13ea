"""How many rows go through the network at once: as many as memory allows, no more than is fast."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["BatchSize", "bytes_per_row", "free_memory", "is_opaque", "learned"]

_FIRST, _LARGEST = (4, 8, 16), 4096
# Shorter batches than this are dominated by fixed costs, so that a larger batch always pays.
_SHORT_SECONDS = 0.004
_TIMINGS = 3

# By identity: modules may define what equality means for them, and then need not be hashable.
_LEARNED: dict[int, dict[object, object]] = {}


def learned(module: nn.Module) -> dict[object, object]:
    """What earlier runs learned about this network (best batch size, memory format); forgotten with the network."""
    key = id(module)
    if key not in _LEARNED:
        weakref.finalize(module, _LEARNED.pop, key, None).atexit = False
        _LEARNED[key] = {}
    return _LEARNED[key]


def is_opaque(module: nn.Module) -> bool:
    """Scripted and compiled modules: a hook or another memory layout would make them compile again."""
    compiled = (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)
    return isinstance(module, compiled) or getattr(module, "_compiled_call_impl", None) is not None


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as info:
        line = next(line for line in info if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30


def _nbytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_nbytes, value))
    return 0


@contextlib.contextmanager
def bytes_per_row(modules: list[nn.Module], rows: int, inputs: tuple[Tensor, ...]) -> Iterator[list[int]]:
    """Measure during a forward pass what one row takes at its peak; the list's one entry is valid afterwards.

    The peak of inference is where some operation holds its input and output; residual connections keep a few more
    such tensors alive, hence the factor. Scripted and compiled modules are not hooked.
    """
    row = max(sum(map(_nbytes, inputs)) // max(rows, 1), 1)
    result = [64 * row]
    largest = [0]

    def hook(module: nn.Module, args: object, output: object) -> None:
        largest[0] = max(largest[0], _nbytes(args) + _nbytes(output))

    leaves = [m for root in modules if not is_opaque(root) for m in root.modules() if not list(m.children())]
    handles = [leaf.register_forward_hook(hook) for leaf in leaves if not is_opaque(leaf)]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    if largest[0]:
        result[0] = 4 * row + 3 * largest[0] // max(rows, 1)


class BatchSize:
    """Chooses the number of rows per pass: the fastest of a few, then larger or smaller ones while they are faster.

    On a CPU large batches are *slower* (they fall out of the caches and their memory is handed back to the system
    after each operation), so that time is measured, on trials that have to be run anyway. Sizes take turns, because the
    machine's own speed drifts.

    Args:
        limit: largest number of rows that memory allows.
        fixed: a number of rows that the user wants; nothing is measured then.
        start: what an earlier run learned.

    Attributes:
        rows: the number of rows to take now.
        fastest: the number of rows that proved fastest, once it is known; None where memory was what decided.
    """

    def __init__(self, limit: int, fixed: int | None = None, start: int | None = None) -> None:
        self.limit = max(1, min(limit, _LARGEST))
        self.fastest: int | None = None
        self._times: dict[int, float] = {}
        self._queue: list[int] = []
        if fixed is not None:
            self._chosen = fixed
        elif start is not None:
            self._chosen = min(start, self.limit)
        else:
            self._chosen = min(_FIRST[1], self.limit)
            self._queue = sorted({min(size, self.limit) for size in _FIRST}) * _TIMINGS

    @property
    def rows(self) -> int:
        return self._queue[0] if self._queue else self._chosen

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be timed."""
        return not self._queue

    @contextlib.contextmanager
    def timed(self, rows: int, device: torch.device) -> Iterator[None]:
        """Time one pass of ``rows`` rows and learn from it."""
        if self.settled or rows != self.rows:
            yield
            return
        _synchronize(device)
        start = time.perf_counter()
        yield
        _synchronize(device)
        self._learn(time.perf_counter() - start)

    def _learn(self, seconds: float) -> None:
        if self.settled:
            return  # memory has run out during this very pass
        rows = self._queue.pop(0)
        # The fastest of a few: a first pass of a new shape sets things up, and other work only ever adds time.
        self._times[rows] = min(self._times.get(rows, seconds), seconds)
        if self._queue:
            return
        per_row = {size: taken / size for size, taken in self._times.items()}
        best, largest = min(per_row, key=lambda size: per_row[size]), max(per_row)
        short = self._times[largest] <= _SHORT_SECONDS
        if (short or best == largest) and 2 * largest <= self.limit:
            self._queue = [2 * largest] if short else [best, 2 * best] * _TIMINGS
        elif not short and best == min(per_row) and best > 1:
            self._queue = [best, best // 2] * _TIMINGS
        else:
            self._chosen = largest if short else best
            bound = self._chosen == largest and self.limit < _LARGEST
            self.fastest = None if bound else self._chosen

    def settle(self, rows: int, limit: int) -> None:
        """Take so many rows from now on, and nothing is timed."""
        self.limit, self._chosen, self._queue = limit, min(rows, limit), []

    def halve(self, rows: int) -> None:
        """After ``rows`` rows did not fit into memory."""
        self.limit = max(1, min(self.limit, rows // 2))
        self._chosen = min(self.rows, self.limit)
        self._queue = []


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
