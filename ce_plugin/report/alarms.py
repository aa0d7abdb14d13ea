"""The page of alarms: what a detector says of pictures, and why it flags some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ce_plugin.files import data_frame, table_files
from ce_plugin.models import VisionModel
from ce_plugin.report.sections import Section, cell, save_page
from ce_plugin.visualization import data_uri, magnify, overlay, plot_scores

if TYPE_CHECKING:
    from ce_plugin.detection import Alarm, Calibration, CausalEffectDetector

# A page of thousands of rows is not read; the table beside it has them all.
_ROWS = 100
_DEVIATIONS, _EFFECTS = 5, 4


@dataclass(frozen=True)
class Screened:
    """What the detector says of one picture.

    Attributes:
        name: of the picture.
        score: greater is more adversarial.
        p_value: conformal: the share of clean pictures that score at least as high.
        flagged: whether the score is above the threshold.
        predicted: the network's answer.
        deviations: name of a probe or intervention -> its standardised distance from clean pictures.
    """

    name: str
    score: float
    p_value: float
    flagged: bool
    predicted: int
    deviations: Mapping[str, float]


@dataclass(frozen=True)
class AlarmShown:
    """One picture as a page shows it.

    Attributes:
        name: of the picture.
        picture: (C, H, W), values in [0, 1].
        screened: what the detector says of it.
        alarm: why it was flagged; None where it was not.
        before: the picture before the attack, where it was attacked here.
        truth: the class that it had then.
    """

    name: str
    picture: Tensor
    screened: Screened
    alarm: Alarm | None
    before: Tensor | None = None
    truth: int | None = None


@dataclass(frozen=True)
class Screening:
    """What a detector says of many pictures.

    Attributes:
        rows: one for each picture, in the order given.
        shown: the flagged ones with the highest scores, explained.
        calibration: the scores that set the threshold.
        threshold: scores above it are flagged.
        fpr: share of clean pictures that the threshold was set to flag.
        unreadable: names of pictures that could not be read, and why.
    """

    rows: tuple[Screened, ...]
    shown: tuple[AlarmShown, ...]
    calibration: Calibration
    threshold: float
    fpr: float
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def flagged(self) -> list[Screened]:
        """The pictures above the threshold, the highest score first."""
        return sorted((row for row in self.rows if row.flagged), key=lambda row: -row.score)


def screen(
    detector: CausalEffectDetector,
    names: Sequence[str],
    batches: Callable[[int, int], Tensor],
    *,
    batch_size: int = 32,
    n_shown: int = 12,
    layer: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Screening:
    """Score pictures, a few at a time, and explain the alarms with the highest scores.

    Args:
        detector: a fitted one.
        names: one for each picture.
        batches: (start, stop) -> these pictures, (n, C, H, W), image units; asked again for what is explained.
        batch_size: pictures at a time.
        n_shown: alarms that are explained.
        layer: dotted name of a layer whose channels the explanations name.
        progress: called with the name of each step.

    Raises:
        CEPluginError: see :meth:`~ce_plugin.detection.CausalEffectDetector.detect`.

    Example:
        >>> import torch
        >>> from ce_plugin.detection import CausalEffectDetector, CounterAttack, Signature
        >>> images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> detector = CausalEffectDetector(network, Signature([CounterAttack()]))
        >>> detector.fit(images[:250])
        >>> found = screen(detector, [f"{i}.png" for i in range(50)], lambda start, stop: images[250:][start:stop])
        >>> len(found.rows), sum(row.flagged for row in found.rows) == len(found.shown)
        (50, True)
    """
    progress = progress or (lambda step: None)
    rows: list[Screened] = []
    for start in range(0, len(names), batch_size):
        progress("scoring")
        part = names[start : start + batch_size]
        rows += scored(detector, part, batches(start, start + len(part)), batch_size)
    order = sorted((i for i, row in enumerate(rows) if row.flagged), key=lambda i: -rows[i].score)
    shown = []
    for i in order[:n_shown]:
        progress("explaining")
        shown.append(explained(detector, rows[i], batches(i, i + 1), layer))
    calibration = detector.learned().calibration
    return Screening(tuple(rows), tuple(shown), calibration, detector.threshold, detector.fpr)


def scored(
    detector: CausalEffectDetector, names: Sequence[str], images: Tensor, batch_size: int = 128
) -> list[Screened]:
    """The rows of pictures (N, C, H, W)."""
    report, flags = detector.detect(images.numpy(), batch_size=batch_size)
    return [
        Screened(
            name,
            float(report["scores"][i]),
            float(report["p_values"][i]),
            bool(flags[i]),
            int(report["predictions"][i]),
            {probe: float(values[i]) for probe, values in report["groups"].items()},
        )
        for i, name in enumerate(names)
    ]


def explained(
    detector: CausalEffectDetector,
    row: Screened,
    image: Tensor,
    layer: str | None,
    before: Tensor | None = None,
    truth: int | None = None,
) -> AlarmShown:
    """A picture (1, C, H, W) with the reason for its alarm, where there was one; ``before`` is (C, H, W)."""
    low, high = detector.classifier.clip_values
    alarm: Alarm | None = None
    if row.flagged:
        report: dict[str, Any] = detector.detect(image.numpy(), explain=True, layer=layer)[0]
        alarm = report["explanations"][0]
    before = None if before is None else ((before - low) / (high - low)).cpu()
    return AlarmShown(row.name, ((image[0] - low) / (high - low)).cpu(), row, alarm, before, truth)


@dataclass(frozen=True)
class AlarmsSection(Section[Screening]):
    """The pictures that were flagged, and why the highest scores were."""

    class_name: Callable[[int], str]
    name, template = "alarms", "alarms.html.j2"

    def record(self, found: Screening) -> dict[str, Any]:
        """What was flagged, and the explanations as text."""
        return {
            "fpr": found.fpr,
            "threshold": found.threshold,
            "calibration_images": found.calibration.n,
            "pictures": len(found.rows),
            "unreadable": dict(found.unreadable),
            "flagged": [row.name for row in found.rows if row.flagged],
            "explained": {one.name: str(one.alarm) for one in found.shown},
        }

    def render(self, found: Screening) -> dict[str, Any]:
        """A table of the flagged pictures, and the explanations."""
        histogram = plot_scores(
            found.calibration.scores,
            found.threshold,
            {"these pictures": [row.score for row in found.rows]},
            title="Scores of clean pictures, and of these",
        )
        return {
            "found": found,
            "n_pictures": len(found.rows),
            "n_flagged": len(found.flagged),
            "histogram": data_uri(histogram),
            "alarms": [alarm_shown(one, self.class_name, found.calibration) for one in found.shown],
            "rows": found.flagged[:_ROWS],
            "class_name": self.class_name,
        }


def alarm_shown(
    shown: AlarmShown, class_name: Callable[[int], str], calibration: Calibration, attack: str = ""
) -> dict[str, Any]:
    """One picture for the template: what it is taken for, and why it raised the alarm."""
    row, alarm = shown.screened, shown.alarm
    said = f"answers “{class_name(row.predicted)}”"
    if shown.truth is not None:
        said = f"“{class_name(shown.truth)}” before, now {said}"
    turned = "" if alarm is None else _turned(alarm, row, class_name, calibration)
    most = sorted(row.deviations.items(), key=lambda one: -one[1])[:_DEVIATIONS]
    return {
        "attack": attack,
        "row": row,
        "said": said,
        "cells": _cells(shown),
        "turned": turned,
        "deviations": [(deviation_text(name), value) for name, value in most],
        "effects": [] if alarm is None else [one for one in alarm.effects if math.isfinite(one.deviations)][:_EFFECTS],
        "channels": {} if alarm is None else alarm.channels,
    }


def _turned(alarm: Alarm, row: Screened, class_name: Callable[[int], str], calibration: Calibration) -> str:
    """The alarm in a sentence: what was done, what it does to the answer, and how clean pictures compare."""
    before, after = f"“{class_name(row.predicted)}”", f"“{class_name(alarm.turned_to)}”"
    said = f"{alarm.intervention} turns the answer from {before} to {after}."
    if alarm.turned_to == row.predicted:
        said = f"No intervention changes the answer {before}; {alarm.intervention} leaves the least of it."
    # The p-value counts this picture as well.
    as_high = round(row.p_value * (calibration.n + 1)) - 1
    counted = f"{as_high or 'none'} score{'s' * (as_high == 1)} as high"
    return f"{said} Of {calibration.n:,} clean pictures {counted} (p = {row.p_value:.2g})."


def _cells(shown: AlarmShown) -> list[dict[str, Any]]:
    picture = shown.picture
    if shown.before is None:
        cells = [cell("The picture", shown.name, picture)]
    else:
        change, factor = magnify(picture - shown.before)
        cells = [
            cell("Before", f"{shown.name} before the attack", shown.before),
            cell("After the attack", shown.name, picture),
            cell("What changed", "the attack's change", change, caption=f"times {factor:g}, on gray"),
        ]
    if shown.alarm is not None and shown.alarm.regions is not None:
        largest = float(shown.alarm.regions.abs().max())
        caption = f"full colour: {largest:.2g} of the margin" if largest else "smoothing changes nothing"
        taken = overlay(shown.alarm.regions, picture)
        cells.append(cell("What smoothing takes away", "where smoothing moves the answer", taken, caption=caption))
    return cells


def deviation_text(name: str) -> str:
    """What a deviation is of: a probe's effects, or what one of its interventions leaves of the margin.

    Example:
        >>> deviation_text("filters"), deviation_text("filters: Smooth.median(2)")
        ('effects of filters', 'margin under Smooth.median(2)')
    """
    probe, separator, what = name.partition(": ")
    return f"margin under {what}" if separator else f"effects of {probe}"


def save_screening(
    found: Screening,
    out: str | Path,
    *,
    net: VisionModel,
    detector: str,
    manifest: Mapping[str, Any],
    tables: str = "csv",
) -> Path:
    """Write ``alarms.html``, ``scores.csv`` and ``manifest.json``; each appears only when it is complete.

    Args:
        found: what :func:`~ce_plugin.report.screen` returned.
        out: the folder, which :func:`~ce_plugin.report.check_out` has allowed.
        net: the network, for its name and its classes.
        detector: what the detector is called, such as its file's name.
        manifest: see :func:`~ce_plugin.report.build_manifest`; the findings are added to it.
        tables: suffix of the table, see :func:`ce_plugin.files.table_files`.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ce_plugin.detection import Calibration
        >>> from ce_plugin.report import Screened, build_manifest
        >>> net = VisionModel(torch.nn.Linear(1, 1))
        >>> rows = (Screened("a.png", 0.5, 0.4, False, 1, {"filters": -0.2}),)
        >>> found = Screening(rows, (), Calibration([0.1, 0.7, 0.2]), 0.6, 0.3)
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=net.model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = save_screening(found, folder, net=net, detector="net.ce", manifest=manifest)
        ...     page.with_name("scores.csv").read_text().splitlines()[1]
        'a.png,0.5,0.4,0,1,class 1,-0.2,'
    """
    names = list(found.rows[0].deviations) if found.rows else []
    header = ["file", "score", "p_value", "flagged", "predicted", "class_name", *names, "unreadable"]
    rows: list[list[object]] = [
        [row.name, row.score, row.p_value, int(row.flagged), row.predicted, net.class_name(row.predicted)]
        + [row.deviations[name] for name in names]
        + [None]
        for row in found.rows
    ]
    rows += [[name, *[None] * (5 + len(names)), why] for name, why in found.unreadable.items()]
    section, files = AlarmsSection(net.class_name), table_files({"scores": data_frame(header, rows)}, tables)
    return save_page(section, found, out, manifest, files, model=net.name, detector=detector, table=next(iter(files)))
