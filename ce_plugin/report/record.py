"""The findings of a report as numbers that a program can read; they stand in the manifest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ce_plugin.report.detector_findings import DetectorTrial
from ce_plugin.report.findings import Answer, Carried, Case, LayerCase, Study

__all__ = ["carried_record", "record", "trial_record"]

_SHOWN = 20


def record(studies: Sequence[Study]) -> dict[str, Any]:
    """What was found on each photograph, without its maps.

    Args:
        studies: one per photograph.

    Returns:
        Strings, numbers, lists and dictionaries, by the photographs' names.

    Example:
        >>> record([])
        {}
    """
    return {study.name: _photograph(study) for study in studies}


def _photograph(study: Study) -> dict[str, Any]:
    found: dict[str, Any] = {"evidence": {case.name: _case(case) for case in study.cases}}
    if study.layer is not None:
        found["layer"] = {"name": study.layer.name}
        if study.layer.note:
            found["layer"]["note"] = study.layer.note
        pairs = zip(study.cases, study.layer.cases, strict=False)
        found["layer"]["evidence"] = {case.name: _layer_case(layer) for case, layer in pairs}
    return found


def _case(case: Case) -> dict[str, Any]:
    return {
        "answer": _answer(case.top[0]),
        "explained": _answer(case.explained),
        "answer_changed": case.success,
        "outlined": {maps.answer.name: [maps.n_outlined, maps.n_units] for maps in case.maps},
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "index": answer.index,
        "name": answer.name,
        "probability": answer.probability,
        "log_odds": answer.log_odds,
    }


def _layer_case(case: LayerCase) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if case.correlation:
        # JSON knows no NaN, which a constant map has.
        found["rank_correlation_with_clean"] = {
            method: None if math.isnan(value) else value for method, value in case.correlation.items()
        }
    if case.carried is not None:
        found["carried"] = carried_record(case.carried, top=_SHOWN)
    return found


def carried_record(carried: Carried, *, top: int) -> dict[str, Any]:
    """What the channels carry of an attack: the strongest ones, and how many are needed.

    Args:
        carried: on one image.
        top: number of channels.

    Example:
        >>> import torch
        >>> found = Carried(-2.0, torch.tensor([-0.5, -1.5]), ("0", "1"), (1, 0), {0.5: 1}, False)
        >>> carried_record(found, top=1)["channels"]
        [{'channel': '1', 'indirect_effect': -1.5, 'share': 0.75}]
    """
    return {
        "total_effect": carried.total,
        "channels": [
            {
                "channel": carried.labels[unit],
                "indirect_effect": float(carried.indirect[unit]),
                "share": carried.share(unit),
            }
            for unit in carried.order[:top]
        ],
        "channels_needed": {f"{level:g}": k for level, k in carried.needed.items()},
        "chosen_and_tested_on": "the same image",
        "layer_is_a_cut": carried.cut,
    }


def trial_record(trial: DetectorTrial) -> dict[str, Any]:
    """What was found, as JSON holds it; it stands in the manifest.

    Example:
        >>> from ce_plugin.detection import Calibration, rate
        >>> right = rate([True])
        >>> trial = DetectorTrial(None, [True], False, right, (0.0, 1.0), (), Calibration([0.1]), 0.6, 0.3, 7, 0.01)
        >>> trial_record(trial)["false_alarms"]["share"]
        1.0
    """
    return {
        "pictures": len(trial.right),
        "correctly_classified": int(sum(trial.right)),
        "true_classes_given": trial.truth_known,
        "fpr": trial.fpr,
        "threshold": trial.threshold,
        "calibration_images": trial.calibration.n,
        "false_alarms": trial.false_alarms.to_dict(),
        "false_alarms_due": list(trial.due),
        "forward_passes": trial.passes,
        "attacks": [
            {
                **one.figures.to_dict(),
                "settings": one.words,
                "n_tried": one.n_tried,
                "flagged": None if one.flagged is None else one.flagged.to_dict(),
            }
            for one in trial.tried
        ],
    }
