"""Grid pointing game: do causal effect maps, and other maps, point at the right one of four images?

Three commands, each of which can be interrupted and resumed:

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

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common.networks import image_files
from benchmarks.common.results import RESULTS, write
from benchmarks.pointing._methods import METHODS, ablation_cam, occlusion, passes
from benchmarks.pointing._tables import CONFIDENT, scaled, summary, text, written
from ce_plugin.datasets import read_image
from ce_plugin.evaluation import Mosaics, confidently_classified, grid_pointing_game, mosaics
from ce_plugin.models import efficientnet_lite0

FORMS = ("plain", "contrastive")
CHOSEN = "pointing_choosing"
SIZES = {"224": 224, "448": None}
BLACK = -127.0 / 128.0
# Candidates on the images for choosing: settings of a method, and the number of mosaics.
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
    """Images of odd or even class index that are classified correctly with confidence, and their classes."""
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
    """Pointing share of each form for the cells of one mosaic, cached."""
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
    write(CHOSEN, "\n".join(lines), data, "openvino")


def plan() -> list[tuple[str, str, dict[str, Any], str]]:
    """(label, method, settings, form): each method's chosen settings in each form, and CEM's two weightings."""
    file = RESULTS / f"{CHOSEN}.json"
    if not file.exists():
        raise SystemExit("Run `choose` first.")
    chosen = json.loads(file.read_text())["chosen"]
    rows = [(method, method, chosen[method][form], form) for method in chosen for form in FORMS]
    for weighting in ("change", "activation"):
        settings = {"layer": "head", "weighting": weighting, "outcome": "logit"}
        rows += [(f"CEM, logit, by {weighting}", "CEM", settings, form) for form in FORMS]
    return sorted(rows, key=lambda row: row[1] == "ScoreCAM")  # it is the slowest


def report(options: argparse.Namespace) -> None:
    """All methods on the same mosaics, at both sizes; ScoreCAM, which takes 1,280 passes, on the first of them."""
    images, labels = confident_images(False, options)
    found: dict[str, Any] = {}
    for size, n, few in (("224", options.mosaics, options.few[0]), ("448", options.large, options.few[1])):
        pictures = mosaics(images, labels, n, size=SIZES[size], seed=2)
        scores: dict[str, np.ndarray[Any, Any]] = {}
        for label, method, settings, form in tqdm(plan(), desc=size, mininterval=10):
            some = [
                shares(pictures, i, "even", size, method, scaled(settings, size), options.engine, options.cache)[form]
                for i in range(min(n, few) if method == "ScoreCAM" else n)
            ]
            scores[f"{label} | {form}"] = np.array(some)
        found[size] = summary(scores)
        print(size, {k: round(v["mean"], 3) for k, v in found[size].items()}, flush=True)
    check_file = options.cache / "check.json"
    data = {
        "confident": len(labels), "engine": options.engine, "plan": plan(), "results": found,
        "check": json.loads(check_file.read_text()) if check_file.exists() else {},
    }  # fmt: skip
    write("pointing", text(data), data, "openvino", "grad-cam")


def check(options: argparse.Namespace) -> None:
    """Peers' own implementations on one mosaic at 224."""
    from captum.attr import Occlusion
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    images, labels = confident_images(True, options)
    pictures = mosaics(images, labels, 4, size=224, seed=1)
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
    settings = {"window": 96, "stride": 16, "fill": 0.0}
    both = [
        np.array(
            [
                shares(pictures, i, "odd", "224", "Occlusion", settings, engine, options.cache)["contrastive"]
                for i in range(4)
            ]
        )
        for engine in (options.engine, "torch")
    ]
    found = {
        "share": float(np.abs(both[0] - both[1]).mean()),
        "share_mean": float((both[0] - both[1]).mean()),
        "share_maps": both[0].size,
        "ablation_cam": max(gaps),
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
    """The network up to its last maps, as a separate module, because one activation module is used first and last."""

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
    reporting.add_argument("--mosaics", type=int, default=40, help="at 224")
    reporting.add_argument("--large", type=int, default=20, help="at 448")
    reporting.add_argument("--few", type=int, nargs=2, default=[12, 3], help="those of ScoreCAM, at 224 and at 448")
    reporting.set_defaults(run=report)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
