"""Probes: what a detector measures of an image, as effects of interventions on the network's logits."""

from __future__ import annotations

import functools
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ce_plugin.attribution import LayerCausalEffect
from ce_plugin.detection.checkpoint import Checkpoint
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.denoiser import STEP, Denoiser, train_denoiser
from ce_plugin.errors import (
    ArgumentError,
    FileError,
    InferenceError,
    check_integer,
    check_number,
    check_range,
    expected,
)
from ce_plugin.interventions import Patch, PixelMask, Smooth, ZeroOut
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.networks.graph import flops_of
from ce_plugin.randomness import generator

# With up to so many classes all logits are looked at, with more the predicted class's and the next RANKS.
FEW = 20
RANKS = 8
# How a probe's responses can be scored. "distance": how far the effects lie from those of clean images. "reversal": how
# much more of the predicted class's margin an intervention takes away than is predicted from the idle logits. "margin":
# how little of the margin it leaves, compared with clean images of the class.
SIDES = ("distance", "reversal", "margin")
_TINY = 1e-12


class Response(NamedTuple):
    """What a probe's interventions did to a batch of images; :meth:`View.response` makes it of their logits.

    Args:
        effects: (N, F), scored by their distance from those of clean images; F may be 0.
        margins: of the predicted class under each of S interventions, (N, S), scored by how much more than usual an
            intervention takes away; S may be 0.
        answers: the class that each of the S interventions leaves as the answer, (N, S).
        left: the same margins where they are also scored without regard to the idle logits, (N, S); else (N, 0).
    """

    effects: Tensor
    margins: Tensor
    answers: Tensor
    left: Tensor

    @property
    def sides(self) -> tuple[str, ...]:
        """The names in :data:`SIDES` by which this response can be scored."""
        widths = (self.effects.shape[1], self.margins.shape[1], self.left.shape[1])
        return tuple(itertools.compress(SIDES, widths))


class View:
    """One batch of images together with what all probes of a signature share, computed once.

    Args:
        network: images in image units to logits (N, K), in eval mode.
        images: (N, ...), in image units. Where they require a gradient, everything here has one.
        ids: one id per image, for interventions that draw random numbers.
        seed: seed of these.

    Attributes:
        logits: of the idle run, (N, K), in float32 at least.
        predicted: index of the largest logit, (N,).

    Example:
        >>> view = View(torch.nn.Flatten(), torch.tensor([[[[1.0, 3.0]]]]))
        >>> view.predicted, view.margin(), view.run(view.images / 2)
        (tensor([1]), tensor([2.]), tensor([[0.5000, 1.5000]]))
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
        return margin_under(self.logits[:, None], self.logits).squeeze(1)

    def gradient(self) -> Tensor:
        """Gradient of the margin with respect to the images, of their shape, in float32 at least: two passes.

        It is computed once. For an attacker it has a gradient itself.
        """
        if self._gradient is None:
            if self.differentiable:
                (gradient,) = torch.autograd.grad(self.margin().sum(), self.images, create_graph=True)
            else:
                with torch.enable_grad():
                    images = self.images.detach().requires_grad_(True)
                    logits = self.run(images)
                    (gradient,) = torch.autograd.grad(margin_under(logits[:, None], logits).sum(), images)
            self._gradient = _widened(gradient)
        return self._gradient

    def response(self, runs: Sequence[Tensor], judged: Sequence[str] = SIDES[:2]) -> Response:
        """Effects, margins and answers of interventions, as far as they are scored.

        Args:
            runs: logits (N, K) under each intervention.
            judged: names in :data:`SIDES`.
        """
        nothing = self.logits[:, :0]
        if not runs:
            return Response(nothing, nothing, nothing.long(), nothing)
        logits = torch.stack(list(runs), 1)
        effects = nothing
        if "distance" in judged:
            effects = torch.cat([effects_on_logits(run, self.logits) for run in runs], 1)
        margins = margin_under(logits, self.logits)
        reversal, left = "reversal" in judged, "margin" in judged
        answers = logits.argmax(2) if reversal or left else nothing.long()
        return Response(effects, margins if reversal else nothing, answers, margins if left else nothing)


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
    others_do, others_idle = (logits.scatter(1, order[:, :1], -torch.inf) for logits in (do, idle))
    strongest = others_do.amax(1) - others_idle.amax(1)
    together = others_do.logsumexp(1) - others_idle.logsumexp(1)
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
    others = do.scatter(2, predicted, -torch.inf).amax(2)
    return do.gather(2, predicted).squeeze(2) - others


def leading_logits(idle: Tensor) -> Tensor:
    """The idle logits in the form of :func:`effects_on_logits`: all of up to 20, else the largest, (N, F)."""
    return idle if idle.shape[1] <= FEW else idle.topk(RANKS + 1, dim=1).values


def outcome_names(n_classes: int, label: Callable[[int], str]) -> list[str]:
    """What the columns of :func:`effects_on_logits` are, in words."""
    if n_classes <= FEW:
        return [f"the logit of {label(k)}" for k in range(n_classes)]
    ranked = [f"the logit of class no. {rank + 1} in the idle order" for rank in range(1, RANKS + 1)]
    return ["the logit of the predicted class", *ranked, "the largest other logit", "all other logits together"]


def effect_labels(interventions: Sequence[str], n_classes: int) -> list[str]:
    """One label for each intervention and outcome: what :meth:`Probe.labels` returns for effects on logits.

    Example:
        >>> effect_labels(["mirroring"], n_classes=2)
        ['mirroring on the logit of class 0', 'mirroring on the logit of class 1']
    """
    outcomes = outcome_names(n_classes, "class {}".format)
    return [f"{one} on {outcome}" for one in interventions for outcome in outcomes]


def _widened(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


KINDS: dict[str, type[Probe]] = {}
"""Kind -> class of every probe that is defined: what files of detectors can name."""


class Probe(nn.Module, ABC):
    """Interventions whose effects are scored together: one distance, one entry in the report.

    Subclasses write :meth:`respond`. They are known by their kind from their definition on, so that a file of a
    detector can be loaded wherever the module that defines them has been imported. What a probe learns from clean
    images are its parameters, buffers and submodules, set by :meth:`fit` and kept with the detector.

    Every argument of the constructor is kept as an attribute of the same name (where that cannot be, override
    :meth:`settings`).

    Args:
        name: what reports call it.
        passes: what it costs for one image, in forward passes of the network (a backward pass counts as two), the idle
            run not included.

    Attributes:
        kind: what files call the class: its name, or ``class Own(Probe, kind="...")``.
        differentiable: whether its effects have a gradient with respect to the images.

    Raises:
        ArgumentError: when a subclass is defined: another class is of this kind.

    Example:
        >>> class Flipped(Probe):
        ...     def __init__(self, name="flipped"):
        ...         super().__init__(name, passes=1)
        ...     def respond(self, view):
        ...         return view.response([view.run(view.images.flip(-1))])
        ...     def interventions(self):
        ...         return ["mirroring"]
        >>> Flipped()
        Flipped(name='flipped')
        >>> Flipped().respond(View(torch.nn.Flatten(), torch.tensor([[[[1.0, 3.0]]]]))).effects
        tensor([[ 2., -2.]])
    """

    kind: ClassVar[str]
    differentiable: bool = True

    def __init__(self, name: str, passes: float) -> None:
        super().__init__()
        if not isinstance(name, str) or not name:
            raise ArgumentError(expected("name", "a word or more", repr(name)))
        if check_number("passes", passes, "a number of forward passes, 0 or more") < 0:
            raise ArgumentError(expected("passes", "a number of forward passes, 0 or more", passes))
        self.name = name
        self.passes = passes

    def __init_subclass__(cls, *, kind: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind or cls.__name__
        known = KINDS.get(cls.kind, cls)
        # The same class once more, as in a notebook's cell that is run again, takes the place of the first.
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            got = f"{cls.kind!r}, which {known.__module__}.{known.__qualname__} is"
            hint = f'Write `class {cls.__name__}(Probe, kind="...")`.'
            raise ArgumentError(expected("kind", "one that no other probe has", got, hint))
        KINDS[cls.kind] = cls

    @abstractmethod
    def respond(self, view: View) -> Response:
        """What the probe's interventions do to a batch of images."""

    def labels(self, n_classes: int) -> list[str]:
        """What each of the F effects is, in words: "Smooth.gauss(1.0) on the logit of class 3".

        None where F is 0, or where explanations should not name effects.
        """
        return []

    def interventions(self) -> list[str]:
        """The interventions in words; where margins are scored, these are the S."""
        return []

    def input_interventions(self) -> Sequence[Intervention]:
        """Interventions on the input that can also be applied to a part of the image: explanations locate the alarm
        with them, in the image and in the channels of a layer.
        """
        return ()

    def ranges(self) -> list[tuple[float, float]]:
        """Least and greatest value of the images that its interventions were made for, where they depend on it."""
        return []

    def settings(self) -> dict[str, Any]:
        """The arguments that make this probe again, as JSON takes them."""
        return {name: _plain(getattr(self, name)) for name in inspect.signature(type(self)).parameters}

    def fit(self, classifier: ClassifierWrapper, images: Tensor, *, n_epochs: int, seed: int) -> None:
        """Fit its own parameters to clean images (N, C, H, W); most probes have none.

        A method with an argument ``checkpoint`` gets a :class:`~ce_plugin.detection.checkpoint.Checkpoint`, or None, in
        which long training can be saved.
        """

    def training_steps(self, n_images: int, n_epochs: int) -> int:
        """Steps that :meth:`fit` trains for."""
        return 0

    def allocate(self, shape: tuple[int, ...], value_range: tuple[float, float]) -> None:
        """Make the modules that :meth:`fit` makes, without values: those of a file are loaded into them.

        Args:
            shape: of an image, (C, H, W).
            value_range: least and greatest value of an image.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"


def probe_from_settings(kind: str, module: str, settings: dict[str, Any]) -> Probe:
    """The probe of these :meth:`Probe.settings`.

    Args:
        kind: see :attr:`Probe.kind`.
        module: that defined it when it was written to a file.
        settings: the constructor's arguments.

    Raises:
        FileError: no probe of this kind is defined.
    """
    if kind not in KINDS:
        hint = f"Import {module!r}, which defined it, before you load the detector."
        raise FileError(expected("path", f"a detector with probes of kinds among {sorted(KINDS)}", repr(kind), hint))
    return KINDS[kind](**settings)


def _plain(value: Any) -> Any:
    """A constructor's argument as JSON takes it."""
    if isinstance(value, Smooth):
        return {"steps": _plain(value.steps), "value_range": list(value.value_range)}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _checked_sides(judged: Sequence[str]) -> tuple[str, ...]:
    words = list(judged) if isinstance(judged, (list, tuple, set, frozenset)) else []
    if not words or not all(isinstance(one, str) and one in SIDES for one in words):
        raise ArgumentError(expected("judged", f"one or more of {SIDES}", repr(judged)))
    return tuple(sorted(set(judged), key=SIDES.index))


def _in_image_units(smooth: object) -> Smooth:
    if not isinstance(smooth, (Smooth, dict)):
        wanted = "Smooth interventions, or the arguments that make them"
        raise ArgumentError(expected("filters", wanted, type(smooth).__name__))
    made = smooth if isinstance(smooth, Smooth) else Smooth(**smooth)
    if not made.normalization.is_identity:
        hint = "Images come to a detector in image units: leave `normalization` out of the filter."
        raise ArgumentError(expected("filters", "in image units", repr(made), hint))
    return made


class Smoothing(Probe):
    """Effects of do(x = s(x)) for some filters s: what the network makes of the image once an attack is smoothed away.

    Args:
        name: of the probe.
        filters: :class:`~ce_plugin.interventions.Smooth` interventions, or the arguments that make them.
        judged: how it is scored: by "distance", "reversal" or "margin", or several of these.

    Example:
        >>> probe = Smoothing("smoothing", [Smooth.gauss(1.0), Smooth.bits(1)])
        >>> probe.passes
        2
        >>> response = probe.respond(View(torch.nn.Flatten(), torch.rand(3, 1, 2, 2)))
        >>> response.effects.shape, response.margins.shape
        (torch.Size([3, 8]), torch.Size([3, 2]))

    Source: Xu, Evans, Qi, NDSS 2018 (arXiv 1704.01155), for the filters.
    """

    def __init__(
        self, name: str, filters: Sequence[Smooth | dict[str, Any]], *, judged: Sequence[str] = SIDES[:2]
    ) -> None:
        if not isinstance(filters, (list, tuple)) or not filters:
            got = "none" if isinstance(filters, (list, tuple)) else type(filters).__name__
            raise ArgumentError(expected("filters", "a list of at least one Smooth intervention", got))
        super().__init__(name, passes=len(filters))
        self.judged = _checked_sides(judged)
        self.filters = tuple(map(_in_image_units, filters))
        if len(set(self.interventions())) < len(self.filters):
            raise ArgumentError(expected("filters", "filters that differ", self.interventions()))

    def respond(self, view: View) -> Response:
        """Effects of each filter on the logits, side by side, and the margins under each."""
        return view.response(list(map(view.do, self.filters)), self.judged)

    def labels(self, n_classes: int) -> list[str]:
        """One for each filter and outcome."""
        return effect_labels(self.interventions(), n_classes) if "distance" in self.judged else []

    def interventions(self) -> list[str]:
        """The filters."""
        return list(map(repr, self.filters))

    def input_interventions(self) -> Sequence[Intervention]:
        """The filters."""
        return self.filters

    def ranges(self) -> list[tuple[float, float]]:
        """Those of the filters."""
        return [one.value_range for one in self.filters]


class CounterAttack(Probe):
    """How far an image is from another answer, and what steps in that direction do.

    The gradient g of the margin m gives, at no further forward pass, the first-order effect of the strongest
    intervention of a given size: log |g|_2, log |g|_1, log max |g|, log m / |g|_1 and log m / |g|_2, the last two being
    the distances to the nearest other answer if the network were linear. Steps are run: x - step sign(g).

    Args:
        steps: sizes of the steps, in image units; each is one pass.
        value_range: least and greatest value of an image.
        judged: how it is scored: by "distance", "reversal" or "margin", or several of these.
        name: of the probe.

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
        if not isinstance(steps, (list, tuple)):
            raise ArgumentError(expected("steps", "a list of positive sizes in image units", repr(steps)))
        super().__init__(name, passes=2 + len(steps))
        self.judged = _checked_sides(judged)
        self.steps = tuple(check_number("steps", one, "positive sizes in image units", above=0) for one in steps)
        self.value_range = check_range("value_range", value_range)

    def respond(self, view: View) -> Response:
        """Five first-order sizes, then the effects of each step on the logits; and the margins after each step."""
        gradient, margin = view.gradient(), view.margin()
        flat = gradient.flatten(1)
        sizes = torch.stack([flat.square().sum(1).add(_TINY**2).sqrt(), flat.abs().sum(1), flat.abs().amax(1)], 1)
        logs = (sizes + _TINY).log()
        distance = (margin + 1e-6).log()[:, None] - logs[:, [1, 0]]
        away = gradient.sign().to(view.images)
        runs = [view.run((view.images - step * away).clamp(*self.value_range)) for step in self.steps]
        response = view.response(runs, self.judged)
        if "distance" not in self.judged:
            return response
        return response._replace(effects=torch.cat([logs, distance, response.effects], 1))

    def labels(self, n_classes: int) -> list[str]:
        """Of the first-order sizes, then one for each step and outcome."""
        if "distance" not in self.judged:
            return []
        first = [f"log of the {which} norm of the margin's gradient" for which in ("L2", "L1", "largest-entry")]
        first += [f"log of the first-order {which} distance to another answer" for which in ("L-infinity", "L2")]
        return first + effect_labels(self.interventions(), n_classes)

    def interventions(self) -> list[str]:
        """The steps."""
        return list(map("a counter-attack step of {:g}".format, self.steps))

    def ranges(self) -> list[tuple[float, float]]:
        """That of the images that steps are clipped to."""
        return [self.value_range] if self.steps else []


class PixelMasking(Probe):
    """Effects of masking a random share of the pixels: mean and standard deviation over draws, on each logit.

    The draws are the same for every image, so that an image's effects do not depend on its neighbours.

    Args:
        share: of the pixels that are masked, in (0, 1).
        n_draws: random masks, at least 2; each is one pass.
        seed: of the draws.
        fill: as :class:`~ce_plugin.interventions.PixelMask` takes it, a name or a number.
        name: of the probe.

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
        check_number("share", share, "a float in (0, 1)", above=0, below=1)
        check_integer("n_draws", n_draws, "a whole number, at least 2", least=2)
        check_integer("seed", seed)
        super().__init__(name, passes=n_draws)
        self.share, self.n_draws, self.seed, self.fill = share, n_draws, seed, fill
        self._mask = PixelMask(fill)

    def respond(self, view: View) -> Response:
        """Mean effect and standard deviation over the draws; and the mean margin."""
        filled = self._mask.values(view.images, view.context)
        runs = []
        for draw in range(self.n_draws):
            random = generator(self.seed, "pixel masking", draw)
            masked = torch.rand(view.images.shape[-2:], generator=random) < self.share
            runs.append(view.run(torch.where(masked.to(view.images.device), filled, view.images)))
        logits = torch.stack(runs, 1)
        effects = torch.stack([effects_on_logits(run, view.logits) for run in runs])
        margins = margin_under(logits, view.logits).mean(1, keepdim=True)
        answers = logits.mean(1).argmax(1, keepdim=True)
        return Response(torch.cat([effects.mean(0), effects.std(0)], 1), margins, answers, margins[:, :0])

    def labels(self, n_classes: int) -> list[str]:
        """Of the means, then of the standard deviations."""
        (what,) = self.interventions()
        return effect_labels([f"{what}, mean", f"{what}, standard deviation"], n_classes)

    def interventions(self) -> list[str]:
        """One: the draws together."""
        return [f"masking {self.share:.0%} of the pixels"]


class _ChannelEffects(Probe):
    """The effect of one intervention on each channel of a layer, on the logit of the predicted class and the margin.

    How many channels there are is known when it runs only, so effects have no labels; and as one channel seldom
    changes an answer, margins are not scored.
    """

    differentiable = False

    def __init__(self, layer: str, name: str, passes: float) -> None:
        super().__init__(name, passes)
        if not isinstance(layer, str):
            raise ArgumentError(expected("layer", "the dotted name of a layer", type(layer).__name__))
        self.layer = layer

    @abstractmethod
    def intervention(self, view: View) -> Intervention:
        """What each channel is set to."""

    def respond(self, view: View) -> Response:
        """Effects on the predicted class's logit, then on the margin, one for each channel, (N, 2 U)."""
        images, network = view.images.detach(), view.network
        layer = network.module(self.layer) if isinstance(network, ClassifierWrapper) else self.layer
        columns = []
        for outcome in ("logit", "margin"):
            explainer = LayerCausalEffect(view.network, layer, self.intervention(view), outcome=outcome)
            columns.append(explainer.estimate(images, target=view.predicted).effect[..., 0])
        effects = torch.cat(columns, 1).to(view.logits)
        nothing = effects[:, :0]
        return Response(effects, nothing, nothing.long(), nothing)


class NodeZeroing(_ChannelEffects):
    """Effects of zeroing each channel of a layer: what the answer rests on.

    Args:
        layer: dotted name of the layer.
        name: of the probe.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> NodeZeroing("0").respond(View(network.eval(), torch.rand(2, 1, 4, 4))).effects.shape
        torch.Size([2, 6])
    """

    def __init__(self, layer: str, name: str = "node zeroing") -> None:
        # By superposition all channels cost little more than a pass near the end of a network; docs/performance.md.
        super().__init__(layer, name, passes=3)

    def intervention(self, view: View) -> Intervention:
        """Zero."""
        return ZeroOut()


class Interchange(_ChannelEffects):
    """Effects of setting each channel of a layer to its value in a run on the smoothed image.

    Args:
        layer: dotted name of the layer.
        filter: the :class:`~ce_plugin.interventions.Smooth` intervention, or the arguments that make it.
        name: of the probe.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> Interchange("0", Smooth.gauss(1.0)).respond(View(network.eval(), torch.rand(2, 1, 4, 4))).effects.shape
        torch.Size([2, 6])

    Source: interchange interventions, Geiger et al., NeurIPS 2021 (arXiv 2106.02997).
    """

    def __init__(self, layer: str, filter: Smooth | dict[str, Any], name: str = "interchange") -> None:  # noqa: A002
        super().__init__(layer, name, passes=4)
        self.filter = _in_image_units(filter)

    def intervention(self, view: View) -> Intervention:
        """The values of the smoothed run."""
        return Patch(self.filter.values(view.images.detach(), view.context))

    def ranges(self) -> list[tuple[float, float]]:
        """That of the filter."""
        return [self.filter.value_range]


class Denoising(Probe):
    """Effects of do(x = D(x)), where the denoiser D is trained, when the detector is fitted, on clean images alone.

    An adversarially trained denoiser (``eps`` above 0) is also trained on the worst images near the clean ones, found
    anew in every step: it resists attackers who know the detector. Training takes about five times as long.

    Args:
        width: of the :class:`~ce_plugin.detection.denoiser.Denoiser`.
        least_steps: training takes ``nb_epochs`` of :meth:`CausalEffectDetector.fit`, and at least so many steps.
        eps: greatest change of a value in adversarial training, in image units; 0: plain training.
        passes: what a denoised run costs, in forward passes of the network, the denoiser included; counted in
            floating-point operations when it is fitted.
        judged: how it is scored: by "distance", "reversal" or "margin", or several of these.
        name: of the probe.

    Attributes:
        denoiser: the trained denoiser; None before.

    Example:
        >>> classifier = ClassifierWrapper(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)))
        >>> images = torch.rand(8, 1, 8, 8)
        >>> probe = Denoising(least_steps=2)
        >>> probe.fit(classifier, images, n_epochs=1, seed=0)
        >>> probe.respond(View(classifier, images)).effects.shape
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
        super().__init__(name, passes)
        self.judged = _checked_sides(judged)
        check_integer("width", width, least=1)
        check_integer("least_steps", least_steps, least=1)
        if check_number("eps", eps, "a size in image units, 0 or more") < 0:
            raise ArgumentError(expected("eps", "a size in image units, 0 or more", eps))
        self.width, self.least_steps, self.eps = width, least_steps, float(eps)
        self.denoiser: Denoiser | None = None

    def training_steps(self, n_images: int, n_epochs: int) -> int:
        """The epochs' steps of 64 images, and at least ``least_steps``."""
        return max(self.least_steps, n_epochs * n_images // STEP)

    def fit(
        self,
        classifier: ClassifierWrapper,
        images: Tensor,
        *,
        n_epochs: int,
        seed: int,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Train the denoiser on clean images."""
        n_steps = self.training_steps(len(images), n_epochs)
        denoiser = train_denoiser(
            classifier, images, width=self.width, n_steps=n_steps, eps=self.eps, seed=seed, checkpoint=checkpoint,
            name=self.name,
        )  # fmt: skip
        with classifier.guarded():
            one = flops_of(functools.partial(classifier, images[:1]))
        cost = round(flops_of(functools.partial(denoiser, images[:1].float())) / one, 1) if one else 0.0
        self.denoiser, self.passes = denoiser, 1 + cost

    def allocate(self, shape: tuple[int, ...], value_range: tuple[float, float]) -> None:
        """The denoiser, without its weights."""
        with torch.device("meta"):
            self.denoiser = Denoiser(shape[0], self.width, value_range).eval().requires_grad_(False)

    def respond(self, view: View) -> Response:
        """Effects of denoising on the logits, and the margin that is left."""
        if self.denoiser is None:
            raise InferenceError(expected("signature", "one whose denoiser is trained", "one before `fit`"))
        # Where the images are, wherever it was trained or read from a file.
        denoiser = self.denoiser.to(view.images.device)
        denoised = denoiser(view.images.to(denoiser.out.weight))
        return view.response([view.run(denoised.to(view.images))], self.judged)

    def labels(self, n_classes: int) -> list[str]:
        """One for each outcome."""
        return effect_labels(self.interventions(), n_classes) if "distance" in self.judged else []

    def interventions(self) -> list[str]:
        """One."""
        return ["hardened denoising" if self.eps else "denoising"]
