"""Detecting attacked chest X-rays: our detector and the paper's index as one, beside scores that need no effects.

Not for clinical use. The network is the pneumonia CNN, whose logit z is attacked as the two classes (-z/2, z/2), on
gray images. Our detector is fitted on clean training images only. The paper's index of an image is the
prediction-weighted effect of Z0 (with an autoencoder, and without); its text says that effects fall under attack, so
small in size means attacked. Pairs: a test image that is answered correctly, and the same image under an attack that
changes the answer. Attacked images, autoencoder and fit are cached (CE_PLUGIN_CACHE); an interrupted run goes on there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.common.results import write
from benchmarks.paper._page import Interval, save_page
from benchmarks.paper._xrays import (
    ATTACKS,
    LEVEL,
    GrayTwoClasses,
    attacked,
    cache_folder,
    logits,
    network,
    pneumonia_parts,
    prepared,
)
from ce_plugin import ConceptCausalEffect, LayerCausalEffect
from ce_plugin.concepts import ConceptAutoencoder, train_autoencoder
from ce_plugin.detection import CausalEffectDetector, Denoising, Signature
from ce_plugin.evaluation import figures
from ce_plugin.interventions import Adversarial
from ce_plugin.randomness import generator
from ce_plugin.visualization import plot_intervals

LAYER, CONCEPTS, FIDELITY = "network.relu3", 16, 0.8
NOISE = {"noise of equal size": 0.3, "noise of equal size .03": 0.03}
FPR = 0.05
_BATCH = 50
Scores = dict[str, "np.ndarray[Any, np.dtype[np.float64]]"]


def preset(net: nn.Module, name: str) -> Adversarial:
    """One of the attacks on the network."""
    return Adversarial.preset(ATTACKS[name]["name"], net, eps=ATTACKS[name]["eps"], batch_size=_BATCH)


def noisy(x: Tensor, size: float) -> Tensor:
    """Every pixel moved by this size, up or down at random: as large as an attack, but none."""
    signs = torch.stack([torch.rand(x.shape[1:], generator=generator(0, i, "signs")) for i in range(len(x))])
    return (x + size * torch.where(signs < 0.5, -1.0, 1.0)).clamp(0, 1)


def autoencoder(net: nn.Module, x: Tensor) -> ConceptAutoencoder:
    """That of the layer, with a code of 16 channels; from the cache, or trained now."""
    file = cache_folder() / "detector" / f"autoencoder-{len(x)}.ce"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        train_autoencoder(net, LAYER, x, CONCEPTS, epochs=8).save(file)
    return ConceptAutoencoder.load(file)


def signatures(steps: int) -> dict[str, Signature]:
    """Name -> what a detector looks at: the package's two presets, that of small images with the denoiser's steps.

    Args:
        steps: the denoiser's training, at least; 0 leaves the denoiser out.
    """
    rest = Signature.small_images().probes[1:]
    name = f"ours, small images{'' if steps else ' without denoiser'}"
    small = Signature([Denoising(least_steps=steps), *rest] if steps else rest)
    return {name: small, "ours, photographs": Signature.photographs()}


class Indices:
    """The paper's index as scores: small in size means attacked.

    Args:
        net: two classes.
        coder: the autoencoder.
        fit: clean images, on which the node with the largest expected effect is found.
    """

    def __init__(self, net: nn.Module, coder: ConceptAutoencoder, fit: Tensor) -> None:
        outcome = "prediction_weighted"
        self.explainers: dict[str, LayerCausalEffect] = {
            f"code of {CONCEPTS}": ConceptCausalEffect(net, LAYER, coder, min_fidelity=FIDELITY, outcome=outcome),
            "no autoencoder": LayerCausalEffect(net, LAYER, outcome=outcome),
        }
        self.largest = {name: int(self._effects(name, fit).mean(0).abs().argmax()) for name in self.explainers}

    def _effects(self, name: str, x: Tensor) -> Tensor:
        """(N, U)."""
        return torch.cat([self.explainers[name].estimate(part).effect[:, :, 0] for part in torch.split(x, _BATCH)])

    def __call__(self, x: Tensor) -> Scores:
        """Scores of images: of the largest node, and of the sum over all nodes."""
        found: Scores = {}
        for name, node in self.largest.items():
            effects = self._effects(name, x).double()
            found[f"index, {name}, node {node}"] = -effects[:, node].abs().numpy()
            found[f"index, {name}, sum of all nodes"] = -effects.sum(1).abs().numpy()
        return found


def scored(net: nn.Module, detectors: Mapping[str, CausalEffectDetector], indices: Indices, x: Tensor) -> Scores:
    """All scores of images: larger means attacked."""
    p = logits(net, x).double().softmax(1)
    return {
        **{name: detector.score(x.numpy()) for name, detector in detectors.items()},
        **indices(x),
        "1 - max softmax": -p.amax(1).numpy(),
        "1 - |p|²": 1 - p.square().sum(1).numpy(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400, help="test images at most")
    parser.add_argument("--fit", type=int, default=600, help="clean training images of the detector at most")
    parser.add_argument("--steps", type=int, default=800, help="least training steps of the denoiser; 0: none")
    parser.add_argument("--out", type=Path, help="a folder for detector.csv")
    options = parser.parse_args()
    cnn = network("pneumonia CNN")
    net = GrayTwoClasses(cnn.model).eval()
    train, test = pneumonia_parts()
    fit = prepared(cnn, train).first(options.fit).x[:, :1].contiguous()
    images = prepared(cnn, test).first(options.images)
    x, y = images.x[:, :1].contiguous(), images.y[:, 0].long()
    right = logits(net, x).argmax(1) == y
    x, y = x[right], y[right]
    detectors = {}
    for number, (name, signature) in enumerate(signatures(options.steps).items()):
        detectors[name] = CausalEffectDetector(net, signature, fpr=FPR, clip_values=(0.0, 1.0))
        folder = cache_folder() / "detector" / f"fit-{number}-{len(fit)}-{options.steps}"
        detectors[name].fit(fit.numpy(), checkpoint=str(folder))
    coder = autoencoder(net, fit)
    indices = Indices(net, coder, fit[:200])
    clean, ids = scored(net, detectors, indices, x), np.arange(len(x))
    rows: list[dict[str, Any]] = []
    alarms = {name: {"clean": float((clean[name] > one.threshold).mean())} for name, one in detectors.items()}
    sets = {name: attacked(preset(net, name), net, x) for name in ATTACKS}
    sets |= {name: noisy(x, eps) for name, eps in NOISE.items()}
    for name, changed in sets.items():
        same = logits(net, changed).argmax(1) == y
        kept = (same if name in NOISE else ~same).numpy()
        print(name, int(kept.sum()), flush=True)
        if kept.sum() < 2:
            continue
        under = scored(net, detectors, indices, changed[torch.from_numpy(kept)])
        for own, one in detectors.items():
            alarms[own][name] = float((under[own] > one.threshold).mean())
        for score, values in under.items():
            found = figures(
                clean[score][kept], values, detector=score, attack=name, ids=(ids[kept], ids[kept]), level=LEVEL
            )
            rows.append(found.to_dict())
    about = {
        "test_images": len(images),
        "answered_correctly": len(x),
        "fit_images": len(fit),
        "denoiser_steps": options.steps,
        "autoencoder": str(coder.fidelity),
        "alarms": alarms,
        "fpr": FPR,
    }
    page = text(rows, about)
    save_page(options.out, "xray_detector", page, {"detector": rows}, {"detector": plot(rows)})
    write("paper_xray_detector", page, {**about, "rows": rows, "attacks": ATTACKS})


def plot(rows: list[dict[str, Any]]) -> Figure:
    """How well each score tells attacked images, and images with noise, from clean ones."""
    areas: dict[str, dict[str, Interval]] = {}
    for row in rows:
        areas.setdefault(row["attack"], {})[row["detector"]] = (row["auroc"], row["auroc_low"], row["auroc_high"])
    return plot_intervals({"attacks and noise": areas}, at=0.5, xlabel="AUROC")


def text(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The tables."""
    steps = about["denoiser_steps"] or "no"
    lines = [
        "### Detecting attacked chest X-rays",
        "",
        "Not for clinical use. Pneumonia CNN as two classes, gray images of 64 x 64."
        f" {about['answered_correctly']} of {about['test_images']} test images are answered correctly; pairs of such an"
        " image and its successful attack. AUROC, 95 % intervals of a bootstrap over images, both forms together. The"
        " index is small in size for attacked images, as the paper's tables have it. With two classes the largest"
        f" softmax and |p|² order images alike. Our detectors were fitted on {about['fit_images']} clean training"
        f" images, on which the network was trained, too. Denoiser: {steps} steps (800 by default)."
        f" Autoencoder at `{LAYER}`: {about['autoencoder']}.",
        "",
    ]
    names = list(dict.fromkeys(row["detector"] for row in rows))
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    pairs = {row["attack"]: row["n_attacked"] for row in rows}
    lines += [
        f"| score | {' | '.join(f'{attack} ({pairs[attack]})' for attack in attacks)} |",
        "|---|" + "---|" * len(attacks),
    ]
    for name in names:
        own = {row["attack"]: row for row in rows if row["detector"] == name}
        cells = [f"{one['auroc']:.3f} ({one['auroc_low']:.3f} to {one['auroc_high']:.3f})" for one in own.values()]
        shown = name.replace("|", "\\|")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    lines += [
        "",
        "In brackets behind an attack: pairs. Noise moves every pixel by the size of the attack, up or down at random,"
        " and is no attack: here are the images that keep their answer. What scores high there detects noise as well.",
        "",
        f"Flagged at the threshold for {FPR:.0%} false alarms (test images here differ from training images):",
        "",
        f"| detector | clean | {' | '.join(attacks)} |",
        "|---|---|" + "---|" * len(attacks),
    ]
    for name, rates in about["alarms"].items():
        lines.append(f"| {name} | {' | '.join(f'{rates[attack]:.0%}' for attack in ('clean', *attacks))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
