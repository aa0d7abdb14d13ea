"""Errors of the default on photographs: how often do its 95 % intervals hold the effect that very many trials find?

Fixed before the run: the first five photographs for choosing, 40 runs with new trials each, both networks; the truth is
the mean of 20 estimates from 1,000 other, independent trials each. Bar: mean coverage .93 to .97. What is finished is
kept in --cache, so that a run can be resumed; photographs are under the folder that CE_PLUGIN_DATA names.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import write
from benchmarks.faithfulness._forward import ENGINES, Accelerated, Engine
from benchmarks.faithfulness._references import NETWORKS, images, prepared, vision_model
from ce_plugin import CausalEffect
from ce_plugin.designs import RandomRegions
from ce_plugin.files import written_whole

IMAGES, RUNS, CHUNKS, CHUNK, ROWS = 5, 40, 20, 1000, 64


def study(name: str, k: int, folder: Path, engine_name: str, until: float) -> None:
    """Effects and half-widths of the runs, and the parts of the truth: each estimate is kept once it is made."""
    model = vision_model(name)
    engine = Engine(model.model, engine_name)
    network = Accelerated(model.model, engine.logits).eval()
    x = prepared(images(multiple_of_ten=False)[k], model)
    target = int(engine.logits(x).argmax())
    # Other seeds for the truth: its trials are not those of any run.
    truth = RandomRegions(n_trials=CHUNK, independent=1.0, seed=1)
    jobs: list[tuple[str, int, RandomRegions | None]] = [("run", run, None) for run in range(RUNS)]
    jobs += [("truth", chunk, truth) for chunk in range(CHUNKS)]
    for kind, number, design in jobs:
        place = stored(folder, name, k, kind, number)
        if place.exists() or time.time() > until:
            continue
        explainer = CausalEffect(network, design=design, normalization=model.normalization)
        found = explainer.estimate(x, target=target, ids=[number], perturbations_per_eval=ROWS)
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as stream:
            np.savez(stream, effect=found.effect[0, :, 0].numpy(), half_width=found.half_width(0.95)[0, :, 0].numpy())


def stored(folder: Path, name: str, k: int, kind: str, number: int) -> Path:
    """File of one estimate."""
    return folder / name.replace(" ", "-") / str(k) / f"{kind}-{number}.npz"


def row(folder: Path, name: str, k: int) -> dict[str, Any] | None:
    """Coverage on one photograph; None where it is not finished."""
    runs = [stored(folder, name, k, "run", run) for run in range(RUNS)]
    chunks = [stored(folder, name, k, "truth", chunk) for chunk in range(CHUNKS)]
    if not all(place.exists() for place in runs + chunks):
        return None
    truth = np.stack([np.load(place)["effect"] for place in chunks]).astype(float)
    effect = np.stack([np.load(place)["effect"] for place in runs]).astype(float)
    half = np.stack([np.load(place)["half_width"] for place in runs]).astype(float)
    centre = truth.mean(0)
    by_run = (np.abs(effect - centre) <= half).mean(1)
    largest = float(np.abs(centre).max())
    return {
        "coverage": float(by_run.mean()),
        "std_error": float(by_run.std(ddof=1) / RUNS**0.5),
        "worst_unit": float((np.abs(effect - centre) <= half).mean(0).min()),
        "half_width": float(half.mean() / largest),
        "truth_error": float((truth.std(0, ddof=1) / CHUNKS**0.5).mean() / half.mean() * 1.96),
        "largest": largest,
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "coverage-photographs"
    parser.add_argument("--cache", type=Path, default=home, help="folder of finished estimates")
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="arithmetic of the passes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no estimate after this time")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS[::-1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    until = time.time() + 60 * options.minutes
    rows, data = [], {"runs": RUNS, "truth_trials": CHUNK * CHUNKS, "design": repr(RandomRegions())}
    for k in range(IMAGES):
        for name in options.networks:
            study(name, k, options.cache, options.engine, until)
    for name in NETWORKS:
        found = [row(options.cache, name, k) for k in range(IMAGES)]
        finished = [one for one in found if one is not None]
        for k, one in enumerate(found):
            if one is not None:
                data[f"{name}, {k}"] = one
                rows.append(
                    f"| {name} | {k} | {one['coverage']:.3f} (standard error {one['std_error']:.3f}) "
                    f"| {one['worst_unit']:.2f} | {one['half_width']:.2f} | {one['largest']:.3f} |"
                )
        if finished:
            mean = float(np.mean([one["coverage"] for one in finished]))
            data[name] = {"coverage": mean, "photographs": len(finished), "met": 0.93 <= mean <= 0.97}
            rows.append(f"| {name} | mean of {len(finished)} | **{mean:.3f}** | | | |")
    text = [
        f"The default, {RandomRegions()!r}, probability of the predicted class,",
        f"{RUNS} runs with new trials on each photograph; truth from {CHUNK * CHUNKS:,} other trials. Half-widths in",
        f"multiples of the largest effect. The worst unit's coverage is of {RUNS} runs. Bar: mean coverage .93 to .97.",
        "",
        "| network | photograph | coverage of 95 % intervals | worst unit | half-width | largest effect |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(text))
    write("coverage_photographs", "\n".join(text), data, "openvino")


if __name__ == "__main__":
    main()
