"""The answer in a sentence, and what it is about to explore: of a photograph its patches, of a layer its channels."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ce_plugin.attribution import CausalEffect, LayerCausalEffect
from ce_plugin.designs import Joint
from ce_plugin.effects import Estimate, RegionTest
from ce_plugin.errors import NoChangeWarning
from ce_plugin.models import VisionModel
from ce_plugin.visualization import data_uri, outlines

_STRONGEST = 5
# The picture is drawn in a square of so many units.
_SIDE = 1000


@dataclass(frozen=True)
class Patch:
    """One of the strongest patches.

    Attributes:
        place: row and column.
        contribution: to the outcome of the class, averaged over what happens to the other patches.
        low, high: its 95 % interval; None where no errors are known.
        points: what covering this patch alone takes from the probability, in per cent points, the mean over the fills.
    """

    place: str
    contribution: float
    low: float | None
    high: float | None
    points: float


@dataclass(frozen=True)
class Told:
    """What is told first of one photograph.

    Attributes:
        sentence: what was found, in words.
        test: the region that was covered, and the random places.
        name: of the class that the sentence is about.
        patches: the strongest ones for this class.
        classes: for each of the most probable classes its name, the contributions of all patches to draw, the effects
            themselves and half of their intervals (empty where no errors are known).
        grid: rows and columns of patches.
        picture: what the network saw, (C, H, W), in [0, 1].
    """

    sentence: str
    test: RegionTest
    name: str
    patches: tuple[Patch, ...]
    classes: tuple[dict[str, Any], ...] = field(repr=False)
    grid: tuple[int, int]
    picture: Tensor = field(repr=False)

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {**_record(self.sentence, self.name, self.test), "patches_covered": _chosen(self.test)}

    def render(self, outcome: str) -> dict[str, Any]:
        """The names that the template ``answer.html.j2`` uses.

        Args:
            outcome: its name, for the reader.
        """
        rows, columns = self.grid
        places = [f"row {r + 1}, column {c + 1}" for r in range(rows) for c in range(columns)]
        return {
            **_explored(self.grid, places, self.test.region[0], self.classes, high=_SIDE),
            "unit": "patch",
            "sentence": self.sentence,
            "name": self.name,
            "gray": data_uri(0.3 + 0.65 * self.picture.mean(0, keepdim=True)),
            "colours": data_uri(self.picture),
            "patches": self.patches,
            "outcome": outcome,
        }


@dataclass(frozen=True)
class ToldChannels:
    """What is told first of a layer.

    Attributes:
        sentence: what was found, in words.
        test: the channels that were set to zero together, and as many at random.
        name: of the class that the sentence is about.
        labels: of the channels.
        classes: as those of :class:`Told`.
    """

    sentence: str
    test: RegionTest
    name: str
    labels: tuple[str, ...] = field(repr=False)
    classes: tuple[dict[str, Any], ...] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {**_record(self.sentence, self.name, self.test), "channels_set": _chosen(self.test)}

    def render(self, outcome: str) -> dict[str, Any]:
        """The names that the template ``channels.html.j2`` uses.

        Args:
            outcome: its name, for the reader.
        """
        columns = max(math.ceil(math.sqrt(2 * len(self.labels))), 1)
        grid = (math.ceil(len(self.labels) / columns), columns)
        region = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        region[: len(self.labels)] = self.test.region[0, : len(self.labels)]
        places = [f"channel {label}" for label in self.labels]
        return {
            **_explored(grid, places, region, self.classes, high=_SIDE * grid[0] / columns),
            "unit": "channel",
            "sentence": self.sentence,
            "name": self.name,
            "gray": "",
            "chosen": int(region.sum()),
            "outcome": outcome,
        }


def _record(sentence: str, name: str, test: RegionTest) -> dict[str, Any]:
    return {
        "sentence": sentence,
        "class": name,
        "clean": float(test.clean[0]),
        "covered": float(test.covered[0]),
        "placed": test.placed[0].tolist(),
        "p_value": float(test.p_values()[0]),
    }


def _chosen(test: RegionTest) -> list[int]:
    units: list[int] = test.region[0].nonzero()[:, 0].tolist()
    return units


def _explored(
    grid: tuple[int, int], places: Sequence[str], region: Tensor, classes: Sequence[dict[str, Any]], *, high: float
) -> dict[str, Any]:
    """The names of ``explore.html.j2`` about cells in a grid, row by row, of which the last ones may be missing."""
    width, height = _SIDE / grid[1], high / grid[0]
    lines = outlines(region.reshape(grid)) + 0.5
    scale = torch.tensor([width, height], dtype=torch.float64).numpy()
    return {
        "cells": [
            {"x": k % grid[1] * width, "y": k // grid[1] * height, "place": place} for k, place in enumerate(places)
        ],
        "cell_width": width,
        "cell_height": height,
        "side": _SIDE,
        "high": high,
        "lines": (lines * scale).reshape(-1, 4).tolist(),
        "data": json.dumps(classes).replace("<", "\\u003c"),
        "names": [one["name"] for one in classes],
    }


def told(
    net: VisionModel,
    explainer: CausalEffect,
    inputs: Tensor,
    estimate: Estimate,
    *,
    classes: Sequence[int],
    grid: tuple[int, int],
    mask: Tensor | None,
    example_id: int,
) -> Told | None:
    """What is told first of one photograph; None where nothing was tested.

    Args:
        net: the network.
        explainer: that made the estimate.
        inputs: the photograph as the network saw it, (1, C, H, W).
        estimate: of all classes, with its answer.
        classes: that the reader may choose from.
        grid: rows and columns of patches.
        mask: the patches, where they are not the default ones.
        example_id: names the random numbers.
    """
    test = estimate.answer
    if test is None:
        return None
    target = int(test.target[0])
    strongest = estimate.strongest(0, target, top=_STRONGEST)
    units = [int(unit) for unit in strongest["unit"]]
    each = Joint([(unit,) for unit in units])
    one_by_one = CausalEffect(
        net.model, explainer.intervention, each, normalization=net.normalization, seed=explainer.seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)  # the estimate has said it
        alone = one_by_one.estimate(inputs, target=target, feature_mask=mask, ids=[example_id])
    patches = []
    for k, unit in enumerate(units):
        row, column = divmod(unit, grid[1])
        ends: tuple[float | None, float | None] = (None, None)
        if estimate.std_error is not None:
            ends = (float(strongest["ci_low"][k]), float(strongest["ci_high"][k]))
        points = 100 * float(alone.contribution[0, k, 0])
        size = float(strongest["contribution"][k])
        patches.append(Patch(f"row {row + 1}, column {column + 1}", size, *ends, points))
    columns = list(dict.fromkeys([target, *classes]))
    drawn = tuple(_column(estimate, one, net.class_name) for one in columns)
    picture = net.pictures(inputs)[0]
    return Told(estimate.summary(0), test, net.class_name(target), tuple(patches), drawn, grid, picture)


def told_channels(
    net: VisionModel, layer: str, inputs: Tensor, target: int, classes: Sequence[int], *, outcome: str, seed: int
) -> ToldChannels | None:
    """What is told first of a layer; None where no channel could be tested.

    Args:
        net: the network.
        layer: its dotted name.
        inputs: the photograph as the network takes it, (1, C, H, W).
        target: the class that the answer is about.
        classes: that the reader may choose from as well.
        outcome: of the contributions.
        seed: of the random channels.
    """
    explainer = LayerCausalEffect(net.model, layer, outcome=outcome, seed=seed)
    estimate = explainer.estimate(inputs, answer=True, answer_target=target)
    test = estimate.answer
    if test is None:
        return None
    sentence = test.sentence(0, net.class_name, "Setting {} to zero", "channels")
    drawn = tuple(_column(estimate, one, net.class_name) for one in dict.fromkeys([target, *classes]))
    return ToldChannels(sentence, test, net.class_name(target), tuple(estimate.labels_of(0)), drawn)


def _column(estimate: Estimate, index: int, name: Callable[[int], str]) -> dict[str, Any]:
    """One class's numbers for the page, rounded to four digits."""

    def short(values: Tensor) -> list[float]:
        return [float(f"{value:.4g}") for value in values.tolist()]

    half = [] if estimate.std_error is None else short(estimate.half_width()[0, :, index])
    return {
        "name": name(index),
        "drawn": short(estimate.smoothed_contribution[0, :, index]),
        "effect": short(estimate.contribution[0, :, index]),
        "half": half,
    }
