"""A network with the preparation of its inputs: size, image units, normalisation; and the names of its classes.

:func:`load_model` makes one from a name that fits on a command line.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import pickle
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, Union

import numpy as np
import torch
from torch import Tensor, nn

from ce_plugin.errors import (
    ArgumentError,
    CEPluginError,
    FileError,
    InputError,
    ModelError,
    TargetError,
    UnknownNameError,
    expected,
    unknown_name,
)
from ce_plugin.files import existing_file
from ce_plugin.interventions.base import Normalization
from ce_plugin.networks.guard import state_guard

Weights = Union[str, "PathLike[str]", None]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
# No network takes larger squares; one of them is 3 GB already.
_LARGEST = 16_384
_SLIMMEST = 200
# The weights of ITU-R BT.601 in thousandths: together exactly 1, so that gray stays as it is.
_LUMA = (299, 587, 114)


@dataclass(frozen=True)
class Framing:
    """How a photograph of any size becomes a square input: resize the shorter side, crop the centre.

    Args:
        size: height and width of the square, in pixels, 1 to 16384.
        resize: what the shorter side is resized to before the crop; at least ``size``. None means ``size``.
        interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``; antialiased.

    Raises:
        ArgumentError: a size or resize that is no whole number in its range, or an unknown interpolation.

    Example:
        >>> Framing(224, resize=256)(torch.zeros(3, 427, 640, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
    """

    size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not _whole(self.size) or not 1 <= self.size <= _LARGEST:
            raise ArgumentError(expected("size", f"a number of pixels, 1 to {_LARGEST}", repr(self.size)))
        if self.resize is not None and (not _whole(self.resize) or not self.size <= self.resize <= _LARGEST):
            wanted = f"None, or from size = {self.size} to {_LARGEST}"
            raise ArgumentError(expected("resize", wanted, repr(self.resize), "A crop cannot be larger."))
        if self.interpolation not in _INTERPOLATIONS:
            raise ArgumentError(expected("interpolation", f"one of {_INTERPOLATIONS}", repr(self.interpolation)))

    def __call__(self, image: Tensor) -> Tensor:
        """Resize and crop one image.

        Args:
            image: (C, H, W), integers or floats.

        Returns:
            (C, size, size), of the same dtype.

        Raises:
            InputError: the image does not have the shape (C, H, W), or is more than 200 times as long as wide.
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transform

        if image.dim() != 3 or 0 in image.shape:
            raise InputError(expected("image", "of shape (C, H, W)", tuple(image.shape)))
        shorter, longer = sorted(image.shape[1:])
        if longer > _SLIMMEST * shorter:
            # Once its shorter side is that of the square, it would not fit into memory.
            wanted = f"at most {_SLIMMEST} times as long as wide"
            raise InputError(expected("image", wanted, f"{tuple(image.shape)}", "Crop it first."))
        resized = transform.resize(
            image, [self.resize or self.size], interpolation=InterpolationMode(self.interpolation), antialias=True
        )
        framed: Tensor = transform.center_crop(resized, [self.size, self.size])
        return framed


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_batch(
    images: Sequence[Tensor],
    framing: Framing | None = None,
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
    grayscale: bool = False,
) -> Tensor:
    """8-bit images of any sizes as one float batch in image units.

    Args:
        images: images as :func:`ce_plugin.datasets.read_image` returns them, each (3, H, W), uint8.
        framing: how each is resized and cropped; None means 224 x 224.
        value_range: the values, in image units, that 0 and 255 become.
        grayscale: one channel, the luma of ITU-R BT.601 (0.299 R + 0.587 G + 0.114 B) in whole steps.

    Returns:
        (N, 3, size, size), or (N, 1, size, size) in gray, float32, within ``value_range``.

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
    batch = torch.stack(framed).float()
    if grayscale:
        weights = torch.tensor(_LUMA, dtype=torch.float64)[:, None, None]
        batch = ((batch.double() * weights).sum(1, keepdim=True) / 1000).round().float()
    return batch / 255.0 * (high - low) + low


@dataclass(frozen=True)
class VisionModel:
    """An image classifier with the preparation of its inputs.

    Args:
        model: the network: (N, 3, H, W), or (N, 1, H, W), in model units to (N, C).
        name: its name in reports.
        framing: input size, and how a photograph is resized and cropped to it.
        normalization: normalisation of the image before the network, in image units.
        value_range: lowest and highest value of a pixel in image units: (0, 1), or (0, 255).
        class_names: one per output, or None.
        grayscale: whether the network takes one channel; see :func:`as_batch`.

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
    grayscale: bool = False

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
            (N, C, size, size), float32, in model units, on the device of the network's first parameter; C is 3, or 1 in
            gray.
        """
        batch = as_batch(images, self.framing, value_range=self.value_range, grayscale=self.grayscale)
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

    def class_index(self, target: int | str, argument: str = "target") -> int:
        """The index of a class given by its index or its name (case does not matter).

        Args:
            target: index or name.
            argument: what messages call it.

        Raises:
            UnknownNameError: no class has this name.
            TargetError: several classes have this name, or the classes have no names.
        """
        if isinstance(target, int) or target.strip().lstrip("-").isdigit():
            return int(target)
        if self.class_names is None:
            hint = "The classes of this network have no names."
            raise TargetError(expected(argument, "the index of a class", repr(target), hint))
        wanted = target.strip().casefold()
        found = [i for i, name in enumerate(self.class_names) if name.casefold() == wanted]
        if not found:
            raise unknown_name(argument, target.strip(), set(self.class_names))
        if len(found) > 1:
            raise TargetError(expected(argument, "a class", f"{target!r}, which names {found}", "Write the index."))
        return found[0]


def load_model(name: str, weights: Weights = "DEFAULT") -> VisionModel:
    """Load a network by name: ``"torchvision:resnet50"``, ``"timm:NAME"``, ``"hf:NAME"``, ``"folder/file.py:factory"``.

    Args:
        name: ``torchvision:NAME``, any classifier of ``torchvision.models``; ``timm:NAME``, of ``timm.list_models()``;
            ``hf:NAME``, an image classifier on the Hugging Face hub, or a folder of ``save_pretrained``; or
            ``MODULE:FACTORY``, a function without arguments that returns a :class:`VisionModel` or a
            ``torch.nn.Module``. Modules are also found in the current folder; a path that ends in ``.py`` names a file.
            A function with one argument is given ``weights``, such as ``ce_plugin.models:load_mobilenet``.
        weights: ``"DEFAULT"``: the library's best weights (downloaded once), or the factory's own; a file written by
            ``torch.save(model.state_dict(), FILE)``, also of torchvision's network with another number of classes; what
            a factory with one argument reads; None: the library's network, untrained.

    Returns:
        The network in eval mode, with the library's input size, normalisation and class names. A processor of
        transformers that squeezes a picture into a square is replaced by a crop of the same size, which keeps shapes. A
        plain module gets 224 x 224, no normalisation and no class names.

    Raises:
        ArgumentError: the name has no ``:``.
        UnknownNameError: there is no such network, module or factory; the message suggests the closest name.
        ModelError: the library or module cannot be imported, the factory needs arguments, raises, or does not return a
            network, or the weights do not fit.
        FileError: there is no such file, or the weights cannot be read or downloaded.

    Example:
        >>> load_model("torchvision:squeezenet1_1", weights=None).framing
        Framing(size=224, resize=256, interpolation='bilinear')
    """
    prefix, colon, rest = name.rpartition(":")
    if not (prefix and colon and rest):
        hint = (
            "For example: torchvision:resnet50, timm:resnet18, hf:google/vit-base-patch16-224, my_module:my_factory, "
        )
        hint += "or folder/my_file.py:my_factory."
        raise ArgumentError(expected("model", "torchvision:NAME or MODULE:FACTORY", repr(name), hint))
    given = None if str(weights) == "DEFAULT" else weights
    if given is not None and not Path(given).is_dir():
        existing_file(given, "weights", "DEFAULT or an existing file")
    libraries = {"torchvision": _from_torchvision, "timm": _from_timm, "hf": _from_transformers}
    # Names on the hub may hold a colon; those of libraries come first.
    library, _, own = name.partition(":")
    if library in libraries:
        loaded, filled = libraries[library](own, weights), False
    else:
        loaded, filled = _from_factory(prefix, rest, given)
    if given is not None and not filled:
        load_weights(loaded.model, given)
    loaded.model.eval()
    return loaded


def _from_torchvision(name: str, weights: Weights) -> VisionModel:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("model", name, known)
    preset = models.get_model_weights(name).DEFAULT
    names: tuple[str, ...] | None = tuple(preset.meta["categories"])
    options: dict[str, Any] = {"weights": preset if str(weights) == "DEFAULT" else None}
    if weights is not None and str(weights) != "DEFAULT":
        # The head comes last: a network that was trained on other classes says how many there are.
        last = next(reversed(read_weights(weights).values()), torch.empty(()))
        if last.dim() and len(last) != len(preset.meta["categories"]):
            names, options["num_classes"] = None, len(last)
    try:
        model = models.get_model(name, **options)
    except (OSError, RuntimeError) as error:
        hint = f"Download {preset.url} on a machine with internet access and pass the file as weights."
        raise FileError(expected("weights", "downloadable", f"the error {error}", hint)) from error
    transform = preset.transforms()
    return VisionModel(
        model,
        name=f"{name}" if weights is not None else f"{name} (untrained)",
        framing=Framing(transform.crop_size[0], transform.resize_size[0], transform.interpolation.value),
        normalization=Normalization(transform.mean, transform.std),
        class_names=names,
    )


def _from_timm(name: str, weights: Weights) -> VisionModel:
    timm = _library("timm")
    if not timm.is_model(name):
        raise unknown_name("model", name, timm.list_models())
    try:
        model = timm.create_model(name, pretrained=str(weights) == "DEFAULT")
    except (OSError, RuntimeError) as error:
        raise _no_download(f"timm:{name}", error) from error
    config = timm.data.resolve_model_data_config(model)
    channels, size = config["input_size"][0], config["input_size"][-1]
    interpolation = config["interpolation"] if config["interpolation"] in _INTERPOLATIONS else "bilinear"
    names = None
    with suppress(KeyError, ValueError, AttributeError):
        info = timm.data.ImageNetInfo(timm.data.infer_imagenet_subset(model) or "imagenet-1k")
        described = [text.partition(",")[0] for text in info.label_descriptions()]
        names = tuple(described) if len(described) == model.num_classes else None
    return VisionModel(
        model,
        name=name if weights is not None else f"{name} (untrained)",
        framing=Framing(size, max(size, math.floor(size / config["crop_pct"])), interpolation),
        normalization=Normalization(config["mean"], config["std"]),
        class_names=names,
        grayscale=channels == 1,
    )


class _Logits(nn.Module):
    """A classifier of transformers that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The logits, (N, C)."""
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


def _from_transformers(name: str, weights: Weights) -> VisionModel:
    transformers = _library("transformers")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        kind = transformers.AutoModelForImageClassification
        if str(weights) == "DEFAULT":
            network = kind.from_pretrained(name)
        else:
            network = kind.from_config(transformers.AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise _no_download(f"hf:{name}", error) from error
    told = processor.to_dict()
    crop, resize = (_sides(told.get(key)) for key in ("crop_size", "size"))
    size = crop if told.get("do_center_crop") and crop else resize or Framing().size
    labels = network.config.id2label
    normal = told.get("do_normalize", True)
    mean, std = (told["image_mean"], told["image_std"]) if normal else (0.0, 1.0)
    interpolation = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(int(told.get("resample") or 2), "bilinear")
    return VisionModel(
        _Logits(network),
        name=Path(name).name if weights is not None else f"{Path(name).name} (untrained)",
        framing=Framing(size, max(size, resize or size), interpolation),
        normalization=Normalization(mean, std),
        class_names=tuple(str(labels[i]).partition(",")[0] for i in range(len(labels))),
    )


def _sides(size: Any) -> int | None:
    """The side of a square that a processor of transformers names in one of its ways."""
    if isinstance(size, int):
        return size
    found = [] if not size else [size[key] for key in ("shortest_edge", "height", "width") if size.get(key)]
    return int(min(found)) if found else None


def _library(name: str) -> Any:
    """A library of networks.

    Raises:
        ModelError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = 'Install it: pip install "ce-plugin[networks]"'
        raise ModelError(expected("model", f"a network of {name}", f"{error}", hint)) from error


def _no_download(name: str, error: Exception) -> FileError:
    """That a network of a library could not be had."""
    said = " ".join(str(error).split())[:300]
    hint = "Check the name; without internet access, pass weights=FILE, or for hf: a folder of save_pretrained."
    return FileError(expected("model", "a network that can be downloaded or read", f"{name!r} ({said})", hint))


def _from_factory(module_name: str, factory_name: str, weights: Weights) -> tuple[VisionModel, bool]:
    """What a factory makes, and whether it was given the weights."""
    file = existing_file(module_name, "model", "an existing .py file") if module_name.endswith(".py") else None
    # A console script does not have the current folder on its path, but `python -m` does: make both find the same,
    # also when the factory imports more.
    with _importable(os.path.abspath(file.parent) if file is not None else os.path.curdir):
        module = _module(module_name) if file is None else _module_of_file(file)
        if not hasattr(module, factory_name):
            raise _no_factory(module, module_name, factory_name)
        made, filled = _made(getattr(module, factory_name), f"{module_name}:{factory_name}", weights)
    if isinstance(made, VisionModel):
        return made, filled
    if not isinstance(made, nn.Module):
        wanted = f"a factory whose result is a torch.nn.Module or a VisionModel ({module_name}:{factory_name})"
        raise ModelError(expected("model", wanted, type(made).__name__))
    return VisionModel(made, name=factory_name), filled


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """A folder on the path of modules, for a while; not a current one that was removed."""
    here = os.path.abspath(folder) if os.path.isdir(folder) else ""
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _module(name: str) -> Any:
    hint = "It must be installed, or be a .py file in the current folder, and so must everything that it imports."
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnknownNameError(expected("model", "an importable module", f"{name!r} ({error})", hint)) from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ModelError(expected("model", "an importable module", f"{name!r}, which raises {_told(error)}")) from error


def _module_of_file(file: Path) -> Any:
    """A module from a file, whatever else has its name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ModelError(expected("model", "a Python file", repr(str(file))))
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(file.stem)
    sys.modules[file.stem] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[file.stem]
        wanted = "a file that can be imported"
        raise ModelError(expected("model", wanted, f"{str(file)!r}, which raises {_told(error)}")) from error
    finally:
        if before is not None:
            sys.modules[file.stem] = before
    return module


def _no_factory(module: Any, module_name: str, factory_name: str) -> UnknownNameError:
    """The error that suggests what the module makes networks with; not what it imported."""
    named = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (isinstance(value, nn.Module | VisionModel) or getattr(value, "__module__", "") == module.__name__)
    }
    if named:
        return unknown_name("model", factory_name, named)
    return UnknownNameError(expected("model", f"a factory in {module_name!r}", f"{factory_name!r}; it defines none"))


def _made(factory: Any, name: str, weights: Weights) -> tuple[Any, bool]:
    """What a factory makes, and whether it was given the weights; a network is its own."""
    if not callable(factory) or isinstance(factory, nn.Module):
        return factory, False
    wanted = "a factory without arguments that returns a network"
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of functions written in C
        signature = inspect.Signature()
    needed = [
        one.name
        for one in signature.parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    takes = [weights] if len(needed) == 1 and weights is not None else []
    if len(needed) > len(takes):
        hint = "Write one without arguments that calls it."
        if len(needed) == 1:
            hint += f" If {needed[0]} is a file of weights, name it with `weights`."
        raise ModelError(expected("model", wanted, f"{name!r}, which needs {', '.join(needed)}", hint))
    try:
        return factory(*takes), bool(takes)
    except (Exception, SystemExit) as error:
        if takes and isinstance(error, CEPluginError):
            raise
        raise ModelError(expected("model", wanted, f"{name!r}, which raises {_told(error)}")) from error


def _told(error: BaseException) -> str:
    """An error of the user's code on one line: its class, what it says, and where it was raised."""
    said = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {said}"  # which names the line
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if said else ''}{said}{place}"


_Network = TypeVar("_Network", bound=nn.Module)


def with_weights(make: Callable[[], _Network], file: str | PathLike[str] | None) -> _Network:
    """A network of the weights in a file, or without one untrained, by a fixed seed; in eval mode.

    Example:
        >>> one, two = (with_weights(lambda: nn.Linear(2, 3), None) for _ in range(2))
        >>> torch.equal(one.weight, two.weight)
        True
    """
    with state_guard(seed=0):
        model = make()
    if file is not None:
        load_weights(model, file)
    return model.eval()


def load_weights(model: nn.Module, file: str | PathLike[str]) -> None:
    """Load a state dictionary into a network without running code from the file.

    Accepts a plain state dictionary, or one under the key ``"state_dict"`` or ``"model"``, also with the prefix
    ``"module."`` that DataParallel adds to each name; or an archive of numpy with one array for each name (``.npz``).

    Args:
        model: changed in place.
        file: written by ``torch.save(model.state_dict(), file)`` or ``numpy.savez``.

    Raises:
        FileError: the file is missing, no regular file or damaged, or holds anything but tensors.
        ModelError: names or shapes do not fit the network.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "weights.pt")
        ...     torch.save(nn.Linear(2, 3).state_dict(), file)
        ...     load_weights(nn.Linear(2, 3), file)
    """
    load_state(model, read_weights(file))


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load tensors by name into a network.

    Raises:
        ModelError: names or shapes do not fit the network.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> load_state(network, {"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
        >>> network(torch.tensor([2.0])).item()
        2.0
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ModelError(expected("weights", f"those of this {type(model).__name__}", reason)) from error


_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError),
    *(struct.error, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


def read_weights(file: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, without running code from it; see :func:`load_weights`.

    Raises:
        FileError: the file is missing, no regular file or damaged, or holds anything but tensors.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder, "weights.npz"), bias=np.zeros(3, np.float32))
        ...     read_weights(Path(folder, "weights.npz"))["bias"]
        tensor([0., 0., 0.])
    """
    file = existing_file(file, "weights")
    state: Any
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                state = {name: torch.from_numpy(archive[name]) for name in archive.files}
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
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
    found: dict[str, Tensor] = state
    return found
