"""Groups of interventions on nodes inside the network: channels set to zero, or to their values in a smoothed run."""

from __future__ import annotations

from typing import Any

import torch

from ce_plugin.attribution import LayerCausalEffect
from ce_plugin.detection.classifier import Protected
from ce_plugin.detection.group import Group, Response, in_image_units, smooth_settings
from ce_plugin.detection.view import View
from ce_plugin.interventions import Patch, Smooth, ZeroOut
from ce_plugin.interventions.base import Intervention

__all__ = ["Interchange", "NodeZeroing"]


class _ChannelEffects(Group):
    """The effect of one intervention on each channel of a layer, on the logit of the predicted class and the margin."""

    differentiable = False

    def __init__(self, layer: str, name: str) -> None:
        self.name = name
        self.layer = layer
        # By superposition all channels cost little more than a pass near the end of a network; docs/performance.md.
        self.passes = 3

    def made(self, view: View) -> Intervention:
        """What each channel is set to."""
        raise NotImplementedError

    def respond(self, view: View) -> Response:
        """Effects on the predicted class's logit, then on the margin, one for each channel, (N, 2 U)."""
        images, network = view.images.detach(), view.network
        layer = network.module(self.layer) if isinstance(network, Protected) else self.layer
        columns = []
        for outcome in ("logit", "margin"):
            explainer = LayerCausalEffect(view.network, layer, self.made(view), outcome=outcome)
            columns.append(explainer.estimate(images, target=view.predicted).effect[..., 0])
        effects = torch.cat(columns, 1).to(view.logits)
        return Response(effects, effects[:, :0], effects[:, :0].long())

    def labels(self, n_classes: int) -> list[str]:
        """None: how many channels there are is known when it runs only."""
        return []

    def interventions(self) -> list[str]:
        """None is judged by its margin: one channel seldom turns an answer over."""
        return []

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {"layer": self.layer, "name": self.name}


class NodeZeroing(_ChannelEffects):
    """Effects of zeroing each channel of a layer: what the answer rests on.

    Args:
        layer: dotted name of the layer.
        name: of the group.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> NodeZeroing("0").respond(View(network.eval(), torch.rand(2, 1, 4, 4))).effects.shape
        torch.Size([2, 6])
    """

    def __init__(self, layer: str, name: str = "node zeroing") -> None:
        super().__init__(layer, name)

    def made(self, view: View) -> Intervention:
        """Zero."""
        return ZeroOut()


class Interchange(_ChannelEffects):
    """Effects of setting each channel of a layer to its value in a run on the smoothed image.

    Args:
        layer: dotted name of the layer.
        filter: the :class:`~ce_plugin.interventions.Smooth` intervention, or the arguments that make it.
        name: of the group.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> Interchange("0", Smooth.gauss(1.0)).respond(View(network.eval(), torch.rand(2, 1, 4, 4))).effects.shape
        torch.Size([2, 6])

    Source: interchange interventions, Geiger et al., NeurIPS 2021 (arXiv 2106.02997).
    """

    def __init__(self, layer: str, filter: Smooth | dict[str, Any], name: str = "interchange") -> None:  # noqa: A002
        super().__init__(layer, name)
        self.filter = in_image_units(filter)
        self.passes = 4

    def made(self, view: View) -> Intervention:
        """The values of the smoothed run."""
        return Patch(self.filter.values(view.images.detach(), view.context))

    def ranges(self) -> list[tuple[float, float]]:
        """See :meth:`Group.ranges`."""
        return [self.filter.value_range]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {"layer": self.layer, "filter": smooth_settings(self.filter), "name": self.name}
