"""A layer of a network: found by name, read, replaced, and told from the same layer of another network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, CEPluginError, InputError, ModelError, expected, unknown_name
from ce_plugin.networks.graph import HookPoint

__all__ = [
    "HookCalls",
    "Layer",
    "OutputSelector",
    "find_layer",
    "fingerprint",
    "hooked",
    "inserted",
    "probe",
    "read_layer",
    "replaced",
    "select",
]


Layer = Union[str, nn.Module]
OutputSelector = Union[str, int, Callable[[Any], Tensor], None]


def find_layer(network: nn.Module, layer: Layer) -> tuple[str, nn.Module]:
    """The dotted name and the module of a layer that is given as either.

    Args:
        network: the network that the layer is part of.
        layer: a submodule, or its dotted name ("features.9").

    Raises:
        ModelError: ``network`` is no module, or the module is not part of it.
        UnknownNameError: no submodule has this name; the nearest names are given.
        ArgumentError: ``layer`` is neither.

    Example:
        >>> find_layer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "1")
        ('1', ReLU())
    """
    if not isinstance(network, nn.Module):
        raise ModelError(expected("network", "a torch.nn.Module", type(network).__name__))
    modules = dict(network.named_modules())
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name, module
        hint = "Give a submodule of this network, or its dotted name."
        raise ModelError(expected("layer", f"a part of the {type(network).__name__}", type(layer).__name__, hint))
    if not isinstance(layer, str):
        raise ArgumentError(expected("layer", "a submodule of the network or its dotted name", repr(layer)))
    if layer not in modules:
        raise unknown_name("layer", layer, [name for name in modules if name])
    return layer, modules[layer]


def read_layer(network: nn.Module, layer: Layer, images: Tensor) -> tuple[Tensor, Any]:
    """What a layer returns, and what the network does, in one pass.

    Args:
        network: run as it is: mode and gradients are the caller's.
        layer: a submodule or its dotted name.
        images: (N, ...), as the network takes them.

    Returns:
        The layer's activations, (N, C, h, w), and the network's output. The activations are a copy: what follows the
        layer may work in place.

    Raises:
        ModelError: the layer is not reached, is reached several times, or returns nothing spatial.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten())
        >>> activations, output = read_layer(net, "0", torch.zeros(4, 1, 5, 5))
        >>> activations.shape, output.shape
        (torch.Size([4, 2, 3, 3]), torch.Size([4, 18]))
    """
    name, module = find_layer(network, layer)
    seen: list[object] = []

    def keep(_: nn.Module, args: object, output: object) -> None:
        seen.append(output.clone() if isinstance(output, Tensor) else output)

    handle = module.register_forward_hook(keep)
    try:
        result = network(images)
    finally:
        handle.remove()
    return _the_one(name, seen, len(images)), result


def _the_one(name: str, seen: list[object], rows: int) -> Tensor:
    """The activations, where the layer was reached once and returned something spatial."""
    if len(seen) != 1:
        hint = "Choose a layer that every image passes through." if not seen else "Give each use a module of its own."
        came = "one that is not reached" if not seen else f"one that is reached {len(seen)} times"
        raise ModelError(expected("layer", f"a layer that is reached once in a pass ({name!r})", came, hint))
    found = seen[0]
    spatial = isinstance(found, Tensor) and found.dim() == 4 and len(found) == rows and found.is_floating_point()
    if not isinstance(found, Tensor) or not spatial:
        came = f"{tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        hint = "Choose a convolutional layer, or one before the pooling."
        raise ModelError(expected("layer", f"a layer ({name!r}) that returns (N, C, h, w), N = {rows}", came, hint))
    return found


def probe(network: nn.Module, layer: Layer, images: Tensor, output: OutputSelector) -> tuple[Tensor, Tensor]:
    """The layer's activations and the logits of a few images, to find out whether anything can be done at all.

    Raises:
        InputError: the network cannot take the images.
        ModelError: the layer is not reached once or returns nothing spatial, or the network returns no logits.
    """
    try:
        with torch.no_grad():
            activations, result = read_layer(network, layer, images)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, CEPluginError):
            raise
        wanted = f"images that the {type(network).__name__} takes"
        came = f"{tuple(images.shape)}, at which it fails ({str(error).splitlines()[0]})"
        raise InputError(expected("images", wanted, came, "Resize and normalise them as it was trained.")) from error
    return activations, select(result, output)


@contextmanager
def replaced(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the module's output is ``change(output)``; also after an error the module is as it was."""

    def hook(_: nn.Module, args: object, output: Tensor) -> Tensor:
        # What follows may work in place, on a tensor that the caller still needs.
        return change(output).clone()

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def inserted(network: nn.Module, layer: Layer, autoencoder: nn.Module) -> Iterator[nn.Module]:
    """Inside, the network runs with the autoencoder in the place of the layer's output.

    Args:
        network: left as it was afterwards, also after an error.
        layer: a submodule or its dotted name.
        autoencoder: maps the layer's output to a tensor of its shape.

    Yields:
        The network.

    Raises:
        ModelError: the layer is not part of the network.
        UnknownNameError: no submodule has this name.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten())
        >>> x = torch.ones(1, 1, 2, 2)
        >>> with inserted(net, "0", nn.Identity()):
        ...     same = net(x)
        >>> bool((same == net(x)).all())
        True
    """
    _, module = find_layer(network, layer)
    with replaced(module, autoencoder):
        yield network


def select(result: Any, output: OutputSelector) -> Tensor:
    """The logits in what a network returns, (N, C).

    Args:
        result: what the network returned.
        output: None takes a tensor as it is; else a key, an index, or a callable.

    Raises:
        ModelError: there is no such part, or it is no tensor of the form (N, C).
    """
    try:
        chosen = result if output is None else output(result) if callable(output) else result[output]
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(expected("output", "a part of what the network returns", repr(output))) from error
    if not isinstance(chosen, Tensor) or chosen.dim() != 2 or not chosen.is_floating_point():
        came = tuple(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
        hint = "Name the part that holds the logits with `output=` (a key, an index or a callable)."
        raise ModelError(expected("network", "a network that returns logits (N, C)", came, hint))
    return chosen


def fingerprint(network: nn.Module) -> str:
    """A short word that tells networks apart: shapes and values of all parameters and buffers.

    Names are left out, so that a wrapped or compiled network is still the same one; so are device, memory layout and
    a wider floating point type.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = fingerprint(net)
        >>> before == fingerprint(net.double()), len(before)
        (True, 16)
        >>> _ = nn.init.zeros_(net.weight)
        >>> before == fingerprint(net)
        False
    """
    digest = hashlib.blake2b(digest_size=8)
    for key, value in network.state_dict().items():
        # How many batches were seen in training changes no answer.
        if isinstance(value, Tensor) and not key.endswith("num_batches_tracked"):
            plain = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous()
            digest.update(str(tuple(plain.shape)).encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class HookCalls:
    """What was seen of a layer during one pass.

    Attributes:
        calls: how often the network passed through it.
        element: which element of a tuple its value is; None where it is the tensor itself.
    """

    calls: int = 0
    element: int | None = None


@contextmanager
def hooked(point: HookPoint, act: Callable[[Tensor], Tensor | None], name: str) -> Iterator[HookCalls]:
    """During one forward pass, show the point's value to ``act`` and put what it returns in its place.

    Args:
        point: a module's output or input.
        act: is given the value; None leaves it as it is.
        name: of the layer, for messages.

    Raises:
        ModelError: the network does not pass through the layer, or not that often.
        InputError: the layer's value is no tensor.
    """
    seen = HookCalls()
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
        hint = "Take a layer that forward really calls; scripted and compiled modules hide theirs."
        raise ModelError(expected("layer", "one that the network passes through", f"{name!r}, never reached", hint))
    if seen.calls <= point.call:
        got = f"{point.call} for {name!r}, which is passed through {seen.calls} time(s)"
        raise ModelError(expected("call", f"below {seen.calls}", got))


def _part(parts: Any, point: HookPoint, name: str) -> tuple[Tensor, int | None]:
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
    hint = f"Say which: `LayerSite(layer, element={tensors[0]})`." if tensors else ""
    wanted = "a layer with a tensor as its value" if point.element is None else f"one with a tensor at {point.element}"
    raise InputError(expected("layer", wanted, got, hint))


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
