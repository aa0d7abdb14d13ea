"""What every command needs before it can begin: network, device, pictures, classes; and how it shows progress."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ce_plugin.datasets import read_image
from ce_plugin.errors import ArgumentError, FileError, ModelError, expected
from ce_plugin.interventions import Intervention, MeanOut, Resample, ZeroOut
from ce_plugin.interventions.base import Normalization
from ce_plugin.models import Framing, VisionModel, load_model
from ce_plugin.report import build_manifest, last_conv_layer, named_layer

__all__ = [
    "PICTURES",
    "Folder",
    "class_index",
    "intervention",
    "keep_freed_memory",
    "layer_name",
    "manifest",
    "network",
    "progress",
    "say",
]

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_REFERENCES = 32


def network(arguments: argparse.Namespace) -> VisionModel:
    """The network of the options, on its device.

    Raises:
        CEPluginError: no such network, device, weights or class names.
    """
    device = _device(arguments.device)
    net = load_model(arguments.model, arguments.weights)
    own = {
        "framing": None if arguments.size is None else Framing(arguments.size),
        "normalization": None if arguments.normalization is None else Normalization(*arguments.normalization),
        "value_range": arguments.value_range,
        "class_names": None if arguments.class_names is None else _class_names(arguments.class_names),
    }
    net.model.to(device)
    return replace(net, **{key: value for key, value in own.items() if value is not None})


def _class_names(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(
            expected("class_names", "a text file, one name per line", f"{str(file)!r} ({error})")
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        hint = "Leave it out to use the CPU."
        raise ArgumentError(expected("device", "one that this machine has", f"{name!r} ({reason})", hint)) from error
    return device


def layer_name(net: VisionModel, inputs: Tensor, wanted: str | None) -> str:
    """The name of the layer that was asked for, or of the last convolution.

    Raises:
        UnknownNameError: no layer has this name.
        ModelError: there is no late convolution to take.
    """
    if wanted is not None:
        return named_layer(net.model, wanted)[0]
    found = last_conv_layer(net.model, inputs)
    if found is None:
        hint = "Name one of its layers with --layer."
        raise ModelError(expected("layer", "given for a network without a late convolution", None, hint))
    return found[0]


def class_index(net: VisionModel, named: str | None, logits: Tensor) -> int:
    """The class that was asked for, or the network's answer.

    Args:
        net: the network.
        named: a name or an index; None means the answer.
        logits: the network's output, (1, C).

    Raises:
        TargetError, UnknownNameError: there is no such class.
        ModelError: the network does not return (N, C) with at least two classes.
    """
    from ce_plugin.report import check_class

    return check_class(logits, None if named is None else net.class_index(named))


def intervention(arguments: argparse.Namespace, net: VisionModel) -> Intervention:
    """What a channel is set to.

    Raises:
        ArgumentError: pictures are needed and none were given, or the other way round.
    """
    kind, folder = arguments.intervention, arguments.reference
    if kind == "zero":
        if folder is not None:
            hint = "Add --intervention mean or --intervention resample, or leave it out."
            raise ArgumentError(expected("reference", "left out with --intervention zero", repr(str(folder)), hint))
        return ZeroOut()
    if folder is None:
        raise ArgumentError(expected("reference", f"a folder of pictures for --intervention {kind}", None))
    pictures = Folder(folder, net, limit=_REFERENCES, name="reference")
    reference = torch.stack([pictures[i] for i in range(len(pictures))])
    return MeanOut(reference) if kind == "mean" else Resample(reference, n_donors=min(8, len(reference)))


@dataclass
class Folder:
    """The pictures in and below a folder, as the network takes them; each is read when it is asked for.

    Args:
        folder: searched to its bottom; order is that of the paths.
        net: the network.
        limit: at most so many.
        name: of the option, for errors.

    Raises:
        FileError: there is no such folder, or no picture in it.
    """

    folder: Path
    net: VisionModel
    limit: int | None = None
    name: str = "images"

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise FileError(expected(self.name, "an existing folder of pictures", repr(str(self.folder))))
        found = sorted(file for file in self.folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
        self.files = found[: self.limit]
        if not self.files:
            hint = f"Known are {', '.join(sorted(PICTURES))}."
            raise FileError(expected(self.name, "a folder with pictures", f"{str(self.folder)!r}, without any", hint))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.net.inputs([read_image(self.files[index])])[0]

    def names(self) -> list[str]:
        """The pictures' paths below the folder."""
        return [str(file.relative_to(self.folder)) for file in self.files]


def manifest(
    arguments: argparse.Namespace, words: Sequence[str], net: VisionModel, inputs: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a command: its options, what went in, versions, machine."""
    shown = {key: value for key, value in vars(arguments).items() if key not in ("force", "quiet")}
    return build_manifest(
        arguments=shown,
        command=["ce-plugin", *words],
        seed=getattr(arguments, "seed", 0),
        inputs=inputs,
        model=net.model,
    )


def say(words: str, *, quiet: bool) -> None:
    """A line for the reader at the terminal."""
    if not quiet:
        sys.stdout.write(words + "\n")


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar that shows what is being done; each call ends the step before."""
    from tqdm import tqdm

    with tqdm(total=total, disable=quiet, unit="step", leave=False) as bar:
        begun = False

        def tell(step: str) -> None:
            nonlocal begun
            bar.update(int(begun))
            bar.set_description(step)
            begun = True

        yield tell
        bar.update(int(begun))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: convolutions on a CPU then run up to twice as fast (docs/performance.md)."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
