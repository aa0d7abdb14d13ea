"""The one place that works round the quirks of the Adversarial Robustness Toolbox (ART); ART is imported when used.

Importing ART writes ``~/.art/config.json`` where there is none (an existing one is kept) and takes seconds. There is
no option against it: only the home directory decides, and moving that would make ART save to a place that is lost.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ce_plugin.errors import AttackError, UnknownNameError, expected
from ce_plugin.networks.forward import ClipValues, load_art


def is_art_attack(thing: object) -> bool:
    """Whether this is an evasion attack of ART, ready to run; answered without importing ART."""
    module = sys.modules.get("art.attacks.attack")
    return module is not None and isinstance(thing, module.EvasionAttack)


# What attacks are called elsewhere -> their class in ART.
_ALSO = {
    "apgd": "AutoProjectedGradientDescent",
    "autopgd": "AutoProjectedGradientDescent",
    "carlini": "CarliniL2Method",
    "cw": "CarliniL2Method",
    "c&w": "CarliniL2Method",
    "ead": "ElasticNet",
    "onepixel": "PixelAttack",
    "square": "SquareAttack",
}


def attack_class(name: str, short: Sequence[str] = ()) -> type[Any]:
    """The evasion attack of ART with this class name.

    Args:
        name: its name.
        short: other names that the caller knows, for the message.

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
        raise _unknown_attack(name, short, known)
    return known[name]


def _unknown_attack(name: str, short: Sequence[str], known: Iterable[str]) -> UnknownNameError:
    """An error that lists the short names before ART's, and suggests the closest."""
    by_lower = {one.lower(): one for one in [*known, *short]} | _ALSO
    said = name.lower()
    close = [said] if said in by_lower else difflib.get_close_matches(said, [one.lower() for one in short], n=1)
    close = close or difflib.get_close_matches(said, by_lower, n=1, cutoff=0.5)
    nearest = difflib.get_close_matches(said, [one.lower() for one in known], n=4, cutoff=0.0)
    wanted = "one of " + "".join(f"{one!r}, " for one in short) + ("or of ART's attacks (" if short else "ART's (")
    wanted += ", ".join(repr(by_lower[one]) for one in nearest) + " ...)"
    hint = f"Did you mean {by_lower[close[0]]!r}?" if close else ""
    return UnknownNameError(expected("attack", wanted, repr(name), hint))


def build_classifier(
    network: nn.Module,
    shape: tuple[int, ...],
    n_classes: int,
    clip_values: ClipValues,
    device: torch.device,
    loss: nn.Module | None = None,
) -> Any:
    """A ``PyTorchClassifier`` of a network that takes images in image units.

    Args:
        network: images (N, ...) to scores (N, n_classes).
        shape: shape of one image.
        n_classes: at least 2: networks with one output are put as two classes first.
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


def limit_steps(estimator: Any, steps: int, goal: int) -> Any:
    """A copy of an estimator that pretends, after so many steps of JSMA on one image, that the goal is reached.

    ART's loop has no bound on its steps: gamma bounds the share of values that change, and a value may change again.
    """
    # Not copy.copy: that pickles, and ART's pickling saves the network's weights to a file.
    limited, calls = object.__new__(type(estimator)), 0
    vars(limited).update(vars(estimator))

    def predict(x: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        scores, calls = estimator.predict(x, *args, **kwargs), calls + 1
        if calls > steps:  # the first call, before any step, is for the clean image
            scores[:, goal] = np.inf
        return scores

    limited.predict = predict
    return limited


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
