"""What the default expects before its trials, learnt from other photographs: the constants of ce_plugin/effects/smooth.

    python -m benchmarks.faithfulness.prior

Of the first photographs for choosing, which no comparison uses afterwards, 399 coherent trials are run through both
networks. For each photograph and each length scale and noise the trials have a restricted likelihood; the three log
distributions (length scale, noise, weight of the guide) are those under which all photographs together are most
probable: empirical Bayes, with each photograph's own values integrated out. Trials are kept in --cache.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.common.results import write
from benchmarks.faithfulness._forward import ENGINES, Engine
from benchmarks.faithfulness._references import LEARNING, NETWORKS, images, index_of, prepared, vision_model
from ce_plugin import CausalEffect
from ce_plugin.designs import FirstOrder, RandomRegions
from ce_plugin.effects import smooth as smoothing
from ce_plugin.files import written_whole

GRID, TRIALS, FILLS, ROWS = (14, 14), 399, 3, 64
LENGTHS = (0.015, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5)
NOISES = torch.linspace(-2, 3, 51, dtype=torch.float64)
NARROWEST = 0.25
WEIGHTS = tuple((mean, deviation) for mean in (0.5, 0.75, 1.0, 1.25, 1.5) for deviation in (0.25, 0.5, 0.75, 1.0))


def trials(file: Path, name: str, engine: Engine, options: argparse.Namespace) -> dict[str, Tensor]:
    """Assignments (T, U), outcomes (T, 1) and guide (U, 1) of one photograph's predicted class."""
    place: Path = options.cache / name.replace(" ", "-") / options.engine / f"{file.stem}.npz"
    if not place.exists():
        model = vision_model(name)
        x, keywords = prepared(file, model), {"ids": [index_of(file)]}
        target = int(engine.logits(x).argmax())
        design = RandomRegions(n_trials=TRIALS, independent=0)
        explainer = CausalEffect(engine.logits, design=design, normalization=model.normalization)
        found = explainer.estimate(x, target=target, keep_trials=True, perturbations_per_eval=ROWS, **keywords)
        explainer = CausalEffect(model.model, design=FirstOrder(), normalization=model.normalization)
        guide = explainer.estimate(x, target=target, **keywords).effect
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as stream:
            arrays = {"assignments": found.assignments[0], "outcomes": found.outcomes[0], "guide": guide[0]}
            np.savez(stream, allow_pickle=False, **{key: value.numpy() for key, value in arrays.items()})
    with np.load(place) as kept:
        return {key: torch.from_numpy(kept[key]).double() for key in kept}


def likelihoods(one: dict[str, Tensor], weight: tuple[float, float] | None) -> Tensor:
    """Log restricted likelihood (lengths, noises) of one photograph's trials."""
    held = smoothing._intercepts(torch.arange(TRIALS) % FILLS, one["assignments"])
    a, y = (rows - held @ (held.T @ rows) for rows in (one["assignments"], one["outcomes"]))
    y = y / y.square().mean().sqrt()
    guide = None if weight is None else one["guide"][:, 0] / one["guide"].square().mean().sqrt()
    n, rows = TRIALS - FILLS, []
    for length in LENGTHS:
        prior = smoothing._prior(a, GRID, length, guide, weight or (0.0, 0.0))
        ratios = 10**NOISES * ((prior.w.sum() + prior.predicted.square().sum()) / n)
        rows.append(smoothing._restricted_likelihood(prior, y, n, ratios)[0][:, 0])
    return torch.stack(rows)


def learnt(tables: Tensor) -> tuple[float, dict[str, float]]:
    """The most probable log-normal distributions of length scale and noise, and their log evidence a photograph.

    Args:
        tables: (photographs, lengths, noises).
    """
    # The grid of length scales is not even: each point stands for the part of the axis that is nearest to it.
    length, noise = np.log10(LENGTHS), NOISES.numpy()
    each = np.log(np.gradient(length))[:, None] + np.log(np.gradient(noise))[None]
    data = tables.numpy()

    def normal(x: Any, mean: float, deviation: float) -> Any:
        return -0.5 * ((x - mean) / deviation) ** 2 - math.log(deviation * math.sqrt(2 * math.pi))

    def cost(at: Any) -> float:
        prior = normal(length, at[0], math.exp(at[1]))[:, None] + normal(noise, at[2], math.exp(at[3]))[None]
        joint = (data + prior + each).reshape(len(data), -1)
        return -float(np.logaddexp.reduce(joint, axis=1).mean())

    # No narrower than NARROWEST: these photographs have nearly one length scale, and other images have others.
    spread_bounds = (math.log(NARROWEST), math.log(2))
    bounds = [(-2, 0), spread_bounds, (-2, 3), spread_bounds]
    found = minimize(cost, [-0.9, math.log(0.3), 0.0, math.log(0.4)], method="Nelder-Mead", bounds=bounds)
    mean, spread, level, width = found.x
    return -float(found.fun), {
        "length_mean": mean, "length_sd": math.exp(spread), "noise_mean": level, "noise_sd": math.exp(width),
    }  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "prior"
    parser.add_argument("--cache", type=Path, default=home, help="folder of trials by photograph")
    parser.add_argument("--engine", choices=ENGINES, default="torch", help="arithmetic of passes without gradients")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = []
    for name in NETWORKS:
        engine = Engine(vision_model(name).model, options.engine)
        kept += [trials(file, name, engine, options) for file in images(multiple_of_ten=False)[:LEARNING]]
    rows, data = [], {"photographs": LEARNING, "trials": TRIALS}
    choices = {}
    for weight in (None, *WEIGHTS):
        evidence, found = learnt(torch.stack([likelihoods(one, weight) for one in kept]))
        choices[weight] = (evidence, found)
        shown = "no guide" if weight is None else f"{weight[0]:g}, {weight[1]:g}"
        data[shown] = {"evidence": evidence, **found}
        rows.append(f"| {shown} | {evidence:.2f} | " + " | ".join(f"{value:.2f}" for value in found.values()) + " |")
        print(rows[-1], flush=True)
    guided = {weight: choice for weight, choice in choices.items() if weight is not None}
    best = max(guided, key=lambda weight: guided[weight][0])
    taken = smoothing._WEIGHT
    text = [
        "### What the default expects before its trials",
        "",
        f"From {TRIALS} coherent trials of each of the first {LEARNING} photographs for choosing on both networks.",
        "Weight of the guide (mean, standard deviation), in multiples of tau; log evidence a photograph and network;",
        "decimal logarithms of the length scale (in sides of the grid) and of the noise (in multiples of the signal).",
        "",
        "| weight | log evidence | length, mean | sd | noise, mean | sd |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Most probable: {best[0]:g}, {best[1]:g}. The package takes {taken[0]:g}, {taken[1]:g}, which is",
        f"{guided[best][0] - guided[taken][0]:.2f} below it and wider, with {smoothing._LENGTH} for the length scale",
        f"and {smoothing._NOISE} for the noise, rounded. No deviation below {NARROWEST:g} was allowed for these.",
    ]
    write("faithfulness_prior", "\n".join(text), data, "openvino")


if __name__ == "__main__":
    main()
