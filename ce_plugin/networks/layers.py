"""A layer of a network: found by name, read, replaced; and the network's fingerprint."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, CEPluginError, InputError, ModelError, expected, unknown_name
from ce_plugin.networks.forward import OutputSelector, is_opaque, select_logits
from ce_plugin.networks.guard import state_guard, turn
from ce_plugin.networks.tracing import Element, HookPoint, as_path, spliced

Layer = Union[str, nn.Module]


def find_layer(network: nn.Module | Sequence[nn.Module], layer: Layer) -> tuple[str, nn.Module]:
    """The dotted name and the module of a layer that is given as either.

    Args:
        network: the network that the layer is part of, or the networks that a forward function runs.
        layer: a submodule, or its dotted name ("features.9").

    Raises:
        ModelError: ``network`` is no module, or there is none, or the module is not part of it; the layer is a scripted
            module or inside one; the network has no layers.
        UnknownNameError: no submodule has this name; the nearest names are given.
        ArgumentError: ``layer`` is neither.

    Example:
        >>> find_layer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "1")
        ('1', ReLU())
    """
    networks = network if isinstance(network, (list, tuple)) else [network]
    if not networks:
        hint = "Pass the nn.Module itself, or a function that refers to it."
        raise ModelError(expected("forward_func", "a network, or a function that runs one", "none found", hint))
    if not isinstance(layer, (str, nn.Module)):
        raise ArgumentError(expected("layer", "a submodule of the network or its dotted name", repr(layer)))
    names = set()
    for root in networks:
        if not isinstance(root, nn.Module):
            raise ModelError(expected("network", "a torch.nn.Module", type(root).__name__))
        for name, module in root.named_modules(remove_duplicate=False):
            found = module is layer or (name and isinstance(layer, str) and name == layer)
            inside = isinstance(layer, str) and (not name or layer.startswith(f"{name}."))
            if isinstance(module, torch.jit.ScriptModule) and (found or inside):
                hint = "Explain the network as it was before `torch.jit`; its input can be explained as it is."
                got = f"{layer!r} in a module of TorchScript" if isinstance(layer, str) else "a module of TorchScript"
                raise ModelError(expected("layer", "a layer that takes hooks", got, hint))
            if found:
                return name, module
            names.add(name)
    if isinstance(layer, str) and names == {""}:
        kind = type(networks[0]).__name__
        hint = 'It is a layer itself: pass `torch.nn.Sequential(network)` and name it "0".'
        raise ModelError(expected("layer", "a layer of a network that has some", f"{layer!r} of one {kind}", hint))
    if isinstance(layer, str):
        raise unknown_name("layer", layer, names - {""})
    hint = "Take a module of the very object that is explained, or its dotted name."
    raise ModelError(expected("layer", "a module of the network", f"another {type(layer).__name__}", hint))


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that acts in the thread that made it; the passes of other threads through the same module are theirs."""
    me = threading.get_ident()

    @functools.wraps(hook)
    def own(*given: Any) -> Any:
        # A compiler cannot ask which thread it is in: what it makes of a hook acts in all of them.
        return hook(*given) if torch.compiler.is_compiling() or threading.get_ident() == me else None

    return own


def last_conv_layer(network: nn.Module, images: Tensor) -> tuple[str, nn.Module] | None:
    """The last convolution that still sees a plane: the layer that Grad-CAM is meant for.

    Args:
        network: left as it was.
        images: one or more examples, (N, C, H, W).

    Returns:
        Name and module of the last ``Conv2d`` in order of execution whose output is larger than 1 x 1; None where there
        is none, or only one at the very start (the patch embedding of a transformer summarises nothing).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1))
        >>> last_conv_layer(net, torch.zeros(1, 3, 8, 8))[0]
        '2'
    """
    steps: list[nn.Module] = []  # all that ran, in order
    planes: list[int] = []  # and where among them the convolutions are that see a plane

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor) and output.shape[-2:].numel() > 1:
            planes.append(len(steps))
        steps.append(module)

    with state_guard(network), torch.no_grad():  # the guard takes the hooks away again
        for module in network.modules():
            whole = isinstance(module, nn.Conv2d) or not list(module.children())  # some convolutions hold their padding
            if whole and not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_hook(in_this_thread(note))
        network(images[:1])
    if not planes or (planes[-1] == 0 and len(steps) > 4):
        return None
    return find_layer(network, steps[planes[-1]])


@dataclass
class MapWatch:
    """The last value with positions that passed through networks, before positions are pooled away or flattened.

    Attributes:
        module: whose value it is; None where none had positions yet.
        at_input: the module's input is meant, as of a pooling.
        call: which of the module's calls.
        value: the value itself, (N, ...).
    """

    module: nn.Module | None = None
    at_input: bool = False
    call: int = 0
    value: Tensor | None = None


@contextmanager
def watched_maps(networks: Sequence[nn.Module]) -> Iterator[MapWatch]:
    """Watch passes of this thread through networks, which are left as they were.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> with watched_maps([net]) as seen:
        ...     output = net(torch.zeros(1, 1, 5, 5))
        >>> seen.module, seen.at_input, seen.value.shape
        (AdaptiveAvgPool2d(output_size=1), True, torch.Size([1, 4, 3, 3]))
    """
    calls: dict[int, int] = {}
    seen = MapWatch()

    def note(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        call = calls[id(module)] = calls.get(id(module), -1) + 1
        at_input = not has_positions(output)
        if at_input and not (seen.module and args and has_positions(args[0]) and not list(module.children())):
            return
        value = args[0] if at_input else output
        if isinstance(value, Tensor):
            seen.module, seen.at_input, seen.call, seen.value = module, at_input, call, value

    with state_guard(networks=networks):  # the guard takes the hooks away again
        parts = {id(part): part for root in networks if not is_opaque(root) for part in root.modules()}
        for key in parts.keys() - set(map(id, networks)):
            if not is_opaque(parts[key]):
                parts[key].register_forward_hook(in_this_thread(note))
        yield seen


def last_map(networks: Sequence[nn.Module], run: Callable[[], Iterable[Tensor]]) -> tuple[nn.Module, bool, int] | None:
    """Where the last value with positions is, before they are pooled away or flattened.

    Args:
        networks: left as they were.
        run: passes an example through them; returns the outputs.

    Returns:
        A module; whether its input is meant, as of a pooling; and which of its calls. None where no value has
        positions, or the outputs have them.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> last_map([net], lambda: [net(torch.zeros(1, 1, 5, 5))])
        (AdaptiveAvgPool2d(output_size=1), True, 0)
    """
    with watched_maps(networks) as seen, torch.no_grad():
        outputs = run()
    return None if seen.module is None or any(map(has_positions, outputs)) else (seen.module, seen.at_input, seen.call)


def has_positions(value: object) -> bool:
    """Whether a value (N, C, ...) has more than one position."""
    return isinstance(value, Tensor) and 3 <= value.dim() <= 5 and value.shape[2:].numel() > 1


def read_layer(network: nn.Module, layer: Layer, images: Tensor) -> tuple[Tensor, Any]:
    """What a layer returns, and what the network returns, in one pass.

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
    outputs: list[object] = []

    def keep(_: nn.Module, args: object, output: object) -> None:
        outputs.append(output.clone() if isinstance(output, Tensor) else output)

    with turn(network), module.register_forward_hook(in_this_thread(keep)):
        result = network(images)
    if len(outputs) != 1:
        hint = "Give each use a module of its own." if outputs else "Choose a layer that every image passes through."
        came = f"one that is reached {len(outputs)} times" if outputs else "one that is not reached"
        raise ModelError(expected("layer", f"a layer that is reached once in a pass ({name!r})", came, hint))
    (value,), rows = outputs, len(images)
    if not isinstance(value, Tensor) or value.dim() != 4 or len(value) != rows or not value.is_floating_point():
        came = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        hint = "Choose a convolutional layer, or one before the pooling."
        raise ModelError(expected("layer", f"a layer ({name!r}) that returns (N, C, h, w), N = {rows}", came, hint))
    return value, result


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
    return activations, select_logits(result, output)


@contextmanager
def inserted(network: nn.Module, layer: Layer, autoencoder: Callable[[Tensor], Tensor]) -> Iterator[nn.Module]:
    """Inside, the network runs with the autoencoder in the place of the layer's output, in this thread only.

    Args:
        network: left as it was afterwards, also after an error.
        layer: a submodule or its dotted name.
        autoencoder: a module, or another callable, from the layer's output to a tensor of its shape.

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

    @in_this_thread
    def hook(_: nn.Module, args: object, output: Tensor) -> Tensor:
        # What follows may work in place, on a tensor that the caller still needs.
        return autoencoder(output).clone()

    with turn(network), module.register_forward_hook(hook):
        yield network


def fingerprint(network: nn.Module, *, exact: bool = False) -> str:
    """A digest of the values of all parameters and buffers, by which networks are told apart.

    Args:
        network: whose state is read.
        exact: names, types and the counts of batches seen in training count too. Without it a wrapped or compiled
            network is still the same one, and so is one on another device, in another memory layout or in a wider
            floating point type.

    Returns:
        16 hexadecimal digits; 32 where ``exact``.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = fingerprint(net)
        >>> before == fingerprint(net.double()), len(before)
        (True, 16)
        >>> _ = nn.init.zeros_(net.weight)
        >>> before == fingerprint(net)
        False
    """
    digest = hashlib.blake2b(digest_size=16 if exact else 8)
    state = network.state_dict()
    for name in sorted(state) if exact else state:
        value = state[name]
        if not isinstance(value, Tensor) or (not exact and name.endswith("num_batches_tracked")):
            continue
        value, shape = value.detach().cpu(), tuple(value.shape)
        digest.update(f"{name} {shape} {value.dtype}".encode() if exact else str(shape).encode())
        plain = value.float() if value.is_floating_point() and not exact else value
        digest.update(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class HookCalls:
    """How a network passed through a layer during one pass.

    Attributes:
        calls: how often the network passed through it.
        element: which element of a tuple its value is; None where it is the tensor itself.
    """

    calls: int = 0
    element: Element = None


@contextmanager
def hooked(point: HookPoint, act: Callable[[Tensor], Tensor | None], name: str) -> Iterator[HookCalls]:
    """During one forward pass, show the point's value to ``act`` and put what it returns in its place.

    Args:
        point: a module's output or input.
        act: is given the value; None leaves it as it is.
        name: of the layer, for messages.

    Raises:
        ModelError: the network does not pass through the layer, or not that often.
        InputError: the layer's value is no tensor, or quantised.
    """
    found = HookCalls()
    module = point.module
    if module is None:
        raise ModelError(expected("layer", "a module", "the network's input"))

    @in_this_thread
    def hook(_: object, *given: Any) -> Any:
        parts = given[-1]  # a hook before the module is given its arguments, one after it also its output
        here, found.calls = found.calls == point.call, found.calls + 1
        if not here:
            return None
        found.element = _element(parts, point, name)
        path = as_path(found.element)
        value = part_of(parts, path)
        if value.is_quantized:
            hint = "Take a layer whose value is not quantised, or the network before it is converted."
            raise InputError(expected("layer", "one with floating-point values", f"{name!r}, a quantised one", hint))
        new = act(value.transpose(0, point.rows))
        if new is None:
            return None
        # Recurrent modules take contiguous states only.
        return _replaced(parts, path, new.transpose(0, point.rows).contiguous() if point.rows else new)

    handle = module.register_forward_pre_hook(hook) if point.at_input else module.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
    if found.calls == 0:
        hint = "Take a layer that forward really calls; scripted and compiled modules hide theirs."
        raise ModelError(expected("layer", "one that the network passes through", f"{name!r}, never reached", hint))
    if found.calls <= point.call:
        got = f"{point.call} for {name!r}, which is passed through {found.calls} time(s)"
        raise ModelError(expected("call", f"below {found.calls}", got))


def rows_dim(module: nn.Module, element: Element, at_input: bool) -> int:
    """The dimension that counts the examples in what a module takes or returns: 0, but for recurrent ones.

    Example:
        >>> lstm = nn.LSTM(2, 3, batch_first=True)
        >>> rows_dim(lstm, 0, at_input=False), rows_dim(lstm, (1, 0), at_input=False)
        (0, 1)
    """
    if not isinstance(module, nn.RNNBase):
        return 0
    # The states are (layers, N, H); the sequence is (T, N, H) unless the module says otherwise.
    is_sequence = as_path(element) in ((0,), ()) if at_input else as_path(element) == (0,)
    return 0 if is_sequence and module.batch_first else 1


def part_of(parts: Any, path: tuple[int, ...]) -> Any:
    """What is at this path in containers."""
    for index in path:
        parts = parts[index]
    return parts


def _element(parts: Any, point: HookPoint, name: str) -> Element:
    """Which part of what a layer takes or returns is its value.

    Raises:
        InputError: there is no such tensor, or there are several and none was named.
    """
    paths = list(_tensors(parts))
    named = None if point.element is None else as_path(point.element)
    if named in paths:
        return point.element
    # The first argument is a layer's input; of several outputs none is *the* output.
    if named is None and paths and (point.at_input or len(paths) == 1):
        return _short(paths[0])
    side, shown = "takes" if point.at_input else "returns", [_short(path) for path in paths]
    got = f"{name!r}, which {side} {type(parts).__name__}" + (f" with tensors at {shown}" if any(paths) else "")
    hint = f"Say which: `LayerSite(layer, element={shown[0]})`." if any(paths) else ""
    wanted = "a layer with a tensor as its value" if named is None else f"one with a tensor at {point.element}"
    raise InputError(expected("layer", wanted, got, hint))


def _short(path: tuple[int, ...]) -> Element:
    return None if not path else path[0] if len(path) == 1 else path


def _tensors(parts: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where in nested tuples and lists there are tensors."""
    if isinstance(parts, Tensor):
        yield path
    elif isinstance(parts, (tuple, list)):
        for index, part in enumerate(parts):
            yield from _tensors(part, (*path, index))


def _replaced(parts: Any, path: tuple[int, ...], new: Tensor) -> Any:
    if not path:
        return new
    first, *rest = path
    return spliced(parts, _replaced(parts[first], tuple(rest), new), first)


def keep_copy(store: list[Tensor], value: Tensor) -> None:
    """Keep a copy of a layer's value: the operation after the layer may write to it."""
    with torch.no_grad():
        store.append(value.detach().clone())
