"""Operations that change a tensor in place, written so that they do not: clean values must stay clean."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

__all__ = ["ChangedInPlaceError", "out_of_place", "without_changes_in_place"]

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
