"""A network's operations, recorded by running it on symbolic inputs, without touching it or what others see."""

from __future__ import annotations

import builtins
import copy
import functools
import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from types import MethodType
from typing import Any, TypeAlias, Union

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ce_plugin.networks.forward import is_opaque
from ce_plugin.networks.guard import CONTAINERS, HOOKS, USUAL, is_plain

_ATOMS = (Tensor, int, float, complex, str, bytes, type, type(None))
# Objects within objects are copied so deep; modules and containers count as nothing.
_DEPTH = 3
_TRACING = threading.RLock()


# Which part of a container: an index, or the indices of a container inside it, and of a part of that.
Element: TypeAlias = Union[int, tuple[int, ...], None]


def as_path(element: Element) -> tuple[int, ...]:
    """An element's indices, one for each level; none for the value itself."""
    return () if element is None else element if isinstance(element, tuple) else (element,)


@dataclass(frozen=True)
class HookPoint:
    """Where in a network an experiment sets a value.

    Args:
        module: the module whose output is set; None: the network's first tensor input.
        at_input: the module's input instead of its output.
        element: which element of a tuple output, or which of the positional inputs; indices for one in a tuple inside.
        call: which call, of a module that the network calls several times.
        rows: dimension of the value that counts the examples; experiments see it as the first.

    Example:
        >>> HookPoint(nn.ReLU(), at_input=True)
        HookPoint(module=ReLU(), at_input=True, element=None, call=0, rows=0)
    """

    module: nn.Module | None = None
    at_input: bool = False
    element: Element = None
    call: int = 0
    rows: int = 0


class Untraceable(Exception):  # noqa: N818 - not an error of the user's: the run takes another way
    """The network cannot be cut at this point; the one-line reason is the message."""


@contextmanager
def traced() -> Iterator[None]:
    """What fails inside, where a traced part is made or run, says nothing of the network: as a whole it may work.

    Raises:
        Untraceable: something failed, other than for lack of memory.
    """
    try:
        yield
    except (Untraceable, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise Untraceable(f"{type(error).__name__}: {first}"[:200]) from error


def site(value: Any) -> Any:
    """Marks the value that experiments set."""
    return value


def spliced(values: Any, value: Any, index: int) -> Any:
    """A tuple with one element replaced."""
    parts = [*values[:index], value, *values[index + 1 :]]
    return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)


INPUT = object()


class TracedRoot(nn.Module):
    """The network, the decoder beside it, and which arguments are tensors.

    Attributes:
        read: attributes of parts that are run whole, by module and name, which others read after them.
    """

    def __init__(
        self, network: nn.Module, decoder: nn.Module | None, point: HookPoint, args: tuple[object, ...]
    ) -> None:
        super().__init__()
        self.network, self.decoder, self.point, self.args = network, decoder, point, args
        self.read: list[tuple[nn.Module, str]] = []

    def forward(self, given: Any) -> Any:
        args, tensors = list(self.args), 0
        for position, arg in enumerate(args):
            if isinstance(arg, Tensor) or arg is INPUT:
                args[position], tensors = given[tensors], tensors + 1
        if self.point.module is None:
            (element,) = as_path(self.point.element) or (0,)
            args[element] = _mark(args[element], self.decoder)
        # The output of a graph keeps no classes of containers: they are kept here, and its output are the leaves.
        leaves: list[Any] = []

        def number(leaf: Any) -> int:
            leaves.append(leaf)
            return len(leaves) - 1

        self.result = mapped(self.network(*args), number)
        return leaves


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A value with its leaves replaced, in containers of the same classes at any depth."""
    copied: Any = copy.copy(value) if isinstance(value, Mapping) or is_dataclass(value) else None
    if isinstance(value, Mapping):
        for key in value:
            copied[key] = mapped(value[key], leaf)
        return copied
    if is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            object.__setattr__(copied, each.name, mapped(getattr(value, each.name), leaf))
        return copied
    if isinstance(value, (tuple, list)):
        parts = [mapped(part, leaf) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return leaf(value)


def _mark(value: Any, decoder: nn.Module | None, rows: int = 0) -> Any:
    value = value.transpose(0, rows) if rows else value
    marked = value.tracer.create_proxy("call_function", site, (value,), {})
    marked = marked if decoder is None else decoder(marked)
    # Recurrent modules take contiguous states only.
    return marked.transpose(0, rows).contiguous() if rows else marked


def record(root: TracedRoot) -> fx.Graph:
    """The operations of a network, with the point marked; they name the modules and parameters of ``root``.

    Neither the network nor anything else that another thread may use is changed, except that constants are kept in
    attributes of ``root``.

    Raises:
        Untraceable: the network looks at values, or a part of it hands a value on in a way that is not seen.
    """
    tracer = _Tracer(root.point)
    with traced():  # a network that meets symbolic values may raise anything
        with _recorded_functions(root):
            double = tracer.record(root)
        _check(tracer.graph, root, double)
        root.read = tracer.read
    return tracer.graph


def _check(graph: fx.Graph, root: TracedRoot, double: nn.Module) -> None:
    """That every operation refers to earlier ones, and to what the network itself has."""
    for name in vars(double).keys() - vars(root).keys():  # constants of the graph
        setattr(root, name, vars(double)[name])
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if not seen.issuperset(node.all_input_nodes):
            raise Untraceable("a part that is run whole hands a value on in an attribute")
        seen.add(node)
        if node.op in ("call_module", "get_attr"):
            operator.attrgetter(str(node.target))(root)


class _Tracer(fx.Tracer):
    """Marks the point; a part of the network that cannot be traced, and does not hold the point, stays whole.

    ``fx.Tracer.trace`` swaps methods of ``nn.Module`` for the whole process; here doubles of the modules have their
    own.
    """

    def __init__(self, point: HookPoint) -> None:
        super().__init__(autowrap_functions=())
        self.point, self.calls = point, 0
        self.read: list[tuple[nn.Module, str]] = []
        self._parameters: dict[str, fx.Proxy] = {}

    def record(self, root: TracedRoot) -> nn.Module:
        """Fill ``self.graph``; returns the double of the root."""
        self._doubles = _Doubles(self)
        double = self._doubles.of(root)
        self.root, self.graph, self.decoder = double, fx.Graph(), double.decoder
        # Of fx.Tracer: where tensors that are no parameters or buffers are found.
        self.tensor_attrs: dict[Any, str] = {}
        self._paths: dict[int, str] = {}
        for path, module in self.root.named_modules():
            self._paths[id(module)] = path
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    self.tensor_attrs.setdefault(value, f"{path}.{name}".lstrip("."))
        given = self.create_proxy("placeholder", "given", (), {})
        self.create_node("output", "output", (self.create_arg(double.forward(given)),), {})
        return self.root

    def attribute(self, name: str, value: Any) -> Any:
        """What a module's double returns for a registered attribute: parameters are symbolic."""
        return self.getattr(name, value, self._parameters)

    def path_of_module(self, mod: nn.Module) -> str:
        if id(mod) not in self._paths:
            raise NameError("module is not installed as a submodule")
        return self._paths[id(mod)]

    def _holds_point(self, module: nn.Module) -> bool:
        inside, original = self.point.module, self._doubles.original(module)
        return original is not inside and any(part is inside for part in original.modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_opaque(self._doubles.original(m)):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not self._holds_point(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        here = self._doubles.original(m) is self.point.module
        if here:
            self.calls += 1
            here = self.calls == self.point.call + 1
        if here and self.point.at_input:
            args, kwargs = self._with_marked_input(args, kwargs)
        output = self._traced(m, forward, args, kwargs)
        return self._with_marked_output(output) if here and not self.point.at_input else output

    def _traced(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output: traced, or as one operation where it is a leaf or cannot be traced and need not be."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            before, calls = set(self.graph.nodes), self.calls
            try:
                return self._with_hooks(self._doubles.original(m), forward, args, kwargs)
            except Exception:  # a network that meets symbolic values may raise anything
                if path == "network" or self._holds_point(m):
                    raise
            # The graph as it was, but for parameters' nodes, which the tracer keeps for later uses.
            self.calls = calls
            for node in reversed(self.graph.nodes):
                if node not in before and node.op != "get_attr":
                    self.graph.erase_node(node)
            for part in m.modules():
                self._doubles.watch(part, self.read)
        return self.create_proxy("call_module", path, args, kwargs)

    def _with_hooks(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of ``forward``; the user's hooks become operations, so that they never meet a symbolic value."""
        if m._forward_pre_hooks:
            args, kwargs = self._operation(functools.partial(_call_pre_hooks, m), (args, kwargs))
        output = forward(*args, **kwargs)
        if m._forward_hooks:
            (*_, output) = self._operation(functools.partial(_call_hooks, m), (args, kwargs, output))
        return output

    def _operation(self, call: Callable[..., Any], values: Any) -> Any:
        """A function that returns values of the form in which it takes them, as an operation of the graph."""
        leaves, form = tree_flatten(values)
        symbolic = [isinstance(leaf, (fx.Proxy, Tensor)) for leaf in leaves]

        def hooks(*given: Any) -> list[Any]:
            # Copies, because a hook may work in place.
            own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in given]
            found, other = tree_flatten(call(*tree_unflatten(own, form)))
            if other != form or any(found[k] is not own[k] for k, varies in enumerate(symbolic) if not varies):
                raise Untraceable("a hook changes more than the values of tensors")
            return found

        new: Any = self.create_proxy("call_function", hooks, tuple(leaves), {})
        return tree_unflatten([new[k] if varies else leaves[k] for k, varies in enumerate(symbolic)], form)

    def _with_marked_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        values, names = [*args, *kwargs.values()], list(kwargs)
        values = self._with_mark(values, as_path(self.point.element) or (0,))
        return tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))

    def _with_marked_output(self, output: Any) -> Any:
        return self._with_mark(output, as_path(self.point.element))

    def _with_mark(self, value: Any, path: tuple[int, ...]) -> Any:
        """A value, or the part of it that is at this path, marked."""
        if not path:
            return _mark(value, self.decoder, self.point.rows)
        first, *rest = path
        marked = self._with_mark(value[first], tuple(rest))
        if isinstance(value, fx.Proxy):
            return self.create_proxy("call_function", spliced, (value, marked, first), {})
        return spliced(value, marked, first)


def _call_pre_hooks(m: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments after a module's pre-hooks, as ``nn.Module.__call__`` calls them."""
    for key, hook in list(m._forward_pre_hooks.items()):
        if key in m._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(m, args, kwargs) or (args, kwargs)
            continue
        new = hook(m, args)
        if new is not None:
            args = new if isinstance(new, tuple) else (new,)
    return args, kwargs


def _call_hooks(m: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[Any, Any, Any]:
    """The arguments, and the output after a module's hooks."""
    for key, hook in list(m._forward_hooks.items()):
        given = (args, kwargs) if key in m._forward_hooks_with_kwargs else (args,)
        new = hook(m, *given, output)
        output = output if new is None else new
    return args, kwargs, output


class _Doubles:
    """Doubles of modules, on which a forward pass writes whatever it writes.

    A double has the attributes of its module, of a class derived from the module's, and no hooks. Containers and plain
    objects in attributes are copies; modules in them, and what bound methods are bound to, are doubles. Parameters,
    buffers and all other values are shared.

    Args:
        tracer: is asked when a double is called or hands out a registered attribute.
    """

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer
        self._doubles: dict[int, Any] = {}
        self._originals: dict[int, nn.Module] = {}
        self._kinds: dict[type, type] = {}

    def original(self, double: nn.Module) -> nn.Module:
        """The module that a double stands for."""
        return self._originals[id(double)]

    def of(self, value: Any, depth: int = _DEPTH) -> Any:
        """The double, the copy, or the value itself."""
        kind = type(value)
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self._doubles:
            return self._doubles[id(value)]
        if isinstance(value, nn.Module):
            return self._module(value)
        if kind is MethodType:
            return MethodType(value.__func__, self.of(value.__self__, depth))
        if kind is functools.partial:
            args, keywords = self.of(value.args, depth), self.of(value.keywords, depth)
            return functools.partial(self.of(value.func, depth), *args, **keywords)
        if kind is tuple or (isinstance(value, tuple) and hasattr(kind, "_make")):
            parts = [self.of(part, depth) for part in value]
            return getattr(kind, "_make", tuple)(parts)
        if kind in CONTAINERS:
            return self._container(value, depth)
        if depth and is_plain(kind):
            double = self._doubles[id(value)] = copy.copy(value)
            vars(double).update({name: self.of(part, depth - 1) for name, part in vars(value).items()})
            return double
        return value

    def _container(self, value: Any, depth: int) -> Any:
        double = self._doubles[id(value)] = copy.copy(value)
        if isinstance(value, (dict, set)):
            parts = [self.of(part, depth) for part in (value.items() if isinstance(value, dict) else value)]
            double.clear()
            double.update(dict(parts) if isinstance(value, dict) else parts)
        else:
            for k, part in enumerate(value):
                double[k] = self.of(part, depth)
        return double

    def _module(self, module: nn.Module) -> nn.Module:
        scripted = isinstance(module, torch.jit.ScriptModule)
        double: nn.Module = object.__new__(self._kind(_Whole if scripted else type(module)))
        self._doubles[id(module)], self._originals[id(double)] = double, module
        if scripted:
            nn.Module.__init__(double)
            vars(double)["whole"] = module
        else:
            for name, value in vars(module).items():
                vars(double)[name] = OrderedDict() if name in HOOKS else self.of(value)
        return double

    def _kind(self, base: type[nn.Module]) -> type[nn.Module]:
        """A class like a module's own whose instances ask the tracer."""
        if base in self._kinds:
            return self._kinds[base]
        tracer = self._tracer

        def call(double: Any, /, *args: Any, **kwargs: Any) -> Any:
            return tracer.call_module(double, functools.partial(base.__call__, double), args, kwargs)

        def attribute(double: Any, name: str) -> Any:
            return tracer.attribute(name, base.__getattr__(double, name))

        namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        for ancestor in reversed(base.__mro__):
            if not ancestor.__module__.startswith(("torch.nn.", "builtins")):
                for name, value in list(vars(ancestor).items()):
                    if type(value) in CONTAINERS and not name.startswith("__"):
                        namespace[name] = self.of(value)
        methods = {"__call__": call, "__getattr__": attribute}
        # Not by calling the metaclass, which may do more: keep a list of classes, for instance.
        kind: type[nn.Module] = type.__new__(type(base), base.__name__, (_Unregistered, base), {**namespace, **methods})
        self._kinds[base] = kind
        return kind

    def watch(self, double: nn.Module, read: list[tuple[nn.Module, str]]) -> None:
        """From now on note in ``read`` which of the attributes, where a pass may have left a value, are read."""
        base, original = type(double), self.original(double)
        if "__getattribute__" in vars(base):
            return
        own = vars(double).keys() - USUAL

        def attribute(double: Any, name: str) -> Any:
            if name in own:
                read.append((original, name))
            return base.__getattribute__(double, name)

        namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        double.__class__ = type.__new__(
            type(base), base.__name__, (base,), {**namespace, "__getattribute__": attribute}
        )


class _Unregistered:
    """Keeps classes from what their parents do with new subclasses."""

    def __init_subclass__(cls) -> None:
        """Nothing."""


class _Whole(nn.Module):
    """Stands for a scripted module, which only can be called."""

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["whole"], name)


@contextmanager
def _recorded_functions(root: nn.Module) -> Iterator[None]:
    """Functions of ``math``, and those registered with ``torch.fx.wrap``, record calls with symbolic arguments.

    They are swapped where modules look for them, by one thread at a time. To other threads that call them meanwhile
    they return what they always do.
    """
    # The one private name of torch.fx: what was registered, by file and name.
    registered: dict[tuple[int, str], dict[str, Any]] = getattr(fx._symbolic_trace, "_wrapped_fns_to_patch", {})
    functions = {id(value): name for name, value in vars(math).items() if callable(value) and name[0] != "_"}
    places = {(id(vars(math)), name): vars(math) for name in functions.values()} | registered
    for module in root.modules():
        names = getattr(module.forward, "__globals__", {})
        places.update({(id(names), name): names for name, value in list(names.items()) if id(value) in functions})
    swapped: list[tuple[dict[str, Any], str, Any, bool]] = []
    with _TRACING:
        try:
            for (_, name), names in places.items():
                function = names.get(name, getattr(builtins, name, None))
                if callable(function):
                    swapped.append((names, name, _recorder(function), name in names))
                    names[name] = swapped[-1][2]
            yield
        finally:
            for names, name, recorder, own in reversed(swapped):
                if names.get(name) is recorder and own:
                    names[name] = recorder.__wrapped__
                elif names.get(name) is recorder:
                    del names[name]


def _recorder(function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def recorder(*args: Any, **kwargs: Any) -> Any:
        proxy = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)), None)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return recorder
