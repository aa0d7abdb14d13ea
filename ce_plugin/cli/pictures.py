"""Pictures named on the command line, files and folders alike, in image units; and what a table says of them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ce_plugin.cli._session import PICTURES
from ce_plugin.datasets import read_image
from ce_plugin.errors import ArgumentError, FileError, expected
from ce_plugin.models import VisionModel, as_batch

__all__ = ["Pictures", "check_channels", "column_of"]

# The weights of ITU-R BT.601 in thousandths: together exactly 1, so that gray stays as it is.
_LUMA = (299, 587, 114)


@dataclass
class Pictures:
    """Picture files, each read when it is asked for.

    Args:
        paths: files, and folders, which are searched to their bottom.
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
        twice = next((file for file in found if found.count(file) > 1), None) if len(set(found)) < len(found) else None
        if twice is not None:
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

    def __len__(self) -> int:
        return len(self.files)

    def names(self) -> list[str]:
        """Below the folder, where one folder was named; else as they were named."""
        if len(self.paths) == 1 and self.paths[0].is_dir():
            return [str(file.relative_to(self.paths[0])) for file in self.files]
        return [str(file) for file in self.files]

    def batch(self, start: int, stop: int) -> Tensor:
        """Some of them, (n, C, size, size), float32, image units."""
        read = [read_image(file) for file in self.files[start:stop]]
        batch = as_batch(read, self.net.framing, value_range=(0, 255))
        if self.gray:
            weights = torch.tensor(_LUMA, dtype=torch.float64)[:, None, None]
            batch = ((batch.double() * weights).sum(1, keepdim=True) / 1000).round()
        low, high = self.net.value_range
        return (batch / 255.0 * (high - low) + low).float()

    def all(self, tell: Callable[[str], None] = lambda step: None) -> Tensor:
        """All of them, (N, C, size, size)."""
        parts = []
        for start in range(0, len(self), 32):
            tell("reading")
            parts.append(self.batch(start, start + 32))
        return torch.cat(parts)


def check_channels(net: VisionModel, gray: bool) -> None:
    """Whether the network's first convolution takes as many channels as the pictures will have.

    Raises:
        ArgumentError: it does not.
    """
    first = next((one for one in net.model.modules() if isinstance(one, nn.Conv2d)), None)
    if first is None or first.in_channels == (1 if gray else 3):
        return
    if first.in_channels == 1:
        hint = "Add --grayscale."
        raise ArgumentError(expected("grayscale", "given for a network that takes one channel", "no --grayscale", hint))
    hint = "Leave it out." if gray else "Only gray and colour pictures can be read from files."
    got = f"one that takes {first.in_channels}"
    raise ArgumentError(expected("model", f"a network that takes {1 if gray else 3} channel(s)", got, hint))


def column_of(file: Path, names: Sequence[str], column: str, argument: str) -> list[str]:
    """What a table says of each picture.

    Args:
        file: a CSV table with the columns ``file`` and ``column``; a picture is found by its name as the command
            writes it, or by its file name, where only one has it.
        names: of the pictures.
        column: which one is wanted.
        argument: name of the option, for errors.

    Raises:
        FileError: no such table, a column is missing, or a picture is.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        wanted = f"a CSV table with the columns file and {column}"
        raise FileError(expected(argument, wanted, f"{str(file)!r} ({error})")) from error
    if not rows or not {"file", column} <= rows[0].keys():
        got = f"{str(file)!r} with {', '.join(map(str, rows[0])) if rows else 'no rows'}"
        raise FileError(expected(argument, f"a CSV table with the columns file and {column}", got))
    known = {row["file"]: row[column] or "" for row in rows}
    short = _unique((Path(name).name, value) for name, value in known.items())
    values = [known.get(name, short.get(Path(name).name)) for name in names]
    missing = next((name for name, value in zip(names, values, strict=True) if not value), None)
    if missing is not None:
        hint = "Add it, or leave the picture out."
        raise FileError(expected(argument, f"a {column} for every picture", f"none for {missing!r}", hint))
    return [value for value in values if value]


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    twice: set[str] = set()
    for name, value in pairs:
        twice |= {name} if name in found else set()
        found[name] = value
    return {name: value for name, value in found.items() if name not in twice}
