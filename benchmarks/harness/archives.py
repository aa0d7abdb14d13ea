"""Arrays and metadata in one file, written atomically and read without running code."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ce_plugin.errors import FileError, expected
from ce_plugin.files import written_whole

__all__ = ["Arrays", "read_archive", "write_archive"]

Arrays = Mapping[str, npt.NDArray[Any]]


def write_archive(
    file: str | os.PathLike[str], about: Mapping[str, Any], arrays: Mapping[str, Any], *, compressed: bool = False
) -> None:
    """Write arrays and JSON-serialisable metadata; the folder is created if needed."""
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    save = np.savez_compressed if compressed else np.savez
    with written_whole(target) as stream:
        save(stream, about=np.array(json.dumps(about)), **arrays)


def read_archive(
    file: str | os.PathLike[str], read: Callable[[Any, Arrays], Any], *, wanted: str, hint: str
) -> tuple[Any, Any]:
    """The metadata, and the result of ``read(facts, arrays)``, called while the file is open.

    Raises:
        FileError: the file does not exist or is damaged.
    """
    try:
        with np.load(Path(file), allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            return about, read(about, stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FileError(expected("file", wanted, f"{str(file)!r} ({error})", hint)) from error
