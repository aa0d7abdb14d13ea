"""What a step of a report costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Meter"]


@dataclass
class Meter:
    """Counts passes through the whole network (examples, not batches) and seconds, by purpose."""

    model: nn.Module
    passes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, purpose: str) -> Iterator[None]:
        """Count what is run inside the ``with`` block."""

        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.passes[purpose] = self.passes.get(purpose, 0) + (len(inputs[0]) if inputs else 1)

        handle = self.model.register_forward_pre_hook(note)
        start = time.perf_counter()
        try:
            yield
        finally:
            handle.remove()
            self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - start
