"""Which images a detector is fitted to, and which it then scores: the protocols P1 to P4."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ce_plugin.detection.calibration import Calibration
from ce_plugin.detection.protocol import Detector
from ce_plugin.errors import ArgumentError, InputError, expected, unknown_name
from ce_plugin.randomness import numpy_generator

__all__ = ["PROTOCOLS", "ImageSet", "ProtocolData", "Task", "fit_detector", "fold_of", "plan"]

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

PROTOCOLS = {
    "P3": "fitted on clean images only",
    "P2": "fitted on clean images and FGSM",
    "P4": "fitted on clean images and all norm-bounded attacks but those of the family it is tried on",
    "P1": "fitted on clean images and the attack it is tried on",
}
"""What each protocol lets a detector learn from."""

HELD_OUT = 0.3


@dataclass(frozen=True)
class ImageSet:
    """Images that are scored together.

    Args:
        name: name of the attack or the alteration.
        images: (N, C, H, W), uint8 as stored, or float32 in [0, 1].
        ids: (N,), the image that each was made from; each at most once.
        family: family of the attack, see :class:`~benchmarks.harness.AttackSpec`.
        excluded: the attack bounds no norm: reported, but not in any mean or worst case.

    Raises:
        InputError: not one id per image, or an id twice.

    Example:
        >>> one = ImageSet("fgsm", np.full((2, 1, 1, 1), 255, np.uint8), np.array([4, 7]), family="sign")
        >>> len(one), one.units().ravel().tolist(), one.of_fold(1).ids.tolist()
        (2, [1.0, 1.0], [7])
    """

    name: str
    images: Array = field(repr=False)
    ids: Ids = field(repr=False)
    family: str = ""
    excluded: bool = False

    def __post_init__(self) -> None:
        if self.ids.shape != (len(self.images),):
            raise InputError(expected("ids", f"one for each of {len(self.images)} images", f"shape {self.ids.shape}"))
        if len(np.unique(self.ids)) < len(self.ids):
            raise InputError(expected("ids", f"each image once in {self.name!r}", "an id twice"))

    def __len__(self) -> int:
        return len(self.images)

    def units(self) -> npt.NDArray[np.float32]:
        """The images as float32 in [0, 1]."""
        return _units(self.images)

    def select(self, rows: Array) -> ImageSet:
        """The images selected by a mask or indices, (N,)."""
        return ImageSet(self.name, self.images[rows], self.ids[rows], self.family, self.excluded)

    def of_fold(self, fold: int | None) -> ImageSet:
        """Images whose source is in a fold; None means all."""
        return self if fold is None else self.select(fold_of(self.ids) == fold)

    def checksum(self) -> str:
        """Checksum of images and ids."""
        start = zlib.crc32(np.ascontiguousarray(self.ids, dtype=np.int64).tobytes())
        return f"{zlib.crc32(np.ascontiguousarray(self.images).tobytes(), start):08x}"


@dataclass(frozen=True)
class ProtocolData:
    """All images of one classifier for the protocols. The parts are disjoint: no image for fitting is a test image.

    Args:
        pool: clean images to fit and calibrate on, (N, C, H, W).
        training_attacks: attacks on images of the pool; their ids are rows of ``pool``.
        clean: correctly classified test images.
        attacks: successful attacks on test images; ids as in ``clean``.
        others: further sets that are scored for false alarms: misclassified and altered test images.
        seed: seed of the choice of held-out images.
    """

    pool: Array = field(repr=False)
    training_attacks: Mapping[str, ImageSet]
    clean: ImageSet
    attacks: Mapping[str, ImageSet]
    others: Mapping[str, ImageSet] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """One fit of a detector, and the images that are scored with it.

    Args:
        key: identifies it among the tasks of a protocol.
        learns: attacks in the fitting data; none means clean images only.
        trained_on: whether these are attacks on the pool or on test images.
        tries: attacks that are scored.
        fold: fold of the test images that are scored; attacked test images for fitting come from the other fold.
        alarms: whether false alarms are counted with this fit.
    """

    key: str
    learns: tuple[str, ...]
    trained_on: Literal["pool", "test"]
    tries: tuple[str, ...]
    fold: int | None = None
    alarms: bool = False


def fold_of(ids: Ids) -> Ids:
    """The fold, 0 or 1, of test images: an image and all its attacked versions are in the same fold.

    Example:
        >>> fold_of(np.array([4, 7])).tolist()
        [0, 1]
    """
    folds: Ids = ids % 2
    return folds


def plan(protocol: str, data: ProtocolData) -> tuple[Task, ...]:
    """The fits of a protocol.

    - P3: clean images of the pool, once; P2: these and their FGSM.
    - P1: for each attack, and P4: for each family of attacks (fitted with all norm-bounded attacks of other families),
      two fits: each is fitted with attacks on one half of the test images and scores the other half, clean and
      attacked. Clean images for fitting always come from the pool.

    Args:
        protocol: one of :data:`PROTOCOLS`.
        data: the images.

    Raises:
        UnknownNameError: an unknown protocol.
        InputError: there are no attacks for fitting although the protocol needs them.

    Example:
        >>> one = np.zeros((4, 1, 2, 2), np.uint8)
        >>> attacks = {n: ImageSet(n, one, np.arange(4), family=f) for n, f in (("fgsm", "sign"), ("jsma", "sparse"))}
        >>> data = ProtocolData(one, {"fgsm": attacks["fgsm"]}, ImageSet("clean", one, np.arange(4)), attacks)
        >>> [(task.key, task.learns, task.tries) for task in plan("P4", data)][:2]
        [('sign-0', ('jsma',), ('fgsm',)), ('sign-1', ('jsma',), ('fgsm',))]
    """
    if protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    names = tuple(data.attacks)
    if protocol == "P3":
        return (Task("all", (), "pool", names, alarms=True),)
    if protocol == "P2":
        if not any(len(one) for one in data.training_attacks.values()):
            raise InputError(expected("training_attacks", "attacks on images of the pool, for P2", "none"))
        return (Task("all", tuple(data.training_attacks), "pool", names, alarms=True),)
    if protocol == "P1":
        return tuple(Task(f"{name}-{fold}", (name,), "test", (name,), fold) for name in names for fold in (0, 1))
    return _left_out(data.attacks)


def _left_out(attacks: Mapping[str, ImageSet]) -> tuple[Task, ...]:
    tasks = []
    for family in dict.fromkeys(one.family for one in attacks.values()):
        learns = tuple(name for name, one in attacks.items() if one.family != family and not one.excluded)
        tries = tuple(name for name, one in attacks.items() if one.family == family)
        if learns:
            tasks += [Task(f"{family}-{fold}", learns, "test", tries, fold) for fold in (0, 1)]
    return tuple(tasks)


def fit_detector(
    detector: Detector, task: Task, data: ProtocolData, *, limit: int | None = None, batch_size: int = 128
) -> Calibration:
    """Fit a detector for a task, and calibrate it on clean images that it was not fitted on.

    30 % of the clean images are held out, chosen by the data's seed, and their scores are the calibration. A detector
    with an attribute ``calibration`` holds out images itself: it is fitted on all, and its own calibration is used.

    Args:
        detector: the detector to fit.
        task: says what it is fitted to.
        data: the images.
        limit: largest number of clean images of the pool, for fitting and calibration together, for slow detectors.
        batch_size: images at a time.

    Returns:
        The calibration, which gives the threshold for a nominal false-alarm rate.

    Raises:
        InputError: the attacks for fitting were not successful on enough images.

    Example:
        >>> class Brightness:
        ...     name = "brightness"
        ...     def fit(self, x, y=None): ...
        ...     def score(self, x, batch_size=128):
        ...         return x.mean((1, 2, 3)).astype(float)
        >>> pool = np.random.default_rng(0).random((100, 1, 2, 2)).astype(np.float32)
        >>> data = ProtocolData(pool, {}, ImageSet("clean", pool, np.arange(100)), {})
        >>> fit_detector(Brightness(), plan("P3", data)[0], data).n
        30
    """
    if limit is not None and limit < 1:
        raise ArgumentError(expected("limit", "a number of images, 1 or more, or None", limit))
    own = hasattr(type(detector), "calibration") or "calibration" in vars(detector)
    order = numpy_generator(data.seed, "held out").permutation(len(data.pool))[:limit]
    n_held = 0 if own else round(HELD_OUT * len(order))
    held, rows = np.sort(order[:n_held]), np.sort(order[n_held:])
    training_attacks = _training_attacks(task, data, rows)
    clean = _units(data.pool[rows])
    if task.learns:
        if not len(training_attacks):
            raise InputError(expected("training_attacks", f"successful attacks among {', '.join(task.learns)}", "none"))
        labels = np.concatenate([np.zeros(len(clean), np.int64), np.ones(len(training_attacks), np.int64)])
        detector.fit(np.concatenate([clean, training_attacks]), labels)
    else:
        detector.fit(clean)
    calibration = getattr(detector, "calibration", None)
    if isinstance(calibration, Calibration):
        return calibration
    return Calibration(detector.score(_units(data.pool[held]), batch_size=batch_size))


def _training_attacks(task: Task, data: ProtocolData, rows: Ids) -> npt.NDArray[np.float32]:
    """Attacked images for fitting, without those whose clean image is held out or scored."""
    if task.trained_on == "pool":
        sets = [data.training_attacks[name] for name in task.learns]
        chosen = [one.select(np.isin(one.ids, rows)) for one in sets]
    else:
        other = None if task.fold is None else 1 - task.fold
        chosen = [data.attacks[name].of_fold(other) for name in task.learns]
    parts: Sequence[Array] = [one.units() for one in chosen]
    return np.concatenate(parts) if parts else np.zeros((0,), np.float32)


def _units(images: Array) -> npt.NDArray[np.float32]:
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / np.float32(255)
    return np.asarray(images, dtype=np.float32)
