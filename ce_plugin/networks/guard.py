"""Which networks a callable runs, and a guard that leaves them and the global random state as they were."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

HOOKS = (
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
    if isinstance(forward_func, nn.Module):
        return [forward_func]
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[tuple[object, int]] = [(forward_func, _DEPTH)]
    while waiting:
        thing, depth = waiting.pop()
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        elif depth >= 0 and id(thing) not in seen and not isinstance(thing, _PLAIN):
            seen.add(id(thing))
            # Last in, first out: reversed, so that the parts are visited in their order.
            waiting += zip(reversed(list(_parts(thing))), itertools.repeat(depth - 1))
    outermost = dict(found)
    for root in found.values():
        for part in root.modules():
            if part is not root:
                outermost.pop(id(part), None)
    return list(outermost.values())


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
        for cell in thing.__closure__ or ():
            with suppress(ValueError):  # an empty cell: the name is not bound yet
                yield cell.cell_contents
        for name in _names(thing.__code__):
            value = thing.__globals__.get(name)
            # Functions of other files are not followed: from an imported library one would get anywhere.
            if isinstance(value, nn.Module) or getattr(value, "__globals__", None) is thing.__globals__:
                yield value
    else:
        yield getattr(thing, "model", None)
        yield from getattr(thing, "__dict__", {}).values()


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function reads, those of the functions defined inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class state_guard:  # noqa: N801 - a context manager, named as torch.no_grad is
    """Run networks in eval mode and leave them, and the global random state, as they were, also after an error.

    Restored are each submodule's training flag; each parameter's ``grad`` (the same object; it is None inside) and
    ``requires_grad``; forward and backward hooks (those that appeared go, those that vanished come back); each
    buffer's identity and values; and the global random states of torch (CPU, and CUDA where it is in use), numpy
    and python. Parameters' values are not copied. A buffer or parameter that a first forward pass creates stays: a
    module that made it may not make it twice. Guards may be nested; each is used once.

    Args:
        forward_funcs: modules, or callables in which :func:`modules_of` finds them.
        networks: modules that are known already.
        seed: where given, all these random states are seeded with it inside.

    Example:
        >>> net = nn.Dropout(0.5)
        >>> with state_guard(net):
        ...     print(net.training)
        False
        >>> net.training
        True
    """

    def __init__(self, *forward_funcs: object, networks: Iterable[nn.Module] = (), seed: int | None = None) -> None:
        self._seed = seed
        self._modules: dict[int, nn.Module] = {}
        roots = list(networks)
        for func in forward_funcs:
            roots += modules_of(func)
        for root in roots:
            for module in root.modules():
                self._modules[id(module)] = module

    def __enter__(self) -> None:
        # Everything is saved before anything is changed, so that an error on the way leaves nothing to take back.
        self._save_random_state()
        self._training: list[tuple[nn.Module, bool]] = []
        self._hooks: list[tuple[Any, Any]] = []
        self._names: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._parameters: dict[int, tuple[Tensor, Tensor | None, bool]] = {}
        for module in self._modules.values():
            self._save_module(module)
        for module, _ in self._training:
            if module.training:
                # By the flag alone: an overridden ``train()`` may do more than can be taken back (merge weights).
                module.training = False
        for parameter, _, _ in self._parameters.values():
            parameter.grad = None
        if self._seed is not None:
            # torch.manual_seed would also leave a seed waiting for a CUDA that starts only after the guard has ended.
            torch.default_generator.manual_seed(self._seed)
            if self._cuda is not None:
                torch.cuda.manual_seed_all(self._seed)
            np.random.seed(self._seed % 2**32)  # noqa: NPY002
            random.seed(self._seed)

    def __exit__(self, *error: object) -> None:
        # An ExitStack runs every step, from the last to the first, even where one fails.
        with ExitStack() as steps:
            steps.callback(self._restore_random_state)
            steps.callback(self._restore_modules)
            steps.callback(self._restore_buffers)
            steps.callback(self._restore_parameters)

    def _save_random_state(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the global state of others is what is saved
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if in_use else None

    def _restore_random_state(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)

    def _save_module(self, module: nn.Module) -> None:
        scripted = isinstance(module, torch.jit.ScriptModule)
        # Read directly where that is possible, which is ten times faster than to ask the module.
        parameters = list(module.parameters(False)) if scripted else module._parameters.values()
        buffers = list(module.buffers(False)) if scripted else module._buffers.values()
        if hasattr(module, "training"):
            self._training.append((module, module.training))
        if not scripted and module._buffers:
            self._names.append((module, dict(module._buffers)))
        lazy = False
        for parameter in parameters:
            if parameter is not None:
                lazy = lazy or is_lazy(parameter)
                self._parameters[id(parameter)] = (parameter, parameter.grad, parameter.requires_grad)
        for buffer in buffers:
            if buffer is not None:
                lazy = lazy or is_lazy(buffer)
                if id(buffer) not in self._buffers and not (is_lazy(buffer) or buffer.is_meta):
                    self._buffers[id(buffer)] = (buffer, buffer.detach().clone())
        if not lazy:  # the hook that initialises a lazy module must run once only
            for name in HOOKS:
                hooks = getattr(module, name, None)
                if hooks is not None:
                    self._hooks.append((hooks, hooks.copy()))

    def _restore_modules(self) -> None:
        for hooks, before in self._hooks:
            # In place: the handles that remove a hook refer to this very dictionary.
            if list(hooks.items()) != list(before.items()):
                hooks.clear()
                hooks.update(before)
        for module, training in self._training:
            if module.training != training:
                module.training = training

    def _restore_buffers(self) -> None:
        for module, before in self._names:
            for name, buffer in before.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
        for buffer, value in self._buffers.values():
            # Writing to a buffer spoils a graph that holds it, so an unchanged one is not written to.
            if not _same(buffer, value):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    if buffer.shape == value.shape:
                        buffer.copy_(value)
                    else:
                        buffer.data = value

    def _restore_parameters(self) -> None:
        for parameter, grad, requires_grad in self._parameters.values():
            parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    # NaN equals NaN here.
    return torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))
