"""A network together with what must be known to feed it: size, units, normalisation, names of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, TargetError, expected, unknown_name
from ce_plugin.interventions.normalization import Normalization
from ce_plugin.models.framing import Framing, as_batch

__all__ = ["VisionModel"]


@dataclass(frozen=True)
class VisionModel:
    """An image classifier and how photographs are prepared for it.

    Args:
        model: the network: (N, 3, H, W) in model units to (N, C).
        name: what reports call it.
        framing: size of the square that it sees, and how a photograph becomes one.
        normalization: what is done to the image before the network, in image units.
        value_range: the least and the greatest value of a pixel in image units: (0, 1), or (0, 255).
        class_names: one per output, or None.

    Raises:
        ArgumentError: ``model`` is not a module, or ``value_range`` is empty.

    Example:
        >>> net = VisionModel(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), framing=Framing(8), class_names=("a", "b"))
        >>> net.inputs([torch.zeros(3, 20, 30, dtype=torch.uint8)]).shape
        torch.Size([1, 3, 8, 8])
        >>> net.class_index("b")
        1
    """

    model: nn.Module = field(repr=False)
    name: str = "model"
    framing: Framing = field(default_factory=Framing)
    normalization: Normalization = field(default_factory=Normalization)
    value_range: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ArgumentError(expected("model", "a torch.nn.Module", type(self.model).__name__))
        if not self.value_range[0] < self.value_range[1]:
            raise ArgumentError(expected("value_range", "(low, high) with low < high", self.value_range))

    def inputs(self, images: Sequence[Tensor]) -> Tensor:
        """Photographs as the network takes them.

        Args:
            images: each (3, H, W), uint8, as :func:`ce_plugin.datasets.read_image` returns them.

        Returns:
            (N, 3, size, size), float32, in model units, on the device of the network's first parameter.
        """
        batch = as_batch(images, self.framing, value_range=self.value_range)
        return self.normalization.to_model(batch).to(self.device)

    def pictures(self, inputs: Tensor) -> Tensor:
        """The way back: (N, C, H, W) in model units to values in [0, 1], on the CPU, for the eye."""
        low, high = self.value_range
        return ((self.normalization.to_image(inputs.detach()) - low) / (high - low)).clamp(0, 1).float().cpu()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def class_name(self, index: int) -> str:
        """The name of a class, or ``"class 7"`` where it has none."""
        if self.class_names is None or not 0 <= index < len(self.class_names):
            return f"class {index}"
        return self.class_names[index]

    def class_index(self, target: int | str) -> int:
        """The index of a class given by its index or its name (case does not matter).

        Raises:
            UnknownNameError: no class has this name.
            TargetError: several have, or the classes have no names.
        """
        if isinstance(target, int) or target.strip().lstrip("-").isdigit():
            return int(target)
        if self.class_names is None:
            todo = "The classes of this network have no names."
            raise TargetError(expected("target", "the index of a class", repr(target), todo))
        wanted = target.strip().casefold()
        found = [i for i, name in enumerate(self.class_names) if name.casefold() == wanted]
        if not found:
            raise unknown_name("target", target.strip(), set(self.class_names))
        if len(found) > 1:
            raise TargetError(expected("target", "a class", f"{target!r}, which names {found}", "Write the index."))
        return found[0]
