"""Do a conditional DCGAN's pictures show their class, and are they as varied as real ones? MNIST and Fashion-MNIST.

    python -m benchmarks.gallery.cdcgan --steps 2000 --cache cdcgan-cache

Trained on the first 20,000 training pictures; settings are varied one by one on MNIST, at a fifth of the steps. Judged
by networks that have nothing to do with it: `digit-nets/mnist_cnn.npz`, and for Fashion-MNIST a small network trained
here on 40,000 other training pictures. Data sets are read from the folder that the environment variable CE_PLUGIN_DATA
names. Trainings are checkpoints in --cache, and what a finished one gave is a line of its results.jsonl, so that a run
can be interrupted and resumed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from benchmarks.common.results import write
from ce_plugin.datasets import data_folder, fashion_mnist, mnist
from ce_plugin.files import load, save
from ce_plugin.models import FashionCNN, Framing, VisionModel, mnist_cnn, train_classifier, train_gan
from ce_plugin.networks import state_guard

TRAINING = 20_000
# What each row differs in from the first; chosen on other seeds than that reported.
SETTINGS: dict[str, Any] = {"lr": 5e-4, "latent": 64, "width": 32, "discriminator_updates": 1, "mismatched": True}
VARIED: dict[str, dict[str, Any]] = {
    "the same, a fifth of the steps": {},
    "original (saturating) loss": {"loss": "saturating"},
    "learning rate 2e-4": {"lr": 2e-4},
    "learning rate 1e-3": {"lr": 1e-3},
    "latent size 16": {"latent": 16},
    "two updates of D per G": {"discriminator_updates": 2},
    "no mismatched pairs": {"mismatched": False},
    "no y in the discriminator": {"mismatched": False, "labels_for": "generator"},
}
READERS: dict[str, tuple[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    "MNIST": ("mnist", mnist),
    "Fashion-MNIST": ("fashion-mnist", fashion_mnist),
}


def judge_of(name: str, images: Tensor, labels: Tensor, cache: Path) -> VisionModel:
    """An independent network for a data set; trained once where there is none."""
    if name == "MNIST":
        return mnist_cnn(data_folder("digit-nets") / "mnist_cnn.npz")
    with state_guard(seed=0):
        network = FashionCNN()
    file = cache / "fashion-judge.pt"
    if not file.is_file():
        others = slice(TRAINING, None)
        train_classifier(network, images[others], labels[others], epochs=5, lr=2e-3, batch_size=64, mirror=True)
        save(file, "judge", 1, {"weights": network.state_dict()})
    network.load_state_dict(load(file, "judge", 1)["weights"])
    return VisionModel(network.eval(), name="FashionCNN", framing=Framing(28), grayscale=True)


def agreement(network: VisionModel, pictures: Tensor, classes: Tensor) -> list[float]:
    """Share of pictures that the network takes as their class, and its 95 % interval (Wilson)."""
    inputs = network.normalization.to_model(pictures)
    with torch.no_grad():
        answers = torch.cat([network.model(part).argmax(1) for part in inputs.split(500)])
    right = int((answers == classes).sum())
    interval = binomtest(right, len(classes)).proportion_ci(method="wilson")
    return [right / len(classes), float(interval.low), float(interval.high)]


def spread(pictures: Tensor) -> tuple[float, float]:
    """Mean Euclidean distance of pairs of pictures, and its standard error over the pictures.

    The mean over pairs is a U-statistic: its variance is about 4 / n times that of the pictures' own mean distances.
    """
    n = len(pictures)
    own = torch.cdist(pictures.flatten(1).double(), pictures.flatten(1).double()).sum(1) / (n - 1)
    return float(own.mean()), 2 * float(own.std()) / math.sqrt(n)


def variety(made: Tensor, real: Tensor) -> list[float]:
    """Mean over classes of the spread of made pictures over that of real ones, (K, n, ...), with its 95 % interval."""
    ratios, variances = [], []
    for ours, theirs in zip(made, real, strict=True):
        (a, error), (b, other) = spread(ours), spread(theirs)
        ratios.append(a / b)
        variances.append((a / b) ** 2 * ((error / a) ** 2 + (other / b) ** 2 if a else 0.0))
    mean, half = sum(ratios) / len(ratios), 1.96 * math.sqrt(sum(variances)) / len(ratios)
    return [mean, mean - half, mean + half]


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each training gave; from the cache where it is there."""
    cache = args.cache / "results.jsonl"
    known = [json.loads(line) for line in cache.read_text().splitlines()] if cache.is_file() else []
    done = {json.dumps(line["asked"], sort_keys=True): line for line in known}
    fifth = args.steps // 5
    plan = [(name, "full", args.steps, dict[str, Any]()) for name in READERS]
    plan += [("Fashion-MNIST", "no y in the discriminator", fifth, VARIED["no y in the discriminator"])]
    plan += [("MNIST", title, fifth, change) for title, change in VARIED.items()]
    for name, title, steps, change in plan:
        asked = {"data": name, "steps": steps, "seed": args.seed, "samples": args.samples, **SETTINGS, **change}
        key = json.dumps(asked, sort_keys=True)
        if key not in done:
            done[key] = {"asked": asked, "title": title, **measured(asked, args.cache)}
            with cache.open("a") as stream:
                stream.write(json.dumps(done[key]) + "\n")
        yield done[key]


def measured(asked: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Train, and measure on noise of ids that training never shows."""
    folder, read = READERS[asked["data"]]
    images, labels = read(data_folder(folder))
    settings = {key: value for key, value in asked.items() if key not in ("data", "samples")}
    name = "-".join(str(value) for value in asked.values())
    file = cache / f"{name}.gan"
    part = images[:TRAINING], labels[:TRAINING]
    gan = train_gan(*part, frames=4, checkpoint=file, show_progress=True, **settings)
    each, classes = asked["samples"], torch.arange(10)
    z = gan.generator.latents(range(1000, 1000 + each), asked["seed"])
    with torch.no_grad():
        made = torch.stack([gan.generator(z, classes[c].expand(each)) for c in range(10)])
    real = torch.stack([images[labels == c][:each] for c in range(10)])
    network = judge_of(asked["data"], images, labels, cache)
    test = read(data_folder(folder), "test")
    return {
        "judge": agreement(network, *test),
        "agreement": agreement(network, made.flatten(0, 1), classes.repeat_interleave(each)),
        "by class": [agreement(network, made[c], classes[c].expand(each))[0] for c in range(10)],
        "variety": variety(made, real),
        "losses": gan.losses[-100:].mean(0).tolist(),
    }


def table(found: list[dict[str, Any]]) -> list[str]:
    """The rows as a table."""
    lines = [
        "| data | training | steps | taken as its class | variety | last losses (D, G) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in found:
        share, low, high = (f"{100 * value:.1f}" for value in row["agreement"])
        ratio, least, most = (f"{value:.2f}" for value in row["variety"])
        judged, made_up = row["losses"]
        lines.append(
            f"| {row['asked']['data']} | {row['title']} | {row['asked']['steps']} | {share} % ({low} to {high}) "
            f"| {ratio} ({least} to {most}) | {judged:.2f}, {made_up:.2f} |"
        )
    return lines


def report(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write what there is."""
    judged = {row["asked"]["data"]: f"{row['judge'][0]:.2%}" for row in found}
    lines = [
        "# A conditional DCGAN on MNIST and Fashion-MNIST",
        "",
        "Share of the generator's pictures that an independent network takes as the class that they were made for (95 "
        "% interval, Wilson), and their variety: the mean distance of two pictures of a class over that of two real "
        f"ones, mean over classes (95 % interval). {args.samples} pictures a class, the same noise in all classes; one "
        "training a row, so that intervals are those of the pictures alone. On real test pictures the judges are right "
        f"on {' and '.join(f'{share} ({name})' for name, share in judged.items())}.",
        "",
        f"Trained on {TRAINING:,} pictures in batches of 64, seed {args.seed}, learning rate {SETTINGS['lr']:g}, "
        f"latent size {SETTINGS['latent']}, {SETTINGS['discriminator_updates']} update of D per G, non-saturating "
        "loss, real pictures under a wrong class counted among the made ones; the other rows differ in what they say.",
        "",
        *table(found),
    ]
    write("gallery_cdcgan", "\n".join(lines), {"rows": found})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=200, help="of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("cdcgan-cache"))
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows(args):
        found.append(row)
        report(found, args)


if __name__ == "__main__":
    main()
