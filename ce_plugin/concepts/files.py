"""Files of the autoencoder: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from ce_plugin.errors import FileError, expected

__all__ = ["read_file", "write_file"]

_FORMAT, _VERSION = "ce_plugin concepts", 1


def write_file(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> Path:
    """Write plain values and tensors; a file that stands there is replaced only when the new one is complete.

    Raises:
        FileError: it cannot be written.
    """
    file, temporary = Path(path), ""
    try:
        # In the same folder, so that the last step is a rename within one file system.
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as handle:
            temporary = handle.name
            torch.save({"format": _FORMAT, "version": _VERSION, "kind": kind, **content}, handle)
        os.replace(temporary, file)
    except OSError as error:
        raise FileError(expected("path", "a file that can be written", repr(str(file)), str(error))) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
    return file


def read_file(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """What :func:`write_file` wrote.

    Raises:
        FileError: there is no such file, it is damaged, of another kind, or of a later version.
    """
    wanted = f"a file written by {kind}.save" if kind == "ConceptAutoencoder" else f"a {kind} of train_autoencoder"
    try:
        # What is no archive would be read as an old kind of pickle, which fails in ways beyond counting.
        with zipfile.ZipFile(path):
            pass
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(expected("path", wanted, repr(str(path)), str(error))) from error
    except (RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise FileError(expected("path", wanted, f"{str(path)!r}, which is none")) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("kind") != kind:
        raise FileError(expected("path", wanted, f"{str(path)!r}, which holds something else"))
    if content["version"] != _VERSION:
        raise FileError(expected("path", f"{wanted}, version {_VERSION}", f"version {content['version']}"))
    return content
