"""The model and the global random state as they were before, on success and on error."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["modules_of", "state_guard"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_DEPTH = 4
_PLAIN = (Tensor, np.ndarray, type, ModuleType, CodeType, str, bytes, int, float, complex, type(None))


def modules_of(forward_func: object) -> list[nn.Module]:
    """The networks that a callable runs, as far as they can be found by looking at it.

    Looks through modules, bound methods, ``functools.partial``, decorated functions, what a function closes over or
    reads from the globals of its file, the attributes of callable objects (``.model`` of an ART classifier among
    them), and lists, tuples and dictionaries of all these.

    Args:
        forward_func: an ``nn.Module`` or any callable.

    Returns:
        The outermost modules, each once; an empty list where none is found.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> modules_of(lambda x: net(x).softmax(1)) == [net]
        True
    """
    found: dict[int, nn.Module] = {}
    _look(forward_func, found, set(), _DEPTH)
    inner = {id(sub) for root in found.values() for sub in root.modules() if sub is not root}
    return [module for key, module in found.items() if key not in inner]


def _look(thing: object, found: dict[int, nn.Module], seen: set[int], depth: int) -> None:
    if isinstance(thing, nn.Module):
        found[id(thing)] = thing
        return
    if depth < 0 or id(thing) in seen or isinstance(thing, _PLAIN):
        return
    seen.add(id(thing))
    for part in _parts(thing):
        _look(part, found, seen, depth - 1)


def _parts(thing: object) -> Iterator[object]:
    """What a thing that is not a module is made of, where a module may hide."""
    if isinstance(thing, (list, tuple)):
        yield from thing
    elif isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, FunctionType):
        yield from vars(thing).values()
        yield from (thing.__defaults__ or ())
        yield from (thing.__kwdefaults__ or {}).values()
        yield from map(_content, thing.__closure__ or ())
        for name in _names(thing.__code__):
            value = thing.__globals__.get(name)
            # Functions of other files are not followed: from an imported library one would get anywhere.
            if isinstance(value, nn.Module) or getattr(value, "__globals__", None) is thing.__globals__:
                yield value
    else:
        yield getattr(thing, "model", None)
        yield from getattr(thing, "__dict__", {}).values()


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell: the name is not bound yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function reads, those of the functions defined inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@contextmanager
def state_guard(*forward_funcs: object, seed: int | None = None) -> Iterator[None]:
    """Run networks in eval mode and leave them, and the global random state, as they were, also after an error.

    Restored are each submodule's training flag; each parameter's ``grad`` (the same object; it is None inside) and
    ``requires_grad``; forward and backward hooks (those that appeared go, those that vanished come back); each
    buffer's identity and values; and the global random states of torch (CPU, and CUDA where it is in use), numpy
    and python. Parameters' values are not copied. A buffer or parameter that a first forward pass creates stays: a
    module that made it may not make it twice. Guards may be nested.

    Args:
        forward_funcs: modules, or callables in which :func:`modules_of` finds them.
        seed: where given, all these random states are seeded with it inside.

    Example:
        >>> net = nn.Dropout(0.5)
        >>> with state_guard(net):
        ...     print(net.training)
        False
        >>> net.training
        True
    """
    roots = [root for func in forward_funcs for root in modules_of(func)]
    modules = list({id(module): module for root in roots for module in root.modules()}.values())
    # An ExitStack runs every restoring step, even where an earlier one fails.
    with ExitStack() as stack:
        for save in (_random_states, lambda: _flags(modules), lambda: _hooks(modules)):
            stack.callback(save())
        stack.callback(_buffers(modules))
        stack.callback(_gradients(modules))
        if seed is not None:
            _seed(seed)
        yield


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _random_states() -> Callable[[], None]:
    cpu, python = torch.get_rng_state(), random.getstate()
    legacy = np.random.get_state()  # noqa: NPY002 - the global state of others is what is saved
    cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def _seed(seed: int) -> None:
    # torch.manual_seed would also leave a seed waiting for a CUDA that starts only after the guard has ended.
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def _flags(modules: list[nn.Module]) -> Callable[[], None]:
    """Eval mode by the flag alone: an overridden ``train()`` may do more than can be taken back (merge weights)."""
    training = [module for module in modules if getattr(module, "training", False)]
    idle = [module for module in modules if not getattr(module, "training", True)]
    for module in training:
        module.training = False

    def restore() -> None:
        for module in training:
            module.training = True
        for module in idle:
            if module.training:
                module.training = False

    return restore


def _hooks(modules: list[nn.Module]) -> Callable[[], None]:
    saved = [
        (hooks, hooks.copy())
        for module in modules
        if not _uninitialized(module)  # its hook must run once only
        for name in _HOOKS
        if (hooks := getattr(module, name, None)) is not None
    ]

    def restore() -> None:
        for hooks, before in saved:
            # In place: the handles that remove a hook refer to this very dictionary.
            if list(hooks.items()) != list(before.items()):
                hooks.clear()
                hooks.update(before)

    return restore


def _uninitialized(module: nn.Module) -> bool:
    return any(is_lazy(tensor) for tensor in (*_own(module, "parameters"), *_own(module, "buffers")))


def _own(module: nn.Module, kind: Literal["parameters", "buffers"]) -> list[Tensor]:
    """A module's own parameters or buffers; read directly, which is ten times faster than to ask the module."""
    if isinstance(module, torch.jit.ScriptModule):
        return list(getattr(module, kind)(False))
    return [tensor for tensor in module.__dict__[f"_{kind}"].values() if tensor is not None]


def _buffers(modules: list[nn.Module]) -> Callable[[], None]:
    names = [(m, dict(m._buffers)) for m in modules if m._buffers and not isinstance(m, torch.jit.ScriptModule)]
    tensors = {id(b): b for m in modules for b in _own(m, "buffers") if not (is_lazy(b) or b.is_meta)}
    values = [(buffer, buffer.detach().clone()) for buffer in tensors.values()]

    def restore() -> None:
        for module, before in names:
            for name, buffer in before.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
        for buffer, value in values:
            # Writing to a buffer spoils a graph that holds it, so an unchanged one is not written to.
            if not _same(buffer, value):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    if buffer.shape == value.shape:
                        buffer.copy_(value)
                    else:
                        buffer.data = value

    return restore


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    # NaN equals NaN here.
    return torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _gradients(modules: list[nn.Module]) -> Callable[[], None]:
    parameters = list({id(p): p for m in modules for p in _own(m, "parameters")}.values())
    saved = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    def restore() -> None:
        for parameter, grad, requires_grad in saved:
            parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    return restore
