"""Maps of both networks, paired on the same photographs, with references that methods fill with and others.

    python -m benchmarks.faithfulness.paired choosing    photographs for choosing (index not a multiple of ten)
    python -m benchmarks.faithfulness.paired reported    the others

Every photograph's maps, trials and scores are kept in --cache, so that a run can be interrupted and resumed; a table is
written of what is there. Passes count the clean row, a backward pass as two. Photographs are under the folder that the
environment variable CE_PLUGIN_DATA names.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.common.intervals import bounds, interval, ratio_interval
from benchmarks.common.results import write
from benchmarks.faithfulness._forward import ENGINES, Engine
from benchmarks.faithfulness._references import (
    NETWORKS,
    SHARED,
    STEPS,
    images,
    index_of,
    insertion_minus_deletion,
    prepared,
    references,
    vision_model,
)
from ce_plugin import CausalEffect
from ce_plugin.designs import RandomRegions
from ce_plugin.files import written_whole
from ce_plugin.models.vision import VisionModel

ROWS = 64
LAST = {"EfficientNet-lite0": "_conv_head", "MobileNet v2": "head"}
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Scene:
    """One photograph: (1, 3, 224, 224) in model units, its class index in the data set, the explained class."""

    x: Tensor
    ident: int
    target: int
    name: str
    model: VisionModel
    engine: Engine
    trials: dict[str, Tensor] = field(default_factory=dict)


def regions(scene: Scene, key: str, independent: float) -> Tensor:
    """CausalEffect's map with a share of independent trials; the trials are kept."""
    explainer = CausalEffect(
        scene.engine.logits, design=RandomRegions(independent=independent), normalization=scene.model.normalization
    )
    found = explainer.estimate(
        scene.x, target=scene.target, ids=[scene.ident], keep_trials=True, perturbations_per_eval=ROWS
    )
    scene.trials |= {
        f"{key}_assignments": found.assignments[0],
        f"{key}_outcomes": found.outcomes[0].float(),
        f"{key}_effect": found.effect[0],
    }
    if found.std_error is not None:
        scene.trials[f"{key}_std_error"] = found.std_error[0]
    return _enlarged(found.smoothed_contribution[0, :, 0].reshape(14, 14), "nearest")


def grad_cam(scene: Scene) -> Tensor:
    """Captum's LayerGradCam of the logit at the last layer with positions, with ReLU, enlarged bilinearly."""
    layer = scene.model.model.get_submodule(LAST[scene.name])
    small: Tensor = LayerGradCam(scene.model.model, layer).attribute(scene.x, scene.target, relu_attributions=True)
    return _enlarged(small.detach()[0, 0], "bilinear")


def _enlarged(small: Tensor, mode: str) -> Tensor:
    options = {} if mode == "nearest" else {"align_corners": False}
    large: Tensor = interpolate(small.float()[None, None], (224, 224), mode=mode, **options)
    return large[0, 0]


# Each method with its passes.
METHODS: dict[str, tuple[Callable[[Scene], Tensor], int]] = {
    "regions alone": (lambda scene: regions(scene, "alone", 0.0), 400),
    "regions, 40 % independent": (lambda scene: regions(scene, "both", 0.4), 400),
    "Grad-CAM": (grad_cam, 3),
}
BASE = "regions alone"


@cache
def machinery(name: str, engine: str) -> tuple[VisionModel, Engine]:
    """A network and its engine."""
    model = vision_model(name)
    return model, Engine(model.model, engine)


def study(files: list[Path], k: int, name: str, options: argparse.Namespace) -> None:
    """Maps and scores of one photograph, kept in a file."""
    place = stored(files[k], name, options)
    if place.exists():
        return
    model, engine = machinery(name, options.engine)
    x = prepared(files[k], model)
    scene = Scene(x, index_of(files[k]), int(engine.logits(x).argmax()), name, model, engine)
    maps, seconds = [], []
    for method, _ in METHODS.values():
        start = time.perf_counter()
        maps.append(method(scene))
        seconds.append(time.perf_counter() - start)
    scores = insertion_minus_deletion(
        engine.probabilities, x, torch.stack(maps), scene.target, references(files, k, model)
    )
    found = {"scores": scores, "maps": torch.stack(maps), "seconds": torch.tensor(seconds), **scene.trials}
    place.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(place) as stream:
        np.savez(stream, allow_pickle=False, target=scene.target, **{k: v.numpy() for k, v in found.items()})


def stored(file: Path, name: str, options: argparse.Namespace) -> Path:
    """File with the results of a photograph."""
    return Path(options.cache) / name.replace(" ", "-") / options.engine / f"{file.stem}.npz"


def table(files: list[Path], options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What stands in the cache, as text and data."""
    rows, data = [], {"steps": STEPS, "engine": options.engine, "of": len(files)}
    for name in NETWORKS:
        there = [file for file in files if stored(file, name, options).exists()]
        if not there:
            continue
        kept = [np.load(stored(file, name, options)) for file in there]
        scores: Array = np.stack([one["scores"] for one in kept]).astype(float)  # (images, methods, references)
        kinds = {"shared": scores[:, :, : len(SHARED)].mean(2), "unshared": scores[:, :, len(SHARED) :].mean(2)}
        kinds["all"] = scores.mean(2)
        base = list(METHODS).index(BASE)
        for m, (method, (_, passes)) in enumerate(METHODS.items()):
            figures: dict[str, Any] = {"images": len(there), "passes": passes}
            figures["seconds"] = float(np.median([one["seconds"][m] for one in kept]))
            cells = []
            for kind, values in kinds.items():
                gap = values[:, m] - values[:, base]
                figures[kind] = {
                    "mean": float(values[:, m].mean()),
                    "difference": float(gap.mean()),
                    "difference_interval": interval(gap),
                    "ratio": float(values[:, m].mean() / values[:, base].mean()),
                    "ratio_interval": ratio_interval(values[:, m], values[:, base]),
                }
                low, high = figures[kind]["ratio_interval"]
                cells.append(f"{values[:, m].mean():.3f} | {figures[kind]['ratio']:.2f} ({low:.2f} to {high:.2f})")
            data[f"{name}: {method}"] = figures
            rows.append(
                f"| {name} | {len(there)} | {method} | {passes} | {figures['seconds']:.1f} | {' | '.join(cells)} "
                f"| {bounds(figures['unshared']['difference_interval'])} |"
            )
    head = [
        f"Insertion minus deletion, {STEPS} steps, of the predicted class's probability. Shared: blur, mean,",
        "black; unshared: next photograph, noise. Ratios to the map of coherent regions alone, on the same",
        "photographs, with 95 % bootstrap intervals over photographs; last, the difference on unshared references.",
        "Seconds: median, one thread.",
        "",
        "| network | photographs | map | passes | s | shared | ratio | unshared | ratio | all | ratio | difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]), data


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "faithfulness-paired"
    parser.add_argument("photographs", choices=("choosing", "reported"))
    parser.add_argument("--images", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no photograph after this time")
    parser.add_argument("--cache", type=Path, default=home, help="folder of results by photograph")
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="arithmetic of passes without gradients")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = images(multiple_of_ten=options.photographs == "reported")
    until = time.time() + 60 * options.minutes
    for k in range(min(options.images, len(files))):
        for name in options.networks:
            if time.time() < until:
                study(files, k, name, options)
    text, data = table(files[: options.images], options)
    print(text)
    write(f"faithfulness_paired_{options.photographs}", text, data, "openvino")


if __name__ == "__main__":
    main()
