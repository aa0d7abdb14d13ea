"""How many floating-point operations a computation takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["flops_of"]


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up floating-point operations. PyTorch's own counter follows modules too, and fails on some of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=out))
        return out


def flops_of(run: Callable[[], Any]) -> int:
    """Floating-point operations that a function counts up."""
    # Inside inference mode composite operations reach the counter whole, and are not counted.
    with torch.inference_mode(False), torch.no_grad(), _Counter() as counter:
        run()
    return int(counter.total)
