"""No public call moves the global random state: that of torch, numpy and python."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).with_name("_random_state.py")


@functools.cache
def moved() -> dict[str, str]:
    """What each call moved, in a fresh process: a library's first import may draw numbers too."""
    done = subprocess.run([sys.executable, str(_SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_call_moves_the_global_random_state() -> None:
    assert {name: what for name, what in moved().items() if what} == {}
    assert len(moved()) >= 45


@pytest.mark.parametrize("name", ["CausalEffectDetector.load", "layer estimate_cost", "train_autoencoder", "fit"])
def test_the_table_has(name: str) -> None:
    assert name in moved()


def test_a_call_that_moves_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    import _random_state as script
    import numpy as np
    import torch

    draws = {"torch": lambda: torch.rand(1), "numpy": np.random.rand, "python": random.random}
    monkeypatch.setattr(script, "calls", lambda: iter(draws.items()))
    states = script.states()
    assert script.run() == {name: name for name in draws}
    assert script.states() != states
