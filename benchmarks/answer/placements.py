"""The answer's interval: does it cover the mean over all places, from the 24 that were drawn?

Fixed before the run: correctly classified photographs in the order of the data set; the region that
``estimate(..., answer=True)`` grows from 100 trials of the default design; P(class) with a place covered is the mean
over black, mean and blur. The truth is the mean over the places of the region's shape that lie apart from it, all of
them or a random part of --places. Each run draws 24 of these. Bar: the 95 % t interval covers the truth in 93 to 97 %
of photographs x runs.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.networks import photographs
from benchmarks.common.results import write
from ce_plugin import CausalEffect
from ce_plugin.datasets import cifar10_sheets
from ce_plugin.designs import RandomRegions
from ce_plugin.effects import RegionTest
from ce_plugin.effects.region import PLACEMENTS, other_places
from ce_plugin.interventions import PixelMask
from ce_plugin.models import VisionModel, cifar_resnet, efficientnet_lite0
from ce_plugin.randomness import generator
from ce_plugin.sites import patch_grid

FILLS, GRID, TRIALS, BATCH = ("zero", "mean", "blur"), (14, 14), 100, 64
LOW, HIGH = 0.93, 0.97


def sources(name: str) -> tuple[VisionModel, Tensor, Tensor | None]:
    """The network, photographs in model units, and labels where they say which answers are right."""
    folder = Path(os.environ["CE_PLUGIN_DATA"])
    if name == "cifar":
        net = cifar_resnet(20, weights=folder / "cifar10" / "nets" / "resnet20.pt")
        images, labels = cifar10_sheets(folder / "cifar10")
        return net, net.normalization.to_model(images), labels
    net = efficientnet_lite0()
    return net, net.normalization.to_model(photographs(200) * 255), None


def probabilities(net: VisionModel, x: Tensor, places: Tensor, target: int) -> Tensor:
    """P(target) with each place covered, the mean over the fills, (M,), float64."""
    pixels = places[:, patch_grid(x.shape[1], x.shape[2])[0, 0]][:, None]
    mask = PixelMask(FILLS, normalization=net.normalization)
    total = torch.zeros(len(places), dtype=torch.double)
    with torch.inference_mode():
        for variant in range(len(FILLS)):
            filled = mask.perturb(x[None], variant=variant)
            for start in range(0, len(places), BATCH):
                part = slice(start, start + BATCH)
                rows = torch.where(pixels[part], filled, x[None])
                total[part] += net.model(rows).softmax(1)[:, target].double()
    return total / len(FILLS)


def covered(values: Tensor, runs: int, photograph: int) -> Tensor:
    """Whether each run's interval covers the mean over all places, bool (R,)."""
    drawn = [
        torch.randperm(len(values), generator=generator(run, photograph, "runs"))[:PLACEMENTS] for run in range(runs)
    ]
    placed = torch.stack([values[rows] for rows in drawn])
    test = RegionTest(
        region=torch.ones(runs, 1, dtype=torch.bool), target=torch.zeros(runs, dtype=torch.long),
        measured="probability", clean=torch.ones(runs), covered=torch.zeros(runs), placed=placed,
    )  # fmt: skip
    low, high = test.interval().T
    truth = values.mean()
    return (low <= truth) & (truth <= high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("cifar", "lite0"), default="cifar", help="(default: %(default)s)")
    parser.add_argument("--photographs", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="of each photograph (default: %(default)s)")
    parser.add_argument("--places", type=int, default=2000, help="evaluated of each, at most (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    net, images, labels = sources(options.network)
    explainer = CausalEffect(net.model, design=RandomRegions(n_trials=TRIALS), normalization=net.normalization)
    hits, shown, counts, agreed, k = [], 0, [], 0.0, 0
    while len(hits) < options.photographs and k < len(images):
        x, k = images[k], k + 1
        with torch.no_grad():
            target = int(net.model(x[None]).argmax())
        if labels is not None and target != int(labels[k - 1]):
            continue
        test = explainer.estimate(x[None], ids=[k], answer=True).answer
        if test is None:
            raise RuntimeError("an answer was asked for")
        places = other_places(test.region[0], GRID)
        chosen = torch.randperm(len(places), generator=generator(0, k, "places"))[: options.places]
        values = probabilities(net, x, places[chosen], target)
        by_hand = probabilities(net, x, test.region, target)
        agreed = max(agreed, float((by_hand - test.covered).abs().max()))
        hits.append(covered(values, options.runs, k))
        shown += test.is_shown(0)
        counts.append(len(values))
        if len(hits) % 10 == 0:
            print(f"{len(hits)} photographs, {time.perf_counter() - start:.0f} s", flush=True)
    every = torch.stack(hits).double()
    n, mean = len(hits), float(every.mean())
    error = float(every.mean(1).std() / n**0.5)
    low, high = mean - 1.96 * error, mean + 1.96 * error
    met = LOW <= mean <= HIGH
    text = [
        f"### The interval of the answer ({options.network})",
        "",
        f"{n} photographs x {options.runs} runs of {PLACEMENTS} places out of {min(counts)} to {max(counts)} that were",
        f"run (mean over {len(FILLS)} fills). The 95 % interval covers their mean in {100 * mean:.1f} % of the runs",
        f"(interval over photographs {100 * low:.1f} to {100 * high:.1f}). Bar: {100 * LOW:.0f} to {100 * HIGH:.0f} %: "
        f"{'met' if met else 'not met'}.",
        "",
        f"The region takes more from its class than 24 other places at a level of 5 % in {shown} of {n} photographs. P",
        f"with the region covered differs from brute force by {agreed:.1e} at most.",
    ]
    data = {
        "network": options.network, "photographs": n, "runs": options.runs, "places": counts, "coverage": mean,
        "std_error": error, "met": met, "shown": shown, "largest_difference": agreed,
        "covered_by_photograph": every.mean(1).tolist(), "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
    write("answer" if options.network == "cifar" else f"answer_{options.network}", "\n".join(text), data)
    print("\n".join(text))


if __name__ == "__main__":
    main()
