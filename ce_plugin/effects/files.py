"""Results on disk: tensors and JSON in one file that is written whole or not at all, and read without running code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ce_plugin.errors import FileError, expected
from ce_plugin.files import read_tensors, written_whole

__all__ = ["read_result", "same_values", "write_result"]

_FORMAT = "ce_plugin result"


def write_result(path: str | os.PathLike[str], kind: str, values: dict[str, Any], *, force: bool = False) -> Path:
    """Write tensors and JSON-able values under one name.

    Args:
        path: the file; its folder exists.
        kind: what it is ("Estimate"), checked when it is read.
        values: tensors are stored as they are, the rest as JSON; what JSON does not know is stored as its ``repr``.
        force: replace a file that exists.

    Returns:
        The path.

    Raises:
        FileError: where the file exists and ``force`` is not set, or cannot be written.
    """
    file = Path(path)
    if file.exists() and not force:
        raise FileError(
            expected("path", "a new file", f"{str(file)!r}, which exists", "Pass force=True to replace it.")
        )
    tensors = {name: value.detach().cpu() for name, value in values.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    content = {"format": _FORMAT, "kind": kind, "tensors": tensors, "json": json.dumps(rest, default=repr)}
    with written_whole(file) as stream:
        torch.save(content, stream)
    return file


def read_result(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """What :func:`write_result` wrote.

    Raises:
        FileError: where there is no such file, or it is not one of this kind.
    """
    wanted = f"a file written by {kind}.save"
    content: Any = read_tensors(path, wanted)
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("kind") != kind:
        raise FileError(expected("path", wanted, f"{str(path)!r}, which holds something else"))
    return {**content["tensors"], **json.loads(content["json"])}


def same_values(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two results hold the same values, bit by bit, NaN equal to NaN."""
    return mine.keys() == theirs.keys() and all(_same(value, theirs[name]) for name, value in mine.items())


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two values are the same."""
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return type(mine) is type(theirs) and bool(mine == theirs)
    same = mine.dtype == theirs.dtype and mine.shape == theirs.shape
    return same and bool(((mine == theirs) | (mine.isnan() & theirs.isnan())).all())
