"""A layer of a network: found by name, read, replaced, and told from the same layer of another network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Union

import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, CEPluginError, InputError, ModelError, expected, unknown_name

__all__ = [
    "Layer",
    "OutputSelector",
    "find_layer",
    "fingerprint",
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
        todo = "Give a submodule of this network, or its dotted name."
        raise ModelError(expected("layer", f"a part of the {type(network).__name__}", type(layer).__name__, todo))
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
        todo = "Choose a layer that every image passes through." if not seen else "Give each use a module of its own."
        came = "one that is not reached" if not seen else f"one that is reached {len(seen)} times"
        raise ModelError(expected("layer", f"a layer that is reached once in a pass ({name!r})", came, todo))
    found = seen[0]
    spatial = isinstance(found, Tensor) and found.dim() == 4 and len(found) == rows and found.is_floating_point()
    if not isinstance(found, Tensor) or not spatial:
        came = f"{tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        todo = "Choose a convolutional layer, or one before the pooling."
        raise ModelError(expected("layer", f"a layer ({name!r}) that returns (N, C, h, w), N = {rows}", came, todo))
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
        todo = "Name the part that holds the logits with `output=` (a key, an index or a callable)."
        raise ModelError(expected("network", "a network that returns logits (N, C)", came, todo))
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
