"""Groups of interventions on the input, whose effects together make a signature."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ce_plugin.attribution import LayerCausalEffect
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.denoiser import Denoiser, train_denoiser
from ce_plugin.effects import resolve_outcome
from ce_plugin.errors import ArgumentError, InferenceError, expected
from ce_plugin.interventions import Denoise, Patch, PixelMask, Smooth, ZeroOut
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.networks.graph import flops_of
from ce_plugin.randomness import generator

__all__ = [
    "FEW",
    "RANKS",
    "SIDES",
    "CounterAttack",
    "Denoising",
    "Group",
    "Interchange",
    "NodeZeroing",
    "PixelMasking",
    "Response",
    "Smoothing",
    "View",
    "checked_sides",
    "effects_on_logits",
    "in_image_units",
    "labels_of",
    "leading_logits",
    "margin_under",
    "outcome_names",
    "response_of",
    "smooth_settings",
]


RANKS = 8
FEW = 20
_margin = resolve_outcome("margin")


class View:
    """One batch of images together with what all groups of a signature share, computed once.

    Args:
        network: images in image units to logits (N, K), in eval mode.
        images: (N, ...), in image units. Where they require a gradient, everything here has one.
        ids: one id per image, for interventions that draw random numbers.
        seed: seed of these.

    Attributes:
        logits: (N, K), in float32 at least.
        predicted: index of the largest logit, (N,).
    """

    def __init__(self, network: nn.Module, images: Tensor, ids: Sequence[int] | None = None, seed: int = 0) -> None:
        self.network = network
        self.differentiable = images.requires_grad and torch.is_grad_enabled()
        self.images = images
        self.context = Context(ids=tuple(ids) if ids is not None else (0,) * len(images), seed=seed)
        self._gradient: Tensor | None = None
        self.logits = self.run(images)
        self.predicted = self.logits.detach().argmax(1)

    def run(self, images: Tensor) -> Tensor:
        """Logits (N, K) of altered images: one forward pass."""
        return _widened(self.network(images))

    def do(self, intervention: Intervention) -> Tensor:
        """Logits (N, K) with every unit of the input set by an intervention."""
        return self.run(intervention.values(self.images, self.context))

    def margin(self) -> Tensor:
        """Logit of the predicted class minus the largest other one, (N,); zero or more."""
        return _margin(self.logits, self.logits).gather(1, self.predicted[:, None]).squeeze(1)

    def gradient(self) -> Tensor:
        """Gradient of the margin with respect to the images, of their shape, in float32 at least: two passes.

        It is computed once. For an attacker it has a gradient itself.
        """
        if self._gradient is None:
            self._gradient = self._margin_gradient()
        return self._gradient

    def _margin_gradient(self) -> Tensor:
        if self.differentiable:
            (gradient,) = torch.autograd.grad(self.margin().sum(), self.images, create_graph=True)
            return _widened(gradient)
        with torch.enable_grad():
            images = self.images.detach().requires_grad_(True)
            logits = self.run(images)
            margin = _margin(logits, logits).gather(1, self.predicted[:, None])
            (gradient,) = torch.autograd.grad(margin.sum(), images)
        return _widened(gradient)


def effects_on_logits(do: Tensor, idle: Tensor) -> Tensor:
    """What an intervention does to the logits, in a form that images of one predicted class share.

    With up to 20 classes these are the effects on every logit. With more they are the effects on the predicted class's
    logit, on those of the next ``RANKS`` classes in the order of the idle run, on the largest logit of any class but
    the predicted one, and on the logarithm of the sum of exponentials over all of these.

    Args:
        do: logits under the intervention, (N, K).
        idle: logits without it, (N, K).

    Returns:
        (N, F), outcome under do minus outcome when idle (Eq. 1): a negative effect on the predicted class means that
        the intervention takes away what supports it.

    Example:
        >>> effects_on_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([[-2.,  2.]])

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 1.
    """
    if idle.shape[1] <= FEW:
        return do - idle
    order = idle.detach().topk(RANKS + 1, dim=1).indices
    ranked = do.gather(1, order) - idle.gather(1, order)
    rivals = _without(do, order[:, :1]), _without(idle, order[:, :1])
    strongest = rivals[0].amax(1) - rivals[1].amax(1)
    together = rivals[0].logsumexp(1) - rivals[1].logsumexp(1)
    return torch.cat([ranked, strongest[:, None], together[:, None]], 1)


def margin_under(do: Tensor, idle: Tensor) -> Tensor:
    """The margin that the idle run's predicted class has under interventions.

    Args:
        do: logits (N, S, K).
        idle: logits (N, K).

    Returns:
        (N, S): below zero where the intervention changes the answer.
    """
    predicted = idle.detach().argmax(1)[:, None, None].expand(-1, do.shape[1], 1)
    rivals = do.scatter(2, predicted, -torch.inf).amax(2)
    return do.gather(2, predicted).squeeze(2) - rivals


def leading_logits(idle: Tensor) -> Tensor:
    """The idle logits in the form of :func:`effects_on_logits`: all of up to 20, else the largest, (N, F)."""
    return idle if idle.shape[1] <= FEW else idle.topk(RANKS + 1, dim=1).values


def outcome_names(n_classes: int, label: Callable[[int], str]) -> list[str]:
    """What the columns of :func:`effects_on_logits` are, in words."""
    if n_classes <= FEW:
        return [f"the logit of {label(k)}" for k in range(n_classes)]
    ranked = [f"the logit of class no. {rank + 1} in the idle order" for rank in range(1, RANKS + 1)]
    return ["the logit of the predicted class", *ranked, "the largest other logit", "all other logits together"]


def _without(logits: Tensor, index: Tensor) -> Tensor:
    return logits.scatter(1, index, -torch.inf)


def _widened(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


# "distance": are the effects unlike those of clean images, in any way? "reversal": does an intervention take more of
# the predicted class's margin than the idle logits promise? "margin": does it leave less than to clean images?
SIDES = ("distance", "reversal", "margin")


@dataclass(frozen=True)
class Response:
    """What a group's interventions did to a batch of images.

    Args:
        effects: (N, F), judged from both sides by their distance from those of clean images; F may be 0.
        margins: of the predicted class under each of S interventions, (N, S), judged from one side: does an
            intervention take away more than usual? S may be 0.
        answers: the class that each of the S interventions leaves as the answer, (N, S).
        left: the margins once more where they are also judged whatever the idle logits promise, (N, S); else (N, 0),
            or None for that.
    """

    effects: Tensor
    margins: Tensor
    answers: Tensor
    left: Tensor | None = None

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors."""
        return self.effects, self.margins, self.answers, self.effects[:, :0] if self.left is None else self.left

    def select(self, rows: Tensor | slice) -> Response:
        """That of some of the images."""
        return Response(*(part[rows] for part in self.parts()))

    def detached(self) -> Response:
        """Without gradients, on the CPU."""
        return Response(*(part.detach().cpu() for part in self.parts()))

    @staticmethod
    def joined(parts: Sequence[Response]) -> Response:
        """Those of several batches, one after the other."""
        columns = zip(*(one.parts() for one in parts), strict=True)
        return Response(*(torch.cat(column) for column in columns))


class Group(ABC):
    """Interventions whose effects are judged together: one distance, one place in the report.

    Attributes:
        name: what reports call it.
        passes: what it costs for one image, in forward passes of the network (a backward pass counts as two), the
            idle run not included.
        differentiable: whether its effects have a gradient with respect to the images.
    """

    name: str
    passes: float
    differentiable: bool = True

    @abstractmethod
    def respond(self, view: View) -> Response:
        """What the group's interventions do to a batch of images."""

    @abstractmethod
    def labels(self, n_classes: int) -> list[str]:
        """What each of the F effects is, in words: "Smooth.gauss(1.0) on the logit of class 3"; none where F is 0."""

    @abstractmethod
    def interventions(self) -> list[str]:
        """The interventions in words; where margins are looked at, these are the S."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that make this group again, as JSON takes them."""

    def ranges(self) -> list[tuple[float, float]]:
        """Least and greatest value of the images that its interventions were made for, where they depend on it."""
        return []

    def prepared(self, classifier: ClassifierWrapper, images: Tensor, *, n_epochs: int, seed: int) -> Group:
        """The group, having learned what it needs from clean images (N, C, H, W); most need nothing."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What it has learned."""
        return {}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Group:
        """The group with what :meth:`tensors` gave."""
        return self

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({inside})"


def response_of(view: View, runs: Sequence[Tensor], judged: tuple[str, ...]) -> Response:
    """Effects, margins and answers of interventions with these logits, as far as they are judged."""
    nothing = view.logits[:, :0]
    logits = torch.stack(list(runs), 1) if runs else None
    if logits is None:
        return Response(nothing, nothing, nothing.long())
    effects = torch.cat([effects_on_logits(run, view.logits) for run in runs], 1) if "distance" in judged else nothing
    margins, answers = margin_under(logits, view.logits), logits.argmax(2)
    sides = [margins if side in judged else nothing for side in SIDES[1:]]
    return Response(
        effects, sides[0], answers if any(side in judged for side in SIDES[1:]) else nothing.long(), sides[1]
    )


def checked_sides(judged: Sequence[str]) -> tuple[str, ...]:
    """From which sides a group is judged.

    Raises:
        ArgumentError: none, or unknown ones.
    """
    if isinstance(judged, str) or not judged or not set(judged) <= set(SIDES):
        raise ArgumentError(expected("judged", f"one or more of {SIDES}", repr(judged)))
    return tuple(side for side in SIDES if side in judged)


def in_image_units(smooth: Smooth | dict[str, Any]) -> Smooth:
    """A smoothing, or the arguments that make it, as a group can use it.

    Raises:
        ArgumentError: it expects normalised images, and would smooth images in image units wrongly.
    """
    made = smooth if isinstance(smooth, Smooth) else Smooth(**smooth)
    if not made.normalization.is_identity:
        hint = "Images come to a detector in image units: leave `normalization` out of the filter."
        raise ArgumentError(expected("filters", "in image units", repr(made), hint))
    return made


def smooth_settings(smooth: Smooth) -> dict[str, Any]:
    """The arguments that make a smoothing again, as JSON takes them."""
    return {"steps": [list(step) for step in smooth.steps], "value_range": list(smooth.value_range)}


def labels_of(interventions: Sequence[str], n_classes: int) -> list[str]:
    """One label for each intervention and outcome."""
    outcomes = outcome_names(n_classes, "class {}".format)
    return [f"{one} on {outcome}" for one in interventions for outcome in outcomes]


_TINY = 1e-12


class Smoothing(Group):
    """Effects of do(x = s(x)) for some filters s: what the network makes of the image once an attack is smoothed away.

    Args:
        name: of the group.
        filters: :class:`~ce_plugin.interventions.Smooth` interventions, or the arguments that make them.
        judged: from which sides, see :data:`SIDES`.

    Example:
        >>> group = Smoothing("smoothing", [Smooth.gauss(1.0), Smooth.bits(1)])
        >>> group.passes
        2
        >>> response = group.respond(View(torch.nn.Flatten(), torch.rand(3, 1, 2, 2)))
        >>> response.effects.shape, response.margins.shape
        (torch.Size([3, 8]), torch.Size([3, 2]))

    Source: Xu, Evans, Qi, NDSS 2018 (arXiv 1704.01155), for the filters.
    """

    def __init__(
        self, name: str, filters: Sequence[Smooth | dict[str, Any]], *, judged: Sequence[str] = SIDES[:2]
    ) -> None:
        self.judged = checked_sides(judged)
        if not filters:
            raise ArgumentError(expected("filters", "at least one Smooth intervention", "none"))
        self.name = name
        self.filters = tuple(in_image_units(one) for one in filters)
        if len(set(self.interventions())) < len(self.filters):
            raise ArgumentError(expected("filters", "filters that differ", self.interventions()))
        self.passes = len(self.filters)

    def respond(self, view: View) -> Response:
        """Effects of each filter on the logits, side by side, and the margins under each."""
        return response_of(view, [view.do(one) for one in self.filters], self.judged)

    def labels(self, n_classes: int) -> list[str]:
        """See :meth:`Group.labels`."""
        return labels_of(self.interventions(), n_classes) if "distance" in self.judged else []

    def interventions(self) -> list[str]:
        """The filters."""
        return [repr(one) for one in self.filters]

    def ranges(self) -> list[tuple[float, float]]:
        """See :meth:`Group.ranges`."""
        return [one.value_range for one in self.filters]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        filters = [smooth_settings(one) for one in self.filters]
        return {"name": self.name, "filters": filters, "judged": list(self.judged)}


class CounterAttack(Group):
    """How far an image is from another answer, and what steps in that direction do.

    The gradient g of the margin m gives, at no further forward pass, the first-order effect of the strongest
    intervention of a given size: log |g|_2, log |g|_1, log max |g|, log m / |g|_1 and log m / |g|_2, the last two being
    the distances to the nearest other answer if the network were linear. Steps are run: x - step sign(g).

    Args:
        steps: sizes of the steps, in image units; each is one pass.
        value_range: least and greatest value of an image.
        judged: from which sides, see :data:`SIDES`.
        name: of the group.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> CounterAttack(steps=(0.05,)).respond(View(network, torch.rand(2, 1, 2, 2))).effects.shape
        torch.Size([2, 8])

    Source: the first-order distance is DeepFool's, Moosavi-Dezfooli et al., CVPR 2016 (arXiv 1511.04599), Eq. 6.
    """

    def __init__(
        self,
        *,
        steps: Sequence[float] = (),
        value_range: Sequence[float] = (0.0, 1.0),
        judged: Sequence[str] = SIDES[:1],
        name: str = "counter-attack",
    ) -> None:
        self.judged = checked_sides(judged)
        if any(not step > 0 for step in steps):
            raise ArgumentError(expected("steps", "positive sizes in image units", tuple(steps)))
        self.name = name
        self.steps = tuple(float(step) for step in steps)
        low, high = value_range
        self.value_range = (float(low), float(high))
        self.passes = 2 + len(self.steps)

    def respond(self, view: View) -> Response:
        """Five first-order sizes, then the effects of each step on the logits; and the margins after each step."""
        gradient, margin = view.gradient(), view.margin()
        flat = gradient.flatten(1)
        sizes = torch.stack([flat.square().sum(1).add(_TINY**2).sqrt(), flat.abs().sum(1), flat.abs().amax(1)], 1)
        logs = (sizes + _TINY).log()
        distance = (margin + 1e-6).log()[:, None] - logs[:, [1, 0]]
        away = gradient.sign().to(view.images)
        runs = [view.run((view.images - step * away).clamp(*self.value_range)) for step in self.steps]
        steps = response_of(view, runs, self.judged)
        first = torch.cat([logs, distance], 1) if "distance" in self.judged else logs[:, :0]
        return Response(torch.cat([first, steps.effects], 1), steps.margins, steps.answers, steps.left)

    def labels(self, n_classes: int) -> list[str]:
        """See :meth:`Group.labels`."""
        if "distance" not in self.judged:
            return []
        first = [f"log of the {which} norm of the margin's gradient" for which in ("L2", "L1", "largest-entry")]
        first += [f"log of the first-order {which} distance to another answer" for which in ("L-infinity", "L2")]
        return first + labels_of(self.interventions(), n_classes)

    def interventions(self) -> list[str]:
        """The steps."""
        return [f"a counter-attack step of {step:g}" for step in self.steps]

    def ranges(self) -> list[tuple[float, float]]:
        """See :meth:`Group.ranges`."""
        return [self.value_range] if self.steps else []

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {
            "steps": list(self.steps),
            "value_range": list(self.value_range),
            "judged": list(self.judged),
            "name": self.name,
        }


class PixelMasking(Group):
    """Effects of masking a random share of the pixels: mean and standard deviation over draws, on each logit.

    The draws are the same for every image, so that an image's effects do not depend on its neighbours.

    Args:
        share: of the pixels that are masked, in (0, 1).
        n_draws: random masks, at least 2; each is one pass.
        seed: of the draws.
        fill: as :class:`~ce_plugin.interventions.PixelMask` takes it, a name or a number.
        name: of the group.

    Example:
        >>> PixelMasking(0.3, n_draws=4).respond(View(torch.nn.Flatten(), torch.ones(2, 1, 3, 3))).effects.shape
        torch.Size([2, 18])
    """

    def __init__(
        self,
        share: float = 0.3,
        *,
        n_draws: int = 8,
        seed: int = 0,
        fill: str | float = "zero",
        name: str = "pixel masking",
    ) -> None:
        if not 0 < share < 1:
            raise ArgumentError(expected("share", "a float in (0, 1)", share))
        if n_draws < 2:
            raise ArgumentError(expected("n_draws", "at least 2", n_draws))
        self.name = name
        self.share, self.n_draws, self.seed, self.fill = share, n_draws, seed, fill
        self.passes = n_draws
        self._mask = PixelMask(fill)

    def respond(self, view: View) -> Response:
        """Mean effect and standard deviation over the draws; and the mean margin."""
        filled = self._mask.values(view.images, view.context)
        runs = []
        for draw in range(self.n_draws):
            random = generator(self.seed, "pixel masking", draw)
            masked = torch.rand(view.images.shape[-2:], generator=random) < self.share
            runs.append(view.run(torch.where(masked.to(view.images.device), filled, view.images)))
        effects = torch.stack([effects_on_logits(run, view.logits) for run in runs])
        logits = torch.stack(runs, 1)
        margins = margin_under(logits, view.logits).mean(1, keepdim=True)
        answers = logits.mean(1).argmax(1, keepdim=True)
        return Response(torch.cat([effects.mean(0), effects.std(0)], 1), margins, answers)

    def labels(self, n_classes: int) -> list[str]:
        """See :meth:`Group.labels`."""
        (what,) = self.interventions()
        return labels_of([f"{what}, mean", f"{what}, standard deviation"], n_classes)

    def interventions(self) -> list[str]:
        """One: the draws together."""
        return [f"masking {self.share:.0%} of the pixels"]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {
            "share": self.share,
            "n_draws": self.n_draws,
            "seed": self.seed,
            "fill": self.fill,
            "name": self.name,
        }


class _ChannelEffects(Group):
    """The effect of one intervention on each channel of a layer, on the logit of the predicted class and the margin."""

    differentiable = False

    def __init__(self, layer: str, name: str) -> None:
        self.name = name
        self.layer = layer
        # By superposition all channels cost little more than a pass near the end of a network; docs/performance.md.
        self.passes = 3

    def made(self, view: View) -> Intervention:
        """What each channel is set to."""
        raise NotImplementedError

    def respond(self, view: View) -> Response:
        """Effects on the predicted class's logit, then on the margin, one for each channel, (N, 2 U)."""
        images, network = view.images.detach(), view.network
        layer = network.module(self.layer) if isinstance(network, ClassifierWrapper) else self.layer
        columns = []
        for outcome in ("logit", "margin"):
            explainer = LayerCausalEffect(view.network, layer, self.made(view), outcome=outcome)
            columns.append(explainer.estimate(images, target=view.predicted).effect[..., 0])
        effects = torch.cat(columns, 1).to(view.logits)
        return Response(effects, effects[:, :0], effects[:, :0].long())

    def labels(self, n_classes: int) -> list[str]:
        """None: how many channels there are is known when it runs only."""
        return []

    def interventions(self) -> list[str]:
        """None is judged by its margin: one channel seldom turns an answer over."""
        return []

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {"layer": self.layer, "name": self.name}


class NodeZeroing(_ChannelEffects):
    """Effects of zeroing each channel of a layer: what the answer rests on.

    Args:
        layer: dotted name of the layer.
        name: of the group.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> NodeZeroing("0").respond(View(network.eval(), torch.rand(2, 1, 4, 4))).effects.shape
        torch.Size([2, 6])
    """

    def __init__(self, layer: str, name: str = "node zeroing") -> None:
        super().__init__(layer, name)

    def made(self, view: View) -> Intervention:
        """Zero."""
        return ZeroOut()


class Interchange(_ChannelEffects):
    """Effects of setting each channel of a layer to its value in a run on the smoothed image.

    Args:
        layer: dotted name of the layer.
        filter: the :class:`~ce_plugin.interventions.Smooth` intervention, or the arguments that make it.
        name: of the group.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> Interchange("0", Smooth.gauss(1.0)).respond(View(network.eval(), torch.rand(2, 1, 4, 4))).effects.shape
        torch.Size([2, 6])

    Source: interchange interventions, Geiger et al., NeurIPS 2021 (arXiv 2106.02997).
    """

    def __init__(self, layer: str, filter: Smooth | dict[str, Any], name: str = "interchange") -> None:  # noqa: A002
        super().__init__(layer, name)
        self.filter = in_image_units(filter)
        self.passes = 4

    def made(self, view: View) -> Intervention:
        """The values of the smoothed run."""
        return Patch(self.filter.values(view.images.detach(), view.context))

    def ranges(self) -> list[tuple[float, float]]:
        """See :meth:`Group.ranges`."""
        return [self.filter.value_range]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {"layer": self.layer, "filter": smooth_settings(self.filter), "name": self.name}


class Denoising(Group):
    """Effects of do(x = D(x)), where the denoiser D is trained, when the detector is fitted, on clean images alone.

    A hardened denoiser (``eps`` above 0) is trained on what shakes the network behind it most as well, which it finds
    for itself in every step: an attacker who knows the detector has to deceive a network that was prepared for that.
    Training takes about five times as long.

    Args:
        width: of the :class:`~ce_plugin.detection.denoiser.Denoiser`.
        least_steps: training takes ``nb_epochs`` of :meth:`CausalEffectDetector.fit`, and at least so many steps.
        eps: greatest change of a value against which the denoiser is hardened, in image units; 0: it is not.
        passes: what a denoised run costs, in forward passes of the network, the denoiser included; counted in
            floating-point operations when it is prepared.
        judged: from which sides, see :data:`~ce_plugin.detection.probes.SIDES`.
        name: of the group.

    Example:
        >>> classifier = ClassifierWrapper(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)))
        >>> images = torch.rand(8, 1, 8, 8)
        >>> group = Denoising(least_steps=2).prepared(classifier, images, n_epochs=1, seed=0)
        >>> group.respond(View(classifier, images)).effects.shape
        torch.Size([8, 3])

    Source: :func:`~ce_plugin.detection.denoiser.train_denoiser`.
    """

    def __init__(
        self,
        *,
        width: int = 16,
        least_steps: int = 800,
        eps: float = 0.0,
        passes: float = 3.0,
        judged: Sequence[str] = SIDES,
        name: str = "denoising",
    ) -> None:
        self.judged = checked_sides(judged)
        if width < 1 or least_steps < 1:
            raise ArgumentError(expected("width and least_steps", "1 or more", (width, least_steps)))
        if not 0 <= eps < math.inf:
            raise ArgumentError(expected("eps", "a size in image units, 0 or more", eps))
        self.name = name
        self.width, self.least_steps, self.eps, self.passes = width, least_steps, float(eps), passes
        self._denoiser: Denoiser | None = None

    def prepared(self, classifier: ClassifierWrapper, images: Tensor, *, n_epochs: int, seed: int) -> Group:
        """The group with a denoiser trained on clean images."""
        n_steps = max(self.least_steps, n_epochs * len(images) // 64)
        ready = Denoising(**self.settings())
        ready._denoiser = train_denoiser(classifier, images, width=self.width, n_steps=n_steps, eps=self.eps, seed=seed)
        ready.passes = 1 + _share(ready._denoiser, classifier, images[:1])
        return ready

    def respond(self, view: View) -> Response:
        """Effects of denoising on the logits, and the margin that is left."""
        if self._denoiser is None:
            raise InferenceError(expected("signature", "one whose denoiser is trained", "one before `fit`"))
        # Where the images are, wherever it was trained or read from a file.
        denoiser = self._denoiser.to(view.images.device)

        def denoise(images: Tensor) -> Tensor:
            cleaned: Tensor = denoiser(images.to(denoiser.out.weight))
            return cleaned.to(images)

        return response_of(view, [view.do(Denoise(denoise))], self.judged)

    def labels(self, n_classes: int) -> list[str]:
        """See :meth:`Group.labels`."""
        return labels_of(self.interventions(), n_classes) if "distance" in self.judged else []

    def interventions(self) -> list[str]:
        """One."""
        return ["hardened denoising" if self.eps else "denoising"]

    def settings(self) -> dict[str, Any]:
        """See :meth:`Group.settings`."""
        return {
            "width": self.width,
            "least_steps": self.least_steps,
            "eps": self.eps,
            "passes": self.passes,
            "judged": list(self.judged),
            "name": self.name,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The denoiser's parameters and what it was built with."""
        if self._denoiser is None:
            return {}
        built = torch.tensor([self._denoiser.channels, *self._denoiser.value_range], dtype=torch.float64)
        return {**self._denoiser.state_dict(), "built": built}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Group:
        """The group with this denoiser."""
        if not tensors:
            return self
        channels, low, high = tensors["built"].tolist()
        ready = Denoising(**self.settings())
        ready._denoiser = Denoiser(int(channels), self.width, (low, high))
        ready._denoiser.load_state_dict({name: value for name, value in tensors.items() if name != "built"})
        ready._denoiser.eval().requires_grad_(False)
        return ready


def _share(denoiser: Denoiser, classifier: ClassifierWrapper, image: Tensor) -> float:
    """What denoising costs in forward passes of the network, by floating-point operations, to a tenth."""
    with classifier.guarded():
        one = flops_of(lambda: classifier(image))
    return round(flops_of(lambda: denoiser(image.float())) / one, 1) if one else 0.0
