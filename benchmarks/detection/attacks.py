"""Make the attacked images for evaluating detectors, once, and cache them; an interrupted run resumes.

    python -m benchmarks.detection.attacks                         everything, most important first
    python -m benchmarks.detection.attacks --problem mnist --seed 1 --attack deepfool pgd-0.1
    python -m benchmarks.detection.attacks --list                  list what is in the cache

Per problem, seed, part and attack one file `CACHE/detection/attacks/PROBLEM-SEED/PART/ATTACK.npz`, read by
`benchmarks.harness.attacks.Attacked.load`. Part "test" is attacked with the whole suite, part "fit" with
FGSM, for detectors that are fitted to it. Images are stored with eight bits; success is determined after rounding.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.detection._problems import DEVELOPMENT_SEED, PROBLEMS, SEEDS, Problem, cache_folder, load
from benchmarks.harness.attacks import Attacked, AttackSpec, cached_attack
from benchmarks.harness.suites import fit_suite, suite
from ce_plugin.errors import FileError

SLOW = ("PixelAttack",)  # run last
QUICK = ("FastGradientMethod", "BasicIterativeMethod", "ProjectedGradientDescent", "DeepFool")


def suite_name(problem: str) -> str:
    """The suite of a problem."""
    return "imagenet" if problem == "imagenet" else "small"


def attack_file(problem: str, seed: int, part: str, attack: str, cache: str | Path | None = None) -> Path:
    """File with the attacked images of a problem, seed, part and attack."""
    return cache_folder(cache) / "attacks" / f"{problem}-{seed}" / part / f"{attack}.npz"


def specs(problem: str, part: str) -> tuple[AttackSpec, ...]:
    """The attacks on a part: all on "test", those for fitting on "fit", quick ones on "select"."""
    known = suite(suite_name(problem))
    if part == "fit":
        return fit_suite(suite_name(problem))
    return known if part == "test" else tuple(spec for spec in known if spec.attack in QUICK)


def ensure(problem: Problem, part: str, spec: AttackSpec, cache: str | Path | None = None) -> Attacked:
    """The attacked images, from the cache or computed now."""
    file = attack_file(problem.name, problem.seed, part, spec.name, cache)
    return cached_attack(file, spec, problem.network, problem.images[part], problem.labels[part], seed=problem.seed)


def stages() -> Iterator[tuple[str, int, str, str]]:
    """(problem, seed, part, attacks) to run, most important first."""
    for seed in SEEDS["fashion"]:
        for which in ("quick", "most"):
            for name in ("fashion", "mnist"):
                if which == "quick":
                    yield name, seed, "fit", "all"
                yield name, seed, "test", which
        if seed == 0:
            yield "imagenet", 0, "fit", "all"
            yield "imagenet", 0, "test", "quick"
    yield "imagenet", 0, "test", "most"
    for seed in SEEDS["fashion"]:
        for name in ("fashion", "mnist"):
            yield name, seed, "test", "all"
    yield "imagenet", 0, "test", "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="*", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--seed", nargs="*", type=int, help=f"{DEVELOPMENT_SEED} is for development")
    parser.add_argument("--part", nargs="*", default=("fit", "test"), choices=("fit", "select", "test"))
    parser.add_argument("--attack", nargs="*", help="only these, by name")
    parser.add_argument("--cache", help="folder of the cache; default CE_PLUGIN_CACHE or ~/.cache/ce-plugin")
    parser.add_argument("--list", action="store_true", help="show what is in the cache, make nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.list:
        show(options.cache)
        return
    plan = list(stages())
    for name in options.problem:
        extra = [seed for seed in options.seed or () if seed not in SEEDS[name]]
        plan += [(name, seed, part, "all") for seed in extra for part in ("fit", "select", "test")]
        if "select" in options.part:
            plan += [(name, seed, "select", "all") for seed in SEEDS[name]]
    for name, seed, part, which in plan:
        wanted = name in options.problem and part in options.part
        if wanted and (options.seed is None or seed in options.seed):
            run(name, seed, part, which, options.attack, options.cache)


def run(name: str, seed: int, part: str, which: str, chosen: list[str] | None, cache: str | None) -> None:
    """All attacks of one stage; if one fails, this is reported and the others run."""
    start, problem = time.perf_counter(), load(name, seed, cache)
    for spec in specs(name, part):
        left_out = (which == "quick" and spec.attack not in QUICK) or (which == "most" and spec.attack in SLOW)
        if left_out or (chosen and spec.name not in chosen):
            continue
        try:
            line = summary(name, seed, part, ensure(problem, part, spec, cache))
        except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError):
            line = f"{name}-{seed} {part} {spec.name}: broke off\n{traceback.format_exc()}"
        print(time.strftime("%H:%M:%S", time.gmtime()), line, flush=True)
    print(f"{name}-{seed} {part} {which}: {time.perf_counter() - start:.0f} s", flush=True)


def summary(name: str, seed: int, part: str, made: Attacked) -> str:
    """One line about the results of an attack."""
    good = made.success
    sizes = "nothing"
    if good.any():
        sizes = (
            f"L2 {made.l2[good].mean():.2f}, Linf {made.linf[good].mean():.3f}, pixels {made.changed[good].mean():.0f}"
        )
    return (
        f"{name}-{seed} {part:6s} {made.spec['name']:16s} {good.sum():4d} of {len(good):4d}; {sizes}, stretch "
        f"{made.stretch.mean():.2f}; {made.forwards:.0f} passes and {made.seconds / len(good):.3f} s an image"
    )


def show(cache: str | None) -> None:
    """List the cache."""
    for file in sorted((cache_folder(cache) / "attacks").glob("*/*/*.npz")):
        problem, seed = file.parent.parent.name.rsplit("-", 1)
        try:
            print(summary(problem, int(seed), file.parent.name, Attacked.load(file)))
        except FileError as error:
            print(error)


if __name__ == "__main__":
    main()
