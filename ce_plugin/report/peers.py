"""Captum's Grad-CAM and saliency, for the eye to compare with: they are gradients, not experiments."""

from __future__ import annotations

from captum.attr import LayerAttribution, LayerGradCam, Saliency
from torch import Tensor, nn

from ce_plugin.networks.guard import state_guard
from ce_plugin.networks.layers import find_layer, last_conv_layer

__all__ = ["grad_cam", "last_conv_layer", "named_layer", "saliency"]


named_layer = find_layer


def grad_cam(model: nn.Module, layer: nn.Module, inputs: Tensor, target: int) -> Tensor:
    """Grad-CAM at a layer, enlarged to the size of the input.

    Args:
        model: the network.
        layer: one of its convolutions; see :func:`last_conv_layer`.
        inputs: (N, C, H, W).
        target: class index.

    Returns:
        (N, H, W), not negative.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> grad_cam(net, net[0], torch.rand(2, 3, 8, 8), target=1).shape
        torch.Size([2, 8, 8])

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), as ``captum.attr.LayerGradCam``.
    """
    with state_guard(model):
        small = LayerGradCam(model, layer).attribute(inputs.clone(), target=target, relu_attributions=True)
    enlarged: Tensor = LayerAttribution.interpolate(small, tuple(inputs.shape[-2:]), "bilinear")
    return enlarged.detach()[:, 0].cpu()


def saliency(model: nn.Module, inputs: Tensor, target: int) -> Tensor:
    """The size of the gradient: the greatest over the channels.

    Args:
        model: the network.
        inputs: (N, C, H, W).
        target: class index.

    Returns:
        (N, H, W), not negative.

    Example:
        >>> saliency(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2), target=0).shape
        torch.Size([1, 2, 2])

    Source: Simonyan et al. 2013 (arXiv 1312.6034), as ``captum.attr.Saliency``.
    """
    with state_guard(model):
        gradient: Tensor = Saliency(model).attribute(inputs.clone().requires_grad_(), target=target)
    return gradient.detach().amax(dim=1).cpu()
