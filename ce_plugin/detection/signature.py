"""The signature of an image: the effects of probes, named interventions on the network's input or nodes."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ce_plugin._lazy import renamed_keywords, warn_renamed
from ce_plugin.detection.augmentation import SMALL, Augmentation
from ce_plugin.detection.checkpoint import Checkpoint, shards
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.denoiser import STEP
from ce_plugin.detection.probes import (
    SIDES,
    CounterAttack,
    Denoising,
    Probe,
    Smoothing,
    View,
    probe_from_settings,
)
from ce_plugin.detection.scorers import Sample
from ce_plugin.errors import ArgumentError, expected, unknown_name
from ce_plugin.interventions import Smooth


class Signature:
    """Which probes a detector looks at.

    Args:
        probes: their names differ.
        leading: names of the probes that count in full; of the others only what is beyond two standard
            deviations counts, so that looking very usual to them gains nothing. None: all count in full.

    Attributes:
        probes, leading: as given.
        names: the probes' names.
        passes: forward passes for one image, the idle run included; a backward pass counts as two.
        differentiable: whether the effects of every probe have a gradient.

    Raises:
        ArgumentError: no probe, or two of one name.
        UnknownNameError: no probe of a name in ``leading``.

    Example:
        >>> signature = Signature([Smoothing("blur", [Smooth.gauss(1.0)]), CounterAttack()])
        >>> signature.passes
        4
        >>> Signature.small_images().names
        ('denoising', 'counter-attack', 'filters', 'threshold')
    """

    @renamed_keywords(groups="probes")
    def __init__(self, probes: Sequence[Probe], *, leading: Sequence[str] | None = None) -> None:
        wanted, names = "at least one Probe, and nothing else", []
        if isinstance(probes, Probe) or not isinstance(probes, Iterable):
            hint = "Put it into a list." if isinstance(probes, Probe) else ""
            raise ArgumentError(expected("probes", "a list of Probes", type(probes).__name__, hint))
        if leading is not None and (isinstance(leading, str) or not isinstance(leading, Iterable)):
            raise ArgumentError(expected("leading", "one or more names of probes, or None", repr(leading)))
        self.probes = tuple(probes)
        self.leading = None if leading is None else tuple(leading)
        if not self.probes:
            raise ArgumentError(expected("probes", wanted, "none"))
        for probe in self.probes:
            if not isinstance(probe, Probe):
                raise ArgumentError(expected("probes", wanted, [type(probe).__name__]))
            names.append(probe.name)
        self.names = tuple(names)
        if len(set(self.names)) < len(self.names):
            raise ArgumentError(expected("probes", "probes of different names", list(self.names), "Pass `name=`."))
        if self.leading == ():
            raise ArgumentError(expected("leading", "one or more names of probes, or None", repr(leading)))
        for name in self.leading or ():
            if name not in self.names:
                raise unknown_name("leading", name, self.names)

    @classmethod
    def of(cls, shape: Sequence[int], value_range: tuple[float, float] = (0.0, 1.0)) -> Signature:
        """The default for images of a shape (C, H, W): small pictures, or photographs."""
        if len(shape) != 3:
            raise ArgumentError(expected("shape", "that of an image, (C, H, W)", tuple(shape)))
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
    def adversarially_trained(
        cls, value_range: tuple[float, float] = (0.0, 1.0), *, eps: float | None = None
    ) -> Signature:
        """For small pictures, where attackers may know the detector: an adversarially trained denoiser leads.

        An attacker who knows :meth:`small_images` makes an image look usual to each of its interventions, and probes to
        which it looks very usual offset the others. Here the margin that an adversarially trained denoiser leaves
        counts in full, and the other probes only where an image is clearly unusual, so that nothing can be offset.
        Attacks that do not know the detector are detected a little less often, and fitting takes several times as
        long, for the denoiser is attacked at each step of its training.

        Args:
            value_range: least and greatest value of an image.
            eps: greatest change of a value in adversarial training; None: three tenths of the range.

        Example:
            >>> Signature.adversarially_trained().names
            ('denoising', 'hardened denoising')
        """
        bound = 0.3 * (value_range[1] - value_range[0]) if eps is None else eps
        name = "hardened denoising"  # as reports and files have called it
        hard = Denoising(least_steps=3000, eps=bound, judged=("margin",), name=name)
        return cls([Denoising(), hard], leading=[name])

    @classmethod
    def hardened(cls, value_range: tuple[float, float] = (0.0, 1.0), *, eps: float | None = None) -> Signature:
        """The old name of :meth:`adversarially_trained`; it will be removed in the next version."""
        warn_renamed("Signature.hardened", "Signature.adversarially_trained")
        return cls.adversarially_trained(value_range, eps=eps)

    @classmethod
    def photographs(cls, value_range: tuple[float, float] = (0.0, 1.0)) -> Signature:
        """For photographs of a hundred pixels a side and more.

        A network gives a shifted photograph the same class; an attack is made for one position of the pixels.
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
    def groups(self) -> tuple[Probe, ...]:
        """The old name of :attr:`probes`; it will be removed in the next version."""
        warn_renamed("Signature.groups", "Signature.probes")
        return self.probes

    @property
    def passes(self) -> float:
        """Forward passes for one image."""
        return 1 + sum(probe.passes for probe in self.probes)

    @property
    def differentiable(self) -> bool:
        """Whether the effects of every probe have a gradient."""
        return all(probe.differentiable for probe in self.probes)

    def fit(
        self,
        classifier: ClassifierWrapper,
        images: Tensor,
        *,
        n_epochs: int,
        seed: int,
        checkpoint: Checkpoint | None = None,
    ) -> Signature:
        """A copy whose probes have learned what they need from clean images (N, C, H, W)."""
        probes = copy.deepcopy(self.probes)
        for probe in probes:
            saved = {"checkpoint": checkpoint} if "checkpoint" in inspect.signature(probe.fit).parameters else {}
            probe.fit(classifier, images, n_epochs=n_epochs, seed=seed, **saved)
        return Signature(probes, leading=self.leading)

    def respond(self, view: View) -> Sample:
        """What every probe does to a batch of images, with gradients where the view has them."""
        responses = {}
        for probe in self.probes:
            responses[probe.name] = probe.respond(view)
        return Sample(responses, view.logits)

    def measure(
        self,
        classifier: ClassifierWrapper,
        images: Tensor,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None = None,
        checkpoint: Checkpoint | None = None,
        name: str = "images",
    ) -> Sample:
        """What every probe does to every image; the network and the random state stay as they are.

        Args:
            classifier: the classifier.
            images: (N, C, H, W), image units, checked.
            batch_size: images at a time.
            seed: of interventions that draw random numbers.
            augmentation: applied to the images first.
            checkpoint: where the responses are saved, some batches at a time, or read.
            name: of the images in it.

        Returns:
            The responses, without gradients, on the CPU.
        """
        saved, parts = checkpoint or Checkpoint(), []
        for rows in shards(len(images), batch_size):
            measure = functools.partial(self._measured, classifier, images[rows], batch_size, seed, augmentation)
            parts.append(Sample.from_dict(saved.stage(f"{name} {rows.start}", measure)))
            saved.tick(name, -(-(rows.stop - rows.start) // STEP))
        return Sample.joined(parts)

    def _measured(
        self,
        classifier: ClassifierWrapper,
        images: Tensor,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None,
    ) -> dict[str, Any]:
        parts = []
        # Inside inference mode no probe could ask for a gradient.
        with classifier.guarded(), torch.inference_mode(False), torch.no_grad():
            for batch in torch.split(images, batch_size):
                # Random numbers depend on the image and not on its place in the batch.
                ids = digests(batch)
                altered = batch if augmentation is None else augmentation(batch, ids, seed)
                parts.append(self.respond(View(classifier, altered, ids, seed)).detached())
        return Sample.joined(parts).to_dict()

    def columns(self, sample: Sample) -> list[str]:
        """What each column of :meth:`Scorer.deviations` is: a probe, or one of its interventions by its margin.

        Raises:
            ArgumentError: a probe does not name each of the interventions whose margins it gives.
        """
        names = []
        for probe in self.probes:
            response, interventions = sample.responses[probe.name], probe.interventions()
            n_margins = max(response.margins.shape[1], response.left.shape[1])
            if n_margins > len(interventions):
                got = f"{len(interventions)} names"
                raise ArgumentError(expected("interventions", f"{n_margins} names, one for each margin", got))
            names += [probe.name] * ("distance" in response.sides)
            for side, suffix in (("reversal", ""), ("margin", ", margin left")):
                if side in response.sides:
                    names += [f"{probe.name}: {one}{suffix}" for one in interventions]
        return names

    def settings(self) -> list[dict[str, Any]]:
        """What :meth:`from_settings` makes the signature of again, as JSON takes it."""
        settings = []
        for one in self.probes:
            about = {"kind": one.kind, "module": type(one).__module__, "settings": one.settings()}
            settings.append({**about, "leading": one.name in (self.leading or ())})
        return settings

    @classmethod
    def from_settings(cls, settings: Sequence[dict[str, Any]]) -> Signature:
        """The signature whose :meth:`settings` these are.

        Raises:
            FileError: a probe of a kind that is not defined here.
        """
        probes = [probe_from_settings(one["kind"], one["module"], one["settings"]) for one in settings]
        leading = [probe.name for probe, one in zip(probes, settings, strict=True) if one["leading"]]
        return cls(probes, leading=leading or None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.settings() == other.settings()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        leading = "" if self.leading is None else f", leading={self.leading!r}"
        return f"Signature([{', '.join(map(repr, self.probes))}]{leading})"


def digests(images: Tensor) -> list[int]:
    """A hash of each image: 63 bits of BLAKE2 of its values in float32.

    Example:
        >>> one, two = digests(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]))
        >>> one == two
        False
    """
    hashes = []
    for value in images.detach().float().cpu().contiguous().numpy():
        digest = hashlib.blake2b(value.tobytes(), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "big") >> 1)
    return hashes
