"""The one place that works round the quirks of the Adversarial Robustness Toolbox (ART); ART is imported when used.

Importing ART writes ``~/.art/config.json`` where there is none (an existing one is kept) and takes seconds. There is
no option against it: only the home directory decides, and moving that would make ART save to a place that is lost.
"""

from __future__ import annotations

import copy
import inspect
import logging
import logging.config
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin.errors import AttackError, ModelError, expected, unknown_name
from ce_plugin.guard import state_guard

__all__ = [
    "BinaryProblem",
    "ImageNetwork",
    "attack_class",
    "attack_with_estimator",
    "build_classifier",
    "copy_attack",
    "is_art_attack",
    "is_art_classifier",
    "load_art",
    "unwrap",
]

ClipValues = tuple[float, float]


def load_art() -> None:
    """Import ART and leave the user's logging and random state alone."""
    if "art.attacks.evasion" in sys.modules:
        return
    # ART configures logging at import, which closes every handler that the user has: a log file then loses lines.
    configure = logging.config.dictConfig
    logging.config.dictConfig = lambda config: None
    try:
        with state_guard():
            import art.attacks.evasion
            import art.estimators.classification  # noqa: F401
    finally:
        logging.config.dictConfig = configure
    logging.getLogger("art").addHandler(logging.NullHandler())


def is_art_classifier(thing: object) -> bool:
    """Whether this is a classifier of ART; answered without importing ART."""
    module = sys.modules.get("art.estimators.classification.classifier")
    return module is not None and isinstance(thing, module.ClassifierMixin)


def is_art_attack(thing: object) -> bool:
    """Whether this is an evasion attack of ART, ready to run; answered without importing ART."""
    module = sys.modules.get("art.attacks.attack")
    return module is not None and isinstance(thing, module.EvasionAttack)


def attack_class(name: str) -> type[Any]:
    """The evasion attack of ART with this class name.

    Raises:
        UnknownNameError: there is none; the nearest names are given.
    """
    load_art()
    import art.attacks.evasion as evasion
    from art.attacks.attack import EvasionAttack

    known = {
        key: value
        for key, value in vars(evasion).items()
        if inspect.isclass(value) and issubclass(value, EvasionAttack)
    }
    if name not in known:
        raise unknown_name("attack", name, known)
    return known[name]


class ImageNetwork(nn.Module):
    """A network as an attack sees it: float32 images in image units in, float32 scores (N, C) out, logits or alike.

    The network itself is kept out of the module tree, so that ART's ``.to()``, ``.train()`` and ``.zero_grad()`` do
    not reach it; inputs go to the device and dtype that it has at each call. Being no ``nn.Sequential``, it is also
    safe from ART's habit of running the children of a Sequential one by one, past its hooks and its ``forward``.

    Args:
        model: the network, fed in model units.
        to_model: image units to model units.
        output: key or function that takes the scores out of what the network returns.
        probabilities: the network ends in a softmax or sigmoid, which is undone.
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
        scores = self._scores(model(x if self.to_model is None else self.to_model(x)))
        if not self.probabilities:
            return scores
        # Clamped where float32 has no more room; the gradient there is zero either way.
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
    """Labels of a multi-label network as one problem of two classes: 1 "all as decided", 0 "one of them flipped".

    The value is exact for attacks that look at the decision: the smallest margin min_l s_l z_l. The gradient is that
    of the sum of the labels' binary cross-entropies, the loss that such networks are trained with.

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
        # -m and m, not 0 and 2m: the gradient of the larger of two logits vanishes once its probability rounds to 1.
        margin = (smallest - loss + loss.detach()) / 2
        return torch.stack([-margin, margin], 1)


class _ClassifierNetwork(nn.Module):
    """What ``classifier.predict`` computes, in torch and differentiable."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.model = classifier.model
        self._classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self._classifier.device)
        for operation in self._classifier.preprocessing_operations:
            if operation.apply_predict:
                x, _ = operation.forward(x, None)
        scores: Tensor = self.model(x)
        return scores.unsqueeze(1) if scores.dim() == 1 else scores


def unwrap(classifier: object) -> tuple[nn.Module, ClipValues | None]:
    """The network inside an ART ``PyTorchClassifier``, with its preprocessing, and the classifier's clip values.

    Args:
        classifier: the classifier; its preprocessing is applied in torch.

    Returns:
        A module from inputs in the classifier's units, (N, ...), to what ``predict`` gives, and (low, high).

    Raises:
        ModelError: it is no PyTorchClassifier, or uses preprocessing or postprocessing that is not torch's.
    """
    load_art()
    from art.estimators.classification import PyTorchClassifier

    kind = type(classifier).__name__
    if not isinstance(classifier, PyTorchClassifier):
        raise ModelError(expected("classifier", "an ART PyTorchClassifier", kind, "Pass its torch network instead."))
    if not classifier.all_framework_preprocessing:
        names = [type(operation).__name__ for operation in classifier.preprocessing_operations]
        raise ModelError(expected("classifier", "one whose preprocessing is torch's", names, "Use PyTorch versions."))
    if classifier.postprocessing_defences:
        names = [type(defence).__name__ for defence in classifier.postprocessing_defences]
        raise ModelError(expected("classifier", "one without postprocessing", names, "Rebuild it without."))
    return _ClassifierNetwork(classifier), clip_values_of(classifier)


def clip_values_of(estimator: Any) -> ClipValues | None:
    """Lowest and highest value that an estimator's clip values allow."""
    clip = getattr(estimator, "clip_values", None)
    return None if clip is None else (float(np.min(clip[0])), float(np.max(clip[1])))


def build_classifier(
    network: nn.Module,
    shape: tuple[int, ...],
    n_classes: int,
    clip_values: ClipValues,
    device: torch.device,
    loss: nn.Module | None = None,
) -> Any:
    """A ``PyTorchClassifier`` of a network that takes images in image units, see :class:`ImageNetwork`.

    Args:
        network: images (N, ...) to scores (N, n_classes).
        shape: shape of one image.
        n_classes: at least 2: for one output see :class:`BinaryProblem`.
        clip_values: lowest and highest value of an image.
        device: where ART keeps its own tensors.
        loss: defaults to the cross-entropy of logits.
    """
    load_art()
    from art.estimators.classification import PyTorchClassifier

    # ART takes the current CUDA device, whichever the network is on.
    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext():
        return PyTorchClassifier(
            network,
            loss=nn.CrossEntropyLoss() if loss is None else loss,
            input_shape=shape,
            nb_classes=n_classes,
            clip_values=clip_values,
            device_type="gpu" if cuda else "cpu",
        )


def attack_with_estimator(make: Callable[..., Any], estimator: Any, settings: Mapping[str, Any]) -> Any:
    """An attack built on an estimator, which goes by position: its name differs from attack to attack.

    Raises:
        AttackError: ART refuses the settings; its words are given.
    """
    try:
        attack = make(estimator, **settings)
    except (TypeError, ValueError) as error:
        name = getattr(make, "__name__", repr(make))
        raise AttackError(expected("attack", f"settings that {name} takes", f"{dict(settings)} ({error})")) from error
    if not is_art_attack(attack):
        raise AttackError(expected("attack", "a function that returns an ART EvasionAttack", type(attack).__name__))
    return attack


def copy_attack(attack: Any, estimator: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of an attack, of all its state but the estimator, set on an estimator and with other settings."""
    # The memo makes every reference to the old estimator, also inside nested attacks, one to the new.
    clone = copy.deepcopy(attack, {id(attack.estimator): estimator})
    known = {name: value for name, value in changes.items() if name in clone.attack_params}
    try:
        if known:
            clone.set_params(**known)
    except (TypeError, ValueError) as error:
        raise AttackError(expected("attack", "an attack that takes these settings", f"{known} ({error})")) from error
    return clone
