"""``ce-plugin detect``: fit a detector of attacked pictures, score pictures with it, and try it against attacks."""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ce_plugin.cli._commands import EvaluateOptions, FitOptions, ScoreOptions
from ce_plugin.cli._session import Pictures, beside, manifest, network, progress, say, table
from ce_plugin.detection import CausalEffectDetector, Denoising, Signature
from ce_plugin.detection.checkpoint import discard
from ce_plugin.detection.denoiser import STEP
from ce_plugin.errors import ArgumentError, FileError, expected
from ce_plugin.files import csv_cell, existing_file, write_files
from ce_plugin.models import VisionModel
from ce_plugin.networks.layers import find_layer
from ce_plugin.report import (
    DetectorTrial,
    Screening,
    attack_to_learn,
    detector_attack,
    file_sha256,
    save_evaluation,
    save_screening,
    screen,
    try_detector,
)

_SMALL = 64
# Of the denoiser's training, where none are asked for; and how many steps it takes at least then.
_EPOCHS, _FEW_STEPS = 20, 800
_LABELS = {"0": 0, "clean": 0, "1": 1, "adversarial": 1}


def fit(options: FitOptions, argv: Sequence[str]) -> dict[str, str]:
    """Fit a detector and write it; returns the pictures that could not be read, and why."""
    record_file = beside(options.out, force=options.force)
    net = network(options, grayscale=options.grayscale)
    pictures = Pictures(options.images, net, quiet=options.quiet)
    labels = None if options.labels is None else _labels(options.labels, pictures.names())
    detector = _unfitted(options, net)
    shape = (1 if options.grayscale else 3, net.framing.size, net.framing.size)
    training = _training(detector, len(pictures), shape, options)
    checkpoint = _begun(options)
    with progress(-(-len(pictures) // 32), quiet=options.quiet) as step:
        images = pictures.all(step)
    # Clean and altered pictures, attacked ones made and measured.
    measured = (2 + 2 * len(detector.attacks or ())) * -(-len(images) // STEP)
    with _resumable(checkpoint), _bar(training + measured, quiet=options.quiet) as done:
        detector.fit(
            images.numpy(), labels, batch_size=_batch_size(net), nb_epochs=options.epochs or _EPOCHS,
            checkpoint=checkpoint, progress=done,
        )  # fmt: skip
    detector.save(options.out, force=True)  # it is reserved
    findings = _fit_record(detector, len(pictures))
    inputs = {"IMAGES": list(map(str, options.images)), "pictures": len(pictures), "unreadable": pictures.unreadable}
    record = manifest(options, argv, net, inputs)
    write_files(options.out.parent, {record_file.name: {**record, "findings": findings}})
    discard(checkpoint)
    low, high = findings["false_alarms_due"]
    say(
        f"Flags {options.fpr:.1%} of clean pictures; by the {findings['calibration_images']} that set the threshold, "
        f"between {low:.1%} and {high:.1%} with 95 % probability",
        quiet=options.quiet,
    )
    say(f"Detector: {options.out.absolute()}")
    return pictures.unreadable


def _begun(options: FitOptions | EvaluateOptions) -> Path:
    """The folder in which the run is saved, after a look whether it may begin, or go on."""
    checkpoint = Path(f"{options.out}.checkpoint")
    if options.resume and not checkpoint.exists():
        hint = "There is nothing to go on from: leave out --resume."
        raise FileError(expected("resume", f"with the folder {str(checkpoint)!r} of an interrupted run", "none", hint))
    if checkpoint.exists() and not options.resume:
        if not options.force:
            hint = "Go on from it with --resume, or begin again with --force."
            raise FileError(expected("out", "without an interrupted run", f"{str(checkpoint)!r}", hint))
        discard(checkpoint)
    return checkpoint


@contextmanager
def _resumable(checkpoint: Path) -> Iterator[None]:
    """Say where an interrupted run can be taken up."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint.exists():
            sys.stderr.write(f"What was done is in {checkpoint.absolute()}; add --resume to go on from there\n")
        raise


@contextmanager
def _bar(total: int, *, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar over steps; each call says what was done, and how many of them."""
    with tqdm(total=total, disable=quiet, unit="step", leave=False) as bar:

        def done(what: str, n: int) -> None:
            bar.set_description(what, refresh=False)
            bar.update(n)

        yield done


def _training(detector: CausalEffectDetector, n: int, shape: tuple[int, int, int], options: FitOptions) -> int:
    """How many steps will be trained, after a word on them.

    Raises:
        ArgumentError: epochs are asked for where nothing is trained.
    """
    training = detector.training_steps(n, shape, options.epochs or _EPOCHS)
    if options.epochs is not None and not training:
        wanted = f"left out for pictures of {shape[-1]} pixels a side, for which nothing is trained"
        raise ArgumentError(expected("epochs", wanted, options.epochs))
    for name, steps in training.items():
        few = options.epochs is not None and steps < _FEW_STEPS
        remark = f"; fewer than {_FEW_STEPS} seldom suffice" if few else ""
        say(f"Training, {name}: {steps} steps of {STEP} pictures{remark}", quiet=options.quiet)
    return sum(training.values())


def _unfitted(options: FitOptions, net: VisionModel) -> CausalEffectDetector:
    detector = CausalEffectDetector(
        net.model,
        clip_values=net.value_range,
        normalization=net.normalization,
        fpr=options.fpr,
        holdout=options.held_out,
        seed=options.seed,
    )
    if options.hardened:
        old, new = "--hardened", "--adversarial-training"
        warnings.warn(
            f"{old} is called {new} now; the old name will be removed in the next version.", FutureWarning, stacklevel=1
        )
    if options.adversarial_training or options.hardened:
        detector.set_params(signature=Signature.adversarially_trained(detector.classifier.clip_values))
    if options.epochs is not None:
        # As many as were asked for: the minimum is for the default.
        shape = (1 if options.grayscale else 3, net.framing.size, net.framing.size)
        signature = detector.signature or Signature.of(shape, detector.classifier.clip_values)
        for probe in signature.probes:
            if isinstance(probe, Denoising):
                probe.least_steps = 1
        detector.set_params(signature=signature)
    if options.attacks:
        planned = _planned(options.attacks, options.eps, net)
        learned = [attack_to_learn(detector, name, eps, batch_size=_batch_size(net)) for name, eps in planned]
        detector.set_params(attacks=learned)
    return detector


def _fit_record(detector: CausalEffectDetector, n: int) -> dict[str, Any]:
    state = detector.learned()
    return {
        "pictures": n,
        "calibration_images": state.calibration.n,
        "threshold": detector.threshold,
        "false_alarms_due": list(state.calibration.realised_interval(detector.fpr)),
        "forward_passes": detector.passes,
        "signature": repr(state.signature),
    }


def score(options: ScoreOptions, argv: Sequence[str]) -> dict[str, str]:
    """Score pictures and write a page; returns those that could not be read, and why."""
    net, detector, pictures = _loaded(options)
    names, size = pictures.names(), _batch_size(net)
    with progress(-(-len(pictures) // size) + options.explain, quiet=options.quiet) as step:
        found = screen(
            detector, names, pictures.batch, batch_size=size, n_shown=options.explain, layer=options.layer,
            progress=step,
        )  # fmt: skip
    found = replace(found, unreadable=pictures.unreadable)
    record = manifest(options, argv, net, _inputs(options, pictures))
    page = save_screening(
        found, options.out, net=net, detector=options.detector.name, manifest=record, tables=options.tables
    )
    say(_flagged(found, net, options.tables), quiet=options.quiet)
    say(f"Alarms: {page.absolute()}")
    return pictures.unreadable


def evaluate(options: EvaluateOptions, argv: Sequence[str]) -> dict[str, str]:
    """Attack clean pictures, score them, and write a page; returns those that could not be read, and why."""
    net, detector, pictures = _loaded(options, options.limit)
    names, size = pictures.names(), _batch_size(net)
    truth = None
    if options.truth is not None:
        given = column_of(options.truth, names, "class", "truth")
        truth = torch.tensor([net.class_index(text, "truth") for text in given])
    checkpoint = _begun(options)
    planned = _planned(options.attacks or (), options.eps, net)
    attacks = [detector_attack(detector, name, eps, batch_size=size, seed=options.seed) for name, eps in planned]
    with _resumable(checkpoint), progress(-(-len(pictures) // 32) + 1 + len(attacks), quiet=options.quiet) as step:
        trial = try_detector(
            detector, pictures.all(step), names, attacks, labels=truth, layer=options.layer, batch_size=size,
            seed=options.seed, progress=step, checkpoint=checkpoint,
        )  # fmt: skip
    record = manifest(options, argv, net, _inputs(options, pictures))
    page = save_evaluation(
        trial, options.out, net=net, detector=options.detector.name, manifest=record, tables=options.tables
    )
    discard(checkpoint)
    say(_tried(trial), quiet=options.quiet)
    say(f"Evaluation: {page.absolute()}")
    return pictures.unreadable


def _loaded(
    options: ScoreOptions | EvaluateOptions, limit: int | None = None
) -> tuple[VisionModel, CausalEffectDetector, Pictures]:
    """Network, detector and pictures, all of them checked."""
    net = network(options)
    detector = CausalEffectDetector.load(options.detector, net.model, normalization=net.normalization)
    channels, size, _ = detector.learned().shape
    if size != net.framing.size:
        hint = f"Add --size {size}." if options.size is None else "Give the size that detect fit was given."
        raise ArgumentError(expected("size", f"{size}, as the detector was fitted", net.framing.size, hint))
    if detector.classifier.clip_values != tuple(map(float, net.value_range)):
        wanted = f"{detector.classifier.clip_values}, as the detector was fitted"
        raise ArgumentError(expected("value_range", wanted, net.value_range))
    if options.layer is not None:
        find_layer(net.model, options.layer)
    if options.fpr is not None:
        detector.learned().calibration.threshold(options.fpr)  # a rate that is too small is refused before any work
        detector.set_params(fpr=options.fpr)
    net = replace(net, grayscale=channels == 1)
    return net, detector, Pictures(options.images, net, limit=limit, quiet=options.quiet)


def _planned(attacks: Sequence[str], sizes: Sequence[float] | None, net: VisionModel) -> list[tuple[str, float]]:
    """Every attack at every size; JSMA has none."""
    sizes = sizes or [0.1 if net.framing.size <= _SMALL else 8 / 255]
    return [
        (name, eps) for name in dict.fromkeys(attacks) for eps in dict.fromkeys(sizes[:1] if name == "jsma" else sizes)
    ]


def _batch_size(net: VisionModel) -> int:
    return 128 if net.framing.size <= _SMALL else 16


def _inputs(options: ScoreOptions | EvaluateOptions, pictures: Pictures) -> dict[str, Any]:
    file = options.detector
    return {
        "detector": {"file": str(file), "sha256": file_sha256(file)},
        "pictures": pictures.names(),
        "unreadable": pictures.unreadable,
    }


def _flagged(found: Screening, net: VisionModel, tables: str) -> str:
    flagged = sorted((row for row in found.rows if row.flagged), key=lambda row: -row.score)
    lines = [
        f"{len(flagged)} of {len(found.rows)} pictures flagged; of clean ones about {found.fpr * len(found.rows):.3g} "
        "would be"
    ]
    rows = [[row.name, net.class_name(row.predicted), f"{row.score:.3g}", f"{row.p_value:.3g}"] for row in flagged[:20]]
    if rows:
        lines += ["", table(["flagged", "answer", "score", "p"], rows)]
    if len(flagged) > len(rows):
        lines.append(f"... and {len(flagged) - len(rows)} more, in scores.{tables}")
    return "\n".join(lines)


def _tried(trial: DetectorTrial) -> str:
    rows = [
        [
            one.attack,
            f"{len(one.scores)} of {one.n_tried}",
            "not evaluated" if one.figures.auroc is None else f"{one.figures.auroc.value:.3f}",
            "" if one.flagged is None else f"{one.flagged.share:.1%}",
        ]
        for one in trial.tried
    ]
    rows = [["clean", "", "", f"{trial.false_alarms.share:.1%}"], *rows]
    return table(["", "successful", "AUROC", f"flagged at {trial.fpr:.1%}"], rows)


def _labels(file: Path, names: list[str]) -> Tensor:
    given = [text.strip().lower() for text in column_of(file, names, "label", "labels")]
    odd = next((text for text in given if text not in _LABELS), None)
    if odd is not None:
        raise FileError(expected("labels", "labels 0 or clean, 1 or adversarial", repr(odd)))
    return torch.tensor([_LABELS[text] for text in given])


def column_of(file: Path, names: Sequence[str], column: str, argument: str) -> list[str]:
    """What a table says of each picture.

    Args:
        file: a CSV table with the columns ``file`` and ``column``; a picture is found by its name as the command
            writes it, or by its file name, where only one has it.
        names: of the pictures.
        column: which one is wanted.
        argument: name of the option, for errors.

    Raises:
        FileError: no such table, a column is missing, or a picture is.
    """
    try:
        wanted = f"a CSV table with the columns file and {column}"
        with existing_file(file, argument, wanted).open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except FileError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(expected(argument, wanted, f"{str(file)!r} ({error})")) from error
    if not rows or not {"file", column} <= rows[0].keys():
        got = f"{str(file)!r} with {', '.join(map(str, rows[0])) if rows else 'no rows'}"
        raise FileError(expected(argument, f"a CSV table with the columns file and {column}", got))
    known = {row["file"]: row[column] or "" for row in rows}
    by_file_name: dict[str, list[str]] = {}
    for name, value in known.items():
        by_file_name.setdefault(Path(name).name, []).append(value)
    values = []
    for name in names:
        same = by_file_name.get(Path(name).name, [])
        # Our own tables may have an apostrophe before a name.
        value = known.get(name) or known.get(str(csv_cell(name))) or (same[0] if len(same) == 1 else "")
        if not value:
            hint = "Add it, or leave the picture out."
            raise FileError(expected(argument, f"a {column} for every picture", f"none for {name!r}", hint))
        values.append(value)
    return values
