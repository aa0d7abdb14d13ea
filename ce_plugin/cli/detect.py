"""``ce-plugin detect``: fit a detector of attacked pictures, judge pictures with it, and try it against attacks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ce_plugin.cli.pictures import Pictures, check_channels, column_of
from ce_plugin.cli.results import json_text, table
from ce_plugin.cli.session import manifest, network, progress, say
from ce_plugin.errors import ArgumentError, FileError, expected
from ce_plugin.models import VisionModel
from ce_plugin.report import (
    DetectorTrial,
    Screening,
    attack_to_learn,
    check_out,
    detector_attack,
    file_sha256,
    named_layer,
    save_evaluation,
    save_screening,
    screen,
    try_detector,
)

if TYPE_CHECKING:
    from ce_plugin.detection import CausalEffectDetector
    from ce_plugin.report import DetectorAttack

__all__ = ["evaluate", "fit", "score"]

_SMALL = 64
_LABELS = {"0": 0, "clean": 0, "1": 1, "adversarial": 1}


def fit(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Fit a detector and write it."""
    from ce_plugin.detection import CausalEffectDetector, Signature

    out: Path = arguments.out
    _check_file(out, arguments.force)
    net = network(arguments)
    check_channels(net, arguments.grayscale)
    pictures = Pictures(arguments.images, net, gray=arguments.grayscale)
    labels = None if arguments.labels is None else _labels(arguments.labels, pictures.names())
    detector = CausalEffectDetector(
        net.model,
        clip_values=net.value_range,
        normalization=net.normalization,
        fpr=arguments.fpr,
        holdout=arguments.held_out,
        seed=arguments.seed,
    )
    size = _batch_size(net)
    if arguments.hardened:
        detector.set_params(signature=Signature.adversarially_trained(detector.protected.clip_values))
    if arguments.attacks:
        detector.set_params(attacks=_teachers(detector, arguments, net))
    with progress(-(-len(pictures) // 32) + 1, quiet=arguments.quiet) as tell:
        images = pictures.all(tell)
        tell("fitting")
        detector.fit(images.numpy(), labels, batch_size=size, nb_epochs=arguments.epochs)
    detector.save(out, force=arguments.force)
    found = _fit_record(detector, len(pictures))
    record = manifest(arguments, words, net, {"IMAGES": list(map(str, arguments.images)), "pictures": len(pictures)})
    Path(f"{out}.json").write_text(json_text({**record, "findings": found}), encoding="utf-8")
    low, high = found["false_alarms_due"]
    say(
        f"Flags {arguments.fpr:.1%} of clean pictures; by the {found['calibration_images']} that set the threshold, "
        f"between {low:.1%} and {high:.1%} with 95 % probability",
        quiet=arguments.quiet,
    )
    sys.stdout.write(f"Detector: {out.absolute()}\n")
    return 0


def score(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Judge pictures and write a page."""
    check_out(arguments.out, force=arguments.force)
    net, detector, pictures = _loaded(arguments)
    names, size = pictures.names(), _batch_size(net)
    with progress(-(-len(pictures) // size) + arguments.explain, quiet=arguments.quiet) as tell:
        found = screen(
            detector, names, pictures.batch, batch_size=size, n_shown=arguments.explain, layer=arguments.layer,
            progress=tell,
        )  # fmt: skip
    record = manifest(arguments, words, net, _inputs(arguments, pictures))
    page = save_screening(found, arguments.out, net=net, detector=arguments.detector.name, manifest=record)
    say(_flagged(found, net), quiet=arguments.quiet)
    sys.stdout.write(f"Alarms: {page.absolute()}\n")
    return 0


def evaluate(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Attack clean pictures, judge them, and write a page."""
    check_out(arguments.out, force=arguments.force)
    net, detector, pictures = _loaded(arguments)
    truth = None if arguments.truth is None else _truth(arguments.truth, pictures.names(), net)
    attacks = _attacks(detector, arguments, net)
    steps = -(-len(pictures) // 32) + 1 + len(attacks)
    with progress(steps, quiet=arguments.quiet) as tell:
        trial = try_detector(
            detector, pictures.all(tell), pictures.names(), attacks, labels=truth, layer=arguments.layer,
            batch_size=_batch_size(net), seed=arguments.seed, progress=tell,
        )  # fmt: skip
    record = manifest(arguments, words, net, _inputs(arguments, pictures))
    page = save_evaluation(trial, arguments.out, net=net, detector=arguments.detector.name, manifest=record)
    say(_tried(trial), quiet=arguments.quiet)
    sys.stdout.write(f"Evaluation: {page.absolute()}\n")
    return 0


def _loaded(arguments: argparse.Namespace) -> tuple[VisionModel, CausalEffectDetector, Pictures]:
    """Network, detector and pictures, all of them checked."""
    from ce_plugin.detection import CausalEffectDetector

    net = network(arguments)
    detector = CausalEffectDetector.load(arguments.detector, net.model, normalization=net.normalization)
    channels, size, _ = detector.learned().shape
    if size != net.framing.size:
        hint = f"Add --size {size}." if arguments.size is None else "Give the size that detect fit was given."
        raise ArgumentError(expected("size", f"{size}, as the detector was fitted", net.framing.size, hint))
    if detector.protected.clip_values != tuple(map(float, net.value_range)):
        wanted = f"{detector.protected.clip_values}, as the detector was fitted"
        raise ArgumentError(expected("value_range", wanted, net.value_range))
    if arguments.layer is not None:
        named_layer(net.model, arguments.layer)
    if arguments.fpr is not None:
        detector.learned().calibration.threshold(arguments.fpr)  # a rate that is too small is told before any work
        detector.set_params(fpr=arguments.fpr)
    limit = getattr(arguments, "limit", None)
    return net, detector, Pictures(arguments.images, net, gray=channels == 1, limit=limit)


def _check_file(out: Path, force: bool) -> None:
    """Whether the detector may be written, before any work."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise FileError(expected("out", "a file in an existing folder", repr(str(out))))
    if out.exists() and not force:
        hint = "Choose another name, or allow it to be replaced with --force."
        raise FileError(expected("out", "a file that does not exist yet", repr(str(out)), hint))


def _labels(file: Path, names: list[str]) -> Tensor:
    given = [text.strip().lower() for text in column_of(file, names, "label", "labels")]
    odd = next((text for text in given if text not in _LABELS), None)
    if odd is not None:
        raise FileError(expected("labels", "labels 0 or clean, 1 or adversarial", repr(odd)))
    return torch.tensor([_LABELS[text] for text in given])


def _truth(file: Path, names: list[str], net: VisionModel) -> Tensor:
    return torch.tensor([net.class_index(text) for text in column_of(file, names, "class", "truth")])


def _attacks(detector: CausalEffectDetector, arguments: argparse.Namespace, net: VisionModel) -> list[DetectorAttack]:
    size, seed = _batch_size(net), arguments.seed
    return [detector_attack(detector, *one, batch_size=size, seed=seed) for one in _planned(arguments, net)]


def _teachers(detector: CausalEffectDetector, arguments: argparse.Namespace, net: VisionModel) -> list[Any]:
    """The attacks that a detector learns from."""
    return [attack_to_learn(detector, *one, batch_size=_batch_size(net)) for one in _planned(arguments, net)]


def _planned(arguments: argparse.Namespace, net: VisionModel) -> list[tuple[str, float]]:
    """Every attack at every size; JSMA has none."""
    sizes = arguments.eps or [0.1 if net.framing.size <= _SMALL else 8 / 255]
    names = dict.fromkeys(arguments.attacks)
    return [(name, eps) for name in names for eps in dict.fromkeys(sizes[:1] if name == "jsma" else sizes)]


def _batch_size(net: VisionModel) -> int:
    return 128 if net.framing.size <= _SMALL else 16


def _inputs(arguments: argparse.Namespace, pictures: Pictures) -> dict[str, Any]:
    file = arguments.detector
    return {
        "detector": {"file": str(file), "sha256": file_sha256(file)},
        "pictures": pictures.names(),
    }


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


def _flagged(found: Screening, net: VisionModel) -> str:
    flagged = sorted((row for row in found.rows if row.flagged), key=lambda row: -row.score)
    lines = [
        f"{len(flagged)} of {len(found.rows)} pictures flagged; of clean ones about {found.fpr * len(found.rows):.3g} "
        "would be"
    ]
    rows = [[row.name, net.class_name(row.predicted), f"{row.score:.3g}", f"{row.p_value:.3g}"] for row in flagged[:20]]
    if rows:
        lines += ["", table(["flagged", "answer", "score", "p"], rows)]
    if len(flagged) > len(rows):
        lines.append(f"... and {len(flagged) - len(rows)} more, in scores.csv")
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
