"""A network with the preparation of its inputs: size, image units, normalisation; and the names of its classes.

:func:`load_model` makes one from a name that fits on a command line.
"""

from __future__ import annotations

import importlib
import pickle
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from ce_plugin.errors import (
    ArgumentError,
    FileError,
    InputError,
    ModelError,
    TargetError,
    UnknownNameError,
    check_integer,
    expected,
    unknown_name,
)
from ce_plugin.interventions.base import Normalization

Weights = Union[str, "PathLike[str]", None]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Framing:
    """How a photograph of any size becomes a square input: resize the shorter side, crop the centre.

    Args:
        size: height and width of the square, in pixels.
        resize: what the shorter side is resized to before the crop; at least ``size``. None means ``size``.
        interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``; antialiased.

    Raises:
        ArgumentError: a size below 1, a resize below the size, or an unknown interpolation.

    Example:
        >>> Framing(224, resize=256)(torch.zeros(3, 427, 640, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
    """

    size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        check_integer("size", self.size, "a positive number of pixels", least=1)
        if self.resize is not None and check_integer("resize", self.resize, "None or a number of pixels") < self.size:
            raise ArgumentError(
                expected("resize", f"None or at least size = {self.size}", self.resize, "A crop cannot be larger.")
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ArgumentError(expected("interpolation", f"one of {_INTERPOLATIONS}", repr(self.interpolation)))

    def __call__(self, image: Tensor) -> Tensor:
        """Resize and crop one image.

        Args:
            image: (C, H, W), integers or floats.

        Returns:
            (C, size, size), of the same dtype.

        Raises:
            InputError: the image does not have the shape (C, H, W).
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transform

        if image.dim() != 3 or 0 in image.shape:
            raise InputError(expected("image", "of shape (C, H, W)", tuple(image.shape)))
        resized = transform.resize(
            image, [self.resize or self.size], interpolation=InterpolationMode(self.interpolation), antialias=True
        )
        framed: Tensor = transform.center_crop(resized, [self.size, self.size])
        return framed


def as_batch(
    images: Sequence[Tensor], framing: Framing | None = None, *, value_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """8-bit images of any sizes as one float batch in image units.

    Args:
        images: images as :func:`ce_plugin.datasets.read_image` returns them, each (3, H, W), uint8.
        framing: how each is resized and cropped; None means 224 x 224.
        value_range: the values, in image units, that 0 and 255 become.

    Returns:
        (N, 3, size, size), float32, within ``value_range``.

    Raises:
        InputError: no images, or one that is not uint8.
        ArgumentError: the range is empty.

    Example:
        >>> as_batch([torch.full((3, 8, 10), 255, dtype=torch.uint8)], Framing(4), value_range=(0, 255)).max()
        tensor(255.)
    """
    low, high = value_range
    if not low < high:
        raise ArgumentError(expected("value_range", "(low, high) with low < high", value_range))
    if len(images) == 0:
        raise InputError(expected("images", "at least one picture", "none"))
    frame = framing or Framing()
    framed = []
    for image in images:
        if image.dtype != torch.uint8:
            raise InputError(expected("images", "of type uint8, values 0 to 255", image.dtype, "Use `read_image`."))
        framed.append(frame(image))
    return torch.stack(framed).float() / 255.0 * (high - low) + low


@dataclass(frozen=True)
class VisionModel:
    """An image classifier with the preparation of its inputs.

    Args:
        model: the network: (N, 3, H, W) in model units to (N, C).
        name: its name in reports.
        framing: input size, and how a photograph is resized and cropped to it.
        normalization: normalisation of the image before the network, in image units.
        value_range: lowest and highest value of a pixel in image units: (0, 1), or (0, 255).
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
        """Prepare photographs for the network.

        Args:
            images: each (3, H, W), uint8, as :func:`ce_plugin.datasets.read_image` returns them.

        Returns:
            (N, 3, size, size), float32, in model units, on the device of the network's first parameter.
        """
        batch = as_batch(images, self.framing, value_range=self.value_range)
        return self.normalization.to_model(batch).to(self.device)

    def pictures(self, inputs: Tensor) -> Tensor:
        """Inputs (N, C, H, W) in model units back to images with values in [0, 1], on the CPU, for display."""
        low, high = self.value_range
        return ((self.normalization.to_image(inputs.detach()) - low) / (high - low)).clamp(0, 1).float().cpu()

    @property
    def device(self) -> torch.device:
        """Device of the network's first parameter."""
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def class_name(self, index: int) -> str:
        """The name of a class, or ``"class 7"`` if it has none."""
        if self.class_names is None or not 0 <= index < len(self.class_names):
            return f"class {index}"
        return self.class_names[index]

    def class_index(self, target: int | str) -> int:
        """The index of a class given by its index or its name (case does not matter).

        Raises:
            UnknownNameError: no class has this name.
            TargetError: several classes have this name, or the classes have no names.
        """
        if isinstance(target, int) or target.strip().lstrip("-").isdigit():
            return int(target)
        if self.class_names is None:
            hint = "The classes of this network have no names."
            raise TargetError(expected("target", "the index of a class", repr(target), hint))
        wanted = target.strip().casefold()
        found = [i for i, name in enumerate(self.class_names) if name.casefold() == wanted]
        if not found:
            raise unknown_name("target", target.strip(), set(self.class_names))
        if len(found) > 1:
            raise TargetError(expected("target", "a class", f"{target!r}, which names {found}", "Write the index."))
        return found[0]


def load_model(name: str, weights: Weights = "DEFAULT") -> VisionModel:
    """Load a network by name: ``"torchvision:resnet50"``, or ``"package.module:factory"``.

    Args:
        name: ``torchvision:NAME``, any classifier of ``torchvision.models``; or ``MODULE:FACTORY``, a function
            without arguments that returns a :class:`VisionModel` or a ``torch.nn.Module``. Modules are also found
            in the current folder.
        weights: ``"DEFAULT"``: torchvision's best weights (downloaded once), or the factory's own; a file written by
            ``torch.save(model.state_dict(), FILE)``; None: torchvision's network, untrained.

    Returns:
        The network in eval mode, with torchvision's input size, normalisation and class names. A plain module
        gets 224 x 224, no normalisation and no class names.

    Raises:
        ArgumentError: the name has no ``:``.
        UnknownNameError: there is no such network, module or factory; the message suggests the closest name.
        ModelError: the factory does not return a network, or the weights do not fit.
        FileError: the weights cannot be read or downloaded.

    Example:
        >>> load_model("torchvision:squeezenet1_1", weights=None).framing
        Framing(size=224, resize=256, interpolation='bilinear')
    """
    prefix, colon, rest = name.partition(":")
    if not (prefix and colon and rest):
        hint = "For example: torchvision:resnet50, or my_module:my_factory."
        raise ArgumentError(expected("model", "torchvision:NAME or MODULE:FACTORY", repr(name), hint))
    if weights is not None and str(weights) != "DEFAULT" and not Path(weights).is_file():
        raise FileError(expected("weights", "DEFAULT or an existing file", repr(str(weights))))
    loaded = _from_torchvision(rest, weights) if prefix == "torchvision" else _from_factory(prefix, rest)
    if weights is not None and str(weights) != "DEFAULT":
        load_weights(loaded.model, weights)
    loaded.model.eval()
    return loaded


def _from_torchvision(name: str, weights: Weights) -> VisionModel:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("model", name, known)
    preset = models.get_model_weights(name).DEFAULT
    try:
        model = models.get_model(name, weights=preset if str(weights) == "DEFAULT" else None)
    except (OSError, RuntimeError) as error:
        hint = f"Download {preset.url} on a machine with internet access and pass the file as weights."
        raise FileError(expected("weights", "downloadable", f"the error {error}", hint)) from error
    transform = preset.transforms()
    return VisionModel(
        model,
        name=f"{name}" if weights is not None else f"{name} (untrained)",
        framing=Framing(transform.crop_size[0], transform.resize_size[0], transform.interpolation.value),
        normalization=Normalization(transform.mean, transform.std),
        class_names=tuple(preset.meta["categories"]),
    )


def _from_factory(module_name: str, factory_name: str) -> VisionModel:
    module = _module(module_name)
    if not hasattr(module, factory_name):
        raise unknown_name("model", factory_name, [name for name in vars(module) if not name.startswith("_")])
    factory = getattr(module, factory_name)
    made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    if isinstance(made, VisionModel):
        return made
    if not isinstance(made, nn.Module):
        wanted = f"a factory whose result is a torch.nn.Module or a VisionModel ({module_name}:{factory_name})"
        raise ModelError(expected("model", wanted, type(made).__name__))
    return VisionModel(made, name=factory_name)


def _module(name: str) -> Any:
    # A console script does not have the current folder on its path, but `python -m` does: make both find the same.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = "It must be installed, or be a .py file in the current folder, and so must everything that it imports."
        raise UnknownNameError(expected("model", "an importable module", f"{name!r} ({error})", hint)) from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def load_weights(model: nn.Module, file: str | PathLike[str]) -> None:
    """Load a state dictionary into a network without running code from the file.

    Accepts a plain state dictionary, or one under the key ``"state_dict"`` or ``"model"``, also with the prefix
    ``"module."`` that DataParallel adds to each name.

    Args:
        model: changed in place.
        file: written by ``torch.save(model.state_dict(), file)``.

    Raises:
        FileError: the file is missing or damaged, or holds anything but tensors.
        ModelError: names or shapes do not fit the network.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "weights.pt")
        ...     torch.save(nn.Linear(2, 3).state_dict(), file)
        ...     load_weights(nn.Linear(2, 3), file)
    """
    if not Path(file).is_file():
        raise FileError(expected("weights", "an existing file", repr(str(file))))
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, struct.error, pickle.UnpicklingError) as error:
        hint = "Write it with torch.save(model.state_dict(), FILE)."
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(expected("weights", "a file of tensors", f"{str(file)!r} ({reason})", hint)) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FileError(expected("weights", "a state dictionary of tensors", f"{str(file)!r}, {type(state).__name__}"))
    if state and all(str(key).startswith("module.") for key in state):
        state = {str(key)[len("module.") :]: value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ModelError(expected("weights", f"those of this {type(model).__name__}", reason)) from error
