"""Does a map stay the same when the image is attacked? Causal effect maps against Grad-CAM and AblationCAM.

The photographs of `imagenet-samples` (folder CE_PLUGIN_DATA) whose class index is a multiple of ten. FGSM and PGD with
the smallest of three sizes that changes the network's answer; Spearman's rank correlation between the map of the
attacked and of the clean image, both for the class predicted on the clean image. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common.intervals import bounds, interval
from benchmarks.common.networks import image_files
from benchmarks.common.results import write
from ce_plugin import CausalEffectMap
from ce_plugin.datasets import read_image
from ce_plugin.evaluation import rank_correlation
from ce_plugin.interventions import Adversarial
from ce_plugin.models import VisionModel, efficientnet_lite0

SIZES = (2.0, 4.0, 8.0)  # of pixels 0 to 255
ATTACKS: dict[str, dict[str, Any]] = {"fgsm": {}, "pgd": {"max_iter": 10}}
# Name -> (module, whether its input is meant).
LAYERS = {"head": ("_avg_pooling", True), "block 15": ("_blocks.15", False), "block 10": ("_blocks.10", False)}
CEM = {
    "CEM, change, logit": {"weighting": "change", "outcome": "logit"},
    "CEM, activation, logit": {"weighting": "activation", "outcome": "logit"},
}
PEER = "Grad-CAM"


@cache
def network() -> VisionModel:
    net = efficientnet_lite0()
    net.model.requires_grad_(False)
    return net


@cache
def methods() -> dict[str, Any]:
    """Name -> a function from images and classes to maps (N, 1, h, w)."""
    model = network().model
    found: dict[str, Any] = {}
    for layer, (name, at_input) in LAYERS.items():
        for label, options in list(CEM.items())[: None if layer == "head" else 1]:  # other layers have negative values
            explainer = CausalEffectMap(model, name, **options)  # type: ignore[arg-type]
            found[f"{layer} | {label}"] = _bound(explainer, at_input)
        found[f"{layer} | {PEER}"] = _bound(LayerGradCam(model, model.get_submodule(name)), at_input)
    return found


def _bound(explainer: Any, at_input: bool) -> Any:
    def explain(images: Tensor, target: Tensor) -> Tensor:
        maps: Tensor = explainer.attribute(images, target, attribute_to_layer_input=at_input)
        return maps.detach()

    return explain


def attacked(model: nn.Module, name: str, x: Tensor, target: Tensor, ident: int) -> tuple[float, Tensor] | None:
    """The smallest size that changes the prediction, and the attacked image; None if none does."""
    net = network()
    for eps in SIZES:
        attack = Adversarial.preset(
            name, model, eps=eps, clip_values=net.value_range, normalization=net.normalization, **ATTACKS[name]
        )
        changed = attack.perturb(x, target=target, ids=[ident])
        with torch.inference_mode():
            if int(model(changed).argmax()) != int(target):
                return eps, changed
    return None


def study(file: Path, folder: Path) -> dict[str, Any]:
    """Rank correlations of one image, by attack and method, cached."""
    place = folder / f"{file.stem}.json"
    if place.exists():
        kept: dict[str, Any] = json.loads(place.read_text())
        return kept
    net = network()
    x = net.inputs([read_image(file)])
    with torch.no_grad():
        target = net.model(x).argmax(1)
    ident = int(file.name.split("_")[0])
    successes = {name: attacked(net.model, name, x, target, ident) for name in ATTACKS}
    found: dict[str, Any] = {name: {"eps": success[0]} for name, success in successes.items() if success is not None}
    if found:
        changed = torch.cat([success[1] for success in successes.values() if success is not None])
        for key, explain in methods().items():
            maps = explain(torch.cat([x, changed]), target.expand(1 + len(changed)))
            correlations = rank_correlation(maps[:1].expand_as(maps[1:]), maps[1:])
            for name, one in zip(found, correlations.tolist(), strict=True):
                found[name][key] = one
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found))
    return found


def report(found: dict[str, dict[str, Any]]) -> None:
    """Means with intervals, and paired differences from Grad-CAM at the same layer."""
    lines = [
        "## Maps under attack",
        "",
        f"EfficientNet-lite0, {len(found)} ImageNet photographs whose class index is a multiple of ten. FGSM, and PGD",
        f"with {ATTACKS['pgd']['max_iter']} steps, each with the smallest size of"
        f" {', '.join(f'{s:.0f}/255' for s in SIZES)} that changes the answer;",
        "images whose answer none changes are left out. Spearman's rank correlation between the maps of the attacked",
        "and of the clean",
        "image, for the class that the clean image had, at the layer's own resolution, signed (no ReLU). 1 is the same",
        "order of positions. `head`: what the average pooling takes in; blocks 15 (7 x 7) and 10 (14 x 14): their",
        "output.",
        "Intervals: 95 % percentile bootstrap over images; differences are paired.",
    ]
    data: dict[str, Any] = {}
    for attack in ATTACKS:
        rows = {file: row[attack] for file, row in found.items() if attack in row}
        sizes = {f"{eps:.0f}/255": sum(row["eps"] == eps for row in rows.values()) for eps in SIZES}
        data[attack] = {"images": len(rows), "sizes": sizes, "methods": {}}
        lines += [
            "",
            f"### {attack.upper()}: {len(rows)} images ({', '.join(f'{n} at {size}' for size, n in sizes.items())})",
            "",
            "| layer | method | rank correlation | 95 % interval | minus Grad-CAM at this layer | 95 % interval |",
            "|---|---|---|---|---|---|",
        ]
        for layer in LAYERS:
            peer = values(rows, f"{layer} | {PEER}")
            for method in (*CEM, PEER):
                if not any(f"{layer} | {method}" in row for row in rows.values()):
                    continue
                own = values(rows, f"{layer} | {method}")
                both = ~np.isnan(own) & ~np.isnan(peer)
                gap = (own - peer)[both]
                one = {
                    "mean": float(own[both].mean()), "interval": interval(own[both]), "images": int(both.sum()),
                    "difference": float(gap.mean()), "difference_interval": interval(gap),
                }  # fmt: skip
                data[attack]["methods"][f"{layer} | {method}"] = one
                against = (
                    "- | - |"
                    if method == PEER
                    else f"{one['difference']:+.3f} | {bounds(one['difference_interval'])} |"
                )
                lines.append(f"| {layer} | {method} | **{one['mean']:.3f}** | {bounds(one['interval'])} | {against}")
    lines += [
        "",
        "At the head a global average pooling and a linear layer follow: there the CEM by change on logits is Grad-CAM",
        "without its ReLU, number for number, and so is its correlation. An attack changes what channels do: a map",
        "that follows the network follows that too. A low figure is no proof of a bad map, nor a high one of a good.",
    ]
    write("stability", "\n".join(lines), {**data, "by_image": found}, "adversarial-robustness-toolbox")


def values(rows: dict[str, dict[str, Any]], key: str) -> np.ndarray[Any, Any]:
    """The correlations of one method."""
    return np.array([row[key] for row in rows.values()], dtype=np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "stability"
    parser.add_argument("--cache", type=Path, default=home, help="folder of correlations (default: %(default)s)")
    parser.add_argument("--images", type=int, default=None, help="the first so many only")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = [file for file in image_files() if int(file.name.split("_")[0]) % 10 == 0][: options.images]
    report({file.name: study(file, options.cache) for file in tqdm(files, unit="image", mininterval=10)})


if __name__ == "__main__":
    main()
