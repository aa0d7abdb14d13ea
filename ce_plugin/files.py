"""Files that are written whole or not at all, checked when they are read, and read without running code."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
import pickle
import secrets
import stat
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ce_plugin.errors import ArgumentError, FileError, expected, unknown_name

if TYPE_CHECKING:
    import pandas as pd

if sys.platform != "win32":
    import fcntl

TABLES = ("csv", "json", "parquet")
"""Suffixes of the tables that can be written, see :func:`table_files`."""

# A file is this line, the SHA-256 of the rest as hexadecimal digits, a line feed, and what torch.save wrote.
_MAGIC = b"ce_plugin file 2\n"
_DIGEST = 64
_FORMAT = "ce_plugin"
# Formats up to release 0.3: estimates and detectors; autoencoders and checkpoints, whose content is not nested.
_OLDER_FORMATS = ("ce_plugin result", "ce_plugin concepts")
# Types that `torch.load` reads without running code.
_PLAIN = (Tensor, str, int, float, type(None))
# What spreadsheets take for the beginning of a formula, in plain and in full width.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def path_of(path: object, argument: str = "path") -> Path:
    """A path that the user wrote.

    Raises:
        ArgumentError: something else, such as None.

    Example:
        >>> path_of("a.png").suffix
        '.png'
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if isinstance(text, str) and "\0" not in text:
        return Path(text)
    raise ArgumentError(expected(argument, "a file name, a str or a pathlib.Path", repr(path)))


def existing_file(path: object, argument: str = "path", wanted: str = "an existing file") -> Path:
    """A regular file that exists; what could block or never end (pipes, devices) is refused before it is opened.

    Args:
        path: the file.
        argument: name of the argument, for messages.
        wanted: the expected file in words, for messages.

    Raises:
        ArgumentError: no file name.
        FileError: it does not exist, cannot be reached, or is a folder, a pipe or a device.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     existing_file(file.name).exists()
        True
    """
    file = path_of(path, argument)
    try:
        mode = file.stat().st_mode
    except OSError as error:
        hint = "Check the spelling and the folder." if isinstance(error, FileNotFoundError) else ""
        raise FileError(expected(argument, wanted, f"{str(file)!r} ({_reason(error)})", hint)) from error
    if not stat.S_ISREG(mode):
        came = "the folder" if stat.S_ISDIR(mode) else "a pipe or a device,"
        raise FileError(expected(argument, wanted, f"{came} {str(file)!r}", "Name a regular file."))
    return file


def _reason(error: OSError) -> str:
    """What the system says, without the file's name, which messages have already."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def written_whole(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[IO[bytes]]:
    """A stream whose content becomes the file once all of it is on the disk; after an error the file is unchanged.

    Args:
        path: the file; its folder exists. A link stays one: what it points to is written.
        replace: whether the file may exist at the end.

    Raises:
        FileError: it cannot be written, as on a full disk; or it exists and must not be replaced.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a")) as stream:
        ...         _ = stream.write(b"whole")
        ...     Path(folder, "a").read_bytes(), os.listdir(folder)
        (b'whole', ['a'])
    """
    file = path_of(path)
    target = Path(os.path.realpath(file))
    # In the same folder, so that the final rename stays within one file system.
    part = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "no regular file")
        try:
            with part.open("xb") as stream:
                yield stream
                _flush(stream)
            _publish(part, target, replace=replace)
        finally:
            part.unlink(missing_ok=True)
    except FileError:
        raise
    except FileExistsError as error:
        raise _exists(file) from error
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Make room on the disk: what was there before is unchanged."
        wanted = "a file that can be written"
        raise FileError(expected("path", wanted, f"{str(file)!r} ({_reason(error)})", hint)) from error


def _flush(stream: IO[bytes]) -> None:
    """All of it to the disk: a full one is noticed here at the latest."""
    stream.flush()
    os.fsync(stream.fileno())


def _publish(part: Path, file: Path, *, replace: bool) -> None:
    """Give a complete file its name."""
    if not replace:
        try:
            # Unlike a rename, it fails where another process took the name meanwhile.
            os.link(part, file)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if file.exists():
                raise FileExistsError(str(file)) from None
        else:
            return
    part.replace(file)


def _exists(file: Path) -> FileError:
    return FileError(expected("path", "a new file", f"{str(file)!r}, which exists", "Pass force=True to replace it."))


def check_out(out: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Refuse a folder that must not, or cannot, be written to; meant to be called before any work.

    Args:
        out: the folder of the report.
        force: it may exist; then only the report's own files in it are replaced.

    Returns:
        The folder, which is not made yet.

    Raises:
        FileError: it exists and ``force`` is False; it is a file; or it cannot be made here.

    Example:
        >>> check_out("a-new-folder").name
        'a-new-folder'
    """
    folder = path_of(out, "out")
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise FileError(expected("out", "a folder", f"the file {str(folder)!r}", "Choose another name."))
        if folder.exists() and not force:
            hint = "Choose another name, or allow its report to be replaced with --force (force=True)."
            raise FileError(expected("out", "a folder that does not exist yet", repr(str(folder)), hint))
        nearest = Path(os.path.abspath(folder))
        while not nearest.exists():
            nearest = nearest.parent
    except FileError:
        raise
    except OSError as error:  # a name that is too long, a folder that may not be searched
        wanted = "a folder that can be written to"
        raise FileError(expected("out", wanted, f"{str(folder)!r} ({_reason(error)})")) from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise FileError(expected("out", "a folder that can be written to", f"{str(folder)!r} in {str(nearest)!r}"))
    return folder


@contextmanager
def reserved(out: str | os.PathLike[str], *, folder: bool = True, force: bool = False) -> Iterator[Path]:
    """Make the folder or the file of a result before the work, for this run alone.

    Another run that wants the same one is refused at its start, also with ``force``. After an error what is still empty
    is removed; what has content stays.

    Args:
        out: the folder or file.
        folder: whether it is a folder, which is made with those above it; a file's folder has to exist.
        force: it may exist already. An empty file, left by a run that was killed, may in any case.

    Raises:
        FileError: it exists, cannot be made, or another run has reserved it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with reserved(Path(parent, "report")) as place:
        ...         (place / "page.html").touch()
        ...     os.listdir(parent)
        ['report']
    """
    place = check_out(out, force=force) if folder else _check_file(path_of(out, "out"), force=force)
    made = [one for one in (place, *place.parents) if not one.exists()]
    with ExitStack() as stack:
        try:
            if folder:
                place.mkdir(parents=True, exist_ok=force)
            elif not place.exists():
                place.touch()
            _lock(place, stack, empty=not folder and not force)
        except OSError as error:
            if isinstance(error, FileExistsError | BlockingIOError):
                wanted, hint = "one that no other run writes to", "Wait for the other run, or choose another name."
                raise FileError(expected("out", wanted, repr(str(place)), hint)) from error
            wanted = f"a {'folder' if folder else 'file'} that can be written to"
            raise FileError(expected("out", wanted, f"{str(place)!r} ({_reason(error)})")) from error
        try:
            yield place
        except BaseException:
            with suppress(OSError):  # of folders, those that are not empty stay
                for one in made:
                    if one.is_dir():
                        one.rmdir()
                    elif not one.stat().st_size:
                        one.unlink()
            raise


def _check_file(file: Path, *, force: bool) -> Path:
    """That a result may be written to this file."""
    try:
        if not file.absolute().parent.is_dir() or (file.exists() and not file.is_file()):
            raise FileError(expected("out", "a file in an existing folder", repr(str(file))))
        if file.exists() and not force and file.stat().st_size:
            hint = "Choose another name, or allow it to be replaced with --force."
            raise FileError(expected("out", "a file that does not exist yet", repr(str(file)), hint))
    except FileError:
        raise
    except OSError as error:
        wanted = "a file that can be written to"
        raise FileError(expected("out", wanted, f"{str(file)!r} ({_reason(error)})")) from error
    return file


def _lock(place: Path, stack: ExitStack, *, empty: bool) -> None:
    """Hold a lock on a folder or file until the stack is closed, or the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it, or has just finished the file.
    """
    if sys.platform == "win32":
        return
    handle = os.open(place, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return
    now = place.stat()
    if not os.path.samestat(os.fstat(handle), now) or (empty and now.st_size):
        raise BlockingIOError(errno.EAGAIN, "another run has written it", str(place))


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, str | bytes | Mapping[str, Any]]) -> None:
    """Write files into a folder, which is created if needed: all of them, or after an error none.

    Args:
        folder: other files in it are not changed.
        contents: file name -> text (stored as UTF-8; what has no form in it is written as an escape), bytes, or a
            dictionary (stored as JSON).

    Raises:
        FileError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_files(Path(folder, "report"), {"index.html": "<p>"})
        ...     Path(folder, "report", "index.html").read_text()
        '<p>'
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            expected("out", "a folder that can be written to", f"{str(folder)!r} ({_reason(error)})")
        ) from error
    with ExitStack() as stack:
        # None gets its name before all of them are complete.
        for name, content in contents.items():
            text = json.dumps(content, indent=2) + "\n" if isinstance(content, Mapping) else content
            stream = stack.enter_context(written_whole(Path(folder, name)))
            stream.write(text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text)
            _flush(stream)


def printable(name: object) -> str:
    """A name, such as a file's, on one line of valid Unicode: what is not becomes an escape.

    Example:
        >>> printable("a\\nb\\udcff.png")
        'a\\\\nb\\\\xff.png'
    """
    return "".join(
        _escaped(sign) if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") else sign for sign in str(name)
    )


def _escaped(sign: str) -> str:
    # A byte of a file name that is not UTF-8 is read as one of these code points.
    return f"\\x{ord(sign) - 0xDC00:02x}" if 0xDC80 <= ord(sign) <= 0xDCFF else repr(sign)[1:-1]


def csv_cell(value: object) -> object:
    """A value of a table; text that a spreadsheet would run as a formula gets an apostrophe in front.

    Example:
        >>> csv_cell("=1+1"), csv_cell("-0.5"), csv_cell(-0.5)
        ("'=1+1", '-0.5', -0.5)
    """
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that spreadsheets and pandas read; see :func:`csv_cell`.

    Example:
        >>> csv_text(["file", "score"], [["a.png", 0.5], ["=a.png", -0.5]])
        "file,score\\na.png,0.5\\n'=a.png,-0.5\\n"
    """
    return "".join(_csv_line(map(csv_cell, row)) for row in (header, *rows))


def data_frame(header: Sequence[str], rows: Iterable[Sequence[object]]) -> pd.DataFrame:
    """A table from its rows, in which None is what is missing; whole numbers stay whole beside it.

    Example:
        >>> data_frame(["file", "class"], [["a.png", 7], ["b.png", None]])
            file  class
        0  a.png      7
        1  b.png   <NA>
    """
    import pandas as pd

    frame = pd.DataFrame([*rows], columns=[*header], dtype=object)
    whole = [name for name in frame if pd.api.types.infer_dtype(frame[name], skipna=True) == "integer"]
    found: pd.DataFrame = frame.astype(dict.fromkeys(whole, "Int64")).infer_objects()
    return found


def table_files(tables: Mapping[str, pd.DataFrame], suffix: str = "csv") -> dict[str, str | bytes]:
    """Tables as the files of a folder, for :func:`write_files`.

    Args:
        tables: name of the file without its suffix -> the table.
        suffix: ``"csv"`` (missing values are empty; safe in a spreadsheet, see :func:`csv_cell`), ``"json"`` (a list of
            rows; missing values, and numbers that are not finite, are null) or ``"parquet"`` (columns of values of
            several types are text).

    Raises:
        UnknownNameError: another suffix.
        FileError: Parquet without pyarrow.

    Example:
        >>> found = data_frame(["file", "score"], [["=a.png", 0.5], ["b.png", None]])
        >>> table_files({"scores": found})
        {'scores.csv': "file,score\\n'=a.png,0.5\\nb.png,\\n"}
        >>> table_files({"scores": found[:1]}, "json")
        {'scores.json': '[\\n {"file": "=a.png", "score": 0.5}\\n]\\n'}
    """
    check_tables(suffix)
    ways: dict[str, Callable[[pd.DataFrame], str | bytes]] = {"csv": _as_csv, "json": _as_json, "parquet": _as_parquet}
    write = ways[suffix]
    return {f"{name}.{suffix}": write(frame) for name, frame in tables.items()}


def check_tables(suffix: str) -> None:
    """That tables can be written with this suffix; meant to be called before any work.

    Raises:
        UnknownNameError, FileError: see :func:`table_files`.

    Example:
        >>> check_tables("csv")
    """
    if suffix not in TABLES:
        raise unknown_name("tables", suffix, TABLES)
    if suffix == "parquet" and find_spec("pyarrow") is None:
        hint = "Install it: pip install 'ce-plugin[data]'"
        raise FileError(expected("tables", "csv or json where pyarrow is not installed", repr(suffix), hint))


def _rows(frame: pd.DataFrame) -> list[tuple[object, ...]]:
    """The rows as plain values, None where one is missing."""
    return list(frame.astype(object).where(frame.notna(), None).itertuples(index=False, name=None))


def _as_csv(frame: pd.DataFrame) -> str:
    return csv_text(list(map(str, frame.columns)), _rows(frame))


def _as_json(frame: pd.DataFrame) -> str:
    def known(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    names = list(map(str, frame.columns))
    rows = [json.dumps(dict(zip(names, map(known, row), strict=True)), default=str) for row in _rows(frame)]
    return "[\n " + ",\n ".join(rows) + "\n]\n" if rows else "[]\n"


def _as_parquet(frame: pd.DataFrame) -> bytes:
    def text(value: object) -> str:
        return str(value).encode("utf-8", "backslashreplace").decode()

    names = [str(name) for name in frame]
    frame = frame.set_axis(names, axis=1)
    mixed = {name: frame[name].map(text, na_action="ignore") for name in names if not _of_one_type(frame[name])}
    content: bytes = frame.assign(**mixed).to_parquet(index=False, engine="pyarrow")
    return content


def _of_one_type(column: pd.Series[Any]) -> bool:
    """Whether a column holds numbers, or truth values, and nothing else."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return is_numeric_dtype(column) or is_bool_dtype(column)


def _csv_line(cells: Iterable[object]) -> str:
    buffer = io.StringIO()
    # Only what is in the line terminator is quoted: a lone carriage return would begin a new row.
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def save(
    path: str | os.PathLike[str], kind: str, version: int, content: Mapping[str, Any], *, force: bool = False
) -> Path:
    """Write tensors and JSON-serialisable values to a file; :func:`load` reads them.

    Args:
        path: the file; its folder exists.
        kind: kind of the content ("Estimate").
        version: version of this kind's content; :func:`load` raises an error for another one.
        content: tensors, and collections of tensors and plain values, are stored as they are, on the CPU; the rest as
            JSON, and what JSON does not know as its ``repr``.
        force: replace a file that exists.

    Returns:
        The path.

    Raises:
        ArgumentError: ``path`` is no file name.
        FileError: the file exists and ``force`` is not set, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(Path(folder, "a"), "Table", 1, {"x": torch.ones(1), "name": "one"})
        ...     load(file, "Table", 1)
        {'x': tensor([1.]), 'name': 'one'}
    """
    file = path_of(path)
    if os.path.lexists(file) and not force:
        raise _exists(file)
    tensors, rest = {}, {}
    for name, value in content.items():
        leaves = tree_leaves(value)
        if any(isinstance(leaf, Tensor) for leaf in leaves) and all(isinstance(leaf, _PLAIN) for leaf in leaves):
            tensors[name] = tree_map_only(Tensor, _stored, value)
        else:
            rest[name] = value
    about = {"format": _FORMAT, "kind": kind, "version": version}
    # First into memory: torch.save hides why a stream could not be written.
    buffer = io.BytesIO()
    torch.save({**about, "tensors": tensors, "json": json.dumps(rest, default=repr)}, buffer)
    with written_whole(file, replace=force) as stream:
        stream.write(_MAGIC + hashlib.sha256(buffer.getbuffer()).hexdigest().encode() + b"\n")
        stream.write(buffer.getbuffer())
    return file


def _stored(tensor: Tensor) -> Tensor:
    """On the CPU, and without the rest of a larger tensor that it is a part of."""
    tensor = tensor.detach().cpu()
    whole = tensor.layout == torch.strided and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


class _Content(dict[str, Any]):
    """What a file holds; a part that it lacks is an error of the file."""

    def __init__(self, values: Mapping[str, Any], file: Path, wanted: str) -> None:
        super().__init__(values)
        self.file, self.wanted = file, wanted

    def __missing__(self, name: str) -> Any:
        raise FileError(expected("path", self.wanted, f"{str(self.file)!r}, which lacks its part {name!r}"))


def load(path: str | os.PathLike[str], kind: str, version: int, wanted: str = "") -> dict[str, Any]:
    """Read what :func:`save` wrote, with tensors on the CPU, without running code from the file.

    Nothing is used before the checksum of the whole file is verified.

    Args:
        path: the file.
        kind, version: the expected kind and version.
        wanted: the expected file in words, for messages; None means "a file written by KIND.save".

    Returns:
        The content. To ask it for a part that it lacks is a :class:`~ce_plugin.errors.FileError` too.

    Raises:
        ArgumentError: ``path`` is no file name.
        FileError: the file does not exist, is damaged, or has another kind or version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(save(Path(folder, "a"), "Table", 1, {"x": torch.zeros(1)}), "Table", 1)
        {'x': tensor([0.])}
    """
    wanted = wanted or f"a file written by {kind}.save"
    file = existing_file(path, wanted=wanted)
    try:
        content: Any = torch.load(io.BytesIO(_verified(file, wanted)), map_location="cpu", weights_only=True)
        known = isinstance(content, dict) and content.get("format") in (_FORMAT, *_OLDER_FORMATS)
        values: dict[str, Any] = {}
        if known:
            values = {**content.get("tensors", content), **json.loads(content.get("json", "{}"))}
    except FileError:
        raise
    except OSError as error:
        raise FileError(expected("path", wanted, f"{str(file)!r} ({_reason(error)})")) from error
    except (
        *(RuntimeError, ValueError, TypeError, AttributeError, EOFError, LookupError, MemoryError),
        *(pickle.UnpicklingError, zipfile.BadZipFile),
    ) as error:
        raise FileError(expected("path", wanted, f"{str(file)!r}, which is none")) from error
    if not known or content.get("kind") != kind:
        raise FileError(expected("path", wanted, f"{str(file)!r}, which holds something else"))
    if (found := content.get("version", version)) != version:
        hint = "Make it again, or read it with the release of ce_plugin that wrote it."
        raise FileError(expected("path", f"{wanted}, version {version}", f"version {found}", hint))
    return _Content(values, file, wanted)


def damaged(path: str | os.PathLike[str], wanted: str, why: object) -> FileError:
    """The error of a file whose checksum is right and whose content is not.

    Example:
        >>> print(damaged("a.pt", "a file written by Estimate.save", "`std_error` is of another shape"))
        Expected argument `path` to be a file written by Estimate.save, but got 'a.pt', which does not fit together
        (`std_error` is of another shape).
    """
    return FileError(expected("path", wanted, f"{str(path)!r}, which does not fit together ({why})"))


def _verified(file: Path, wanted: str) -> bytes:
    """The archive in a file, once its checksum is known to be right.

    Raises:
        FileError: it is wrong, or the file is of another format.
    """
    content = file.read_bytes()
    start = len(_MAGIC) + _DIGEST + 1
    if content.startswith(_MAGIC):
        digest = hashlib.sha256(memoryview(content)[start:]).hexdigest().encode() + b"\n"
        if content[len(_MAGIC) : start] == digest:
            return content[start:]
    elif content.startswith(_MAGIC[:-2]):
        hint = "Read it with the release of ce_plugin that wrote it, or a later one."
        raise FileError(expected("path", wanted, f"{str(file)!r}, of a later format", hint))
    elif content.startswith(b"PK") and _sound_archive(content):
        return content
    else:
        raise FileError(expected("path", wanted, f"{str(file)!r}, which is none"))
    hint = "Its checksum is wrong: make it again, or take a copy of it."
    raise FileError(expected("path", wanted, f"{str(file)!r}, which is damaged", hint))


def _sound_archive(content: bytes) -> bool:
    """Whether an archive of torch.save, which earlier releases wrote, has the checksums that it says it has."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        plain = all(one.compress_type == zipfile.ZIP_STORED for one in archive.infolist())
        return plain and archive.testzip() is None
