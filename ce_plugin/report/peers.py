"""Which layer a report looks at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ce_plugin.errors import unknown_name
from ce_plugin.networks.guard import state_guard


def last_conv_layer(model: nn.Module, inputs: Tensor) -> tuple[str, nn.Module] | None:
    """The last convolution that still sees a plane: the layer that Grad-CAM is meant for.

    Args:
        model: any network.
        inputs: one or more examples, (N, C, H, W).

    Returns:
        Name and module of the last ``Conv2d`` in order of execution whose output is larger than 1 x 1; None where there
        is none, or only one at the very start (the patch embedding of a transformer summarises nothing).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1))
        >>> last_conv_layer(net, torch.zeros(1, 3, 8, 8))[0]
        '2'
    """
    seen: list[tuple[str, nn.Module, bool]] = []

    def note(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: object, output: object) -> None:
            plane = isinstance(module, nn.Conv2d) and isinstance(output, Tensor) and output.shape[-2:].numel() > 1
            seen.append((name, module, plane))

        module.register_forward_hook(hook)

    with state_guard(model), torch.no_grad():  # the guard takes the hooks away again
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) or not list(module.children()):  # some convolutions hold their padding
                note(name, module)
        model(inputs[:1])
    planes = [(step, name, module) for step, (name, module, plane) in enumerate(seen) if plane]
    if not planes or (planes[-1][0] == 0 and len(seen) > 4):
        return None
    return planes[-1][1], planes[-1][2]


def named_layer(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The layer of this dotted name, with its name.

    Raises:
        UnknownNameError: there is none; the nearest names are given.

    Example:
        >>> named_layer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "0")
        ('0', Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)))
    """
    layers = {key: module for key, module in model.named_modules() if key}
    if name not in layers:
        raise unknown_name("layer", name, layers)
    return name, layers[name]
