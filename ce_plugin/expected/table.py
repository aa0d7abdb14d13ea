"""A table of effects on disk: shards of rows, and the questions that are asked of it without the network."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from ce_plugin.errors import (
    ArgumentError,
    FileError,
    InputError,
    TargetError,
    check_integer,
    check_number,
    expected,
    unknown_name,
)
from ce_plugin.expected.answer import EXPLAINED, ExpectedEstimate, answered, shown_classes
from ce_plugin.expected.moments import merged, moments_of
from ce_plugin.files import path_of, write_files, written_whole
from ce_plugin.randomness import numpy_generator

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Target: TypeAlias = "int | Sequence[int] | Literal['explained', 'all']"

_FORMAT, _VERSION = "ce_plugin effects", 1
_MANIFEST, _ROWS = "manifest.json", "rows"
_KEY = b"ce_plugin"
_META = ("id", "evidence", "path", "label", "explained", "predicted")
# Numbers that a bootstrap may hold at a time.
_LARGEST = 1 << 28


@dataclass(frozen=True)
class Subset:
    """Some of the images of a table; what is None does not matter.

    Args:
        correct: whether the network's answer without evidence is the label.
        label: of this class.
        explained: to which the network answers this class, without evidence.
        ids: these.

    Example:
        >>> Subset(correct=True, label=3)
        Subset(correct=True, label=3, explained=None, ids=None)
    """

    correct: bool | None = None
    label: int | None = None
    explained: int | None = None
    ids: Sequence[int] | None = None

    def mask(self, ids: np.ndarray[Any, Any], label: np.ndarray[Any, Any], explained: np.ndarray[Any, Any]) -> Any:
        """Which images, bool (n,); labels are NaN where there are none."""
        keep = np.ones(len(ids), dtype=bool)
        if self.correct is not None:
            keep &= ~np.isnan(label) & ((label == explained) == self.correct)
        if self.label is not None:
            keep &= label == self.label
        if self.explained is not None:
            keep &= explained == self.explained
        if self.ids is not None:
            keep &= np.isin(ids, np.asarray(list(self.ids), dtype=np.int64))
        return keep


class Question(TypedDict, total=False):
    """What is asked of a table; see :meth:`EffectTable.expected`."""

    outcome: str | None
    target: Target
    evidences: Sequence[str] | None
    subset: Subset | None
    reading: Literal["A", "B"]


class EffectTable:
    """The effects of many images, one row for each image and evidence, and the answers that they hold.

    Args:
        folder: a run's folder: ``manifest.json``, and ``rows/`` with Parquet files, which pandas reads too.

    Attributes:
        configuration: what made the rows.
        evidences: names, in order.
        outcomes: names, in order.
        unit_labels: names of the U units.
        classes: which are stored: "explained", "all" or a tuple of indices.
        skipped: id -> why, of the images that the last run could not read.

    Raises:
        FileError: no such run; a shard is damaged or was made by another configuration, which is shown; an image is
            in two shards.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from ce_plugin import LayerCausalEffect
        >>> from ce_plugin.expected import Sample, run
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> data = [Sample(x, int(x.sum() > 0)) for x in torch.randn(20, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = run(LayerCausalEffect(net, "1", outcome="log_odds"), data, folder + "/effects")
        ...     table = EffectTable(folder + "/effects")
        ...     answer = table.expected("log_odds", subset=Subset(label=1))
        >>> answer.effect.shape, answer.classes
        (torch.Size([1, 4, 1]), ('explained',))
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        check_pyarrow()
        self.folder = path_of(folder, "folder")
        content = _manifest(self.folder)
        self.configuration: dict[str, Any] = content["configuration"]
        self.about: dict[str, Any] = content["about"]
        self.evidences = tuple(self.configuration["given"])
        self.outcomes = tuple(self.configuration["outcomes"])
        self.unit_labels: list[str] = self.about["unit_labels"]
        stored = self.configuration["classes"]
        self.classes: str | tuple[int, ...] = stored if isinstance(stored, str) else tuple(stored)
        self.skipped: dict[int, str] = {}
        self._meta = self._read_meta()

    @classmethod
    def created(cls, folder: Path, configuration: dict[str, Any], about: dict[str, Any]) -> EffectTable:
        """The table in a folder, made if there is none yet.

        Raises:
            FileError: there is one, and another configuration made it.
        """
        if (folder / _MANIFEST).exists():
            _check_same(_manifest(folder)["configuration"], configuration, folder)
        else:
            content = {"format": _FORMAT, "version": _VERSION, "configuration": configuration, "about": about}
            (folder / _ROWS).mkdir(parents=True, exist_ok=True)
            write_files(folder, {_MANIFEST: content})
        return cls(folder)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def __repr__(self) -> str:
        units, what = len(self.unit_labels), ", ".join(self.outcomes)
        return f"EffectTable({len(self):,} images x {', '.join(self.evidences)}; {units} units; {what})"

    @property
    def ids(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Ids of the images, sorted, int64 (n,)."""
        found: np.ndarray[Any, np.dtype[np.int64]] = self._meta["id"]
        return found

    def missing(self, ids: Sequence[int]) -> list[int]:
        """Which of these images have no rows yet, in their order."""
        have = set(self.ids.tolist())
        return [i for i in ids if i not in have]

    def images(self) -> pd.DataFrame:
        """A frame with one row for each image and evidence, without the effects: id, evidence, path, label,
        explained, predicted, and the hash of the attacked image.
        """
        import pandas as pd

        columns = [*_META, "image_sha256"]
        frames: list[pd.DataFrame] = [_read(shard, columns).to_pandas() for shard in self._shards()]
        if not frames:
            frames = [pd.DataFrame(columns=columns)]
        every: pd.DataFrame = pd.concat(frames).sort_values(["id"], kind="stable").reset_index(drop=True)
        return every

    def expected(
        self,
        outcome: str | None = None,
        *,
        target: Target = EXPLAINED,  # type: ignore[assignment]
        evidences: Sequence[str] | None = None,
        subset: Subset | None = None,
        reading: Literal["A", "B"] = "A",
        weights: np.ndarray[Any, Any] | Tensor | None = None,
    ) -> ExpectedEstimate:
        """Expected effects, with intervals, p-values and paired differences over the images.

        Args:
            outcome: its name; None takes the first.
            target: "explained" (each image's own class), "all" that are stored, a class or several.
            evidences: names; None takes all.
            subset: of the images.
            reading: of the paper's columns. "A": effect of setting the unit, given the evidence. "B": effect of the
                evidence, given that the unit is set: the outcome under both, minus that of the unit alone; the
                reference is then the evidence's effect with no unit set. B needs an evidence that is none ("clean").
            weights: (n,), of the images in the order of :attr:`ids`, such as how often a bootstrap drew each.

        Raises:
            UnknownNameError: no such outcome or evidence.
            TargetError: a class that is not stored.
            InputError: no image is in the subset.
        """
        asked = self._asked(outcome, target, evidences, subset, reading)
        own = None if weights is None else torch.as_tensor(np.asarray(weights)).double()
        if own is not None and own.shape != (len(self),):
            raise ArgumentError(expected("weights", f"one for each of {len(self)} images", tuple(own.shape)))
        parts, acting = [], torch.zeros(())
        for rows, values in self._blocks(asked):
            weight = torch.ones(len(rows), dtype=torch.float64) if own is None else own[rows]
            parts.append(moments_of(values, asked.extras, weight))
            acting = acting + torch.einsum("n,neuc->euc", weight, (values[:, :, : -asked.extras] != 0).double())
        answer = self._answer(asked, merged(parts))
        return replace(answer, acting=acting / answer.n_images)

    def bootstrap_t(
        self, level: float = 0.95, *, n_resamples: int = 1999, seed: int = 0, **question: Unpack[Question]
    ) -> tuple[Tensor, Tensor]:
        """Bootstrap-t intervals (low, high), each (E, U, C): for sparse or skewed effects, where t intervals are short.

        The images are drawn again, with replacement: each draw is a set of weights on the rows. Of each the statistic
        t = (mean' - mean) / std_error' is computed; its quantiles take the place of those of t. Where more draws than
        1 - level are without any image on which the unit does anything, a bound is infinite: it is not known.

        Args:
            level: of the intervals.
            n_resamples: number of draws.
            seed: of the draws.
            question: as in :meth:`expected`.

        Source: Efron and Tibshirani 1993, chapter 12.
        """
        check_number("level", level, "in (0, 1)", above=0, below=1)
        check_integer("n_resamples", n_resamples, least=99)
        asked = self._asked(**question)
        blocks = [(rows, values) for rows, values in self._blocks(asked)]
        answer = self._answer(asked, merged([moments_of(values, asked.extras) for _, values in blocks]))
        if answer.std_error is None:
            raise InputError(expected("data", "two images or more", f"{answer.n_images:g}"))
        size = 2 * n_resamples * answer.effect.numel()
        if size > _LARGEST:
            hint = "Ask about fewer classes or evidences at a time, or draw less often."
            raise ArgumentError(expected("n_resamples", f"few enough for {_LARGEST:,} numbers", f"{size:,}", hint))
        first, second = _resampled(blocks, answer.effect, n_resamples, seed)
        return studentized(answer.effect, answer.std_error, first, second, int(answer.n_images), level)

    def values(self, **question: Unpack[Question]) -> tuple[np.ndarray[Any, Any], Tensor]:
        """Ids (n,) and effects (n, E, U, C) of single images, float32, for computations of one's own."""
        asked = self._asked(**question)
        found = [(self.ids[rows.numpy()], values[:, :, : -asked.extras]) for rows, values in self._blocks(asked)]
        if not found:
            raise InputError(expected("subset", "one image or more", "none"))
        return np.concatenate([ids for ids, _ in found]), torch.cat([values for _, values in found])

    def write(self, table: pa.Table, ids: Sequence[int]) -> Path:
        """Write the rows of some images as a shard, whole; the same ids again replace it."""
        return write_shard(self.folder, self.configuration, table, ids)

    # --- how questions are answered

    def _asked(
        self,
        outcome: str | None = None,
        target: Any = EXPLAINED,
        evidences: Sequence[str] | None = None,
        subset: Subset | None = None,
        reading: str = "A",
    ) -> _Asked:
        outcome = self.outcomes[0] if outcome is None else outcome
        if outcome not in self.outcomes:
            raise unknown_name("outcome", outcome, self.outcomes)
        names = self.evidences if evidences is None else tuple([evidences] if isinstance(evidences, str) else evidences)
        for name in names:
            if name not in self.evidences:
                raise unknown_name("evidence", name, self.evidences)
        if reading not in ("A", "B"):
            raise unknown_name("reading", reading, ("A", "B"))
        base = None
        if reading == "B":
            base = next((name for name, text in self.configuration["given"].items() if text == "none"), None)
            names = tuple(name for name in names if name != base)
            if base is None or not names or not self.about["per_class"][outcome]:
                wanted = "'A' where there is no clean evidence, no other one, or an outcome that is its own reference"
                raise ArgumentError(expected("reading", wanted, "'B'"))
        keep = np.ones(len(self), dtype=bool)
        if subset is not None:
            keep = subset.mask(self._meta["id"], self._meta["label"], self._meta["explained"])
        explained = self._meta["explained"]
        columns, labels = self._columns(outcome, target, explained[keep])
        extras = 2 if self.about["insertion"] else 1
        return _Asked(outcome, names, base, keep, columns, labels, extras, explained)

    def _columns(self, outcome: str, target: Any, explained: np.ndarray[Any, Any]) -> tuple[Any, list[int | str]]:
        """Which stored columns answer: None for all of them, a list, or for each class its column."""
        if not self.about["per_class"][outcome]:
            if target not in (EXPLAINED, "all"):
                raise TargetError(expected("target", f"left out: {outcome!r} is one number for all classes", target))
            return None, ["all classes"]
        n, stored = self.about["n_classes"], self.classes
        have: list[int] = list(range(n)) if stored == "all" or n == 1 else [] if stored == EXPLAINED else list(stored)  # type: ignore[arg-type]
        if target == "all" and have:
            return None, list(have)
        if target == EXPLAINED or (target == "all" and not have):
            if stored == EXPLAINED or n == 1:
                return None, [EXPLAINED]
            wanted, name = sorted(set(explained.tolist())), EXPLAINED
        else:
            wanted = [check_integer("target", one, "class indices, 'explained' or 'all'", error=TargetError)
                      for one in (target if isinstance(target, (list, tuple, range)) else [target])]  # fmt: skip
            name = ""
            if stored == EXPLAINED and n > 1:
                if len(wanted) == 1 and bool((explained == wanted[0]).all()):
                    return None, wanted  # of images that are explained by this class
                raise self._not_stored(wanted[0], "each image's explained class only")
        lacking = [c for c in wanted if c not in have]
        if lacking:
            raise self._not_stored(lacking[0], shown_classes(have))
        if name:
            return {c: have.index(c) for c in wanted}, [EXPLAINED]
        return [have.index(c) for c in wanted], wanted

    def _not_stored(self, target: int, have: str) -> TargetError:
        hint = "Run again with classes='all' or a list that holds it, in a new folder."
        return TargetError(expected("target", f"a class that the table has ({have})", target, hint))

    def _blocks(self, asked: _Asked) -> Iterator[tuple[Tensor, Tensor]]:
        """Shard by shard the place of each kept image in :attr:`ids`, and its values (n, E, S, C)."""
        kinds = ("effect", "outcome", *(["insertion"] if asked.extras == 2 else []))
        needed = ["id", "evidence", *(f"{kind}_{asked.outcome}" for kind in kinds)]
        order = [*asked.evidences, *([asked.base] if asked.base else [])]
        for shard in self._shards():
            table = _read(shard, needed)
            name = table["evidence"].to_numpy(zero_copy_only=False)
            number = table["id"].to_numpy()
            series = torch.cat([self._stored(table, kind, asked) for kind in kinds], 1)
            parts = []
            for evidence in order:
                own = np.flatnonzero(name == evidence)
                own = own[np.argsort(number[own], kind="stable")]
                ids = number[own]
                parts.append(series[torch.from_numpy(own)])
            rows = np.searchsorted(self.ids, ids)
            kept = torch.from_numpy(np.flatnonzero(asked.keep[rows]))
            if not len(kept):
                continue
            rows = rows[kept.numpy()]
            values = _chosen(torch.stack(parts, 1)[kept], asked.columns, asked.explained[rows])
            yield torch.from_numpy(rows), values if asked.base is None else _reading_b(values, asked.extras)

    def _stored(self, table: pa.Table, kind: str, asked: _Asked) -> Tensor:
        """Effects (n, U, C), or one outcome, (n, 1, C)."""
        column = table[f"{kind}_{asked.outcome}"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        units = len(self.unit_labels) if kind == "effect" else 1
        return torch.from_numpy(np.array(flat, dtype=np.float32)).reshape(len(table), units, -1)

    def _answer(self, asked: _Asked, moments: Any) -> ExpectedEstimate:
        return answered(
            moments,
            asked.evidences,
            asked.labels,
            outcome=asked.outcome,
            unit_labels=self.unit_labels,
            seed=self.configuration["seed"],
            settings={"reading": "A" if asked.base is None else "B"},
            **{name: self.about[name] for name in ("design", "intervention", "site")},
        )

    # --- shards

    def _shards(self) -> list[Path]:
        """Files of rows, in the order of their first ids."""
        return sorted((self.folder / _ROWS).glob("[0-9]*.parquet"))

    def _read_meta(self) -> dict[str, Any]:
        """Id, label and explained class of every image, sorted by id."""
        parts: list[tuple[Any, Any, Any]] = []
        for shard in self._shards():
            table = _read(shard, ["id", "evidence", "label", "explained"], self.configuration)
            first = table["evidence"].to_numpy(zero_copy_only=False) == self.evidences[0]
            label = table["label"].to_numpy(zero_copy_only=False).astype(np.float64)
            parts.append((table["id"].to_numpy()[first], label[first], table["explained"].to_numpy()[first]))
        if not parts:
            return {"id": np.empty(0, np.int64), "label": np.empty(0), "explained": np.empty(0, np.int32)}
        ids, label, explained = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        if bool((ids[1:] == ids[:-1]).any()):
            twice = int(ids[1:][ids[1:] == ids[:-1]][0])
            hint = "Remove one of the shards that hold it from its folder."
            raise FileError(expected("folder", "one with each image once", f"image {twice} in several shards", hint))
        return {"id": ids, "label": label[order], "explained": explained[order]}


@dataclass(frozen=True)
class _Asked:
    """A question, checked and resolved.

    Attributes:
        outcome: its name.
        evidences: names of the rows of the answer.
        base: the evidence that is none, for reading B; else None.
        keep: which images, bool (n,).
        columns: which of the stored columns: None for all, a list, or the column of each class.
        labels: of the columns of the answer.
        extras: series beside the units.
        explained: (n,), each image's explained class.
    """

    outcome: str
    evidences: tuple[str, ...]
    base: str | None
    keep: np.ndarray[Any, Any]
    columns: Any
    labels: list[int | str]
    extras: int
    explained: np.ndarray[Any, Any]


def check_pyarrow() -> None:
    """That pyarrow is installed.

    Raises:
        ArgumentError: it is not.
    """
    if importlib.util.find_spec("pyarrow") is None:
        hint = "Install it: pip install 'ce-plugin[data]'"
        raise ArgumentError(expected("ce_plugin.expected", "used with pyarrow installed", "none", hint))


def write_shard(folder: Path, configuration: dict[str, Any], table: pa.Table, ids: Sequence[int]) -> Path:
    """Write the rows of some images; the shard appears when it is complete, and is named by its ids.

    Raises:
        FileError: it cannot be written.
    """
    import hashlib

    import pyarrow.parquet as pq

    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=4).hexdigest()
    file = folder / _ROWS / f"{min(ids):010d}-{max(ids):010d}-{digest}.parquet"
    stamped = table.replace_schema_metadata({_KEY: json.dumps(configuration).encode()})
    with written_whole(file) as stream:
        pq.write_table(stamped, stream, compression="zstd", use_dictionary=["evidence"])
    return file


def studentized(
    mean: Tensor, error: Tensor, first: Tensor, second: Tensor, n: int, level: float
) -> tuple[Tensor, Tensor]:
    """Bootstrap-t intervals from the first and second moments of draws, about the mean.

    Args:
        mean, error: of the images, any shape.
        first: (R, ...), mean of each draw minus ``mean``.
        second: (R, ...), mean square of each draw about ``mean``.
        n: images in a draw.
        level: of the intervals.

    Example:
        >>> zero = torch.zeros(99, 1)
        >>> studentized(torch.zeros(1), torch.zeros(1), zero, zero, 10, 0.95)
        (tensor([0.]), tensor([0.]))
    """
    own = ((second - first.square()).clamp(min=0) / (n - 1)).sqrt()
    # Rounding of a constant is no spread.
    own = own.where(own > 1e-9 * error, 0.0)
    t = (first / own).where((own > 0) | (first.abs() > 1e-9 * error), 0.0).sort(dim=0).values
    tail = max(1, round((len(t) + 1) * (1 - level) / 2))
    low, high = t[tail - 1], t[len(t) - tail]
    # Where nothing varies there is nothing to multiply.
    spread = error > 0
    return mean - (high * error).where(spread, 0.0), mean - (low * error).where(spread, 0.0)


def _resampled(blocks: list[tuple[Tensor, Tensor]], mean: Tensor, n_resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """First and second moments about the mean of draws with replacement, (R, E, U, C) each."""
    n = sum(len(rows) for rows, _ in blocks)
    draws = numpy_generator(seed, "bootstrap").multinomial(n, np.full(n, 1 / n), size=n_resamples)
    weights = torch.from_numpy(draws).double()
    first = torch.zeros(n_resamples, mean.numel(), dtype=torch.float64)
    second, place, units = torch.zeros_like(first), 0, mean.shape[1]
    for rows, values in blocks:
        apart = (values[:, :, :units].double() - mean).reshape(len(rows), -1)
        own = weights[:, place : place + len(rows)]
        first += own @ apart / n
        second += own @ apart.square() / n
        place += len(rows)
    return first.reshape(-1, *mean.shape), second.reshape(-1, *mean.shape)


def _chosen(values: Tensor, columns: Any, explained: np.ndarray[Any, Any]) -> Tensor:
    """The columns that answer, of values (n, E, S, C)."""
    if columns is None:
        return values
    if isinstance(columns, list):
        return values[..., columns]
    own = torch.tensor([columns[int(c)] for c in explained])
    return values.gather(3, own.reshape(-1, 1, 1, 1).expand(*values.shape[:3], 1))


def _reading_b(values: Tensor, extras: int) -> Tensor:
    """The evidence's effect given that a unit is set, from (n, E + 1, S, C), the last of which is without evidence."""
    units = values.shape[2] - extras
    under_do = torch.cat([values[:, :, :units] + values[:, :, units : units + 1], values[:, :, units:]], 2)
    return under_do[:, :-1] - under_do[:, -1:]


def _manifest(folder: Path) -> dict[str, Any]:
    """What a run's manifest says.

    Raises:
        FileError: there is none, or it is no run's.
    """
    wanted = "the folder of a run of `ce-plugin expected` or `ce_plugin.expected.run`"
    file = folder / _MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = content.get("format") == _FORMAT
        version = content.get("version")
    except (OSError, ValueError, AttributeError) as error:
        raise FileError(expected("folder", wanted, f"{str(folder)!r} ({type(error).__name__})")) from error
    if not known:
        raise FileError(expected("folder", wanted, f"{str(folder)!r}, whose manifest is another's"))
    if version != _VERSION:
        hint = "Read it with the release of ce_plugin that wrote it."
        raise FileError(expected("folder", f"{wanted}, version {_VERSION}", f"version {version}", hint))
    found: dict[str, Any] = content
    return found


def _read(shard: Path, columns: list[str], configuration: dict[str, Any] | None = None) -> pa.Table:
    """Columns of a shard.

    Raises:
        FileError: it is damaged, or another configuration made it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard) as file:
            made = json.loads((file.schema_arrow.metadata or {}).get(_KEY, b"{}"))
            if configuration is not None:
                _check_same(made, configuration, shard)
            return file.read(columns=columns)
    except FileError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        hint = "Remove it and resume the run: its images are done again."
        raise FileError(expected("folder", "one of whole shards", f"{shard.name!r}, which is damaged", hint)) from error


def _check_same(there: dict[str, Any], wanted: dict[str, Any], place: Path) -> None:
    """That what is there was made by the same configuration.

    Raises:
        FileError: it was not; the difference is shown.
    """
    differs = differences(there, wanted)
    if differs:
        hint = "Choose another folder, or run with what made it."
        raise FileError(
            expected("out", "made by the same configuration", f"{str(place)!r}: {'; '.join(differs)}", hint)
        )


def differences(there: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """In which entries two configurations differ, as text.

    Example:
        >>> differences({"seed": 0, "given": {"a": "x"}}, {"seed": 1, "given": {"a": "x"}})
        ['seed is 0 there and 1 here']
    """
    found = []
    for key in dict.fromkeys([*there, *wanted]):
        mine, own = there.get(key), wanted.get(key)
        if isinstance(mine, dict) and isinstance(own, dict):
            found += differences(mine, own, f"{prefix}{key}.")
        elif mine != own:
            found.append(f"{prefix}{key} is {mine!r} there and {own!r} here")
    return found
