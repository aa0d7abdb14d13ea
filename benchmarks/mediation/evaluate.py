"""How attacks pass through a network: planted mediation and interactions, and the carriers of PGD.

Three parts, on one thread:

    planted        all four quantities of `CausalMediation` against their closed form (target: 1e-6 in float64)
    interactions   a planted pair of size -2 without single effects among 200 units, through `interactions`
    attack         per layer: how many channels carry 50 and 90 % of the effect of PGD. Channels are ranked on one half
                   of the attacked photographs and tested on the other, and compared with channels in random order,
                   each image's own order, and, for some photographs, different views of the same photograph.

The photographs are `imagenet-samples` under the folder that the environment variable CE_PLUGIN_DATA names. Attacked
images and the outcomes of each layer are cached, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.networks import image_files
from benchmarks.common.results import write
from benchmarks.mediation._tables import SHARE_KEYS, text
from ce_plugin import CausalMediation, LayerCausalEffect
from ce_plugin.datasets import read_image
from ce_plugin.designs import Joint
from ce_plugin.effects import (
    Carriers,
    Mediation,
    carried,
    carriers,
    nested_sets,
    next_sizes,
    ranking,
    resolve_outcome,
)
from ce_plugin.evaluation import PlantedInteraction, PlantedMediation, mediation_truth
from ce_plugin.files import written_whole
from ce_plugin.interventions import Adversarial, Context, Intervention, Patch
from ce_plugin.models import VisionModel, efficientnet_lite0
from ce_plugin.randomness import generator

# Name in the tables -> layer. A block's output, the stem and the head are cuts: everything passes through them. The
# last normalisation of a block with a skip connection is a branch, which the block's input bypasses.
LAYERS = {
    "stem": "_bn0", "block 1": "_blocks.1", "block 4": "_blocks.4", "block 8": "_blocks.8", "block 11": "_blocks.11",
    "block 15": "_blocks.15", "head": "_bn1", "block 2, branch": "_blocks.2._bn2", "block 7, branch": "_blocks.7._bn2",
    "block 10, branch": "_blocks.10._bn2", "block 14, branch": "_blocks.14._bn2",
}  # fmt: skip
OUTCOMES = ("logit", "log_odds")
PARTS = (0.5, 0.9)
EPS, STEPS = 4.0, 10  # of pixels 0 to 255
RANDOM_ORDERS = 3
LISTED = 50  # channels of an order that are stored
VIEWED, VIEW_LAYERS, VIEW_SIZE = 6, ("block 4", "block 15", "head"), 0.85
BATCH = 10  # images whose outcomes on all classes are in memory at a time
QUANTITIES = ("total", "indirect", "direct", "interaction")
PAIRS = 10


class Crafted(Intervention):
    """Precomputed attacks: x' of the image with a given id."""

    def __init__(self, attacked: Tensor) -> None:
        self.attacked = attacked

    def values(self, clean: Tensor, context: Context) -> Tensor:
        return self.attacked[list(context.ids)].to(clean)

    def __repr__(self) -> str:
        return f"PGD(eps={EPS:g}/255)"


def planted_rows() -> Iterator[dict[str, Any]]:
    """The four quantities against the truth, for channels and for sets of them."""
    for bypass in (True, False):
        for dtype in (torch.float64, torch.float32):
            for engine in ("auto", "full"):
                errors = dict.fromkeys(QUANTITIES, 0.0)
                largest = 0.0
                for seed in range(5):
                    network = PlantedMediation(12, 4, bypass=bypass, seed=seed).to(dtype)
                    draw = generator(seed, "images")
                    x, x1 = (torch.rand(6, 2, 4, 4, generator=draw).to(dtype) for _ in range(2))
                    mediation = CausalMediation(network, "mediator", x1, engine=engine)
                    for sets in (None, [(0,), (1, 2), (0, 3, 4, 7), tuple(range(12))]):
                        found = mediation.estimate(x, sets=sets)
                        truth = mediation_truth(network, x, x1, sets)
                        largest = max(largest, *(float(part.abs().max()) for part in truth))
                        for name in QUANTITIES:
                            gap = getattr(found, name).double() - getattr(truth, name)
                            errors[name] = max(errors[name], float(gap.abs().max()))
                yield {
                    "cut": not bypass, "dtype": str(dtype).removeprefix("torch."), "engine": engine,
                    "errors": errors, "largest_effect": largest, "networks": 5, "images": 6,
                }  # fmt: skip


def interaction_rows() -> Iterator[dict[str, Any]]:
    """Rank of the planted pair among the screened pairs, and the cost of finding it."""
    for gate in ("product", "relu"):
        for seed in range(PAIRS):
            draw = generator(seed, "pair", gate)
            u, v = sorted(torch.randperm(200, generator=draw)[:2].tolist())
            network = PlantedInteraction(200, (u, v), -2.0, gate=gate, seed=seed).requires_grad_(False)
            x = torch.rand(1, 1, 4, 4, generator=draw)
            started = time.perf_counter()
            found = LayerCausalEffect(network, "layer", outcome="logit").interactions(x, target=0)[0]
            seconds = time.perf_counter() - started
            frame = found.to_dataframe()
            place = frame.index[(frame.unit_u == u) & (frame.unit_v == v)].tolist()
            here = found.pairs.tolist().index([u, v]) if [u, v] in found.pairs.tolist() else None
            single = found.single[:, 0].abs()
            yield {
                "gate": gate, "seed": seed, "pair": [u, v], "rank": place[0] + 1 if place else None,
                "rank_of_score": None if here is None else here + 1,
                "error": abs(float(frame.interaction[place[0]]) + 2) if place else None,
                "next_largest": float(frame.interaction.abs().drop(place).max()),
                "single_effects": [float(single[u]), float(single[v])], "largest_single": float(single.max()),
                "trials": found.n_trials, "gradients": found.n_gradients, "seconds": seconds,
            }  # fmt: skip


@dataclass
class Scene:
    """Photographs that the network classifies correctly until PGD attacks them.

    Args:
        clean: x, (N, 3, 224, 224).
        attacked: x', of the same shape.
        target: the class of the clean image, (N,).
        record: numbers of attacks and failures.
    """

    clean: Tensor
    attacked: Tensor
    target: Tensor
    record: dict[str, Any]

    @property
    def halves(self) -> tuple[list[int], list[int]]:
        """Images on which channels are ranked, and images on which they are tested."""
        n = len(self.clean)
        return list(range(n // 2)), list(range(n // 2, n))


class Attacker:
    """PGD on one image at a time; results are cached in a folder."""

    def __init__(self, network: VisionModel, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.attack = Adversarial.pgd(
            network.model, eps=EPS, max_iter=STEPS, clip_values=network.value_range, normalization=network.normalization
        )

    def __call__(self, x: Tensor, label: int, ident: int, name: str) -> Tensor | None:
        """x', or None if the prediction does not change."""
        place = self.folder / "attacked" / f"{name}-{EPS:g}-{STEPS}.pt"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            keep(self.attack.perturb(x, target=torch.tensor([label]), ids=[ident]), place)
        x1: Tensor = torch.load(place, weights_only=True)
        return None if answer(self.network.model, x1) == label else x1


def scene_of(kept: list[tuple[Tensor, Tensor, int]], record: dict[str, Any]) -> Scene:
    clean, attacked = (torch.cat([one[k] for one in kept]) for k in (0, 1))  # type: ignore[misc]
    return Scene(clean, attacked, torch.tensor([label for _, _, label in kept]), record)


def attacked_scene(attacker: Attacker, wanted: int) -> Scene:
    """Photographs in a fixed random order, until the given number of attacks has succeeded."""
    files, network = image_files(), attacker.network
    order = torch.randperm(len(files), generator=generator(2026, "mediation")).tolist()
    kept: list[tuple[Tensor, Tensor, int]] = []
    counts, names = {"tried": 0, "not_known": 0, "attack_failed": 0}, []
    for i in order:
        if len(kept) == wanted:
            break
        counts["tried"] += 1
        x, label = network.inputs([read_image(files[i])]), int(files[i].name.split("_")[0])
        if answer(network.model, x) != label:
            counts["not_known"] += 1
            continue
        x1 = attacker(x, label, i, files[i].stem)
        if x1 is None:
            counts["attack_failed"] += 1
            continue
        kept.append((x, x1, label))
        names.append(files[i].name)
    return scene_of(kept, {**counts, "images": len(kept), "files": names})


def view_scene(attacker: Attacker, file: Path) -> Scene:
    """The usable ones of eight views of a photograph, crops at its corners and edges, in random order."""
    photograph, label = read_image(file), int(file.name.split("_")[0])
    height, width = (round(VIEW_SIZE * side) for side in photograph.shape[1:])
    tops, lefts = (
        [0, (full - part) // 2, full - part]
        for full, part in zip(photograph.shape[1:], (height, width), strict=True)
    )  # fmt: skip
    crops = [(top, left) for top in tops for left in lefts if (top, left) != (tops[1], lefts[1])]
    kept: list[tuple[Tensor, Tensor, int]] = []
    counts = {"tried": len(crops), "not_known": 0, "attack_failed": 0}
    for k in torch.randperm(len(crops), generator=generator(0, "views")).tolist():
        top, left = crops[k]
        x = attacker.network.inputs([photograph[:, top : top + height, left : left + width]])
        if answer(attacker.network.model, x) != label:
            counts["not_known"] += 1
            continue
        x1 = attacker(x, label, k, f"{file.stem}-view{k}")
        if x1 is None:
            counts["attack_failed"] += 1
            continue
        kept.append((x, x1, label))
    return scene_of(kept, {**counts, "images": len(kept), "files": [file.name]})


def answer(model: nn.Module, x: Tensor) -> int:
    with torch.inference_mode():
        return int(model(x).argmax())


def keep(value: Any, place: Path) -> None:
    """Write a file atomically."""
    with written_whole(place) as stream:
        torch.save(value, stream)


def on_target(logits: Tensor, target: Tensor) -> Tensor:
    """Logit and log-odds of each image's class, (N, ..., 2), of logits (N, ..., C)."""
    flat = logits.double().flatten(1, -2) if logits.dim() > 2 else logits.double()[:, None]
    columns = []
    for name in OUTCOMES:
        outcome = resolve_outcome(name)
        every = outcome(flat.flatten(0, 1), flat.flatten(0, 1)).reshape(flat.shape)
        columns.append(every.gather(2, target[:, None, None].expand(-1, flat.shape[1], 1)))
    found = torch.cat(columns, 2)
    return found if logits.dim() > 2 else found[:, 0]


class Layer:
    """The outcomes at one layer, on logit and log-odds of the clean class, from one run each; kept in a file.

    Args:
        model: the network.
        name: name of the layer.
        scene: the photographs.
        place: file of the outcomes.
    """

    def __init__(self, model: nn.Module, name: str, scene: Scene, place: Path) -> None:
        self.scene, self.place = scene, place
        self.mediation = CausalMediation(model, name, Crafted(scene.attacked), outcome="logit")
        self.model, self.name = model, name
        self.stored: dict[str, Any] = torch.load(place, weights_only=True) if place.exists() else {}
        self.seconds = float(self.stored.get("seconds", 0.0))

    def mediated(self, rows: list[int], sets: list[tuple[int, ...]] | None) -> list[Mediation]:
        """Mediation through each channel or set, for each outcome; C = 1, the clean class."""
        key = f"{rows} {sets}"
        if key not in self.stored:
            started = time.perf_counter()
            parts = []
            for some in (rows[k : k + BATCH] for k in range(0, len(rows), BATCH)):
                found = self.mediation.estimate(self.scene.clean[some], sets=sets, ids=some)
                before = found.reference
                if before is None:
                    raise SystemExit("A mediation without its reference.")
                runs = (before, before + found.total, before[:, None] + found.indirect, before[:, None] + found.direct)
                parts.append([on_target(run, self.scene.target[some]) for run in runs])
                self.stored["cut"] = found.cut
            self.stored[key] = [torch.cat(run) for run in zip(*parts, strict=True)]
            self.save(started)
        clean, intervened, mediated, blocked = self.stored[key]
        return [
            Mediation.from_outcomes(
                *(run[..., k : k + 1] for run in (clean, intervened, mediated, blocked)),
                site=self.name, outcome=name, cut=self.stored["cut"],
            )
            for k, name in enumerate(OUTCOMES)
        ]  # fmt: skip

    def joint(self, rows: list[int], sets: list[tuple[int, ...]]) -> Tensor:
        """Joint indirect effects of sets, (N, len(sets), 2)."""
        missing = [chosen for chosen in sets if f"{rows} {chosen}" not in self.stored]
        if missing:
            started = time.perf_counter()
            columns = []
            for some in (rows[k : k + BATCH] for k in range(0, len(rows), BATCH)):
                patch = Patch(self.scene.attacked[some])
                explainer = LayerCausalEffect(self.model, self.name, patch, Joint(missing), outcome="logit")
                found = explainer.estimate(self.scene.clean[some], ids=some)
                target = self.scene.target[some]
                before = on_target(found.reference, target)
                columns.append(on_target(found.reference[:, None] + found.effect, target) - before[:, None])
            every = torch.cat(columns)
            self.stored |= {f"{rows} {chosen}": every[:, k].clone() for k, chosen in enumerate(missing)}
            self.save(started)
        return torch.stack([self.stored[f"{rows} {chosen}"] for chosen in sets], 1)

    def save(self, started: float) -> None:
        self.seconds += time.perf_counter() - started
        self.stored["seconds"] = self.seconds
        self.place.parent.mkdir(parents=True, exist_ok=True)
        keep(self.stored, self.place)


def study(layer: Layer, label: str) -> dict[str, Any]:
    """Carriers of the attack at one layer: nested sets on the logit, and the share of the log-odds of the same sets."""
    choosing, testing = layer.scene.halves
    first = layer.mediated(choosing, None)[0]
    units = first.indirect.shape[1]
    whole = layer.mediated(testing, [tuple(range(units))])
    totals = [one.total[:, 0] for one in whole]

    def run(sets: list[tuple[int, ...]]) -> Tensor:
        return layer.joint(testing, sets)[..., 0]

    found = carriers(first, run, totals[0], class_index=0, levels=PARTS)
    sets = nested_sets(found.order, found.sizes)
    log_odds = carried(found.order, layer.joint(testing, sets)[..., 1], totals[1], sizes=found.sizes, levels=PARTS)
    shares = whole[0].share(0)
    return {
        "label": label, "layer": layer.name, "channels": units, "cut": first.cut,
        "logit": curve_of(found), "log_odds": curve_of(log_odds),
        "whole": {key: float(getattr(shares, key)[0]) for key in SHARE_KEYS},
        "random": random_orders(layer, testing, found, totals[0]),
        "own": own_orders(layer, choosing, first), "top": top_channels(first), "seconds": layer.seconds,
    }  # fmt: skip


def curve_of(found: Carriers) -> dict[str, Any]:
    """The curve and the numbers needed, JSON-serialisable."""
    return {
        "total": [found.total, found.total_low, found.total_high],
        "sizes": list(found.sizes), "share": found.share.tolist(), "low": found.share_low.tolist(),
        "high": found.share_high.tolist(), "order": list(found.order[:LISTED]),
        "needed": {str(part): found.needed[part] for part in PARTS},
        "interval": {str(part): list(found.interval[part]) for part in PARTS},
    }  # fmt: skip


def random_orders(layer: Layer, testing: list[int], found: Carriers, total: Tensor) -> dict[str, Any]:
    """Sets of the same sizes in random order: their shares, and the smallest of these sizes that are enough."""
    orders = [
        torch.randperm(len(found.order), generator=generator(r, "order", layer.name)).tolist()
        for r in range(RANDOM_ORDERS)
    ]
    sets = [chosen for order in orders for chosen in nested_sets(order, found.sizes)]
    share = (layer.joint(testing, sets)[..., 0].mean(0) / total.mean()).reshape(RANDOM_ORDERS, -1)
    reached = {str(part): [first_size(found.sizes, curve, part) for curve in share] for part in PARTS}
    return {"share": share.tolist(), "reached": reached}


def first_size(sizes: Sequence[int], share: Tensor, part: float) -> int | None:
    """The smallest size whose share reaches a part."""
    return next((size for size, value in zip(sizes, share.tolist(), strict=True) if value >= part), None)


def own_orders(layer: Layer, rows: list[int], first: Mediation) -> dict[str, Any]:
    """Each image's channels in its own order, tested on the same image: the best possible for one attack."""
    units = first.indirect.shape[1]
    sizes = sorted({size for e in range(12) for size in (2**e, 3 * 2 ** max(e - 1, 0)) if size < units} | {units})
    needed: dict[str, list[int | None]] = {str(part): [] for part in PARTS}
    for i, row in enumerate(rows):
        order = ranking(first[i], 0)
        share = layer.joint([row], nested_sets(order, sizes))[0, :, 0] / first.total[i, 0]
        for part in PARTS:
            needed[str(part)].append(first_size(sizes, share, part))
    return {"sizes": sizes, "needed": needed}


def top_channels(first: Mediation) -> list[dict[str, float]]:
    """The five channels with the largest indirect effect on the ranking images."""
    frame = first.share(0).to_dataframe().head(5)
    found: list[dict[str, float]] = frame[["unit", "indirect_share", "direct_share"]].to_dict("records")
    return found


def view_rows(attacker: Attacker, names: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Channels ranked on some views of a photograph and tested on its other views."""
    files = {file.name: file for file in image_files()}
    for name in names:
        scene = view_scene(attacker, files[name])
        choosing, testing = scene.halves
        if len(choosing) < 2:
            yield {"file": name, **scene.record}
            continue
        for label in VIEW_LAYERS:
            place = folder / f"{LAYERS[label]}-{files[name].stem}-views.pt"
            layer = Layer(attacker.network.model, LAYERS[label], scene, place)
            first = layer.mediated(choosing, None)[0]
            whole = layer.mediated(testing, [tuple(range(first.indirect.shape[1]))])[0]
            needed = sizes_needed(layer, testing, ranking(first, 0), whole.total[:, 0])
            yield {"file": name, "label": label, **scene.record, "needed": needed}


def sizes_needed(layer: Layer, testing: list[int], order: tuple[int, ...], total: Tensor) -> dict[str, int | None]:
    """As in `carriers`, but without intervals, which would be unreliable for a few views."""
    shares: dict[int, float] = {}
    hint = [len(chosen) for chosen in nested_sets(order)]
    while hint:
        joint = layer.joint(testing, nested_sets(order, hint))[..., 0]
        shares |= dict(zip(hint, (joint.mean(0) / total.mean()).tolist(), strict=True))
        sizes = sorted(shares)
        curve = torch.tensor([shares[k] for k in sizes])
        hint = next_sizes(sizes, curve, PARTS)
    return {str(part): first_size(sizes, curve, part) for part in PARTS}


def attack_part(images: int, folder: Path) -> dict[str, Any]:
    """All layers."""
    network = efficientnet_lite0()
    network.model.requires_grad_(False)
    attacker = Attacker(network, folder)
    scene = attacked_scene(attacker, images)
    print({k: v for k, v in scene.record.items() if k != "files"}, flush=True)
    digest = hashlib.sha256(json.dumps([scene.record["files"], EPS, STEPS]).encode()).hexdigest()[:12]
    rows = []
    for label, name in LAYERS.items():
        row = study(Layer(network.model, name, scene, folder / f"{name}-{digest}.pt"), label)
        needed = row["logit"]["needed"], row["logit"]["interval"], row["random"]["reached"]
        print(f"{label}: {row['channels']} channels, {needed}, {row['seconds']:.0f} s", flush=True)
        rows.append(row)
    viewed = []
    for row in view_rows(attacker, scene.record["files"][:VIEWED], folder):
        print({k: row.get(k) for k in ("file", "label", "images", "needed")}, flush=True)
        viewed.append(row)
    return {"scene": scene.record, "layers": rows, "views": viewed}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "mediation"
    parser.add_argument("--cache", type=Path, default=home, help="folder of attacked images and outcomes")
    parser.add_argument("--images", type=int, default=40, help="successfully attacked photographs (default: 40)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    data: dict[str, Any] = {"planted": list(planted_rows()), "interactions": list(interaction_rows())}
    for row in data["planted"]:
        print(row, flush=True)
    data |= attack_part(options.images, options.cache)
    data["processor_seconds"] = time.process_time() - started
    data["eps"], data["steps"], data["random_orders"] = EPS, STEPS, RANDOM_ORDERS
    data["medians"] = {
        key: float(np.median([row[key] for row in data["interactions"]])) for key in ("trials", "gradients", "seconds")
    }
    write("mediation", text(data), data, "adversarial-robustness-toolbox")


if __name__ == "__main__":
    main()
