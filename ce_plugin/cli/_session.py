"""What every command needs: network, device, layer, pictures, manifest; how it shows progress and writes files."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ce_plugin.cli._commands import NetworkOptions, drop_output
from ce_plugin.datasets import read_image
from ce_plugin.errors import ArgumentError, FileError, InputError, ModelError, expected
from ce_plugin.files import existing_file, printable
from ce_plugin.interventions.base import Normalization
from ce_plugin.models import Framing, VisionModel, as_batch, load_model
from ce_plugin.networks import state_guard
from ce_plugin.networks.layers import find_layer, last_conv_layer
from ce_plugin.report import build_manifest

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# Of unreadable pictures, so many are named at the terminal; all are in the manifest.
_NAMED = 10


def network(options: NetworkOptions, *, grayscale: bool = False) -> VisionModel:
    """The network of the options, on its device, once it has answered a picture.

    Args:
        options: which network.
        grayscale: it takes one channel. Otherwise it gets one where it refuses three.

    Raises:
        CEPluginError: no such network, device, weights or class names, or it cannot take such pictures.
    """
    names = None if options.class_names is None else _class_names(options.class_names)
    device = _device(options.device)
    net = load_model(options.model, options.weights)
    net.model.to(device)
    if options.size is not None:
        net = replace(net, framing=Framing(options.size))
    if options.normalization is not None:
        net = replace(net, normalization=Normalization(*options.normalization))
    if options.value_range is not None:
        net = replace(net, value_range=(options.value_range.low, options.value_range.high))
    if names is not None:
        net = replace(net, class_names=names)
    net = replace(net, grayscale=grayscale or net.grayscale)
    answer, refusal = _answer(net)
    if refusal and not net.grayscale:
        answer, again = _answer(gray := replace(net, grayscale=True))
        if not again:
            if not getattr(options, "quiet", False):
                sys.stderr.write("ce-plugin: note: the network takes one channel: pictures are converted to gray\n")
            net, refusal = gray, ""
    if refusal:
        side = net.framing.size
        wanted = f"a network that takes pictures of shape {(1, 1 if net.grayscale else 3, side, side)}"
        hint = "Say with --size how large they are; they are in colour or in gray."
        if grayscale:
            hint = "Leave out --grayscale where it takes colours, or say with --size how large they are."
        raise ModelError(expected("model", wanted, f"the error {refusal}", hint))
    if isinstance(answer, Tensor) and answer.dim() == 2 and len(net.class_names or ()) not in (0, answer.shape[1]):
        wanted = f"{answer.shape[1]} names, one for each class of the network"
        raise ArgumentError(expected("class_names", wanted, f"{len(net.class_names or ())}"))
    return net


def _answer(net: VisionModel) -> tuple[Any, str]:
    """What the network returns for one black picture, or the error that it raises."""
    side = net.framing.size
    try:
        with torch.no_grad(), state_guard(net.model):
            return net.model(net.inputs([torch.zeros(3, side, side, dtype=torch.uint8)])), ""
    except MemoryError:
        raise
    except Exception as error:  # the user's network may raise anything
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _class_names(file: Path) -> tuple[str, ...]:
    """The lines of a file; empty ones at its end are none."""
    wanted = "a text file, one name per line"
    try:
        text = existing_file(file, "class_names", wanted).read_text(encoding="utf-8-sig")
    except FileError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(expected("class_names", wanted, f"{str(file)!r} ({error})", "Save it as UTF-8.")) from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    if "" in names or not names:
        hint = "Each line is a class, in the order of the network's outputs: write a name, or its number."
        got = f"{str(file)!r}, whose line {names.index('') + 1} is blank" if names else f"{str(file)!r}, which is empty"
        raise FileError(expected("class_names", wanted, got, hint))
    return tuple(names)


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


def with_patterns(paths: Sequence[Path]) -> list[Path]:
    """Paths, and in place of a pattern (``in/*.jpg``, for shells that leave it) the files that it names, in order."""
    found: list[Path] = []
    for path in paths:
        named = [] if os.path.lexists(path) else sorted(map(Path, glob.glob(str(path), recursive=True)))
        found += named or [path]
    return found


@dataclass
class Pictures:
    """Picture files, each read when it is asked for; those that cannot be read are set aside and said.

    Args:
        paths: files, and folders, which are searched to the bottom in the order of the paths.
        net: the network that they are for.
        limit: at most so many.
        name: of the argument, for errors.
        quiet: no progress.

    Attributes:
        files: those that can be read.
        unreadable: name -> why, of those that cannot.

    Raises:
        FileError: a path that does not exist, a folder without pictures, or not one picture that can be read.
        ArgumentError: a picture that is named twice.
    """

    paths: Sequence[Path]
    net: VisionModel
    limit: int | None = None
    name: str = "IMAGES"
    quiet: bool = True

    def __post_init__(self) -> None:
        found = [file for path in self.paths for file in self._below(path)]
        if len(set(found)) < len(found):
            twice = next(file for file in found if found.count(file) > 1)
            raise ArgumentError(expected(self.name, "each picture once", f"{str(twice)!r} several times"))
        # Before any work: the worst picture of a folder must not cost what the others gave.
        read = tqdm(found[: self.limit], "checking the pictures", disable=self.quiet, leave=False, delay=2)
        checked = {file: self._fault(file) for file in read}
        self.files = [file for file, fault in checked.items() if fault is None]
        faults = {self._name_of(file): fault for file, fault in checked.items() if fault is not None}
        if not self.files:
            raise next(iter(faults.values()))
        self.unreadable = {name: printable(fault) for name, fault in faults.items()}
        for name, why in [*self.unreadable.items()][:_NAMED]:
            sys.stderr.write(f"ce-plugin: warning: left out: {name}: {why}\n")
        if len(faults) > _NAMED:
            sys.stderr.write(f"ce-plugin: warning: left out: {len(faults) - _NAMED} more; see the manifest\n")

    def _fault(self, file: Path) -> Exception | None:
        """Why a picture cannot be used."""
        try:
            self.net.framing(read_image(file))
        except (FileError, InputError) as error:
            return error
        return None

    def _below(self, path: Path) -> list[Path]:
        if not os.path.isdir(path):
            return [existing_file(path, self.name, "existing files or folders")]
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
        if not found:
            hint = f"Known are {', '.join(sorted(PICTURES))}."
            raise FileError(expected(self.name, "a folder with pictures", f"{str(path)!r}, without any", hint))
        return found

    @classmethod
    def in_folder(
        cls, folder: Path, net: VisionModel, *, limit: int | None = None, name: str = "images", quiet: bool = True
    ) -> Pictures:
        """Those in and below one folder."""
        if not os.path.isdir(folder):
            raise FileError(expected(name, "an existing folder of pictures", repr(str(folder))))
        return cls([folder], net, limit=limit, name=name, quiet=quiet)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """One of them as the network takes it, (C, H, W)."""
        return self.net.inputs([read_image(self.files[index])])[0]

    def names(self) -> list[str]:
        """Paths below the folder, where one folder was named; else as they were named."""
        return list(map(self._name_of, self.files))

    def _name_of(self, file: Path) -> str:
        below = len(self.paths) == 1 and self.paths[0] != file
        return printable(file.relative_to(self.paths[0]) if below else file)

    def batch(self, start: int, stop: int) -> Tensor:
        """Some of them, (n, C, size, size), float32, image units."""
        read, net = [read_image(file) for file in self.files[start:stop]], self.net
        return as_batch(read, net.framing, value_range=net.value_range, grayscale=net.grayscale)

    def all(self, step: Callable[[str], None] = lambda name: None) -> Tensor:
        """All of them, (N, C, size, size); ``step`` is called before each 32."""
        parts = []
        for start in range(0, len(self), 32):
            step("reading")
            parts.append(self.batch(start, start + 32))
        return torch.cat(parts)


def beside(out: Path, *, force: bool) -> Path:
    """Where the record of a file is written, ``FILE.json``; to be asked before any work.

    Raises:
        FileError: it exists and ``force`` is False.
    """
    file = Path(f"{out}.json")
    if os.path.lexists(file) and not force:
        hint = "Choose another name, or allow both to be replaced with --force."
        raise FileError(expected("out", "a file without a record beside it", repr(str(file)), hint))
    return file


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


def say(text: str, *, quiet: bool = False) -> None:
    """A line at the terminal; where nobody reads it any more, the work goes on without."""
    if quiet:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        drop_output(error)


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
