"""Crafting adversarial examples: one image at a time, in the right direction, and without side effects."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import cached_property
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
    NormalizationWarning,
    ProbabilityWarning,
    TargetError,
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
from ce_plugin.networks.forward import clip_values_of, is_art_classifier, unwrap
from ce_plugin.networks.guard import Shared, modules_of, state_guard
from ce_plugin.randomness import generator

Array = np.ndarray[Any, np.dtype[Any]]

_SIZES = ("eps", "theta")


def _uncompiled() -> AbstractContextManager[object]:
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


# A compiled backward pass can run only once and ART runs it again; this also avoids recompilation.
_EAGER = Shared(_uncompiled)
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
        if isinstance(attack, cls):
            config = cls(attack.source, {**attack.settings, **settings}, attack.label)
        else:
            config = cls(attack_class(attack) if isinstance(attack, str) else attack, dict(settings))
        if not (config.label or config.is_instance or callable(config.source)):
            kinds = "an ART EvasionAttack, a class of such, its name, or a function that makes one"
            raise AttackError(expected("attack", kinds, type(attack).__name__))
        if settings:
            config._check_settings(settings)
        return config

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise an error for settings that the attack does not have, and suggest the closest name."""
        if self.is_instance:
            known = set(self.source.attack_params)
        elif any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters.values()):
            return
        else:
            known = set(list(self.parameters)[1:])
        for name in settings:
            if name not in known:
                raise unknown_name(f"setting of {self.name}", name, known)

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
        value = None if self.size_name is None else self.setting(self.size_name)
        return float(value) if isinstance(value, (int, float)) else None

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
        """Raise an error for invalid sizes, before any work.

        Raises:
            AttackError: eps is negative, not finite or larger than the clip range; a step or number of iterations
                is not positive.
        """
        size, name = self.size, self.size_name or "eps"
        span = clip_values[1] - clip_values[0]
        if size is not None:
            if not (math.isfinite(size) and (size >= 0 or name == "theta")):
                raise AttackError(expected(name, "a finite number, at least 0, in image units", size))
            if self.setting("norm", math.inf) in ("inf", math.inf) and abs(size) > span:
                hint = "It is in image units: for images in 0 to 255 write clip_values=(0, 255) and eps=8, say."
                raise AttackError(expected(name, f"at most the clip range {span:g} of {clip_values}", size, hint))
        for key in ("eps_step", "max_iter"):
            value = self.setting(key)
            if isinstance(value, (int, float)) and not value > 0:
                raise AttackError(expected(key, "positive", value))


def aims(attack: Any) -> bool:
    """Whether the attack is targeted, so that the labels it gets are target classes."""
    return _is_one_of(attack, _ALWAYS_TARGETED) or bool(getattr(attack, "targeted", False))


def _is_one_of(attack: Any, classes: set[str]) -> bool:
    return any(base.__name__ in classes for base in type(attack).__mro__)


def resolve_clip_values(given: tuple[float, float] | None, estimator: Any) -> tuple[float, float]:
    """The clip values, the user's or the estimator's.

    Raises:
        AttackError: neither has clip values, they disagree, or low is not below high.
    """
    own = clip_values_of(estimator)
    hint = "Without them nothing is clipped; write clip_values=(0.0, 1.0), in image units."
    pair = own if given is None else given
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise AttackError(expected("clip_values", "a pair (low, high)", repr(given), hint))
    low, high = (float(value) for value in pair)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise AttackError(expected("clip_values", "a pair (low, high) with low < high", (low, high)))
    if own is not None and own != (low, high):
        raise AttackError(expected("clip_values", f"those of the attack's estimator, {own}", (low, high)))
    return low, high


def check_options(targeted_class: int | None, batch_size: int, multi_label: bool) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise AttackError(expected("batch_size", "a whole number, at least 1", batch_size))
    if multi_label and batch_size > 1:
        hint = "The labels that are attacked differ from image to image."
        raise AttackError(expected("batch_size", "1 for multi-label networks", batch_size, hint))
    whole = isinstance(targeted_class, int) and not isinstance(targeted_class, bool)
    if targeted_class is not None and (not whole or targeted_class < 0):
        raise AttackError(expected("targeted_class", "a class index, at least 0", repr(targeted_class)))


def checked_model(model: Any) -> Any:
    if not (isinstance(model, nn.Module) or is_art_classifier(model)):
        hint = "For a plain function wrap it in an nn.Module, or pass an attack on an ART BlackBoxClassifier."
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
        _check_range(images, classifier.clip_values)
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


def _check_range(images: Array, clip_values: tuple[float, float]) -> None:
    low, high = clip_values
    if min(images.min() - low, high - images.max()) < -0.002 * (high - low):
        message = (
            f"Expected inputs within clip_values={clip_values} in image units, but got values from {images.min():.4g} "
            f"to {images.max():.4g}: the attack clips them. If they are normalised, write normalization=(mean, std)."
        )
        warnings.warn(message, NormalizationWarning, stacklevel=4)


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
