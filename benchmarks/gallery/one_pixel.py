"""How often does one pixel fool a ResNet on CIFAR-10? ART's PixelAttack, by differential evolution.

    python -m benchmarks.gallery.one_pixel --images 100 --cache one-pixel.jsonl

The first pictures of the test set that the network gets right are attacked (`th=1, es=1`, the network's probabilities),
each with random numbers from its own index. What each gave is a line of --cache, so that a run can be interrupted and
resumed. Pictures are `cifar10` under the folder that the environment variable CE_PLUGIN_DATA names. About 400 passes an
iteration and picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import nn
from tqdm import tqdm

from benchmarks.common.results import write
from ce_plugin.datasets import CIFAR10_CLASSES, cifar10_sheets, data_folder
from ce_plugin.interventions import Adversarial
from ce_plugin.models import cifar_resnet


def attacked(depth: int, images: int, max_iter: int, cache: Path) -> Iterator[dict[str, Any]]:
    """What the attack gave on each picture, in order; from the cache where it is there."""
    from art.attacks.evasion import PixelAttack
    from art.estimators.classification import PyTorchClassifier

    net = cifar_resnet(depth, data_folder("cifar10") / "nets" / f"resnet{depth}.pt")
    units = (net.normalization.mean, net.normalization.std)
    classifier = PyTorchClassifier(
        nn.Sequential(net.model, nn.Softmax(1)),
        loss=None,
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        preprocessing=units,
    )
    attack = Adversarial(
        PixelAttack(classifier, th=1, es=1, max_iter=max_iter, verbose=False), normalization=units, probabilities=True
    )
    pictures, labels = cifar10_sheets(data_folder("cifar10"))
    pictures, labels = pictures[: 2 * images], labels[: 2 * images]
    x = net.normalization.to_model(pictures)
    with torch.no_grad():
        right = torch.cat([net.model(part).argmax(1) for part in x.split(100)]) == labels
    settings = {"depth": depth, "max_iter": max_iter}
    known = [json.loads(line) for line in cache.read_text().splitlines()] if cache.is_file() else []
    done = {line["picture"]: line for line in known if {key: line[key] for key in settings} == settings}
    for k in tqdm(right.nonzero().flatten()[:images].tolist()):
        if k not in done:
            result = attack.run(x[k : k + 1], ids=[k])
            done[k] = {
                **settings,
                "picture": k,
                "class": CIFAR10_CLASSES[int(labels[k])],
                "answer": CIFAR10_CLASSES[int(result.prediction[0])],
                "success": bool(result.success[0]),
            }
            with cache.open("a") as stream:
                stream.write(json.dumps(done[k]) + "\n")
        yield done[k]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--depth", type=int, default=20, choices=(20, 32, 56))
    parser.add_argument("--max-iter", type=int, default=30)
    parser.add_argument("--cache", type=Path, default=Path("one-pixel.jsonl"))
    args = parser.parse_args()
    rows = list(attacked(args.depth, args.images, args.max_iter, args.cache))
    fooled = [row for row in rows if row["success"]]
    low, high = binomtest(len(fooled), len(rows)).proportion_ci(method="wilson")
    lines = [
        f"# One pixel against ResNet-{args.depth}",
        "",
        f"{len(fooled)} of {len(rows)} CIFAR-10 test pictures that the network gets right are given another answer by "
        f"one pixel: {len(fooled) / len(rows):.1%} (95 % interval, Wilson: {low:.1%} to {high:.1%}). Attack: ART's "
        f"PixelAttack, untargeted, at most {args.max_iter} iterations of differential evolution.",
    ]
    write(f"gallery_one_pixel_resnet{args.depth}", "\n".join(lines), {"pictures": rows, "interval": [low, high]})


if __name__ == "__main__":
    main()
