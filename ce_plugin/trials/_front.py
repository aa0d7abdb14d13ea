"""The front of a site: the values in which its change arrives before anything mixes channels or positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ce_plugin.networks.graph import Suffix, SuffixConstants, is_query
from ce_plugin.trials._incremental import CleanValues
from ce_plugin.trials._operations import Cat, Norm, Pointwise, resolve
from ce_plugin.trials.batches import TrialBatch, TrialSpec, checked_values, values_of_trials

# Units of an in-painter, each set by itself, whose values are computed together.
_TOGETHER = 32
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


def front_changes(suffix: Suffix, captured: SuffixConstants, example: int, do: Tensor) -> Tensor:
    """By how much each value of the front changes, laid back onto the site's elements.

    Followed are operations that act on each channel and position by itself: activations, batch norm with fixed
    statistics, scaling, concatenation, sums and products with what does not depend on the site or depends on it only in
    this way. What is so reached is in the front if it is the output, or if any other operation takes it (a convolution,
    a pooling, a normalisation, a softmax, a change of shape, a sum or product with what already mixes). Since nothing
    is mixed on the way, all units are set at once.

    Args:
        suffix: the network from the site on.
        captured: a clean pass of the examples.
        example: which of them.
        do: the site's value with all units set, (1, ...).

    Returns:
        (F, ...) in the site's shape: for each of F distinct values the sum of |f(do) - f(clean)| over the elements that
        depend on an element of the site.

    Example:
        >>> from ce_plugin.networks.graph import HookPoint
        >>> network = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Conv2d(1, 1, 1)).eval()
        >>> x = torch.tensor([[[[-3.0, 2.0]]]])
        >>> suffix = Suffix(network, HookPoint(network[0]))
        >>> front_changes(suffix, suffix.capture((x,)), 0, torch.zeros(1, 1, 1, 2))
        tensor([[[[0., 2.]]]])
    """
    front: list[_Carried] = []
    for value in _Walk(suffix, captured, example, do).front():
        # Copies of one value count once.
        if not any(torch.equal(value.do, other.do) and torch.equal(value.clean, other.clean) for other in front):
            front.append(value)
    return torch.cat([value.laid_back(do) for value in front])


# Elements of a value that depend on no element of the site, and on what mixes them.
_NONE, _MIXED = -1, -2


@dataclass(frozen=True)
class _Carried:
    """A value with elements that depend on one element of the site each.

    Args:
        clean, do: the value, (1, ...).
        source: on which element of the site, counted in its flattened order, or one of the marks above; (1, ...).
    """

    clean: Tensor
    do: Tensor
    source: Tensor

    def laid_back(self, site: Tensor) -> Tensor:
        """|do - clean| at the elements of the site, in its shape."""
        change = (self.do - self.clean).abs().flatten().to(site)
        # One element more, for what depends on none.
        total = site.new_zeros(site.numel() + 1)
        index = torch.where(self.source < 0, site.numel(), self.source).flatten()
        return total.index_add_(0, index, change)[:-1].reshape(site.shape)


class _Walk:
    """One example on its way from the site to the front.

    Args: as :func:`front_changes`.
    """

    def __init__(self, suffix: Suffix, captured: SuffixConstants, example: int, do: Tensor) -> None:
        self.suffix, self.graph = suffix, suffix.graph
        self.last_uses = self.graph.last_uses(suffix.nodes, self.graph.outputs)
        self.clean_values = CleanValues(suffix, captured, self.last_uses)
        self.clean_values.start(example)
        # What does not depend on the site, or only on its shape.
        self.fixed: dict[fx.Node, Any] = suffix.constants(captured, 1, torch.tensor([example]))
        clean = self.clean_values.site
        source = torch.arange(clean.numel(), device=clean.device).reshape(clean.shape)
        self.carried = {self.graph.site: _Carried(clean, do.to(clean), source)}

    def front(self) -> Iterator[_Carried]:
        """The values of the front, in the order in which the network is done with them."""
        taken: set[fx.Node] = set(self.graph.outputs)
        for node in self.suffix.nodes:
            carried = self._carried(node)
            known = all(arg in self.carried or arg in self.fixed for arg in node.all_input_nodes)
            if known and (not carried or is_query(node)):
                self.fixed[node] = self.graph.call(node, *self._arguments(node, "clean"))
            elif carried:
                after = self._followed(node) if known or node.target in _CONCATENATIONS else None
                if after is None:
                    taken.update(carried)
                else:
                    self.carried[node] = after
            for arg in self.last_uses[node]:
                value = self.carried.pop(arg, None)
                if value is not None and arg in taken:
                    yield value
            if not self.carried:
                break
        yield from [value for node, value in self.carried.items() if node in taken]

    def _followed(self, node: fx.Node) -> _Carried | None:
        """What a node returns, where it acts on each channel and position by itself."""
        module, (args, kwargs) = self.graph.module(node), self._arguments(node, "clean")
        operation = resolve(node, module, args, kwargs)
        # With a slope for each channel it is followed here only: engines take a channel at a time.
        prelu = node.target is F.prelu or (type(module) is nn.PReLU and not module._forward_hooks)
        by_element = prelu or isinstance(operation, (Pointwise, Norm))
        joins = isinstance(operation, Cat) and operation.dim % operation.source[0].dim() > 0  # not examples
        if not (by_element or joins):
            return None
        clean = self.graph.call(node, args, kwargs)
        if joins:
            source = self.graph.call(node, *self._arguments(node, "source"))
        else:
            source = _met([self.carried[arg].source.expand(clean.shape) for arg in self._carried(node)])
        if source is None:
            return None
        return _Carried(clean, self.graph.call(node, *self._arguments(node, "do")), source)

    def _carried(self, node: fx.Node) -> list[fx.Node]:
        return [arg for arg in node.all_input_nodes if arg in self.carried]

    def _arguments(self, node: fx.Node, which: str) -> tuple[Any, Any]:
        """A node's arguments: clean, under do, or on what their elements depend."""

        def value(arg: fx.Node) -> Any:
            if arg in self.carried:
                return getattr(self.carried[arg], which)
            mixed = arg not in self.fixed
            # Of what mixes only the shape is needed, beside which the site's own channels lie.
            found = self.clean_values(arg) if mixed else self.fixed[arg]
            if which == "source" and isinstance(found, Tensor):
                return torch.full_like(found, _MIXED if mixed else _NONE, dtype=torch.int64)
            return found

        return map_arg(node.args, value), map_arg(node.kwargs, value)


def _met(sources: list[Tensor]) -> Tensor | None:
    """On what the elements of a result depend whose operands depend on these; None where different ones meet."""
    found = sources[0]
    for other in sources[1:]:
        if bool(((found != other) & (found != _NONE) & (other != _NONE)).any()):
            return None
        found = torch.where(found == _NONE, other, found)
    return found


def all_set(spec: TrialSpec, example: int, variant: int) -> Tensor:
    """The site's value with every unit set, each as it is when it is set alone, (1, ...).

    Args:
        spec: the trials, of one layer.
        example: which of the examples.
        variant: which of the intervention's alternative values.
    """
    clean = spec.inputs[0][example : example + 1]
    n_units = int(spec.units.n_units[example])
    if not spec.intervention.per_trial:
        context = replace(spec.context.select([example]), variant=variant)
        do = checked_values(spec.intervention, clean, context)
        every = torch.arange(spec.units.width)[None] < n_units
        (mask,) = spec.units.masks(every, torch.tensor([example]))
        return torch.where(mask.to(clean.device), do, clean)
    found = clean.clone()
    for units in torch.split(torch.arange(n_units), _TOGETHER):
        alone = F.one_hot(units, spec.units.width).bool()
        examples, variants = torch.full_like(units, example), torch.full_like(units, variant)
        rows = TrialBatch(examples, alone, variants, units)
        (mask,) = spec.units.masks(alone, examples)
        mask = mask.to(clean.device)
        do = values_of_trials(spec, rows, clean.expand(len(units), *clean.shape[1:]), mask, 0)
        for row in range(len(units)):
            found = torch.where(mask[row], do[row : row + 1], found)
    return found
