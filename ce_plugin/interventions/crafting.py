"""Crafting adversarial examples: one image at a time, in the right direction, and nothing left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ce_plugin._art import build_classifier, limit_steps, unwrap
from ce_plugin.errors import (
    AttackError,
    InputError,
    NoChangeWarning,
    NormalizationWarning,
    ProbabilityWarning,
    TargetError,
    expected,
)
from ce_plugin.guard import modules_of, state_guard
from ce_plugin.interventions.attacks import AttackRecipe, AttackResult, aims, takes_mask
from ce_plugin.interventions.base import Context
from ce_plugin.interventions.normalization import Normalization
from ce_plugin.interventions.problems import BinaryProblem, ImageNetwork
from ce_plugin.randomness import generator

__all__ = ["Victim", "craft", "example_ids", "only_tensor"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Victim:
    """What is attacked: a network or an ART estimator, and how; arguments as in ``Adversarial``."""

    model: Any
    normalization: Normalization
    clip_values: tuple[float, float]
    targeted_class: int | None = None
    multi_label: bool = False
    probabilities: bool = False
    output: str | int | Callable[[Any], Tensor] | None = None
    mask: Tensor | None = None
    batch_size: int = 1

    def shown(self) -> list[tuple[str, Any, Any]]:
        """(name, value, default) of what a representation shows."""
        names = ("targeted_class", "multi_label", "probabilities", "output", "batch_size")
        defaults = (None, False, False, None, 1)
        pairs = [(name, getattr(self, name), default) for name, default in zip(names, defaults, strict=True)]
        return [*pairs, ("mask", None if self.mask is None else tuple(self.mask.shape), None)]

    @property
    def is_estimator(self) -> bool:
        return not isinstance(self.model, nn.Module)

    def network(self) -> ImageNetwork:
        """Images in the attack's units to scores, in torch."""
        model, to_model = (unwrap(self.model)[0], None) if self.is_estimator else (self.model, self._to_model())
        return ImageNetwork(
            model, to_model, output=self.output, probabilities=self.probabilities, multi_label=self.multi_label
        )

    def _to_model(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.normalization.is_identity else self.normalization.to_model

    def scores(self, images: Array) -> Array:
        """Scores (N, C), each image (or batch of ``batch_size``) by itself, as it is crafted."""
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
        """Eval mode, gradients on whatever mode the caller is in, and all as before afterwards."""
        modules = modules_of(self.model)
        # Compiled backward passes can be walked once only, ART walks them again; and nothing need be compiled anew.
        eager = torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), eager, state_guard(*modules):
            for parameter in {p for module in modules for p in module.parameters() if p.is_leaf}:
                # Only the gradient of the image is wanted.
                parameter.requires_grad_(False)
            yield


def craft(victim: Victim, recipe: AttackRecipe, clean: Tensor, context: Context) -> AttackResult:
    """Attack every example of a batch; see ``Adversarial.run``."""
    _check_input(clean, context)
    with victim.ready():
        plain = clean.detach()
        images = victim.normalization.to_image(plain.float()).cpu().numpy().astype(np.float32, copy=True)
        _check_range(images, victim.clip_values)
        scores = victim.scores(images)
        task = _Task(victim, recipe, context, scores)
        raw = images.copy() if recipe.size == 0 else task.attack(images)
        clipped = np.clip(raw, *victim.clip_values)
        _warn_unchanged(clipped != images, recipe)
        prediction = task.prediction(victim.scores(clipped))
        change = torch.from_numpy(clipped.astype(np.float64) - images).flatten(1)
        return AttackResult(
            raw=_to_model(raw, images, plain, victim.normalization),
            clipped=_to_model(clipped, images, plain, victim.normalization),
            success=task.success(prediction),
            clean_prediction=task.prediction(scores),
            prediction=prediction,
            l_inf=change.abs().amax(1),
            l2=change.norm(dim=1),
            eps=recipe.size,
            name=recipe.name,
        )


class _Task:
    """The labels of one batch: what each example is moved away from, and where to."""

    def __init__(self, victim: Victim, recipe: AttackRecipe, context: Context, scores: Array) -> None:
        self.victim, self.recipe, self.context, self.scores = victim, recipe, context, scores
        self.binary = victim.multi_label or scores.shape[1] == 1
        n_classes = scores.shape[1]
        _warn_probabilities(scores, victim, self.binary)
        self.target = _checked_target(context.target, len(scores), n_classes)
        if victim.targeted_class is not None and victim.targeted_class >= n_classes:
            raise AttackError(expected("targeted_class", f"a class in 0 to {n_classes - 1}", victim.targeted_class))

    def prediction(self, scores: Array) -> Tensor:
        return torch.from_numpy(scores > 0 if self.binary else scores.argmax(1))

    def success(self, prediction: Tensor) -> Tensor:
        before, aim = self.prediction(self.scores), self.victim.targeted_class
        if aim is not None:
            return prediction[:, aim] if self.binary else prediction == aim
        if not self.binary:
            return prediction != before
        attacked = torch.from_numpy(np.stack([self._signs(i) for i in range(len(before))]) != 0)
        return ((prediction != before) & attacked).any(1)

    def attack(self, images: Array) -> Array:
        """What the attack returns, (N, ...), in image units."""
        alone = self.binary or self.recipe.step_limit is not None
        step = 1 if alone else self.victim.batch_size
        found = [self._attack(images, slice(i, min(i + step, len(images)))) for i in range(0, len(images), step)]
        return np.concatenate(found)

    def _attack(self, images: Array, rows: slice) -> Array:
        context, x = self.context, images[rows].copy()
        key = (context.ids[rows.start], "attack", context.position, context.variant)
        with state_guard(seed=generator(context.seed, *key).initial_seed()):
            estimator = self._estimator(rows.start, x.shape[1:])
            if self.recipe.step_limit is not None:
                estimator = limit_steps(estimator, self.recipe.step_limit, int(self._labels(rows, aiming=True)[0]))
            attack = self.recipe.make(estimator)
            labels = self._labels(rows, aims(attack))
            mask = _mask(self.victim.mask, x)
            options = {"mask": mask} if mask is not None and takes_mask(attack) else {}
            found = attack.generate(x=x.copy(), y=labels, **options)
        if not (isinstance(found, np.ndarray) and found.shape == x.shape):
            what = getattr(found, "shape", type(found).__name__)
            raise AttackError(expected("attack", f"one that returns adversarial images {x.shape}", what))
        if not np.isfinite(found).all():
            raise AttackError(expected("attack", "one that returns finite images", f"{self.recipe.name} with NaN"))
        result: Array = found.astype(np.float32)
        return result if mask is None else np.where(mask != 0, result, x)

    def _estimator(self, row: int, shape: tuple[int, ...]) -> Any:
        victim = self.victim
        if victim.is_estimator and not self.binary:
            return victim.model
        network: nn.Module = victim.network()
        (model,) = modules_of(victim.model)[:1]
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        if self.binary:
            network = BinaryProblem(network, torch.from_numpy(self._signs(row)))
        n_classes = 2 if self.binary else self.scores.shape[1]
        return build_classifier(network, shape, n_classes, victim.clip_values, device)

    def _signs(self, row: int) -> Array:
        """1 for labels that are present, -1 for absent ones, 0 for those that are not attacked."""
        signs = np.where(self.scores[row] > 0, 1.0, -1.0).astype(np.float32)
        aim = self.victim.targeted_class
        if aim is None and self.target is None:
            return signs
        only = int(self.target[row]) if aim is None and self.target is not None else aim
        signs[np.arange(len(signs)) != only] = 0
        if aim is not None:
            signs[aim] = -1
        return signs

    def _labels(self, rows: slice, aiming: bool) -> Array:
        """Labels for ART: the classes to move away from, or to aim at."""
        aim, scores = self.victim.targeted_class, self.scores[rows]
        if self.binary:
            return np.full(len(scores), 0 if aiming else 1)
        if aim is not None and not aiming:
            raise AttackError(expected("targeted_class", f"None, as {self.recipe.name} cannot aim at a class", aim))
        if aim is not None:
            return np.full(len(scores), aim)
        answer = scores.argmax(1)
        away = answer if self.target is None else self.target[rows]
        if not aiming:
            return away
        # The runner-up: the best class that is neither the answer nor the one to move away from.
        others = scores.copy()
        row = np.arange(len(scores))
        others[row, answer] = others[row, away] = -np.inf
        goal: Array = np.where(np.isfinite(others).any(1), others.argmax(1), answer)
        return goal


def _check_input(clean: Tensor, context: Context) -> None:
    if context.position:
        raise InputError(expected("inputs", "one tensor, as attacks know one input", f"input {context.position + 1}"))
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


def _warn_probabilities(scores: Array, victim: Victim, binary: bool) -> None:
    if victim.probabilities or scores.min() < 0 or scores.max() > 1 or scores.size < 4:
        return
    if binary or np.allclose(scores.sum(1), 1, atol=1e-4):
        message = "The network's outputs look like probabilities: write probabilities=True, or attacks may go astray."
        warnings.warn(message, ProbabilityWarning, stacklevel=5)


def _warn_unchanged(changed: Array, recipe: AttackRecipe) -> None:
    same = int((~changed.reshape(len(changed), -1).any(1)).sum())
    if same:
        message = f"The attack {recipe.name} changed nothing in {same} of {len(changed)} examples."
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
    """To model units; where nothing changed the clean value itself, free of the rounding of the way there and back."""
    adversarial = normalization.to_model(torch.from_numpy(found).to(clean.device)).to(clean.dtype)
    changed = torch.from_numpy(found != images).to(clean.device)
    return torch.where(changed, adversarial, clean)


def only_tensor(inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if len(tensors) != 1:
        raise InputError(expected("inputs", "one tensor, as attacks know one input", f"{len(tensors)} tensors"))
    return tensors[0]


def example_ids(ids: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if ids is not None and len(ids) != n:
        raise InputError(expected("ids", f"one per example, {n}", f"{len(ids)}"))
    return (0,) * n if ids is None else tuple(int(i) for i in ids)
