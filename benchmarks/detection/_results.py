"""All results of an evaluation, for tables and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.detection._detectors import OWN
from benchmarks.detection._scores import NEEDED, Result, TrialSpec
from benchmarks.harness import Evaluation, ImageDraws, pooled

TITLES = {"fashion": "Fashion-MNIST", "mnist": "MNIST-5k", "imagenet": "photographs (EfficientNet-lite0)"}


@dataclass
class Group:
    """Results on one classifier.

    Args:
        problem, seed: of the classifier.
        accuracy: of the classifier on the test images.
        n_clean: correctly classified test images that are scored.
        missing: attacks that have not been run.
        tried: attack -> number of images that were attacked.
        keep: altered set -> share of images that keep their class.
        results: one for each protocol and detector.
        examples: images of each attack for the page.
    """

    problem: str
    seed: int
    accuracy: float
    n_clean: int
    missing: tuple[str, ...]
    tried: dict[str, int]
    keep: dict[str, float]
    results: list[Result] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, setting: TrialSpec) -> Group:
        """A group without results."""
        problem, clean = setting.problem, len(setting.data.clean)
        tried = {name: len(ids) for name, ids in setting.tried.items()}
        return cls(problem.name, problem.seed, setting.accuracy, clean, setting.missing, tried, dict(setting.keep))


@dataclass
class Findings:
    """All classifiers.

    Args:
        groups: one for each classifier.
        draws: problem -> bootstrap samples, the same for all classifiers and detectors.
    """

    groups: list[Group] = field(default_factory=list)
    draws: dict[str, ImageDraws] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """In the order of the tables."""
        return list(dict.fromkeys(group.problem for group in self.groups))

    def results(self, problem: str, protocol: str) -> dict[str, list[Result]]:
        """Detector -> one result for each classifier, without failed ones."""
        found: dict[str, list[Result]] = {}
        for group in self.groups:
            for one in group.results:
                if (one.problem, one.protocol) == (problem, protocol) and one.evaluation is not None:
                    found.setdefault(one.detector, []).append(one)
        return found

    def pooled(self, problem: str, protocol: str) -> dict[str, Evaluation]:
        """Detector -> mean over classifiers, best mean AUROC first; only detectors with results on all classifiers."""
        found = self.results(problem, protocol)
        most = max((len(ones) for ones in found.values()), default=0)
        whole = {name: pooled(_evaluations(ones)) for name, ones in found.items() if len(ones) == most}
        return dict(sorted(whole.items(), key=lambda item: -(item[1].mean.value if item[1].mean else -1.0)))

    def shown(self, problem: str, protocol: str, n_peers: int = 4) -> list[str]:
        """Our detectors, and the published ones that are best on average."""
        known = list(self.pooled(problem, protocol))
        best = [name for name in known if name not in OWN][:n_peers]
        return [name for name in OWN if name in known] + best

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        classifiers = []
        for group in self.groups:
            about = {
                n: getattr(group, n) for n in ("problem", "seed", "accuracy", "n_clean", "missing", "tried", "keep")
            }
            classifiers.append({**about, "results": [_row(one) for one in group.results]})
        means = [
            {"problem": problem, "protocol": protocol, "detector": name, **one.to_dict()}
            for problem in self.problems()
            for protocol in ("P3", "P2", "P4", "P1")
            for name, one in self.pooled(problem, protocol).items()
        ]
        whole: dict[str, Any] = _rounded({"needed": NEEDED, "classifiers": classifiers, "means": means})
        return whole


def _evaluations(results: Sequence[Result]) -> list[Evaluation]:
    return [one.evaluation for one in results if one.evaluation is not None]


def _row(one: Result) -> dict[str, Any]:
    """One classifier: successes and AUROC of each attack; intervals are given with the means."""
    row: dict[str, Any] = {name: getattr(one, name) for name in ("protocol", "detector", "passes", "seconds", "error")}
    if one.evaluation is not None:
        row |= {name: getattr(one.evaluation, name) for name in ("mean", "worst", "worst_attack", "tpr_1", "tpr_5")}
        attacks = {name: tried.figures for name, tried in one.evaluation.attacks.items()}
        row["attacks"] = {n: [f.n_attacked, None if f.auroc is None else f.auroc.value] for n, f in attacks.items()}
    if one.alarms is not None:
        row["n_calibration"], row["due"] = one.alarms.n_calibration, one.alarms.due
        row["false_alarms"] = {
            name: [f"{rate.n_flagged} of {rate.n}" for rate in rates] for name, rates in one.alarms.rates.items()
        }
    return row


def _rounded(value: Any) -> Any:
    """Rounded to five decimals, more than the intervals justify."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value
