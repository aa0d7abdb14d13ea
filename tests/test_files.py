"""Files: whole or not at all, and never read as something else than what was written."""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
import os
import random
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ce_plugin import CausalEffect
from ce_plugin.concepts import ConceptAutoencoder, train_autoencoder
from ce_plugin.designs import Joint, LeaveOneIn, OneAtATime, RandomMask
from ce_plugin.detection import CausalEffectDetector, CounterAttack, Signature
from ce_plugin.effects import Estimate
from ce_plugin.errors import ArgumentError, FileError, UnknownNameError
from ce_plugin.files import (
    TABLES,
    check_out,
    check_tables,
    csv_text,
    data_frame,
    load,
    printable,
    reserved,
    save,
    table_files,
    write_files,
    written_whole,
)
from ce_plugin.interventions import PixelMask

# --- the formats: all that the package writes and reads again


def _estimate(**changes: Any) -> Estimate:
    g = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {
        "effect": torch.randn(2, 3, 4, generator=g),
        "std_error": torch.rand(2, 3, 4, generator=g),
        "reference": torch.rand(2, 4, generator=g),
        "class_shape": (4,),
        "n_units": torch.tensor([3, 2]),
        "unit_labels": [["a", "b", "c"], ["d", "e"]],
        "predicted": torch.tensor([2, 0]),
        "settings": {"seed": 0},
        "groups": ((0,), (1, 2), (0, 1)),
    }
    return Estimate(**{**values, **changes})


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()


@functools.cache
def _detector() -> CausalEffectDetector:
    images = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    detector = CausalEffectDetector(_network(), Signature([CounterAttack(steps=(0.05,))]))
    detector.fit(images.numpy())
    return detector


def _detector_content(file: Path) -> dict[str, Any]:
    detector = CausalEffectDetector.load(file, _network())
    options = {name: detector.get_params()[name] for name in ("fpr", "holdout", "aggregate", "seed")}
    return {**detector.learned().state_dict(), "threshold": detector.threshold, **options}


def _save_checkpoint(file: Path) -> Path:
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    train_autoencoder(_network(), "1", images, concepts=2, epochs=1, checkpoint=file)
    return file


def _save_autoencoder(file: Path) -> Path:
    return ConceptAutoencoder(6, 2, seed=1).save(file)


def _autoencoder_content(file: Path) -> dict[str, Any]:
    loaded = ConceptAutoencoder.load(file)
    return {**loaded.state_dict(), "config": loaded.config(), "layer": loaded.layer_name, "history": loaded.history}


class Format(NamedTuple):
    """How a file of some kind is made and read, the latter into plain values and tensors."""

    make: Callable[[Path], Path]
    read: Callable[[Path], dict[str, Any]]


FORMATS = {
    "Estimate": Format(lambda file: _estimate().save(file), lambda file: vars(Estimate.load(file))),
    "CausalEffectDetector": Format(lambda file: _detector().save(file), _detector_content),
    "ConceptAutoencoder": Format(_save_autoencoder, _autoencoder_content),
    "checkpoint": Format(_save_checkpoint, lambda file: dict(load(file, "checkpoint", 1))),
}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same and bool(((one == other) | (one != one) & (other != other)).all())
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


@pytest.fixture(scope="module", params=FORMATS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind and a file of it."""
    return request.param, FORMATS[request.param].make(tmp_path_factory.mktemp("saved") / "file.pt")


def _flip_bits(kind: str, file: Path, damaged: Path, n: int) -> None:
    whole, draw, read = file.read_bytes(), random.Random(0), FORMATS[kind].read
    for _ in range(n):
        place, content = draw.randrange(8 * len(whole)), bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        damaged.write_bytes(content)
        with pytest.raises(FileError, match="Expected argument `path` to be a"):
            read(damaged)


def test_a_flipped_bit_is_found(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, file = saved
    assert _equal(FORMATS[kind].read(file), FORMATS[kind].read(file))
    _flip_bits(kind, file, tmp_path / "damaged", 100)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_found(saved: tuple[str, Path], tmp_path: Path) -> None:
    _flip_bits(*saved, tmp_path / "damaged", 1000)


def test_what_is_cut_off_or_longer_is_found(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, file = saved
    whole, draw, damaged = file.read_bytes(), random.Random(1), tmp_path / "damaged"
    lengths = [0, 1, 16, 17, 80, 81, 82, 83, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(30))]
    place = draw.randrange(len(whole) - 512)
    for content in (
        *(whole[:length] for length in lengths),
        *(whole + b"\0", whole + whole),
        whole[:place] + 512 * b"\xaa" + whole[place + 512 :],
    ):
        damaged.write_bytes(content)
        with pytest.raises(FileError, match="Expected argument `path` to be a"):
            FORMATS[kind].read(damaged)


def test_a_missing_part_is_named(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, file = saved
    content = dict(load(file, kind, 1))
    assert len(content) > 4
    if kind == "checkpoint":
        read: Callable[[Path], object] = lambda file: train_autoencoder(  # noqa: E731
            _network(), "1", torch.rand(20, 1, 8, 8), concepts=2, epochs=2, checkpoint=file
        )
    else:
        read = FORMATS[kind].read
    unused = {"versions"} | {name for name in content if name.startswith("state.")}
    absent = {"smoothed", "class_names", "pictures", "answer"}  # from the files of 0.3
    for name in content.keys() - unused - absent:
        part = save(tmp_path / "part", kind, 1, {k: v for k, v in content.items() if k != name}, force=True)
        with pytest.raises(FileError, match=rf"which lacks its part '{name}'"):
            read(part)
    for name in content.keys() & unused - {"versions"}:
        part = save(tmp_path / "part", kind, 1, {k: v for k, v in content.items() if k != name}, force=True)
        with pytest.raises(FileError, match="does not fit together"):
            read(part)


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    content = dict(load(_estimate().save(tmp_path / "a"), "Estimate", 1))
    for changes, message in (
        ({"std_error": torch.rand(2, 3, 3)}, r"`std_error` is of shape \(2, 3, 3\), and C is 4 elsewhere"),
        ({"std_error": torch.rand(2, 3)}, r"`std_error` is not of shape \(N, U, C\)"),
        ({"effect": torch.ones(2, 3, 4, dtype=torch.long)}, "`effect` is of type torch.int64"),
        ({"effect": "gone"}, r"`effect` is not of shape"),
        ({"effect": None}, r"`effect` is not of shape"),
        ({"class_shape": [5]}, r"`class_shape` is \(5,\), and C is 4"),
        ({"class_shape": 4}, "not iterable"),
        ({"n_units": torch.tensor([3, 4])}, "`n_units` is outside of 0 to 3"),
        ({"unit_labels": ["a"]}, "`unit_labels` are too few"),
        ({"target": torch.tensor([1])}, "`target` is not one for each example"),
        ({"outcomes": torch.rand(2, 5, 4), "assignments": torch.rand(2, 6, 3) < 0.5}, "T is 6 elsewhere"),
    ):
        file = save(tmp_path / "b", "Estimate", 1, {**content, **changes}, force=True)
        with pytest.raises(FileError, match=rf"written by Estimate.save, but got .*does not fit together.*{message}"):
            Estimate.load(file)
    weights = dict(load(_save_autoencoder(tmp_path / "c"), "ConceptAutoencoder", 1))
    weights["state"] = {name: value[:1] for name, value in weights["state"].items()}
    with pytest.raises(FileError, match="does not fit together"):
        ConceptAutoencoder.load(save(tmp_path / "d", "ConceptAutoencoder", 1, weights))


def test_a_file_of_release_0_3_is_read_where_its_own_checksums_are_right(tmp_path: Path) -> None:
    estimate, file = _estimate(), tmp_path / "old.pt"
    values = dict(load(estimate.save(tmp_path / "new"), "Estimate", 1))
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    rest = json.dumps({name: value for name, value in values.items() if name not in tensors})
    torch.save({"format": "ce_plugin result", "kind": "Estimate", "tensors": tensors, "json": rest}, file)
    assert Estimate.load(file).equals(estimate)
    whole, draw, refused = file.read_bytes(), random.Random(2), 0
    for _ in range(200):
        place, content = draw.randrange(8 * len(whole)), bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        try:
            assert Estimate.load(file).equals(estimate)  # padding between the parts
        except FileError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("design", "options"),
    [
        (OneAtATime(), {}),
        (OneAtATime(), {"target": (0, 1, 2)}),
        (LeaveOneIn(), {}),
        (Joint.pairs([0, 1, 2]), {}),
        (RandomMask(0.5, n_trials=33), {"keep_trials": True}),
        (RandomMask(0.5, n_trials=64), {"keep_trials": True, "until": 0.01}),
    ],
)
def test_the_estimate_of_every_design_fits_together(tmp_path: Path, design: Any, options: dict[str, Any]) -> None:
    """Units of different numbers in the two examples, an output of several dimensions."""
    rows = torch.arange(8)[:, None].expand(8, 8)
    masks = torch.stack([rows // 2, rows // 3])[:, None]
    explainer = CausalEffect(nn.Conv2d(1, 2, 3, padding=1).eval(), PixelMask("zero"), design, outcome=None)
    estimate = explainer.estimate(torch.rand(2, 1, 8, 8), feature_mask=masks, **options)
    assert Estimate.load(estimate.save(tmp_path / "a")).equals(estimate)
    part = estimate[1:]
    assert Estimate.load(part.save(tmp_path / "b")).equals(part)


def test_a_file_of_a_later_format_says_so(tmp_path: Path) -> None:
    file = _estimate().save(tmp_path / "a")
    file.write_bytes(file.read_bytes().replace(b"ce_plugin file 2\n", b"ce_plugin file 3\n", 1))
    with pytest.raises(FileError, match=r"of a later format\. Read it with the release"):
        Estimate.load(file)


_FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@st.composite
def estimates(draw: st.DrawFn) -> Estimate:
    """Estimates of random shapes, values, types and texts."""
    n, units, classes = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))

    def tensor(*shape: int) -> torch.Tensor:
        size = int(torch.Size(shape).numel())
        return torch.tensor(draw(st.lists(_FLOATS, min_size=size, max_size=size))).to(dtype).reshape(shape)

    return Estimate(
        effect=tensor(n, units, classes),
        std_error=tensor(n, units, classes) if draw(st.booleans()) else None,
        reference=tensor(n, classes),
        class_shape=draw(st.sampled_from([(classes,), (1, classes), (classes, 1)])),
        n_units=torch.tensor(draw(st.lists(st.integers(0, units), min_size=n, max_size=n))),
        unit_labels=draw(st.lists(st.text(), min_size=units, max_size=units)),
        outcome=draw(st.text()),
        seed=draw(st.integers(-(2**70), 2**70)),
        cost=draw(_FLOATS.filter(lambda x: x == x)),
        settings=draw(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.booleans()))),
    )


@given(estimates(), st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_saved_comes_back_or_nothing_does(estimate: Estimate, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = estimate.save(Path(folder, "a"))
        assert Estimate.load(file).equals(estimate)
        whole = bytearray(file.read_bytes())
        first = data.draw(st.integers(0, len(whole) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=64))
        damaged = whole[:first] + patch + whole[first + len(patch) :]
        file.write_bytes(damaged)
        if damaged == whole:
            assert Estimate.load(file).equals(estimate)
        else:
            with pytest.raises(FileError):
                Estimate.load(file)


def test_a_part_of_a_tensor_is_saved_without_the_rest(tmp_path: Path) -> None:
    large = torch.rand(1000, 1000)
    file = save(tmp_path / "a", "Table", 1, {"x": large[:1], "y": large[:1].expand(3, 1000)})
    assert file.stat().st_size < 50_000
    loaded = load(file, "Table", 1)
    assert torch.equal(loaded["x"], large[:1])
    assert torch.equal(loaded["y"], large[:1].expand(3, 1000))


# --- writing


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_of_a_file_is_the_umask_s(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        file = _estimate().save(tmp_path / "a")
        write_files(tmp_path / "report", {"page.html": "<p>"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "report" / "page.html").stat().st_mode) == mode


def test_a_full_disk_is_said_and_leaves_what_was_whole(tmp_path: Path) -> None:
    """A limit on the size of files, which fails as a full disk does."""
    script = """
import resource, signal, sys, torch
from pathlib import Path
from ce_plugin.errors import FileError
from ce_plugin.files import save, write_files
folder = Path(sys.argv[1])
save(folder / "a", "Table", 1, {"x": torch.zeros(3)})
write_files(folder / "report", {"table.csv": "old", "page.html": "old"})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for write in (
    lambda: save(folder / "a", "Table", 1, {"x": torch.zeros(100_000)}, force=True),
    lambda: save(folder / "b", "Table", 1, {"x": torch.zeros(100_000)}),
    lambda: write_files(folder / "report", {"table.csv": "new", "page.html": "x" * 200_000}),
):
    try:
        write()
    except FileError as error:
        print(error)
"""
    shown = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout.count("a file that can be written, but got") == 3
    assert shown.stdout.count("Make room on the disk: what was there before is unchanged.") == 3
    assert torch.equal(load(tmp_path / "a", "Table", 1)["x"], torch.zeros(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "report"]
    assert {path.name: path.read_text() for path in (tmp_path / "report").iterdir()} == {
        "table.csv": "old",
        "page.html": "old",
    }


def test_an_error_of_the_last_moment_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"No space left on device\)\. Make room"):
        _estimate().save(tmp_path / "a")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_of_two_that_write_one_new_file_one_is_told(tmp_path: Path) -> None:
    def late() -> None:
        with written_whole(tmp_path / "a", replace=False) as stream:
            stream.write(b"late")
            (tmp_path / "a").write_bytes(b"first")

    with pytest.raises(FileError, match=r"a new file, but got .*which exists\. Pass force=True"):
        late()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"first")]


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    write_files(tmp_path, {"link": "text"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/null", tmp_path / "pipe", tmp_path / "far"):
        with pytest.raises(FileError, match="no regular file"):
            _estimate().save(place, force=True)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("name", ["x" * 250, "ä" * 125, "a\nb", "a b.pt", "\udcff.pt"])
def test_names_of_every_kind(tmp_path: Path, name: str) -> None:
    file = _estimate().save(tmp_path / name)
    assert Estimate.load(file).equals(_estimate())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_no_file_name_or_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for wrong in (None, 3, b"bytes", 1.5, "a\0b", ["a"]):
        for call in (Estimate.load, _estimate().save, ConceptAutoencoder.load, check_out):
            with pytest.raises(ArgumentError, match=r"to be a file name, a str or a pathlib\.Path, but got"):
                call(wrong)  # type: ignore[operator]
    for place, message in (
        (tmp_path, "the folder"),
        (tmp_path / "pipe", "a pipe or a device"),  # which would wait for ever
        ("/dev/zero", "a pipe or a device"),
        (tmp_path / "loop", "Too many levels"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "none", r"No such file or directory\)\. Check the spelling"),
        ("", "the folder|No such file"),
    ):
        with pytest.raises(FileError, match=rf"a file written by Estimate\.save, but got .*({message})"):
            Estimate.load(place)
    for place in (tmp_path / "no folder" / "a", tmp_path / ("x" * 300), tmp_path / "loop", tmp_path / "pipe" / "a"):
        with pytest.raises(FileError, match=r"(a file that can be written|a new file), but got"):
            _estimate().save(place)


# --- tables


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_no_cell_of_a_table_is_a_formula(rows: list[list[str]]) -> None:
    text = csv_text(["a", "b"], [[*row, -0.5] for row in rows])
    read = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert len(read) == len(rows)
    for cells, row in zip(read, rows, strict=True):
        assert cells[2] == "-0.5"
        for cell, said in zip(cells, row, strict=False):
            assert cell.removeprefix("'") == said.removeprefix("'")
            if cell.startswith(tuple("=+-@\t\r\n")):
                float(cell)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_a_formula_gets_an_apostrophe(start: str) -> None:
    (read,) = csv.reader(io.StringIO(csv_text([f"{start}cmd|' /C calc'!A0"], []), newline=""))
    assert read == [f"'{start}cmd|' /C calc'!A0"]


@pytest.mark.parametrize("suffix", TABLES)
def test_a_table_comes_back_from_every_suffix(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    table = data_frame(
        ["file", "class", "score", "unit"], [["a.png", 7, -0.5, "x"], ["b.png", None, None, 3], ["c", 1, 1.0, None]]
    )
    write_files(tmp_path, table_files({"scores": table}, suffix))
    file = tmp_path / f"scores.{suffix}"
    read = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}[suffix](file)
    assert [file.name for file in tmp_path.iterdir()] == [f"scores.{suffix}"]
    assert list(read) == ["file", "class", "score", "unit"]
    assert read["file"].tolist() == ["a.png", "b.png", "c"]
    assert read["class"].dropna().tolist() == [7, 1]
    assert read["score"].dropna().tolist() == [-0.5, 1.0]
    assert read["class"].isna().tolist() == read["score"].isna().tolist() == [False, True, False]
    assert read["unit"].dropna().map(str).tolist() == ["x", "3"]


def test_numbers_of_a_table_keep_all_their_digits() -> None:
    values = [1 / 3, -1e-300, 2.0**60, 0.1 + 0.2]
    table = pd.DataFrame({"number": values, "whole": [2**60, -1, 0, 7]})
    text = table_files({"a": table})["a.csv"]
    rows = list(csv.reader(io.StringIO(str(text))))[1:]
    assert [float(row[0]) for row in rows] == values
    assert [int(row[1]) for row in rows] == table["whole"].tolist()
    assert [row["number"] for row in json.loads(table_files({"a": table}, "json")["a.json"])] == values


def test_json_knows_no_infinity() -> None:
    text = table_files({"a": pd.DataFrame({"low": [float("-inf"), float("nan"), 1.0]})}, "json")["a.json"]
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == [{"low": None}, {"low": None}, {"low": 1}]


def test_only_text_gets_an_apostrophe() -> None:
    table = pd.DataFrame({"=name": ["+a", "-1"], "number": [-1.0, -2.5], "mixed": pd.Series([-3, "@b"], dtype=object)})
    assert table_files({"a": table})["a.csv"] == "'=name,number,mixed\n'+a,-1.0,-3\n-1,-2.5,'@b\n"
    assert json.loads(table_files({"a": table}, "json")["a.json"])[0] == {"=name": "+a", "number": -1.0, "mixed": -3}


def test_an_empty_table_has_its_columns() -> None:
    table = data_frame(["picture", "reason"], [])
    assert table_files({"a": table}) == {"a.csv": "picture,reason\n"}
    assert table_files({"a": table}, "json") == {"a.json": "[]\n"}


def test_a_suffix_that_no_table_has() -> None:
    with pytest.raises(UnknownNameError, match=r"`tables` to be one of 'csv', 'json', 'parquet', but got 'xlsx'"):
        check_tables("xlsx")


def test_parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ce_plugin.files.find_spec", lambda name: None)
    with pytest.raises(FileError, match=r"where pyarrow is not installed, but got 'parquet'. Install it: pip install"):
        table_files({"a": pd.DataFrame()}, "parquet")


def test_a_name_that_is_no_text_is_written_as_an_escape(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n.png")
    assert printable(name) == r"caf\xe9\n.png"
    assert printable("日本 é.png") == "日本 é.png"
    write_files(tmp_path, {"a.csv": csv_text(["file"], [[name]]), "a.json": {"file": name}})
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == 'file\n"caf\\udce9\n.png"\n'
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"file": name}


# --- reservations


def test_a_folder_is_made_at_the_start_and_removed_after_an_error_where_it_is_empty(tmp_path: Path) -> None:
    with reserved(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
    assert folder.is_dir()
    with pytest.raises(KeyboardInterrupt), reserved(tmp_path / "c" / "d"):
        raise KeyboardInterrupt
    assert not (tmp_path / "c").exists()
    with pytest.raises(FileError), reserved(tmp_path / "e") as folder:
        write_files(folder, {"kept": "", "no folder/a": ""})
    assert not (tmp_path / "e").exists()
    with pytest.raises(FileNotFoundError), reserved(tmp_path / "e") as folder:
        (folder / "kept").touch() or (folder / "none").read_text()
    assert (tmp_path / "e" / "kept").exists()
    with pytest.raises(ZeroDivisionError), reserved(tmp_path / "a" / "b", force=True) as folder:
        raise ZeroDivisionError
    assert folder.is_dir()  # which was there before


def test_a_file_is_made_at_the_start_and_removed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), reserved(tmp_path / "a", folder=False) as file:
        (tmp_path if file.exists() else file).read_text()
    assert not file.exists()
    with reserved(file, folder=False):
        file.write_text("mine")
    with pytest.raises(FileError, match="does not exist yet"), reserved(file, folder=False):
        pytest.fail("it was taken")
    with pytest.raises(ZeroDivisionError), reserved(file, folder=False, force=True):
        raise ZeroDivisionError
    assert file.read_text() == "mine"
    (tmp_path / "left by a run that was killed").touch()
    with reserved(tmp_path / "left by a run that was killed", folder=False):
        pass


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("force", [True, False])
def test_another_run_is_refused_while_one_is_on(tmp_path: Path, folder: bool, force: bool) -> None:
    place = tmp_path / "place"
    if force:
        place.mkdir() if folder else place.write_text("old")
    with reserved(place, folder=folder, force=force):
        for again in (True, False):
            wanted = "one that no other run writes to" if again or not folder else "a folder that does not exist yet"
            if not again and not folder and force:
                wanted = "a file that does not exist yet"
            with (
                pytest.raises(FileError, match=f"`out` to be {wanted}, but got"),
                reserved(place, folder=folder, force=again),
            ):
                pytest.fail("it was taken")
    with reserved(place, folder=folder, force=True):
        pass


def test_what_was_finished_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ce_plugin import files

    place, lock = tmp_path / "a", files._lock

    def late(*args: Any, **kwargs: Any) -> None:
        write_files(tmp_path, {"a": "finished by another run"})
        lock(*args, **kwargs)

    monkeypatch.setattr(files, "_lock", late)
    with pytest.raises(FileError, match="no other run"), reserved(place, folder=False):
        pytest.fail("it was taken")
    assert place.read_text() == "finished by another run"


@pytest.mark.parametrize("folder", [True, False])
def test_what_cannot_be_made_is_said_before_the_work(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    places = ["/proc/x", tmp_path / ("x" * 300), tmp_path / "loop", tmp_path / "file" / "x", tmp_path / "pipe"]
    for place in places:
        with pytest.raises(FileError, match="Expected argument `out` to be a f"), reserved(place, folder=folder):
            pytest.fail("it was taken")


def test_the_limit_of_open_files_is_no_limit_of_pages(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 100
    write_files(tmp_path, {f"{i}.txt": "text" for i in range(50)})
    assert len(list(tmp_path.iterdir())) == 50
