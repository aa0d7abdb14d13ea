"""Figure 3 of the paper on chest X-rays: causal effect maps beside Grad-CAM and CAM, clean and under four attacks.

Not for clinical use. A picture, and in numbers: rank correlation with the map of the clean image, for the same output,
and the share of the map inside the box of the finding. Attacks move one output away from the network's answer. Networks
and images: `benchmarks.paper.xray_networks`, whose weights are taken from the cache.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradCam
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.common.results import write
from benchmarks.paper._page import Interval, ends, flat, save_page
from benchmarks.paper._xrays import (
    ATTACKS,
    Mean,
    attacked,
    by_patient,
    informative,
    logits,
    network,
    nih_parts,
    pneumonia_parts,
    prepared,
    reading,
)
from ce_plugin import CausalEffectMap
from ce_plugin.datasets import FINDINGS, XRays, box_mask
from ce_plugin.evaluation import box_share, rank_correlation
from ce_plugin.interventions import Adversarial
from ce_plugin.models import VisionModel
from ce_plugin.visualization import overlay, plot_intervals, sheet

MapOf = Callable[[Tensor, Tensor], Tensor]
LAYERS = {
    "pneumonia CNN": ("relu3",),
    "one sigmoid": ("features.transition3.relu", "features.norm5"),
    "fourteen sigmoids": ("features.transition3.relu", "features.norm5"),
}
SHOWN = ("FGSM", "BIM", "JSMA", "PGD")


def maps_of(net: VisionModel, layer: str) -> dict[str, MapOf]:
    """Name -> a function from images and outputs (N,) to maps (N, 1, h, w).

    CAM is defined where the layer is the last one before pooling and a linear head.
    """
    model, module = net.model, net.model.get_submodule(layer)
    effect, gradient = CausalEffectMap(model, layer), LayerGradCam(model, module)

    def grad_cam(x: Tensor, target: Tensor, *, relu: bool) -> Tensor:
        found: Tensor = gradient.attribute(x.clone().requires_grad_(), target, relu_attributions=relu)
        return found.detach()

    found: dict[str, MapOf] = {
        "CEM": lambda x, target: effect.attribute(x, target),
        "Grad-CAM": lambda x, target: grad_cam(x, target, relu=True),
        "Grad-CAM, signed": lambda x, target: grad_cam(x, target, relu=False),
    }
    if layer == "features.norm5":
        head = model.get_submodule("classifier")
        found["CAM"] = lambda x, target: class_activation_map(module, model, head, x, target)
    return found


def class_activation_map(layer: nn.Module, model: nn.Module, head: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """CAM (Zhou et al. 2016): the layer's value behind ReLU, weighted by the head's weights of the output."""
    held: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _i, value: held.append(value.detach().clone()))
    try:
        logits(model, x)
    finally:
        handle.remove()
    weight: Any = head.weight
    return torch.einsum("nchw,nc->nhw", torch.cat(held).relu(), weight.detach()[target])[:, None]


@dataclass(frozen=True)
class Pictures:
    """Images whose maps are made.

    Args:
        x: (N, 3, H, W), in model units.
        target: the output that is explained and attacked, (N,).
        patients: of each.
        boxes: pixels of the finding's box, (N, H, W), bool; None where there are none.
    """

    x: Tensor
    target: Tensor
    patients: tuple[str, ...]
    boxes: Tensor | None = None


def pictures_of(name: str, n: int) -> Pictures:
    """X-rays with pneumonia that the network sees, n at most; or those with boxes of the findings that it reads."""
    net = network(name)
    if name == "fourteen sigmoids":
        return _boxed(net)
    _, test = pneumonia_parts()
    images = prepared(net, test)
    seen = (images.y[:, 0] & (logits(net.model, images.x)[:, 0] > 0)).nonzero().flatten()
    chosen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:n]].sort().values
    patients = tuple(test.groups[i] for i in chosen.tolist())
    return Pictures(images.x[chosen], torch.zeros(len(chosen), dtype=torch.long), patients)


def _boxed(net: VisionModel) -> Pictures:
    """One picture for each finding that the network reads and that has a box in it."""
    _, test = nih_parts()
    images = prepared(net, test)
    read = set(informative(reading(logits(net.model, images.x), images, FINDINGS)))
    pairs = [(i, k) for i in range(len(test)) for k in sorted({box.finding for box in test.boxes_of(i)} & read)]
    data = test.subset(i for i, _ in pairs)
    x = prepared(net, data).x
    if not isinstance(data, XRays):
        raise TypeError("boxes need X-rays with boxes")
    masks = [box_mask(data, row, k, *x.shape[2:]) for row, (_, k) in enumerate(pairs)]
    return Pictures(x, torch.tensor([k for _, k in pairs]), data.groups, torch.stack(masks))


def preset(net: VisionModel, attack: str) -> Adversarial:
    """One of the attacks on the network."""
    options = dict(ATTACKS[attack])
    several = len(net.class_names or ()) > 1
    name = options.pop("name")
    return Adversarial.preset(name, net.model, normalization=net.normalization, multi_label=several, **options)


def compared(
    pictures: Pictures, changed: dict[str, Tensor], maps: dict[str, MapOf], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of one layer: for each attack and kind of map, correlation with the clean map and share in the box."""
    rows: list[dict[str, Any]] = []
    clean = {kind: explain(pictures.x, pictures.target) for kind, explain in maps.items()}
    for attack, x in {"clean": pictures.x, **changed}.items():
        values: dict[str, list[float]] = {}
        for kind, explain in maps.items():
            found = clean[kind] if attack == "clean" else explain(x, pictures.target)
            row = {**about, "attack": attack, "map": kind, "images": len(x)}
            if attack != "clean":
                values[kind] = rank_correlation(clean[kind].flatten(1), found.flatten(1)).tolist()
                row |= _mean("correlation", values[kind], pictures.patients)
                row["undefined"] = sum(map(math.isnan, values[kind]))
                if kind != "CEM":
                    apart = [a - b for a, b in zip(values["CEM"], values[kind], strict=True)]
                    row |= _mean("cem_minus_this", apart, pictures.patients)
            if pictures.boxes is not None:
                large = interpolate(found.float(), pictures.x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
                shares = [box_share(one, box)["share in boxes"] for one, box in zip(large, pictures.boxes, strict=True)]
                row |= _mean("share_in_box", shares, pictures.patients)
                area = pictures.boxes.double().mean((1, 2)).tolist()
                row |= _mean("area_of_box", area, pictures.patients)
            rows.append(row)
    return rows


def _mean(name: str, values: list[float], patients: tuple[str, ...]) -> dict[str, Any]:
    """The mean over patients of the values that are defined."""
    kept = [(v, p) for v, p in zip(values, patients, strict=True) if not math.isnan(v)]
    if not kept:
        return {name: None}
    return {name: asdict(by_patient([v for v, _ in kept], [p for _, p in kept]))}


def fooled(net: VisionModel, pictures: Pictures, x: Tensor) -> float:
    """Share of the images of which the attacked output is another than before."""
    pick = pictures.target[:, None]
    before, after = (logits(net.model, one).gather(1, pick) > 0 for one in (pictures.x, x))
    return float((before != after).double().mean())


def draw(net: VisionModel, pictures: Pictures, changed: dict[str, Tensor], maps: dict[str, MapOf], row: int) -> Any:
    """One image, clean and attacked, above its maps."""
    columns = {"clean": pictures.x, **{name: changed[name] for name in SHOWN}}
    size = pictures.x.shape[2:]
    target = pictures.target[row : row + 1]
    lines: list[list[tuple[str, Any]]] = []
    z = {name: float(logits(net.model, x[row : row + 1])[0, int(target)]) for name, x in columns.items()}
    seen = {name: net.pictures(x[row : row + 1])[0] for name, x in columns.items()}
    lines.append([(f"{name}: logit {z[name]:+.1f}", seen[name]) for name in columns])
    for kind in ("CEM", "Grad-CAM"):
        cells = []
        for name, x in columns.items():
            found = maps[kind](x[row : row + 1], target)
            large = interpolate(found.float(), size, mode="bilinear", align_corners=False)[0, 0]
            cells.append((f"{kind}, {name}", overlay(large, seen[name])))
        lines.append(cells)
    return sheet(
        lines, note="Each map has its own scale: orange supports pneumonia, or the finding; blue speaks against it."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--images", type=int, default=100, help="of children's X-rays with pneumonia, at most")
    parser.add_argument("--dense", type=int, default=20, help="the same for the DenseNet, whose attacks take longer")
    parser.add_argument("--out", type=Path, help="a folder for the page, its table and pictures")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    success: dict[str, dict[str, float]] = {}
    figures: dict[str, Figure] = {}
    for name in options.networks:
        layers = LAYERS[name]
        net, pictures = network(name), pictures_of(name, options.dense if name == "one sigmoid" else options.images)
        changed = {attack: attacked(preset(net, attack), net.model, pictures.x, pictures.target) for attack in ATTACKS}
        success[name] = {attack: fooled(net, pictures, x) for attack, x in changed.items()}
        for layer in layers:
            maps = maps_of(net, layer)
            size = tuple(maps["CEM"](pictures.x[:1], pictures.target[:1]).shape[2:])
            about = {"network": name, "layer": layer, "map_size": f"{size[0]} x {size[1]}"}
            rows += compared(pictures, changed, maps, about)
            print(name, layer, flush=True)
        if options.out is not None:
            figures[f"figure3-{name.replace(' ', '-')}"] = draw(net, pictures, changed, maps_of(net, layers[0]), 0)
    page = text(rows, success)
    if options.out is not None:
        figures["figure3-correlation"] = plot(rows)
    save_page(options.out, "figure3", page, {"figure3": flat(rows)}, figures)
    record = {"rows": rows, "success": success, "attacks": ATTACKS, "findings": FINDINGS}
    write("paper_figure3", page, record)


def plot(rows: list[dict[str, Any]]) -> Figure:
    """How much of each map's order is kept under each attack."""
    panels: dict[str, dict[str, dict[str, Interval]]] = {}
    for row in rows:
        if row.get("correlation") is not None:
            own = panels.setdefault(f"{row['network']}, {row['layer']}", {})
            own.setdefault(row["attack"], {})[row["map"]] = ends(row["correlation"])
    return plot_intervals(panels, xlabel="correlation with the clean map")


def text(rows: list[dict[str, Any]], success: dict[str, dict[str, float]]) -> str:
    """The tables."""
    lines = [
        "### Figure 3: causal effect maps, Grad-CAM and CAM on chest X-rays, clean and under attack",
        "",
        "Not for clinical use. Spearman's correlation of the map with that of the clean image, on the layer's own"
        " grid, for the same output; mean over patients, 95 % t intervals. Grad-CAM is Captum's with its ReLU; a map"
        " without any positive value has no ranks, and is left out (undefined). Children's X-rays: those with pneumonia"
        " that the network sees. Fourteen findings: images with boxes of the findings that are read, output and box of"
        " the finding. Last columns: CEM minus this map, on the images where both are defined, and the share of the"
        " map's positive values in the box.",
    ]
    for (name, layer), own in itertools.groupby(rows, lambda row: (row["network"], row["layer"])):
        some = list(own)
        share = "share_in_box" in some[0]
        lines += [
            "",
            f"**{name}, `{layer}`** ({some[0]['map_size']}, {some[0]['images']} images)",
            "",
            "| attack | answers changed | map | correlation | undefined | CEM minus this |" + " share in box |" * share,
            "|---|---|---|---|---|---|" + "---|" * share,
        ]
        for row in some:
            if row["attack"] == "clean" and not share:
                continue
            changed = "" if row["attack"] == "clean" else f"{success[name][row['attack']]:.0%}"
            line = f"| {row['attack']} | {changed} | {row['map']} | {_cell(row.get('correlation'))}"
            line += f" | {row.get('undefined', '')} | {_cell(row.get('cem_minus_this'))} |"
            lines.append(line + (f" {_cell(row['share_in_box'])} |" if share else ""))
        if share:
            lines += ["", f"Area of the boxes: {_cell(some[0]['area_of_box'])}."]
    return "\n".join(lines)


def _cell(value: dict[str, Any] | None) -> str:
    return "" if value is None else str(Mean(**value))


if __name__ == "__main__":
    main()
