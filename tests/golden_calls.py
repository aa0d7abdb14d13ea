"""Small public calls whose numbers must not change, and the numbers that they gave: the net under every redesign.

Each call goes through the packages that the documentation names and returns its numbers by name. They are stored in
``tests/golden/numbers.json``; ``tests/test_golden.py`` compares with these, ``benchmarks/golden.py`` two revisions with
each other, bit for bit. Weights come from numpy, networks are float64 and smooth where they can be, and trained weights
are stored, so that the numbers are the same on other CPUs.

    python tests/golden_calls.py                 say how long each call takes
    python tests/golden_calls.py --write         store the numbers anew (say in the commit why they have changed)
    python tests/golden_calls.py --write CALL    store those of one call anew
    python tests/golden_calls.py --dump FILE     all numbers in full precision, for benchmarks/golden.py
    python tests/golden_calls.py --material      train and fit anew what calls load (``digits.npz``, ``detector.ce``)
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

# Packages, not names: a name that another revision has not got stops the calls that need it, and no others.
import ce_plugin as ce
from ce_plugin import concepts, designs, detection, effects, evaluation, interventions

Array = npt.NDArray[Any]
Value = Array | str | list[str]
Call = Callable[[], Mapping[str, Any]]

FOLDER = Path(__file__).parent / "golden"
NUMBERS = FOLDER / "numbers.json"
CALLS: dict[str, Call] = {}
DIGITS = 8


# Calls that train networks or attack them in float32: signs of gradients turn rounding into other images, so that their
# numbers differ from processor to processor, and are compared strictly on one machine only, by benchmarks/golden.py.
CHAOTIC = ("command_detect", *(f"detector{part}" for part in ("", "_taught", "_groups", "_from_a_file", "_trained")))


def call(function: Call) -> Call:
    """Register a call under the name of its function."""
    CALLS[function.__name__] = function
    return function


# --- networks, images and what is read from results


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64, the same on every machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def pictures(seed: int, *shape: int) -> Tensor:
    """Images in [0, 1], float64."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def seeded(network: nn.Module, seed: int) -> nn.Module:
    """The network with weights from numpy, in float64 and eval mode."""
    random = np.random.default_rng(seed)
    network.double().eval().requires_grad_(False)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            drawn = torch.from_numpy(random.standard_normal(tuple(value.shape)))
            scale = 1.5 / max(1, value[0].numel()) ** 0.5 if value.dim() > 1 else 0.5
            value.copy_(drawn.abs() + 0.5 if name.endswith(("running_var",)) else scale * drawn)
    return network


def chain(classes: int = 3, channels: int = 2) -> nn.Module:
    """Convolutions in a row, with names "0" to "6"."""
    layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.SiLU()]
    return seeded(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes)), 1)


class Residual(nn.Module):
    """Batch normalisation, a residual sum, squeeze and excitation, a concatenation, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.branch = nn.Conv2d(4, 3, 1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(7, 7, 1), nn.Sigmoid())
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of images (N, 2, H, W)."""
        h = self.stem(x)
        h = h + self.block(h)
        h = torch.cat([h, self.branch(h)], dim=1)
        h = h * self.squeeze(h)
        return self.head(nn.functional.adaptive_avg_pool2d(h, 1).flatten(1))


class Attention(nn.Module):
    """A small transformer with layer normalisation; heads lie side by side before ``project``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.project = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of images (N, 2, H, W)."""
        h = self.patch(x).flatten(2).transpose(1, 2)
        n = self.norm(h)
        q, k, v = (part(n).unflatten(2, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = (q @ k.transpose(2, 3) / 2).softmax(dim=3) @ v
        h = h + self.project(mixed.transpose(1, 2).flatten(2))
        h = h + self.mlp(h)
        return self.head(h.mean(dim=1))


class Branching(nn.Module):
    """A network that torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of images (N, 2, H, W)."""
        h = self.features(x).mean((2, 3))
        return self.head(h if h.sum() > 0 else -h)


class Two(nn.Module):
    """A network of two inputs and a further argument."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Conv2d(1, 5, 2), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """Logits (N, 3) of features (N, 4) and images (N, 1, 3, 3)."""
        return self.head(torch.tanh(self.left(a) + scale * self.right(b).mean((2, 3))))


class Shared(nn.Module):
    """A layer that is called twice and returns a tuple."""

    class Pair(nn.Module):
        """A map and its double."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """Two maps of the input's shape."""
            h = torch.tanh(self.conv(x))
            return h, 2 * h.square()

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = self.Pair(), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of images (N, 2, H, W)."""
        a, b = self.pair(x)
        c, d = self.pair(a + b)
        return self.head((c - d).mean((2, 3)))


def estimated(estimate: Any) -> dict[str, Any]:
    """All numbers of an Estimate."""
    found = {
        "effect": estimate.effect,
        "contribution": estimate.contribution.sum(1),
        "reference": estimate.reference,
        "n_units": estimate.n_units,
        "about": [estimate.outcome, estimate.design, estimate.intervention, estimate.site, estimate.evidence],
        "n_trials": estimate.n_trials,
    }
    if estimate.predicted is not None:
        found["predicted"] = estimate.predicted
    if estimate.std_error is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            low, high = estimate.confidence_interval(0.9)
            found |= {"std_error": estimate.std_error, "p_values": estimate.p_values(), "low": low, "high": high}
            found |= {"half_width": estimate.half_width(), "significant": estimate.significant(0.05)}
    if estimate.insertion_effect is not None:
        found["insertion_effect"] = estimate.insertion_effect
    return found


def brief(estimate: Any) -> dict[str, Any]:
    """Effects and errors alone, where many estimates make one call."""
    found = {"effect": estimate.effect}
    return found if estimate.std_error is None else {**found, "std_error": estimate.std_error}


def framed(frame: Any) -> dict[str, Any]:
    """The columns of a data frame."""
    return {f"{name}": frame[name].to_numpy() for name in frame.columns}


def named(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Several results as one, the names joined by a slash."""
    return {f"{name}/{key}": value for name, part in parts.items() for key, value in part.items()}


def flattened(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of what a JSON file holds, with their paths."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from flattened(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, (list, tuple)):
        for i, value in enumerate(content):
            yield from flattened(value, f"{path}.{i}")
    else:
        yield path, content


def leaves(content: Any) -> dict[str, Any]:
    """What a JSON file holds: numbers in one array, everything else in one list."""
    every = list(flattened(content))
    numbers = [(path, value) for path, value in every if isinstance(value, (int, float)) and value is not True]
    words = [f"{path}: {value}" for path, value in every if (path, value) not in numbers]
    return {"paths": [path for path, _ in numbers], "numbers": [float(v) for _, v in numbers], "words": words}


def table(file: Path) -> dict[str, Any]:
    """The columns of a CSV file: numbers where all of a column are."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns: dict[str, Any] = {}
    for name in rows[0]:
        texts = [row[name] for row in rows]
        try:
            columns[name] = np.array([float(text) for text in texts])
        except ValueError:
            columns[name] = texts
    return columns


def mean_mask() -> Any:
    """The intervention that most calls use."""
    return interventions.PixelMask("mean")


# --- interventions


@call
def pixel_masks() -> Mapping[str, Any]:
    """Every fill, in image units, in a region and as a random mask."""
    x = pictures(0, 2, 3, 5, 4)
    mask = interventions.PixelMask
    scaled = {"normalization": ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))}
    fills = ("zero", "mean", "blur", "noise", 0.25, pictures(1, 3, 5, 4), lambda images: images.flip(-1))
    found: dict[str, Any] = {f"fill {i}": mask(fill).perturb(x, seed=3, ids=[4, 9]) for i, fill in enumerate(fills)}
    found["scaled"] = mask("noise", **scaled).perturb(x, seed=1)
    found["sigma"] = mask("blur", sigma=0.7, **scaled)(x)
    found["region"] = mask("zero", region=(1, 0, 4, 3))(x)
    found["share"] = mask("mean").perturb(x, p=0.4, seed=2, ids=[1, 2])
    found["variant"] = mask(("zero", "mean")).perturb(x, variant=1)
    return found


@call
def fills_in_trials() -> Mapping[str, Any]:
    """Several fills in turn, and an in-painter that sees the hole of each trial."""

    def paint(images: Tensor, masks: Tensor) -> Tensor:
        kept = (images * ~masks).sum((2, 3), keepdim=True) / (~masks).sum((2, 3), keepdim=True).clamp(min=1)
        return kept.expand_as(images)

    x, net, mask = pictures(2, 2, 2, 4, 4), chain(), interventions.PixelMask
    random, single = designs.RandomMask(0.3, n_trials=40, seed=1), designs.OneAtATime()
    return named(
        {
            f"{name} {type(design).__name__}": brief(ce.CausalEffect(net, mask(fill), design, seed=5).estimate(x))
            for name, fill in (("three", ("zero", "mean", "noise")), ("paint", paint))
            for design in (random, single)
        }
    )


@call
def smoothing() -> Mapping[str, Any]:
    """Every kind of filter, JPEG of grey and coloured pictures, and a chain."""
    s, x = interventions.Smooth, pictures(3, 2, 3, 9, 10)
    every = [s.bits(3), s.median(2), s.median(3), s.mean(3), s.gauss(0.8), s.jpeg(40), s.soft_threshold(0.1)]
    every += [s.clip(0.2, 0.7), s.stretch(0.25, 0.75), s.scale(0.6), s.shift(1, -2), s.tv(0.1, 12), s.noise(0.05)]
    every += [s.chain(s.median(3), s.bits(4)), s.gauss(1.1, value_range=(0, 2), normalization=(0.5, 0.25))]
    found: dict[str, Any] = {repr(one): one.perturb(x, seed=2, ids=[3, 5])[:, :, ::3, ::3] for one in every}
    found["grey"] = s.jpeg(60)(x[:, :1])
    x = x.clone().requires_grad_(True)
    (found["slope"],) = torch.autograd.grad(s.chain(s.jpeg(50), s.gauss(1.0))(x)[0, 1].square().sum(), x)
    return {**found, "slope": found["slope"][0, :, ::2, ::2]}


@call
def inputs_under_filters() -> Mapping[str, Any]:
    """Effects of smoothing and of a denoiser, patch by patch."""
    x, net = pictures(4, 1, 2, 6, 6), chain()
    denoiser = seeded(nn.Conv2d(2, 2, 3, padding=1), 8)
    kinds = [interventions.Smooth.gauss(1.0), interventions.Denoise(denoiser, normalization=(0.5, 0.5))]
    return named({repr(one): brief(ce.CausalEffect(net, one, designs.OneAtATime()).estimate(x)) for one in kinds})


@call
def attacks() -> Mapping[str, Any]:
    """FGSM, BIM, PGD and JSMA, aimed, masked, in units of the model, and of several sizes."""
    x, net, adversarial = pictures(5, 2, 2, 5, 5), chain(), interventions.Adversarial
    made = {
        "fgsm": adversarial.fgsm(net, eps=0.2),
        "bim": adversarial.bim(net, eps=0.15, max_iter=3),
        "pgd": adversarial.pgd(net, eps=0.15, max_iter=3),
        "jsma": adversarial.jsma(net, eps=0.3, max_iter=4),
        "aimed": adversarial.bim(net, eps=0.1, max_iter=2, targeted_class=1),
        "scaled": adversarial.fgsm(net, eps=0.1, normalization=(0.4, 0.3)),
        "several labels": adversarial.fgsm(net, eps=0.1, multi_label=True),
        "masked": adversarial.fgsm(net, eps=0.1, mask=torch.arange(5).remainder(2).bool()),
        "by name": adversarial("ProjectedGradientDescent", model=net, clip_values=(0, 1), eps=0.1, max_iter=2),
    }
    found: dict[str, Any] = {}
    for name, attack in made.items():
        run = attack.run(x, ids=[2, 7], seed=4)
        found |= {f"{name}/x": run.clipped, f"{name}/raw": run.raw.sum((2, 3)), f"{name}/success": run.success}
        found |= {f"{name}/sizes": torch.stack([run.l_inf, run.l2]), f"{name}/answers": run.prediction}
        found[f"{name}/about"] = [repr(attack), repr(run)]
    sweep = made["fgsm"].sweep(x, eps=[0.05, 0.1], target=torch.tensor([0, 2]))
    return {**found, **{f"sweep {size:g}": run.clipped for size, run in sweep.items()}}


# --- designs and effects at the input


@call
def assignments() -> Mapping[str, Any]:
    """Which units each design sets in each trial."""
    mask = designs.RandomMask
    every = [designs.OneAtATime(), designs.LeaveOneIn(), designs.EveryUnit(), designs.Joint([(0, 3), (1, 2, 5)])]
    every += [designs.Joint.pairs([0, 2, 4]), mask(0.3, 12, seed=2), mask(0.3, 12, balanced=True)]
    every += [mask(0.25, 12, antithetic=True), mask(0.7, 10, balanced=True, antithetic=True)]
    every += [mask(0.3, 6, estimator="difference_in_means").reseeded(9)]
    every += [designs.RandomRegions(0.5, 9), designs.RandomRegions(0.3, 9, length=2.0, seed=4)]
    every += [designs.RandomWindows(0.5, 9), designs.RandomWindows(0.4, 9, sizes=(0.3, 0.6), seed=1)]
    found: dict[str, Any] = {}
    for i, design in enumerate(every):
        rows = design.assignments(36, example=3, grid=(6, 6)).int().tolist()
        found[f"{i} {design!r}"] = ["".join(map(str, row)) for row in rows]
        found[f"{i} numbers"] = [design.n_trials_for(36), design.flip_probability() or 0.0]
    return found


@call
def exact_designs() -> Mapping[str, Any]:
    """One at a time, leave one in, groups and pairs, with their interactions."""
    x, net = pictures(6, 2, 2, 3, 3), chain()
    joint = designs.Joint([(0,), (1,), (0, 1), (2, 5, 8)])
    every = {"one": designs.OneAtATime(), "in": designs.LeaveOneIn(), "all": designs.EveryUnit(), "joint": joint}
    made = {k: ce.CausalEffect(net, mean_mask(), design).estimate(x, ids=[5, 6]) for k, design in every.items()}
    pairs = ce.CausalEffect(net, mean_mask(), designs.Joint.pairs([0, 3, 4]), outcome="logit").estimate(x)
    return {**named({k: estimated(e) for k, e in made.items()}), "pairs": pairs.effect, "between": pairs.interaction}


@call
def random_masks() -> Mapping[str, Any]:
    """Both estimators; balanced, antithetic, and both."""
    x, net = pictures(7, 1, 2, 3, 3), chain()
    options: list[dict[str, Any]] = [{}, {"estimator": "difference_in_means"}, {"balanced": True}]
    options += [{"antithetic": True}, {"balanced": True, "antithetic": True, "estimator": "difference_in_means"}]
    found = {}
    for option in options:
        design = designs.RandomMask(0.3, n_trials=60, seed=3, **option)
        found[repr(design)] = estimated(ce.CausalEffect(net, mean_mask(), design, outcome="log_odds").estimate(x))
    return named(found)


@call
def regions_and_windows() -> Mapping[str, Any]:
    """The designs over a grid, and the default design."""
    x, net = pictures(8, 1, 2, 6, 6), chain()
    found = {}
    for name, design in {
        "regions": designs.RandomRegions(0.5, 60, seed=1),
        "windows": designs.RandomWindows(0.4, 60, sizes=(0.3, 0.5)),
        "default": None,
    }.items():
        found[name] = estimated(ce.CausalEffect(net, None, design, outcome="logit").estimate(x, target=1))
    return named(found)


@call
def outcomes() -> Mapping[str, Any]:
    """Every outcome, of effects of a single unit and on outputs themselves."""

    def entropy(output: Tensor, reference: Tensor) -> Tensor:
        log_p = output.log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1, keepdim=True)

    x, net = pictures(9, 2, 2, 3, 3), chain()
    every: list[Any] = ["probability", "sigmoid", "logit", "raw", "log_odds", "margin", "prediction_weighted", None]
    every += [entropy, lambda output, reference: output - reference, effects.Outcome("own", entropy, per_class=False)]
    found: dict[str, Any] = {"names": list(effects.OUTCOMES)}
    for i, outcome in enumerate(every):
        estimate = ce.CausalEffect(net, mean_mask(), designs.OneAtATime(), outcome=outcome).estimate(x)
        found |= {f"{i}/effect": estimate.effect, f"{i}/reference": estimate.reference}
        found[f"{i}/itself"] = effects.resolve_outcome(outcome)(normal(1, 2, 3), normal(2, 2, 3))
    return found


@call
def maps_at_the_input() -> Mapping[str, Any]:
    """`attribute`: targets of all kinds, baselines, feature masks, what is significant, ids."""
    x, net = pictures(10, 2, 2, 4, 4), chain()
    exact = ce.CausalEffect(net, mean_mask(), designs.OneAtATime(), outcome="logit")
    random = ce.CausalEffect(net, mean_mask(), designs.RandomMask(0.3, 80), outcome="logit")
    halves = torch.tensor([0, 0, 1, 2]).expand(1, 1, 4, 4)
    per_example = torch.arange(64).reshape(2, 2, 4, 4).div(torch.tensor(9), rounding_mode="floor")
    return {
        "predicted": exact.attribute(x),
        "target": exact.attribute(x, target=2, baselines=0.5),
        "targets": exact.attribute(x, target=torch.tensor([1, 0]), baselines=pictures(11, 2, 2, 4, 4)),
        "halves": exact.attribute(x, target=0, feature_mask=halves),
        "of each": exact.attribute(x, target=[0, 1], feature_mask=per_example),
        "random": random.attribute(x, target=0, ids=[7, 3]),
        "significant": random.attribute(x, target=0, significant_only=0.2),
        "regions": ce.CausalEffect(net, outcome="log_odds", seed=2).attribute(pictures(12, 1, 2, 6, 6)),
    }


@call
def several_inputs() -> Mapping[str, Any]:
    """Tuples of inputs with further arguments, masks and baselines; networks that return something else."""
    net, inputs = seeded(Two(), 3), (pictures(13, 2, 4), pictures(14, 2, 1, 3, 3))
    explainer = ce.CausalEffect(net, interventions.PixelMask("zero"), designs.OneAtATime())
    masks = (torch.tensor([[0, 0, 1, 2]]), torch.tensor([3, 3, 4]).expand(1, 1, 3, 3))
    a, b = explainer.attribute(inputs, target=1, additional_forward_args=0.7)
    c, d = explainer.attribute(inputs, baselines=(0.1, 0.9), target=1, feature_mask=masks)

    def heads(x: Tensor) -> dict[str, Tensor]:
        found = net(x, inputs[1][:1].expand(len(x), -1, -1, -1))
        return {"first": found, "second": found[:, :2]}

    zero = interventions.PixelMask("zero")
    many = ce.CausalEffect(heads, zero, designs.OneAtATime(), output="second")
    found = explainer.estimate(inputs, feature_mask=masks)
    one = many.estimate(inputs[0])
    return {"a": a, "b": b, "c": c, "d": d, "chosen": one.effect, **estimated(found)}


@call
def sliding_windows() -> Mapping[str, Any]:
    """Windows that overlap, by all engines, in a deep and in a residual network."""
    x = pictures(15, 1, 2, 9, 9)
    found: dict[str, Any] = {}
    for name, net in (("chain", chain()), ("residual", seeded(Residual(), 4))):
        for engine in ("auto", "suffix", "full"):
            explainer = ce.CausalEffect(net, None, designs.OneAtATime(), outcome="logit", engine=engine)
            windows: dict[str, Any] = {"sliding_window_shapes": (2, 3, 4), "strides": (2, 2, 3)}
            found[f"{name} {engine}"] = explainer.attribute(x, baselines=0, target=1, **windows)
    found["effect"] = explainer.estimate(x, baselines=0, **windows).effect
    return found


@call
def window_route() -> Mapping[str, Any]:
    """Windows that are small in a network that is large enough for them to be followed."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    net, x = seeded(nn.Sequential(*layers), 5), pictures(16, 1, 3, 64, 64)
    found: dict[str, Any] = {}
    for engine in ("auto", "full"):
        explainer = ce.CausalEffect(net, None, designs.OneAtATime(), outcome="logit", engine=engine)
        windows: dict[str, Any] = {"sliding_window_shapes": (3, 8, 8), "strides": (3, 8, 8)}
        estimate = explainer.estimate(x, baselines=0, **windows)
        cost = explainer.estimate_cost(x, **windows)
        found |= {f"{engine}/effect": estimate.effect, f"{engine}/route": [cost.route, estimate.settings["route"]]}
        found[f"{engine}/trials"] = cost.trials
    return found


@call
def trials_and_pairs() -> Mapping[str, Any]:
    """`until=`, kept trials, and interactions from random trials."""
    x, net = pictures(17, 2, 2, 3, 3), chain()
    design = designs.RandomMask(0.4, 400, seed=2)
    explainer = ce.CausalEffect(net, mean_mask(), design, outcome="logit")
    stopped = explainer.estimate(x, until=0.2)
    kept = ce.CausalEffect(net, mean_mask(), designs.RandomMask(0.4, 80, antithetic=True)).estimate(x, keep_trials=True)
    found = {**named({"stopped": estimated(stopped), "pairs": estimated(kept.pairs([(0, 1), (2, 8)]))})}
    found["peeked"] = [str(stopped.peeked), str(kept.p)]
    return {**found, "trials": kept.assignments.sum(1), "outcomes": kept.outcomes[:, :10], "dof": kept.dof}


@call
def evidence() -> Mapping[str, Any]:
    """Both readings of the paper's tables, random evidence, parts of the input, several at once."""
    x, net, mask = pictures(18, 2, 2, 4, 4), chain(), interventions.PixelMask("zero")
    attack = interventions.Adversarial.fgsm(net, eps=0.2)
    nodes = ce.LayerCausalEffect(net, "1", outcome="logit")
    silent = ce.Evidence(interventions.ZeroOut(), site=ce.LayerSite("1"), units=[2])
    random = ce.Evidence(mask, units=designs.RandomMask(0.2, n_trials=3, seed=1))
    patches = ce.CausalEffect(net, mask, designs.OneAtATime(), outcome="logit")
    made = {
        "first: none": nodes.estimate(x),
        "first: random": nodes.estimate(x, given=random),
        "first: attack": nodes.estimate(x, given=attack),
        "second": ce.CausalEffect(net, attack, designs.EveryUnit()).estimate(x, given=silent),
        "units": patches.estimate(x, given=ce.Evidence(mean_mask(), units=[0, 5])),
        "two": patches.estimate(x, given=[ce.Evidence(mean_mask(), units=[1]), silent]),
        "random at random": ce.CausalEffect(net, mask, designs.RandomMask(0.3, 60)).estimate(x, given=random),
    }
    found = {name: {**brief(one), "reference": one.reference, "about": [one.evidence]} for name, one in made.items()}
    return {**named(found), "map": patches.attribute(x, target=0, given=attack)}


@call
def tables_and_files() -> Mapping[str, Any]:
    """The data frame of an exact and of a random estimate, what is read back from a file, a part of the examples."""
    x, net = pictures(19, 2, 2, 3, 3), chain()
    exact = ce.CausalEffect(net, mean_mask(), designs.OneAtATime()).estimate(x, target=1)
    random = ce.CausalEffect(net, mean_mask(), designs.RandomMask(0.3, 60)).estimate(x)
    with tempfile.TemporaryDirectory() as folder:
        read = ce.Estimate.load(random.save(Path(folder) / "estimate.pt"))
    frames = {"exact": framed(exact.to_dataframe()), "random": framed(random.to_dataframe(level=0.9, fdr=0.1))}
    about = [str(read.equals(random)), repr(exact), *read.labels_of(0)]
    return {**named(frames), **estimated(read[[1]]), "same": about}


# --- effects inside the network


@call
def channels() -> Mapping[str, Any]:
    """Channels of every layer of a chain, by all engines: by superposition, in closed form, densely."""
    x, net = pictures(20, 2, 2, 6, 6), chain()
    found: dict[str, Any] = {}
    for layer in ("0", "1", "2", "3", "4"):
        for engine in ("auto", "suffix", "full"):
            explainer = ce.LayerCausalEffect(net, layer, outcome="logit", engine=engine)
            found[f"{layer} {engine}"] = explainer.estimate(x).effect
        cost = ce.LayerCausalEffect(net, layer).estimate_cost(x)
        found |= {f"{layer} route": [cost.route], f"{layer} cost": [cost.trials, cost.forward_passes]}
    explainer = ce.LayerCausalEffect(net, net[2], outcome="probability")
    found["map"] = explainer.attribute(x[:1], target=0)
    found["at input"] = explainer.attribute(x[:1], attribute_to_layer_input=True)[..., 0, 0]
    found["baselines"] = explainer.attribute(x[:1], layer_baselines=0.3)[..., 0, 0]
    return {**found, **estimated(explainer.estimate(x))}


@call
def residual_channels() -> Mapping[str, Any]:
    """Batch normalisation, residual sums, concatenation, squeeze and excitation."""
    x, net = pictures(21, 2, 2, 8, 8), seeded(Residual(), 4)
    found: dict[str, Any] = {}
    for layer in ("stem.0", "stem.1", "stem", "block.0", "block", "branch", "squeeze.1"):
        for engine in ("auto", "full"):
            estimate = ce.LayerCausalEffect(net, layer, outcome="logit", engine=engine).estimate(x)
            found |= {f"{layer} {engine}": estimate.effect, f"{layer} {engine} route": estimate.settings["route"]}
    return found


@call
def attention_units() -> Mapping[str, Any]:
    """Features, tokens and heads of a transformer, and maps of it."""
    x, net = pictures(22, 2, 2, 6, 6), seeded(Attention(), 6)
    sites = {
        "features": ce.LayerSite("mlp", channel_dim=-1),
        "tokens": ce.LayerSite("norm", units="tokens"),
        "heads": ce.LayerSite("project", units="heads", n_heads=2, at_input=True),
        "patches": ce.LayerSite("patch"),
    }
    found: dict[str, Any] = {}
    for name, site in sites.items():
        for engine in ("auto", "full"):
            estimate = ce.LayerCausalEffect(net, site, outcome="logit", engine=engine).estimate(x)
            found |= {f"{name} {engine}": estimate.effect, f"{name} {engine} route": estimate.settings["route"]}

    def as_map(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(len(tokens), -1, 3, 3)

    found["map"] = ce.CausalEffectMap(net, ce.LayerSite("norm", reshape_transform=as_map)).maps(x)
    return found


@call
def sites() -> Mapping[str, Any]:
    """Positions, masks, elements of tuples, one call of several, the input of a layer."""
    x, net, shared = pictures(23, 1, 2, 4, 4), chain(), seeded(Shared(), 7)
    mask = torch.tensor([0, 1, 0, 2]).reshape(1, 4, 1, 1)
    every = {
        "positions": (net, ce.LayerSite("1", units="positions")),
        "mask": (net, ce.LayerSite("1", layer_mask=mask)),
        "input": (net, ce.LayerSite("2", at_input=True)),
        "element 0, call 1": (shared, ce.LayerSite("pair", element=0, call=1)),
        "element 1, call 0": (shared, ce.LayerSite("pair", element=1, call=0)),
    }
    made = {k: ce.LayerCausalEffect(n, s, outcome="logit").estimate(x) for k, (n, s) in every.items()}
    found = named({k: {**brief(e), "about": [e.site, *e.labels_of(0)]} for k, e in made.items()})
    return {**found, "call": ce.LayerCausalEffect(net, "1").attribute(x, target=0, layer_mask=mask)}


@call
def node_values() -> Mapping[str, Any]:
    """Zero, the mean of others, donors, a counterpart, a counterpart that is made; at several layers."""
    x, net, others = pictures(24, 2, 2, 5, 5), chain(), pictures(25, 6, 2, 5, 5)
    i = interventions
    every = [i.ZeroOut(), i.MeanOut(others), i.MeanOut(others, positions=True), i.Resample(others, n_donors=3)]
    every += [i.Patch(x.flip(3)), i.Patch(i.Smooth.gauss(1.0)), i.Patch(i.Adversarial.fgsm(net, eps=0.1))]
    found: dict[str, Any] = {}
    for k, one in enumerate(every):
        for layer in ("1", "3"):
            explainer = ce.LayerCausalEffect(net, layer, one, outcome="logit", seed=3)
            found[f"{k} {one!r} {layer}"] = explainer.estimate(x, ids=[4, 8]).effect
    return found


@call
def random_nodes() -> Mapping[str, Any]:
    """Random, joint and leave-one-in designs on channels, with evidence, up to a number of trials."""
    x, net = pictures(26, 2, 2, 5, 5), chain()
    every = {
        "random": designs.RandomMask(0.4, 60, seed=1),
        "joint": designs.Joint([(0, 1), (2, 3)]),
        "in": designs.LeaveOneIn(),
    }
    made = {k: ce.LayerCausalEffect(net, "1", design=d, outcome="margin").estimate(x) for k, d in every.items()}
    given = ce.LayerCausalEffect(net, "3", design=every["random"]).estimate(x, given=interventions.PixelMask("mean"))
    stopped = ce.LayerCausalEffect(net, "1", design=designs.RandomMask(0.5, 400)).estimate(x, until=0.1)
    return named({k: estimated(e) for k, e in {**made, "given": given, "stopped": stopped}.items()})


@call
def networks_run_in_full() -> Mapping[str, Any]:
    """A network that cannot be cut, and a function that is no module."""
    x, net = pictures(27, 2, 2, 5, 5), seeded(Branching(), 9)
    nodes = ce.LayerCausalEffect(net, "features", outcome="logit")
    whole = ce.CausalEffect(lambda images: net(images) ** 2, mean_mask(), designs.OneAtATime(), outcome=None).estimate(
        x
    )
    route = [nodes.estimate_cost(x).route, whole.settings["route"]]
    return {"nodes": nodes.estimate(x).effect, "whole": whole.effect, "route": route}


@call
def pairs_of_nodes() -> Mapping[str, Any]:
    """Interactions of channels: all pairs, and those that a screen finds."""
    x, net = pictures(28, 1, 2, 5, 5), chain()
    every = ce.LayerCausalEffect(net, "1", outcome="logit").interactions(x)[0]
    planted = evaluation.PlantedInteraction(n_units=70, pair=(3, 41), hidden=4).double().requires_grad_(False)
    y = pictures(29, 1, 1, 4, 4)
    screened = ce.LayerCausalEffect(planted, "layer", outcome="logit").interactions(y, top=6)[0]

    def outcome(a: Tensor) -> Tensor:
        return torch.tanh(a @ normal(3, 5, 2)) + a[:, :1] * a[:, 1:2]

    scores = effects.screen(outcome, 5, dtype=torch.float64)
    direct = effects.pairwise(outcome, 5, exhaustive=2, top=4, dtype=torch.float64)
    found = {"every": every, "screened": screened, "direct": direct}
    counts = [number for one in found.values() for number in (one.n_trials, one.n_gradients)]
    return {**named({k: framed(one.to_dataframe()) for k, one in found.items()}), "scores": scores, "counts": counts}


@call
def effect_maps() -> Mapping[str, Any]:
    """CEM of one class and of all, contrasts, both weightings, what is significant."""
    x, net = pictures(30, 2, 2, 5, 5), chain()
    maps = ce.CausalEffectMap(net, "1")
    active = ce.CausalEffectMap(net, "3", weighting="activation")
    random = ce.CausalEffectMap(net, "1", design=designs.RandomMask(0.5, 80))
    return {
        "every": maps.maps(x),
        "predicted": maps.attribute(x),
        "contrast": maps.attribute(x, target=0, contrast=[1]),
        "others": maps.attribute(x, contrast="others", relu_attributions=True),
        "active": active.attribute(x, target=1),
        "mean": ce.CausalEffectMap(net, "3", interventions.MeanOut(pictures(31, 4, 2, 5, 5))).attribute(x),
        "significant": random.attribute(x, target=0, significant_only=0.1),
        "given": maps.attribute(x, target=0, given=interventions.PixelMask("mean")),
        "larger": ce.CausalEffectMap.interpolate(maps.attribute(x[:1]), (7, 7)),
    }


@call
def mediation() -> Mapping[str, Any]:
    """What passes through channels and sets of them, of a mask and of an attack; tables and shares."""
    x, net = pictures(32, 6, 2, 5, 5), seeded(Residual(), 4)
    attack = interventions.Adversarial.fgsm(net, eps=0.1)
    made = {
        "mask": ce.CausalMediation(net, "block", interventions.PixelMask("zero")).estimate(x),
        "attack": ce.CausalMediation(net, "stem", attack, seed=2).estimate(x[:3], target=1, ids=[5, 1, 2]),
        "sets": ce.CausalMediation(net, "block", x.flip(3)).estimate(x, 0, sets=[(0, 1), (2,), range(4)]),
    }
    found: dict[str, Any] = {}
    for name, one in made.items():
        found |= {f"{name}/{part}": getattr(one, part) for part in ("total", "indirect", "direct", "interaction")}
        found[f"{name}/about"] = [str(one.cut), str(one.whole), one.site, one.intervention]
    shares = made["mask"].share(1, n_boot=200, seed=1)
    return {**found, **named({"table": framed(made["sets"].to_dataframe()), "share": framed(shares.to_dataframe())})}


@call
def carriers() -> Mapping[str, Any]:
    """How many channels carry an effect, chosen on some images and tested on others."""
    net = evaluation.PlantedMediation(channels=6, seed=2).double().requires_grad_(False)
    x = 0.5 + pictures(33, 24, 2, 4, 4)
    mediation = ce.CausalMediation(net, "mediator", interventions.PixelMask("zero"), seed=1)
    found = mediation.carriers(x[:12], x[12:], n_boot=200, targets=(0, 0))
    truth = evaluation.mediation_truth(net, x[:3], torch.zeros_like(x[:3]))
    rest = mediation.estimate(x[:12], 0)
    about = [str(found.order), str(found.needed), str(found.interval), repr(found)]
    order = effects.ranking(rest)
    return {
        **framed(found.to_dataframe()),
        "about": about,
        "total": [found.total, found.total_low, found.total_high],
        "planted": torch.cat([truth.total[:, None], truth.indirect, truth.direct, truth.interaction], 1),
        "order": list(order),
        "sets": [str(effects.nested_sets(order)), str(effects.next_sizes([1, 2, 4], found.share[:3]))],
    }


# --- estimators and inference by themselves


@call
def estimators() -> Mapping[str, Any]:
    """Estimators, intervals, p-values and ratios, on numbers given to them."""
    random = np.random.default_rng(4)
    a = torch.from_numpy(random.random((60, 5)) < 0.4)
    y = a.double() @ normal(5, 5, 2) + 0.3 * normal(6, 60, 2)
    pairs = torch.arange(60) // 2
    made = {
        "means": effects.difference_in_means(a, y),
        "paired means": effects.difference_in_means(a, y, pairs),
        "adjusted": effects.adjusted(a, y, 0.4),
        "paired": effects.adjusted(a, y, 0.4, pairs, ridge=0.1),
        "pairs": effects.interactions(a, y, [(0, 1), (2, 4)], 0.4),
        "exact": effects.exact_difference(y, y[0]),
    }
    found: dict[str, Any] = {}
    for name, (effect, error, dof) in made.items():
        found[f"{name}/effect"] = effect
        if error is not None:
            p = effects.p_values(effect, error, dof)
            found |= {f"{name}/error": error, f"{name}/dof": dof, f"{name}/p": p}
            found |= {f"{name}/interval": torch.stack(effects.t_interval(effect, error, dof, 0.9))}
            found[f"{name}/fdr"] = effects.benjamini_hochberg(p, axis=0)
    part, total = 1 + normal(7, 20, 3).square(), 2 + normal(8, 20).square()
    found["ratio"] = torch.stack(effects.ratio_of_means(part, total, n_boot=300, seed=2))
    carried = effects.carried((2, 0, 1), part.cumsum(1) / 6, total, n_boot=200)
    four = effects.mediation_effects(normal(1, 2, 3), normal(2, 2, 3), normal(3, 2, 4, 3), normal(4, 2, 4, 3))
    return {**found, "carried": carried.share, "indirect": four.indirect, "interaction": four.interaction}


# --- concepts


@cache
def autoencoder() -> Any:
    """An autoencoder of layer "1" of the chain with weights from numpy, said to have been trained."""
    coder = concepts.ConceptAutoencoder(channels=4, concepts=3, hidden=4, kernel_size=1)
    seeded(coder, 12)
    coder.layer_name, coder.fingerprint = "1", concepts.fingerprint(chain())
    coder.fidelity = concepts.Fidelity(agreement=1.0, kl=0.0, outcome_change=0.0, n_images=9)
    coder.standardize(torch.full((4,), 0.3, dtype=torch.float64), torch.linspace(0.5, 1.0, 4, dtype=torch.float64))
    return coder


@call
def concept_effects() -> Mapping[str, Any]:
    """Effects and maps of an autoencoder's concepts, and fidelity; loss terms; a file read back."""
    x, net, coder = pictures(34, 4, 2, 5, 5), chain(), autoencoder()
    explainer = ce.ConceptCausalEffect(net, "1", coder, min_fidelity=0, outcome="logit")
    with tempfile.TemporaryDirectory() as folder:
        read = concepts.ConceptAutoencoder.load(coder.save(Path(folder) / "coder.pt"))
    values = net[:2](x)
    code = coder.encode(values)
    losses = [concepts.shallow_loss(values, coder(values), 0.5), concepts.sparsity(code), concepts.smoothness(code)]
    losses += [concepts.interpretability_loss(code), concepts.deep_loss(net(x), net(x).flip(1))]
    fidelity = concepts.measure_fidelity(net, "1", coder, x)
    with concepts.inserted(net, "1", coder):
        inserted = net(x)
    site = ce.ConceptSite("1", coder)
    return {
        **estimated(explainer.estimate(x)),
        "losses": torch.stack(losses),
        "fidelity": list(fidelity.to_dict().values()),
        "interval": list(fidelity.interval()),
        "inserted": inserted,
        "read": read(values.to(next(read.parameters()).dtype)),
        "map": ce.CausalEffectMap(net, site).attribute(x[:2], target=0),
        "mean": ce.ConceptCausalEffect(net, "1", coder, interventions.MeanOut(x), min_fidelity=0).estimate(x).effect,
        "examined": framed(concepts.examine(coder, net, "1", x, top=2).to_dataframe().drop(columns="duplicates"))[
            "mean_activation"
        ],
    }


@call
def concept_training() -> Mapping[str, Any]:
    """Two steps of training an autoencoder, and what it then keeps of the answers."""
    net, x = chain().float(), pictures(35, 12, 2, 6, 6).float()
    coder = concepts.train_autoencoder(net, "1", x, concepts=2, hidden=4, epochs=2, batch_size=16, seed=3)
    history = [value for epoch in coder.history for value in epoch.values()]
    found = coder(net[:2](x[:1])).detach()
    return {"history": history, "restored": found, "fidelity": list(coder.fidelity.to_dict().values())}


# --- evaluation


@call
def faithfulness() -> Mapping[str, Any]:
    """Insertion and deletion, the order of pixels, references; areas."""
    x, net = pictures(36, 2, 2, 6, 6), chain()
    maps = pictures(37, 2, 1, 6, 6).round(decimals=1)
    references = evaluation.reference_images(x, sigma=1.0)
    curves = evaluation.insertion_deletion(
        lambda images: net(images).softmax(1), x, maps, torch.tensor([0, 2]), references, steps=6
    )
    return {
        "insertion": curves.insertion,
        "deletion": curves.deletion,
        "score": curves.score,
        "areas": torch.stack([curves.insertion_auc, curves.deletion_auc]),
        "order": evaluation.pixel_order(maps, seed=1),
        "area": evaluation.area_under_curve(pictures(38, 5)),
        "references": list(references),
        **{f"reference {name}": image.sum((2, 3)) for name, image in references.items()},
    }


@call
def pointing_and_stability() -> Mapping[str, Any]:
    """Mosaics and the pointing game; stability of maps and rank correlation."""
    net, images = chain(classes=4), pictures(39, 8, 2, 4, 4)
    classes = [0, 1, 2, 3, 0, 1, 2, 3]
    made = evaluation.mosaics(images, classes, 3, seed=2)
    explain = ce.CausalEffectMap(net, "1")
    shares = evaluation.grid_pointing_game(lambda x, target, others: explain.attribute(x, target), made)
    target = torch.tensor([0, 1])
    first, second = pictures(40, 3, 1, 4, 4), pictures(41, 3, 1, 4, 4)
    return {
        "x": made.x.sum((2, 3)),
        "members": made.members,
        "classes": made.classes,
        "shares": shares,
        "pointing": evaluation.pointing_share(first, [0, 1, 3]),
        "correlation": evaluation.rank_correlation(first, second),
        "stability": evaluation.map_stability(
            lambda x, t: explain.attribute(x, t), images[:2], images[:2].flip(3), target
        ),
        "confident": evaluation.confidently_classified(net(images), classes, 0.2),
    }


@call
def planted_networks() -> Mapping[str, Any]:
    """Networks whose effects are known, and what is found of them."""
    main = normal(9, 5, 2)
    net = evaluation.PlantedNetwork(
        main, [(0, 1), (2, 4)], normal(10, 2, 2), centre=0.7, hidden=(normal(11, 5, 3), normal(12, 3, 2))
    )
    x = torch.ones(1, 5, dtype=torch.float64)
    found = ce.CausalEffect(net, interventions.PixelMask("zero"), designs.RandomMask(0.3, 100), outcome=None)
    return {
        "raw": evaluation.expected_effects(net, 0.3),
        "probability": evaluation.expected_effects(net, 0.3, "probability"),
        "found": found.estimate(x).effect,
        "active": net.active,
    }


@call
def area_under_roc() -> Mapping[str, Any]:
    """AUROC with its interval by the bootstrap."""
    try:
        from ce_plugin.evaluation import auroc, bootstrapped
    except ImportError:  # revisions before the harness left the package
        from ce_plugin.evaluation.detection import auroc, bootstrapped

    random = np.random.default_rng(5)
    clean, attacked = random.standard_normal(40), random.standard_normal(30) + 1
    apart = bootstrapped(clean, attacked, n_resamples=200, seed=3)
    paired = bootstrapped(clean, attacked, ids=(np.arange(40), np.arange(30)), n_resamples=200, seed=3)
    return {
        "auroc": [auroc(clean, attacked), auroc(clean.round(), attacked.round())],
        "apart": [*apart.interval(apart.auroc, 0.95), *apart.tpr.mean(1)],
        "paired": [*paired.interval(paired.auroc, 0.9), *paired.tpr.mean(1)],
    }


# --- detectors, on digits and a network whose weights are stored


def digits_network() -> nn.Module:
    """A small network for digits, with names "0" to "6"."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 10))


def trained() -> nn.Module:
    """The network with its stored weights, in float64."""
    stored = np.load(FOLDER / "digits.npz")
    network = digits_network().double().eval().requires_grad_(False)
    network.load_state_dict({name: torch.from_numpy(stored[name].astype(np.float64)) for name in stored.files})
    return network


@cache
def digits() -> tuple[Array, Array]:
    """scikit-learn's digits, (1797, 1, 8, 8) in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images[:, None] / 16).astype(np.float64), found.target


@cache
def attacked_digits() -> Array:
    """Digits under FGSM, on the grid of 8 bits."""
    x, y = digits()
    attack = interventions.Adversarial.fgsm(trained(), eps=0.15)
    found = attack.perturb(torch.from_numpy(x[400:424]), target=torch.from_numpy(y[400:424]))
    return ((found * 255).round() / 255).double().numpy()


def quick() -> Any:
    """A signature that trains nothing."""
    filters = detection.Smoothing("filters", [interventions.Smooth.gauss(1.0), interventions.Smooth.median(2)])
    return detection.Signature([filters, detection.CounterAttack(steps=(0.05,))])


@cache
def fitted() -> Any:
    """A detector on 240 digits."""
    detector = detection.CausalEffectDetector(trained(), quick(), seed=2)
    detector.fit(digits()[0][:240])
    return detector


def judged(detector: Any, **options: Any) -> dict[str, Any]:
    """What a detector says of clean and of attacked digits."""
    x = np.concatenate([digits()[0][400:424], attacked_digits()])
    report, flags = detector.detect(x, **options)
    found = {name: report[name] for name in ("scores", "p_values", "threshold", "predictions")}
    found |= {"flags": flags, **{f"group {name}": values for name, values in report["groups"].items()}}
    return {**found, "decision": detector.decision_function(x[:3])}


@call
def detector() -> Mapping[str, Any]:
    """Fit, scores, p-values, groups, gradient; calibrated on others; read back from a file."""
    one, x = fitted(), torch.from_numpy(digits()[0][400:403]).requires_grad_(True)
    (slope,) = torch.autograd.grad(one.score_tensor(x).sum(), x)
    with tempfile.TemporaryDirectory() as folder:
        read = detection.CausalEffectDetector.load(one.save(Path(folder) / "one.ce"), trained())
    again = read.score(attacked_digits())
    calibration = read.calibrate(digits()[0][300:400], fpr=0.1)
    found = {"slope": slope[:2], "again": again, "threshold after": read.threshold, "passes": one.passes}
    found["interval"] = [*calibration.realised_interval(0.1), *one.calibration.realised_interval(0.05)]
    return {**judged(one), **found, "about": [repr(one), repr(one.signature)]}


@call
def detector_explained() -> Mapping[str, Any]:
    """Why an image was flagged: deviations, effects, regions, channels."""
    report, flags = fitted().detect(attacked_digits(), explain=True, layer="3")
    alarm = report["explanations"][int(np.flatnonzero(flags)[0])]
    return {
        "verdicts": list(alarm.verdicts.values()),
        "names": [*alarm.verdicts, *(one.what for one in alarm.effects), alarm.intervention, str(alarm.turned_to)],
        "effects": [[one.effect, one.usual, one.deviations] for one in alarm.effects],
        "channels": [[float(k), v] for k, v in alarm.channels.items()],
        "regions": alarm.regions,
    }


@call
def detector_taught() -> Mapping[str, Any]:
    """Labels, attacks that it makes itself, and attacked images that it gets later."""
    x = digits()[0]
    labelled = detection.CausalEffectDetector(trained(), quick(), benign=None)
    both = np.concatenate([x[:200], attacked_digits()])
    labelled.fit(both, np.repeat([0, 1], [200, 24]))
    own = detection.CausalEffectDetector(trained(), quick(), attacks=["fgsm"])
    own.fit(x[:90])
    found = {"labelled": judged(labelled), "own": judged(own)}
    labelled.teach(attacked_digits()[:12])
    return named({**found, "taught": judged(labelled)})


@call
def detector_groups() -> Mapping[str, Any]:
    """Masked pixels, channels set to zero and interchanged; harmless alterations."""
    x = digits()[0]
    smooth = interventions.Smooth.gauss(1.0)
    groups = [detection.PixelMasking(0.3, n_draws=3), detection.NodeZeroing("3"), detection.Interchange("3", smooth)]
    one = detection.CausalEffectDetector(trained(), detection.Signature(groups), aggregate="soft_square")
    one.fit(x[:120])
    altered = detection.Benign(noise=0.1)(torch.from_numpy(x[:6]), ids=list(range(6)), seed=1)
    return {**judged(one), "altered": altered}


@call
def detector_from_a_file() -> Mapping[str, Any]:
    """A detector with a plain and an adversarially trained denoiser, stored: trained weights differ between CPUs."""
    read = detection.CausalEffectDetector.load(FOLDER / "detector.ce", trained())
    return {**judged(read), "about": [repr(read), repr(read.signature), str(read.signature)]}


@call
def detector_trained() -> Mapping[str, Any]:
    """Two steps of training a denoiser, and of hardening one."""
    one = detection.CausalEffectDetector(trained(), denoisers(2), seed=1, holdout=0.4)
    one.fit(digits()[0][:100], nb_epochs=1)
    return judged(one)


def denoisers(steps: int) -> Any:
    """A signature with two denoisers, one of which is adversarially trained and leads."""
    soft = detection.Denoising(width=4, least_steps=steps)
    hard = detection.Denoising(width=4, least_steps=steps, eps=0.2, judged=("margin",), name="hardened")
    return detection.Signature([soft, hard, detection.CounterAttack()], leading=["hardened"])


@call
def calibration() -> Mapping[str, Any]:
    """Thresholds and rates, by themselves."""
    scores = np.random.default_rng(6).standard_normal(80)
    one = detection.Calibration(scores)
    share = detection.rate(scores > 1)
    return {
        "thresholds": [one.threshold(fpr) for fpr in (0.02, 0.05, 0.2)],
        "p_values": one.p_values(scores[:9] + 0.1),
        "interval": [*detection.realised_interval(80, 0.05), *one.realised_interval(0.1, 0.9, n_test=50)],
        "rate": [share.share, share.low, share.high, share.n_flagged],
    }


@call
def adaptive_attack() -> Mapping[str, Any]:
    """Two steps of the attack that knows the detector, in both norms."""
    from art.estimators.classification import PyTorchClassifier

    x, y = digits()
    net = trained()
    classifier = PyTorchClassifier(net, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0))
    found: dict[str, Any] = {}
    for norm, eps in (("inf", 0.3), (2, 2.0)):
        options: dict[str, Any] = {"norm": norm, "eps": eps, "steps": 2, "restarts": 1, "width": 2}
        attack = detection.AdaptiveEvasion(classifier, fitted(), candidates=x[:20], **options)
        made = attack.generate(x[400:404], y[400:404])
        report = attack.report
        for name in ("success", "score", "margin", "norm", "prediction"):
            found[f"{norm}/{name}"] = getattr(report, name)
        found |= {
            f"{norm}/x": made,
            f"{norm}/curves": np.stack(list(report.curves.values())),
            f"{norm}/losses": [*report.curves],
        }
    return found


# --- the command line

FACTORY = """
import sys
from pathlib import Path
import torch
from torch import nn
from ce_plugin.models import Framing, VisionModel
sys.path.insert(0, {tests!r})
import golden_calls

class Double(nn.Sequential):
    def forward(self, x):
        return super().forward(x.double())

def coloured():
    layers = [nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = golden_calls.seeded(Double(*layers, nn.Linear(8, 4)), 11)
    net[6].weight.mul_(5)
    return VisionModel(net, "tiny", Framing(28), class_names=("cat", "dog", "bird", "fish"))

def grey():
    return VisionModel(Double(*golden_calls.trained()), "digits", Framing(8), class_names=tuple("0123456789"))
"""


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder of pictures and a module with networks, which is the current folder for a while."""
    from PIL import Image

    before, modules = Path.cwd(), set(sys.modules)
    path = list(sys.path)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name).resolve()
        random = np.random.default_rng(7)
        for file in ("one.png", "others/two.png", "others/three.png"):
            (folder / file).parent.mkdir(exist_ok=True)
            Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / file)
        (folder / "golden_networks.py").write_text(FACTORY.format(tests=str(Path(__file__).parent)))
        sys.modules["golden_calls"] = sys.modules[__name__]
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            sys.path[:] = path
            sys.modules.pop("golden_networks", None)
            if "golden_calls" not in modules:
                sys.modules.pop("golden_calls", None)


def command(*words: str) -> None:
    """Run the command line, which has to succeed."""
    from ce_plugin.cli import main

    code = main([*words, "--quiet"])
    if code:
        raise RuntimeError(f"ce-plugin {' '.join(words)} ended with {code}")


def findings(folder: Path) -> dict[str, Any]:
    """The findings in a folder's manifest, without the region that was tested, which has tests of its own."""
    found = json.loads((folder / "manifest.json").read_text())["findings"]
    found.pop("answers", None)
    for one in found.values():
        parts = one.values() if isinstance(one, dict) else ()
        for part in parts:
            if isinstance(part, dict):
                part.pop("answer", None)
        for case in one.get("evidence", {}).values() if isinstance(one, dict) else ():
            case.pop("answer_tested", None)
    return leaves(found)


@call
def command_explain() -> Mapping[str, Any]:
    """The findings of `ce-plugin explain`, by two designs, clean and attacked."""
    with workplace() as folder:
        words = ("explain", "one.png", "--model", "golden_networks:coloured")
        command(*words, "--trials", "30", "--attack", "none", "--attack", "fgsm", "--eps", "0.2", "--out", "a")
        command(
            *words, "--design", "one-at-a-time", "--grid", "4", "--target", "dog", "--outcome", "logit", "--out", "b"
        )
        return named({"regions": findings(folder / "a"), "single": findings(folder / "b")})


@call
def command_nodes() -> Mapping[str, Any]:
    """The tables of `ce-plugin nodes`, with the carriers of an attack, and with donors."""
    with workplace() as folder:
        words = ("nodes", "one.png", "--model", "golden_networks:coloured")
        command(*words, "--classes", "all", "--given", "fgsm", "--outcome", "logit", "--out", "a")
        command(
            *words, "--intervention", "resample", "--reference", "others", "--layer", "0", "--seed", "3", "--out", "b"
        )
        parts = {"nodes": table(folder / "a" / "nodes.csv"), "carriers": table(folder / "a" / "carriers.csv")}
        return named({**parts, "findings": findings(folder / "a"), "donors": table(folder / "b" / "nodes.csv")})


@call
def command_map() -> Mapping[str, Any]:
    """The arrays and findings of `ce-plugin map`, a contrast under an attack."""
    with workplace() as folder:
        words = ("--model", "golden_networks:coloured", "--target", "cat", "--contrast", "others", "--given", "fgsm")
        command("map", "one.png", *words, "--layer", "2", "--out", "a")
        arrays = np.load(folder / "a" / "maps.npz")
        maps = {name: arrays[name][..., ::4, ::4] for name in arrays.files}
        return {**maps, **{f"findings/{name}": value for name, value in findings(folder / "a").items()}}


@call
def command_detect() -> Mapping[str, Any]:
    """The table of `ce-plugin detect score`."""
    from PIL import Image

    from ce_plugin.models import load_model

    with workplace() as folder:
        (folder / "inbox").mkdir()
        for i, image in enumerate(np.concatenate([digits()[0][424:430], attacked_digits()[:6]])):
            Image.fromarray((image[0] * 255).round().astype(np.uint8)).save(folder / "inbox" / f"{i:02}.png")
        one = detection.CausalEffectDetector(load_model("golden_networks:grey").model, quick(), seed=2)
        one.fit(digits()[0][:240].astype(np.float32))
        one.save(folder / "one.ce")
        words = ("--detector", "one.ce", "--model", "golden_networks:grey", "--explain", "1", "--layer", "3")
        command("detect", "score", "inbox", *words, "--out", "a")
        return named({"scores": table(folder / "a" / "scores.csv"), "findings": findings(folder / "a")})


# --- running, storing, comparing


def as_value(found: object) -> Value:
    """A number, tensor or list as an array (float64, int64 or bool), words as a list of them."""
    if isinstance(found, str):
        return found
    if isinstance(found, Tensor):
        found = found.detach().cpu().numpy()
    if isinstance(found, (list, tuple)) and found and all(isinstance(one, str) for one in found):
        return list(found)
    array = np.asarray(found)
    if array.dtype == object or array.dtype.kind in "UT":
        return [str(one) for one in array.ravel()]
    kind = {"f": np.float64, "i": np.int64, "u": np.int64, "b": np.bool_}[array.dtype.kind]
    return array.astype(kind)


def run(name: str) -> dict[str, Value]:
    """The numbers of a call; the global random state is left as it was."""
    random = np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            return {key: as_value(value) for key, value in CALLS[name]().items()}
    finally:
        np.random.set_state(random)  # noqa: NPY002


def packed(value: Value) -> Any:
    """As JSON holds it: words as they are, arrays with kind and shape, floats to eight digits."""
    if isinstance(value, (str, list)):
        return value
    flat = value.ravel().tolist()
    numbers = [float(f"{x:.{DIGITS}g}") for x in flat] if value.dtype.kind == "f" else flat
    # Whole numbers and truths are shorter as digits.
    short = [int(x) if math.isfinite(x) and x == int(x) else x for x in numbers]
    return {value.dtype.kind: short, "shape": list(value.shape)}


def unpacked(stored: Any) -> Value:
    """What :func:`packed` stored."""
    if isinstance(stored, (str, list)):
        return stored
    kind = next(key for key in stored if key != "shape")
    return np.array(stored[kind], dtype={"f": np.float64, "i": np.int64, "b": np.bool_}[kind]).reshape(stored["shape"])


def stored() -> dict[str, dict[str, Value]]:
    """All stored numbers, by call and name."""
    content = json.loads(NUMBERS.read_text())
    return {name: {key: unpacked(value) for key, value in values.items()} for name, values in content.items()}


def write(names: Sequence[str]) -> None:
    """Store the numbers of these calls, one line for each array; those of calls that are gone go."""
    content = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    content = {name: values for name, values in content.items() if name in CALLS}
    content |= {name: {key: packed(value) for key, value in run(name).items()} for name in names}
    blocks = []
    for name in sorted(content):
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in content[name].items()
        ]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    NUMBERS.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    sys.stdout.write(f"{NUMBERS}: {len(content)} calls, {NUMBERS.stat().st_size / 1000:.0f} kB\n")


def tried(name: str) -> dict[str, Value] | str:
    """The numbers of a call, or the error that it ended with."""
    try:
        return run(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def dump(file: Path) -> None:
    """All numbers in full precision; of a call that failed the error. For benchmarks/golden.py."""
    found = {name: tried(name) for name in CALLS}
    file.write_bytes(pickle.dumps({"package": ce.__file__, "calls": found}))


def material() -> None:
    """Train the network for digits, and fit the detector that is stored."""
    x, y = digits()
    images, labels = torch.from_numpy(x).float(), torch.from_numpy(y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = digits_network()
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(15):
            for rows in torch.randperm(1000).split(50):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(network(images[rows]), labels[rows]))
                optimizer.step()
    state = {name: value.detach().half().numpy() for name, value in network.state_dict().items()}
    np.savez_compressed(FOLDER / "digits.npz", **state)
    with torch.no_grad():
        right = (trained()(torch.from_numpy(x[1000:])).argmax(1).numpy() == y[1000:]).mean()
    sys.stdout.write(f"digits: {right:.1%} right\n")
    one = detection.CausalEffectDetector(trained(), denoisers(60), seed=1)
    one.fit(x[:120], nb_epochs=1)
    one.save(FOLDER / "detector.ce", force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="*", metavar="CALL", help="store the numbers of these calls, or of all")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--material", action="store_true", help="make anew what calls load")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if options.material:
        material()
    elif options.dump is not None:
        dump(options.dump)
    elif options.write is not None:
        write(options.write or list(CALLS))
    else:
        for name in CALLS:
            start = time.perf_counter()
            found = tried(name)
            said = found if isinstance(found, str) else f"{sum(np.size(value) for value in found.values())} values"
            sys.stdout.write(f"{name}: {time.perf_counter() - start:.2f} s, {said}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
