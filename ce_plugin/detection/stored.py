"""A fitted detector in a file, and back: tensors and JSON, no pickled code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ce_plugin._version import __version__
from ce_plugin.detection.benign import Benign
from ce_plugin.detection.fitted import Fitted
from ce_plugin.detection.signature import Signature
from ce_plugin.detection.state import State
from ce_plugin.effects.files import read_result, write_result
from ce_plugin.errors import FileError, ModelError, expected
from ce_plugin.interventions.normalization import NormalizationLike

if TYPE_CHECKING:
    from ce_plugin.detection.detector import CausalEffectDetector

__all__ = ["read_detector", "write_detector"]

_KIND = "CausalEffectDetector"
# Changes when a file of an older version can no longer be read.
_FORMAT = 2


def write_detector(path: str | os.PathLike[str], detector: CausalEffectDetector, *, force: bool = False) -> Path:
    """Write what a fitted detector has learned; see :meth:`CausalEffectDetector.save`."""
    state = detector.learned()
    values: dict[str, Any] = {
        "file_format": _FORMAT,
        "versions": {"ce_plugin": __version__, "torch": str(torch.__version__)},
        "fingerprint": state.fingerprint,
        "shape": list(state.shape),
        "clip_values": list(detector.protected.clip_values),
        "groups": state.signature.settings(),
        "own_signature": detector.signature is not None,
        "aggregate": detector.aggregate,
        "fpr": float(detector.fpr),
        "holdout": float(detector.holdout),
        "seed": int(detector.seed),  # JSON knows no number of numpy
        "benign": asdict(detector.benign) if isinstance(detector.benign, Benign) else detector.benign,
        "attacks": _named(detector.attacks),
        "held": state.held,
        "traits": state.traits,
        "seen": torch.tensor(sorted(state.seen), dtype=torch.int64),
        "probe": detector.protected.probe(state.shape),
        **{f"fitted/{key}": value for key, value in state.fitted.tensors().items()},
        **{f"signature/{key}": value for key, value in state.signature.tensors().items()},
    }
    return write_result(path, _KIND, values, force=force)


def read_detector(
    path: str | os.PathLike[str], kind: type[CausalEffectDetector], classifier: object, normalization: NormalizationLike
) -> CausalEffectDetector:
    """The detector in a file; see :meth:`CausalEffectDetector.load`."""
    values = read_result(path, _KIND)
    if values["file_format"] != _FORMAT:
        todo = f"Fit again, or use ce_plugin {values['versions']['ce_plugin']}."
        got = f"format {values['file_format']}"
        raise FileError(expected("path", f"a file of format {_FORMAT}", got, todo))
    signature = Signature.from_settings(values["groups"])
    benign = values["benign"]
    detector = kind(
        classifier,
        signature if values["own_signature"] else None,
        clip_values=tuple(values["clip_values"]),
        normalization=normalization,
        fpr=values["fpr"],
        holdout=values["holdout"],
        benign=Benign(**{**benign, "value_range": tuple(benign["value_range"])})
        if isinstance(benign, dict)
        else benign,
        aggregate=values["aggregate"],
        attacks=values.get("attacks"),  # files of older versions have none
        seed=values["seed"],
    )
    _check_network(detector, values)
    learned = signature.with_tensors(_inside("signature/", values))
    fitted = Fitted.from_tensors(signature.names, _inside("fitted/", values), values["aggregate"])
    shape, seen = tuple(values["shape"]), frozenset(values["seen"].tolist())
    held = values["held"], values["traits"]
    detector.restore(State(fitted, learned, *held, shape, seen, values["fingerprint"], values["seed"]))
    return detector


def _check_network(detector: CausalEffectDetector, values: dict[str, Any]) -> None:
    """Whether the classifier is the one that the detector was fitted on, its normalisation included."""
    wanted = "the network that the detector was fitted on"
    if detector.protected.fingerprint() != values["fingerprint"]:
        todo = "Fit again: what is usual changes with the network."
        raise ModelError(expected("classifier", wanted, "one with other parameters", todo))
    here, there = detector.protected.probe(tuple(values["shape"])), values["probe"]
    if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-2, atol=1e-2 * float(there.abs().max())):
        todo = "Pass the same normalization= and the same preprocessing."
        raise ModelError(expected("classifier", wanted, "one that answers a test image otherwise", todo))


def _named(attacks: Sequence[Any] | None) -> list[str] | None:
    """Attacks that :meth:`CausalEffectDetector.fit` would run again, where they are names: no file holds an attack."""
    if attacks is None or not all(isinstance(one, str) for one in attacks):
        return None
    return list(attacks)


def _inside(start: str, values: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
