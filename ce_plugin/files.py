"""Files that are written atomically and read without running code."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ce_plugin.errors import FileError, expected

_FORMAT = "ce_plugin"
# Formats up to release 0.3: estimates and detectors; autoencoders and checkpoints, whose content is not nested.
_OLDER_FORMATS = ("ce_plugin result", "ce_plugin concepts")
# Types that `torch.load` reads without running code.
_PLAIN = (Tensor, str, int, float, type(None))


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream whose content replaces the file once all of it is written; after an error the file is unchanged.

    Args:
        path: the file; its folder exists.

    Raises:
        FileError: it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a")) as stream:
        ...         _ = stream.write(b"whole")
        ...     Path(folder, "a").read_bytes(), os.listdir(folder)
        (b'whole', ['a'])
    """
    file = Path(path)
    # In the same folder, so that the final rename stays within one file system.
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as stream:
            yield stream
        part.replace(file)
    except OSError as error:
        raise FileError(expected("path", "a file that can be written", repr(str(file)), str(error))) from error
    finally:
        part.unlink(missing_ok=True)


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, str | bytes | Mapping[str, Any]]) -> None:
    """Write files into a folder, which is created if needed; each file is written atomically.

    Args:
        folder: other files in it are not changed.
        contents: file name -> text (stored as UTF-8), bytes, or a dictionary (stored as JSON).

    Raises:
        FileError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_files(Path(folder, "report"), {"index.html": "<p>"})
        ...     Path(folder, "report", "index.html").read_text()
        '<p>'
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        text = json.dumps(content, indent=2) + "\n" if isinstance(content, Mapping) else content
        with written_whole(Path(folder, name)) as stream:
            stream.write(text.encode("utf-8") if isinstance(text, str) else text)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that spreadsheets and pandas read.

    Example:
        >>> csv_text(["file", "score"], [["a.png", 0.5]])
        'file,score\\na.png,0.5\\n'
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def save(
    path: str | os.PathLike[str], kind: str, version: int, content: Mapping[str, Any], *, force: bool = False
) -> Path:
    """Write tensors and JSON-serialisable values to a file; :func:`load` reads them.

    Args:
        path: the file; its folder exists.
        kind: kind of the content ("Estimate").
        version: version of this kind's format; :func:`load` raises an error for another one.
        content: tensors, and collections of tensors and plain values, are stored as they are, on the CPU; the rest as
            JSON, and what JSON does not know as its ``repr``.
        force: replace a file that exists.

    Returns:
        The path.

    Raises:
        FileError: the file exists and ``force`` is not set, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(Path(folder, "a"), "Table", 1, {"x": torch.ones(1), "name": "one"})
        ...     load(file, "Table", 1)
        {'x': tensor([1.]), 'name': 'one'}
    """
    file = Path(path)
    if file.exists() and not force:
        hint = "Pass force=True to replace it."
        raise FileError(expected("path", "a new file", f"{str(file)!r}, which exists", hint))
    tensors, rest = {}, {}
    for name, value in content.items():
        leaves = tree_leaves(value)
        if any(isinstance(leaf, Tensor) for leaf in leaves) and all(isinstance(leaf, _PLAIN) for leaf in leaves):
            tensors[name] = tree_map_only(Tensor, _stored, value)
        else:
            rest[name] = value
    about = {"format": _FORMAT, "kind": kind, "version": version}
    with written_whole(file) as stream:
        torch.save({**about, "tensors": tensors, "json": json.dumps(rest, default=repr)}, stream)
    return file


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def load(path: str | os.PathLike[str], kind: str, version: int, wanted: str = "") -> dict[str, Any]:
    """Read what :func:`save` wrote, with tensors on the CPU, without running code from the file.

    Args:
        path: the file.
        kind, version: the expected kind and version.
        wanted: the expected file in words, for messages; None means "a file written by KIND.save".

    Raises:
        FileError: the file does not exist, is damaged, or has another kind or version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(save(Path(folder, "a"), "Table", 1, {"x": torch.zeros(1)}), "Table", 1)
        {'x': tensor([0.])}
    """
    wanted = wanted or f"a file written by {kind}.save"
    # torch.load reads a file that is not a zip archive as an old pickle, which can raise almost any exception.
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise FileError(expected("path", wanted, f"{str(path)!r}, which is none"))
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(expected("path", wanted, repr(str(path)), str(error))) from error
    except (RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise FileError(expected("path", wanted, f"{str(path)!r}, which is none")) from error
    known = isinstance(content, dict) and content.get("format") in (_FORMAT, *_OLDER_FORMATS)
    if not known or content.get("kind") != kind:
        raise FileError(expected("path", wanted, f"{str(path)!r}, which holds something else"))
    if (found := content.get("version", version)) != version:
        hint = "Make it again, or read it with the release of ce_plugin that wrote it."
        raise FileError(expected("path", f"{wanted}, version {version}", f"version {found}", hint))
    return {**content.get("tensors", content), **json.loads(content.get("json", "{}"))}
