"""Attribution methods beside each other: each measure of each method's map, image by image, with paired intervals."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ce_plugin.errors import ArgumentError, FileError, InputError, expected, unknown_name
from ce_plugin.evaluation.faithfulness import insertion_deletion, reference_images
from ce_plugin.evaluation.methods import PASSES, Method, Scene, explain, resolve_method
from ce_plugin.evaluation.pointing import pointing_share
from ce_plugin.evaluation.scenes import planted_scenes
from ce_plugin.evaluation.stability import rank_correlation
from ce_plugin.interventions import Adversarial
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed, generator

__all__ = ["MEASURES", "Case", "Comparison", "Measure", "box_share", "compare"]

SHARED = ("blur", "mean", "zero")
BASELINES = ("random", "centre")
_STEPS = 14
_LEVEL, _DRAWS = 0.95, 10_000
_SAMPLES = 100  # of infidelity
_NEIGHBOURS = 5  # of max-sensitivity
_EPS = 8 / 255  # of the attack and of max-sensitivity's neighbours, of the range of values
_TRUTH = "correlation with planted truth"
_PATCHES = 7  # of a side, of which infidelity removes half


@dataclass(frozen=True)
class Case:
    """One image with what the measures need beside it.

    Args:
        scene: the image, the class, the network.
        name: of the image, in tables.
        others: other images of the data set, (M, C, H, W), of classes that differ from this one's and among each other:
            one for insertion and deletion, three for grid pointing.
        boxes: pixels that an annotator marked for the class, (H, W), bool; None where nobody did.
        value_range: lowest and highest value of a pixel in image units.

    Raises:
        InputError: shapes that do not fit.
    """

    scene: Scene
    name: str = ""
    others: Tensor | None = None
    boxes: Tensor | None = None
    value_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.others is not None and self.others.shape[1:] != self.scene.x.shape[1:]:
            wanted = f"images (M, {', '.join(map(str, self.scene.x.shape[1:]))})"
            raise InputError(expected("others", wanted, f"shape {tuple(self.others.shape)}"))
        if self.boxes is not None and (self.boxes.shape != self.scene.size or self.boxes.dtype != torch.bool):
            came = f"shape {tuple(self.boxes.shape)}, {self.boxes.dtype}"
            raise InputError(expected("boxes", f"a mask {self.scene.size} of type bool", came))

    def within(self, x: Tensor) -> Tensor:
        """Model units, cut to the range of values."""
        units = self.scene.normalization
        return units.to_model(units.to_image(x).clamp(*self.value_range))


@dataclass(frozen=True)
class Measure:
    """A way to judge a map.

    Args:
        run: from a method, a case, the case's map and the passes that a map may take to values by name.
        larger: what is better, for each value: larger (True), smaller (False), or neither (None).
        needs: how many other images.
        maps: how many more maps of the method it makes.
    """

    run: Callable[[Method, Case, Tensor, int], dict[str, float]]
    larger: Mapping[str, bool | None]
    needs: int = 0
    maps: int = 0


# The measures


def _insertion_deletion(method: Method, case: Case, map_: Tensor, passes: int) -> dict[str, float]:
    """Insertion minus deletion over references that some methods fill with (shared), and over others (unshared)."""
    scene, x = case.scene, case.scene.x
    if case.others is None:
        raise InputError(expected("others", "another image, as an unshared reference", "none"))
    low, high = case.value_range
    draw = generator(0, scene.ident, "reference")
    noise = low + (high - low) * (0.5 + 0.25 * torch.randn(x.shape, generator=draw)).to(x)
    references = {
        **reference_images(x, SHARED, normalization=scene.normalization),
        "next": case.others[:1],
        "noise": case.within(scene.normalization.to_model(noise)),
    }

    def predict(images: Tensor) -> Tensor:
        return scene.scores(images)[:, None]

    steps = min(_STEPS, x.shape[2] * x.shape[3])
    curves = insertion_deletion(predict, x, map_[None].to(x.device), 0, references, steps)
    split = len(SHARED)
    found: dict[str, float] = {}
    for name, part in (("shared", slice(None, split)), ("unshared", slice(split, None))):
        found[f"insertion - deletion, {name}"] = float(curves.score[0, part].mean())
    found["insertion"] = float(curves.insertion_auc.mean())
    found["deletion"] = float(curves.deletion_auc.mean())
    return found


def _grid_pointing(method: Method, case: Case, map_: Tensor, passes: int) -> dict[str, float]:
    """The share of the map inside the image, where it stands in a mosaic of four of different classes."""
    scene, others = case.scene, case.others
    if others is None or len(others) < 3:
        raise InputError(expected("others", "three images of other classes", 0 if others is None else len(others)))
    place = scene.ident % 4
    rows = list(others[:3].unbind())
    rows.insert(place, scene.x[0])
    whole = torch.cat([torch.cat(rows[:2], 2), torch.cat(rows[2:], 2)], 1)[None]
    height, width = scene.size
    even = interpolate(
        whole, (height - height % 2, width - width % 2), mode="bilinear", align_corners=False, antialias=True
    )
    mosaic = even if tuple(even.shape[2:]) == scene.size else interpolate(even, scene.size, mode="nearest")
    found = method(replace(scene, x=mosaic), passes)[None, : height - height % 2, : width - width % 2]
    return {"grid pointing": float(pointing_share(found, place)[0])}


def box_share(map_: Tensor, boxes: Tensor) -> dict[str, float]:
    """How much of a map lies in boxes: the share of its positive values, and whether its greatest value does.

    Args:
        map_: (H, W), finite.
        boxes: (H, W), bool, some of it True.

    Raises:
        InputError: shapes that do not fit, or no pixel in a box.

    Example:
        >>> box_share(torch.tensor([[3.0, 1.0], [-9.0, 0.0]]), torch.tensor([[True, False], [True, False]]))
        {'share in boxes': 0.75, 'greatest value in boxes': 1.0}

    Source: "energy-based" pointing, Wang et al. 2020 (arXiv 1910.01279); the pointing game, Zhang et al. 2016
        (arXiv 1608.00507).
    """
    if map_.dim() != 2 or boxes.shape != map_.shape or boxes.dtype != torch.bool or not bool(boxes.any()):
        came = f"shape {tuple(boxes.shape)}, {boxes.dtype}, {int(boxes.sum())} pixels"
        raise InputError(expected("boxes", f"a mask {tuple(map_.shape)} of type bool, some of it True", came))
    positive = map_.clamp(min=0)
    total = float(positive.sum())
    return {
        "share in boxes": float(positive[boxes].sum()) / total if total > 0 else 0.0,
        # Of equal values those in the box count by their number.
        "greatest value in boxes": float(boxes[map_ == map_.max()].double().mean()),
    }


def _boxes(method: Method, case: Case, map_: Tensor, passes: int) -> dict[str, float]:
    """See :func:`box_share`; an image without boxes has no value."""
    if case.boxes is None:
        return {"share in boxes": math.nan, "greatest value in boxes": math.nan}
    return box_share(map_, case.boxes)


def _infidelity(method: Method, case: Case, map_: Tensor, passes: int) -> dict[str, float]:
    """Captum's, with its best factor: random halves of 7 x 7 squares are set to the image's mean colour."""
    scene = case.scene
    base = scene.filled("mean")
    draw = generator(0, scene.ident, "infidelity")
    cells = min(_PATCHES, *scene.size)

    def squares(inputs: Tensor) -> tuple[Tensor, Tensor]:
        kept = (torch.rand(len(inputs), 1, cells, cells, generator=draw) < 0.5).float()
        masks = interpolate(kept, scene.size, mode="nearest").to(inputs)
        removed = (inputs - base) * (1 - masks)
        return removed, inputs - removed

    # A map says what a pixel's removal does; infidelity multiplies by the change, so the map is a share of it.
    values = (map_.to(scene.x) / scene.x.shape[1])[None, None].expand_as(scene.x)
    difference = scene.x - base
    slopes = torch.where(difference.abs() > 1e-6, values / difference, torch.zeros_like(values))
    found = infidelity(
        scene.scores, squares, scene.x, slopes, n_perturb_samples=_SAMPLES, max_examples_per_batch=64, normalize=True
    )
    return {"infidelity": float(found[0])}


def _sensitivity(method: Method, case: Case, map_: Tensor, passes: int) -> dict[str, float]:
    """Captum's max-sensitivity: the greatest relative change of the map for neighbours of the image."""
    scene = case.scene
    low, high = case.value_range
    draw = generator(0, scene.ident, "sensitivity")

    def neighbours(inputs: Any, radius: float) -> Any:
        (x,) = inputs if isinstance(inputs, tuple) else (inputs,)
        moved = scene.normalization.to_image(x) + radius * (2 * torch.rand(x.shape, generator=draw).to(x) - 1)
        return (scene.normalization.to_model(moved.clamp(low, high)),)

    def explained(inputs: Any) -> Tensor:
        (x,) = inputs if isinstance(inputs, tuple) else (inputs,)
        return torch.stack([method(replace(scene, x=row[None]), passes) for row in x])[:, None]

    if not bool(map_.abs().max() > 0):
        return {"max-sensitivity": math.nan}
    found = sensitivity_max(
        explained,
        scene.x,
        perturb_func=neighbours,
        perturb_radius=_EPS * (high - low),
        n_perturb_samples=_NEIGHBOURS,
        max_examples_per_batch=1,
    )
    return {"max-sensitivity": float(found[0])}


def _randomisation(method: Method, case: Case, map_: Tensor, passes: int) -> dict[str, float]:
    """Size of the rank correlation with the map of a network of shuffled weights, and with that of another class."""
    scene = case.scene
    found = {"|rank correlation|, shuffled weights": math.nan, "|rank correlation|, random class": math.nan}
    if not method.fixed:
        shuffled = copy.deepcopy(scene.network)
        draw = generator(0, scene.ident, "weights")
        with torch.no_grad():
            for parameter in shuffled.parameters():
                order = torch.randperm(parameter.numel(), generator=draw).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
        other = method(replace(scene, network=shuffled, forward=None), passes)
        found["|rank correlation|, shuffled weights"] = abs(_correlation(map_, other))
    with torch.no_grad():
        classes = scene.logits(scene.x).shape[1]
    if classes > 1:
        draw = generator(0, scene.ident, "class")
        step = 1 + int(torch.randint(classes - 1, (1,), generator=draw))
        other = method(replace(scene, target=(scene.target + step) % classes), passes)
        found["|rank correlation|, random class"] = abs(_correlation(map_, other))
    return found


def _stability(method: Method, case: Case, map_: Tensor, passes: int) -> dict[str, float]:
    """Rank correlation with the map of the same class under FGSM."""
    scene = case.scene
    low, high = case.value_range
    binary = scene.outcome == "sigmoid"
    attack = Adversarial.fgsm(
        _Binary(scene.network, scene.target).eval() if binary else scene.network,
        eps=_EPS * (high - low),
        clip_values=case.value_range,
        normalization=scene.normalization,
    )
    answer = scene.scores(scene.x) > 0.5
    own = answer.long() if binary else torch.full_like(answer, scene.target, dtype=torch.long)
    attacked = attack.perturb(scene.x, target=own, ids=[scene.ident])
    other = method(replace(scene, x=attacked), passes)
    return {"rank correlation, FGSM": _correlation(map_, other)}


class _Binary(nn.Module):
    """One logit as two classes, (-z/2, z/2)."""

    def __init__(self, network: nn.Module, target: int) -> None:
        super().__init__()
        self.network, self.target = network, target

    def forward(self, x: Tensor) -> Tensor:
        z = self.network(x)[:, self.target]
        return torch.stack([-z / 2, z / 2], 1)


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(rank_correlation(first[None], second[None])[0])


MEASURES: dict[str, Measure] = {
    "faithfulness": Measure(
        _insertion_deletion,
        {
            "insertion - deletion, shared": True,
            "insertion - deletion, unshared": True,
            "insertion": True,
            "deletion": False,
        },
        needs=1,
    ),
    "pointing": Measure(_grid_pointing, {"grid pointing": True}, needs=3, maps=1),
    "boxes": Measure(_boxes, {"share in boxes": True, "greatest value in boxes": True}),
    "infidelity": Measure(_infidelity, {"infidelity": False}),
    "sensitivity": Measure(_sensitivity, {"max-sensitivity": False}, maps=_NEIGHBOURS + 1),
    "randomisation": Measure(
        _randomisation,
        {"|rank correlation|, shuffled weights": False, "|rank correlation|, random class": False},
        maps=2,
    ),
    "stability": Measure(_stability, {"rank correlation, FGSM": True}, maps=1),
}
"""Measures by name; passes and seconds are always there."""


@dataclass(frozen=True)
class Comparison:
    """What methods gave for images: one record for each image and method.

    Args:
        records: with the keys image, method, target, passes, seconds and values (by name).
        larger: what is better, by name of the value.

    Example:
        >>> records = [
        ...     {"image": str(i), "method": m, "passes": 3, "seconds": 0.1, "values": {"score": i + (m == "a")}}
        ...     for i in range(4)
        ...     for m in "ab"
        ... ]
        >>> frame = Comparison(records, {"score": True}).table()
        >>> frame[frame.measure == "score"][["method", "images", "mean", "difference"]].values.tolist()
        [['a', 4, 2.5, nan], ['b', 4, 1.5, -1.0]]
    """

    records: Sequence[Mapping[str, Any]]
    larger: Mapping[str, bool | None] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """In the order in which they were first run."""
        return list(dict.fromkeys(str(record["method"]) for record in self.records))

    def values(self) -> dict[str, dict[str, dict[str, float]]]:
        """Measure -> method -> image -> value; passes and seconds are measures too."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for record in self.records:
            every = {**record["values"], "passes": record.get("passes"), "seconds": record.get("seconds")}
            for name, value in every.items():
                if value is not None and math.isfinite(value):
                    found.setdefault(name, {}).setdefault(str(record["method"]), {})[str(record["image"])] = value
        return found

    def table(self) -> Any:
        """A :class:`pandas.DataFrame`, a row for each measure and method.

        Columns: measure, better (larger or smaller), method, images, mean with low and high, and the mean difference
        to the first method on the images that both have, with its interval. Intervals: 95 %, percentile bootstrap over
        images; of two images or more.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for name, by_method in self.values().items():
            better = {True: "larger", False: "smaller", None: ""}[self.larger.get(name)]
            first = by_method.get(self.methods[0], {})
            for method in self.methods:
                own = by_method.get(method, {})
                if not own:
                    continue
                row = {"measure": name, "better": better, "method": method, "images": len(own)}
                row |= _summary(np.array(list(own.values())), "mean")
                both = [image for image in own if image in first]
                gap = np.array([own[image] - first[image] for image in both])
                empty = method == self.methods[0] or not both
                row |= _summary(np.full(1, math.nan) if empty else gap, "difference")
                rows.append(row)
        columns = ["measure", "better", "method", "images"]
        columns += [f"{name}{end}" for name in ("mean", "difference") for end in ("", "_low", "_high")]
        return pd.DataFrame(rows, columns=columns)

    def images(self) -> Any:
        """A :class:`pandas.DataFrame`, a row for each image and method, a column for each value."""
        import pandas as pd

        rows = [{**{k: v for k, v in record.items() if k != "values"}, **record["values"]} for record in self.records]
        return pd.DataFrame(rows)


def _summary(values: np.ndarray[Any, np.dtype[np.float64]], name: str) -> dict[str, float]:
    """The mean with its interval."""
    from scipy.stats import bootstrap

    low = high = math.nan
    if len(values) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of equal values
            options: dict[str, Any] = {"n_resamples": _DRAWS, "confidence_level": _LEVEL, "method": "percentile"}
            found = bootstrap((values,), np.mean, vectorized=True, rng=np.random.default_rng(0), **options)
        low, high = (float(end) for end in found.confidence_interval)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def compare(
    cases: Iterable[Case],
    methods: Sequence[object],
    measures: Sequence[str] = ("faithfulness",),
    *,
    passes: int = PASSES,
    kept: str | PathLike[str] | None = None,
    made_with: Mapping[str, Any] | None = None,
    planted: int = 0,
    step: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Judge methods by their maps of the same images; the baselines random and centre are always among them.

    Args:
        cases: the images.
        methods: names of :data:`~ce_plugin.evaluation.METHODS`, Captum attributions or callables, see
            :func:`~ce_plugin.evaluation.resolve_method`; the others are compared with the first.
        measures: names of :data:`MEASURES`.
        passes: that a map may take, for methods that do as many as they are told.
        kept: a file to which each image's and method's record is added as soon as it is there. What is in it already
            is not done again, if it was made with the same passes, measures and ``made_with``.
        made_with: what else the records depend on, such as the network's fingerprint.
        planted: number of planted scenes (:func:`~ce_plugin.evaluation.planted_scenes`) on which maps are compared with
            the truth, beside the images.
        step: called before each image and method with a few words.

    Returns:
        The records, as a table.

    Raises:
        UnknownNameError: an unknown method or measure.
        ArgumentError: no method, or two of one name.
        FileError: the file was made with something else, or is no such file.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        >>> cases = [Case(Scene(torch.rand(1, 1, 8, 8), 1, net, ident=i), str(i)) for i in range(2)]
        >>> compare(cases, ["saliency"], ["infidelity"]).methods
        ['Saliency', 'random', 'centre']
    """
    chosen = [resolve_method(method) for method in (*methods, *(b for b in BASELINES if b not in methods))]
    names = [method.name for method in chosen]
    if not methods or len(set(names)) < len(names):
        raise ArgumentError(expected("methods", "one or more, of different names", names))
    for name in measures:
        if name not in MEASURES:
            raise unknown_name("measures", name, MEASURES)
    run = [MEASURES[name] for name in dict.fromkeys(measures)]
    settings = {**(made_with or {}), "passes": passes, "measures": sorted(set(measures))}
    done = _Kept(Path(kept), settings) if kept is not None else None
    records: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        image = case.name or str(number)
        for method in chosen:
            key = (image, method.name)
            if done is None or key not in done.records:
                step(f"{image}: {method.name}")
                record = _measured(case, image, method, run, passes)
                if done is not None:
                    done.add(record)
            else:
                record = done.records[key]
            records.append(record)
    records += _planted(chosen, planted, passes, done, step)
    larger = {name: better for measure in run for name, better in measure.larger.items()}
    return Comparison(records, {**larger, _TRUTH: True})


def _planted(
    methods: Sequence[Method], n: int, passes: int, done: _Kept | None, step: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Records of planted scenes, without passes and seconds: their networks are tiny."""
    found = []
    for number, case in enumerate(planted_scenes(n)):
        image = f"planted scene {number}"
        for method in methods:
            if method.fixed:
                continue
            if done is None or (image, method.name) not in done.records:
                step(f"{image}: {method.name}")
                values = {_TRUTH: case.agreement(method(case.scene, passes))}
                record = {"image": image, "method": method.name, "target": case.scene.target, "values": values}
                if done is not None:
                    done.add(record)
            else:
                record = done.records[image, method.name]
            found.append(record)
    return found


def _measured(case: Case, image: str, method: Method, measures: Sequence[Measure], passes: int) -> dict[str, Any]:
    """A method's record for an image; its map is made once for all measures."""
    scene = case.scene
    with state_guard(scene.network, seed=derived_seed(0, scene.ident, "compare")):
        found = explain(method, scene, passes)
        values: dict[str, float | None] = {}
        for measure in measures:
            for name, value in measure.run(method, case, found.map, passes).items():
                values[name] = value if math.isfinite(value) else None
    return {
        "image": image,
        "method": method.name,
        "target": scene.target,
        "passes": found.passes,
        "seconds": round(found.seconds, 3),
        "values": values,
    }


class _Kept:
    """Records in a file, one a line, after a line with the settings; the last line may be cut off."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.records = file, dict[tuple[str, str], dict[str, Any]]()
        head = json.dumps({"settings": settings}, sort_keys=True)
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole and whole[0] != head + "\n":
            raise _other(file, whole[0], settings)
        try:
            for line in whole[1:]:
                record = json.loads(line)
                self.records[record["image"], record["method"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise FileError(expected("kept", "a file of records", f"{str(file)!r} ({error})")) from error
        if not whole:
            file.write_text(head + "\n", encoding="utf-8")
        elif len(whole) < len(lines):  # killed in the middle of a line
            file.write_text("".join(whole), encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Write a record at once."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.records[record["image"], record["method"]] = record


def _other(file: Path, head: str, settings: Mapping[str, Any]) -> FileError:
    """The error that says in what the records of a file differ."""
    hint = "Take the options that they were made with, or another file."
    try:
        before = json.loads(head)["settings"]
        apart = [
            f"{k} {before.get(k)!r}, not {settings.get(k)!r}"
            for k in {**before, **settings}
            if before.get(k) != settings.get(k)
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return FileError(expected("kept", "a file of records", repr(str(file)), "Name another file."))
    return FileError(
        expected("kept", "records made with the same settings", f"{'; '.join(apart)} ({str(file)!r})", hint)
    )
