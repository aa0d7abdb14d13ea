"""Attacked images for the evaluation of detectors: how they are made, and files that cache them."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
from torch import nn

from benchmarks.harness.archives import read_archive, write_archive
from benchmarks.harness.estimators import CountedNetwork, build_attack, build_estimator, predict
from ce_plugin.errors import ArgumentError, FileError, InputError, expected
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed

FilePath = Union[str, "PathLike[str]"]


@dataclass(frozen=True)
class Attacked:
    """Images after an attack, rounded to eight bits; only correctly classified images are attacked.

    Args:
        spec: the attack, as ``AttackSpec.described`` writes it.
        images: (N, C, H, W), uint8: every image that was attacked, successfully or not.
        index: (N,), the index of each in the images passed.
        labels: (N,), the true classes, which are also those predicted for the clean images.
        predicted: (N,), the classes predicted for the attacked images.
        stretch: (N,), the factor by which each perturbation was enlarged before rounding.
        l2: (N,), Euclidean norm of the change, values in [0, 1].
        linf: (N,), greatest change of a value.
        changed: (N,), number of pixels that changed in any channel.
        forwards: forward passes of the attack per image.
        seconds: time of the attack for all images together.
    """

    spec: dict[str, Any] = field(repr=False)
    images: npt.NDArray[np.uint8] = field(repr=False)
    index: npt.NDArray[np.int64] = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)
    predicted: npt.NDArray[np.int64] = field(repr=False)
    stretch: npt.NDArray[np.float64] = field(repr=False)
    l2: npt.NDArray[np.float64] = field(repr=False)
    linf: npt.NDArray[np.float64] = field(repr=False)
    changed: npt.NDArray[np.int64] = field(repr=False)
    forwards: float
    seconds: float

    @property
    def success(self) -> npt.NDArray[np.bool_]:
        """Which images are misclassified after rounding, (N,)."""
        successful: npt.NDArray[np.bool_] = self.predicted != self.labels
        return successful

    def adversarial(self) -> npt.NDArray[np.float32]:
        """The successful ones, (S, C, H, W), float32 in [0, 1]."""
        images: npt.NDArray[np.float32] = self.images[self.success].astype(np.float32) / np.float32(255)
        return images

    def sources(self) -> npt.NDArray[np.int64]:
        """Index of the clean image of each successful attack, (S,)."""
        return self.index[self.success]

    def save(self, file: FilePath, key: str = "") -> None:
        """Write everything to one compressed file, atomically."""
        about = {"key": key, "spec": self.spec, "forwards": self.forwards, "seconds": self.seconds}
        write_archive(file, about, {name: getattr(self, name) for name in _ARRAYS}, compressed=True)

    @classmethod
    def load(cls, file: FilePath, key: str | None = None) -> Attacked:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileError: there is none, it is damaged, or it was made under another key.
        """
        about, arrays = read_archive(
            file,
            lambda _, stored: {name: stored[name] for name in _ARRAYS},
            wanted="a file of attacked images",
            hint="Make it again.",
        )
        if key is not None and about["key"] != key:
            hint = "It was made with other settings, another network or other images: make it again."
            raise FileError(expected("file", f"one made under the key {key}", about["key"], hint))
        return cls(about["spec"], **arrays, forwards=about["forwards"], seconds=about["seconds"])


_ARRAYS = ("images", "index", "labels", "predicted", "stretch", "l2", "linf", "changed")


Array = npt.NDArray[Any]


@dataclass(frozen=True)
class AttackSpec:
    """One attack of a suite: its class in ART, its settings, the number of images, and how it survives rounding.

    Args:
        name: what tables and files call it ("pgd-0.1").
        family: kind of attack, left out together by protocols ("sign", "minimal", "sparse", "query" ...).
        norm: the norm that the attack bounds or minimises: "linf", "l2", "l1", "l0" or "none".
        attack: class name in ART, or one of :data:`~benchmarks.harness.estimators.BUILDERS`.
        settings: arguments of the class, except ``batch_size`` and ``verbose``.
        tries: largest number of images to attack.
        enough: number of successes after which no further chunk is started.
        chunk: images per call of ``generate``.
        aims: whether the attack is targeted at the runner-up class.
        stretch: factors on the perturbation, ascending; for each image the smallest that survives rounding is used.
            Otherwise attacks that stop at the decision boundary would be undone by rounding to eight bits.
        excluded: whether the attack bounds no norm: it is reported, but left out of means.

    Raises:
        ArgumentError: a count below 1, or stretch factors that are not ascending from 1.

    Example:
        >>> AttackSpec("fgsm-0.1", "sign", "linf", "FastGradientMethod", {"eps": 0.1}, tries=300).enough
        300
    """

    name: str
    family: str
    norm: str
    attack: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tries: int = 220
    enough: int = 300
    chunk: int = 100
    aims: bool = False
    stretch: tuple[float, ...] = (1.0,)
    excluded: bool = False

    def __post_init__(self) -> None:
        for name in ("tries", "enough", "chunk"):
            if getattr(self, name) < 1:
                raise ArgumentError(expected(name, "a positive number of images", getattr(self, name)))
        if self.stretch[:1] != (1.0,) or list(self.stretch) != sorted(set(self.stretch)):
            raise ArgumentError(expected("stretch", "ascending factors, the first 1.0", self.stretch))

    def described(self) -> dict[str, Any]:
        """Everything that determines the attack, JSON-serialisable."""
        words = {**asdict(self), "settings": dict(self.settings), "stretch": list(self.stretch)}
        known: dict[str, Any] = json.loads(json.dumps(words))
        # The old name of the field, so that cached results keep their keys.
        known["apart"] = known.pop("excluded")
        return known


def attack_images(
    spec: AttackSpec, network: nn.Module, images: Array, labels: Array, *, seed: int = 0, order: Array | None = None
) -> Attacked:
    """Attack those images that are classified correctly, and determine success after rounding to eight bits.

    The network and the global random state are left as they were; random numbers depend on the seed, the attack's name
    and the chunk, not on earlier attacks.

    Args:
        spec: the attack.
        network: images in [0, 1] to logits (N, C), in eval mode.
        images: (N, C, H, W), float32, multiples of 1/255 in [0, 1].
        labels: (N,), true classes.
        seed: seed of the random numbers.
        order: indices of the images to attack, in order; None means all.

    Returns:
        All attacked images with the results.

    Raises:
        InputError: the images have another shape or range, or the network classifies none of them correctly.
        AttackError: ART rejects the settings.
        UnknownNameError: ART has no such attack.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
        >>> with torch.no_grad():
        ...     _ = net[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 2, 2]]))
        >>> x = np.full((1, 1, 2, 2), 0.2, np.float32) + np.array([[[[0.2, 0], [0, 0]]]], np.float32)
        >>> spec = AttackSpec("fgsm", "sign", "linf", "FastGradientMethod", {"eps": 0.2})
        >>> found = attack_images(spec, net, x, np.array([0]))
        >>> found.success.tolist(), found.linf.round(1).tolist()
        ([True], [0.2])
    """
    _check(images, labels)
    start = time.perf_counter()
    offered = np.arange(len(images)) if order is None else np.asarray(order)
    right = offered[predict(network, images[offered]).argmax(1) == labels[offered]][: spec.tries]
    if len(right) == 0:
        raise InputError(expected("images", "some that the network classifies correctly", "none of them"))
    counted = CountedNetwork(network)
    parts: list[tuple[Array, ...]] = []
    for first in range(0, len(right), spec.chunk):
        index = right[first : first + spec.chunk]
        with state_guard(network, seed=derived_seed(seed, spec.name, first)):
            crafted = _craft(spec, counted, images[index], labels[index])
        parts.append((*_rounded(spec, network, images[index], labels[index], crafted), index))
        if sum(int((part[1] != labels[part[3]]).sum()) for part in parts) >= spec.enough:
            break
    measured = _measured([np.concatenate(columns) for columns in zip(*parts, strict=True)], images, labels)
    forwards = counted.images / len(measured["index"])
    return Attacked(spec.described(), **measured, forwards=forwards, seconds=time.perf_counter() - start)


def _measured(columns: list[Array], images: Array, labels: Array) -> dict[str, Array]:
    """The columns of :class:`Attacked`, from images, predictions, stretch factors and indices."""
    found, predicted, stretch, index = columns
    change = np.abs(found.astype(np.float64) / 255 - images[index])
    flat = change.reshape(len(change), -1)
    return {
        "images": found,
        "index": index.astype(np.int64),
        "labels": labels[index].astype(np.int64),
        "predicted": predicted,
        "stretch": stretch,
        "l2": np.sqrt((flat**2).sum(1)),
        "linf": flat.max(1),
        "changed": (change.max(1) > 1e-3).reshape(len(change), -1).sum(1),
    }


def cached_attack(
    file: FilePath,
    spec: AttackSpec,
    network: nn.Module,
    images: Array,
    labels: Array,
    *,
    seed: int = 0,
    order: Array | None = None,
) -> Attacked:
    """:func:`attack_images`, read from a file where it has been done before, else done and written there.

    A file that was made with other settings, another network or other images is made again.

    Args:
        file: where the result is kept, ``*.npz``.
        spec, network, images, labels, seed, order: see :func:`attack_images`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
        >>> with torch.no_grad():
        ...     _ = net[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 2, 2]]))
        >>> x = np.full((1, 1, 2, 2), 0.2, np.float32) + np.array([[[[0.2, 0], [0, 0]]]], np.float32)
        >>> spec = AttackSpec("fgsm", "sign", "linf", "FastGradientMethod", {"eps": 0.2})
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     first, again = (cached_attack(f"{folder}/a.npz", spec, net, x, np.array([0])) for _ in range(2))
        >>> bool((first.images == again.images).all()), first.seconds == again.seconds
        (True, True)
    """
    key = attack_key(spec, network, images, labels, seed, order)
    if Path(file).is_file():
        try:
            return Attacked.load(file, key)
        except FileError:
            Path(file).unlink()
    made = attack_images(spec, network, images, labels, seed=seed, order=order)
    made.save(file, key)
    return made


def attack_key(
    spec: AttackSpec, network: nn.Module, images: Array, labels: Array, seed: int = 0, order: Array | None = None
) -> str:
    """A checksum of everything that determines the result of an attack, except library versions."""
    state = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    parts = [json.dumps([spec.described(), seed], sort_keys=True).encode()]
    parts += [tensor.detach().cpu().float().numpy().tobytes() for tensor in state.values()]
    chosen = np.arange(len(images)) if order is None else np.asarray(order)
    parts += [np.ascontiguousarray(images).tobytes(), np.asarray(labels, np.int64).tobytes()]
    parts += [chosen.astype(np.int64).tobytes()]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def _craft(spec: AttackSpec, counted: CountedNetwork, images: Array, labels: Array) -> Array:
    """Attack one chunk; float32, clipped to [0, 1], not yet rounded."""
    scores = predict(counted, images)
    estimator = build_estimator(counted, images.shape[1:], scores.shape[1])
    goal = np.eye(scores.shape[1], dtype=np.float32)[labels]
    if spec.aims:
        goal = np.eye(scores.shape[1], dtype=np.float32)[np.where(goal > 0, -np.inf, scores).argmax(1)]
    made = build_attack(spec.attack, estimator, spec.settings, len(images)).generate(images.copy(), goal)
    crafted = np.nan_to_num(np.asarray(made, dtype=np.float32), nan=0.0)
    return np.clip(crafted.reshape(images.shape), 0.0, 1.0)


def _rounded(
    spec: AttackSpec, network: nn.Module, clean: Array, labels: Array, crafted: Array
) -> tuple[Array, Array, Array]:
    """8-bit images, their predicted classes, and the factor that each perturbation needed."""
    kept = to_bytes(crafted)
    if spec.norm == "linf" and "eps" in spec.settings:
        # Rounding to the nearest level would exceed the bound: 0.1 is 25.5 / 255.
        bound, original = int(spec.settings["eps"] * 255 + 1e-6), to_bytes(clean).astype(int)
        kept = np.clip(kept, original - bound, original + bound).astype(np.uint8)
    predicted = predict(network, kept.astype(np.float32) / np.float32(255)).argmax(1)
    stretch = np.ones(len(clean))
    for factor in spec.stretch[1:]:
        # If an attack failed it left the image unchanged, and there is nothing to enlarge.
        left = np.flatnonzero((predicted == labels) & (np.abs(crafted - clean).reshape(len(clean), -1).max(1) > 0))
        if len(left) == 0:
            break
        trial = to_bytes(clean[left] + factor * (crafted[left] - clean[left]))
        answer = predict(network, trial.astype(np.float32) / np.float32(255)).argmax(1)
        fooled = answer != labels[left]
        chosen = left[fooled]
        kept[chosen], predicted[chosen], stretch[chosen] = trial[fooled], answer[fooled], factor
    return kept, predicted.astype(np.int64), stretch


def to_bytes(images: Array) -> npt.NDArray[np.uint8]:
    """Images in [0, 1] as uint8."""
    return np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)


def _check(images: Array, labels: Array) -> None:
    if images.ndim != 4 or images.dtype != np.float32 or len(images) == 0:
        came = f"{images.dtype} of shape {images.shape}"
        raise InputError(expected("images", "float32 of shape (N, C, H, W), N at least 1", came))
    if len(labels) != len(images):
        raise InputError(expected("labels", f"one for each of {len(images)} images", len(labels)))
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):
        raise InputError(expected("images", "values in [0, 1]", f"[{low:g}, {high:g}]", "Scale them first."))
