"""Groups of interventions on the input, whose effects together make a signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ce_plugin.detection.group import (
    SIDES,
    Group,
    Response,
    checked_sides,
    in_image_units,
    labels_of,
    response_of,
    smooth_settings,
)
from ce_plugin.detection.view import View, effects_on_logits, margin_under
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.interventions import PixelMask, Smooth
from ce_plugin.randomness import generator

__all__ = ["CounterAttack", "PixelMasking", "Smoothing"]

_TINY = 1e-12


class Smoothing(Group):
    """Effects of do(x = s(x)) for some filters s: what the network makes of the image once an attack is smoothed away.

    Args:
        name: of the group.
        filters: :class:`~ce_plugin.interventions.Smooth` interventions, or the arguments that make them.
        judged: from which sides, see :data:`SIDES`.

    Example:
        >>> group = Smoothing("smoothing", [Smooth.gauss(1.0), Smooth.bits(1)])
        >>> group.passes
        2
        >>> response = group.respond(View(torch.nn.Flatten(), torch.rand(3, 1, 2, 2)))
        >>> response.effects.shape, response.margins.shape
        (torch.Size([3, 8]), torch.Size([3, 2]))

    Source: Xu, Evans, Qi, NDSS 2018 (arXiv 1704.01155), for the filters.
    """

    def __init__(
        self, name: str, filters: Sequence[Smooth | dict[str, Any]], *, judged: Sequence[str] = SIDES[:2]
    ) -> None:
        self.judged = checked_sides(judged)
        if not filters:
            raise ArgumentError(expected("filters", "at least one Smooth intervention", "none"))
        self.name = name
        self.filters = tuple(in_image_units(one) for one in filters)
        if len(set(self.interventions())) < len(self.filters):
            raise ArgumentError(expected("filters", "filters that differ", self.interventions()))
        self.passes = len(self.filters)

    def respond(self, view: View) -> Response:
        """Effects of each filter on the logits, side by side, and the margins under each."""
        return response_of(view, [view.do(one) for one in self.filters], self.judged)

    def labels(self, n_classes: int) -> list[str]:
        """See :meth:`Group.labels`."""
        return labels_of(self.interventions(), n_classes) if "distance" in self.judged else []

    def interventions(self) -> list[str]:
        """The filters."""
        return [repr(one) for one in self.filters]

    def ranges(self) -> list[tuple[float, float]]:
        """See :meth:`Group.ranges`."""
        return [one.value_range for one in self.filters]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        filters = [smooth_settings(one) for one in self.filters]
        return {"name": self.name, "filters": filters, "judged": list(self.judged)}


class CounterAttack(Group):
    """How far an image is from another answer, and what steps in that direction do.

    The gradient g of the margin m gives, at no further forward pass, the first-order effect of the strongest
    intervention of a given size: log |g|_2, log |g|_1, log max |g|, log m / |g|_1 and log m / |g|_2, the last two being
    the distances to the nearest other answer if the network were linear. Steps are run: x - step sign(g).

    Args:
        steps: sizes of the steps, in image units; each is one pass.
        value_range: least and greatest value of an image.
        judged: from which sides, see :data:`SIDES`.
        name: of the group.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> CounterAttack(steps=(0.05,)).respond(View(network, torch.rand(2, 1, 2, 2))).effects.shape
        torch.Size([2, 8])

    Source: the first-order distance is DeepFool's, Moosavi-Dezfooli et al., CVPR 2016 (arXiv 1511.04599), Eq. 6.
    """

    def __init__(
        self,
        *,
        steps: Sequence[float] = (),
        value_range: Sequence[float] = (0.0, 1.0),
        judged: Sequence[str] = SIDES[:1],
        name: str = "counter-attack",
    ) -> None:
        self.judged = checked_sides(judged)
        if any(not step > 0 for step in steps):
            raise ArgumentError(expected("steps", "positive sizes in image units", tuple(steps)))
        self.name = name
        self.steps = tuple(float(step) for step in steps)
        low, high = value_range
        self.value_range = (float(low), float(high))
        self.passes = 2 + len(self.steps)

    def respond(self, view: View) -> Response:
        """Five first-order sizes, then the effects of each step on the logits; and the margins after each step."""
        gradient, margin = view.gradient(), view.margin()
        flat = gradient.flatten(1)
        sizes = torch.stack([flat.square().sum(1).add(_TINY**2).sqrt(), flat.abs().sum(1), flat.abs().amax(1)], 1)
        logs = (sizes + _TINY).log()
        distance = (margin + 1e-6).log()[:, None] - logs[:, [1, 0]]
        away = gradient.sign().to(view.images)
        runs = [view.run((view.images - step * away).clamp(*self.value_range)) for step in self.steps]
        steps = response_of(view, runs, self.judged)
        first = torch.cat([logs, distance], 1) if "distance" in self.judged else logs[:, :0]
        return Response(torch.cat([first, steps.effects], 1), steps.margins, steps.answers, steps.left)

    def labels(self, n_classes: int) -> list[str]:
        """See :meth:`Group.labels`."""
        if "distance" not in self.judged:
            return []
        first = [f"log of the {which} norm of the margin's gradient" for which in ("L2", "L1", "largest-entry")]
        first += [f"log of the first-order {which} distance to another answer" for which in ("L-infinity", "L2")]
        return first + labels_of(self.interventions(), n_classes)

    def interventions(self) -> list[str]:
        """The steps."""
        return [f"a counter-attack step of {step:g}" for step in self.steps]

    def ranges(self) -> list[tuple[float, float]]:
        """See :meth:`Group.ranges`."""
        return [self.value_range] if self.steps else []

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {
            "steps": list(self.steps),
            "value_range": list(self.value_range),
            "judged": list(self.judged),
            "name": self.name,
        }


class PixelMasking(Group):
    """Effects of masking a random share of the pixels: mean and standard deviation over draws, on each logit.

    The draws are the same for every image, so that an image's effects do not depend on its neighbours.

    Args:
        share: of the pixels that are masked, in (0, 1).
        n_draws: random masks, at least 2; each is one pass.
        seed: of the draws.
        fill: as :class:`~ce_plugin.interventions.PixelMask` takes it, a name or a number.
        name: of the group.

    Example:
        >>> PixelMasking(0.3, n_draws=4).respond(View(torch.nn.Flatten(), torch.ones(2, 1, 3, 3))).effects.shape
        torch.Size([2, 18])
    """

    def __init__(
        self,
        share: float = 0.3,
        *,
        n_draws: int = 8,
        seed: int = 0,
        fill: str | float = "zero",
        name: str = "pixel masking",
    ) -> None:
        if not 0 < share < 1:
            raise ArgumentError(expected("share", "a float in (0, 1)", share))
        if n_draws < 2:
            raise ArgumentError(expected("n_draws", "at least 2", n_draws))
        self.name = name
        self.share, self.n_draws, self.seed, self.fill = share, n_draws, seed, fill
        self.passes = n_draws
        self._mask = PixelMask(fill)

    def respond(self, view: View) -> Response:
        """Mean effect and standard deviation over the draws; and the mean margin."""
        filled = self._mask.values(view.images, view.context)
        runs = []
        for draw in range(self.n_draws):
            random = generator(self.seed, "pixel masking", draw)
            masked = torch.rand(view.images.shape[-2:], generator=random) < self.share
            runs.append(view.run(torch.where(masked.to(view.images.device), filled, view.images)))
        effects = torch.stack([effects_on_logits(run, view.logits) for run in runs])
        logits = torch.stack(runs, 1)
        margins = margin_under(logits, view.logits).mean(1, keepdim=True)
        answers = logits.mean(1).argmax(1, keepdim=True)
        return Response(torch.cat([effects.mean(0), effects.std(0)], 1), margins, answers)

    def labels(self, n_classes: int) -> list[str]:
        """See :meth:`Group.labels`."""
        (what,) = self.interventions()
        return labels_of([f"{what}, mean", f"{what}, standard deviation"], n_classes)

    def interventions(self) -> list[str]:
        """One: the draws together."""
        return [f"masking {self.share:.0%} of the pixels"]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {
            "share": self.share,
            "n_draws": self.n_draws,
            "seed": self.seed,
            "fill": self.fill,
            "name": self.name,
        }
