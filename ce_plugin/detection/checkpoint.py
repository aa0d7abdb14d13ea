"""Long work saved stage by stage: a run that was interrupted goes on from there, and ends with the same result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ce_plugin.errors import ArgumentError, FileError, ModelError, expected
from ce_plugin.files import load, save

Content = dict[str, Any]
Tick = Callable[[str, int], None]

_KIND, _VERSION = "stage of a run", 1
_SETTINGS = "settings"
_SUFFIX = ".stage"
_HINT = "Choose another folder, or delete this one to begin again."
# So many images are measured, or attacked, between two files.
_SHARD = 256


def shards(n: int, batch_size: int) -> Iterator[slice]:
    """Slices of n images, each of whole batches: the batches are those of one run over all images.

    Example:
        >>> [(one.start, one.stop) for one in shards(700, 100)]
        [(0, 200), (200, 400), (400, 600), (600, 700)]
    """
    size = batch_size * max(1, _SHARD // batch_size)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


class Checkpoint:
    """The stages of a run that are done, each in a file of one folder.

    A stage that a file holds is read instead of being run again. A run with other settings, on another network or on
    other images is refused.

    Args:
        folder: made where there is none; None: nothing is saved.
        settings: what the run was asked for, by name; "network" and "images" are hashes.
        tick: called with the name of what was done, and how many steps of it.

    Raises:
        FileError: the folder holds something else, or cannot be written.
        ModelError: it is that of a run on another network.
        ArgumentError: it is that of a run with other settings, or on other images.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first = Checkpoint(Path(folder, "run"), {"seed": 0})
        ...     _ = first.stage("scores", lambda: {"scores": torch.ones(1)})
        ...     again = Checkpoint(Path(folder, "run"), {"seed": 0})
        ...     again.stage("scores", lambda: 1 / 0)  # not run again
        {'scores': tensor([1.])}
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        settings: Mapping[str, object] | None = None,
        tick: Tick | None = None,
    ) -> None:
        if not (folder is None or isinstance(folder, (str, os.PathLike))):
            raise ArgumentError(expected("checkpoint", "the name of a folder, or None", repr(folder)))
        self.folder = None if folder is None else Path(folder)
        self.tick: Tick = tick or (lambda what, n: None)
        if self.folder is not None:
            # As a file gives it back: JSON has lists for tuples.
            asked = json.loads(json.dumps(dict(settings or {}), default=repr))
            self._open(self.folder, asked)

    def _open(self, folder: Path, asked: Content) -> None:
        """Begin in an empty folder, or go on in one of the same run."""
        wanted = "a new folder, or that of an interrupted run"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_empty = not any(folder.iterdir())
        except OSError as error:
            raise FileError(expected("checkpoint", wanted, f"{str(folder)!r} ({error})")) from error
        if is_empty:
            self.write(_SETTINGS, {_SETTINGS: asked})
            return
        found = self.read(_SETTINGS)
        if found is None:
            raise FileError(expected("checkpoint", wanted, f"{str(folder)!r}, which holds other files", _HINT))
        there = found[_SETTINGS]
        other = [name for name in {**asked, **there} if asked.get(name) != there.get(name)]
        if "network" in other:
            raise ModelError(expected("checkpoint", "one of a run on this network", "one on another", _HINT))
        if "images" in other:
            raise ArgumentError(expected("checkpoint", "one of a run on these images", "one on others", _HINT))
        if other:
            here, came = (", ".join(f"{name}={one.get(name)!r}" for name in other) for one in (asked, there))
            raise ArgumentError(expected("checkpoint", f"one with {here}", f"one with {came}", _HINT))

    def read(self, name: str) -> Content | None:
        """What the file of a stage holds; None where there is none.

        Raises:
            FileError: the file is damaged.
        """
        file = self._file(name)
        if file is None or not file.exists():
            return None
        return load(file, _KIND, _VERSION, "a file of an interrupted run")

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write the file of a stage, which may be done in part."""
        file = self._file(name)
        if file is not None:
            save(file, _KIND, _VERSION, content, force=True)

    def stage(self, name: str, make: Callable[[], Content]) -> Content:
        """What the file of a stage holds; where there is none it is made, and written."""
        found = self.read(name)
        if found is None:
            found = make()
            self.write(name, found)
        return found

    def tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """:meth:`stage` for one tensor, on the CPU."""
        found: Tensor = self.stage(name, lambda: {"value": make().detach().cpu()})["value"]
        return found

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / (re.sub(r"[^\w.]+", "-", name) + _SUFFIX)


def discard(folder: Path) -> None:
    """Delete the folder of a checkpoint; what else is in it stays."""
    if folder.is_dir():
        for file in folder.glob(f"*{_SUFFIX}"):
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
