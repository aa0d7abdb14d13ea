"""Trials that each flip one unit, for all examples, by way of what differs from the clean pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.trials.downstream import Downstream
from ce_plugin.trials.local import Local, initial
from ce_plugin.trials.setting import Rows, Setting
from ce_plugin.trials.states import Channel, Window
from ce_plugin.trials.values import Values

__all__ = ["Flips"]

# Rows of a batch whose values fill this much memory run fastest on CPUs: more of them fall out of the caches.
_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Rows of the first batch, which shows how much memory a row takes; fewer where so many times what the site's value
# takes would not fit into the budget.
_FIRST, _GUESS = 8, 16
# How often a row's outputs are held at once on their way from the network to the outcomes.
_COPIES = 6
_MOST = 8192


class Flips:
    """Runs trials that each set one unit of a site.

    Args:
        downstream: the network from the site on, cut out.
    """

    def __init__(self, downstream: Downstream) -> None:
        if downstream.suffix is None or downstream.captured is None:
            raise TypeError("differences are followed through a suffix")
        self.forward = downstream.forward
        self.local = Local(downstream.suffix, downstream.captured)
        self.route = "suffix"
        self._output_bytes = 0

    def reference(self, n: int) -> dict[str, Tensor]:
        """The clean outputs of N examples: the very numbers that a row in which nothing differs has."""
        parts = []
        for example in range(n):
            with torch.inference_mode():
                raw = self.local.clean_output(example)
                heads = self.forward.heads(raw)
            parts.append({name: head.clone() for name, head in heads.items()})
            self._output_bytes = sum(head.numel() * head.element_size() for head in heads.values())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __call__(self, setting: Setting, rows: Rows, values: Values) -> dict[str, Tensor]:
        """The heads' outputs of one batch of rows, (B, ...) each."""
        (masks,) = setting.units.masks(rows.assignments, rows.examples)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(rows.examples.tolist(), rows.variants.tolist(), strict=True)):
            groups.setdefault(key, []).append(row)
        parts, order = [], []
        for (example, variant), members in groups.items():
            here = masks if len(groups) == 1 else masks[members]
            with torch.inference_mode():
                heads = self.forward.heads(self.local(example, values[example][variant][0], here))
            self.route = self.local.route
            parts.append({name: head.to(setting.device).clone() for name, head in heads.items()})
            order += members
        if len(parts) == 1:
            return parts[0]
        back = torch.tensor(order).argsort().to(setting.device)
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def rows(self, budget: int, device: torch.device) -> tuple[int, int]:
        """How many rows a batch should have, and how many the memory budget allows."""
        if not self.local.bytes_per_row:
            site = self.local.captured.site
            guess = max(1, min(_FIRST, budget // max(_GUESS * site[:1].numel() * site.element_size(), 1)))
            return guess, guess
        each = self.local.bytes_per_row + _COPIES * self._output_bytes
        limit = max(1, min((budget - self.local.fixed_bytes) // each, _MOST))
        return max(1, min(max(_BYTES.get(device.type, _BYTES["cuda"]) // each, 4), limit)), limit

    def kind(self, setting: Setting) -> str:
        """How flips of the site's units start: as a "channel", as a "window", or "" where neither."""
        site, masks = self._sample(setting)
        start = initial(site, site + 1, masks)
        return "channel" if isinstance(start, Channel) else "window" if isinstance(start, Window) else ""

    def area(self, setting: Setting) -> int:
        """How many elements three of the units have."""
        return int(self._sample(setting)[1].sum())

    def cost(self, setting: Setting) -> float:
        """What a row costs, in forward passes of the whole network, counted on three rows of the first example."""
        site, masks = self._sample(setting)
        found = self.local.cost(site + 1, masks)
        self.route = self.local.route
        return found

    @staticmethod
    def _sample(setting: Setting) -> tuple[Tensor, Tensor]:
        n_units = int(setting.units.n_units[0])
        chosen = sorted({n_units // 4, n_units // 2, 3 * n_units // 4})
        assignments = torch.nn.functional.one_hot(torch.tensor(chosen), setting.units.width).bool()
        site = setting.inputs[0][:1]
        (masks,) = setting.units.masks(assignments, torch.zeros(len(chosen), dtype=torch.int64))
        return site, masks.to(site.device)
