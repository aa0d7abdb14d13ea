"""The detectors that are compared: ours and all peers, each with a key that changes when its code does."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import zlib
from collections.abc import Iterator
from types import ModuleType

from torch import nn

from ce_plugin.detection.protocol import Detector
from ce_plugin.evaluation.peers import PEERS

OURS = "causal-effects"
LIMITS = {"ml-loo": 600}
"""Clean images to fit and calibrate on, for detectors that take hundreds of passes an image."""
LABELS = {"kernel-density": "kernel density"}
"""Of detectors whose name depends on the network: with dropout it is KD+BU."""
_WATCHED = (
    "ce_plugin.detection",
    "ce_plugin.evaluation.peers",
    "ce_plugin.interventions.smoothing",
    "ce_plugin.interventions.jpeg",
)
_IRRELEVANT = tuple(f"ce_plugin.detection.{name}" for name in ("adaptive", "explanation", "stored"))


def names() -> tuple[str, ...]:
    """All detectors, ours first."""
    return (OURS, *PEERS)


def build(name: str, network: nn.Module) -> Detector:
    """A detector that is still to be fitted."""
    return _ours(network) if name == OURS else PEERS[name](network)


@functools.lru_cache(maxsize=1)
def _ours(network: nn.Module) -> Detector:
    """One detector for all protocols: what clean images have taught it is not learnt anew for every attack."""
    detector: Detector = importlib.import_module("ce_plugin.detection").CausalEffectDetector(network)
    return detector


def available(name: str) -> bool:
    """Whether this version of the package has the detector."""
    return name != OURS or hasattr(importlib.import_module("ce_plugin.detection"), "CausalEffectDetector")


def needs_labels(name: str) -> bool:
    """Whether it cannot be fitted on clean images alone."""
    return bool(getattr(PEERS.get(name), "needs_labels", False))


def label(name: str) -> str:
    """What tables call it."""
    if name == OURS:
        return "**causal effects (ours)**"
    return LABELS.get(name) or str(getattr(PEERS[name], "name", name))


def version(detector: Detector) -> str:
    """A checksum of the code that the detector is made of, comments and docstrings apart."""
    return _version(type(detector))


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
    """Modules of the package that a class is made of: its own, and those that these take names from."""
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
