"""Differences that stay in one window."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ce_plugin.trials.operations import Operation
from ce_plugin.trials.states import State, Window

__all__ = ["follow_windows", "window_of"]


def window_of(site: Tensor, do: Tensor, masks: Tensor) -> Window | None:
    return None


def follow_windows(operation: Operation, clean: Callable[[], Tensor]) -> State | None:
    return None
