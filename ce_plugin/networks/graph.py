"""A network as a graph of operations, cut at the point where experiments set a value."""

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
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ce_plugin.networks.tracing import INPUT, HookPoint, TracedRoot, Untraceable, mapped, record, site, spliced

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
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    return module(*args, **kwargs)


def without_changes_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite a graph: every operation returns a new value, and later uses of the changed one take that.

    Raises:
        ChangedInPlaceError: a view of a changed tensor is used later; what it then holds is not followed.
    """
    groups: dict[fx.Node, fx.Node] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    last_use: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        last_use.update(dict.fromkeys(node.all_input_nodes, position))
    for position, node in enumerate(graph.nodes):
        original = node.all_input_nodes
        if replaced:
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
            later = other not in (node, changed) and last_use.get(other, -1) > position
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
    if name in ("site", "hooks") and home == site.__module__:  # new tensors: of an experiment, of the user's hooks
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
    if node.kwargs.get("out") is not None:
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
        outputs: the nodes of the tensors that the network returns.
    """

    def __init__(
        self, network: nn.Module, point: HookPoint, decoder: nn.Module | None, n_inputs: int, args: tuple[object, ...]
    ) -> None:
        self._root = TracedRoot(network, decoder, point, (*[INPUT] * n_inputs, *args))
        self.n_inputs = n_inputs
        graph = record(self._root)
        try:
            _without_splices(graph)
            without_changes_in_place(graph, self._root)
        except ChangedInPlaceError as error:
            raise Untraceable(str(error)) from error
        self.given, *_, last = graph.nodes
        self._leaves, self.outputs = last.args[0], last.all_input_nodes
        self.nodes = list(graph.nodes)
        self.nodes = self.needed(self.outputs)
        marks = [node for node in self.nodes if node.target is site]
        if len(marks) != 1:
            raise Untraceable("the layer is not reached, or its output is not used")
        self.site = marks[0]

    def returned(self, value_of: Callable[[fx.Node], Any]) -> Any:
        """What the network returns, in containers of the classes that it uses, from the values of ``outputs``."""
        leaves = map_arg(self._leaves, value_of)
        return mapped(self._root.result, leaves.__getitem__)

    def needed(self, wanted: Iterable[fx.Node]) -> list[fx.Node]:
        """Some nodes and all that they are computed from, in order."""
        found = set(wanted)
        for node in reversed(self.nodes):
            if node in found:
                found.update(node.all_input_nodes)
        return [node for node in self.nodes if node in found]

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls; None where it calls none."""
        return self._root.get_submodule(cast(str, node.target)) if node.op == "call_module" else None

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation; none of its arguments is changed."""
        module = self.module(node)
        if module is not None:
            before = [vars(part).get(name) for part, name in self._root.read]
            output = out_of_place(module, args, kwargs)
            if any(vars(part).get(name) is not old for (part, name), old in zip(self._root.read, before, strict=True)):
                raise Untraceable(f"`{node.target}` is run whole and hands a value on in an attribute")
            return output
        if node.op == "call_function":
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        if node.op == "call_method":
            name = cast(str, node.target)
            if name.endswith("_") and not name.endswith("__"):
                return getattr(args[0].clone(), name)(*args[1:], **kwargs)
            return getattr(args[0], name)(*args[1:], **kwargs)
        return operator.attrgetter(cast(str, node.target))(self._root)

    def evaluate(self, nodes: list[fx.Node], values: dict[fx.Node, Any], keep: Iterable[fx.Node] = ()) -> None:
        """Run operations in order; a value is dropped after its last use, unless it is in ``keep``."""
        last_uses = self.last_uses(nodes, keep)
        for node in nodes:
            if node not in values:
                args = map_arg(node.args, values.__getitem__)
                values[node] = self.call(node, args, map_arg(node.kwargs, values.__getitem__))
                del args
            for arg in last_uses[node]:
                values.pop(arg, None)

    @staticmethod
    def last_uses(nodes: list[fx.Node], keep: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """For each node those of its arguments that no later one uses, without what is kept."""
        found: dict[fx.Node, list[fx.Node]] = {}
        later = set(keep)
        for node in reversed(nodes):
            found[node] = list(set(node.all_input_nodes) - later)
            later.update(node.all_input_nodes)
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


_ARGUMENTS = operator.attrgetter("all_input_nodes")
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
        """Sort the operations by what they depend on: the site, the inputs, or only the inputs' shapes."""
        graph = self.graph
        self.dependent, self._inputs = {graph.site}, set[fx.Node]()
        from_given, from_shapes = {graph.given}, set[fx.Node]()
        for node in graph.nodes:
            sources = set(node.all_input_nodes)
            if not sources.isdisjoint(self.dependent):
                self.dependent.add(node)
            elif not sources.isdisjoint(from_given) and node is not graph.site:
                from_given.add(node)
                if is_query(node) or sources & from_given <= from_shapes:
                    from_shapes.add(node)
            if _is_input(graph, node) or not sources.isdisjoint(self._inputs):
                self._inputs.add(node)
        # What follows from shapes alone is computed again, so that a batch of B rows finds B and not N.
        included = self.dependent - {graph.site}
        for node in reversed(graph.nodes):
            if node in included:
                included.update(from_shapes.intersection(node.all_input_nodes))
        self.nodes = [node for node in graph.nodes if node in included]
        boundary = set(graph.outputs).union(*map(_ARGUMENTS, self.nodes)) - included - {graph.site}
        self._fixed: list[fx.Node] = []
        self._shapes: list[fx.Node] = []
        self._rows: list[fx.Node] = []
        for node in graph.nodes:
            if node not in boundary:
                continue
            users = included.intersection(node.users)
            if node not in from_given:
                self._fixed.append(node)
            elif users and node not in graph.outputs and all(map(is_query, users)):
                self._shapes.append(node)
            else:
                self._rows.append(node)
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
        if len(args) != len(self._args):
            raise Untraceable(f"traced with {len(self._args)} additional arguments, called with {len(args)}")
        given = list(inputs)
        for now, then in zip(args, self._args, strict=True):
            if isinstance(now, Tensor) != isinstance(then, Tensor):
                raise Untraceable("called with other additional arguments than it was traced with")
            if isinstance(now, Tensor):
                given.append(now)
            elif not (now is then or now == then):
                raise Untraceable("called with other additional arguments than it was traced with")
        if self.decoder is not None and site is None:
            raise ValueError("with a decoder the code must be given as `site`")
        wanted = [*self._rows, *self._fixed, *self._shapes]
        source = self.graph.site.args[0]
        if site is None and isinstance(source, fx.Node):
            wanted.append(source)
        values: dict[fx.Node, Any] = {self.graph.given: tuple(given)}
        self.graph.evaluate(self.graph.needed(wanted), values, wanted)
        n = len(inputs[0])
        clean = values[source] if site is None and isinstance(source, fx.Node) else site
        if not isinstance(clean, Tensor) or clean.dim() == 0 or len(clean) != n:
            raise Untraceable("the site's value is not a tensor with one row per example")
        captured = SuffixConstants(clean, inputs=tuple(given))
        for node in (*self._fixed, *self._shapes, *self._rows):
            value = values[node]
            if node in self._fixed or not self._has_rows(node, value, n):
                captured.fixed[node] = value
            elif node in self._shapes:
                captured.shapes[node] = value[:1]
            else:
                captured.rows[node] = value
        return captured

    def _has_rows(self, node: fx.Node, value: Any, n: int) -> bool:
        """Whether a by-passing value has a row for each example; otherwise it belongs to all alike."""
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if tensors and all(tensor.dim() and len(tensor) == n for tensor in tensors):
            return True
        if node in self._inputs:
            raise Untraceable(f"`{node.name}` by-passes the site and has no row per example")
        return False

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
        self.graph.evaluate(self.nodes, here, self.graph.outputs)
        return self.graph.returned(here.__getitem__)

    def constants(self, captured: SuffixConstants, rows: int, examples: Tensor | None = None) -> dict[fx.Node, Any]:
        """The constants of a batch; without ``examples`` those of one example stand for all rows."""
        here: dict[fx.Node, Any] = {}
        for node, value in captured.fixed.items():
            here[node] = _usable(value)
        one = examples is None or len(captured.site) == 1 or bool((examples == examples[0]).all())
        for node, value in captured.shapes.items():
            here[node] = value.expand(rows, *value.shape[1:])
        for node, value in captured.rows.items():
            if one and all(_broadcasts(user) for user in node.users if user in self.dependent):
                first = 0 if examples is None or len(captured.site) == 1 else int(examples[0])
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
        n = len(captured.site)
        given = tuple(x[:1] if x.dim() and len(x) == n else x for x in captured.inputs)
        values: dict[fx.Node, Any] = {self.graph.given: given}
        if self.decoder is not None:
            values[self.graph.site] = captured.site[:1]
        return flops_of(lambda: self.graph.evaluate(self.graph.nodes, values))


def _is_input(graph: Graph, node: fx.Node) -> bool:
    taken = node.target is operator.getitem and node.args[0] is graph.given
    return taken and isinstance(node.args[1], int) and node.args[1] < graph.n_inputs


def is_query(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _QUERY_METHODS
    return node.target is getattr and node.args[1] in _QUERIES


def _broadcasts(node: fx.Node) -> bool:
    return node.op != "call_module" and getattr(node.target, "__name__", node.target) in _BROADCASTING


def _usable(value: Any) -> Any:
    """A value captured in inference mode may not be saved for a gradient; a copy may."""
    if isinstance(value, Tensor) and value.is_inference() and torch.is_grad_enabled():
        return value.clone()
    return value
