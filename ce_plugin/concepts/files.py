"""Files of the autoencoder: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ce_plugin.errors import FileError, expected
from ce_plugin.files import read_tensors, written_whole

__all__ = ["read_file", "write_file"]

_FORMAT, _VERSION = "ce_plugin concepts", 1


def write_file(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> Path:
    """Write plain values and tensors; a file that stands there is replaced only when the new one is complete.

    Raises:
        FileError: it cannot be written.
    """
    with written_whole(path) as stream:
        torch.save({"format": _FORMAT, "version": _VERSION, "kind": kind, **content}, stream)
    return Path(path)


def read_file(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """What :func:`write_file` wrote.

    Raises:
        FileError: there is no such file, it is damaged, of another kind, or of a later version.
    """
    wanted = f"a file written by {kind}.save" if kind == "ConceptAutoencoder" else f"a {kind} of train_autoencoder"
    content: Any = read_tensors(path, wanted)
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("kind") != kind:
        raise FileError(expected("path", wanted, f"{str(path)!r}, which holds something else"))
    if content["version"] != _VERSION:
        raise FileError(expected("path", f"{wanted}, version {_VERSION}", f"version {content['version']}"))
    return content
