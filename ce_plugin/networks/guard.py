"""Which networks a callable runs, and a guard that leaves them and the global random state as they were.

Explanations may run in several threads. What they change for a while (the mode of a network, its hooks and gradients,
the global random state) belongs to all threads, so that those that need the same network take turns.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ce_plugin.errors import ModelError, expected

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_SIMPLE = {int, float, bool, str, bytes, tuple, type(None), Tensor, FunctionType, torch.dtype, torch.device}
# What a module registers, what every module has, and modules that keep the state of a machinery in their attributes.
_REGISTERED = ("_parameters", "_buffers", "_modules")
USUAL = vars(nn.Module()).keys()
_HEAP = 1 << 9  # the flag of classes that are not built in
_MACHINERY = ("torch.nn.parallel", "torch.distributed", "torch._dynamo")
_DEPTH, _LARGE = 4, 1000
_NONE: dict[str, Any] = {}
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


def is_plain(kind: type) -> bool:
    """Whether objects of a class are their attributes and nothing else, so that a copy of these is a copy of them."""
    if kind is SimpleNamespace:
        return True
    special = {"__new__", "__reduce__", "__reduce_ex__", "__setattr__", "__getattribute__", "__slots__", "__del__"}
    special |= {"__copy__", "__deepcopy__", "__getstate__", "__setstate__"}
    if type(kind) is not type or not kind.__dictoffset__ or kind.__module__.startswith("torch."):
        return False
    # Of built-in classes the objects are more than their attributes.
    return all(c.__flags__ & _HEAP and not special & vars(c).keys() for c in kind.__mro__[:-1])


class _Turns:
    """Which thread uses which networks. Threads that need the same one take turns, in the order in which they asked.

    A thread asks for all that it needs at once, by identity. One that has something already does not queue behind those
    that may be waiting for it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nobody has anything."""
        self._changed = threading.Condition()
        self._holders: dict[int, int] = {}
        self._waiting: list[tuple[int, set[int]]] = []

    def claim(self, keys: set[int]) -> set[int]:
        """Wait until no other thread has any of these; returns those that the calling thread did not have before.

        Raises:
            ModelError: two threads would wait for each other.
        """
        me = threading.get_ident()
        with self._changed:
            new = {key for key in keys if self._holders.get(key) != me}
            asked = (me, new)
            self._waiting.append(asked)
            try:
                while not self._is_free(asked):
                    if self._waits_for_itself(me):
                        hint = "Hand over all networks at once, for instance by explaining in one thread."
                        got = "two threads that each use what the other waits for"
                        raise ModelError(expected("forward_func", "a network that can be waited for", got, hint))
                    self._changed.wait()
                self._holders.update(dict.fromkeys(new, me))
            finally:
                self._waiting = [other for other in self._waiting if other is not asked]
        return new

    def release(self, keys: set[int]) -> None:
        """Let others have what :meth:`claim` returned."""
        with self._changed:
            for key in keys:
                self._holders.pop(key, None)
            self._changed.notify_all()

    def _is_free(self, asked: tuple[int, set[int]]) -> bool:
        me, keys = asked
        if not self._holders.keys().isdisjoint(keys):
            return False
        if me in self._holders.values():
            return True
        earlier = itertools.takewhile(lambda other: other is not asked, self._waiting)
        return all(keys.isdisjoint(others) for _, others in earlier)

    def _waits_for_itself(self, me: int) -> bool:
        wanted, found, front = dict(self._waiting), set[int](), [me]
        while front:
            owners = {self._holders[key] for key in wanted.get(front.pop(), ()) if key in self._holders} - found
            found |= owners
            front += owners
        return me in found


class SharedContext:
    """A context that threads share: the first that enters opens it, the last that leaves closes it.

    Args:
        opened: opens the context and returns what closes it.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[object]]) -> None:
        self._opened, self._lock, self._inside = opened, threading.RLock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._context = self._opened()
                self._context.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._context.__exit__(None, None, None)


class _RandomState:
    """Saves the global random states of torch, numpy and python, and puts them back."""

    def __enter__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the global state of others is what is saved
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if in_use else None

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)

    def seed(self, seed: int) -> None:
        """Seed all of them."""
        # torch.manual_seed would also leave a seed waiting for a CUDA that starts only after the guard has ended.
        torch.default_generator.manual_seed(seed)
        if self._cuda is not None:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)


_TURNS, _RANDOM = _Turns(), SharedContext(_RandomState)
_SEEDED = object()  # who seeds the global random state has it alone
if hasattr(os, "register_at_fork"):  # only the thread that forks lives on in the child
    os.register_at_fork(after_in_child=_TURNS.reset)


@contextmanager
def turn(network: nn.Module) -> Iterator[None]:
    """Have a network for this thread, as :class:`state_guard` has it, and leave all that is done to it."""
    claimed = _TURNS.claim(_keys_of(network.modules()))
    try:
        yield
    finally:
        _TURNS.release(claimed)


def _keys_of(modules: Iterable[nn.Module]) -> set[int]:
    """What no other thread may have meanwhile: modules, and tensors that networks may share."""
    keys = set()
    for module in modules:
        keys.add(id(module))
        for name in ("_parameters", "_buffers"):
            tensors = vars(module).get(name)
            if tensors:
                keys.update(map(id, tensors.values()))
    keys.discard(id(None))
    return keys


class state_guard:  # noqa: N801 - a context manager, named as torch.no_grad is
    """Run networks in eval mode and leave them, and the global random state, as they were, also after an error.

    Restored are each submodule's training flag; each parameter's ``grad`` (the same object; it is None inside) and
    ``requires_grad``; forward and backward hooks (those that appeared go, those that vanished come back); each
    buffer's identity and values; all other attributes, with what lists, dictionaries, sets and plain objects in them
    hold; and the global random states of torch (CPU, and CUDA where it is in use), numpy and python. Parameters' values
    are not copied. A buffer, parameter or layer that a first forward pass creates stays, and with it all attributes: a
    module that made it may not make it twice.

    Guards may be nested; each is used once. A guard has its networks for its thread: a guard of another thread that
    needs one of them waits, while predictions go on. The random state is saved by the first of the guards of all
    threads and restored by the last; guards with a ``seed`` wait for each other.

    Args:
        forward_funcs: modules, or callables in which :func:`modules_of` finds them.
        networks: modules that are known already.
        seed: where given, all these random states are seeded with it inside.

    Raises:
        ModelError: two threads would wait for each other, because each entered a guard of one network inside a guard of
            another, in opposite order.

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
        with ExitStack() as steps:
            keys = _keys_of(self._modules.values())
            if self._seed is not None:
                keys.add(id(_SEEDED))
            steps.callback(_surely, functools.partial(_TURNS.release, _TURNS.claim(keys)))
            steps.enter_context(_RANDOM)
            # Everything is saved before anything is changed, so that an error on the way leaves nothing to take back.
            self._training: list[tuple[nn.Module, bool]] = []
            self._hooks: list[tuple[Any, Any]] = []
            self._registered: list[tuple[dict[str, Any], dict[str, Any]]] = []
            self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
            self._contents: dict[int, tuple[Any, Any]] = {}
            self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
            self._parameters: dict[int, tuple[Tensor, Tensor | None, bool]] = {}
            self._is_lazy = False
            for module in self._modules.values():
                self._save_module(module)
            # An ExitStack runs every step, from the last to the first, even where one fails.
            for step in (self._restore_modules, self._restore_buffers, self._restore_parameters):
                steps.callback(_surely, step)
            for module, _ in self._training:
                if module.training:
                    # By the flag alone: an overridden ``train()`` may do more than can be taken back (merge weights).
                    module.training = False
            for parameter, _, _ in self._parameters.values():
                parameter.grad = None
            if self._seed is not None:
                steps.enter_context(state := _RandomState())
                state.seed(self._seed)
            self._steps = steps.pop_all()

    def __exit__(self, *error: object) -> None:
        self._steps.close()
        # Inside autocast, weights that were cast in inference mode would be met by a training step.
        torch.clear_autocast_cache()

    def _save_module(self, module: nn.Module) -> None:
        scripted = isinstance(module, torch.jit.ScriptModule)
        # Read directly where that is possible, which is ten times faster than to ask the module.
        parameters = list(module.parameters(False)) if scripted else module._parameters.values()
        buffers = list(module.buffers(False)) if scripted else module._buffers.values()
        if hasattr(module, "training"):
            self._training.append((module, module.training))
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
        self._is_lazy = self._is_lazy or lazy
        if not scripted and not type(module).__module__.startswith(_MACHINERY):
            self._save_attributes(vars(module))
        if not lazy:  # the hook that initialises a lazy module must run once only
            for hooks in map(vars(module).get, HOOKS):
                if hooks is not None:
                    self._hooks.append((hooks, hooks.copy() if hooks else _NONE))

    def _save_attributes(self, attributes: dict[str, Any]) -> None:
        for name in _REGISTERED:
            registered = attributes[name]
            self._registered.append((registered, dict(registered) if registered else _NONE))
        self._attributes.append((attributes, attributes.copy()))
        for name in attributes.keys() - USUAL:
            if type(attributes[name]) not in _SIMPLE:
                self._save_contents(attributes[name], _DEPTH)

    def _save_contents(self, value: Any, depth: int) -> None:
        """What a container or plain object holds, and what those in it hold."""
        kind = type(value)
        contents = value if kind in CONTAINERS else vars(value) if is_plain(kind) else None
        if contents is None or id(contents) in self._contents:
            return
        self._contents[id(contents)] = (contents, contents.copy())
        if len(contents) > _LARGE:  # a table, in which nothing hides
            return
        for part in contents.values() if isinstance(contents, dict) else contents:
            if depth and type(part) not in _SIMPLE:
                self._save_contents(part, depth - 1)

    def _restore_modules(self) -> None:
        for hooks, before in self._hooks:
            if hooks or before:
                # In place: the handles that remove a hook refer to this very dictionary.
                _restore(hooks, before)
        for module, training in self._training:
            if module.training != training:
                module.training = training
        grown = self._is_lazy or any(len(now) > len(before) for now, before in self._registered)
        if not grown:
            for now, before in (*self._attributes, *self._contents.values()):
                if not _is_same(now, before):
                    _restore(now, before)

    def _restore_buffers(self) -> None:
        for now, before in self._registered:
            for name in before:
                if now.get(name) is not before[name]:
                    now[name] = before[name]
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


def _surely(step: Callable[[], object]) -> None:
    """Take a step, and once more where it is interrupted."""
    try:
        step()
    except BaseException:
        step()
        raise


def _is_same(now: Any, before: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(now, set):
        return bool(now == before)
    if len(now) != len(before) or not all(map(operator.is_, now, before)):
        return False
    return not isinstance(now, dict) or all(map(operator.is_, now.values(), before.values()))


def _restore(now: Any, before: Any) -> None:
    """Put back what a container held; other threads may read it meanwhile."""
    if isinstance(now, dict):
        for name in now.keys() - before.keys():
            del now[name]
        in_order = len(now) == len(before) and all(map(operator.is_, now, before))
        for name, value in before.items():
            if not in_order:
                now.pop(name, None)
            if now.get(name, _NONE) is not value:
                now[name] = value
    elif isinstance(now, list):
        now[:] = before
    elif isinstance(now, set):
        now.intersection_update(before)
        now.update(before)
    else:
        now.clear()
        now.extend(before)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    # NaN equals NaN here.
    return torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))
