"""Chest X-rays for the paper's experiments: images split by patient, the networks, and how well they read them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.detection._classifiers import kept
from ce_plugin.datasets import FINDINGS, ImageFiles, XRays, chest_xray14, pneumonia_xrays
from ce_plugin.evaluation import Figures, figures
from ce_plugin.files import written_whole
from ce_plugin.interventions import Adversarial
from ce_plugin.models import Framing, VisionModel, chexnet, load_state, pneumonia_cnn, train_classifier

SIZE = 64
NEEDED = 20
"""Positive and negative test images below which no AUROC is given."""
ATTACKS: dict[str, dict[str, Any]] = {
    "FGSM": {"name": "fgsm", "eps": 0.3},
    "BIM": {"name": "bim", "eps": 0.3},
    "JSMA": {"name": "jsma", "eps": 0.3},
    "PGD": {"name": "pgd", "eps": 0.3},
    "FGSM .03": {"name": "fgsm", "eps": 0.03},
    "BIM .03": {"name": "bim", "eps": 0.03},
    "PGD .03": {"name": "pgd", "eps": 0.03},
}
"""The paper's size, in L-inf, ten steps; and a tenth of it. JSMA: 25 steps of .3."""
LEVEL = 0.95
_BATCH = 50
# Attacked images that are written together.
_ATTACKED = 8


@dataclass(frozen=True)
class Training:
    """How one of the DenseNets is trained: Adam, 1e-3, binary cross-entropy, see `train_classifier`."""

    epochs: int
    batch_size: int = 32


TRAINING = {"one sigmoid": Training(8), "fourteen sigmoids": Training(12)}
"""Fixed before any result was seen, by the time that one CPU core has: about five minutes each."""


@dataclass(frozen=True)
class Images:
    """Prepared images of one part of a data set.

    Args:
        data: the files.
        x: (N, 3, 64, 64), in model units.
        y: which findings they have, (N, K), bool.
    """

    data: ImageFiles
    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.data)

    def first(self, n: int) -> Images:
        """So many of them, in a random order that is always the same; all if there are fewer."""
        chosen = np.random.default_rng(0).permutation(len(self))[:n]
        return Images(self.data.subset(chosen.tolist()), self.x[chosen], self.y[chosen])


def data_folder() -> Path:
    """Where the data sets lie."""
    if not os.environ.get("CE_PLUGIN_DATA"):
        raise SystemExit("Set CE_PLUGIN_DATA to the folder that holds chest-xray/ and cxr-pneumonia-cnn/.")
    return Path(os.environ["CE_PLUGIN_DATA"])


def without_groups(data: ImageFiles, groups: Iterable[str]) -> ImageFiles:
    """The pictures of all patients but these."""
    held = set(groups)
    return data.subset((i for i, g in enumerate(data.groups) if g not in held), "of patients in the other part")


def pneumonia_parts() -> tuple[ImageFiles, ImageFiles]:
    """X-rays of children for training and for testing: who is in both by the number in the file name is in test."""
    folder = data_folder() / "chest-xray" / "pneumonia-224px"
    test = pneumonia_xrays(folder, "test")
    return without_groups(pneumonia_xrays(folder, "train"), test.groups), test


def nih_parts() -> tuple[XRays, XRays]:
    """NIH's X-rays for training and for testing, by patient.

    Patients with a picture in the folder ``test``, or with a box, are for testing, with all their pictures; the larger
    pictures that are not among those of 64 pixels are used only where they have a box.
    """
    folder = data_folder() / "chest-xray"
    small, large = chest_xray14(folder, images="nih1000-64px"), chest_xray14(folder, images="nih")
    boxed = {i for i, file in enumerate(large.files) if file.name in large.boxes}
    in_test = {g for g, file in zip(small.groups, small.files, strict=True) if file.parent.parent.name == "test"}
    with_box = {g for g, file in zip(small.groups, small.files, strict=True) if file.name in small.boxes}
    held = in_test | with_box | {large.groups[i] for i in boxed}
    known = {file.name for file in small.files}
    train, own = without_groups(small, held), without_groups(small, set(small.groups) - held)
    more = large.subset(i for i in sorted(boxed) if large.files[i].name not in known)
    test = replace(
        own,
        files=(*own.files, *more.files),
        labels=torch.cat([own.labels, more.labels]),
        groups=(*own.groups, *more.groups),
    )
    return cast(XRays, train), cast(XRays, test)


def prepared(net: VisionModel, data: ImageFiles) -> Images:
    """The pictures as a network takes them."""
    x = torch.cat([net.inputs([data[i][0] for i in part]) for part in np.array_split(np.arange(len(data)), 20)])
    y = data.labels if data.labels.dim() == 2 else data.labels[:, None] == 1
    return Images(data, x, y)


@cache
def network(name: str) -> VisionModel:
    """One of the three networks, in eval mode and frozen; those that are trained here come from the cache or are made.

    Args:
        name: ``"pneumonia CNN"`` (its weights are in the data folder), ``"one sigmoid"`` or ``"fourteen sigmoids"``.
    """
    if name == "pneumonia CNN":
        net = pneumonia_cnn(data_folder() / "cxr-pneumonia-cnn" / "pneumonia_cnn64.npz")
    else:
        classes = ("pneumonia",) if name == "one sigmoid" else FINDINGS
        net = replace(chexnet(class_names=classes), name=f"DenseNet-121, {name}", framing=Framing(SIZE))
        load_state(net.model, kept(_weights(name), lambda: _trained(net, name)))
    net.model.eval().requires_grad_(False)
    return net


def _weights(name: str) -> Path:
    """The file of weights: another one for another training or other images."""
    train, _ = pneumonia_parts() if name == "one sigmoid" else nih_parts()
    said = repr((TRAINING[name], SIZE, [file.name for file in train.files]))
    digest = hashlib.blake2b(said.encode(), digest_size=6).hexdigest()
    return cache_folder() / f"{name.replace(' ', '-')}-{digest}.pt"


def _trained(net: VisionModel, name: str) -> nn.Module:
    train, _ = pneumonia_parts() if name == "one sigmoid" else nih_parts()
    images, config = prepared(net, train), TRAINING[name]
    fast = net.model.to(memory_format=torch.channels_last)  # a third faster
    x = images.x.to(memory_format=torch.channels_last)
    losses = train_classifier(
        fast, x, images.y, epochs=config.epochs, batch_size=config.batch_size, mirror=True, show_progress=True
    )
    print(f"{name}: mean loss of each epoch {', '.join(f'{loss:.3f}' for loss in losses)}", flush=True)
    return fast.to(memory_format=torch.contiguous_format)


class GrayTwoClasses(nn.Module):
    """A network with one logit z as two classes, (-z/2, z/2), whose softmax is (1 - sigmoid(z), sigmoid(z)).

    It takes gray images in [0, 1], so that attacks and interventions cannot colour them.

    Args:
        network: from images (N, 3, H, W) in [0, 1] to z, (N, 1).

    Example:
        >>> net = GrayTwoClasses(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))).eval()
        >>> net(torch.rand(2, 1, 4, 4)).sum(1).abs().max() < 1e-6
        tensor(True)
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        z = self.network(images.expand(-1, 3, -1, -1))
        return torch.cat([-z / 2, z / 2], 1)


def cache_folder() -> Path:
    """Where weights and attacked images are kept."""
    return Path(os.environ.get("CE_PLUGIN_CACHE") or Path.home() / ".cache" / "ce-plugin") / "paper"


def attacked(made: Adversarial, model: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
    """The images under an attack, some at a time from the cache or made now; whatever they depend on is the key.

    Args:
        made: the attack.
        model: its network.
        x: images, (N, ...), in model units; their ids are 0 to N - 1.
        target: the output to move away from, (N,), or None.
    """
    weights = hashlib.blake2b(repr(made).encode())
    for value in model.state_dict().values():
        weights.update(value.detach().contiguous().numpy().tobytes())
    step, parts = max(_ATTACKED, made.batch_size), []
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        own, digest = None if target is None else target[rows], weights.copy()
        digest.update(repr((rows, None if own is None else own.tolist())).encode())
        digest.update(x[rows].contiguous().numpy().tobytes())
        file = cache_folder() / "attacked" / f"{made.config.name}-{digest.hexdigest()[:24]}.npy"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            found = made.perturb(x[rows], target=own, ids=range(rows.start, rows.stop))
            with written_whole(file) as stream:
                np.save(stream, torch.as_tensor(found).numpy())
        parts.append(torch.from_numpy(np.load(file)))
    return torch.cat(parts)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, K), some images at a time."""
    with torch.inference_mode():
        return torch.cat([model(part) for part in torch.split(x, _BATCH)]).clone()


def reading(z: Tensor, images: Images, names: Sequence[str]) -> list[Figures]:
    """AUROC of each finding, intervals by a bootstrap over patients; "not evaluated" below 20 of either kind.

    Args:
        z: logits, (N, K).
        images: their labels and patients.
        names: of the findings.
    """
    groups = np.array(images.data.groups)
    found = []
    for k, name in enumerate(names):
        has, scores = images.y[:, k].numpy(), z[:, k].double().numpy()
        found.append(
            figures(
                scores[~has],
                scores[has],
                detector="sigmoid",
                attack=name,
                ids=(groups[~has], groups[has]),
                needed=NEEDED,
                level=LEVEL,
            )
        )
    return found


def informative(found: Sequence[Figures]) -> list[int]:
    """The findings that the network reads: those whose AUROC's interval lies above .5."""
    return [k for k, one in enumerate(found) if one.auroc is not None and one.auroc.low > 0.5]


@dataclass(frozen=True)
class Mean:
    """A mean over images with its interval, and how many images would settle its sign.

    Args:
        mean, low, high: t interval over images, or over patients' means.
        n: images.
        needed: images with which a two-sided t test at 5 % finds a mean and spread like these in four of five samples;
            None where there are fewer than three images or no spread.
    """

    mean: float
    low: float
    high: float
    n: int
    needed: int | None

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def mean_of(values: Tensor) -> Mean:
    """The mean of one value for each image.

    Example:
        >>> mean_of(torch.tensor([1.0, 2.0, 3.0, 2.0])).needed
        2
    """
    v = values.double().numpy()
    n, mean = len(v), float(v.mean())
    if n < 2:
        return Mean(mean, math.nan, math.nan, n, None)
    error = float(v.std(ddof=1)) / math.sqrt(n)
    half = error * float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    needed = None
    if n > 2 and error > 0 and mean != 0:
        power = float(stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(0.8))
        needed = max(2, math.ceil((power * error * math.sqrt(n) / mean) ** 2))
    return Mean(mean, mean - half, mean + half, n, needed)


def by_patient(values: Sequence[float], patients: Sequence[str]) -> Mean:
    """The mean over patients of one value for each image: that of a patient is the mean of his images."""
    own: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        own.setdefault(patient, []).append(value)
    return mean_of(torch.tensor([float(np.mean(some)) for some in own.values()], dtype=torch.float64))
