"""What a detector has learned from images, and how it turns what interventions do into a score."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.detection.aggregation import aggregate
from ce_plugin.detection.group import Response
from ce_plugin.detection.recognition import Recogniser
from ce_plugin.detection.reference import EffectDistance
from ce_plugin.detection.reversal import Reversal
from ce_plugin.detection.view import leading_logits
from ce_plugin.randomness import generator

__all__ = ["Fitted", "Judge", "Sample", "learn"]

_FOLDS = 4
_LARGEST = 3
_OWN = ("center", "spread", "usual", "allowance")
# Standard deviations up to which the verdicts of groups that do not lead hardly count.
_ALLOWANCE = 2.0


@dataclass(frozen=True)
class Sample:
    """Measured images.

    Args:
        responses: of each group.
        idle: logits without any intervention, (N, K).
    """

    responses: dict[str, Response]
    idle: Tensor

    @property
    def predicted(self) -> Tensor:
        """Classes, (N,)."""
        return self.idle.detach().argmax(1)

    def traits(self) -> Tensor:
        """All effects and margins (their inverse hyperbolic sines) and the leading logits in a row, (N, P), float64."""
        measured = [part for one in self.responses.values() for part in one.parts()[:2]]
        leading = leading_logits(self.idle)
        largest = leading.topk(min(_LARGEST, leading.shape[1]), dim=1).values
        return torch.cat([*(part.double().asinh() for part in measured), leading.double(), largest.double()], 1)

    def __len__(self) -> int:
        return len(self.idle)

    def select(self, rows: Tensor | slice) -> Sample:
        """Some of them."""
        responses = {name: one.select(rows) for name, one in self.responses.items()}
        return Sample(responses, self.idle[rows])

    @staticmethod
    def joined(samples: list[Sample]) -> Sample:
        """Several one after the other."""
        names = samples[0].responses
        responses = {name: Response.joined([one.responses[name] for one in samples]) for name in names}
        return Sample(responses, torch.cat([one.idle for one in samples]))


@dataclass(frozen=True)
class Judge:
    """The three ways in which a group can be unusual.

    Args:
        distance: of effects and idle logits from those of clean images; None where the group has no effects.
        reversal: what its interventions take from the predicted class beyond the usual; None where it has no margins.
        left: the margins that they leave, whatever the idle logits promise; None where these are not judged.
    """

    distance: EffectDistance | None
    reversal: Reversal | None
    left: Reversal | None = None

    @classmethod
    def fit(cls, response: Response, sample: Sample) -> Judge:
        """Learn from clean images."""
        n_classes = sample.idle.shape[1]
        effects, margins, _, left = response.parts()
        return cls(
            EffectDistance.fit(_beside(response, sample), sample.predicted, n_classes) if effects.shape[1] else None,
            Reversal.fit(margins, sample.idle) if margins.shape[1] else None,
            Reversal.fit(left, sample.idle, conditional=False) if left.shape[1] else None,
        )

    def __call__(self, response: Response, sample: Sample) -> Tensor:
        """Distance, then each reversal, then each margin, (N, up to 1 + 2 S), float64."""
        columns = []
        if self.distance is not None:
            columns.append(self.distance(_beside(response, sample), sample.predicted)[:, None])
        if self.reversal is not None:
            columns.append(self.reversal(response.margins, sample.idle))
        if self.left is not None:
            columns.append(self.left(response.parts()[3], sample.idle))
        return torch.cat(columns, 1)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        distance = {} if self.distance is None else self.distance.tensors()
        reversal = {} if self.reversal is None else self.reversal.tensors()
        left = {} if self.left is None else self.left.tensors()
        return {**_under("distance", distance), **_under("reversal", reversal), **_under("left", left)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Judge:
        """What :meth:`tensors` gave."""
        distance, reversal, left = (_inside(side, tensors) for side in ("distance", "reversal", "left"))
        return cls(
            EffectDistance.from_tensors(distance) if distance else None,
            Reversal.from_tensors(reversal, conditional=True) if reversal else None,
            Reversal.from_tensors(left, conditional=False) if left else None,
        )

    def to(self, device: torch.device) -> Judge:
        """The same on another device."""
        return Judge(
            None if self.distance is None else self.distance.to(device),
            None if self.reversal is None else self.reversal.to(device),
            None if self.left is None else self.left.to(device),
        )


@dataclass(frozen=True)
class Fitted:
    """A judge for each group, what its verdicts are like on clean images, and what attacked images have taught.

    Args:
        judges: group -> judge.
        center, spread: mean and standard deviation of each verdict on clean images that the judge was not fitted on,
            (D,), float64.
        usual: traits of the clean images, each as it is and harmlessly altered, (n, V, P).
        allowance: what is taken from each verdict before it counts, (D,): 0 for groups that lead, else 2.
        how: see :func:`~ce_plugin.detection.aggregation.aggregate`.
        known: recognises attacks that were shown; None: none were.
    """

    judges: dict[str, Judge] = field(repr=False)
    center: Tensor = field(repr=False)
    spread: Tensor = field(repr=False)
    usual: Tensor = field(repr=False)
    allowance: Tensor = field(repr=False)
    how: str
    known: Recogniser | None = field(default=None, repr=False)

    def deviations(self, sample: Sample) -> Tensor:
        """Every verdict, centred and scaled on clean images, (N, D), float64; the likeness to known attacks is last."""
        deviations = (_verdicts(self.judges, sample) - self.center) / self.spread
        return self.with_likeness(deviations, sample.traits())

    def with_likeness(self, deviations: Tensor, traits: Tensor) -> Tensor:
        """Deviations with the likeness to known attacks as last column, anew where they have one already."""
        own = deviations[:, : len(self.center)]
        return own if self.known is None else torch.cat([own, self.known(traits)[:, None]], 1)

    def score(self, deviations: Tensor) -> Tensor:
        """The scores (N,), float64."""
        known = deviations.shape[1] - len(self.allowance)
        return aggregate(deviations - F.pad(self.allowance, (0, known)), self.how)

    def taught(self, attacked: Sample, seed: int) -> Fitted:
        """The same, with what these attacked images have in common that clean ones have not."""
        return replace(self, known=Recogniser.fit(self.usual, attacked.traits(), seed))

    def to(self, device: torch.device) -> Fitted:
        """The same on another device; what only learning takes, ``usual``, stays where it is."""
        judges = {name: one.to(device) for name, one in self.judges.items()}
        known = None if self.known is None else self.known.to(device)
        center, spread, allowance = (one.to(device) for one in (self.center, self.spread, self.allowance))
        return Fitted(judges, center, spread, self.usual, allowance, self.how, known)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        inner = {key: value for name, one in self.judges.items() for key, value in _under(name, one.tensors()).items()}
        known = {} if self.known is None else self.known.tensors()
        return {**_under("judges", inner), **_under("known", known), **{name: getattr(self, name) for name in _OWN}}

    @classmethod
    def from_tensors(cls, names: tuple[str, ...], tensors: Mapping[str, Any], how: str) -> Fitted:
        """What :meth:`tensors` gave."""
        judges = {name: Judge.from_tensors(_inside(f"judges/{name}", tensors)) for name in names}
        # Files of older versions have no allowance.
        own = {
            "allowance": torch.zeros_like(tensors["center"]),
            **{name: tensors[name] for name in _OWN if name in tensors},
        }
        known = _inside("known", tensors)
        return cls(judges, **own, how=how, known=Recogniser.from_tensors(known) if known else None)


def learn(
    clean: Sample, altered: Sample | None, *, how: str, seed: int, leading: Collection[str] | None = None
) -> Fitted:
    """Learn what clean images are like.

    Centre and spread of the verdicts come from images that the judge was not fitted on (four folds), for on its own
    images every distance is too small.

    Args:
        clean: clean images.
        altered: harmless alterations of the same images, one each, in the same order, or None.
        how: of :func:`~ce_plugin.detection.aggregation.aggregate`.
        seed: of the folds.
        leading: names of the groups that count in full; None: all.
    """
    folds = torch.arange(len(clean)) % _FOLDS
    folds = folds[torch.randperm(len(clean), generator=generator(seed, "folds"))]
    parts = []
    for fold in range(_FOLDS):
        judges = _fit(clean, altered, (folds != fold).nonzero().squeeze(1))
        parts.append(_verdicts(judges, clean.select((folds == fold).nonzero().squeeze(1))))
    held_out = torch.cat(parts)
    center, spread = held_out.mean(0), held_out.std(0).clamp_min(1e-9)
    judges = _fit(clean, altered, torch.arange(len(clean)))
    versions = [clean, *([altered] if altered is not None else [])]
    usual = torch.stack([one.traits() for one in versions], 1)
    return Fitted(judges, center, spread, usual, _allowance(judges, clean, leading), how)


def _fit(clean: Sample, altered: Sample | None, rows: Tensor) -> dict[str, Judge]:
    parts = [clean.select(rows), *([altered.select(rows)] if altered is not None else [])]
    sample = Sample.joined(parts)
    return {name: Judge.fit(response, sample) for name, response in sample.responses.items()}


def _allowance(judges: dict[str, Judge], sample: Sample, leading: Collection[str] | None) -> Tensor:
    """0 for each verdict of a group that leads, 2 for each of the others, (D,)."""
    one = sample.select(slice(0, 1))
    widths = {name: judge(one.responses[name], one).shape[1] for name, judge in judges.items()}
    taken = [0.0 if leading is None or name in leading else _ALLOWANCE for name in judges]
    return torch.tensor(taken, dtype=torch.float64).repeat_interleave(torch.tensor(list(widths.values())))


def _verdicts(judges: dict[str, Judge], sample: Sample) -> Tensor:
    return torch.cat([judge(sample.responses[name], sample) for name, judge in judges.items()], 1)


def _beside(response: Response, sample: Sample) -> Tensor:
    """Effects beside the idle logits: a distance then sees whether an effect fits the answer that it changed."""
    return torch.cat([response.effects, leading_logits(sample.idle).to(response.effects)], 1)


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in tensors.items()}


def _inside(name: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    start = f"{name}/"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
