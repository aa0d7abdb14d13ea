"""Reading and setting a layer's value while the network runs, by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ce_plugin.errors import InputError, ModelError, expected
from ce_plugin.trials.graph import Point

__all__ = ["Seen", "intercepted"]


@dataclass
class Seen:
    """What was seen of a layer during one pass.

    Attributes:
        calls: how often the network passed through it.
        element: which element of a tuple its value is; None where it is the tensor itself.
    """

    calls: int = 0
    element: int | None = None


@contextmanager
def intercepted(point: Point, act: Callable[[Tensor], Tensor | None], name: str) -> Iterator[Seen]:
    """During one forward pass, show the point's value to ``act`` and put what it returns in its place.

    Args:
        point: a module's output or input.
        act: is given the value; None leaves it as it is.
        name: of the layer, for messages.

    Raises:
        ModelError: the network does not pass through the layer, or not that often.
        InputError: the layer's value is no tensor.
    """
    seen = Seen()
    module = point.module
    if module is None:
        raise ModelError(expected("layer", "a module", "the network's input"))

    def chosen(parts: Any) -> Any:
        here, seen.calls = seen.calls == point.call, seen.calls + 1
        if not here:
            return None
        value, seen.element = _part(parts, point, name)
        new = act(value)
        return None if new is None else _replaced(parts, seen.element, new)

    def after(_: object, args: object, output: Any) -> Any:
        return chosen(output)

    def before(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = chosen(args)
        return None if new is None else (new, kwargs)

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if point.at_input
        else module.register_forward_hook(after)
    )
    try:
        yield seen
    finally:
        handle.remove()
    if seen.calls == 0:
        todo = "Take a layer that forward really calls; scripted and compiled modules hide theirs."
        raise ModelError(expected("layer", "one that the network passes through", f"{name!r}, never reached", todo))
    if seen.calls <= point.call:
        got = f"{point.call} for {name!r}, which is passed through {seen.calls} time(s)"
        raise ModelError(expected("call", f"below {seen.calls}", got))


def _part(parts: Any, point: Point, name: str) -> tuple[Tensor, int | None]:
    if isinstance(parts, Tensor) and point.element is None:
        return parts, None
    every = list(parts) if isinstance(parts, (tuple, list)) else []
    tensors = [k for k, part in enumerate(every) if isinstance(part, Tensor)]
    if point.element is not None and point.element in tensors:
        return every[point.element], point.element
    # The first argument is a layer's input; of several outputs none is *the* output.
    if point.element is None and tensors and (point.at_input or len(tensors) == 1):
        return every[tensors[0]], tensors[0]
    side = "takes" if point.at_input else "returns"
    got = f"{name!r}, which {side} {type(parts).__name__}" + (f" with tensors at {tensors}" if every else "")
    todo = f"Say which: `LayerSite(layer, element={tensors[0]})`." if tensors else ""
    wanted = "a layer with a tensor as its value" if point.element is None else f"one with a tensor at {point.element}"
    raise InputError(expected("layer", wanted, got, todo))


def _replaced(parts: Any, element: int | None, new: Tensor) -> Any:
    if element is None:
        return new
    every = [new if k == element else part for k, part in enumerate(parts)]
    if hasattr(parts, "_fields"):
        return type(parts)(*every)
    return every if isinstance(parts, list) else tuple(every)


def copied(store: list[Tensor]) -> Callable[[Tensor], None]:
    """An action that keeps a copy of the value: the operation after a layer may write to it."""

    def act(value: Tensor) -> None:
        with torch.no_grad():
            store.append(value.detach().clone())

    return act
