"""Causal effect maps beside Grad-CAM at the same layers of two networks, paired on the same photographs.

    python -m benchmarks.faithfulness.maps FOLDER

Photographs are those for choosing (index not a multiple of ten) under the folder that the environment variable
CE_PLUGIN_DATA names. What each photograph gave is a line of FOLDER/maps.jsonl, so that a run can be interrupted and
resumed; the table is of those photographs for which all layers of both networks are done. The layers were chosen before
any of them was scored.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.common.intervals import bounds, interval
from benchmarks.common.results import write
from benchmarks.faithfulness._forward import ENGINES, Engine
from benchmarks.faithfulness._references import (
    NETWORKS,
    SHARED,
    STEPS,
    UNSHARED,
    images,
    insertion_minus_deletion,
    prepared,
    references,
    vision_model,
)
from ce_plugin import CausalEffectMap
from ce_plugin.models.vision import VisionModel

# What the value at the layer is -> the layer; None is the last one with positions.
LAYERS: dict[str, dict[str, str | None]] = {
    "EfficientNet-lite0": {
        "last with positions": None,
        "before the last activation": "_bn1",
        "before an activation in a block": "_blocks.10._bn1",
        "block output, 80 channels": "_blocks.7",
        "block output, 112 channels": "_blocks.10",
    },
    "MobileNet v2": {
        "last with positions": None,
        "before the last activation": "head.conv",
        "before an activation in a block": "blocks.12.depthwise.conv",
        "block output, 64 channels": "blocks.9",
        "block output, 96 channels": "blocks.12",
    },
}
# The module whose input is the last value with positions.
POOLING = {"EfficientNet-lite0": "_avg_pooling", "MobileNet v2": "pool"}
Array = np.ndarray[Any, np.dtype[np.float64]]


@cache
def machinery(name: str, engine: str) -> tuple[VisionModel, Engine]:
    """A network, and its engine for scores."""
    model = vision_model(name)
    return model, Engine(model.model, engine)


def effect_map(name: str, network: nn.Module, layer: str | None, x: Tensor, target: int) -> Tensor:
    """Ours: signed, of the logit, each channel set to zero."""
    found: Tensor = CausalEffectMap(network, layer).attribute(x, target)
    return found


def grad_cam(name: str, network: nn.Module, layer: str | None, x: Tensor, target: int, relu: bool) -> Tensor:
    """Captum's LayerGradCam of the logit."""
    module = network.get_submodule(layer or POOLING[name])
    options = {"attribute_to_layer_input": layer is None, "relu_attributions": relu}
    found: Tensor = LayerGradCam(network, module).attribute(x, target, **options)
    return found.detach()


METHODS: dict[str, Callable[[str, nn.Module, str | None, Tensor, int], Tensor]] = {
    "CEM": effect_map,
    "Grad-CAM": partial(grad_cam, relu=True),
    "Grad-CAM, signed": partial(grad_cam, relu=False),
}


def study(files: list[Path], k: int, name: str, method: str, engine_name: str) -> dict[str, Any]:
    """Scores of a method at every layer for one photograph, one for each reference."""
    model, engine = machinery(name, engine_name)
    x = prepared(files[k], model)
    target = int(engine.logits(x).argmax())
    maps, seconds = [], []
    for layer in LAYERS[name].values():
        start = time.perf_counter()
        small = METHODS[method](name, model.model, layer, x, target)
        seconds.append(time.perf_counter() - start)
        maps.append(interpolate(small.float(), (224, 224), mode="bilinear", align_corners=False)[0, 0])
    replaced = references(files, k, model)
    scores = insertion_minus_deletion(engine.probabilities, x, torch.stack(maps), target, replaced)
    return {
        "photograph": files[k].name,
        "network": name,
        "method": method,
        "scores": dict(zip(LAYERS[name], scores.tolist(), strict=True)),
        "seconds": seconds,
    }


def table(records: list[dict[str, Any]], engine: str) -> tuple[str, dict[str, Any]]:
    """What the records of photographs with which all methods and networks are done say, as text and data."""
    by_key = {(r["network"], r["method"], r["photograph"]): r for r in records}
    names = {r["photograph"] for r in records}
    whole = sorted(p for p in names if all((n, m, p) in by_key for n in NETWORKS for m in METHODS))
    rows = []
    data: dict[str, Any] = {"photographs": len(whole), "steps": STEPS, "engine": engine, "layers": LAYERS}
    for name in NETWORKS:
        for layer, module in LAYERS[name].items():
            figures: dict[str, Any] = {"layer": module}
            own = [[by_key[name, method, p]["scores"][layer] for p in whole] for method in METHODS]
            scores: Array = np.array(own, dtype=float)  # (methods, photographs, references)
            kinds = {"shared": scores[..., : len(SHARED)].mean(2), "unshared": scores[..., len(SHARED) :].mean(2)}
            shown = f"`{module}`" if module else f"before `{POOLING[name]}`"
            for kind, values in kinds.items():
                figures[kind] = dict(zip(METHODS, values.mean(1).tolist(), strict=True))
                cells = [f"{value:.3f}" for value in figures[kind].values()]
                for m, method in list(enumerate(METHODS))[1:]:
                    gap = values[0] - values[m]
                    figures[kind][f"CEM - {method}"] = {"mean": float(gap.mean()), "interval": interval(gap)}
                    cells.append(f"{gap.mean():+.3f} ({bounds(interval(gap))})")
                rows.append(f"| {name} | {layer}: {shown} | {kind} | {' | '.join(cells)} |")
            data[f"{name}: {layer}"] = figures
    head = [
        f"Insertion minus deletion, {STEPS} steps, of the predicted class's probability on {len(whole)} photographs.",
        f"Shared references: {', '.join(SHARED)}; unshared: {', '.join(UNSHARED)} (the next photograph, noise).",
        "Grad-CAM is Captum's at the same layer, with its ReLU and signed. Last columns: CEM minus Grad-CAM, paired,",
        "with 95 % bootstrap intervals over photographs.",
        "",
        "| network | layer | references | CEM | Grad-CAM | signed | CEM - Grad-CAM | CEM - signed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]), data


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of results by photograph")
    parser.add_argument("--images", type=int, default=60, help="how many photographs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no photograph after this time")
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="arithmetic of the scores")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = images(multiple_of_ten=False)
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "maps.jsonl"
    records = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(r["photograph"], r["network"], r["method"]) for r in records}
    until = time.time() + 60 * options.minutes
    for k, name, method in itertools.product(range(options.images), NETWORKS, METHODS):
        if (files[k].name, name, method) not in done and time.time() < until:
            records.append(study(files, k, name, method, options.engine))
            with kept.open("a") as stream:
                stream.write(json.dumps(records[-1]) + "\n")
    text, data = table(records, options.engine)
    print(text)
    write("faithfulness_maps", text, data, *(["openvino"] if options.engine != "torch" else []))


if __name__ == "__main__":
    main()
