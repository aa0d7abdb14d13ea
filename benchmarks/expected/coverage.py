"""Do intervals over images hold? Re-draws of 500 images of Fashion-MNIST, against the whole test set."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.results import write
from benchmarks.expected._fashion import HOW, TestSet, classifier, explainer
from ce_plugin.effects import t_interval
from ce_plugin.expected import EffectTable, run
from ce_plugin.expected.table import studentized

# Share of images below which a unit acts rarely.
RARE = 0.01
OUTCOMES = ("log_odds", "probability", "prediction_weighted")


def table(place: str | None, images: int) -> EffectTable:
    """Effects of every image of the test set: read, or made."""
    network = classifier()
    out = Path(place) if place else Path(mkdtemp()) / "run"
    return run(
        explainer(network), TestSet(images), out, outcomes=OUTCOMES, batch_size=50, resume=True, show_progress=True
    )


def moments(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error of each unit, of draws (n, U)."""
    return drawn.mean(0), drawn.std(0) / len(drawn) ** 0.5


def bootstrap(drawn: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Bootstrap-t intervals of draws (n, U), by weights (R, n)."""
    n = len(drawn)
    mean, error = moments(drawn)
    apart = drawn - mean
    return studentized(mean, error, weights @ apart / n, weights @ apart.square() / n, n, 0.95)


def covered(values: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """How often each kind of interval contains the mean of all images, (R, U) pooled and by unit."""
    truth = values.mean(0)
    draw = np.random.default_rng(options.seed)
    found: dict[str, list[Tensor]] = {"t": [], "bootstrap-t": []}
    width: dict[str, list[Tensor]] = {"t": [], "bootstrap-t": []}
    for number in range(options.redraws):
        drawn = values[torch.from_numpy(draw.integers(0, len(values), options.size))]
        mean, error = moments(drawn)
        intervals = {"t": t_interval(mean, error, torch.full_like(mean, options.size - 1))}
        if number < options.bootstraps:
            weights = draw.multinomial(options.size, np.full(options.size, 1 / options.size), size=options.resamples)
            intervals["bootstrap-t"] = bootstrap(drawn, torch.from_numpy(weights).double())
        for kind, (low, high) in intervals.items():
            found[kind].append((low <= truth) & (truth <= high))
            width[kind].append(high - low)
    return {
        kind: {
            "by_unit": torch.stack(found[kind]).double().mean(0).tolist(),
            "pooled": float(torch.stack(found[kind]).double().mean()),
            "median_width": float(torch.stack(width[kind]).median()),
            "redraws": len(found[kind]),
        }
        for kind in found
    }


def skewness(values: Tensor) -> Tensor:
    """Of each unit's effects over the images, (U,)."""
    apart = values - values.mean(0)
    return apart.pow(3).mean(0) / apart.square().mean(0).clamp(min=1e-30).pow(1.5)


def row(outcome: str, kind: str, found: dict[str, Any], share: list[float]) -> str:
    """A row of the table: all units, those that act on some images in a hundred, and the rarer ones."""
    by_unit = found["by_unit"]
    often = [one for one, acts in zip(by_unit, share, strict=True) if acts >= RARE]
    seldom = ", ".join(f"{one:.3f}" for one, acts in zip(by_unit, share, strict=True) if acts < RARE) or "-"
    least = f"{len(often)} | {np.mean(often):.3f} | {min(often):.3f}"
    return f"| {outcome} | {kind} | {found['pooled']:.3f} | {least} | {seldom} | {found['median_width']:.3g} |"


def text(rows: list[str], images: int, options: argparse.Namespace) -> str:
    """The page."""
    lines = [
        "### Coverage of intervals over images",
        "",
        f"{HOW} Each image's own class. The truth is the mean over {images:,} images;",
        f"{options.redraws:,} re-draws of {options.size} of them, with replacement; 95 % intervals: Student's t, and",
        f"bootstrap-t of {options.resamples} resamples (in {min(options.bootstraps, options.redraws):,} of the",
        "re-draws). Share of intervals that contain the truth: pooled over all units; of the units that act on",
        "one image in a hundred or more, pooled and in the unit where it is smallest; and in each unit that acts",
        "more rarely, of whose images a re-draw has but a few, or none. Units that do nothing on any image are",
        "left out.",
        "",
        "| outcome | interval | all units | often | pooled | least | rare units | median width |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="of the test set")
    parser.add_argument("--size", type=int, default=500, help="images of a re-draw, with replacement")
    parser.add_argument("--redraws", type=int, default=2000)
    parser.add_argument("--bootstraps", type=int, default=2000, help="re-draws that get a bootstrap-t interval too")
    parser.add_argument("--resamples", type=int, default=999, help="of each bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", default=None, help="folder of the table of effects, which is made if it is missing")
    options = parser.parse_args()
    effects = table(options.table, options.images)
    data: dict[str, Any] = {}
    rows = []
    for outcome in OUTCOMES:
        values = effects.values(outcome=outcome)[1][:, 0, :, 0].double()
        # A unit that never does anything has the interval [0, 0], which is right; it is not counted.
        values = values[:, values.abs().amax(0) > 0]
        found = covered(values, options)
        skew = skewness(values)
        alive = (values != 0).double().mean(0)
        data[outcome] = {**found, "units": values.shape[1], "skewness": skew.tolist(), "share_not_zero": alive.tolist()}
        for kind, one in found.items():
            rows.append(row(outcome, kind, one, alive.tolist()))
            print(rows[-1], flush=True)
    write("expected_coverage", text(rows, len(effects), options), {"outcomes": data})


if __name__ == "__main__":
    main()
