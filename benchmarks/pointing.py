"""Grid pointing game: does the causal effect map point at the right picture of four, and do others?

Three commands, each of which continues where it was stopped:

    choose   forms and settings of every method, on mosaics of images with an odd class index
    report   the comparison, on mosaics of images with an even one
    check    our AblationCAM against pytorch-grad-cam's, our Occlusion against Captum's

The images are `imagenet-samples` under the folder that the environment variable CE_PLUGIN_DATA names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch
from _maps import METHODS, ablation_cam, occlusion, passes
from _networks import image_files
from _tables import interval
from torch import Tensor, nn
from tqdm import tqdm

from ce_plugin.datasets import read_image
from ce_plugin.evaluation import Mosaics, confidently_classified, grid_pointing_game, mosaics
from ce_plugin.models import efficientnet_lite0

CONFIDENT = 0.8
FORMS = ("plain", "contrastive")
CHOSEN = "pointing_choosing"
SIZES = {"224": 224, "448": None}
BLACK = -127.0 / 128.0
# What is tried on the choosing images: settings of a method, and on how many mosaics.
CANDIDATES: list[tuple[str, list[dict[str, Any]], int]] = [
    (
        "CEM",
        [
            {"layer": layer, "weighting": weighting, "outcome": outcome}
            for layer in ("head", "block")
            for weighting in ("change", "activation")
            for outcome in ("logit", "log_odds", "probability")
        ],
        12,
    ),
    ("Grad-CAM", [{"layer": "head"}, {"layer": "block"}], 12),
    ("AblationCAM", [{"layer": layer, "absolute": a} for layer in ("head", "block") for a in (False, True)], 12),
    ("ScoreCAM", [{"layer": "head"}, {"layer": "block"}], 4),
    (
        "Occlusion",
        [
            {"window": window, "stride": 16, "fill": fill}
            for window in (48, 64, 80, 96)
            for fill in (0.0, BLACK)
        ],
        6,
    ),
]  # fmt: skip


@cache
def network() -> nn.Module:
    return efficientnet_lite0().model.requires_grad_(False)


@cache
def arithmetic(engine: str, size: int) -> Any:
    return passes(network(), engine, size)


def confident_images(odd: bool, options: argparse.Namespace) -> tuple[Tensor, list[int]]:
    """The images of odd or even class index that the network is sure of and right about, and their classes."""
    files = [file for file in image_files() if int(file.name.split("_")[0]) % 2 == int(odd)]
    labels = [int(file.name.split("_")[0]) for file in files]
    place = options.cache / f"logits-{'odd' if odd else 'even'}.pt"
    net = efficientnet_lite0()
    if not place.exists():
        starts = tqdm(range(0, len(files), 16), desc="which images are classified with confidence")
        with torch.no_grad():
            rows = [network()(net.inputs([read_image(file) for file in files[i : i + 16]])) for i in starts]
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(rows).clone(), place)
    found = confidently_classified(torch.load(place), labels, CONFIDENT).tolist()
    return net.inputs([read_image(files[i]) for i in found]), [labels[i] for i in found]


def shares(
    pictures: Mosaics,
    index: int,
    split: str,
    size: str,
    method: str,
    settings: dict[str, Any],
    engine: str,
    folder: Path,
) -> dict[str, list[float]]:
    """Each form's share for the cells of one mosaic, from the cache where it is there."""
    key = [split, size, index, method, settings, engine if method in ("ScoreCAM", "Occlusion") else "torch"]
    place = folder / size / f"{index:03d}-{method}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"
    if place.exists():
        kept: dict[str, list[float]] = json.loads(place.read_text())
        return kept
    one = Mosaics(
        pictures.x[index : index + 1], pictures.classes[index : index + 1], pictures.members[index : index + 1]
    )
    classes = one.classes[0].tolist()
    start = time.perf_counter()
    maps = METHODS[method](network(), arithmetic(engine, one.x.shape[-1]), one.x, classes, **settings)
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    for form in FORMS:

        def explain(x: Tensor, target: int, others: tuple[int, ...], form: str = form) -> Tensor:
            return maps[form][classes.index(target)][None]

        found[form] = grid_pointing_game(explain, one)[0].tolist()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found))
    return found


def scaled(settings: dict[str, Any], size: str) -> dict[str, Any]:
    """Windows grow with the picture: chosen at 224, twice as large at 448."""
    factor = 1 if size == "224" else 2
    return {k: v * factor if k in ("window", "stride") else v for k, v in settings.items()}


def choose(options: argparse.Namespace) -> None:
    """Every candidate at 224; each form of each method keeps its own best."""
    images, labels = confident_images(True, options)
    pictures = mosaics(images, labels, max(n for _, _, n in CANDIDATES), size=224, seed=1)
    tried = []
    for method, candidates, n in CANDIDATES:
        for settings in candidates:
            rows = [
                shares(pictures, i, "odd", "224", method, settings, options.engine, options.cache) for i in range(n)
            ]
            means = {form: float(np.mean([row[form] for row in rows])) for form in FORMS}
            tried.append({"method": method, "settings": settings, "mosaics": n, **means})
            print(method, written(settings), {form: round(mean, 3) for form, mean in means.items()}, flush=True)
    chosen = {
        method: {
            form: max((t for t in tried if t["method"] == method), key=lambda t: t[form])["settings"] for form in FORMS
        }
        for method, _, _ in CANDIDATES
    }
    lines = [
        "### Pointing game: what was chosen, and on which mosaics",
        "",
        f"Mosaics of images with an odd class index, shrunk into 224 x 224; {len(labels)} images are classified",
        f"rightly with a probability of at least {CONFIDENT}. Mean share; the best of each column of a method is",
        "taken. `head`: what the average pooling takes in (1,280 channels, after the activation); `block`: the last",
        "block's output (320 channels, no activation).",
        "",
        "| method | settings | mosaics | plain | contrastive |",
        "|---|---|---|---|---|",
    ]
    for t in tried:
        cells = [f"{t[f]:.3f}" + (" chosen" if chosen[t["method"]][f] == t["settings"] else "") for f in FORMS]
        lines.append(f"| {t['method']} | {written(t['settings'])} | {t['mosaics']} | {' | '.join(cells)} |")
    data = {"engine": options.engine, "chosen": chosen, "tried": tried}
    _record.write(CHOSEN, "\n".join(lines), data, "openvino")


def written(settings: dict[str, Any]) -> str:
    """Settings in a few words."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())


def plan() -> list[tuple[str, str, dict[str, Any], str]]:
    """(label, method, settings, form): each method's chosen settings in each form, and CEM's two weightings."""
    file = _record.RESULTS / f"{CHOSEN}.json"
    if not file.exists():
        raise SystemExit("Run `choose` first.")
    chosen = json.loads(file.read_text())["chosen"]
    rows = [(method, method, chosen[method][form], form) for method in chosen for form in FORMS]
    for weighting in ("change", "activation"):
        settings = {"layer": "head", "weighting": weighting, "outcome": "logit"}
        rows += [(f"CEM, logit, by {weighting}", "CEM", settings, form) for form in FORMS]
    return rows


def report(options: argparse.Namespace) -> None:
    """All methods on the same mosaics, at both sizes."""
    images, labels = confident_images(False, options)
    found: dict[str, Any] = {}
    for size, n in (("224", options.mosaics), ("448", options.large)):
        pictures = mosaics(images, labels, n, size=SIZES[size], seed=2)
        scores: dict[str, np.ndarray[Any, Any]] = {}
        for label, method, settings, form in tqdm(plan(), desc=size, mininterval=10):
            some = [
                shares(pictures, i, "even", size, method, scaled(settings, size), options.engine, options.cache)[form]
                for i in range(n)
            ]
            scores[f"{label} | {form}"] = np.array(some)
        found[size] = summary(scores)
        print(size, {k: round(v["mean"], 3) for k, v in found[size].items()}, flush=True)
    check_file = options.cache / "check.json"
    data = {
        "confident": len(labels), "mosaics": {"224": options.mosaics, "448": options.large}, "engine": options.engine,
        "plan": plan(), "results": found, "check": json.loads(check_file.read_text()) if check_file.exists() else {},
    }  # fmt: skip
    _record.write("pointing", text(data), data, "openvino", "grad-cam")


def summary(scores: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Means over mosaics with intervals (mosaics are drawn), and what the contrastive CEM has more, in pairs."""
    ours = scores["CEM | contrastive"].mean(1)
    return {
        key: {
            "mean": float(table.mean()),
            "interval": interval(table.mean(1)),
            "at_chance_or_below": float((table <= 0.25).mean()),
            "empty": int((table == 0).sum()),
            "cem_minus": float((ours - table.mean(1)).mean()),
            "cem_minus_interval": interval(ours - table.mean(1)),
            "by_mosaic": [[round(v, 4) for v in row] for row in table.tolist()],
        }
        for key, table in scores.items()
    }


def text(data: dict[str, Any]) -> str:
    """The page for people."""
    lines = [
        "## Grid pointing game",
        "",
        "EfficientNet-lite0; 2 x 2 mosaics of images of different classes, all classified rightly by themselves with a",
        f"probability of at least {CONFIDENT} ({data['confident']} images with an even class index). The share of a",
        "map's positive values inside the cell whose class is explained, after bilinear enlargement to the mosaic's",
        "size; a map without positive values scores 0, a constant one 0.25. Contrastive: the class's logit minus the",
        "mean logit of the mosaic's other three classes, for every method. Layers, weightings, outcomes and windows",
        "were chosen on mosaics of other images, for each form by itself (pointing_choosing.md; windows are doubled at",
        "448).",
        "All methods saw the same mosaics. Intervals: 95 % percentile bootstrap over mosaics; the last columns are",
        "paired differences between the contrastive CEM and the row.",
    ]
    for size, name in (("224", "shrunk into 224 x 224"), ("448", "four 224-pixel images in 448 x 448")):
        table = data["results"][size]
        lines += [
            "",
            f"### {data['mosaics'][size]} mosaics, {4 * data['mosaics'][size]} maps: {name}",
            "",
            "| method | form | settings | share | 95 % interval | maps <= 0.25 | contrastive CEM minus this | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        settings = {f"{label} | {form}": settings for label, _, settings, form in data["plan"]}
        for key in sorted(table, key=lambda k: -table[k]["mean"]):
            row, (label, form) = table[key], key.split(" | ")
            low, high = row["interval"]
            below, above = row["cem_minus_interval"]
            lines.append(
                f"| {label} | {form} | {written(scaled(settings[key], size))} | **{row['mean']:.3f}** "
                f"| {low:.3f} to {high:.3f} | {row['at_chance_or_below']:.0%} | {row['cem_minus']:+.3f} "
                f"| {below:+.3f} to {above:+.3f} |"
            )
    return "\n".join([*lines, "", *remarks(data)])


def remarks(data: dict[str, Any]) -> list[str]:
    """What the table does not say by itself."""
    lines = [
        "Where a global average pooling and one linear layer follow, as they do behind `head`, a channel's effect on a",
        "logit is its weight times its mean, whatever the other channels are. The CEM by change on logits is then",
        "Grad-CAM without its ReLU (and the CAM of Zhou et al. 2016), number for number, and the CEM by activation is",
        "AblationCAM times the score by which that divides (which turns the map over where the score is negative).",
        "So no form of the CEM can point better there than the same form of these; what it adds are outcomes",
        "that are no logits, other interventions, and layers behind which the network is not linear.",
        f"ScoreCAM and Occlusion ran through {data['engine']}; all else in float32 by torch.",
    ]
    check = data["check"]
    if check:
        lines += [
            f"Checked: our AblationCAM against pytorch-grad-cam's on {check['ablation_cam_maps']} maps of the head:"
            f" largest difference {check['ablation_cam']:.1e} of the largest value; our Occlusion against Captum's:"
            f" {check['occlusion']:.1e}; contrastive CEM by change against contrastive Grad-CAM: {check['cem']:.1e};"
            f" {data['engine']} against torch: logits differ by at most {check['logits']:.1e}.",
        ]
    return lines


def check(options: argparse.Namespace) -> None:
    """Peers' own implementations on one mosaic at 224."""
    from captum.attr import Occlusion
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    images, labels = confident_images(True, options)
    pictures = mosaics(images, labels, 2, size=224, seed=1)
    x, classes = pictures.x[:1], pictures.classes[0].tolist()
    net: Any = network()
    logits = arithmetic("torch", 224)
    body = _Features(net)
    whole = nn.Sequential(body, net._avg_pooling, nn.Flatten(), net._fc).eval()
    mine = ablation_cam(net, logits, x, classes, "head")["plain"]
    gaps = []
    for k in range(1):
        with AblationCAM(model=whole, target_layers=[whole[0]], batch_size=16) as peer:
            theirs = peer.get_cam_weights(
                x, whole[0], [ClassifierOutputTarget(classes[k])], body(x).detach().numpy(), np.zeros(0)
            )
        own = torch.einsum("u,uhw->hw", torch.from_numpy(theirs[0]), body(x).detach()[0])
        gaps.append(float((own - mine[k]).abs().max() / own.abs().max()))
    captums = Occlusion(net).attribute(
        x, (3, 64, 64), strides=(3, 16, 16), baselines=0, target=classes[0], perturbations_per_eval=16
    )[0, 0]
    windows = occlusion(net, logits, x, classes, 64, 16, 0.0)["plain"][0]
    cem = METHODS["CEM"](net, logits, x, classes, layer="head", weighting="change", outcome="logit")["contrastive"]
    gradient = METHODS["Grad-CAM"](net, logits, x, classes, layer="head")["contrastive"]
    fast = arithmetic(options.engine, 224)(x) - logits(x)
    found = {
        "ablation_cam": max(gaps),
        "ablation_cam_maps": len(gaps),
        "occlusion": float((captums - windows).abs().max() / captums.abs().max()),
        "cem": max(relative(c, g) for c, g in zip(cem, gradient, strict=True)),
        "logits": float(fast.abs().max()),
    }
    options.cache.mkdir(parents=True, exist_ok=True)
    (options.cache / "check.json").write_text(json.dumps(found))
    print(found)


def relative(one: Tensor, other: Tensor) -> float:
    """Largest difference of two maps after scaling both to a largest value of 1."""
    return float((one / one.abs().max() - other / other.abs().max()).abs().max())


class _Features(nn.Module):
    """The network up to its last planes, as a module of its own: its last activation is also its first."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network.extract_features(x)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "pointing"
    parser.add_argument("--cache", type=Path, default=home, help="folder of scores (default: %(default)s)")
    parser.add_argument(
        "--engine", choices=("torch", "openvino-f32", "openvino-bf16"), default="torch",
        help="arithmetic of ScoreCAM and Occlusion",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(required=True)
    for name, run in (("choose", choose), ("check", check)):
        commands.add_parser(name).set_defaults(run=run)
    reporting = commands.add_parser("report")
    reporting.add_argument("--mosaics", type=int, default=25, help="at 224")
    reporting.add_argument("--large", type=int, default=8, help="at 448")
    reporting.set_defaults(run=report)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
