"""Why an image raised an alarm: which interventions, which channels, which regions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ce_plugin.attribution import CausalEffect, LayerCausalEffect
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.fitting import State
from ce_plugin.detection.probes import Smoothing, View
from ce_plugin.detection.scorers import Fitted, Sample
from ce_plugin.detection.signature import Signature, digests
from ce_plugin.interventions import Patch, Smooth

__all__ = ["Alarm", "UnusualEffect", "explained"]

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
    """What raised the alarm for one image.

    Args:
        verdicts: name of a group or intervention -> its standardised distance, the most unusual first.
        effects: the most unusual effects, at most five from each group.
        turned_to: class that the intervention with the smallest margin leaves as the answer.
        intervention: that intervention.
        channels: channel -> contribution to the predicted class's margin of its departure from the smoothed run, the
            largest first; empty where no layer was named.
        regions: (H, W): how much smoothing each place alone takes from the margin; positive: the answer rests on what
            smoothing removes there. None where the signature smooths nothing.
    """

    verdicts: dict[str, float]
    effects: tuple[UnusualEffect, ...]
    turned_to: int
    intervention: str
    channels: dict[int, float] = field(repr=False)
    regions: Tensor | None = field(repr=False)

    def __str__(self) -> str:
        lines = [f"{self.intervention} leaves class {self.turned_to}"]
        lines += [f"{name}: {value:+.1f}" for name, value in list(self.verdicts.items())[:3]]
        return "; ".join([*lines, *map(str, self.effects[:2])])


def explained(
    classifier: ClassifierWrapper,
    state: State,
    sample: Sample,
    image: Tensor,
    deviations: Tensor,
    layer: str | None,
) -> Alarm:
    """Why one image, (1, C, H, W), raised an alarm.

    Args:
        classifier: the classifier.
        state: what is measured, and what is usual.
        sample: the image's responses.
        image: the image.
        deviations: its verdicts, (D,).
        layer: dotted name of the layer whose channels are wanted, or None.
    """
    signature, fitted = state.signature, state.fitted
    names = signature.verdicts(fitted)
    order = deviations.argsort(descending=True).tolist()
    verdicts = {names[i]: float(deviations[i]) for i in order}
    effects = tuple(sorted(_effects(signature, fitted, sample), key=lambda one: -abs(one.deviations)))
    filters = [one for group in signature.groups if isinstance(group, Smoothing) for one in group.filters]
    what, turned_to = _turned(signature, sample)
    strongest = _strongest(classifier, filters, image) if filters else None
    return Alarm(
        verdicts=verdicts,
        effects=effects,
        turned_to=turned_to,
        intervention=what,
        channels={} if layer is None or strongest is None else _channels(classifier, layer, strongest, image, sample),
        regions=None if strongest is None else _regions(classifier, strongest, image, sample),
    )


def _effects(signature: Signature, fitted: Fitted, sample: Sample) -> list[UnusualEffect]:
    """The most unusual effects of each group."""
    found = []
    for group in signature.groups:
        distance = fitted.judges[group.name].distance
        labels = group.labels(sample.idle.shape[1])
        if distance is None or not labels:
            continue
        effect = sample.responses[group.name].effects[0]
        n, predicted = len(labels), sample.predicted
        scale = distance.scale
        center = scale.center[predicted[0], :n]
        away = (effect.to(center) - center) / scale.scale[predicted[0], :n]
        most = away.abs().topk(min(_SHOWN, n)).indices.tolist()
        found += [UnusualEffect(labels[i], float(effect[i]), float(center[i]), float(away[i])) for i in most]
    return found


def _turned(signature: Signature, sample: Sample) -> tuple[str, int]:
    """The intervention that leaves the smallest margin, and the answer under it."""
    found = []
    for group in signature.groups:
        response = sample.responses[group.name]
        if response.margins.shape[1]:
            i = int(response.margins[0].argmin())
            found.append((float(response.margins[0, i]), group.interventions()[i], int(response.answers[0, i])))
    if not found:
        return "no intervention", int(sample.predicted[0])
    _, what, answer = min(found, key=lambda one: one[0])
    return what, answer


def _strongest(classifier: ClassifierWrapper, filters: list[Smooth], image: Tensor) -> Smooth:
    """The filter that takes most from the predicted class."""
    with classifier.guarded(), torch.no_grad():
        view = View(classifier, image, digests(image))
        k = int(view.predicted)
        return min(filters, key=lambda one: float(view.do(one)[0, k]))


def _regions(classifier: ClassifierWrapper, smooth: Smooth, image: Tensor, sample: Sample) -> Tensor:
    """Contribution to the margin of what smoothing removes, place by place."""
    sides = image.shape[-2:]
    window = tuple(max(2, -(-side // _WINDOWS) * 2) for side in sides)
    stride = tuple(max(1, side // 2) for side in window)
    shape = (image.shape[1], *window)
    explainer = CausalEffect(classifier, smooth, outcome="margin")
    found = explainer.attribute(
        image, target=sample.predicted.to(image.device), sliding_window_shapes=shape, strides=(image.shape[1], *stride)
    )
    regions: Tensor = found[0].mean(0)
    return regions.detach().cpu()


def _channels(
    classifier: ClassifierWrapper, layer: str, smooth: Smooth, image: Tensor, sample: Sample
) -> dict[int, float]:
    """Channels by what setting each to its value in the smoothed run takes from the margin."""
    explainer = LayerCausalEffect(classifier, classifier.module(layer), Patch(smooth.perturb(image)), outcome="margin")
    effect = explainer.estimate(image, target=sample.predicted.to(image.device)).effect[0, :, 0]
    order = (-effect).topk(min(_SHOWN, len(effect))).indices.tolist()
    return {i: float(-effect[i]) for i in order}
