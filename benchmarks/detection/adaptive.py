"""The adaptive attack on classifiers and detectors; earlier results are read from the cache, so that runs resume.

    python -m benchmarks.detection.adaptive                                  all problems, seed 0, 200 images
    python -m benchmarks.detection.adaptive mnist --detectors causal-effects mahalanobis --eps 0.1 0.3 --images 40
    python -m benchmarks.detection.adaptive mnist fashion --seed 0 1 2       everything that is reported
    python -m benchmarks.detection.adaptive mnist --no-attacks               the table of what is in the cache

Results are cached by losses, steps, restarts and width, and the table shows the setting with which most images were
attacked. Where the cache holds less than the results of an earlier run, these are kept if the detector still gives the
clean images the same scores. Writes
`benchmarks/results/detection_adaptive.md` and `.json`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.common.results import RESULTS, write
from benchmarks.detection._adaptive_attack import CHUNK, Effort, TargetModel, chunks, compared, kept
from benchmarks.detection._adaptive_tables import FILE, WANTED, Row, means, tables
from benchmarks.detection._detectors import OURS, names
from benchmarks.detection._problems import PROBLEMS, SEEDS, check_problems, load
from ce_plugin.detection.adaptive import LOSSES

EPS = (0.05, 0.1, 0.2, 0.3, math.inf)


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    effort = Effort(tuple(options.losses), options.steps, options.restarts, options.width, options.attack_seed)
    until = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    for name in options.problem or [problem for problem in PROBLEMS if problem != "imagenet"]:
        for seed in options.seed:
            if seed in SEEDS[name] or options.dry:
                rows += run(name, seed, effort, options, until)
    built = tables(rows, RESULTS)
    text = "# Detectors against an attacker who knows them\n\n" + "\n\n".join(table.markdown() for table in built)
    print(text)
    if rows and not options.dry:
        over = [one.to_dict() for one in means(rows)]
        data = {"wanted": WANTED, "means": over, "rows": [row.to_dict() for row in rows]}
        write("detection_adaptive", text, data, "adversarial-robustness-toolbox")


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", nargs="*", help=f"of {', '.join(PROBLEMS)}; the two with small images by default")
    parser.add_argument("--detectors", nargs="*", default=(OURS, "mahalanobis"), choices=names())
    parser.add_argument("--seed", nargs="*", type=int, default=(0,), help="classifiers")
    parser.add_argument("--eps", nargs="*", type=float, default=EPS, help="inf: anything inside the clip values")
    parser.add_argument("--images", type=int, default=WANTED, help=f"rounded up to {CHUNK}")
    parser.add_argument("--losses", nargs="*", default=Effort.losses, choices=tuple(LOSSES))
    parser.add_argument("--steps", type=int, default=Effort.steps)
    parser.add_argument("--restarts", type=int, default=Effort.restarts)
    parser.add_argument("--width", type=int, default=Effort.width)
    parser.add_argument("--attack-seed", type=int, default=Effort.seed)
    parser.add_argument("--minutes", type=float, help="start no chunk after so many")
    parser.add_argument("--no-attacks", action="store_true", help="only the table of what is in the cache")
    parser.add_argument("--dry", action="store_true", help="do not write to benchmarks/results")
    parser.add_argument("--cache", help="folder of the cache; default CE_PLUGIN_CACHE or ~/.cache/ce-plugin")
    options = parser.parse_args()
    check_problems(parser, options.problem)
    options.eps = sorted(set(options.eps))
    return options


def run(name: str, seed: int, effort: Effort, options: argparse.Namespace, until: float) -> Iterator[Row]:
    """All detectors on one classifier, chunk by chunk, so that an interrupted run has results for each."""
    problem, numbers = load(name, seed, options.cache), range(math.ceil(options.images / CHUNK))
    attacked = []
    for detector in options.detectors:
        target = TargetModel.ready(problem, detector, options.cache)
        if callable(getattr(target.detector, "score_tensor", None)):
            attacked.append(target)
        else:
            print(f"{detector} has no gradient and is not attacked", flush=True)
    for chunk in () if options.no_attacks else numbers:
        for target in attacked:
            if time.monotonic() < until:
                attack(target, chunk, options.eps, effort)
    for target in attacked:
        for eps in options.eps:
            row = best_known(target, eps, numbers, RESULTS / FILE)
            if row is not None:
                yield row


def best_known(target: TargetModel, eps: float, numbers: Sequence[int], results: Path) -> Row | None:
    """Results of the effort with most images, from the cache or an earlier run."""
    found, before = chunks(target, eps, numbers), kept(target, eps, results, numbers)
    if found is None and before is None:
        return None
    if found is None or (before is not None and len(before.found) > len(found[1])):
        return Row.of(target, eps, before.effort, before.found, before.more)
    return Row.of(target, eps, *found, compared(target, eps, *found))


def attack(target: TargetModel, number: int, every: list[float], effort: Effort) -> None:
    """Attack a chunk of images at every eps, starting each from the previous result."""
    starts = None
    for eps in every:
        found = target.chunk(number, eps, effort, starts, make=True)
        if found is None:
            return
        starts = found.images
        now, about = time.strftime("%H:%M:%S", time.gmtime()), f"{target.problem.name}-{target.problem.seed}"
        what = f"{found.success.sum()} of {len(found.success)}, {found.seconds:.1f} s an image"
        print(f"{now} {about} {target.name} eps {eps:g} chunk {number}: {what}", flush=True)


if __name__ == "__main__":
    main()
