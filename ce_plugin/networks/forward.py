"""One way to call whatever the user explains: a module, a function, an ART classifier; one head or several."""

from __future__ import annotations

import functools
import importlib
import logging
import logging.config
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.futures import Future

from ce_plugin.errors import ArgumentError, ModelError, expected
from ce_plugin.networks.guard import modules_of, state_guard

logger = logging.getLogger("ce_plugin")
# By identity: modules may define what equality means for them, and then need not be hashable.
_LEARNED: dict[int, dict[object, object]] = {}


def learned(module: nn.Module) -> dict[object, object]:
    """What earlier runs learned about this network (best batch size, memory format); forgotten with the network."""
    key = id(module)
    if key not in _LEARNED:
        weakref.finalize(module, _LEARNED.pop, key, None).atexit = False
    return _LEARNED.setdefault(key, {})


def is_opaque(module: nn.Module) -> bool:
    """Scripted and compiled modules: a hook or another memory layout would make them compile again."""
    compiled = (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)
    return isinstance(module, compiled) or getattr(module, "_compiled_call_impl", None) is not None


class Shared(NamedTuple):
    """An additional forward argument that belongs to all examples alike, although it has as many rows as they are."""

    value: Tensor


OutputSelector = Union[str, int, Callable[[Any], Tensor], Sequence[str], None]


class Forward:
    """Calls a forward function and returns its output heads as tensors.

    Args:
        forward_func: a module, any callable, or an ART ``PyTorchClassifier``, whose model and preprocessing are used.
        output: which part of the output is explained: a key of a dict or ModelOutput, an index of a tuple, a
            callable on the output, or a list of keys (several heads). None takes a tensor as it is and all tensors of
            a dict as heads.

    Raises:
        ModelError: ``forward_func`` cannot be called.
        ArgumentError: ``output`` is none of these.

    Attributes:
        modules: the networks that were found in ``forward_func``, which is searched once, here; where there are none
            the log says so (level INFO).
        clip_values: of an ART classifier, else None.
        learned: what runs learned about speed; shared by all that explain the same module, but not by functions that
            happen to run it, since what they do before and after may not bear the same.

    Example:
        >>> forward = Forward(lambda x: {"a": x + 1, "b": x * 2})
        >>> sorted(forward((torch.ones(1, 2),)))
        ['a', 'b']
        >>> Forward(lambda x: {"a": x + 1, "b": x * 2}, output="b")((torch.ones(1, 2),))
        {'': tensor([[2., 2.]])}
    """

    def __init__(self, forward_func: Callable[..., Any], output: OutputSelector = None) -> None:
        self.clip_values = None
        if is_art_classifier(forward_func):
            forward_func, self.clip_values = unwrap(forward_func)
        if not callable(forward_func) or isinstance(forward_func, type):
            shown = (
                f"the class {forward_func.__name__}" if isinstance(forward_func, type) else type(forward_func).__name__
            )
            raise ModelError(expected("forward_func", "a callable or an ART classifier", shown, _advice(forward_func)))
        several = isinstance(output, (list, tuple)) and output and all(isinstance(key, str) for key in output)
        if not (several or output is None or callable(output) or isinstance(output, (str, int))):
            wanted = "None, a key, an index, a callable, or a list of keys"
            raise ArgumentError(expected("output", wanted, repr(output)))
        self.forward_func = forward_func
        self.output = output
        self.modules = modules_of(forward_func)
        if not self.modules:
            logger.info("forward_func: no network was found in it, so that nothing guards a network's mode and buffers")
        self.learned: dict[object, object] = {}
        if isinstance(forward_func, nn.Module) and not callable(output):
            self.learned = learned(forward_func)

    def __call__(self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
        """The heads of the output by name; a single head has the name ``""``."""
        own = [arg.value if isinstance(arg, Shared) else arg for arg in args]
        return select_heads(self.forward_func(*inputs, *own), self.output)


def _advice(thing: object) -> str:
    """How to get a network out of what was passed instead of one."""
    if isinstance(thing, type):
        return f"Make one: `{thing.__name__}(...)`."
    for name in ("network", "model", "module"):
        if isinstance(getattr(thing, name, None), nn.Module):
            return f"Pass its `.{name}`."
    return ""


def select_heads(result: Any, output: OutputSelector) -> dict[str, Tensor]:
    """The heads in what a forward function returned, by name; a single head has the name ``""``.

    Raises:
        ModelError: there is no such part, or it is no tensor.
    """
    if isinstance(result, Tensor) and output is None:
        return {"": result}
    if isinstance(result, Future):
        hint = "Wait for it inside forward_func: `lambda x: model(x).wait()`."
        wanted = "a callable that returns a tensor"
        raise ModelError(expected("forward_func", wanted, "one that returns a Future", hint))
    parts: dict[str, Any] = {"": result}
    if callable(output):
        parts = {"": output(result)}
    elif isinstance(output, (str, int)):
        parts = {"": _part(result, output)}
    elif output is not None:
        parts = {key: _part(result, key) for key in output}
    elif isinstance(result, Mapping):
        tensors = {str(key): value for key, value in result.items() if isinstance(value, Tensor)}
        parts = tensors if len(tensors) > 1 else {"": next(iter(tensors.values()), result)}
    return {name: _tensor(value) for name, value in parts.items()}


def select_logits(result: Any, output: OutputSelector) -> Tensor:
    """The logits (N, C) in what a network returned, where they are all that is wanted of it.

    Raises:
        ModelError: there is no such part, there are several, or it is no tensor of the form (N, C).
    """
    heads = select_heads(result, output)
    logits = next(iter(heads.values()))
    if len(heads) > 1 or logits.dim() != 2 or not logits.is_floating_point():
        got = f"several heads ({', '.join(heads)})" if len(heads) > 1 else tuple(logits.shape)
        hint = "Name the part that holds the logits with `output=` (a key, an index or a callable)."
        raise ModelError(expected("network", "a network that returns logits (N, C)", got, hint))
    return logits


def _part(result: Any, key: str | int) -> Any:
    try:
        return result[key]
    except (KeyError, IndexError, TypeError) as error:
        have = list(result) if isinstance(result, Mapping) else type(result).__name__
        raise ModelError(expected("output", f"a part of what the model returns ({have})", repr(key))) from error


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float)):
        return torch.tensor(float(value))
    hint = "Name the part to explain with `output=` (a key, an index or a callable)."
    wanted = "a callable that returns a tensor or a dict of tensors"
    raise ModelError(expected("forward_func", wanted, type(value).__name__, hint))


def double(x: Tensor) -> Tensor:
    """In float64, on the CPU, with its gradient: where statistics are computed, as not every device has float64.

    Example:
        >>> double(torch.ones(1))
        tensor([1.], dtype=torch.float64)
    """
    return x.cpu().double()


@functools.lru_cache
def widest(device: torch.device) -> torch.dtype:
    """What statistics become when they go back to a device: float64, or float32 where it has none (MPS).

    Example:
        >>> widest(torch.device("cpu"))
        torch.float64
    """
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


ClipValues = tuple[float, float]


def is_art_classifier(thing: object) -> bool:
    """Whether this is a classifier of ART; answered without importing ART."""
    module = sys.modules.get("art.estimators.classification.classifier")
    return module is not None and isinstance(thing, module.ClassifierMixin)


class _OneColumn(nn.Module):
    """Scores (N, C), also of one number for each image. The question of rank cannot be traced: this stays whole."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.unsqueeze(1) if scores.dim() == 1 else scores


class _ClassifierNetwork(nn.Module):
    """What ``classifier.predict`` computes, in torch and differentiable."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.model = classifier.model
        self.columns = _OneColumn()
        self._classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self._classifier.device)
        for operation in self._classifier.preprocessing_operations:
            if operation.apply_predict:
                x, _ = operation.forward(x, None)
        scores: Tensor = self.columns(self.model(x))
        return scores


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


_ART = {"art.attacks.evasion", "art.defences.detector.evasion", "art.estimators.classification"}
_IMPORTING = threading.Lock()


def load_art() -> None:
    """Import ART and leave the user's logging and random state alone."""
    if sys.modules.keys() >= _ART:
        return
    me = threading.get_ident()
    with _IMPORTING:
        # ART configures logging at import, which closes every handler that the user has: a log file then loses lines.
        configure = logging.config.dictConfig
        logging.config.dictConfig = lambda config: None if threading.get_ident() == me else configure(config)
        try:
            with state_guard():
                for name in _ART:
                    importlib.import_module(name)
        finally:
            logging.config.dictConfig = configure
    logging.getLogger("art").addHandler(logging.NullHandler())
