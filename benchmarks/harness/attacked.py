"""What an attack left behind: images of eight bits, what the network makes of them, and the file that holds both."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from benchmarks.harness.archives import read_archive, write_archive
from ce_plugin.errors import FileError, expected

__all__ = ["Attacked"]

FilePath = Union[str, "PathLike[str]"]


@dataclass(frozen=True)
class Attacked:
    """Images after an attack, as a file of eight bits would hold them; only correctly classified ones were attacked.

    Args:
        spec: the attack, as ``AttackSpec.described`` writes it.
        images: (N, C, H, W), uint8: every image that was tried, successful or not.
        index: (N,), where each stands among the images that were offered.
        labels: (N,), the true classes, which the network gave for the clean images.
        predicted: (N,), the classes that it gives now.
        stretch: (N,), the factor by which each perturbation was lengthened before it was rounded.
        l2: (N,), Euclidean norm of the change, values in [0, 1].
        linf: (N,), greatest change of a value.
        changed: (N,), number of pixels that changed, in whichever channel.
        forwards: images that went through the network while attacking, per image.
        seconds: time the attack took, all images together.
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
        """Which images the network takes for another class, after rounding, (N,)."""
        successful: npt.NDArray[np.bool_] = self.predicted != self.labels
        return successful

    def adversarial(self) -> npt.NDArray[np.float32]:
        """The successful ones, (S, C, H, W), float32 in [0, 1]."""
        images: npt.NDArray[np.float32] = self.images[self.success].astype(np.float32) / np.float32(255)
        return images

    def sources(self) -> npt.NDArray[np.int64]:
        """Where the clean image of each successful one stands among those offered, (S,)."""
        return self.index[self.success]

    def save(self, file: FilePath, key: str = "") -> None:
        """Write everything to one compressed file, whole or not at all."""
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
