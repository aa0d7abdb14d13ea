"""What the adaptive attack finds when it tries harder, on images that it was let loose on twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.detection._adaptive_attack import Chunk, Effort, Victims
from benchmarks.detection._text_table import Table, number
from ce_plugin.evaluation import Interval, auroc

_WORDS = (
    "Some images were attacked once more with greater effort. AUROC of those that end misclassified with the effort of "
    "the tables above and with the greater one, and the difference with its paired interval. What it still falls by is "
    "what the figures above may be too high by, at the least."
)


@dataclass(frozen=True)
class Comparison:
    """One and the same images attacked with less and with more effort.

    Args:
        less, more: efforts.
        n: images.
        auroc: of those that end misclassified, with less and with more.
        gain: second minus first.
    """

    less: Effort
    more: Effort
    n: int
    auroc: tuple[float, float]
    gain: Interval

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Comparison:
        """What :meth:`to_dict` gave."""
        less, more = Effort.of(stored["less"]), Effort.of(stored["more"])
        first, second = stored["auroc"]
        return cls(less, more, stored["n"], (first, second), Interval(*stored["gain"]))

    def cells(self) -> list[str]:
        """Behind the names of what was attacked."""
        less, more = map(number, self.auroc)
        gain = f"{self.gain.value:+.3f} [{self.gain.low:+.3f}, {self.gain.high:+.3f}]"
        return [str(self.n), f"{less} ({self.less})", f"{more} ({self.more})", gain]

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        figures = {"auroc": [round(one, 5) for one in self.auroc], "gain": [round(one, 5) for one in self.gain]}
        return {"less": asdict(self.less), "more": asdict(self.more), "n": self.n, **figures}


def compared(victims: Victims, eps: float, less: Effort, found: Sequence[tuple[int, Chunk]]) -> list[Comparison]:
    """Whatever the cache holds of greater efforts on chunks that were found with one effort."""
    comparisons = []
    for more in victims.efforts(eps):
        if more.evaluations <= less.evaluations:
            continue
        again = {number: victims.chunk(number, eps, more, None, make=False) for number, _ in found}
        pairs = [(number, one, other) for number, one in found if (other := again[number]) is not None]
        if all(any(pair[which].success.any() for pair in pairs) for which in (1, 2)):
            comparisons.append(_comparison(victims, less, more, pairs))
    return comparisons


def _comparison(victims: Victims, less: Effort, more: Effort, pairs: Sequence[tuple[int, Chunk, Chunk]]) -> Comparison:
    rows = np.concatenate([victims.rows(number) for number, *_ in pairs])
    values, samples = [], []
    for which in (1, 2):
        chunks = [pair[which] for pair in pairs]
        success = np.concatenate([chunk.success for chunk in chunks])
        score = np.concatenate([chunk.score for chunk in chunks])[success]
        values.append(auroc(victims.clean, score))
        samples.append(victims.resampled(score, rows[success]))
    low, high = np.nanquantile(samples[1] - samples[0], [0.025, 0.975])
    gain = Interval(values[1] - values[0], float(low), float(high))
    return Comparison(less, more, len(rows), (values[0], values[1]), gain)


def more_effort(named: Sequence[tuple[list[str], Comparison]]) -> Table:
    """All comparisons, each behind its problem, detector, seed and eps."""
    header = ["problem", "detector", "seed", "eps", "images", "less (losses x restarts x starts x steps)", "more"]
    rows = [[*names, *one.cells()] for names, one in named]
    return Table("More effort", [_WORDS if rows else "Not tried."], [*header, "difference"], rows)
