"""Everything that belongs to a network and to the process, in a form that can be compared."""

from __future__ import annotations

import pickle
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Notes:
    """A plain object in an attribute."""

    def __init__(self) -> None:
        self.last: Any = None
        self.seen: list[Any] = []


class Stateful(nn.Module):
    """A deterministic network that writes wherever a module can write, in the middle of its training."""

    def __init__(self, seed: int = 0, side: int = 12, writes: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.relu, self.second = nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 5)
        self.writes, self.feature, self.cache = writes, None, {}
        self.seen: list[Any] = []
        self.shapes: set[Any] = {(1, 2)}
        self.recent: deque[Any] = deque([0], maxlen=3)
        self.nested: dict[str, Any] = {"lists": [[]]}
        self.notes, self.namespace = Notes(), SimpleNamespace(last=None)
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.conv(x)))
        if self.writes:
            self.write(h)
        return self.head(self.drop(self.second(h)).mean((2, 3)))

    def write(self, h: Tensor) -> None:
        self.feature, self.late = h, h
        self.cache.setdefault("bias", h.mean())
        self.cache["last"] = h
        self.seen.append(h)
        self.shapes.add(len(self.seen))
        self.recent.append(h)
        self.nested["lists"][0].append(h)
        self.notes.last, self.namespace.last = h, h
        self.notes.seen.append(h)
        self.head.given = h
        self.counter += 1
        self.mask = torch.ones(1)


def in_training(network: nn.Module, x: Tensor) -> nn.Module:
    """In an uneven state: modes, gradients, flags and hooks all differ from module to module."""
    network.train()
    network.norm.eval()
    network(x).sum().backward()
    network.head.weight.grad = None
    network.conv.bias.requires_grad_(False)
    network.second.register_forward_hook(nothing)
    network.register_forward_pre_hook(nothing)
    network.conv.register_full_backward_hook(nothing)
    network.seen.clear()
    for name in ("feature", "late"):
        setattr(network, name, None)
    return network


def nothing(*_: Any) -> None:
    """A hook that can be pickled."""


def frozen(value: Any, depth: int = 8) -> Any:
    """A value by identity and contents."""
    if isinstance(value, Tensor):
        return id(value), value.detach().clone()
    if isinstance(value, dict):
        return [(key, frozen(part, depth - 1)) for key, part in value.items()] if depth else None
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (list, tuple, deque)):
        return [frozen(part, depth - 1) for part in value] if depth else None
    if isinstance(value, (Notes, SimpleNamespace)):
        return id(value), frozen(vars(value), depth - 1)
    return id(value) if isinstance(value, nn.Module) or callable(value) else value


def snapshot(*networks: nn.Module) -> dict[str, Any]:
    """All that must be as before."""
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
        "python": random.getstate(),
    }
    for k, network in enumerate(networks):
        for name, module in network.named_modules():
            found[f"{k} {name} attributes"] = frozen(vars(module))
            found[f"{k} {name} gradients"] = [
                (p.requires_grad, id(p.grad), frozen(p.grad)) for p in module.parameters(recurse=False)
            ]
        found[f"{k} pickled"] = len(pickle.dumps(network))
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two snapshots, or parts of them, are equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The parts in which two snapshots differ."""
    return sorted({key for key in a.keys() | b.keys() if key not in a or key not in b or not same(a[key], b[key])})
