"""Loading a network by name, as on the command line."""

from __future__ import annotations

import importlib
import pickle
import struct
import sys
from os import PathLike
from pathlib import Path
from typing import Any, Union

import torch
from torch import nn

from ce_plugin.errors import ArgumentError, FileError, ModelError, UnknownNameError, expected, unknown_name
from ce_plugin.interventions.base import Normalization
from ce_plugin.models.vision import Framing, VisionModel

Weights = Union[str, "PathLike[str]", None]


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
    factory = _attribute(_module(module_name), factory_name)
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


def _attribute(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        raise unknown_name("model", name, [key for key in vars(module) if not key.startswith("_")])
    return getattr(module, name)


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
