"""Which channels carry an attack on one image: indirect effects, and how many channels together are enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ce_plugin.attribution import CausalMediation
from ce_plugin.effects import nested_sets, next_sizes, ranking
from ce_plugin.report.findings import Carried

__all__ = ["carried_by"]

# A smaller change of the outcome, relative to the outcome, is rounding.
_NOTHING = 1e-5
# Sets in one round of the search.
_ROUND = 8


def carried_by(
    mediation: CausalMediation, clean: Tensor, target: int, *, levels: Sequence[float] = (0.5, 0.9)
) -> Carried:
    """What the channels of a layer carry of an attack's effect on one image.

    The sets that answer "how many?" are chosen and run on the same image, so that their sizes are optimistic;
    :meth:`ce_plugin.CausalMediation.carriers` chooses on some images and tests on others.

    Args:
        mediation: of the layer, with the attacked image as its counterpart.
        clean: the image, (1, ...).
        target: class whose outcome is meant.
        levels: shares of the total effect.

    Returns:
        Natural indirect effects of all channels, and the sizes of the sets.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> clean = torch.rand(1, 1, 4, 4)
        >>> found = carried_by(CausalMediation(net, "1", clean + 0.3), clean, target=0)
        >>> found.indirect.shape, sorted(found.needed)
        (torch.Size([4]), [0.5, 0.9])
    """
    found = mediation.estimate(clean, target)
    total, indirect = float(found.total[0, 0]), found.indirect[0, :, 0].double().cpu()
    reference = 0.0 if found.reference is None else float(found.reference[0, 0])
    if abs(total) <= _NOTHING * max(1.0, abs(reference)):
        return Carried(total, indirect, tuple(found.unit_labels), (), dict.fromkeys(levels), found.cut)
    order = ranking(found)
    curve: dict[int, float] = {}
    hint = [len(chosen) for chosen in nested_sets(order)]
    while hint:
        joint = mediation.estimate(clean, target, sets=nested_sets(order, hint)).indirect[0, :, 0]
        curve.update(zip(hint, (joint.double() / total).tolist(), strict=True))
        sizes = sorted(curve)
        hint = _between(sizes, next_sizes(sizes, torch.tensor([curve[k] for k in sizes]), levels))
    needed = {level: next((k for k in sizes if curve[k] >= level), None) for level in levels}
    return Carried(total, indirect, tuple(found.unit_labels), order, needed, found.cut)


def _between(sizes: Sequence[int], middles: Sequence[int]) -> list[int]:
    """Several sizes round each middle, up to the sizes that are known: fewer rounds, each of which has a price."""
    chosen = set(middles)
    for middle in middles:
        low, high = max(k for k in sizes if k < middle), min(k for k in sizes if k > middle)
        step = max(1, round((high - low) / _ROUND))
        chosen.update(range(low + step, high, step))
    return sorted(chosen)
