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

_START, _LARGEST = 8, 4096
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
    """Chooses the number of rows per pass: doubles it, or else halves it, while a row gets cheaper and memory allows.

    On a CPU large batches are *slower* (they fall out of the caches and their memory is handed back to the system
    after each operation), so that time is measured, on trials that have to be run anyway.

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
        self.settled = fixed is not None or start is not None
        self.rows = fixed if fixed is not None else min(start or _START, self.limit)
        self.fastest: int | None = None
        self._tried: dict[int, float] = {}
        self._seen: list[float] = []

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
        self._seen.append(seconds)
        short = seconds <= _SHORT_SECONDS
        if not short and len(self._seen) < _TIMINGS:
            return
        # The fastest of a few: a first pass of a new shape sets things up, and other work only ever adds time.
        per_row = min(self._seen) / self.rows
        better = all(per_row < 0.98 * other for other in self._tried.values())
        self._tried[self.rows], self._seen = per_row, []
        upwards = self.rows == max(self._tried)
        if upwards and (better or short):
            if 2 * self.rows <= self.limit:
                self.rows *= 2
            else:
                self._settle(self.rows, known=self.limit == _LARGEST)
            return
        best = min(self._tried, key=lambda rows: self._tried[rows])
        # Where more rows did not pay at once, fewer may: small tensors are not handed back to the system.
        if best == min(self._tried) and best > 1 and not short:
            self.rows = best // 2
            return
        self._settle(best, known=True)

    def _settle(self, rows: int, known: bool) -> None:
        self.rows, self.settled = rows, True
        self.fastest = rows if known else None

    def halve(self, rows: int) -> None:
        """After ``rows`` rows did not fit into memory."""
        self.limit = max(1, min(self.limit, rows // 2))
        self.rows = min(self.rows, self.limit)
        self.settled = True


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
