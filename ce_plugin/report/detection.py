"""A detector at work: pictures that it is shown, attacks that it is tried against, and why it raised its alarms."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ce_plugin.errors import InputError, expected
from ce_plugin.report.detector_attacks import DetectorAttack, rounded
from ce_plugin.report.detector_findings import AlarmShown, AttackTried, DetectorTrial, Screened, Screening

if TYPE_CHECKING:
    from ce_plugin.detection import Alarm, CausalEffectDetector

__all__ = ["NEEDED", "screen", "try_detector"]

Progress = Callable[[str], None]
Batches = Callable[[int, int], Tensor]
NEEDED = 20
"""With fewer successful attacks no AUROC is given."""


def screen(
    detector: CausalEffectDetector,
    names: Sequence[str],
    batches: Batches,
    *,
    batch_size: int = 32,
    n_shown: int = 12,
    layer: str | None = None,
    progress: Progress | None = None,
) -> Screening:
    """Judge pictures, a few at a time, and explain the alarms with the highest scores.

    Args:
        detector: a fitted one.
        names: one for each picture.
        batches: (start, stop) -> these pictures, (n, C, H, W), image units; asked again for what is explained.
        batch_size: pictures at a time.
        n_shown: alarms that are explained.
        layer: dotted name of a layer whose channels the explanations name.
        progress: is told each step.

    Raises:
        CEPluginError: see :meth:`~ce_plugin.detection.CausalEffectDetector.detect`.

    Example:
        >>> from ce_plugin.detection import CausalEffectDetector, CounterAttack, Signature
        >>> images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> detector = CausalEffectDetector(network, Signature([CounterAttack()]))
        >>> detector.fit(images[:250])
        >>> found = screen(detector, [f"{i}.png" for i in range(50)], lambda start, stop: images[250:][start:stop])
        >>> len(found.rows), sum(row.flagged for row in found.rows) == len(found.shown)
        (50, True)
    """
    tell = progress or (lambda step: None)
    rows: list[Screened] = []
    for start in range(0, len(names), batch_size):
        tell("judging")
        part = names[start : start + batch_size]
        rows += _judged(detector, part, batches(start, start + len(part)), batch_size)
    order = sorted((i for i, row in enumerate(rows) if row.flagged), key=lambda i: -rows[i].score)
    shown = []
    for i in order[:n_shown]:
        tell("explaining")
        shown.append(_explained(detector, rows[i], batches(i, i + 1), layer))
    calibration = detector.learned().calibration
    return Screening(tuple(rows), tuple(shown), calibration, detector.threshold, detector.fpr)


def try_detector(
    detector: CausalEffectDetector,
    images: Tensor,
    names: Sequence[str],
    attacks: Sequence[DetectorAttack],
    *,
    labels: Tensor | None = None,
    n_shown: int = 2,
    layer: str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> DetectorTrial:
    """Attack pictures, and see how many successful attacks the detector flags, and how many clean pictures.

    Only pictures that the network classifies correctly are attacked, and what an attack leaves is rounded to 256
    levels, as a file would, before it is judged whether it succeeded.

    Args:
        detector: a fitted one.
        images: clean, not among those that it was fitted on, (N, C, H, W), image units.
        names: one for each.
        attacks: see :func:`~ce_plugin.report.detector_attack`.
        labels: true classes, (N,); None takes the network's own answers.
        n_shown: examples of each attack: the first that was flagged, then the first that was not.
        layer: as for :func:`screen`.
        batch_size: pictures at a time.
        seed: of the bootstrap.
        progress: is told each step.

    Raises:
        InputError: a picture was fitted on, or none is classified correctly.

    Example:
        >>> from ce_plugin.detection import CausalEffectDetector, CounterAttack, Signature
        >>> from ce_plugin.report import detector_attack
        >>> images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> detector = CausalEffectDetector(network, Signature([CounterAttack()]))
        >>> detector.fit(images[:250])
        >>> attack = detector_attack(detector, "fgsm", 0.1)
        >>> trial = try_detector(detector, images[250:], [f"{i}.png" for i in range(50)], [attack])
        >>> trial.tried[0].n_tried, len(trial.clean)
        (50, 50)
    """
    from ce_plugin.detection import rate

    tell = progress or (lambda step: None)
    _check_unseen(detector, images)
    tell("clean pictures")
    start = time.perf_counter()
    rows = _judged(detector, names, images, batch_size)
    seconds = (time.perf_counter() - start) / len(images)
    answers = torch.tensor([row.predicted for row in rows])
    truth = answers if labels is None else labels.cpu()
    right = (answers == truth).numpy()
    if not right.any():
        hint = "Look at the classes that were given, and at the network's normalisation."
        raise InputError(expected("images", "some that the network classifies correctly", "none of them", hint))
    clean = np.array([row.score for row in rows])
    tried = []
    for attack in attacks:
        tell(attack.name)
        tried.append(_tried(detector, attack, _Material(images, names, truth, clean, right), n_shown, layer, seed))
    state = detector.learned()
    return DetectorTrial(
        clean=clean,
        right=right,
        truth_known=labels is not None,
        false_alarms=rate(clean > detector.threshold),
        due=state.calibration.realised_interval(detector.fpr, n_test=len(clean)),
        tried=tuple(tried),
        calibration=state.calibration,
        threshold=detector.threshold,
        fpr=detector.fpr,
        passes=detector.passes,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Material:
    images: Tensor
    names: Sequence[str]
    truth: Tensor
    clean: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]


def _tried(
    detector: CausalEffectDetector, attack: DetectorAttack, given: _Material, n_shown: int, layer: str | None, seed: int
) -> AttackTried:
    from ce_plugin.detection import rate
    from ce_plugin.evaluation import figures

    index = np.flatnonzero(given.right)
    before, truth = given.images[index], given.truth[index]
    start = time.perf_counter()
    moved = rounded(attack.craft(before, truth, index.tolist()), before, attack.bound, detector.protected.clip_values)
    seconds = time.perf_counter() - start
    won = np.flatnonzero((_answers(detector, moved) != truth).numpy())
    names = [given.names[i] for i in index[won]]
    rows = _judged(detector, names, moved[won]) if len(won) else []
    scores = np.array([row.score for row in rows])
    found = figures(
        given.clean[index], scores, detector=detector.name, attack=attack.name, ids=(index, index[won]), needed=NEEDED,
        seed=seed,
    )  # fmt: skip
    low, high = detector.protected.clip_values
    shown = []
    for place in _examples(rows, n_shown):
        one = int(won[place])
        example = _explained(detector, rows[place], moved[one : one + 1], layer)
        clean = ((before[one] - low) / (high - low)).cpu()
        shown.append(AlarmShown(example.name, example.picture, example.screened, example.alarm, clean, int(truth[one])))
    flagged = rate(scores > detector.threshold) if len(scores) else None
    return AttackTried(attack.name, attack.words, len(index), scores, found, flagged, tuple(shown), seconds)


def _examples(rows: Sequence[Screened], n: int) -> list[int]:
    """Which successful attacks are shown: flagged and missed ones in turn, the first of each first."""
    caught = [i for i, row in enumerate(rows) if row.flagged]
    missed = [i for i, row in enumerate(rows) if not row.flagged]
    kept = missed[: max(n // 2, n - len(caught))]
    return [*caught[: n - len(kept)], *kept]


def _judged(
    detector: CausalEffectDetector, names: Sequence[str], images: Tensor, batch_size: int = 128
) -> list[Screened]:
    report, flags = detector.detect(images.numpy(), batch_size=batch_size)
    return [
        Screened(
            name,
            float(report["scores"][i]),
            float(report["p_values"][i]),
            bool(flags[i]),
            int(report["predictions"][i]),
            {group: float(values[i]) for group, values in report["groups"].items()},
        )
        for i, name in enumerate(names)
    ]


def _explained(detector: CausalEffectDetector, row: Screened, image: Tensor, layer: str | None) -> AlarmShown:
    """The picture with the reason for its alarm, where there was one."""
    low, high = detector.protected.clip_values
    alarm: Alarm | None = None
    if row.flagged:
        report: dict[str, Any] = detector.detect(image.numpy(), explain=True, layer=layer)[0]
        alarm = report["explanations"][0]
    return AlarmShown(row.name, ((image[0] - low) / (high - low)).cpu(), row, alarm)


def _answers(detector: CausalEffectDetector, images: Tensor, batch_size: int = 128) -> Tensor:
    protected = detector.protected
    with protected.guarded(), torch.no_grad():
        parts = [protected(part.to(protected.like)).argmax(1).cpu() for part in torch.split(images, batch_size)]
    return torch.cat(parts)


def _check_unseen(detector: CausalEffectDetector, images: Tensor) -> None:
    from ce_plugin.detection.signature import digests

    seen = detector.learned().seen
    again = sum(name in seen for name in digests(images))
    if again:
        hint = "On its own pictures a detector looks better than it is: take others."
        wanted = "pictures that the detector was not fitted on"
        raise InputError(expected("images", wanted, f"{again} that it was", hint))
