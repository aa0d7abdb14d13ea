"""The paper's three conditions on chest X-rays, with intervals: X -> Y, X <- Y and Z <- X -> Y.

Not for clinical use. I: what masking an image at random and setting nodes to zero does to the answer. II: what masking
the box of a known finding does, beside boxes of the same size anywhere in the same image, for the findings that the
network reads. III: two findings have common causes in the network; do they depend on each other less once the nodes
that serve both are zero? Networks and images: `benchmarks.paper.xray_networks`, whose weights are taken from the cache.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.common.results import write
from benchmarks.paper._page import Interval, ends, flat, save_page
from benchmarks.paper._xrays import (
    LEVEL,
    Images,
    Mean,
    by_patient,
    informative,
    logits,
    mean_of,
    network,
    nih_parts,
    pneumonia_parts,
    prepared,
    reading,
)
from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.datasets import FINDINGS, XRays
from ce_plugin.designs import Joint
from ce_plugin.expected.answer import answered
from ce_plugin.expected.moments import moments_of
from ce_plugin.interventions import Normalization, PixelMask
from ce_plugin.randomness import generator, numpy_generator
from ce_plugin.visualization import plot_intervals

FILLS = ("zero", "mean", "blur")
LAYERS = {"pneumonia CNN": "relu3", "one sigmoid": "features.norm5", "fourteen sigmoids": "features.norm5"}
DRAWS = 100
"""Random boxes of an image."""
SHARED = 0.1
"""Share of the nodes that count as shared by two findings."""
CONTROLS = 20
"""Random sets of as many other nodes."""
_BATCH = 50
_BOOTSTRAP = 2000


# Condition I: X -> Y


def masked_at_random(model: nn.Module, x: Tensor, normalization: Normalization, share: float = 0.1) -> Tensor:
    """Effect on the logits (N, K) of setting this share of the pixels to black, at random in each image."""
    masked = PixelMask("zero", normalization=normalization).perturb(x, p=share, ids=range(len(x)))
    return logits(model, torch.as_tensor(masked)) - logits(model, x)


def nodes_at_zero(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Effects on the logits of setting each node to zero.

    Returns:
        Expected effects (U, K) over all images; which differ from zero at a false discovery rate of 5 %, (U, K), bool;
        and for each output the effects (N - N // 2,) on the second half of the images of the node whose expected effect
        is the largest on the first half, (K, N - N // 2).
    """
    effects = _effects(LayerCausalEffect(model, layer, outcome="logit"), x)[0].double()
    answer = answered(moments_of(effects[:, None], extras=0), ["clean"], range(effects.shape[2]))
    half = len(x) // 2
    chosen = effects[:half].mean(0).abs().argmax(0)  # (K,)
    confirmed = torch.stack([effects[half:, u, k] for k, u in enumerate(chosen.tolist())])
    return answer.effect[0], answer.significant(0.05)[0], confirmed


# Condition II: X <- Y


def random_boxes(box: Tensor, n: int, *, seed: int = 0, ident: int = 0) -> Tensor:
    """Boxes of the same height and width, each at a place that is drawn evenly from all at which it lies in the image.

    Args:
        box: (H, W), bool, one rectangle.
        n: how many.
        seed, ident: of the draw.

    Returns:
        (n, H, W), bool.

    Example:
        >>> box = torch.zeros(6, 8).bool()
        >>> box[2:4, 1:6] = True
        >>> random_boxes(box, 50).flatten(1).sum(1).unique().tolist()
        [10]
    """
    rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    draw = generator(seed, ident, "random boxes")
    top = torch.randint(box.shape[0] - height + 1, (n, 1), generator=draw)
    left = torch.randint(box.shape[1] - width + 1, (n, 1), generator=draw)
    down, across = torch.arange(box.shape[0]), torch.arange(box.shape[1])
    inside = (down >= top) & (down < top + height), (across >= left) & (across < left + width)
    return inside[0][:, :, None] & inside[1][:, None, :]


def box_effects(model: nn.Module, x: Tensor, boxes: Tensor, normalization: Normalization | None = None) -> Tensor:
    """Effects on the logits of masking each box by itself, mean over black, the image's mean and blur.

    Args:
        model: to logits (N, K).
        x: one image, (1, C, H, W), in model units.
        boxes: (n, H, W), bool.
        normalization: of the image.

    Returns:
        (n, K): negative where the box supports an output.
    """
    region = PixelMask(FILLS, normalization=normalization, region=boxes[:, None])
    whole = torch.zeros(1, 1, *x.shape[2:], dtype=torch.long)
    explainer = CausalEffect(model, region, Joint([(0,)]), outcome="logit")
    estimate = explainer.estimate(x.expand(len(boxes), -1, -1, -1), feature_mask=whole)
    found: Tensor = estimate.effect[:, 0]
    return found


@dataclass(frozen=True)
class BoxTest:
    """One box of one image.

    Args:
        image, patient: file name and patient.
        finding: of the box, index.
        own: effect of masking the box on all outputs, (K,).
        random: of masking random boxes of its size, (draws, K).
    """

    image: str
    patient: str
    finding: int
    own: Tensor
    random: Tensor

    @property
    def beyond(self) -> Tensor:
        """Effect of the box minus the mean effect of random ones, (K,)."""
        return self.own - self.random.mean(0)

    @property
    def p_value(self) -> float:
        """Share of boxes, itself among them, whose masking takes as much or more from the finding."""
        k = self.finding
        return float(1 + (self.random[:, k] <= self.own[k]).sum()) / (1 + len(self.random))


def box_tests(
    model: nn.Module,
    images: Images,
    normalization: Normalization,
    findings: Sequence[int] = range(len(FINDINGS)),
    draws: int = DRAWS,
) -> list[BoxTest]:
    """The tests of the boxes of these findings in all images."""
    data, found = images.data, []
    if not isinstance(data, XRays):
        return []
    for i, file in enumerate(data.files):
        for number, box in enumerate(data.boxes_of(i)):
            if box.finding not in findings:
                continue
            own = box.mask(*images.x.shape[2:])
            masks = torch.cat([own[None], random_boxes(own, draws, ident=1000 * i + number)])
            effects = box_effects(model, images.x[i : i + 1], masks, normalization)
            found.append(BoxTest(file.name, data.groups[i], box.finding, effects[0], effects[1:]))
    return found


def box_rows(tests: Sequence[BoxTest], evaluated: Sequence[int]) -> list[dict[str, Any]]:
    """For each evaluated finding with a box, and all together: own box beyond random ones, and the same on others.

    The images of one patient count as one: their mean is the value.
    """
    rows: list[dict[str, Any]] = []
    kept = [one for one in tests if one.finding in evaluated]
    for name, some in [(FINDINGS[k], [one for one in kept if one.finding == k]) for k in evaluated] + [("all", kept)]:
        if not some:
            rows.append({"finding": name, "boxes": 0})
            continue
        others = [[k for k in range(len(one.own)) if k != one.finding] for one in some]
        patients = [one.patient for one in some]
        row: dict[str, Any] = {"finding": name, "boxes": len(some)}
        row["masked"] = asdict(by_patient([float(one.own[one.finding]) for one in some], patients))
        row["beyond"] = asdict(by_patient([float(one.beyond[one.finding]) for one in some], patients))
        away = [float(one.beyond[rest].mean()) for one, rest in zip(some, others, strict=True)]
        row["others"] = asdict(by_patient(away, patients))
        row["p_values"] = [one.p_value for one in some]
        rows.append(row)
    return rows


# Condition III: Z <- X -> Y


def shared_nodes(effects: Tensor, n: int) -> list[int]:
    """The n nodes that serve both outputs most: by the smaller of their two effects, each as a share of the largest.

    Args:
        effects: expected effects on two outputs, (U, 2).
        n: how many.

    Example:
        >>> shared_nodes(torch.tensor([[-3.0, 0.0], [-1.0, -1.0], [0.0, 2.0]]), 1)
        [1]
    """
    size = effects.abs()
    common = (size / size.amax(0).clamp(min=torch.finfo(size.dtype).tiny)).amin(1)
    return sorted(common.argsort(descending=True, stable=True)[:n].tolist())


@dataclass(frozen=True)
class Dependence:
    """How two outputs go together over images, as the network is and with nodes set to zero.

    Args:
        nodes: that are shared.
        clean: correlation over images.
        shared: with the shared nodes zero; nan where an output does not vary any more.
        other: with random other nodes zero, mean over the sets.
        fall: clean minus shared, with the ends of its interval.
        beyond: other minus shared, likewise.
        effects: mean effect of zeroing the shared nodes on both outputs.
    """

    nodes: tuple[int, ...]
    clean: float
    shared: float
    other: float
    fall: tuple[float, float, float]
    beyond: tuple[float, float, float]
    effects: tuple[float, float]


def common_cause(
    model: nn.Module, layer: str, x: Tensor, outputs: tuple[int, int], patients: Sequence[str], share: float = SHARED
) -> Dependence:
    """Condition III for two outputs: nodes are chosen on one half of the patients, outputs measured on the other.

    Args:
        model: to logits (N, K).
        layer: whose channels are the nodes.
        x: images, (N, ...).
        outputs: Z and Y.
        patients: of each image.
        share: of the nodes that count as shared.
    """
    names = sorted(set(patients))
    order = numpy_generator(0, "halves").permutation(len(names))
    first = {names[i] for i in order[: len(names) // 2]}
    chooses = torch.tensor([p in first for p in patients])
    pair = list(outputs)
    single = _effects(LayerCausalEffect(model, layer, outcome="logit"), x[chooses])[0][:, :, pair].mean(0)
    n = max(1, round(share * len(single)))
    nodes = shared_nodes(single, n)
    rest = [u for u in range(len(single)) if u not in set(nodes)]
    draw = numpy_generator(0, "other nodes")
    sets = [draw.choice(rest, n, replace=False).tolist() for _ in range(CONTROLS)] if len(rest) >= n else []
    joint = LayerCausalEffect(model, layer, design=Joint([nodes, *sets]), outcome="logit")
    effects, reference = _effects(joint, x[~chooses])
    effects, reference = effects[:, :, pair].double(), reference[:, pair].double()
    series = torch.cat([reference[:, None], reference[:, None] + effects], 1).numpy()  # (n, 2 + sets, 2)
    own = [p for p, c in zip(patients, chooses.tolist(), strict=True) if not c]
    figures = _correlations(series, np.ones(len(own)))
    drawn = np.stack([_correlations(series, w) for w in _patient_weights(own)])
    clean, shared, other = figures
    return Dependence(
        tuple(nodes), clean, shared, other,
        _difference(clean - shared, drawn[:, 0] - drawn[:, 1]), _difference(other - shared, drawn[:, 2] - drawn[:, 1]),
        (float(effects[:, 0, 0].mean()), float(effects[:, 0, 1].mean())),
    )  # fmt: skip


def _effects(explainer: LayerCausalEffect, x: Tensor) -> tuple[Tensor, Tensor]:
    """Effects (N, U, K) and references (N, K), some images at a time."""
    parts = [explainer.estimate(rows) for rows in torch.split(x, _BATCH)]
    return torch.cat([one.effect for one in parts]), torch.cat([one.reference for one in parts])


def _correlations(series: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pearson's correlation of the two outputs, weighted: clean, shared nodes zero, mean over other sets."""
    share = weights / weights.sum()
    apart = series - np.einsum("n,nsk->sk", share, series)
    products = np.einsum("n,nsk,nsl->skl", share, apart, apart)
    spread = np.sqrt(products[:, 0, 0] * products[:, 1, 1])
    # What is left of an output that does not vary is rounding.
    scale = np.sqrt(np.square(series).mean((0, 2))).clip(1e-30) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(spread > 1e-10 * scale, products[:, 0, 1] / spread, np.nan)
    other = float(found[2:].mean()) if len(found) > 2 else np.nan
    return np.array([found[0], found[1], other])


def _patient_weights(patients: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """How often each image is drawn, when patients are."""
    _, owner = np.unique(np.array(patients), return_inverse=True)
    n, draw = int(owner.max()) + 1, numpy_generator(0, "patients")
    return [draw.multinomial(n, np.full(n, 1 / n))[owner].astype(float) for _ in range(_BOOTSTRAP)]


def _difference(value: float, drawn: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    if math.isnan(value):
        return value, math.nan, math.nan
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)


# The script


def first_condition(name: str, n: int) -> list[dict[str, Any]]:
    """Rows of condition I: one for each output of a network."""
    net = network(name)
    _, test = nih_parts() if name == "fourteen sigmoids" else pneumonia_parts()
    images = prepared(net, test).first(n)
    masked = masked_at_random(net.model, images.x, net.normalization)
    effect, significant, confirmed = nodes_at_zero(net.model, LAYERS[name], images.x)
    rows = []
    for k, finding in enumerate(net.class_names or ()):
        top = int(effect[:, k].abs().argmax())
        rows.append(
            {
                "network": name,
                "finding": finding,
                "images": len(images),
                "masked": asdict(mean_of(masked[:, k])),
                "nodes": len(effect),
                "nodes_nonzero": int(significant[:, k].sum()),
                "largest": {"node": top, "effect": float(effect[top, k])},
                "confirmed": asdict(mean_of(confirmed[k])),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400, help="at most, of conditions I and III")
    parser.add_argument("--draws", type=int, default=DRAWS, help="random boxes for each box of condition II")
    parser.add_argument("--out", type=Path, help="a folder for the page, its tables and plots")
    options = parser.parse_args()
    first = list(itertools.chain.from_iterable(first_condition(name, options.images) for name in LAYERS))
    net, (_, test) = network("fourteen sigmoids"), nih_parts()
    images = prepared(net, test)
    read = reading(logits(net.model, images.x), images, FINDINGS)
    known = informative(read)
    tests = box_tests(net.model, images, net.normalization, known, options.draws)
    second = box_rows(tests, known)
    third = None
    if len(known) > 1:
        areas = [one.auroc.value if one.auroc is not None else 0.0 for one in read]
        one, two = sorted(sorted(known, key=lambda k: -areas[k])[:2])
        some = images.first(options.images)
        found = common_cause(net.model, LAYERS["fourteen sigmoids"], some.x, (one, two), some.data.groups)
        third = {"outputs": [FINDINGS[one], FINDINGS[two]], "images": len(some), **asdict(found)}
    boxes = [
        {
            "image": one.image, "patient": one.patient, "box": FINDINGS[one.finding], "output": FINDINGS[k],
            "effect": float(one.own[k]), "random": float(one.random[:, k].mean()), "p_value": one.p_value,
        }
        for one in tests
        for k in range(len(FINDINGS))
    ]  # fmt: skip
    record = {"first": first, "second": second, "third": third, "boxes": boxes, "auroc": [r.to_dict() for r in read]}
    boxed = {box.finding for i in range(len(test)) for box in test.boxes_of(i)}
    left = [FINDINGS[k] for k in sorted(boxed - set(known))]
    page = text(first, second, third, options.draws, left)
    tables: dict[str, Sequence[dict[str, Any]]] = {"condition1": flat(first), "condition2": boxes}
    figures = {"condition1": first_plot(first), "condition2": second_plot(second)}
    save_page(options.out, "conditions", page, tables, figures)
    write("paper_conditions", page, record)


def first_plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Condition I: what a tenth of the pixels, and one node, do to each output."""
    panels: dict[str, dict[str, dict[str, Interval]]] = {"pixels masked": {}, "the largest node": {}}
    for row in rows:
        name = f"{row['network']}: {row['finding']}"
        for panel, key in (("pixels masked", "masked"), ("the largest node", "confirmed")):
            panels[panel][name] = {"effect": ends(row[key])}
    return plot_intervals(panels, xlabel="effect on the logit")


def second_plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Condition II: what masking a finding's box does to its output, and beyond random boxes, and to the others."""
    names = {"masked": "box masked", "beyond": "beyond random boxes", "others": "other outputs, likewise"}
    found = {
        f"{row['finding']} ({row['boxes']} boxes)": {shown: ends(row[key]) for key, shown in names.items()}
        for row in rows
        if row["boxes"] > 2  # two boxes have an interval that hides all others
    }
    return plot_intervals({"findings of three boxes or more": found}, xlabel="effect on the logit")


def text(
    first: Sequence[dict[str, Any]],
    second: Sequence[dict[str, Any]],
    third: dict[str, Any] | None,
    draws: int,
    left: Sequence[str],
) -> str:
    """The tables."""
    lines = [
        "### The paper's conditions on chest X-rays",
        "",
        "Not for clinical use. Effects on logits; intervals 95 % over images (condition II: patients).",
        "",
        "**I, X -> Y.** A tenth of the pixels set to black at random; each node set to zero: how many of them have an"
        " expected effect that differs from zero (false discovery rate 5 %), and the effect, on the second half of the"
        " images, of the node with the largest on the first.",
        "",
        "| network | output | images | pixels masked | nodes that matter | largest node, on other images |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['network']}, {LAYERS[row['network']]} | {row['finding']} | {row['images']} |"
        f" {Mean(**row['masked'])} | {row['nodes_nonzero']} of {row['nodes']} | {Mean(**row['confirmed'])} |"
        for row in first
    ]
    lines += [
        "",
        "**II, X <- Y.** The box of a finding masked (mean over black, the image's mean, blur), beside"
        f" {draws} boxes of the same size at random places of the same image; for"
        " findings whose AUROC's interval lies above .5. Not evaluated, because the network does not read them:"
        f" {', '.join(left) or 'none'}. Negative: the box supports the finding. Needed: patients with whom a mean and"
        " spread like these would be told from zero in four of five samples, at 5 %.",
        "",
        "| finding | boxes | box masked | beyond random boxes | needed | other outputs, likewise | p of each box |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in second:
        if not row["boxes"]:
            lines.append(f"| {row['finding']} | 0 | | | | | |")
            continue
        needed = row["beyond"]["needed"]
        lines.append(
            f"| {row['finding']} | {row['boxes']} | {Mean(**row['masked'])} | {Mean(**row['beyond'])} |"
            f" {'' if needed is None else f'{needed:,}'} | {Mean(**row['others'])} |"
            f" {', '.join(f'{p:.2f}' for p in row['p_values'])} |"
        )
    lines += ["", "**III, Z <- X -> Y.** "]
    if third is None:
        lines[-1] += "Not evaluated: the network reads fewer than two findings."
        return "\n".join(lines)
    one, two = third["outputs"]
    lines[-1] += (
        f"Z is {one}, Y {two}, the two that are read best. The {len(third['nodes'])} nodes ({SHARED:.0%}) that serve"
        " both most, chosen on one half of the patients, are set to zero together on the other half; beside as many"
        f" others, mean of {CONTROLS} random sets. Correlation of the two logits over images: {third['clean']:.3f} as"
        f" the network is, {third['shared']:.3f} with the shared nodes at zero, {third['other']:.3f} with others. It"
        f" falls by {_said(third['fall'])}, by {_said(third['beyond'])} more than with others. Mean effects on the two"
        f" logits: {third['effects'][0]:+.3f} and {third['effects'][1]:+.3f}."
    )
    return "\n".join(lines)


def _said(difference: Sequence[float]) -> str:
    return f"{difference[0]:.3f} ({difference[1]:.3f} to {difference[2]:.3f})"


if __name__ == "__main__":
    main()
