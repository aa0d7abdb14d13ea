"""The signature of an image: effects of named groups of interventions on the network's logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ce_plugin.detection.benign import SMALL
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.probes import (
    SIDES,
    CounterAttack,
    Denoising,
    Group,
    Interchange,
    NodeZeroing,
    PixelMasking,
    Response,
    Smoothing,
    View,
)
from ce_plugin.detection.scorers import Fitted, Sample
from ce_plugin.errors import ArgumentError, FileError, expected, unknown_name
from ce_plugin.interventions import Smooth

__all__ = [
    "Signature",
    "checked_count",
    "digests",
    "measured",
]


_KINDS: dict[str, type[Group]] = {
    one.__name__: one for one in (Smoothing, CounterAttack, Denoising, PixelMasking, NodeZeroing, Interchange)
}


class Signature:
    """Which interventions a detector looks at, in groups.

    Args:
        groups: their names differ.
        leading: names of the groups that count in full; of the others counts only what is beyond two standard
            deviations, so that nothing is won by looking very usual to them. None: all count in full.

    Attributes:
        groups, leading: as given.
        passes: forward passes for one image, the idle run included; a backward pass counts as two.
        differentiable: whether every group is.

    Raises:
        ArgumentError: no group, or two of one name.
        UnknownNameError: no group of a name in ``leading``.

    Example:
        >>> signature = Signature([Smoothing("blur", [Smooth.gauss(1.0)]), CounterAttack()])
        >>> signature.passes
        4
        >>> Signature.small_images().names
        ('denoising', 'counter-attack', 'filters', 'threshold')
    """

    def __init__(self, groups: Sequence[Group], *, leading: Sequence[str] | None = None) -> None:
        self.groups = tuple(groups)
        self.leading = None if leading is None else tuple(leading)
        if not self.groups or not all(isinstance(group, Group) for group in self.groups):
            got = [type(group).__name__ for group in self.groups]
            raise ArgumentError(expected("groups", "at least one Group, and nothing else", got))
        # With a stroke in it, a group's tensors could be taken for those of another one when they are read from a file.
        if len(set(self.names)) < len(self.names) or any("/" in name for name in self.names):
            wanted = "groups of different names without '/'"
            raise ArgumentError(expected("groups", wanted, list(self.names), "Pass `name=`."))
        if isinstance(leading, str) or self.leading == ():
            raise ArgumentError(expected("leading", "one or more names of groups, or None", repr(leading)))
        for name in self.leading or ():
            if name not in self.names:
                raise unknown_name("leading", name, self.names)

    @classmethod
    def of(cls, shape: Sequence[int], value_range: tuple[float, float] = (0.0, 1.0)) -> Signature:
        """The default for images of a shape (C, H, W): small pictures, or photographs."""
        small = min(shape[-2:]) <= SMALL
        return cls.small_images(value_range) if small else cls.photographs(value_range)

    @classmethod
    def small_images(cls, value_range: tuple[float, float] = (0.0, 1.0)) -> Signature:
        """For pictures of some ten pixels a side, such as digits."""
        low, high = value_range
        unit = high - low
        filters = [
            Smooth.median(2, value_range=value_range),
            Smooth.stretch(low + 0.25 * unit, high - 0.25 * unit, value_range=value_range),
        ]
        counter = CounterAttack(steps=(0.05 * unit,), value_range=value_range)
        threshold = [
            Smooth.soft_threshold(0.1 * unit, value_range=value_range),
            Smooth.bits(1, value_range=value_range),
        ]
        return cls(
            [
                Denoising(),
                counter,
                Smoothing("filters", filters, judged=("reversal",)),
                Smoothing("threshold", threshold, judged=("distance",)),
            ]
        )

    @classmethod
    def hardened(cls, value_range: tuple[float, float] = (0.0, 1.0), *, eps: float | None = None) -> Signature:
        """For small pictures, where attackers may know the detector: a hardened denoiser leads.

        An attacker who knows :meth:`small_images` makes an image look usual to each of its interventions; those that
        nobody prepared give way first, and what looks very usual to many makes up for the rest. Here the margin that a
        hardened denoiser leaves counts in full, and what the others say only where an image is clearly unusual: there
        is nothing to make up with. Attackers who do not know the detector are seen a little less well, and fitting
        takes several times as long, for the denoiser is attacked at each step of its training.

        Args:
            value_range: least and greatest value of an image.
            eps: greatest change of a value that the denoiser is hardened against; None: three tenths of the range.

        Example:
            >>> Signature.hardened().names
            ('denoising', 'hardened denoising')
        """
        bound = 0.3 * (value_range[1] - value_range[0]) if eps is None else eps
        name = "hardened denoising"
        hard = Denoising(least_steps=3000, eps=bound, judged=("margin",), name=name)
        return cls([Denoising(), hard], leading=[name])

    @classmethod
    def photographs(cls, value_range: tuple[float, float] = (0.0, 1.0)) -> Signature:
        """For photographs of a hundred pixels a side and more.

        A network sees the same photograph a few pixels further on; an attack is made for the grid on which it lies.
        """

        def shift(dx: int, dy: int) -> Smooth:
            return Smooth.shift(dx, dy, value_range=value_range)

        fewer_greys = Smooth.chain(shift(-1, 2), Smooth.bits(3, value_range=value_range))
        return cls(
            [
                Smoothing("shift", [shift(3, -2)], judged=SIDES),
                Smoothing("shift by a pixel", [shift(1, 0)], judged=("distance",)),
                Smoothing("fewer greys", [fewer_greys], judged=("reversal",)),
                Smoothing("compression", [Smooth.jpeg(15, value_range=value_range)], judged=("margin",)),
            ]
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The groups' names."""
        return tuple(group.name for group in self.groups)

    @property
    def passes(self) -> float:
        """Forward passes for one image."""
        return 1 + sum(group.passes for group in self.groups)

    @property
    def differentiable(self) -> bool:
        """Whether the effects of every group have a gradient."""
        return all(group.differentiable for group in self.groups)

    def measure(self, view: View) -> dict[str, Response]:
        """What every group does to a batch of images."""
        return {group.name: group.respond(view) for group in self.groups}

    def prepared(self, classifier: ClassifierWrapper, images: Tensor, *, n_epochs: int, seed: int) -> Signature:
        """The signature, its groups having learned what they need from clean images (N, C, H, W)."""
        groups = [one.prepared(classifier, images, n_epochs=n_epochs, seed=seed) for one in self.groups]
        return Signature(groups, leading=self.leading)

    def tensors(self) -> dict[str, Tensor]:
        """What the groups have learned."""
        return {f"{one.name}/{key}": value for one in self.groups for key, value in one.tensors().items()}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Signature:
        """The signature with what :meth:`tensors` gave."""
        groups = []
        for one in self.groups:
            start = f"{one.name}/"
            own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            groups.append(one.with_tensors(own))
        return Signature(groups, leading=self.leading)

    def verdicts(self, fitted: Fitted) -> list[str]:
        """What each column of :meth:`Fitted.deviations` is: a group, or one of its interventions by its margin."""
        names = []
        for one in self.groups:
            judge = fitted.judges[one.name]
            names += [one.name] * (judge.distance is not None)
            names += [f"{one.name}: {what}" for what in one.interventions()] * (judge.reversal is not None)
            names += [f"{one.name}: {what}, margin left" for what in one.interventions()] * (judge.left is not None)
        return names + ["known attacks"] * (fitted.known is not None)

    def settings(self) -> list[dict[str, Any]]:
        """What :meth:`from_settings` makes the signature of again, as JSON takes it."""
        leading = () if self.leading is None else self.leading
        return [
            {"kind": type(one).__name__, **({"leading": True} if one.name in leading else {}), **one.settings()}
            for one in self.groups
        ]

    @classmethod
    def from_settings(cls, settings: Sequence[dict[str, Any]]) -> Signature:
        """The signature whose :meth:`settings` these are.

        Raises:
            FileError: a group of a kind that this version does not know.
        """
        groups = []
        for one in settings:
            kind = one["kind"]
            if kind not in _KINDS:
                raise FileError(expected("path", f"a signature of groups among {sorted(_KINDS)}", repr(kind)))
            groups.append(_KINDS[kind](**{name: one[name] for name in one if name not in ("kind", "leading")}))
        leading = [group.name for group, one in zip(groups, settings, strict=True) if one.get("leading")]
        return cls(groups, leading=leading or None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.settings() == other.settings()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        leading = "" if self.leading is None else f", leading={self.leading!r}"
        return f"Signature([{', '.join(map(repr, self.groups))}]{leading})"


def digests(images: Tensor) -> list[int]:
    """A number for each image that only an equal image has: 63 bits of a hash of its values in float32.

    Example:
        >>> one, two = digests(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]))
        >>> one == two
        False
    """
    values = images.detach().float().cpu().contiguous().numpy()
    return [int.from_bytes(hashlib.blake2b(value.tobytes(), digest_size=8).digest(), "big") >> 1 for value in values]


def measured(
    classifier: ClassifierWrapper,
    signature: Signature,
    images: Tensor,
    *,
    batch_size: int,
    seed: int,
    altered: Callable[[Tensor, list[int]], Tensor] | None = None,
    ids: Sequence[int] | None = None,
) -> Sample:
    """What every group does to every image; the network and the random state stay as they are.

    Args:
        classifier: the classifier.
        signature: what is measured.
        images: (N, C, H, W), image units, checked.
        batch_size: images at a time.
        seed: of interventions that draw random numbers.
        altered: applied to each batch first, with the images' ids.
        ids: one per image; None takes their digests, so that nothing depends on an image's place.
    """
    names = list(ids) if ids is not None else digests(images)
    parts = []
    # Inside inference mode no group could ask for a gradient.
    with classifier.guarded(), torch.inference_mode(False), torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch, own = images[start : start + batch_size], names[start : start + batch_size]
            view = View(classifier, batch if altered is None else altered(batch, own), own, seed)
            responses = {name: one.detached() for name, one in signature.measure(view).items()}
            parts.append(Sample(responses, view.logits.detach().cpu()))
    return Sample.joined(parts)


def checked_count(name: str, count: int) -> int:
    """A positive whole number that the user gave.

    Raises:
        ArgumentError: something else.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ArgumentError(expected(name, "a positive whole number", repr(count)))
    return count
