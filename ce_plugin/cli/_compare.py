"""``ce-plugin compare``: attribution methods beside each other on pictures of a data set."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ce_plugin.cli._commands import CompareOptions
from ce_plugin.cli._session import manifest, network, progress, say, table
from ce_plugin.datasets import ImageSource, open_source
from ce_plugin.errors import ArgumentError, FileError, InputError, expected, unknown_name
from ce_plugin.evaluation import MEASURES, METHODS, Case, Comparison, Scene, compare
from ce_plugin.files import printable
from ce_plugin.models import VisionModel
from ce_plugin.networks.layers import fingerprint
from ce_plugin.randomness import generator
from ce_plugin.report import ComparisonStudy, file_sha256, save_comparison

_LIBRARY = ("ablation-cam", "score-cam")
_BASELINES = ("random", "centre")
_MEASURES = ("faithfulness", "pointing")
RECORDS = "records.jsonl"


def run(options: CompareOptions, argv: Sequence[str]) -> dict[str, str]:
    """Judge the methods, write tables and a page; returns the pictures that could not be read, and why."""
    methods, measures = _methods(options), _chosen("measures", options.measures, _MEASURES, MEASURES)
    if ("boxes" in measures) != (options.boxes is not None):
        wanted = "a table of boxes where boxes are among the measures, and only there"
        raise ArgumentError(expected("boxes", wanted, f"{options.boxes} with {', '.join(measures)}"))
    source = open_source(options.data, root=options.root, labels=False)
    net = network(options)
    boxes = {} if options.boxes is None else _boxes(options.boxes)
    pictures = _Pictures(source, net, options, boxes, max(MEASURES[name].needs for name in measures))
    if options.measures is None and pictures.answers(pictures.needs + 1) <= pictures.needs:
        few = f"fewer than {pictures.needs + 1} different answers"
        sys.stderr.write(f"ce-plugin: note: the pictures have {few}: the measure pointing is left out\n")
        measures.remove("pointing")
        pictures.needs = max(MEASURES[name].needs for name in measures)
    kept = options.out / RECORDS
    if options.force and not options.resume:
        kept.unlink(missing_ok=True)
    made_with = {
        "network": fingerprint(net.model, exact=True),
        "pictures": source.fingerprint,
        "prepared": f"{net.framing}, {net.normalization}, {net.value_range}, gray {net.grayscale}",
        "outcome": options.outcome,
        "seed": options.seed,
        "boxes": None if options.boxes is None else file_sha256(options.boxes),
    }
    total = (options.images + options.planted) * len({*methods, *_BASELINES})
    with progress(total, quiet=options.quiet) as step:
        found = compare(
            pictures, methods, measures, passes=options.passes, kept=kept, made_with=made_with,
            planted=options.planted, step=step,
        )  # fmt: skip
    inputs = {**made_with, "unreadable": pictures.unreadable}
    study = ComparisonStudy(found, net.name, source.fingerprint, options.passes, tuple(measures))
    page = save_comparison(study, options.out, manifest=manifest(options, argv, net, inputs), tables=options.tables)
    say(_shown(found), quiet=options.quiet)
    say(f"Comparison: {page.absolute()}")
    return pictures.unreadable


def _methods(options: CompareOptions) -> list[str]:
    """The names of the methods; the libraries that they need are there."""
    default = [name for name in METHODS if name not in (*_LIBRARY, *_BASELINES)]
    chosen = _chosen("methods", options.methods, default, METHODS)
    needed = [name for name in chosen if name in _LIBRARY]
    if needed and importlib.util.find_spec("pytorch_grad_cam") is None:
        hint = 'Install it: pip install "ce-plugin[compare]", or leave these methods out.'
        raise ArgumentError(expected("methods", "installed ones", f"{', '.join(needed)} of pytorch-grad-cam", hint))
    return chosen


def _chosen(option: str, given: tuple[str, ...] | None, default: Sequence[str], known: Any) -> list[str]:
    """The names of an option; "all" is all that there are (boxes must be given)."""
    if given is None:
        return list(default)
    if given == ("all",):
        return [name for name in known if name not in ("boxes", *_BASELINES)]
    for name in given:
        if name not in known:
            raise unknown_name(option, name, [*known, "all"])
    return list(given)


@dataclass
class _Pictures:
    """The first pictures of a random order that can be read, as cases, with those that follow as the others.

    Attributes:
        unreadable: those passed over, and why.
    """

    source: ImageSource
    net: VisionModel
    options: CompareOptions
    boxes: dict[str, list[tuple[float, float, float, float]]]
    needs: int
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = generator(self.options.seed, "compare")
        self.order = torch.randperm(len(self.source), generator=draw).tolist()
        self._seen: dict[int, tuple[Tensor, int] | None] = {}

    def __iter__(self) -> Iterator[Case]:
        made = 0
        for place, index in enumerate(self.order):
            seen = self._read(index)
            if made == self.options.images:
                return
            if seen is None:
                continue
            x, answer = seen
            net = self.net
            scene = Scene(x, answer, net.model, net.normalization, index, self.options.outcome)
            yield Case(scene, self.source.paths[index], self._others(place, answer), self._mask(index), net.value_range)
            self._seen.pop(index)  # earlier ones are not needed again, except at the end of the order
            made += 1

    def answers(self, most: int) -> int:
        """How many different answers the pictures have, counted up to so many."""
        found: set[int] = set()
        for index in self.order:
            seen = self._read(index)
            if seen is not None:
                found.add(seen[1])
            if len(found) == most:
                break
        return len(found)

    def _read(self, index: int) -> tuple[Tensor, int] | None:
        """A picture as the network takes it, with its answer; None if it cannot be read."""
        if index not in self._seen:
            name = self.source.paths[index]
            try:
                image, _ = self.source.item(index)
                x = self.net.inputs([image]) if image.dtype == torch.uint8 else image[None].to(self.net.device)
                with torch.no_grad():
                    logits = self.net.model(x)
                self._seen[index] = x, int(logits[0].argmax())
            except (FileError, InputError) as error:
                if self.options.strict:
                    raise
                if name not in self.unreadable:
                    sys.stderr.write(f"ce-plugin: warning: left out: {name}: {error}\n")
                self.unreadable[name] = printable(error)
                self._seen[index] = None
        return self._seen[index]

    def _others(self, place: int, answer: int) -> Tensor | None:
        """Those that follow in the order: the next one, or as many as are needed of different answers."""
        if not self.needs:
            return None
        found: list[Tensor] = []
        answers = {answer}
        for index in [*self.order[place + 1 :], *self.order[:place]]:
            seen = self._read(index)
            if seen is not None and (self.needs == 1 or seen[1] not in answers):
                found.append(seen[0][0])
                answers.add(seen[1])
                if len(found) == self.needs:
                    return torch.stack(found)
        hint = "Name more pictures" + (", or leave out the measure pointing." if self.needs > 1 else ".")
        wanted = f"pictures of {self.needs + 1} different answers" if self.needs > 1 else "two pictures or more"
        raise ArgumentError(expected("data", wanted, f"{len(found) + 1}", hint))

    def _mask(self, index: int) -> Tensor | None:
        """The boxes of a picture, framed as the picture is."""
        name = self.source.paths[index]
        own = self.boxes.get(name) or self.boxes.get(Path(name).name)
        if own is None:
            return None
        image, _ = self.source.item(index)
        drawn = torch.zeros_like(image)
        for x, y, width, height in own:
            drawn[:, round(y) : round(y + height), round(x) : round(x + width)] = 255
        mask = self.net.framing(drawn)[0] > 127
        return mask if bool(mask.any()) else None


def _boxes(file: Path) -> dict[str, list[tuple[float, float, float, float]]]:
    """File -> boxes, of a table."""
    from ce_plugin.datasets.labelled import table as rows_of

    columns = ("x", "y", "width", "height")
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for number, row in enumerate(rows_of(file, ("file", *columns)), 2):
        try:
            x, y, width, height = (float(row[name]) for name in columns)
        except ValueError:
            raise FileError(expected("boxes", "four numbers in each row", f"line {number}: {row}")) from None
        if not (x >= 0 and y >= 0 and width > 0 and height > 0):
            raise FileError(expected("boxes", "boxes inside pictures", f"line {number}: {row}"))
        found.setdefault(row["file"], []).append((x, y, width, height))
    return found


def _shown(found: Comparison) -> str:
    """The table for the terminal."""
    parts = []
    for name, rows in found.table().groupby("measure", sort=False):
        lines = [
            [row.method, str(row.images), f"{row.mean:.4g}", _span(row.mean_low, row.mean_high), *_gap(row)]
            for row in rows.itertuples()
        ]
        better = rows["better"].iloc[0]
        head = f"{name}{f' ({better} is better)' if better else ''}"
        parts.append(table([head, "n", "mean", "95 %", "difference", "95 %"], lines))
    return "\n\n".join(parts)


def _gap(row: Any) -> list[str]:
    if row.difference != row.difference:
        return ["", ""]
    return [f"{row.difference:+.3g}", _span(row.difference_low, row.difference_high)]


def _span(low: float, high: float) -> str:
    return "" if low != low else f"{low:.3g} to {high:.3g}"
