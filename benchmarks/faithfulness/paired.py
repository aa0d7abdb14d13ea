"""Maps of both networks, paired on the same photographs, with references that methods fill with and others.

    python -m benchmarks.faithfulness.paired choosing default    the default beside that of version 0.3 and Grad-CAM
    python -m benchmarks.faithfulness.paired choosing budgets    ours and peers at the same number of passes
    python -m benchmarks.faithfulness.paired reported default    on photographs by which nothing was chosen

Photographs for choosing are those whose index is not a multiple of ten, after those from which the prior was learnt;
the others are reported. Every photograph's maps and scores are kept in --cache, so that a run can be interrupted and
resumed; a table is written of what is there. Passes are counted as they are made, a backward pass as two. Photographs
are under the folder that the environment variable CE_PLUGIN_DATA names.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.common.intervals import bounds, interval, ratio_interval
from benchmarks.common.results import write
from benchmarks.faithfulness._forward import ENGINES, Accelerated, Engine
from benchmarks.faithfulness._references import (
    LEARNING,
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
from ce_plugin.evaluation.methods import METHODS, Method, Scene, explain
from ce_plugin.files import written_whole
from ce_plugin.models.vision import VisionModel

ROWS, CELLS = 64, 14
DEFAULT = 405
BUDGETS = (3, 12, 25, 50, 100, 200)
PEER_BUDGETS = (25, 100, 400)
# RISE and KernelSHAP were left out for time: in a trial of three photographs, not kept, they scored less.
PEERS = ("occlusion", "lime")
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method with the passes that it is given."""

    method: Method
    passes: int = 400


def without_gradient(scene: Scene, passes: int) -> Tensor:
    """CausalEffect of a function in which no module, and no gradient, is found."""
    explainer = CausalEffect(scene.logits, normalization=scene.normalization)
    found: Tensor = explainer.attribute(scene.x, target=scene.target, ids=[scene.ident], passes=passes)
    return found[0, 0]


def before(scene: Scene, passes: int) -> Tensor:
    """The default of version 0.3: 399 coherent trials; length scale and noise by this photograph's likelihood alone."""
    design = RandomRegions(independent=0)
    explainer = CausalEffect(scene.logits, design=design, normalization=scene.normalization)
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


def _enlarged(small: Tensor, mode: str) -> Tensor:
    options = {} if mode == "nearest" else {"align_corners": False}
    large: Tensor = interpolate(small.float()[None, None], (224, 224), mode=mode, **options)
    return large[0, 0]


BASE, PEER = "before", "Grad-CAM"
OURS = METHODS["causal-effect"]
ENTRIES: dict[str, dict[str, Entry]] = {
    "default": {
        BASE: Entry(Method("before", before)),
        "CausalEffect (default)": Entry(OURS, DEFAULT),
        PEER: Entry(METHODS["grad-cam"]),
    },
    "budgets": {
        **{f"CausalEffect, {n} passes": Entry(OURS, n) for n in BUDGETS},
        "CausalEffect (default)": Entry(OURS, DEFAULT),
        PEER: Entry(METHODS["grad-cam"]),
        **{f"{METHODS[name].name}, {n} passes": Entry(METHODS[name], n) for n in PEER_BUDGETS for name in PEERS},
        **{
            f"CausalEffect without gradient, {n} passes": Entry(Method("without", without_gradient), n)
            for n in PEER_BUDGETS
        },
    },
}


@cache
def machinery(name: str, engine: str) -> tuple[VisionModel, Engine, Accelerated]:
    """A network, its engine, and both in one."""
    model = vision_model(name)
    built = Engine(model.model, engine)
    return model, built, Accelerated(model.model, built.logits).eval()


def study(files: list[Path], k: int, name: str, options: argparse.Namespace) -> None:
    """Maps and scores of one photograph, each kept in a file once it is made."""
    entries = ENTRIES[options.study]
    missing = [label for label in entries if not stored(files[k], name, label, options).exists()]
    if not missing:
        return
    model, engine, accelerated = machinery(name, options.engine)
    x = prepared(files[k], model)
    target = int(engine.logits(x).argmax())
    scene = Scene(x, target, model.model, model.normalization, index_of(files[k]), forward=engine.logits)
    made = []
    for label in missing:
        entry = entries[label]
        own = replace(scene, network=accelerated, forward=None) if entry.method is OURS else scene
        made.append(explain(entry.method, own, entry.passes))
    by, maps = references(files, k, model), torch.stack([one.map for one in made])
    scores = insertion_minus_deletion(engine.probabilities, x, maps, target, by)
    for label, one, score in zip(missing, made, scores, strict=True):
        place = stored(files[k], name, label, options)
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as stream:
            np.savez(
                stream, allow_pickle=False, scores=score.numpy(), map=one.map.numpy().astype(np.float16),
                passes=np.array(one.passes), seconds=np.array(one.seconds),
            )  # fmt: skip


def stored(file: Path, name: str, label: str, options: argparse.Namespace) -> Path:
    """File with the results of a method on a photograph."""
    cache: Path = options.cache
    folder: Path = cache / name.replace(" ", "-") / options.engine / "".join(filter(str.isalnum, label))
    return folder / f"{file.stem}.npz"


def scored(files: list[Path], name: str, options: argparse.Namespace) -> tuple[Array, Array, Array]:
    """Of the photographs for which all is there: scores (N, M, R), passes and seconds (N, M)."""
    labels = list(ENTRIES[options.study])
    there = [file for file in files if all(stored(file, name, label, options).exists() for label in labels)]
    kept = [[np.load(stored(file, name, label, options)) for label in labels] for file in there]
    scores, passes, seconds = (
        np.array([[one[key] for one in every] for every in kept], dtype=float)
        for key in ("scores", "passes", "seconds")
    )
    return scores, passes, seconds


def kinds_of(scores: Array) -> dict[str, Array]:
    """Means (N, M) over the references that methods fill with, the others, and all."""
    shared = scores[..., : len(SHARED)].mean(2)
    return {"shared": shared, "unshared": scores[..., len(SHARED) :].mean(2), "all": scores.mean(2)}


def table(files: list[Path], options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What stands in the cache, as text and data."""
    labels = list(ENTRIES[options.study])
    other = "CausalEffect (default)" if options.study == "budgets" else BASE
    rows, data = [], {"steps": STEPS, "engine": options.engine, "of": len(files)}
    for name in options.networks:
        scores, passes, seconds = scored(files, name, options)
        if len(scores) < 2:
            continue
        kinds, base, peer = kinds_of(scores), labels.index(other), labels.index(PEER)
        data[f"{name}: scores"] = {label: scores[:, m].round(4).tolist() for m, label in enumerate(labels)}
        for m, label in enumerate(labels):
            figures: dict[str, Any] = {"images": len(scores), "passes": float(np.median(passes[:, m]))}
            figures["seconds"] = float(np.median(seconds[:, m]))
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
            data[f"{name}: {label}"] = figures
            rows.append(
                f"| {name} | {len(scores)} | {label} | {figures['passes']:g} | {figures['seconds']:.1f} "
                f"| {' | '.join(cells)} | {bounds(figures['shared']['minus_grad_cam_interval'])} "
                f"| {bounds(figures['unshared']['minus_grad_cam_interval'])} |"
            )
        if options.study == "budgets":
            data[f"{name}: best peers"] = best_peers(labels, kinds)
    head = [
        f"Insertion minus deletion, {STEPS} steps, of the predicted class's probability. Shared: blur, mean,",
        f"black; unshared: next photograph, noise. Ratios to {other}, on the same photographs,",
        "with 95 % bootstrap intervals over photographs; last, intervals of the difference to Grad-CAM.",
        "Passes and seconds: medians; one thread, on a machine that did other work as well.",
        "",
        "| network | photographs | map | passes | s | shared | ratio | unshared | ratio | all | ratio "
        "| minus Grad-CAM, shared | unshared |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, *best_rows(data)]), data


def best_peers(labels: list[str], kinds: dict[str, Array]) -> dict[str, Any]:
    """Ours minus the best peer with as many passes, or fewer, at each budget."""
    found: dict[str, Any] = {}
    for passes in (*BUDGETS, DEFAULT):
        ours = labels.index("CausalEffect (default)" if passes == DEFAULT else f"CausalEffect, {passes} passes")
        affordable = [PEER, *(label for label in labels if _is_peer(label) and _budget(label) <= passes)]
        at = [labels.index(label) for label in affordable]
        for kind, values in kinds.items():
            best = at[int(values[:, at].mean(0).argmax())]
            gap = values[:, ours] - values[:, best]
            found[f"{passes}, {kind}"] = {"best": labels[best], "gap": float(gap.mean()), "interval": interval(gap)}
    return found


def _is_peer(label: str) -> bool:
    return "passes" in label and not label.startswith("CausalEffect")


def _budget(label: str) -> int:
    return int(label.split(", ")[1].split()[0])


def best_rows(data: dict[str, Any]) -> list[str]:
    """The differences to the best peers, as lines of a table."""
    lines = ["", "| network | passes, references | best peer of as many passes | ours minus it |", "|---|---|---|---|"]
    for name in NETWORKS:
        for key, one in data.get(f"{name}: best peers", {}).items():
            lines.append(f"| {name} | {key} | {one['best']} | {one['gap']:+.3f} ({bounds(one['interval'])}) |")
    return lines if len(lines) > 3 else []


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "faithfulness-paired"
    parser.add_argument("photographs", choices=("choosing", "reported"))
    parser.add_argument("study", choices=ENTRIES)
    parser.add_argument("--images", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many first ones, for a table of others")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no photograph after this time")
    parser.add_argument("--cache", type=Path, default=home, help="folder of results by photograph")
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="arithmetic of passes without gradients")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = images(multiple_of_ten=options.photographs == "reported")
    files = (files[LEARNING:] if options.photographs == "choosing" else files)[options.skip :]
    until = time.time() + 60 * options.minutes
    for k in range(min(options.images, len(files))):
        for name in options.networks:
            if time.time() < until:
                study(files, k, name, options)
    text, data = table(files[: options.images], options)
    print(text)
    others = f"_after_{options.skip}" if options.skip else ""
    write(f"faithfulness_{options.study}_{options.photographs}{others}", text, data, "openvino")


if __name__ == "__main__":
    main()
