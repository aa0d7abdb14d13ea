"""The detectors that are compared: ours and all published ones, each with a key that changes with its code."""

from __future__ import annotations

import ast
import functools
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from benchmarks.detection._classifiers import cache_folder, checksum
from benchmarks.detection._fitted import KeptFitter, RememberingMLLOO
from benchmarks.detection._problems import Problem
from benchmarks.detection._selfsupervised import PRETRAINING, simsiam
from benchmarks.detectors import PEERS, Beyond, Mahalanobis, Peer
from benchmarks.detectors.layers import default_layers
from ce_plugin.detection import CausalEffectDetector, Signature
from ce_plugin.detection.protocol import Detector

OURS = "causal-effects"
HARDENED = "causal-effects-hardened"
OWN = (OURS, HARDENED)
BEYOND = "beyond"
ML_LOO = "ml-loo"
LAST_LAYER = "mahalanobis-last"
LIMITS = {ML_LOO: 600, BEYOND: 1500}
"""Clean images to fit and calibrate on, for detectors that take dozens or hundreds of passes an image."""
COARSE = 32
"""Side of the cells that ML-LOO blanks on photographs, in pixels: 49 passes an image, where its own 196 take hours."""
CLEAN_ONLY = ("max-softmax", "entropy", "margin", "feature-squeezing", "art-subset-scanning", BEYOND)
"""Detectors that look at no attacked image while they are fitted: their P2 is their P3."""
LEFT_OUT = {
    ("imagenet", BEYOND): "it needs a self-supervised network, and none of photographs is trained here",
    ("imagenet", HARDENED): "hardening a denoiser of photographs takes more than a processor gives",
}
"""(problem, detector) -> why it is not tried."""
LABELS = {
    OURS: "**causal effects (ours)**",
    HARDENED: "**causal effects, hardened (ours)**",
    "kernel-density": "kernel density",
    LAST_LAYER: "Mahalanobis, last layer",
}
"""Of detectors whose own name would not do: kernel density is KD+BU only where the network has dropout."""
_PEERS: dict[str, Callable[..., Peer]] = {**PEERS, LAST_LAYER: Mahalanobis, BEYOND: Beyond}
_WATCHED = (
    "ce_plugin.detection",
    "benchmarks.detectors",
    "ce_plugin.interventions.smoothing",
    "ce_plugin.interventions._filters",
)
_IRRELEVANT = tuple(f"ce_plugin.detection.{name}" for name in ("adaptive", "explanation"))


def names() -> tuple[str, ...]:
    """All detectors, ours first."""
    return (*OWN, *_PEERS)


def build(name: str, problem: Problem, cache: str | Path | None = None) -> Detector:
    """A detector for a problem, not yet fitted; BEYOND's network is trained if it is not in the cache."""
    if name in OWN:
        return _own(problem.network, name, cache)
    if name == BEYOND:
        ssl, augmentation = simsiam(problem.name, problem.seed, cache), PRETRAINING[problem.name].augmentation
        return Beyond(problem.network, ssl_model=ssl, augmentations=augmentation)
    if name == ML_LOO:
        return _ml_loo(problem.network, COARSE if problem.name == "imagenet" else None)
    if name == LAST_LAYER:
        layers = default_layers(problem.network, torch.from_numpy(problem.images["fit"][:1]))
        return Mahalanobis(problem.network, layers=layers[-1:])
    return _PEERS[name](problem.network)


@functools.lru_cache(maxsize=len(OWN))
def _own(network: nn.Module, name: str, cache: str | Path | None) -> CausalEffectDetector:
    """One detector for all protocols, so that it is fitted to clean images only once and not for every attack."""
    detector = CausalEffectDetector(network, None if name == OURS else Signature.adversarially_trained())
    # A private attribute: users have no reason to replace it, but here it saves hours.
    detector._fitter = KeptFitter(network, cache_folder(cache) / "fitted", version(detector))
    return detector


@functools.lru_cache(maxsize=1)
def _ml_loo(network: nn.Module, cell: int | None) -> Detector:
    return RememberingMLLOO(network, cell=cell)


def available(name: str, problem: str) -> bool:
    """Whether the detector can be used on the problem."""
    return (problem, name) not in LEFT_OUT


def needs_labels(name: str) -> bool:
    """Whether it needs attacked images for fitting."""
    return bool(getattr(_PEERS.get(name), "needs_labels", False))


def least_protocol(name: str) -> str:
    """The protocol with the least fitting data: clean images, or also FGSM if it needs attacked images."""
    return "P2" if needs_labels(name) else "P3"


def label(name: str) -> str:
    """Its name in tables."""
    return LABELS.get(name) or str(getattr(_PEERS[name], "name", name))


def version(detector: Detector) -> str:
    """A checksum of the detector's code without docstrings, and of its own network if it has one."""
    code = _version(type(detector))
    if not isinstance(detector, Beyond):
        return code
    return f"{code}-{checksum(detector.ssl_model, zlib.crc32(repr(detector.augmentations).encode())):08x}"


@functools.cache
def _version(of: type) -> str:
    checksum = 0
    for module in sorted(_modules(of), key=lambda one: one.__name__):
        with open(str(module.__file__), encoding="utf-8") as stream:
            tree = ast.parse(stream.read())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                first = body[0].value
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    first.value = ""
        checksum = zlib.crc32(ast.dump(tree).encode(), checksum)
    return f"{checksum:08x}"


def _modules(of: type) -> set[ModuleType]:
    """Modules of the package that a class depends on: its own, and those that it imports from."""
    found: set[ModuleType] = set()
    waiting = [sys.modules[one.__module__] for one in of.__mro__ if _watched(one.__module__)]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [sys.modules[name] for name in _sources(module) if _watched(name)]
    return found


def _sources(module: ModuleType) -> Iterator[str]:
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str) and name in sys.modules:
            yield name


def _watched(module: str) -> bool:
    return module.startswith(_WATCHED) and not module.startswith(_IRRELEVANT)
