"""Insertion minus deletion on ImageNet photographs: the default CausalEffect against the other maps of the registry.

Three commands, each of which can be interrupted and resumed:

    choose   the peers' settings, on images whose index is not a multiple of ten
    report   the comparison, on the images whose index is one
    check    some of these images in float32, to see the effect of the faster arithmetic

The images are `imagenet-samples` under the folder that the environment variable CE_PLUGIN_DATA names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common.results import RESULTS, write
from benchmarks.faithfulness._forward import ENGINES, Engine
from benchmarks.faithfulness._methods import PASSES, tried
from benchmarks.faithfulness._references import images, index_of
from benchmarks.faithfulness._tables import chosen_text, report_data, report_text
from ce_plugin.datasets import read_image
from ce_plugin.evaluation import METHODS, Scene, explain, insertion_deletion, reference_images
from ce_plugin.files import written_whole
from ce_plugin.models import as_batch, efficientnet_lite0
from ce_plugin.models.vision import VisionModel

# What is run on an image: (method, settings, passes).
Plan = list[tuple[str, dict[str, Any], int]]
CHOSEN = "faithfulness_choosing"
CHOOSE_STEPS, REPORT_STEPS = 14, 28


def study(file: Path, plan: Plan, engine_name: str, steps: int, folder: Path, until: float) -> bool:
    """Maps, curves and scores of one image, cached in a file; False if the time is over."""
    place = stored(file, plan, engine_name, steps, folder)
    if place.exists():
        return True
    if time.time() > until:
        return False
    model, engine = machinery(engine_name)
    x = model.normalization.to_model(as_batch([read_image(file)], value_range=(0, 255)))
    target = int(engine.logits(x).argmax())
    scene = Scene(x, target, model.model, model.normalization, index_of(file), forward=engine.logits)
    found = [explain(METHODS[name], scene, passes, **settings) for name, settings, passes in plan]
    maps = torch.stack([one.map for one in found])
    several = x.expand(len(plan), -1, -1, -1)
    references = {k: v.expand_as(several) for k, v in reference_images(x, normalization=model.normalization).items()}
    curves = insertion_deletion(engine.probabilities, several, maps, target, references, steps)
    record = {
        "scores": curves.score,
        "insertion": curves.insertion,
        "deletion": curves.deletion,
        "maps": maps,
        "target": torch.tensor(target),
        "seconds": torch.tensor([one.seconds for one in found]),
        "passes": torch.tensor([one.passes for one in found]),
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(place) as stream:
        np.savez(stream, allow_pickle=False, **{key: value.numpy() for key, value in record.items()})
    return True


@cache
def machinery(engine_name: str) -> tuple[VisionModel, Engine]:
    """The network and its engine, once in each process."""
    model = efficientnet_lite0()
    return model, Engine(model.model, engine_name)


def stored(file: Path, plan: Plan, engine_name: str, steps: int, folder: Path) -> Path:
    """File with the results of an image."""
    digest = hashlib.sha256(json.dumps([plan, steps], sort_keys=True).encode()).hexdigest()[:12]
    return folder / engine_name / f"{file.stem}-{digest}.npz"


def study_all(
    files: list[Path], plan: Plan, steps: int, options: argparse.Namespace
) -> dict[str, np.ndarray[Any, Any]]:
    """Scores (methods, references) by file name, of as many images as there is time for.

    Each process has its own share of the cores: small passes run faster on a few cores each than on all together.
    """
    minutes = getattr(options, "minutes", float("inf"))
    until = time.time() + 60 * minutes
    threads = max(1, torch.get_num_threads() // options.processes)
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawned, torch.set_num_threads, (threads,)) as pool:
        runs = [pool.submit(study, file, plan, options.engine, steps, options.cache, until) for file in files]
        done = [run.result() for run in tqdm(runs, unit="image", mininterval=30)]
    return {
        file.name: np.load(stored(file, plan, options.engine, steps, options.cache))["scores"]
        for file, finished in zip(files, done, strict=True)
        if finished
    }


def choose(options: argparse.Namespace) -> None:
    """Occlusion's windows and fills first with a quarter of the passes, the best four then with all; the others."""
    files = images(multiple_of_ten=False)
    coarse: Plan = [(name, settings, PASSES // 4) for name, settings in tried() if name == "occlusion"]
    first = means(study_all(files[: options.first], coarse, CHOOSE_STEPS, options))
    fine: Plan = [("occlusion", coarse[i][1], PASSES) for i in np.argsort(-first)[:4]]
    plan = fine + [(name, settings, PASSES) for name, settings in tried() if name != "occlusion"]
    scores = means(study_all(files[: options.images], plan, CHOOSE_STEPS, options))
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for (name, settings, _), score in zip(plan, scores, strict=True):
        if name not in best or score > best[name][0]:
            best[name] = (float(score), settings)
    every = [
        {"method": name, "settings": settings, "passes": passes, "score": round(float(score), 4), "images": n}
        for n, some, found in ((options.first, coarse, first), (options.images, plan, scores))
        for (name, settings, passes), score in zip(some, found, strict=True)
    ]
    data = {"engine": options.engine, "steps": CHOOSE_STEPS, "chosen": {k: s for k, (_, s) in best.items()}}
    write(CHOSEN, chosen_text(every, data["chosen"]), {**data, "tried": every}, "openvino")


def means(scores: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Over images and references, (methods,)."""
    mean: np.ndarray[Any, Any] = np.stack(list(scores.values())).mean((0, 2))
    return mean


def chosen_plan() -> tuple[Plan, dict[str, Any]]:
    """Every method with the settings found by `choose`."""
    file = RESULTS / f"{CHOSEN}.json"
    if not file.exists():
        raise SystemExit("Run `choose` first.")
    record = json.loads(file.read_text())
    return [(name, record["chosen"].get(name, {}), PASSES) for name in METHODS], record


def check(options: argparse.Namespace) -> None:
    """The first images in float32 as well."""
    plan, _ = chosen_plan()
    options.engine = "torch"
    study_all(images(multiple_of_ten=True)[: options.images], plan, REPORT_STEPS, options)


def report(options: argparse.Namespace) -> None:
    """All methods on the reported images, and tables of the results so far."""
    plan, record = chosen_plan()
    files = images(multiple_of_ten=True)
    scores = study_all(files, plan, REPORT_STEPS, options)
    data = report_data(plan, scores)
    kept = [np.load(stored(Path(name), plan, options.engine, REPORT_STEPS, options.cache))["passes"] for name in scores]
    data["passes"] = {name: float(np.median(kept, 0)[i]) for i, (name, _, _) in enumerate(plan)}
    if options.engine != "torch":
        data["agreement"] = agreement(list(scores), plan, options)
    data |= {"engine": options.engine, "steps": REPORT_STEPS, "of": len(files), "tried": record["tried"]}
    write("faithfulness", report_text(data), data, "openvino")


def agreement(names: list[str], plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Difference of scores per image and method (mean over references) from float32, if `check` was run."""
    fast, slow, other_class = [], [], 0
    for name in names:
        exact = stored(Path(name), plan, "torch", REPORT_STEPS, options.cache)
        if exact.exists():
            pair = np.load(stored(Path(name), plan, options.engine, REPORT_STEPS, options.cache)), np.load(exact)
            fast.append(pair[0]["scores"].mean(1))
            slow.append(pair[1]["scores"].mean(1))
            other_class += int(pair[0]["target"] != pair[1]["target"])
    if not slow:
        return {}
    gap, mean = np.stack(fast) - np.stack(slow), np.mean(slow, 0)
    return {
        "images": len(slow),
        "other_class": other_class,
        "largest": float(np.abs(gap).max()),
        "mean_absolute": float(np.abs(gap).mean()),
        "by_method": {name: [float(mean[i]), float(gap[:, i].mean())] for i, (name, _, _) in enumerate(plan)},
        "float32_scores": {name: [float(one[i]) for one in slow] for i, (name, _, _) in enumerate(plan)},
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "faithfulness"
    parser.add_argument("--cache", type=Path, default=home, help="folder of maps and curves (default: %(default)s)")
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="arithmetic of all passes without gradients")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="images at a time")
    commands = parser.add_subparsers(required=True)
    choosing = commands.add_parser("choose", help="the peers' settings")
    choosing.add_argument("--images", type=int, default=16)
    choosing.add_argument("--first", type=int, default=8, help="images of Occlusion's first round")
    choosing.set_defaults(run=choose)
    checking = commands.add_parser("check", help="some reported images in float32")
    checking.add_argument("--images", type=int, default=8)
    checking.set_defaults(run=check)
    reporting = commands.add_parser("report", help="the comparison")
    reporting.add_argument("--minutes", type=float, default=float("inf"), help="start no image after this time")
    reporting.set_defaults(run=report)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
