"""What every command needs: network, device, layer, pictures, manifest; how it shows progress and writes files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ce_plugin.cli._commands import NetworkOptions
from ce_plugin.datasets import read_image
from ce_plugin.errors import ArgumentError, FileError, ModelError, expected
from ce_plugin.interventions.base import Normalization
from ce_plugin.models import Framing, VisionModel, as_batch, load_model
from ce_plugin.networks.layers import find_layer, last_conv_layer
from ce_plugin.report import build_manifest

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# The weights of ITU-R BT.601 in thousandths: together exactly 1, so that gray stays as it is.
_LUMA = (299, 587, 114)


def network(options: NetworkOptions) -> VisionModel:
    """The network of the options, on its device.

    Raises:
        CEPluginError: no such network, device, weights or class names.
    """
    device = _device(options.device)
    net = load_model(options.model, options.weights)
    net.model.to(device)
    if options.size is not None:
        net = replace(net, framing=Framing(options.size))
    if options.normalization is not None:
        net = replace(net, normalization=Normalization(*options.normalization))
    if options.value_range is not None:
        net = replace(net, value_range=(options.value_range.low, options.value_range.high))
    if options.class_names is not None:
        net = replace(net, class_names=_class_names(options.class_names))
    return net


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
        return find_layer(net.model, wanted)[0]
    found = last_conv_layer(net.model, inputs)
    if found is None:
        hint = "Name one of its layers with --layer."
        raise ModelError(expected("layer", "given for a network without a late convolution", None, hint))
    return found[0]


@dataclass
class Pictures:
    """Picture files, each read when it is asked for.

    Args:
        paths: files, and folders, which are searched to the bottom in the order of the paths.
        net: the network that they are for.
        gray: one channel in place of three.
        limit: at most so many.
        name: of the argument, for errors.

    Raises:
        FileError: a path that does not exist, or a folder without pictures.
        ArgumentError: a picture that is named twice.
    """

    paths: Sequence[Path]
    net: VisionModel
    gray: bool = False
    limit: int | None = None
    name: str = "IMAGES"

    def __post_init__(self) -> None:
        found = [file for path in self.paths for file in self._below(path)]
        if len(set(found)) < len(found):
            twice = next(file for file in found if found.count(file) > 1)
            raise ArgumentError(expected(self.name, "each picture once", f"{str(twice)!r} several times"))
        self.files = found[: self.limit]

    def _below(self, path: Path) -> list[Path]:
        if not path.exists():
            hint = "Check the spelling and the folder."
            raise FileError(expected(self.name, "existing files or folders", repr(str(path)), hint))
        if not path.is_dir():
            return [path]
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
        if not found:
            hint = f"Known are {', '.join(sorted(PICTURES))}."
            raise FileError(expected(self.name, "a folder with pictures", f"{str(path)!r}, without any", hint))
        return found

    @classmethod
    def in_folder(cls, folder: Path, net: VisionModel, *, limit: int | None = None, name: str = "images") -> Pictures:
        """Those in and below one folder."""
        if not folder.is_dir():
            raise FileError(expected(name, "an existing folder of pictures", repr(str(folder))))
        return cls([folder], net, limit=limit, name=name)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """One of them as the network takes it, (C, H, W)."""
        return self.net.inputs([read_image(self.files[index])])[0]

    def names(self) -> list[str]:
        """Paths below the folder, where one folder was named; else as they were named."""
        if len(self.paths) == 1 and self.paths[0].is_dir():
            return [str(file.relative_to(self.paths[0])) for file in self.files]
        return [str(file) for file in self.files]

    def batch(self, start: int, stop: int) -> Tensor:
        """Some of them, (n, C, size, size), float32, image units."""
        batch = as_batch([read_image(file) for file in self.files[start:stop]], self.net.framing, value_range=(0, 255))
        if self.gray:
            weights = torch.tensor(_LUMA, dtype=torch.float64)[:, None, None]
            batch = ((batch.double() * weights).sum(1, keepdim=True) / 1000).round()
        low, high = self.net.value_range
        return (batch / 255.0 * (high - low) + low).float()

    def all(self, step: Callable[[str], None] = lambda name: None) -> Tensor:
        """All of them, (N, C, size, size); ``step`` is called before each 32."""
        parts = []
        for start in range(0, len(self), 32):
            step("reading")
            parts.append(self.batch(start, start + 32))
        return torch.cat(parts)


def check_file(out: Path, *, force: bool) -> None:
    """Whether a result may be written to this file, before any work.

    Raises:
        FileError: its folder does not exist, or it exists and ``force`` is False.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise FileError(expected("out", "a file in an existing folder", repr(str(out))))
    if out.exists() and not force:
        hint = "Choose another name, or allow it to be replaced with --force."
        raise FileError(expected("out", "a file that does not exist yet", repr(str(out)), hint))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column left, the others right.

    Example:
        >>> print(table(["channel", "share"], [["7", "12 %"], ["128", "9 %"]]))
        channel  share
        7         12 %
        128        9 %
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in (header, *rows)
    ]
    return "\n".join("  ".join(line) for line in padded)


def manifest(
    options: Any, argv: Sequence[str], net: VisionModel, inputs: Mapping[str, Any], **resolved: object
) -> dict[str, Any]:
    """The manifest of a command: its options, what they were resolved to, what went in, versions, machine."""
    said = dict(zip(("command", "action") if argv[0] in ("concepts", "detect") else ("command",), argv, strict=False))
    arguments = {**said, **vars(options), **resolved}
    for name in ("force", "quiet"):  # they change nothing that comes out
        arguments.pop(name, None)
    return build_manifest(
        arguments=arguments,
        command=["ce-plugin", *argv],
        seed=getattr(options, "seed", 0),
        inputs=inputs,
        model=net.model,
    )


def say(text: str, *, quiet: bool) -> None:
    """A line at the terminal."""
    if not quiet:
        sys.stdout.write(text + "\n")


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar that shows what is being done; each call ends the step before."""
    with tqdm(total=total, disable=quiet, unit="step", leave=False) as bar:
        begun = False

        def step(name: str) -> None:
            nonlocal begun
            bar.update(int(begun))
            bar.set_description(name)
            begun = True

        yield step
        bar.update(int(begun))
