"""Explanations of alarms: which interventions, which channels, which regions."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

import torch
from torch import Tensor

from ce_plugin._lazy import warn_renamed
from ce_plugin.attribution import CausalEffect, LayerCausalEffect
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.fitting import State
from ce_plugin.detection.probes import View
from ce_plugin.detection.scorers import EffectDistance, Sample
from ce_plugin.detection.signature import Signature, digests
from ce_plugin.interventions import Patch
from ce_plugin.interventions.base import Intervention
from ce_plugin.visualization import overlay

_SHOWN = 5
# Windows of a seventh of the side, half overlapping.
_WINDOWS = 7


@dataclass(frozen=True)
class UnusualEffect:
    """One effect that clean images of the predicted class do not have.

    Args:
        what: the intervention and the outcome, in words.
        effect: of this image.
        usual: the centre for clean images of its predicted class.
        deviations: distance from the centre in the class's scales, with its sign.
    """

    what: str
    effect: float
    usual: float
    deviations: float

    def __str__(self) -> str:
        return f"{self.what}: {self.effect:+.3g}, usual {self.usual:+.3g} ({self.deviations:+.1f} scales)"


@dataclass(frozen=True)
class Alarm:
    """The explanation of one image's alarm.

    Args:
        deviations: name of a probe or intervention -> how unusual it is, in standard deviations, most unusual first.
        effects: the most unusual effects, at most five from each probe.
        turned_to: class that the intervention with the smallest margin leaves as the answer.
        intervention: that intervention.
        channels: channel -> contribution to the predicted class's margin of its departure from the run under the
            strongest intervention on the input (a filter), the largest first; empty where no layer was named.
        regions: (H, W): how much this intervention on each place alone takes from the margin; positive: the answer
            depends on what it removes there. None where no probe has such an intervention on the input.
    """

    deviations: dict[str, float]
    effects: tuple[UnusualEffect, ...]
    turned_to: int
    intervention: str
    channels: dict[int, float] = field(repr=False)
    regions: Tensor | None = field(repr=False)

    @property
    def verdicts(self) -> dict[str, float]:
        """The old name of :attr:`deviations`; it will be removed in the next version."""
        warn_renamed("Alarm.verdicts", "Alarm.deviations")
        return self.deviations

    def __str__(self) -> str:
        lines = [f"{self.intervention} leaves class {self.turned_to}"]
        lines += [f"{name}: {value:+.1f}" for name, value in list(self.deviations.items())[:3]]
        return "; ".join([*lines, *map(str, self.effects[:2])])

    def _repr_html_(self) -> str:
        """What a notebook shows: where the answer depends on what is removed, and which effects are unusual."""
        rows = "".join(f"<li>{escape(str(one))}</li>" for one in self.effects)
        said = f"<p>{escape(self.intervention)} leaves class {self.turned_to} as the answer. Unusual effects:</p>"
        if self.regions is None:
            return f"<div>{said}<ul>{rows}</ul></div>"
        plane = self.regions.detach().cpu()
        figure = overlay(plane, torch.full((1, *plane.shape), 0.5), width=240, title="where the answer depends on it")
        return f'<div>{said}<div style="display:flex;gap:1em">{figure._repr_html_()}<ul>{rows}</ul></div></div>'


def explained(
    classifier: ClassifierWrapper,
    state: State,
    sample: Sample,
    image: Tensor,
    deviations: dict[str, float],
    layer: str | None,
) -> Alarm:
    """The explanation of the alarm of one image, (1, C, H, W).

    Args:
        classifier: the classifier.
        state: the fitted state of the detector.
        sample: the image's responses.
        image: the image.
        deviations: its own, by the names of their columns.
        layer: dotted name of the layer whose channels are wanted, or None.
    """
    interventions = [one for probe in state.signature.probes for one in probe.input_interventions()]
    strongest = _strongest(classifier, interventions, image) if interventions else None
    what, turned_to = _turned(state.signature, sample)
    return Alarm(
        deviations=dict(sorted(deviations.items(), key=lambda one: -one[1])),
        effects=tuple(sorted(_effects(state, sample), key=lambda one: -abs(one.deviations))),
        turned_to=turned_to,
        intervention=what,
        channels={} if layer is None or strongest is None else _channels(classifier, layer, strongest, image, sample),
        regions=None if strongest is None else _regions(classifier, strongest, image, sample),
    )


def _effects(state: State, sample: Sample) -> list[UnusualEffect]:
    """The most unusual effects of each probe."""
    found = []
    for probe, scorer in zip(state.signature.probes, state.scorer.probes, strict=True):
        labels = probe.labels(sample.idle.shape[1])
        distance = scorer.distance
        if not isinstance(distance, EffectDistance) or not labels:
            continue
        effect, k = sample.responses[probe.name].effects[0], int(sample.predicted)
        classes = distance.classes
        center = classes.center[k, : len(labels)]
        away = (effect.to(center) - center) / classes.scale[k, : len(labels)]
        most = away.abs().topk(min(_SHOWN, len(labels))).indices.tolist()
        found += [UnusualEffect(labels[i], float(effect[i]), float(center[i]), float(away[i])) for i in most]
    return found


def _turned(signature: Signature, sample: Sample) -> tuple[str, int]:
    """The intervention that leaves the smallest margin, and the answer under it."""
    found = []
    for probe in signature.probes:
        response = sample.responses[probe.name]
        if response.margins.shape[1]:
            i = int(response.margins[0].argmin())
            found.append((float(response.margins[0, i]), probe.interventions()[i], int(response.answers[0, i])))
    if not found:
        return "no intervention", int(sample.predicted)
    _, what, answer = min(found, key=lambda one: one[0])
    return what, answer


def _strongest(classifier: ClassifierWrapper, interventions: list[Intervention], image: Tensor) -> Intervention:
    """The intervention that takes most from the predicted class."""
    with classifier.guarded(), torch.no_grad():
        view = View(classifier, image, digests(image))
        k = int(view.predicted)
        return min(interventions, key=lambda one: float(view.do(one)[0, k]))


def _regions(classifier: ClassifierWrapper, intervention: Intervention, image: Tensor, sample: Sample) -> Tensor:
    """Contribution to the margin of what the intervention removes, place by place."""
    sides = image.shape[-2:]
    window = tuple(max(2, -(-side // _WINDOWS) * 2) for side in sides)
    stride = tuple(max(1, side // 2) for side in window)
    shape = (image.shape[1], *window)
    explainer = CausalEffect(classifier, intervention, outcome="margin")
    found = explainer.attribute(
        image, target=sample.predicted.to(image.device), sliding_window_shapes=shape, strides=(image.shape[1], *stride)
    )
    regions: Tensor = found[0].mean(0)
    return regions.detach().cpu()


def _channels(
    classifier: ClassifierWrapper, layer: str, intervention: Intervention, image: Tensor, sample: Sample
) -> dict[int, float]:
    """Channels by what setting each to its value under the intervention takes from the margin."""
    explainer = LayerCausalEffect(
        classifier, classifier.module(layer), Patch(intervention.perturb(image)), outcome="margin"
    )
    effect = explainer.estimate(image, target=sample.predicted.to(image.device)).effect[0, :, 0]
    order = (-effect).topk(min(_SHOWN, len(effect))).indices.tolist()
    return {i: float(-effect[i]) for i in order}
