"""What the results hold of earlier runs: caches are lost, and an attack of hours should not be."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detection._adaptive_attack import CHUNK, Chunk, Effort, Victims
from benchmarks.detection._adaptive_effort import Comparison

# A detector that was fitted again on another processor has other roundings behind it, of up to 0.7 % of a score here.
_NEAR = 1e-2


@dataclass(frozen=True)
class Kept:
    """What was found earlier for some images at one eps.

    Args:
        effort: with which.
        found: (number, chunk), without the images themselves.
        more: what greater efforts found.
    """

    effort: Effort
    found: list[tuple[int, Chunk]] = field(repr=False)
    more: list[Comparison] = field(repr=False)


def kept(victims: Victims, eps: float, results: Path, numbers: Sequence[int]) -> Kept | None:
    """From `detection_adaptive.json`, where the images' clean selves score today what they scored then; else None."""
    row = _row(victims, eps, results)
    if row is None:
        return None
    success, score = np.array(row["images"]["success"], dtype=bool), np.array(row["images"]["score"], dtype=float)
    low, high = np.quantile(victims.clean, [0.05, 0.95])
    late = math.nan if row["late"] is None else float(row["late"]) * float(high - low)
    found = []
    for number in numbers:
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        then = np.array(row["images"]["clean"][part], dtype=float)
        if not len(then):
            break
        if not np.allclose(victims.own(number)[: len(then)], then, rtol=_NEAR, atol=_NEAR):
            return None
        found.append((number, Chunk(np.empty(0), success[part], score[part], late, float(row["seconds"]))))
    return Kept(Effort.of(row["effort"]), found, [Comparison.of(one) for one in row["more"]]) if found else None


def _row(victims: Victims, eps: float, results: Path) -> dict[str, Any] | None:
    if not results.is_file():
        return None
    which = (victims.problem.name, victims.problem.seed, victims.name, f"{eps:g}")
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
    return next(
        (row for row in rows if tuple(row[key] for key in ("problem", "seed", "detector", "eps")) == which), None
    )
