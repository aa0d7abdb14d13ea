"""Domain adaptation of digits, MNIST to MNIST-M and to USPS: DANN and what it is compared with, three seeds each.

    python -m benchmarks.gallery.domain_adaptation --cache domain-adaptation.jsonl

Training takes 20,000 labelled digits of MNIST and as many of the target (7,000 of USPS) without their labels. MNIST-M
is made of other digits and of photographs of imagenet-samples; those of the test pictures are in no training picture.
USPS has no official split: ours is drawn from a seed. Settings were chosen with ``--choose``, which reports on 2,000
pictures of MNIST-M from digits and photographs of the *training* part, by one run with a seed that the report does not
use; USPS takes the same settings. What each run gave is a line of --cache, so that it can be interrupted and resumed.
Data are `mnist`, `usps` and `imagenet-samples` under the folder that the environment variable CE_PLUGIN_DATA names.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.results import write
from ce_plugin.datasets import data_folder, imagenet_samples, mnist, usps
from ce_plugin.interventions import Blend
from ce_plugin.models import DannCNN, pseudo_labels, train_adapted
from ce_plugin.randomness import generator

PAIRS = ("MNIST-M", "USPS")
METHODS = ("source only", "DANN", "without reversal", "pseudo-labels")
SEEDS = (0, 1, 2)
CHOOSING_SEED = 7
WEIGHTS = (0.3, 1.0, 3.0)
RATES = (1e-3, 3e-3)
CHOSEN = {"source only": 1e-3, "DANN": 3e-3, "without reversal": 3e-3, "pseudo-labels": 1e-3}  # rate of each
CONFIDENCES = (0.5, 0.9, 0.99)
PHOTOGRAPHS, DIGITS = 200, 20_000
FIFTH, BATCH = 5, 32
Labelled = tuple[Tensor, Tensor]


class Domains(NamedTuple):
    """Source and target of an adaptation; the target's training pictures have no labels."""

    source: Labelled
    target: Tensor
    source_test: Labelled
    choosing: Labelled | None
    test: Labelled


@dataclass(frozen=True)
class Run:
    """One training: what is trained on what, and how."""

    pair: str
    method: str
    seed: int
    steps: int
    weight: float
    lr: float
    confidence: float
    widths: tuple[int, int]
    digits: int = DIGITS


@cache
def domains(pair: str) -> Domains:
    """All pictures of a pair, (N, 3, 28, 28)."""
    digits, labels = mnist(data_folder("mnist"))
    test, test_labels = mnist(data_folder("mnist"), "test")
    digits, test = digits.expand(-1, 3, -1, -1), test.expand(-1, 3, -1, -1)
    source, source_test = (digits[:DIGITS], labels[:DIGITS]), (test, test_labels)
    if pair == "USPS":
        x, y = usps(data_folder("usps"), as_mnist=True)
        order = torch.randperm(len(x), generator=generator(0, "usps split"))
        x, y = x[order].expand(-1, 3, -1, -1), y[order]
        return Domains(source, x[:7000], source_test, None, (x[7000:], y[7000:]))
    files = imagenet_samples(data_folder("imagenet-samples"))
    seen, unseen = ([files[2 * k + odd][0] for k in range(PHOTOGRAPHS)] for odd in (0, 1))
    other, last = slice(DIGITS, 2 * DIGITS), slice(2 * DIGITS, 2 * DIGITS + 2000)
    choosing = Blend(seen)(digits[last], ids=range(2000), seed=1), labels[last]
    target = Blend(seen)(digits[other], ids=range(DIGITS))
    return Domains(source, target, source_test, choosing, (Blend(unseen)(test, ids=range(len(test))), test_labels))


def trained(run: Run) -> DannCNN:
    """The network of a run. Pseudo-labels: half of the steps on the source, then half on both."""
    data = domains(run.pair)
    (x, y), target = (part[: run.digits] for part in data.source), data.target[: run.digits]
    net = DannCNN.seeded(run.seed, widths=run.widths)
    options: dict[str, Any] = {"steps": run.steps, "lr": run.lr, "seed": run.seed, "batch_size": BATCH}
    options["show_progress"] = sys.stderr.isatty()
    if run.method == "pseudo-labels":
        options["steps"] = run.steps // 2
        train_adapted(net, x, y, **options)
        sure, answers = pseudo_labels(net, target, confidence=run.confidence)
        x, y = torch.cat([x, target[sure]]), torch.cat([y, answers])
    adversarial = run.method in ("DANN", "without reversal")
    reverse = run.method == "DANN"
    train_adapted(net, x, y, target if adversarial else None, weight=run.weight, reverse=reverse, **options)
    return net


def accuracy(net: DannCNN, pictures: Labelled) -> float:
    """Share of right answers."""
    with torch.no_grad():
        answers = torch.cat([net(x).argmax(1) for x in pictures[0].split(500)])
    return float((answers == pictures[1]).double().mean())


def measured(run: Run, file: Path, choose: bool) -> dict[str, Any]:
    """What a run gives, from the cache where it is there; on the choosing pictures or on the test pictures."""
    key = {**asdict(run), "widths": list(run.widths), "choose": choose}
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for line in known:
        if {name: line.get(name) for name in key} == key:
            return dict(line)
    print(f"{run.pair}, {run.method}, seed {run.seed}, weight {run.weight:g}, {run.steps} steps", flush=True)
    net, data = trained(run), domains(run.pair)
    tests = {"target": data.choosing} if choose else {"source": data.source_test, "target": data.test}
    line = {**key, **{name: accuracy(net, pictures) for name, pictures in tests.items()}}
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    return line


def choosing(base: Run, file: Path) -> None:
    """Print what settings give on pictures of MNIST-M's training part, in half of the steps."""
    dann = replace(base, seed=CHOOSING_SEED, steps=base.steps // 2)
    runs = [replace(dann, method=method, lr=lr) for method in ("source only", "DANN") for lr in RATES]
    runs += [replace(dann, lr=RATES[0], weight=weight) for weight in WEIGHTS]
    runs += [replace(dann, method="pseudo-labels", lr=RATES[0], confidence=share) for share in CONFIDENCES]
    for run in runs:
        found = measured(run, file, choose=True)["target"]
        print(f"{run.method}, rate {run.lr:g}, weight {run.weight:g}, confidence {run.confidence:g}: {found:.3f}")


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Accuracy on both domains by method, the mean and each seed."""
    rows = ["| target | training | source | target | target, by seed |", "| --- | --- | --- | --- | --- |"]
    for pair in dict.fromkeys(line["pair"] for line in lines):
        for method in METHODS:
            own = [line for line in lines if (line["pair"], line["method"]) == (pair, method)]
            seeds = ", ".join(f"{line['target']:.1%}" for line in own)
            source, target = (mean(line[name] for line in own) for name in ("source", "target"))
            rows.append(f"| {pair} | {method} | {source:.1%} | {target:.1%} | {seeds} |")
    return rows


def gain(lines: list[dict[str, Any]], pair: str) -> float:
    """Points that DANN is above source-only on the target, mean over the seeds."""
    by_method = [
        mean(line["target"] for line in lines if (line["pair"], line["method"]) == (pair, method))
        for method in ("DANN", "source only")
    ]
    return 100 * (by_method[0] - by_method[1])


def report(base: Run, lines: list[dict[str, Any]], sweep: list[dict[str, Any]]) -> str:
    """The results in words and tables."""
    pairs = dict.fromkeys(line["pair"] for line in lines)
    gains = " and ".join(f"{gain(lines, pair):+.1f} points on {pair}" for pair in pairs)
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in CHOSEN.items())
    weights = ", ".join(f"{line['weight']:g}: {line['target']:.1%}" for line in sweep[1:])
    return "\n".join(
        [
            "# Domain adaptation of digits",
            "",
            "Right answers on the 10,000 test digits of MNIST (source), and on the target's test pictures: 10,000 of "
            f"MNIST-M, 4,000 of USPS. Training: {base.steps} steps of {BATCH} pictures of each domain, of {DIGITS} of "
            "MNIST and as many of MNIST-M (7,000 of USPS) without labels; Adam, at a rate of "
            f"{rates}; weight of the reversal {base.weight:g}; convolutions of {base.widths[0]} and {base.widths[1]} "
            f"channels. Pseudo-labels: the answers of probability {base.confidence:g} or more after half of the steps. "
            f"Seeds {', '.join(map(str, SEEDS))}. DANN is above source only by {gains}, mean of the seeds.",
            "",
            *table(lines),
            "",
            f"By the weight of the reversal, at a fifth of steps and digits, on MNIST-M with seed 0: source only "
            f"{sweep[0]['target']:.1%}; {weights}.",
        ]
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--choose", action="store_true", help="compare settings, without the test pictures")
    parser.add_argument("--cache", type=Path, default=Path("domain-adaptation.jsonl"))
    args = parser.parse_args()
    base = Run("MNIST-M", "DANN", 0, args.steps, args.weight, CHOSEN["DANN"], args.confidence, (16, 32))
    if args.choose:
        choosing(base, args.cache)
        return
    small = replace(base, steps=args.steps // FIFTH, digits=DIGITS // FIFTH)
    sweep = [replace(small, method="source only", lr=CHOSEN["source only"])]
    sweep += [replace(small, weight=weight) for weight in WEIGHTS]
    by_weight = [measured(run, args.cache, choose=False) for run in sweep]
    lines: list[dict[str, Any]] = []
    for pair in PAIRS:  # written after each, so that there is something to read early
        runs = [replace(base, pair=pair, method=m, seed=s, lr=CHOSEN[m]) for s in SEEDS for m in METHODS]
        lines += [measured(run, args.cache, choose=False) for run in runs]
        write("gallery_domain_adaptation", report(base, lines, by_weight), {"runs": lines, "sweep": by_weight})


if __name__ == "__main__":
    main()
