"""Activations of a network's layers, read by hooks and averaged over space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, ModelError, expected, unknown_name

__all__ = ["LayerReader", "default_layers", "every_layer", "pooled"]

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Softplus, nn.Tanh, nn.Sigmoid,
)  # fmt: skip
_WEIGHTED = (nn.Conv2d, nn.Linear)
_SAME_VALUES = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)
_MOST = 5
_MANY = 2**15

Layers = Sequence[nn.Module | str] | None


def pooled(value: Tensor) -> Tensor:
    """A layer's value as one vector for each image: maps (N, C, h, w) averaged over space, tokens (N, T, D) over T.

    Source: the pooling of Lee et al. 2018, section 2.2 ("average values along spatial dimensions").

    Example:
        >>> pooled(torch.arange(8.0).reshape(1, 2, 2, 2)).tolist()
        [[1.5, 5.5]]
    """
    if value.dim() == 3:
        return value.mean(1)
    return value if value.dim() == 2 else value.flatten(2).mean(2)


def default_layers(network: nn.Module, images: Tensor, most: int = _MOST) -> list[nn.Module]:
    """The layers that features are read from by default: the last activation of each map size, and dense activations.

    The last activation at each resolution is the end of a stage, as in Lee et al. for a ResNet. In networks without
    activation modules, convolutions and linear layers are used, without the logits.

    Args:
        network: images to logits.
        images: one image or a few; run once.
        most: number of layers, the last ones.

    Returns:
        Modules in the order in which they are run.

    Raises:
        ModelError: the network has no such layers: ``layers=`` must name some.

    Example:
        >>> dense = [nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 3)]
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), *dense)
        >>> default_layers(network, torch.zeros(1, 1, 8, 8))
        [ReLU(), Tanh()]
    """
    places: dict[nn.Module, int] = {}  # map size at the last call, in that order; 0 for dense layers

    def seen(module: nn.Module, _: object, value: object) -> None:
        if isinstance(value, Tensor) and value.dim() in (2, 3, 4):
            places.pop(module, None)
            places[module] = {2: 0, 3: value.shape[1], 4: value.shape[2:].numel()}[value.dim()]

    _run(network, images, [(m, seen) for m in network.modules() if isinstance(m, (*_ACTIVATIONS, *_WEIGHTED))])
    candidates = [m for m in places if isinstance(m, _ACTIVATIONS)] or list(places)[:-1]
    chosen: list[nn.Module] = []
    largest = 0
    for module in reversed(candidates):
        size = places[module]
        # Later maps must be smaller, which rules out a squeeze to 1 x 1 inside a stage.
        if size == 0 or size > largest:
            chosen.append(module)
            largest = max(size, largest)
    if not chosen:
        hint = "Pass `layers=` with modules or their dotted names."
        raise ModelError(expected("network", "one with activation, convolution or linear layers", "none", hint))
    return chosen[:most][::-1]


def every_layer(network: nn.Module, images: Tensor, most: int = 20) -> list[nn.Module]:
    """All modules without submodules, including the logits; if there are more than ``most``, that many, evenly spread.

    Args:
        network: images to logits.
        images: one image or a few; run once.
        most: number of layers.

    Returns:
        Modules without parts, in the order in which they are run.

    Raises:
        ModelError: the network has no such layers: ``layers=`` must name some.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> every_layer(net, torch.zeros(1, 1, 4, 4))
        [Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1)), ReLU(), Linear(in_features=8, out_features=2, bias=True)]
    """
    run: dict[nn.Module, None] = {}

    def seen(module: nn.Module, _: object, value: object) -> None:
        if isinstance(value, Tensor) and value.dim() >= 2:
            run.pop(module, None)
            run[module] = None

    leaves = [m for m in network.modules() if not list(m.children()) and not isinstance(m, _SAME_VALUES)]
    _run(network, images, [(module, seen) for module in leaves])
    if not run:
        hint = "Pass `layers=` with modules or their dotted names."
        raise ModelError(expected("network", "one that runs layers", "none", hint))
    ordered, count = list(run), min(most, len(run))
    return [ordered[(k + 1) * len(ordered) // count - 1] for k in range(count)]


class LayerReader:
    """Runs a network and returns its logits and the activations of chosen layers.

    Args:
        network: images to logits.
        layers: modules or dotted names; None means :func:`default_layers`, found at the first call. Of a layer that is
            called several times, the last call counts.
        pool: average over space; otherwise values are flattened. None averages only layers of more than 32768 values.
        most: number of layers, if ``layers`` is None.
        every: use :func:`every_layer` if ``layers`` is None.

    Raises:
        ArgumentError: ``layers`` is empty, or a module is not part of the network.
        UnknownNameError: no layer of this name.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
        >>> logits, (features,) = LayerReader(net)(torch.rand(5, 1, 4, 4))
        >>> logits.shape, features.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Layers = None,
        *,
        pool: bool | None = True,
        most: int = _MOST,
        every: bool = False,
    ) -> None:
        self.network = network
        self.pool = pool
        self.most = most
        self.every = every
        self.modules: list[nn.Module] | None = None if layers is None else _resolve(network, layers)

    def __call__(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Images (N, C, H, W) to logits (N, classes) and one (N, D) for each layer, with gradients.

        Raises:
            ModelError: a layer is not called, or its output is not a tensor (N, ...).
        """
        if self.modules is None:
            with torch.no_grad():
                choose = every_layer if self.every else default_layers
                self.modules = choose(self.network, images[:1], self.most)
        held: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, _: object, value: object) -> None:
            if isinstance(value, Tensor) and value.dim() >= 2:
                value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
                pool = value[0].numel() > _MANY if self.pool is None else self.pool
                # Pool or copy now: a later layer may modify this tensor in place.
                held[module] = pooled(value) if pool else value.flatten(1).clone()

        logits = _run(self.network, images, [(module, keep) for module in self.modules])
        missing = [type(module).__name__ for module in self.modules if module not in held]
        if missing:
            raise ModelError(expected("layers", "layers that the network runs, with values (N, ...)", missing))
        return logits, tuple(held[module] for module in self.modules)


def _run(network: nn.Module, images: Tensor, hooks: list[tuple[nn.Module, object]]) -> Tensor:
    """The network's logits; the forward hooks are removed afterwards."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]  # type: ignore[arg-type]
    try:
        logits = network(images)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(expected("network", "one that returns logits (N, classes)", got))
    return logits


def _resolve(network: nn.Module, layers: Sequence[nn.Module | str]) -> list[nn.Module]:
    known = dict(network.named_modules())
    if isinstance(layers, (str, nn.Module)) or len(layers) == 0:
        raise ArgumentError(expected("layers", "a list of modules of the network or their dotted names", layers))
    found = []
    for layer in layers:
        if isinstance(layer, str):
            if layer not in known:
                raise unknown_name("layers", layer, [name for name in known if name])
            found.append(known[layer])
        elif any(layer is module for module in known.values()):
            found.append(layer)
        else:
            raise ArgumentError(expected("layers", "modules of the network", f"another {type(layer).__name__}"))
    return found
