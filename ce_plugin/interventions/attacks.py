"""How an attack is made: from an instance, a class, a function or a preset, again for every size and image."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ce_plugin._art import (
    attack_class,
    attack_with_estimator,
    clip_values_of,
    copy_attack,
    is_art_attack,
    is_art_classifier,
)
from ce_plugin.errors import AttackError, expected, unknown_name

__all__ = ["PRESETS", "AttackRecipe", "AttackResult", "preset_recipe"]

_SIZES = ("eps", "theta")
_WITH_MASK = {"FastGradientMethod", "ProjectedGradientDescentCommon", "ProjectedGradientDescent"}
_ALWAYS_TARGETED = {"SaliencyMapMethod", "LowProFool", "TargetedUniversalPerturbation"}


@dataclass(frozen=True)
class AttackResult:
    """What an attack made of a batch, and whether it worked.

    Attributes:
        raw: what the attack returned, (N, ...), in model units.
        clipped: the same inside the clip values; what ``do`` sets.
        success: (N,), True where the prediction changed (or became the class aimed at; for several labels: where one
            of the attacked labels flipped).
        clean_prediction: class of the clean input, (N,); for several labels whether each is present, (N, L).
        prediction: the same of ``clipped``.
        l_inf: largest change of a value, (N,), in image units.
        l2: Euclidean length of the change, (N,), in image units.
        eps: size of the attack, where it has one.
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
        """Share of the examples on which the attack worked."""
        return float(self.success.double().mean())

    def __repr__(self) -> str:
        count = f"{int(self.success.sum())} of {len(self.success)}"
        size = "" if self.eps is None else f"eps={self.eps:g}, "
        return f"AttackResult({self.name}, {size}success={count}, l_inf<={float(self.l_inf.max()):.4g})"


@dataclass(frozen=True)
class AttackRecipe:
    """An attack that can be made again: for each image afresh, for another estimator, with another eps.

    Args:
        source: an ART attack, the name of a class of ART's attacks, or a class or function called as
            ``source(estimator, **settings)``.
        settings: what the attack is made with; for an instance, what is set on its copies.
        label: short name for messages.
    """

    source: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @classmethod
    def of(cls, attack: Any, settings: Mapping[str, Any]) -> AttackRecipe:
        """The recipe of what a user wrote.

        Raises:
            AttackError: it is no attack and makes none.
            UnknownNameError: no attack has this name, or the attack no such setting.
        """
        if isinstance(attack, cls):
            recipe = cls(attack.source, {**attack.settings, **settings}, attack.label)
        else:
            recipe = cls(attack_class(attack) if isinstance(attack, str) else attack, dict(settings))
        if not (recipe.label or recipe.is_instance or callable(recipe.source)):
            kinds = "an ART EvasionAttack, a class of such, its name, or a function that makes one"
            raise AttackError(expected("attack", kinds, type(attack).__name__))
        if settings:
            _check_settings(recipe, settings)
        return recipe

    @property
    def is_instance(self) -> bool:
        return is_art_attack(self.source)

    @property
    def name(self) -> str:
        """The preset's name, or that of the class."""
        source = self.source
        if self.label or isinstance(source, str):
            return self.label or str(source)
        return type(source).__name__ if self.is_instance else getattr(source, "__name__", repr(source))

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting as the user wrote it, or as it is in the instance or in the defaults of the class."""
        if name in self.settings:
            return self.settings[name]
        if self.is_instance:
            return getattr(self.source, name, default)
        parameter = None if isinstance(self.source, str) else _parameters(self.source).get(name)
        return default if parameter is None or parameter.default is parameter.empty else parameter.default

    @property
    def size_name(self) -> str | None:
        """``"eps"``, or what stands for it, or None where the attack finds its own size."""
        return next((name for name in _SIZES if self.setting(name) is not None), None)

    @property
    def size(self) -> float | None:
        value = None if self.size_name is None else self.setting(self.size_name)
        return float(value) if isinstance(value, (int, float)) else None

    def aimed(self) -> AttackRecipe:
        """The same attack aiming at a class, as far as a setting can make it; :func:`aims` tells of the outcome."""
        if self.is_instance:
            possible = "targeted" in self.source.attack_params
        else:
            maker = attack_class(self.source) if isinstance(self.source, str) else self.source
            possible = "targeted" in _parameters(maker)
        if not possible:
            return self
        return AttackRecipe(self.source, {**self.settings, "targeted": True}, self.label)

    def resized(self, eps: float) -> AttackRecipe:
        """The same attack with another eps; a step size that was given keeps its ratio to it.

        Raises:
            AttackError: the attack has no eps, or holds attacks whose eps is their own.
        """
        name = self.size_name
        if name is None or (self.is_instance and hasattr(self.source, "attacks")):
            todo = "Build it from its class with another size instead."
            raise AttackError(expected("eps", f"None, as {self.name} has none that can be changed", eps, todo))
        settings = {**self.settings, name: float(eps)}
        step = self.setting("eps_step")
        if name == "eps" and isinstance(step, (int, float)) and self.size and eps > 0:
            settings["eps_step"] = float(step) * eps / self.size
        return AttackRecipe(self.source, settings, self.label)

    @property
    def step_limit(self) -> int | None:
        """Number of steps that ART does not bound by itself; such an attack takes one image at a time."""
        return self.settings.get("max_iter") if self.label == "jsma" else None

    def make(self, estimator: Any) -> Any:
        """The attack on an estimator."""
        quiet = {"verbose": False}
        if self.is_instance:
            return copy_attack(self.source, estimator, {**self.settings, **quiet})
        maker = attack_class(self.source) if isinstance(self.source, str) else self.source
        settings = dict(self.settings)
        if self.label == "jsma":
            del settings["max_iter"]
            settings = {name: value for name, value in settings.items() if value is not None}
        elif settings.get("eps_step", 0.0) is None:
            settings["eps_step"] = min(1.0, 2.5 / settings.get("max_iter", 1)) * settings["eps"]
        if "verbose" in _parameters(maker):
            settings = {**quiet, **settings}
        return attack_with_estimator(maker, estimator, settings)

    def check(self, clip_values: tuple[float, float], size: float | None = None) -> None:
        """Refuse sizes that cannot be meant, before any work.

        Raises:
            AttackError: eps is negative, not finite or larger than the clip range; a step or number of iterations
                is not positive.
        """
        size, name = self.size if size is None else size, self.size_name or "eps"
        span = clip_values[1] - clip_values[0]
        if size is not None:
            if not (math.isfinite(size) and (size >= 0 or name == "theta")):
                raise AttackError(expected(name, "a finite number, at least 0, in image units", size))
            if self.setting("norm", math.inf) in ("inf", math.inf) and abs(size) > span:
                todo = "It is in image units: for images in 0 to 255 write clip_values=(0, 255) and eps=8, say."
                raise AttackError(expected(name, f"at most the clip range {span:g} of {clip_values}", size, todo))
        for key in ("eps_step", "max_iter"):
            value = self.setting(key)
            if isinstance(value, (int, float)) and not value > 0:
                raise AttackError(expected(key, "positive", value))


def aims(attack: Any) -> bool:
    """Whether the labels that an attack is given are those it aims at."""
    return bool(_bases(attack) & _ALWAYS_TARGETED) or bool(getattr(attack, "targeted", False))


def takes_mask(attack: Any) -> bool:
    """Whether an attack honours ``mask=``; the others ignore it silently."""
    return bool(_bases(attack) & _WITH_MASK)


def _bases(attack: Any) -> set[str]:
    return {base.__name__ for base in type(attack).__mro__}


def _parameters(maker: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(maker).parameters


def _check_settings(recipe: AttackRecipe, settings: Mapping[str, Any]) -> None:
    """Refuse names of settings that the attack does not have, with the nearest that it has."""
    if recipe.is_instance:
        known = set(recipe.source.attack_params)
    else:
        maker = attack_class(recipe.source) if isinstance(recipe.source, str) else recipe.source
        parameters = _parameters(maker)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        known = set(list(parameters)[1:])
    for name in settings:
        if name not in known:
            raise unknown_name(f"setting of {recipe.name}", name, known)


def resolve_clip_values(given: tuple[float, float] | None, estimator: Any) -> tuple[float, float]:
    """The clip values, the user's or the estimator's.

    Raises:
        AttackError: neither has any, they disagree, or low is not below high.
    """
    own = clip_values_of(estimator)
    todo = "Without them nothing is clipped; write clip_values=(0.0, 1.0), in image units."
    if given is None and own is None:
        raise AttackError(expected("clip_values", "a pair (low, high)", "None", todo))
    if given is not None and not (isinstance(given, (tuple, list)) and len(given) == 2):
        raise AttackError(expected("clip_values", "a pair (low, high)", repr(given), todo))
    low, high = (float(value) for value in (given if given is not None else own or ()))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise AttackError(expected("clip_values", "a pair (low, high) with low < high", (low, high)))
    if own is not None and own != (low, high):
        raise AttackError(expected("clip_values", f"those of the attack's estimator, {own}", (low, high), "Leave out."))
    return low, high


def check_options(targeted_class: int | None, batch_size: int, multi_label: bool) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise AttackError(expected("batch_size", "a whole number, at least 1", batch_size))
    if multi_label and batch_size > 1:
        todo = "Each image has decisions of its own."
        raise AttackError(expected("batch_size", "1 for multi-label networks", batch_size, todo))
    whole = isinstance(targeted_class, int) and not isinstance(targeted_class, bool)
    if targeted_class is not None and (not whole or targeted_class < 0):
        raise AttackError(expected("targeted_class", "a class index, at least 0", repr(targeted_class)))


def checked_model(model: Any) -> Any:
    if not (isinstance(model, nn.Module) or is_art_classifier(model)):
        todo = "For a plain function wrap it in an nn.Module, or pass an attack on an ART BlackBoxClassifier."
        raise AttackError(expected("model", "an nn.Module or an ART classifier", type(model).__name__, todo))
    return model


_CLASSES = {
    "fgsm": "FastGradientMethod",
    "bim": "BasicIterativeMethod",
    "pgd": "ProjectedGradientDescent",
    "jsma": "SaliencyMapMethod",
}
PRESETS = tuple(_CLASSES)


def preset_recipe(name: str, **settings: Any) -> AttackRecipe:
    """The recipe of a preset; ART is imported only when it is made."""
    return AttackRecipe(_CLASSES[name], settings, name)
