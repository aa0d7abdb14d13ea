"""What a detector found, before any of it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from ce_plugin.detection import Alarm, Calibration, Rate
    from ce_plugin.evaluation import Figures

__all__ = ["AlarmShown", "AttackTried", "DetectorTrial", "Screened", "Screening"]

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Screened:
    """What the detector says of one picture.

    Attributes:
        name: of the picture.
        score: greater is more adversarial.
        p_value: conformal: the share of clean pictures that score at least as high.
        flagged: whether the score is above the threshold.
        predicted: the network's answer.
        verdicts: name of a group or intervention -> its standardised distance.
    """

    name: str
    score: float
    p_value: float
    flagged: bool
    predicted: int
    verdicts: Mapping[str, float]


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
    """A detector's judgement of many pictures.

    Attributes:
        rows: one for each picture, in the order given.
        shown: the flagged ones with the highest scores, explained.
        calibration: the scores that set the threshold.
        threshold: scores above it are flagged.
        fpr: share of clean pictures that the threshold was set to flag.
    """

    rows: tuple[Screened, ...]
    shown: tuple[AlarmShown, ...]
    calibration: Calibration
    threshold: float
    fpr: float


@dataclass(frozen=True)
class AttackTried:
    """One attack, and what the detector made of it.

    Attributes:
        attack: its name.
        words: its settings, for the reader.
        n_tried: correctly classified pictures that were attacked.
        scores: of the successful ones, (S,).
        figures: AUROC and detection rates with intervals.
        flagged: share of the successful ones above the threshold; None without any.
        shown: examples.
        seconds: time that the attack took.
    """

    attack: str
    words: str
    n_tried: int
    scores: npt.NDArray[np.float64] = field(repr=False)
    figures: Figures
    flagged: Rate | None
    shown: tuple[AlarmShown, ...] = field(repr=False)
    seconds: float


@dataclass(frozen=True)
class DetectorTrial:
    """A detector tried on clean pictures and on the same ones under attack.

    Attributes:
        clean: scores of all clean pictures, (N,).
        right: which of them the network classifies correctly, (N,).
        truth_known: whether classes were given; otherwise the network's answers count as correct.
        false_alarms: share of the clean pictures above the threshold.
        due: where that share is to lie with 95 % probability, by the number of calibration and of test pictures.
        tried: one for each attack.
        calibration, threshold, fpr: as in :class:`Screening`.
        passes: forward passes that a judgement takes.
        seconds: time that the detector took for one clean picture.
    """

    clean: npt.NDArray[np.float64] = field(repr=False)
    right: Flags = field(repr=False)
    truth_known: bool
    false_alarms: Rate
    due: tuple[float, float]
    tried: tuple[AttackTried, ...]
    calibration: Calibration
    threshold: float
    fpr: float
    passes: float
    seconds: float
