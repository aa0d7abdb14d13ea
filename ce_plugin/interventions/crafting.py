"""Crafting adversarial examples: one image at a time, in the right direction, and without side effects."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin.errors import (
    AttackError,
    InputError,
    ModelError,
    NoChangeWarning,
    ProbabilityWarning,
    TargetError,
    check_integer,
    check_number,
    expected,
    unknown_name,
)
from ce_plugin.interventions.base import Context, Normalization
from ce_plugin.networks.art import (
    attack_class,
    attack_with_estimator,
    build_classifier,
    copy_attack,
    is_art_attack,
    limit_steps,
)
from ce_plugin.networks.forward import clip_values_of, is_art_classifier, logger, unwrap
from ce_plugin.networks.guard import SharedContext, modules_of, state_guard
from ce_plugin.randomness import generator

Array = np.ndarray[Any, np.dtype[Any]]

_SIZES = ("eps", "theta")


def _uncompiled() -> AbstractContextManager[object]:
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


# A compiled backward pass can run only once and ART runs it again; this also avoids recompilation.
_EAGER = SharedContext(_uncompiled)
# Of presets, as a share of the clip range, where none is given.
_DEFAULT_SIZE = 0.3
# What settings are called elsewhere -> here.
_SYNONYMS = {
    **dict.fromkeys(("epsilon", "epsilons", "delta", "bound", "theta"), "eps"),
    **dict.fromkeys(("alpha", "step", "step_size", "stepsize", "eps_iter"), "eps_step"),
    **dict.fromkeys(("steps", "n_steps", "num_steps", "nb_iter", "n_iter", "num_iter", "iterations"), "max_iter"),
    **dict.fromkeys(("restarts", "n_restarts", "num_restarts", "random_start", "rand_init"), "num_random_init"),
    **dict.fromkeys(("target_class", "target_label", "target_labels"), "targeted_class"),
    **dict.fromkeys(("bounds", "clip_min", "clip_max", "clip_range", "value_range"), "clip_values"),
    **dict.fromkeys(("mean", "std", "preprocessing"), "normalization"),
    **dict.fromkeys(("p", "ord"), "norm"),
}
# Arguments of the face, `Adversarial`, beside the attack's own.
_OPTIONS = (
    "normalization", "clip_values", "targeted_class", "multi_label", "probabilities", "output", "mask", "batch_size",
)  # fmt: skip
# Class names, so that ART is imported only when an attack is made.
_WITH_MASK = {"FastGradientMethod", "ProjectedGradientDescentCommon", "ProjectedGradientDescent"}
_ALWAYS_TARGETED = {"SaliencyMapMethod", "LowProFool", "TargetedUniversalPerturbation"}


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack on a batch.

    Attributes:
        raw: what the attack returned, (N, ...), in model units.
        clipped: ``raw`` clipped to the clip values; what ``do`` sets.
        success: (N,), True where the prediction changed (or became the target class; for several labels: where one
            of the attacked labels flipped).
        clean_prediction: predicted class of the clean input, (N,); for several labels whether each is present, (N, L).
        prediction: the same for ``clipped``.
        l_inf: largest change of a value, (N,), in image units.
        l2: Euclidean length of the change, (N,), in image units.
        eps: size of the attack, if it has one.
        name: the attack's name.
    """

    raw: Tensor
    clipped: Tensor
    success: Tensor
    clean_prediction: Tensor
    prediction: Tensor
    l_inf: Tensor
    l2: Tensor
    eps: float | None
    name: str

    @property
    def success_rate(self) -> float:
        """Share of the examples on which the attack succeeded."""
        return float(self.success.double().mean())

    def __repr__(self) -> str:
        count = f"{int(self.success.sum())} of {len(self.success)}"
        size = "" if self.eps is None else f"eps={self.eps:g}, "
        return f"AttackResult({self.name}, {size}success={count}, l_inf<={float(self.l_inf.max()):.4g})"


@dataclass(frozen=True)
class AttackConfig:
    """How to build an attack: again for each image, for another estimator, or with another eps.

    Args:
        source: an ART attack, the name of one of ART's attack classes (for presets, so that ART is imported only when
            the attack is built), or a class or function called as ``source(estimator, **settings)``.
        settings: arguments of the class or function; for an instance, parameters set on its copies.
        label: short name for messages.
    """

    source: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @classmethod
    def of(cls, attack: Any, settings: Mapping[str, Any]) -> AttackConfig:
        """The configuration of an attack as the user passed it.

        Raises:
            AttackError: it neither is an attack nor makes one.
            UnknownNameError: there is no attack of this name, or the attack has no such setting.
        """
        if isinstance(attack, str) and attack in PRESETS:
            attack, settings = PRESETS[attack], _renamed(settings, attack)
        if isinstance(attack, cls):
            config = cls(attack.source, {**attack.settings, **settings}, attack.label)
        else:
            config = cls(attack_class(attack, list(PRESETS)) if isinstance(attack, str) else attack, dict(settings))
        if not (config.label or config.is_instance or callable(config.source)):
            kinds = "an ART EvasionAttack, a class of such, its name, or a function that makes one"
            raise AttackError(expected("attack", kinds, type(attack).__name__))
        # A preset's own are known without ART, which takes seconds to import.
        others = settings.keys() - (attack.settings if isinstance(attack, cls) else {})
        if others:
            config._check_settings(sorted(others))
        return config

    def _check_settings(self, settings: Sequence[str]) -> None:
        """Raise an error for settings that the attack does not have, and suggest the closest name."""
        if self.is_instance:
            known = set(self.source.attack_params)
        elif any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters.values()):
            return
        else:
            known = set(list(self.parameters)[1:])
        shown = known - {"theta"} | {"eps", "max_iter"} if self.label == "jsma" else known
        for name in settings:
            if name not in known:
                raise unknown_name(f"setting of {self.name}", name, shown | set(_OPTIONS), _SYNONYMS)

    @property
    def is_instance(self) -> bool:
        return is_art_attack(self.source)

    @property
    def maker(self) -> Callable[..., Any]:
        """The class or function that builds the attack."""
        maker: Callable[..., Any] = attack_class(self.source) if isinstance(self.source, str) else self.source
        return maker

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the class or function."""
        return inspect.signature(self.maker).parameters

    @property
    def name(self) -> str:
        """Name of the preset or the class."""
        source = self.source
        if self.label or isinstance(source, str):
            return self.label or str(source)
        return type(source).__name__ if self.is_instance else getattr(source, "__name__", repr(source))

    def setting(self, name: str, default: Any = None) -> Any:
        """Value of a setting: from the user, or from the instance, or the default of the class."""
        if name in self.settings:
            return self.settings[name]
        if self.is_instance:
            return getattr(self.source, name, default)
        parameter = None if isinstance(self.source, str) else self.parameters.get(name)
        return default if parameter is None or parameter.default is parameter.empty else parameter.default

    @property
    def size_name(self) -> str | None:
        """``"eps"``, or the name of the setting that takes its place; None if the attack finds its own size."""
        return next((name for name in _SIZES if self.setting(name) is not None), None)

    @property
    def size(self) -> float | None:
        value: Any = None if self.size_name is None else self.setting(self.size_name)
        return float(value) if _is_real(value) else None

    def sized(self, clip_values: tuple[float, float]) -> AttackConfig:
        """The same attack; a preset without a size gets 0.3 of the clip range."""
        name = "theta" if self.label == "jsma" else "eps"
        if not self.label or self.settings.get(name) is not None:
            return self
        size = _DEFAULT_SIZE * (clip_values[1] - clip_values[0])
        return AttackConfig(self.source, {**self.settings, name: size}, self.label)

    def aimed(self) -> AttackConfig:
        """The same attack, targeted at a class if it has a setting for that; :func:`aims` says whether it is."""
        if "targeted" not in (self.source.attack_params if self.is_instance else self.parameters):
            return self
        return AttackConfig(self.source, {**self.settings, "targeted": True}, self.label)

    def resized(self, eps: float) -> AttackConfig:
        """The same attack with another eps; a given step size keeps its ratio to eps.

        Raises:
            AttackError: the attack has no eps, or contains attacks with an eps of their own.
        """
        name = self.size_name
        if name is None or (self.is_instance and hasattr(self.source, "attacks")):
            hint = "Build it from its class with another size instead."
            raise AttackError(expected("eps", f"None, as {self.name} has none that can be changed", eps, hint))
        settings = {**self.settings, name: float(eps)}
        step = self.setting("eps_step")
        if name == "eps" and isinstance(step, (int, float)) and self.size and eps > 0:
            settings["eps_step"] = float(step) * eps / self.size
        return AttackConfig(self.source, settings, self.label)

    @property
    def step_limit(self) -> int | None:
        """Limit on the number of steps where ART has none; such an attack takes one image at a time."""
        return self.settings.get("max_iter") if self.label == "jsma" else None

    def make(self, estimator: Any) -> Any:
        """Build the attack for an estimator."""
        quiet = {"verbose": False}
        if self.is_instance:
            return copy_attack(self.source, estimator, {**self.settings, **quiet})
        settings = dict(self.settings)
        if self.label == "jsma":
            del settings["max_iter"]
            settings = {name: value for name, value in settings.items() if value is not None}
        elif settings.get("eps_step", 0.0) is None:
            settings["eps_step"] = min(1.0, 2.5 / settings.get("max_iter", 1)) * settings["eps"]
        if "verbose" in self.parameters:
            settings = {**quiet, **settings}
        return attack_with_estimator(self.maker, estimator, settings)

    def check(self, clip_values: tuple[float, float]) -> None:
        """Raise an error for invalid settings, before any work.

        Raises:
            AttackError: eps is no number, negative, not finite or larger than the clip range; a step, a number of
                iterations or another setting cannot be.
        """
        self._check_size(clip_values)
        step, size = self.setting("eps_step"), self.size
        if step is not None and not isinstance(step, np.ndarray):
            length = _number("eps_step", step, "positive, a number in image units", above=0.0)
            if self.label and size and length > size and self._is_bounded:
                hint = "Leave it out for the default."
                raise AttackError(expected("eps_step", f"at most eps, which is {size:g}", step, hint))
        if self._has("max_iter"):
            wanted = "positive, a whole number of iterations"
            check_integer("max_iter", self.setting("max_iter"), wanted, least=1, error=AttackError)
        if self.label or inspect.isclass(self.source):
            self._check_others()

    @property
    def _is_bounded(self) -> bool:
        return self.setting("norm", math.inf) in ("inf", math.inf)

    def _check_size(self, clip_values: tuple[float, float]) -> None:
        name = self.size_name or "eps"
        given, span = self.setting(name), clip_values[1] - clip_values[0]
        if given is None or isinstance(given, np.ndarray):
            return
        least = -math.inf if name == "theta" and self.label != "jsma" else -math.ulp(0.0)
        shown = "eps" if self.label else name
        size = _number(shown, given, "a finite number, at least 0, in image units", above=least)
        if self._is_bounded and abs(size) > span:
            hint = "It is in image units: for images in 0 to 255 write clip_values=(0, 255) and eps=8, say."
            raise AttackError(expected(shown, f"at most the clip range {span:g} of {clip_values}", size, hint))

    def check_proportion(self, clip_values: tuple[float, float]) -> None:
        """Raise an error for a size that was meant for images from 0 to 1, where they reach to 255.

        Raises:
            AttackError: it is less than half a grey level.
        """
        span, size = clip_values[1] - clip_values[0], self.size
        if self._is_bounded and size and 0 < size < 0.5 and span >= _GREY_LEVELS:
            name = "eps" if self.label else self.size_name or "eps"
            hint = f"For {size:.3g} of the range write {name}={size * span:.4g}."
            wanted = f"in the units of clip_values={clip_values}, half a grey level or more"
            raise AttackError(expected(name, wanted, f"{size:.4g}", hint))

    def _has(self, name: str) -> bool:
        """Whether a setting has a value, be it None, that the user gave."""
        return name in self.settings or self.setting(name) is not None

    def _check_others(self) -> None:
        """The settings that attacks of ART share."""
        given = {name for name in ("norm", "num_random_init", "targeted", "minimal") if self._has(name)}
        norm = self.setting("norm")
        if "norm" in given and norm not in ("inf", math.inf):
            _number("norm", norm, '"inf", or a number, 1 or more', above=1.0 - 1e-12)
        if "num_random_init" in given:
            check_integer("num_random_init", self.setting("num_random_init"), least=0, error=AttackError)
        for flag in ("targeted", "minimal"):
            value = self.setting(flag)
            if flag in given and not isinstance(value, (bool, np.bool_)):
                raise AttackError(expected(flag, "True or False", repr(value)))
        share = self.settings.get("gamma") if self.label == "jsma" else None
        if share is not None:
            _number("gamma", share, "a share in (0, 1], or None", above=0.0, below=1.0 + 1e-12)


# Images whose range is as wide are counted in grey levels.
_GREY_LEVELS = 100.0


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and value is not False


def _number(name: str, value: object, wanted: str, *, above: float, below: float = math.inf) -> float:
    """A finite number; text that reads as one is no number, but the hint writes it."""
    hint = ""
    if isinstance(value, str):
        upper, slash, lower = value.partition("/")
        with suppress(ValueError):
            float(upper), float(lower or 1)
            hint = f"Write it without quotes: {name}={upper.strip()}{slash and ' / '}{lower.strip()}."
    return check_number(name, value, wanted, above=above, below=below, hint=hint, error=AttackError)


def _renamed(settings: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """Settings of a preset in ART's names: JSMA calls its size theta."""
    return {"theta" if preset == "jsma" and name == "eps" else name: value for name, value in settings.items()}


PRESETS: Mapping[str, AttackConfig] = {
    "fgsm": AttackConfig("FastGradientMethod", {"eps": None}, "fgsm"),
    "bim": AttackConfig("BasicIterativeMethod", {"eps": None, "eps_step": None, "max_iter": 10}, "bim"),
    "pgd": AttackConfig(
        "ProjectedGradientDescent", {"eps": None, "eps_step": None, "max_iter": 10, "num_random_init": 1}, "pgd"
    ),
    "jsma": AttackConfig("SaliencyMapMethod", {"theta": None, "max_iter": 25, "gamma": None}, "jsma"),
}
"""Attacks that have short names, with their defaults; a size of None is 0.3 of the clip range."""


def aims(attack: Any) -> bool:
    """Whether the attack is targeted, so that the labels it gets are target classes."""
    return _is_one_of(attack, _ALWAYS_TARGETED) or bool(getattr(attack, "targeted", False))


def _is_one_of(attack: Any, classes: set[str]) -> bool:
    return any(base.__name__ in classes for base in type(attack).__mro__)


def resolve_clip_values(
    given: tuple[float, float] | None, estimator: Any, normalization: Normalization | None = None
) -> tuple[float, float]:
    """The clip values: the user's or the estimator's, else those of the images that the normalisation is for.

    Args:
        given: by the user.
        estimator: the attacked one.
        normalization: None where there is no default.

    Raises:
        AttackError: there are none, they disagree, or low is not below high.
    """
    own = clip_values_of(estimator)
    hint = "Without them nothing is clipped; write clip_values=(0.0, 1.0), in image units."
    pair = own if given is None else given
    if pair is None and normalization is not None and not is_art_classifier(estimator):
        pair = _range_of(normalization)
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise AttackError(expected("clip_values", "a pair (low, high)", repr(given), hint))
    if not all(map(_is_real, pair)):
        raise AttackError(expected("clip_values", "a pair (low, high) of numbers", repr(given), hint))
    low, high = (float(value) for value in pair)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise AttackError(expected("clip_values", "a pair (low, high) with low < high", (low, high)))
    if own is not None and own != (low, high):
        raise AttackError(expected("clip_values", f"those of the attack's estimator, {own}", (low, high)))
    return low, high


def _range_of(normalization: Normalization) -> tuple[float, float]:
    """Range of the images that a normalisation is for: (0, 1) without one; else by the size of mean and std.

    Raises:
        AttackError: it fits images neither in (0, 1) nor in (0, 255).
    """
    values = (*normalization.mean, *normalization.std)
    if normalization.is_identity or (min(values) >= 0 and max(values) <= 1):
        return 0.0, 1.0
    if min(values) >= 0 and 10 <= max(values) <= 255:
        logger.info("clip_values: (0, 255) taken, because normalization is for such images")
        return 0.0, 255.0
    pair = (normalization.mean, normalization.std)
    hint = "Write the least and greatest value of an image, clip_values=(0, 255) for example."
    raise AttackError(expected("clip_values", f"given for images with normalization={pair}", None, hint))


def check_options(
    targeted_class: int | None, batch_size: int, multi_label: bool, probabilities: bool, output: object, mask: object
) -> None:
    """The options that all attacks share.

    Raises:
        AttackError: one cannot be.
    """
    check_integer("batch_size", batch_size, least=1, error=AttackError)
    for name, flag in (("multi_label", multi_label), ("probabilities", probabilities)):
        if not isinstance(flag, (bool, np.bool_)):
            raise AttackError(expected(name, "True or False", repr(flag)))
    if multi_label and batch_size > 1:
        hint = "The labels that are attacked differ from image to image."
        raise AttackError(expected("batch_size", "1 for multi-label networks", batch_size, hint))
    if targeted_class is not None:
        check_integer("targeted_class", targeted_class, "a class index, at least 0", least=0, error=AttackError)
    if isinstance(output, bool) or not (output is None or callable(output) or isinstance(output, (str, int))):
        raise AttackError(expected("output", "None, a key, an index or a callable", repr(output)))
    if mask is not None and not isinstance(mask, Tensor):
        raise AttackError(expected("mask", "a tensor, or None", type(mask).__name__))


def checked_model(model: Any) -> Any:
    if not (isinstance(model, nn.Module) or is_art_classifier(model)):
        hint = "For a plain function wrap it in an nn.Module, or pass an attack on an ART BlackBoxClassifier."
        if isinstance(getattr(model, "model", None), nn.Module):
            hint = "Pass its network, `.model`; with `clip_values=` and `normalization=` of its images."
        raise AttackError(expected("model", "an nn.Module or an ART classifier", type(model).__name__, hint))
    return model


class ImageNetwork(nn.Module):
    """The network that an attack works on: float32 images in image units to float32 scores (N, C), such as logits.

    The wrapped network is not registered as a submodule, so that ART's ``.to()``, ``.train()`` and ``.zero_grad()`` do
    not reach it; inputs are moved to its current device and dtype at each call. ART runs the children of an
    ``nn.Sequential`` one by one, without its hooks and ``forward``; the wrapper prevents that too.

    Args:
        model: the network, which takes model units.
        to_model: image units to model units.
        output: key or function that selects the scores from the network's output.
        probabilities: the network ends in a softmax or sigmoid, which is inverted.
        multi_label: each output is a label of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        to_model: Callable[[Tensor], Tensor] | None = None,
        *,
        output: str | int | Callable[[Any], Tensor] | None = None,
        probabilities: bool = False,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        self._hidden = (model,)
        self.to_model = to_model
        self.output = output
        self.probabilities = probabilities
        self.multi_label = multi_label

    def forward(self, images: Tensor) -> Tensor:
        (model,) = self._hidden
        tensors = (*model.parameters(), *model.buffers())
        like = next((t for t in tensors if t.is_floating_point()), images)
        x = images.to(like.device, like.dtype)
        # Back where the images are: ART keeps its labels there, and knows no devices but CPU and CUDA.
        scores = self._scores(model(x if self.to_model is None else self.to_model(x))).to(images.device)
        if not self.probabilities:
            return scores
        # Clamped where float32 would overflow or underflow; the gradient is zero there in any case.
        log_p = scores.clamp_min(1e-30).log()
        independent = self.multi_label or scores.shape[1] == 1
        return log_p - (1 - scores).clamp_min(6e-8).log() if independent else log_p

    def _scores(self, result: Any) -> Tensor:
        if callable(self.output):
            result = self.output(result)
        elif self.output is not None:
            result = result[self.output]
        if not isinstance(result, Tensor):
            raise ModelError(
                expected("model", "a network that returns a tensor", type(result).__name__, "Say which with `output=`.")
            )
        if result.dim() == 1:
            result = result[:, None]
        if result.dim() != 2:
            shape = tuple(result.shape)
            raise ModelError(expected("model", "a network with scores (N, C), to be attacked", f"scores {shape}"))
        scores: Tensor = result.float()
        return scores


class BinaryProblem(nn.Module):
    """A multi-label network as a problem of two classes: 1 "all labels as predicted", 0 "at least one flipped".

    The value is the smallest margin min_l s_l z_l, so that decision-based attacks are exact. The gradient is that of
    the sum of the labels' binary cross-entropies, the loss that such networks are trained with.

    Args:
        network: images to logits z, (N, L).
        signs: s, (L,): 1 for a label that is present, -1 for one that is absent, 0 for one that is left out.
    """

    def __init__(self, network: nn.Module, signs: Tensor) -> None:
        super().__init__()
        self.network = network
        self.signs = signs

    def forward(self, images: Tensor) -> Tensor:
        scores = self.network(images)
        signs = self.signs.to(scores)
        margins = scores * signs
        loss = (F.softplus(-margins) * signs.abs()).sum(1)
        smallest = margins.masked_fill(signs == 0, torch.inf).amin(1).detach()
        # -m and m rather than 0 and 2m: the gradient of the larger logit vanishes once its probability rounds to 1.
        margin = (smallest - loss + loss.detach()) / 2
        return torch.stack([-margin, margin], 1)


@dataclass(frozen=True)
class TargetClassifier:
    """The attacked network or ART estimator, and how it is attacked; arguments as in ``Adversarial``."""

    model: Any
    normalization: Normalization
    clip_values: tuple[float, float]
    targeted_class: int | None = None
    multi_label: bool = False
    probabilities: bool = False
    output: str | int | Callable[[Any], Tensor] | None = None
    batch_size: int = 1
    mask: Tensor | None = None

    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults, for ``repr``."""
        given = {one.name: (getattr(self, one.name), one.default) for one in fields(self)[3:]}
        values = {name: value for name, (value, default) in given.items() if value is not default}
        return {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in values.items()}

    @cached_property
    def networks(self) -> list[nn.Module]:
        """The networks found in ``model``."""
        return modules_of(self.model)

    @property
    def is_estimator(self) -> bool:
        return not isinstance(self.model, nn.Module)

    def network(self) -> ImageNetwork:
        """A torch module from images in image units to scores."""
        own = (self.model, self.normalization.to_model)
        model, to_model = (unwrap(self.model)[0], None) if self.is_estimator else own
        return ImageNetwork(
            model, to_model, output=self.output, probabilities=self.probabilities, multi_label=self.multi_label
        )

    def scores(self, images: Array) -> Array:
        """Scores (N, C), computed image by image (or by ``batch_size``) as in the attack."""
        parts = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        if self.is_estimator and not self.multi_label:
            found = np.concatenate([self.model.predict(part) for part in parts])
            if found.ndim == 2 and found.shape[1] > 1:
                return found
        network = self.network()
        with torch.no_grad():
            return np.concatenate([network(torch.from_numpy(part)).cpu().numpy() for part in parts])

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode with gradients enabled; the state is restored afterwards."""
        with torch.inference_mode(False), torch.enable_grad(), state_guard(networks=self.networks), _EAGER:
            for parameter in {p for module in self.networks for p in module.parameters() if p.is_leaf}:
                # Only the gradient with respect to the image is needed.
                parameter.requires_grad_(False)
            yield


def craft(classifier: TargetClassifier, config: AttackConfig, clean: Tensor, context: Context) -> AttackResult:
    """Attack every example of a batch; see ``Adversarial.run``."""
    _check_input(clean, context)
    with classifier.ready():
        plain = clean.detach()
        images = classifier.normalization.to_image(plain.float()).cpu().numpy().astype(np.float32, copy=True)
        _check_range(images, classifier)
        scores = classifier.scores(images)
        task = _Task(classifier, config, context, scores)
        raw = images.copy() if config.size == 0 else task.attack(images)
        clipped = np.clip(raw, *classifier.clip_values)
        _warn_unchanged(clipped != images, config)
        prediction = task.prediction(classifier.scores(clipped))
        change = torch.from_numpy(clipped.astype(np.float64) - images).flatten(1)
        return AttackResult(
            raw=_to_model(raw, images, plain, classifier.normalization),
            clipped=_to_model(clipped, images, plain, classifier.normalization),
            success=task.success(prediction),
            clean_prediction=task.prediction(scores),
            prediction=prediction,
            l_inf=change.abs().amax(1),
            l2=change.norm(dim=1),
            eps=config.size,
            name=config.name,
        )


class _Task:
    """The labels of one batch: the classes that examples are moved away from, or towards."""

    def __init__(self, classifier: TargetClassifier, config: AttackConfig, context: Context, scores: Array) -> None:
        self.classifier, self.config, self.context, self.scores = classifier, config, context, scores
        self.binary = classifier.multi_label or scores.shape[1] == 1
        n_classes = scores.shape[1]
        _warn_probabilities(scores, classifier, self.binary)
        self.target = _checked_target(context.target, len(scores), n_classes)
        if classifier.targeted_class is not None and classifier.targeted_class >= n_classes:
            raise AttackError(expected("targeted_class", f"a class in 0 to {n_classes - 1}", classifier.targeted_class))

    def prediction(self, scores: Array) -> Tensor:
        return torch.from_numpy(scores > 0 if self.binary else scores.argmax(1))

    def success(self, prediction: Tensor) -> Tensor:
        before, aim = self.prediction(self.scores), self.classifier.targeted_class
        if aim is not None:
            return prediction[:, aim] if self.binary else prediction == aim
        if not self.binary:
            return prediction != before
        attacked = torch.from_numpy(np.stack([self._signs(i) for i in range(len(before))]) != 0)
        return ((prediction != before) & attacked).any(1)

    def attack(self, images: Array) -> Array:
        """What the attack returns, (N, ...), in image units."""
        alone = self.binary or self.config.step_limit is not None
        step = 1 if alone else self.classifier.batch_size
        found = [self._attack(images, slice(i, min(i + step, len(images)))) for i in range(0, len(images), step)]
        return np.concatenate(found)

    def _attack(self, images: Array, rows: slice) -> Array:
        context, x = self.context, images[rows].copy()
        key = (context.ids[rows.start], "attack", context.position, context.variant)
        with state_guard(seed=generator(context.seed, *key).initial_seed()):
            estimator = self._estimator(rows.start, x.shape[1:])
            if self.config.step_limit is not None:
                estimator = limit_steps(estimator, self.config.step_limit, int(self._labels(rows, aiming=True)[0]))
            attack = self.config.make(estimator)
            labels = self._labels(rows, aims(attack))
            mask = _mask(self.classifier.mask, x)
            # Some attacks accept a mask but ignore it; changes outside of it are reverted below.
            options = {"mask": mask} if mask is not None and _is_one_of(attack, _WITH_MASK) else {}
            found = attack.generate(x=x.copy(), y=labels, **options)
        if not (isinstance(found, np.ndarray) and found.shape == x.shape):
            what = getattr(found, "shape", type(found).__name__)
            raise AttackError(expected("attack", f"one that returns adversarial images {x.shape}", what))
        if not np.isfinite(found).all():
            raise AttackError(expected("attack", "one that returns finite images", f"{self.config.name} with NaN"))
        result: Array = found.astype(np.float32)
        return result if mask is None else np.where(mask != 0, result, x)

    def _estimator(self, row: int, shape: tuple[int, ...]) -> Any:
        classifier = self.classifier
        if classifier.is_estimator and not self.binary:
            return classifier.model
        network: nn.Module = classifier.network()
        model = classifier.networks[0]
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        if self.binary:
            network = BinaryProblem(network, torch.from_numpy(self._signs(row)))
        n_classes = 2 if self.binary else self.scores.shape[1]
        return build_classifier(network, shape, n_classes, classifier.clip_values, device)

    def _signs(self, row: int) -> Array:
        """1 for labels that are present, -1 for absent ones, 0 for those that are not attacked."""
        signs = np.where(self.scores[row] > 0, 1.0, -1.0).astype(np.float32)
        aim = self.classifier.targeted_class
        if aim is None and self.target is None:
            return signs
        only = int(self.target[row]) if aim is None and self.target is not None else aim
        signs[np.arange(len(signs)) != only] = 0
        if aim is not None:
            signs[aim] = -1
        return signs

    def _labels(self, rows: slice, aiming: bool) -> Array:
        """Labels for ART: the classes to move away from, or to aim at."""
        aim, scores = self.classifier.targeted_class, self.scores[rows]
        if self.binary:
            return np.full(len(scores), 0 if aiming else 1)
        if aim is not None and not aiming:
            raise AttackError(expected("targeted_class", f"None, as {self.config.name} cannot aim at a class", aim))
        if aim is not None:
            return np.full(len(scores), aim)
        answer = scores.argmax(1)
        away = answer if self.target is None else self.target[rows]
        if not aiming:
            return away
        # The runner-up: the best class that is neither predicted nor the one to move away from.
        others = scores.copy()
        row = np.arange(len(scores))
        others[row, answer] = others[row, away] = -np.inf
        goal: Array = np.where(np.isfinite(others).any(1), others.argmax(1), answer)
        return goal


def _check_input(clean: Tensor, context: Context) -> None:
    if context.position:
        raise InputError(expected("inputs", "one tensor, as attacks take one input", f"input {context.position + 1}"))
    if not clean.is_floating_point():
        raise InputError(expected("inputs", "a tensor of floats", str(clean.dtype), "Convert it with .float()."))
    if clean.dim() < 2 or clean.numel() == 0:
        raise InputError(expected("inputs", "a batch (N, ...) of at least one example", tuple(clean.shape)))
    if not bool(clean.isfinite().all()):
        raise InputError(expected("inputs", "finite", "NaN or infinite values"))


def _check_range(images: Array, classifier: TargetClassifier) -> None:
    """Whether images lie inside the clip values, or seem to be in other units.

    Raises:
        InputError: they do not, or they are; the message says what was seen, and what to write.
    """
    low, high = classifier.clip_values
    least, greatest = float(images.min()), float(images.max())
    got = f"values from {least:.4g} to {greatest:.4g}"
    if min(least - low, high - greatest) >= -0.002 * (high - low):
        # All of 255 grey levels within one, and between levels: images in (0, 1).
        if high - low >= _GREY_LEVELS and low <= least and greatest <= low + 1 and bool((images % 1 != 0).any()):
            wanted = f"in the units of clip_values={classifier.clip_values}"
            hint = "Write clip_values=(0, 1), and sizes in these units (eps=8/255); or scale the images."
            raise InputError(expected("inputs", wanted, got, hint))
        return
    if clip_values_of(classifier.model) is not None:
        hint = "Scale the images, or give the classifier their `clip_values`."
    elif least > -0.5 and 10 * max(high, 1.0) < greatest < 255.5:
        hint = "Write clip_values=(0, 255), and sizes in these units: eps=8, say."
    else:
        normalised = classifier.normalization.is_identity and least < low
        hint = f"Write their range, clip_values=({math.floor(least)}, {math.ceil(greatest)}), or clamp them."
        hint = "If they are normalised, write normalization=(mean, std). Else w" + hint[1:] if normalised else hint
    raise InputError(expected("inputs", f"within clip_values={classifier.clip_values} in image units", got, hint))


def _checked_target(target: Tensor | None, n: int, n_classes: int) -> Array | None:
    if target is None:
        return None
    whole = isinstance(target, Tensor) and not target.is_floating_point()
    if not whole or target.shape != (n,):
        shown = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise TargetError(expected("target", f"a tensor of class indices ({n},)", shown))
    if bool(((target < 0) | (target >= n_classes)).any()):
        raise TargetError(expected("target", f"classes in 0 to {n_classes - 1}", target.tolist()))
    indices: Array = target.detach().cpu().numpy().astype(np.int64)
    return indices


def _warn_probabilities(scores: Array, classifier: TargetClassifier, binary: bool) -> None:
    if classifier.probabilities or scores.min() < 0 or scores.max() > 1 or scores.size < 4:
        return
    if binary or np.allclose(scores.sum(1), 1, atol=1e-4):
        message = "The network's outputs look like probabilities: write probabilities=True, or the gradients are wrong."
        warnings.warn(message, ProbabilityWarning, stacklevel=5)


def _warn_unchanged(changed: Array, config: AttackConfig) -> None:
    same = int((~changed.reshape(len(changed), -1).any(1)).sum())
    if same:
        message = f"The attack {config.name} changed nothing in {same} of {len(changed)} examples."
        warnings.warn(message, NoChangeWarning, stacklevel=4)


def _mask(mask: Tensor | None, x: Array) -> Array | None:
    if mask is None:
        return None
    try:
        spread: Array = np.broadcast_to(mask.detach().cpu().numpy().astype(np.float32), x.shape).copy()
    except ValueError as error:
        raise AttackError(expected("mask", f"broadcastable to images {x.shape}", tuple(mask.shape))) from error
    return spread


def _to_model(found: Array, images: Array, clean: Tensor, normalization: Normalization) -> Tensor:
    """To model units; unchanged values are copied from the clean input, to avoid the rounding of the conversion."""
    adversarial = normalization.to_model(torch.from_numpy(found).to(clean.device)).to(clean.dtype)
    changed = torch.from_numpy(found != images).to(clean.device)
    return torch.where(changed, adversarial, clean)
