"""Files that are written whole or not at all, and read without running code."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from ce_plugin.errors import FileError, expected

__all__ = ["read_tensors", "written_whole"]


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream whose content takes the file's place when all of it is written; on an error nothing has changed.

    Args:
        path: the file; its folder exists.

    Raises:
        FileError: it cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a")) as stream:
        ...         _ = stream.write(b"whole")
        ...     Path(folder, "a").read_bytes(), os.listdir(folder)
        (b'whole', ['a'])
    """
    file, temporary = Path(path), ""
    try:
        # In the same folder, so that the last step is a rename within one file system.
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
            temporary = stream.name
            yield stream
        os.replace(temporary, file)
    except OSError as error:
        raise FileError(expected("path", "a file that can be written", repr(str(file)), str(error))) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str], wanted: str) -> Any:
    """What ``torch.save`` wrote: tensors and plain values only.

    Args:
        path: the file.
        wanted: what it should be, for messages ("a file written by Estimate.save").

    Raises:
        FileError: there is none, or it is something else.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a")) as stream:
        ...         torch.save({"x": torch.ones(1)}, stream)
        ...     read_tensors(Path(folder, "a"), "a file of tensors")
        {'x': tensor([1.])}
    """
    # What is no archive would be read as an old kind of pickle, whose reader fails in ways beyond counting.
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise FileError(expected("path", wanted, f"{str(path)!r}, which is none"))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(expected("path", wanted, repr(str(path)), str(error))) from error
    except (RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise FileError(expected("path", wanted, f"{str(path)!r}, which is none")) from error
