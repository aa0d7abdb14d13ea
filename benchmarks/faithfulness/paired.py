"""Maps of both networks, paired on the same photographs, with references that methods fill with and others.

    python -m benchmarks.faithfulness.paired choosing    photographs for choosing (index not a multiple of ten)
    python -m benchmarks.faithfulness.paired reported    the others

Every photograph's maps, trials and scores are kept in --cache, so that a run can be interrupted and resumed; a table is
written of what is there. Passes count the clean row, a backward pass as two. Photographs are under the folder that the
environment variable CE_PLUGIN_DATA names.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
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

ROWS, CELLS = 64, 14
BUDGETS = (12, 25, 50, 100, 200)
LAST = {"EfficientNet-lite0": "_conv_head", "MobileNet v2": "head"}
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Scene:
    """One photograph: (1, 3, 224, 224) in model units, its class index in the data set, the explained class."""

    x: Tensor
    ident: int
    target: int
    name: str
    model: VisionModel
    engine: Engine


def causal_effect(scene: Scene, passes: int | None = None) -> Tensor:
    """CausalEffect as a user calls it."""
    explainer = CausalEffect(scene.model.model, normalization=scene.model.normalization)
    found: Tensor = explainer.attribute(scene.x, target=scene.target, ids=[scene.ident], passes=passes)
    return found[0, 0]


def before(scene: Scene) -> Tensor:
    """The default of version 0.3: 399 coherent trials; length scale and noise by this photograph's likelihood alone."""
    design = RandomRegions(independent=0)
    explainer = CausalEffect(scene.engine.logits, design=design, normalization=scene.model.normalization)
    found = explainer.estimate(
        scene.x, target=scene.target, ids=[scene.ident], keep_trials=True, perturbations_per_eval=ROWS
    )
    fit = most_likely_fit(found.assignments[0].double(), found.outcomes[0].double())
    return _enlarged(-fit.reshape(CELLS, CELLS), "nearest")


def most_likely_fit(a: Tensor, y: Tensor) -> Tensor:
    """Posterior mean (U,) at the length scale and noise of highest restricted likelihood; three fills in turn."""
    turns = torch.nn.functional.one_hot(torch.arange(len(a)) % 3).double()
    held = turns / turns.sum(0).sqrt()
    a, y = a - held @ (held.T @ a), y - held @ (held.T @ y)
    n = len(a) - 3
    place = torch.cartesian_prod(torch.arange(CELLS), torch.arange(CELLS)).double() / CELLS
    apart = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist") * 3**0.5
    best, fit = -torch.inf, torch.zeros(a.shape[1])
    for length in (0.03, 0.1, 0.2, 0.3, 0.5, 0.8):
        kernel = (1 + apart / length) * torch.exp(-apart / length) + 1
        w, vectors = torch.linalg.eigh(a @ kernel @ a.T)
        w, data = w.clamp_min(0), vectors.T @ y
        for scale in torch.logspace(-3, 3, 31, dtype=torch.double).tolist():
            noise = w + scale * w.sum() / n
            form, spread = float((data.square() / noise[:, None]).sum()), noise.log().sum()
            # The intercepts' directions have no signal: their variance is the noise alone, and is not counted.
            likelihood = -0.5 * (n * math.log(form / n) + float(spread) - 3 * math.log(scale * float(w.sum()) / n))
            if likelihood > best:
                best, fit = likelihood, (kernel @ a.T @ vectors @ (data / noise[:, None]))[:, 0]
    return fit


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
    "before": (before, 400),
    "CausalEffect (default)": (causal_effect, 405),
    "Grad-CAM": (grad_cam, 3),
    **{f"CausalEffect, {n} passes": (partial(causal_effect, passes=n), n) for n in BUDGETS},
}
BASE = "before"


@cache
def machinery(name: str, engine: str) -> tuple[VisionModel, Engine]:
    """A network and its engine."""
    model = vision_model(name)
    return model, Engine(model.model, engine)


def study(files: list[Path], k: int, name: str, options: argparse.Namespace) -> None:
    """Maps and scores of one photograph, each kept in a file once it is made."""
    missing = [method for method in METHODS if not stored(files[k], name, method, options).exists()]
    if not missing:
        return
    model, engine = machinery(name, options.engine)
    x = prepared(files[k], model)
    scene = Scene(x, index_of(files[k]), int(engine.logits(x).argmax()), name, model, engine)
    maps, seconds = [], []
    for method in missing:
        start = time.perf_counter()
        maps.append(METHODS[method][0](scene))
        seconds.append(time.perf_counter() - start)
    by = references(files, k, model)
    scores = insertion_minus_deletion(engine.probabilities, x, torch.stack(maps), scene.target, by)
    for method, map_, score, taken in zip(missing, maps, scores, seconds, strict=True):
        place = stored(files[k], name, method, options)
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as stream:
            np.savez(stream, allow_pickle=False, scores=score.numpy(), map=map_.numpy(), seconds=np.array(taken))


def stored(file: Path, name: str, method: str, options: argparse.Namespace) -> Path:
    """File with the results of a method on a photograph."""
    cache: Path = options.cache
    folder: Path = cache / name.replace(" ", "-") / options.engine / "".join(filter(str.isalnum, method))
    return folder / f"{file.stem}.npz"


def table(files: list[Path], options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What stands in the cache, as text and data."""
    rows, data = [], {"steps": STEPS, "engine": options.engine, "of": len(files)}
    for name in NETWORKS:
        there = [file for file in files if all(stored(file, name, method, options).exists() for method in METHODS)]
        if len(there) < 2:
            continue
        kept = [[np.load(stored(file, name, method, options)) for method in METHODS] for file in there]
        # (images, methods, references)
        scores: Array = np.stack([[one["scores"] for one in every] for every in kept]).astype(float)
        kinds = {"shared": scores[:, :, : len(SHARED)].mean(2), "unshared": scores[:, :, len(SHARED) :].mean(2)}
        kinds["all"] = scores.mean(2)
        base, peer = list(METHODS).index(BASE), list(METHODS).index("Grad-CAM")
        for m, (method, (_, passes)) in enumerate(METHODS.items()):
            figures: dict[str, Any] = {"images": len(there), "passes": passes}
            figures["seconds"] = float(np.median([every[m]["seconds"] for every in kept]))
            cells = []
            for kind, values in kinds.items():
                gap = values[:, m] - values[:, peer]
                figures[kind] = {
                    "mean": float(values[:, m].mean()),
                    "minus_grad_cam": float(gap.mean()),
                    "minus_grad_cam_interval": interval(gap) if m != peer else [0.0, 0.0],
                    "ratio": float(values[:, m].mean() / values[:, base].mean()),
                    "ratio_interval": ratio_interval(values[:, m], values[:, base]),
                }
                low, high = figures[kind]["ratio_interval"]
                cells.append(f"{values[:, m].mean():.3f} | {figures[kind]['ratio']:.2f} ({low:.2f} to {high:.2f})")
            data[f"{name}: {method}"] = figures
            rows.append(
                f"| {name} | {len(there)} | {method} | {passes} | {figures['seconds']:.1f} | {' | '.join(cells)} "
                f"| {bounds(figures['shared']['minus_grad_cam_interval'])} "
                f"| {bounds(figures['unshared']['minus_grad_cam_interval'])} |"
            )
    head = [
        f"Insertion minus deletion, {STEPS} steps, of the predicted class's probability. Shared: blur, mean,",
        "black; unshared: next photograph, noise. Ratios to the default of version 0.3 (before), on the same",
        "photographs, with 95 % bootstrap intervals over photographs; last, intervals of the difference to Grad-CAM.",
        "Seconds: median, one thread, on a machine that did other work as well.",
        "",
        "| network | photographs | map | passes | s | shared | ratio | unshared | ratio | all | ratio "
        "| minus Grad-CAM, shared | unshared |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
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
