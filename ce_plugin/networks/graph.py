"""A network as a graph of operations, with the place where experiments are made marked in it."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ce_plugin.networks.forward import is_opaque

__all__ = [
    "ChangedInPlaceError",
    "Graph",
    "HookPoint",
    "Suffix",
    "SuffixConstants",
    "Untraceable",
    "ancestors",
    "flops_of",
    "nodes_of",
    "out_of_place",
    "without_changes_in_place",
]


_OPERATORS = {
    **{f"i{name}": name for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")},
    "iand": "and_",
    "ior": "or_",
    "ixor": "xor",
}
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_VIEWS = {
    *("getitem", "getattr", "flatten", "reshape", "view", "view_as", "reshape_as", "unflatten", "ravel", "squeeze"),
    *("unsqueeze", "permute", "transpose", "swapaxes", "movedim", "chunk", "split", "narrow", "select", "unbind", "t"),
    *("expand", "expand_as", "broadcast_to", "contiguous", "to", "type", "type_as", "float", "double", "half"),
    *("detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "diagonal"),
    *("unfold", "real", "imag", "swapdims", "moveaxis", "tensor_split", "hsplit", "vsplit", "spliced", "bfloat16"),
}
_HOMES = ("torch.nn", "torch._C", "_operator", "torch", "math", "builtins")


class ChangedInPlaceError(Exception):
    """A tensor is changed in place while something else that shares its memory is still used."""


def out_of_place(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a module so that its arguments stay as they are; its hooks fire as usual."""
    if getattr(module, "inplace", False) is True and _is_torchs(module):
        # The copy shares hooks and parameters with the module, which itself is not touched.
        double = copy.copy(module)
        double.__dict__["inplace"] = False
        return double(*args, **kwargs)
    if not _is_torchs(module):
        args = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
    return module(*args, **kwargs)


def without_changes_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite a graph: every operation returns a new value, and later uses of the changed one take that.

    Raises:
        ChangedInPlaceError: a view of a changed tensor is used later; what it then holds is not followed.
    """
    groups: dict[fx.Node, fx.Node] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    order = {node: position for position, node in enumerate(graph.nodes)}
    users = {node: list(node.users) for node in graph.nodes}
    for node in graph.nodes:
        original = node.all_input_nodes
        node.args = map_arg(node.args, lambda arg: replaced.get(arg, arg))
        node.kwargs = map_arg(node.kwargs, lambda arg: replaced.get(arg, arg))
        groups[node] = node
        if original and _may_share_memory(node, root):
            for arg in original:
                groups[_leader(groups, arg)] = _leader(groups, node)
        if not (original and _rewritten(node, root)):
            continue
        changed = original[0]
        for other in groups:
            later = other not in (node, changed) and any(order[user] > order[node] for user in users[other])
            if later and other not in replaced and _leader(groups, other) is _leader(groups, changed):
                raise ChangedInPlaceError(f"`{changed.name}` is changed in place while a view of it is used")
        target = replaced.get(changed, changed)
        for old in [old for old, new in replaced.items() if new is target]:
            replaced[old] = node
        replaced[target] = node


def _leader(groups: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while groups[node] is not node:
        node = groups[node]
    return node


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")


def _may_share_memory(node: fx.Node, root: nn.Module) -> bool:
    """Whether what a node returns may be (a view of) one of its arguments."""
    if node.op == "call_module":
        module = root.get_submodule(cast(str, node.target))
        return isinstance(module, _VIEW_MODULES) or not _is_torchs(module)
    if node.op == "call_method":
        return str(node.target) in _VIEWS
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    home = getattr(node.target, "__module__", None) or ""
    if name == "site":  # an experiment puts a new tensor there
        return False
    return name in _VIEWS or not home.startswith(_HOMES)


def _rewritten(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node changes its first argument in place; it is rewritten so that it does not."""
    name = getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        return getattr(root.get_submodule(cast(str, node.target)), "inplace", False) is True
    if node.op == "call_method":
        if not name.endswith("_") or name.endswith("__"):
            return False
        node.target = name[:-1] if hasattr(Tensor, name[:-1]) else name
        return True
    if node.op != "call_function":
        return False
    if "out" in node.kwargs:
        raise ChangedInPlaceError("an operation writes into `out=`")
    if name in _OPERATORS and getattr(operator, name) is node.target:
        node.target = getattr(operator, _OPERATORS[name])
        return True
    for home in (torch, F):
        if name.endswith("_") and getattr(home, name, None) is node.target and hasattr(home, name[:-1]):
            node.target = getattr(home, name[:-1])
            return True
    return _had_inplace_argument(node)


def _had_inplace_argument(node: fx.Node) -> bool:
    try:
        signature = inspect.signature(cast(Any, node.target))
        bound = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a built-in function, which takes no such argument
        return False
    if bound.arguments.get("inplace") is not True:
        return False
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return True


# What tracing raises where a network looks at values, or does with its symbolic inputs what only tensors can do.
_FAILURES = (
    fx.proxy.TraceError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    AssertionError,
    LookupError,
    NameError,
    ArithmeticError,
)


@dataclass(frozen=True)
class HookPoint:
    """Where in a network an experiment sets a value.

    Args:
        module: the module whose output is set; None: the network's first tensor input.
        at_input: the module's input instead of its output.
        element: which element of a tuple output, or which of the positional inputs.
        call: which call, of a module that the network calls several times.

    Example:
        >>> HookPoint(nn.ReLU(), at_input=True)
        Point(module=ReLU(), at_input=True, element=None, call=0)
    """

    module: nn.Module | None = None
    at_input: bool = False
    element: int | None = None
    call: int = 0


class Untraceable(Exception):  # noqa: N818 - not an error of the user's: the run takes another way
    """The network cannot be cut at this point; the one-line reason is the message."""


def site(value: Any) -> Any:
    """Marks the value that experiments set."""
    return value


def spliced(values: Any, value: Any, index: int) -> Any:
    """A tuple with one element replaced."""
    parts = [*values[:index], value, *values[index + 1 :]]
    return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)


class _Root(nn.Module):
    """The network, the decoder beside it, and which arguments are tensors."""

    def __init__(
        self, network: nn.Module, decoder: nn.Module | None, point: HookPoint, args: tuple[object, ...]
    ) -> None:
        super().__init__()
        self.network, self.decoder, self.point, self.args = network, decoder, point, args

    def forward(self, given: Any) -> Any:
        args, tensors = list(self.args), 0
        for position, arg in enumerate(args):
            if isinstance(arg, Tensor) or arg is _INPUT:
                args[position], tensors = given[tensors], tensors + 1
        if self.point.module is None:
            element = self.point.element or 0
            args[element] = _mark(args[element], self.decoder)
        return self.network(*args)


_INPUT, _FAILED = object(), object()


def _mark(value: Any, decoder: nn.Module | None) -> Any:
    marked = value.tracer.create_proxy("call_function", site, (value,), {})
    return marked if decoder is None else decoder(marked)


class _Tracer(fx.Tracer):
    """Marks the point; a part of the network that cannot be traced, and does not hold the point, stays whole."""

    def __init__(self, point: HookPoint, decoder: nn.Module | None) -> None:
        super().__init__(autowrap_functions=())
        self.point, self.decoder, self.calls = point, decoder, 0

    def _holds_point(self, module: nn.Module) -> bool:
        inside = self.point.module
        return module is not inside and any(part is inside for part in module.modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_opaque(m):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not self._holds_point(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        here = m is self.point.module
        if here:
            self.calls += 1
            here = self.calls == self.point.call + 1
        if here and self.point.at_input:
            args, kwargs = self._with_marked_input(args, kwargs)
        output = self._called(m, forward, args, kwargs)
        return self._with_marked_output(output) if here and not self.point.at_input else output

    def _called(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        # A user's hook may look at values. What is traced without it is held against the network before it is used.
        ways = [forward, m.forward] if m._forward_hooks or m._forward_pre_hooks else [forward]
        must = self._holds_point(m) or path == "network"
        for way in ways:
            output = self._tried(way, args, kwargs, must=must and way is ways[-1])
            if output is not _FAILED:
                return output
        return self.create_proxy("call_module", path, args, kwargs)

    def _tried(self, way: Callable[..., Any], args: Any, kwargs: Any, must: bool) -> Any:
        """The output; or, where it cannot be traced and need not be, a mark, and a graph as before."""
        before, calls = set(self.graph.nodes), self.calls
        try:
            return way(*args, **kwargs)
        except _FAILURES:
            if must:
                raise
        self.calls = calls
        # Parameters' nodes stay, because the tracer keeps them for later uses.
        for node in reversed([node for node in self.graph.nodes if node not in before and node.op != "get_attr"]):
            self.graph.erase_node(node)
        return _FAILED

    def _with_marked_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        values, names = [*args, *kwargs.values()], list(kwargs)
        element = self.point.element or 0
        values[element] = _mark(values[element], self.decoder)
        return tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))

    def _with_marked_output(self, output: Any) -> Any:
        element = self.point.element
        if element is None:
            return _mark(output, self.decoder)
        marked = _mark(output[element], self.decoder)
        if isinstance(output, fx.Proxy):
            return self.create_proxy("call_function", spliced, (output, marked, element), {})
        return spliced(output, marked, element)


class Graph:
    """The operations of a network in order, none of which changes a value in place.

    Args:
        network: in eval mode.
        point: where the mark is put.
        decoder: what stands between the mark and the rest.
        n_inputs: number of input tensors.
        args: additional forward arguments: tensors may vary, everything else is taken as it is here.

    Raises:
        Untraceable: the network looks at values, the point is not reached, or a tensor is changed in place while
            a view of it is used.

    Attributes:
        nodes: what the output needs, in order.
        given: the node of all tensor arguments, a tuple.
        site: the node of the mark.
        output: what the network returns, with nodes for its tensors.
    """

    def __init__(
        self, network: nn.Module, point: HookPoint, decoder: nn.Module | None, n_inputs: int, args: tuple[object, ...]
    ) -> None:
        tracer = _Tracer(point, decoder)
        self._root = _Root(network, decoder, point, (*[_INPUT] * n_inputs, *args))
        self.n_inputs = n_inputs
        try:
            graph = tracer.trace(self._root)
            _without_splices(graph)
            without_changes_in_place(graph, self._root)
        except ChangedInPlaceError as error:
            raise Untraceable(str(error)) from error
        except _FAILURES as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise Untraceable(f"{type(error).__name__}: {first}"[:200]) from error
        last = next(node for node in graph.nodes if node.op == "output")
        self.output = last.args[0]
        live = ancestors(last.all_input_nodes)
        self.nodes = [node for node in graph.nodes if node in live]
        self.given = next(node for node in graph.nodes if node.op == "placeholder")
        marks = [node for node in self.nodes if node.target is site]
        if len(marks) != 1:
            raise Untraceable("the layer is not reached, or its output is not used")
        self.site = marks[0]

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self._root.get_submodule(cast(str, node.target))

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation; none of its arguments is changed."""
        if node.op == "call_module":
            return out_of_place(self.module(node), args, kwargs)
        if node.op == "call_function":
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        if node.op == "call_method":
            name = cast(str, node.target)
            if name.endswith("_") and not name.endswith("__"):
                return getattr(args[0].clone(), name)(*args[1:], **kwargs)
            return getattr(args[0], name)(*args[1:], **kwargs)
        return operator.attrgetter(cast(str, node.target))(self._root)

    def evaluate(self, nodes: Iterable[fx.Node], values: dict[fx.Node, Any], keep: Iterable[Any] = ()) -> None:
        """Run operations in order; a value is dropped after its last use, unless it is in ``keep``."""
        nodes = list(nodes)
        last = {arg: node for node in nodes for arg in node.all_input_nodes}
        kept = set(keep)
        for node in nodes:
            if node not in values:
                args = map_arg(node.args, values.__getitem__)
                values[node] = self.call(node, args, map_arg(node.kwargs, values.__getitem__))
                del args
            for arg in node.all_input_nodes:
                if last[arg] is node and arg not in kept:
                    values.pop(arg, None)


def nodes_of(value: Any) -> list[fx.Node]:
    """The nodes in an argument, which may be nested."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    map_arg(value, note)
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Some nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _without_splices(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is operator.getitem and getattr(node.args[0], "target", None) is spliced:
            values, value, index = cast(fx.Node, node.args[0]).args
            if node.args[1] == index:
                node.replace_all_uses_with(cast(fx.Node, value))
                graph.erase_node(node)
            else:
                node.args = (values, node.args[1])


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up floating-point operations. PyTorch's own counter follows modules too, and fails on some of them."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton, where there is one

        super().__init__()  # type: ignore[no-untyped-call]
        self.total, self.registry = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = self.registry.get(func._overloadpacket)
        if count is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=out))
        return out


def flops_of(run: Callable[[], Any]) -> int:
    """Floating-point operations that a function counts up."""
    # Inside inference mode composite operations reach the counter whole, and are not counted.
    with torch.inference_mode(False), torch.no_grad(), _Counter() as counter:
        run()
    return int(counter.total)


_QUERIES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"}
_QUERY_METHODS = {"size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point"}
# Operations that take views with repeated rows without copying them first.
_BROADCASTING = {"add", "sub", "mul", "truediv", "cat", "concat"}


@dataclass
class SuffixConstants:
    """What the suffix needs of a clean pass.

    Args:
        site: the site's clean value, (N, ...).
        rows: by-passing values, N rows each.
        fixed: values that no input has a part in.
        shapes: values of which only the shape matters, one row each.
        inputs: the inputs and tensor arguments of the clean pass.
    """

    site: Tensor
    rows: dict[fx.Node, Any] = field(default_factory=dict)
    fixed: dict[fx.Node, Any] = field(default_factory=dict)
    shapes: dict[fx.Node, Tensor] = field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.site)


class Suffix:
    """The part of a network that depends on a point in it.

    By-passing connections (values that the suffix uses but that do not depend on the point) are constants, taken from
    a clean pass row by row. Nothing of the network changes, and no value that is passed in.

    Args:
        network: in eval mode.
        point: the site.
        decoder: a module between site and network: the site is then its input, the code of an autoencoder, and its
            output stands for the layer's value.
        n_inputs: number of input tensors.
        args: additional forward arguments as they will come: tensors may change, everything else must not.

    Raises:
        Untraceable: ``torch.fx`` cannot follow the network, or not to this point.

    Attributes:
        is_cut: whether nothing by-passes the site, so that its value decides the output.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).eval()
        >>> x = torch.randn(5, 3)
        >>> suffix = Suffix(network, HookPoint(network[0]))
        >>> captured = suffix.capture((x,))
        >>> suffix.is_cut, captured.site.shape
        (True, torch.Size([5, 4]))
        >>> torch.equal(suffix.run(captured, captured.site, torch.arange(5)), network(x))
        True
    """

    def __init__(
        self,
        network: nn.Module,
        point: HookPoint,
        *,
        decoder: nn.Module | None = None,
        n_inputs: int = 1,
        args: tuple[object, ...] = (),
    ) -> None:
        self.network, self.point, self.decoder = network, point, decoder
        self.graph = Graph(network, point, decoder, n_inputs, args)
        self._args = args
        self._plan()

    def _plan(self) -> None:
        graph = self.graph
        self.dependent = _descendants(graph, [graph.site])
        self._inputs = _descendants(graph, [node for node in graph.nodes if _is_input(graph, node)])
        from_given = _descendants(graph, [graph.given]) - self.dependent
        self._about_shape = _about_shape(graph, from_given)
        again = [node for node in graph.nodes if node in self.dependent and node is not graph.site]
        # What follows from shapes alone is computed again, so that a batch of B rows finds B and not N.
        included = set(again)
        waiting = list(again)
        while waiting:
            for arg in waiting.pop().all_input_nodes:
                if arg in self._about_shape and arg not in included:
                    included.add(arg)
                    waiting.append(arg)
        self.nodes = [node for node in graph.nodes if node in included]
        boundary = {arg for node in self.nodes for arg in node.all_input_nodes} | set(nodes_of(graph.output))
        boundary -= included | {graph.site}
        self._fixed = [node for node in graph.nodes if node in boundary and node not in from_given]
        self._shapes: list[fx.Node] = []
        self._rows: list[fx.Node] = []
        for node in graph.nodes:
            if node in boundary and node in from_given:
                users = [user for user in node.users if user in included]
                only_shape = users and all(_is_query(user) for user in users) and node not in nodes_of(graph.output)
                (self._shapes if only_shape else self._rows).append(node)
        self.is_cut = not self._rows

    def capture(
        self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = (), site: Tensor | None = None
    ) -> SuffixConstants:
        """Take what by-passes the site from clean inputs.

        Args:
            inputs: (N, ...) each.
            args: additional forward arguments; tensors with N rows go with their example.
            site: the site's clean value, where it is known; with a decoder it must be given. Where the site is a cut
                nothing is then run.

        Raises:
            Untraceable: something that by-passes the site has no row per example, or the arguments are others than
                those that the network was traced with.
        """
        given = (*inputs, *self._tensors_of(args))
        if self.decoder is not None and site is None:
            raise ValueError("with a decoder the code must be given as `site`")
        wanted = [*self._rows, *self._fixed, *self._shapes]
        source = self.graph.site.args[0]
        if site is None and isinstance(source, fx.Node):
            wanted.append(source)
        needed = ancestors(wanted)
        values: dict[fx.Node, Any] = {self.graph.given: given}
        self.graph.evaluate([node for node in self.graph.nodes if node in needed], values, wanted)
        n = len(inputs[0])
        value = values[source] if site is None and isinstance(source, fx.Node) else site
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != n:
            raise Untraceable("the site's value is not a tensor with one row per example")
        rows = {node: self._checked(node, values[node], n) for node in self._rows}
        shapes = {node: self._checked(node, values[node], n)[:1] for node in self._shapes}
        fixed = {node: values[node] for node in self._fixed}
        for node in [node for node in rows if rows[node] is None]:
            fixed[node] = values[node]
            del rows[node]
        return SuffixConstants(value, rows, fixed, shapes, given)

    def _tensors_of(self, args: tuple[object, ...]) -> tuple[Tensor, ...]:
        if len(args) != len(self._args):
            raise Untraceable(f"traced with {len(self._args)} additional arguments, called with {len(args)}")
        for now, then in zip(args, self._args, strict=True):
            if isinstance(now, Tensor) != isinstance(then, Tensor) or not (now is then or _is_same(now, then)):
                raise Untraceable("called with other additional arguments than it was traced with")
        return tuple(arg for arg in args if isinstance(arg, Tensor))

    def _checked(self, node: fx.Node, value: Any, n: int) -> Any:
        """A by-passing value; None where it belongs to all rows alike."""
        tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
        if tensors and all(tensor.dim() and len(tensor) == n for tensor in tensors):
            return value
        if node in self._inputs:
            raise Untraceable(f"`{node.name}` by-passes the site and has no row per example")
        return None

    def run(self, captured: SuffixConstants, values: Tensor, examples: Tensor) -> Any:
        """The network's raw output with the site set.

        Args:
            captured: from :meth:`capture`.
            values: of the site, (B, ...); gradients flow back to them.
            examples: which example each row belongs to, int64 (B,).

        Returns:
            Whatever the network returns, for B rows.
        """
        here = self.constants(captured, len(values), examples)
        here[self.graph.site] = values
        outputs = list(nodes_of(self.graph.output))
        self.graph.evaluate(self.nodes, here, outputs)
        return map_arg(self.graph.output, here.__getitem__)

    def constants(self, captured: SuffixConstants, rows: int, examples: Tensor | None = None) -> dict[fx.Node, Any]:
        """The constants of a batch; without ``examples`` those of one example stand for all rows."""
        here: dict[fx.Node, Any] = {node: _usable(value) for node, value in captured.fixed.items()}
        one = examples is None or len(captured) == 1 or bool((examples == examples[0]).all())
        for node, value in captured.shapes.items():
            here[node] = value.expand(rows, *value.shape[1:])
        for node, value in captured.rows.items():
            if one and all(_broadcasts(user) for user in node.users if user in self.dependent):
                first = 0 if examples is None or len(captured) == 1 else int(examples[0])
                taken = tree_map(lambda x, k=first: x[k : k + 1].expand(rows, *x.shape[1:]), value)
            else:
                index = examples if examples is not None else torch.zeros(rows, dtype=torch.int64)
                taken = tree_map(lambda x, index=index: x[index.to(x.device)], value)
            here[node] = tree_map(_usable, taken)
        return here

    def share(self, captured: SuffixConstants) -> float:
        """Floating-point operations of the suffix, as a share of those of one full pass."""
        return self.flops(captured) / max(self.full_flops(captured), 1)

    def flops(self, captured: SuffixConstants) -> int:
        """Floating-point operations of the suffix for one example."""
        return flops_of(lambda: self.run(captured, captured.site[:1], torch.zeros(1, dtype=torch.int64)))

    def full_flops(self, captured: SuffixConstants) -> int:
        """Floating-point operations of the whole network for one example."""
        n = len(captured)
        given = tuple(x[:1] if x.dim() and len(x) == n else x for x in captured.inputs)
        wanted = ancestors([*nodes_of(self.graph.output)])
        nodes = [node for node in self.graph.nodes if node in wanted]
        values: dict[fx.Node, Any] = {self.graph.given: given}
        if self.decoder is not None:
            values[self.graph.site] = captured.site[:1]
        return flops_of(lambda: self.graph.evaluate(nodes, dict(values)))


def _descendants(graph: Graph, roots: list[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for node in graph.nodes:
        if any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found


def _is_input(graph: Graph, node: fx.Node) -> bool:
    taken = node.target is operator.getitem and node.args[0] is graph.given
    return taken and isinstance(node.args[1], int) and node.args[1] < graph.n_inputs


def _is_query(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _QUERY_METHODS
    return node.target is getattr and node.args[1] in _QUERIES


def _about_shape(graph: Graph, of: set[fx.Node]) -> set[fx.Node]:
    """Values that depend on the inputs through their shapes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in of and node is not graph.given:
            dependent = [arg for arg in node.all_input_nodes if arg in of]
            if _is_query(node) or (dependent and all(arg in found for arg in dependent)):
                found.add(node)
    return found


def _broadcasts(node: fx.Node) -> bool:
    return node.op != "call_module" and getattr(node.target, "__name__", node.target) in _BROADCASTING


def _is_same(now: object, then: object) -> bool:
    return isinstance(now, Tensor) or bool(now == then)


def _usable(value: Any) -> Any:
    """A value captured in inference mode may not be saved for a gradient; a copy may."""
    if isinstance(value, Tensor) and value.is_inference() and torch.is_grad_enabled():
        return value.clone()
    return value
