"""Statistics where the device has no float64 (MPS): computed on the CPU, given back on the inputs' device."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ce_plugin.effects import adjusted, difference_in_means, p_values
from ce_plugin.networks.forward import double, widest

_SCRIPT = Path(__file__).with_name("_without_float64.py")
_CALLS = [
    "the default", "attribute", "significant only", "difference in means", "adjusted", "located", "nodes",
    "nodes at random", "windows", "mean of a reference", "resampling", "effect map", "effect map by activation",
    "pairs", "interactions", "screened pairs", "mediation", "attack", "concepts", "insertion and deletion", "detector",
    "over images",
]  # fmt: skip


@functools.cache
def outcome(*options: str) -> dict[str, str]:
    """What each call gave on the simulated device; in a process of its own, for a device cannot be taken back."""
    pytest.importorskip("torch.utils.backend_registration", reason="devices written in Python")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no devices written in Python")
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", _CALLS)
def test_call_gives_the_same_on_a_device_without_float64(name: str) -> None:
    assert outcome()[name] == "equal", outcome()[name][-3000:]


@pytest.mark.parametrize("name", _CALLS)
def test_call_gives_the_same_on_a_device_with_float64(name: str) -> None:
    assert outcome("--float64")[name] == "equal", outcome("--float64")[name][-3000:]


def test_every_call_of_the_script_is_looked_at() -> None:
    assert sorted(outcome()) == sorted(_CALLS)


def test_widest_type_of_a_device() -> None:
    assert widest(torch.device("cpu")) == torch.float64
    assert double(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64


_dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 30), st.integers(1, 6), st.integers(1, 4), _dtypes, st.integers(0, 10**6))
def test_statistics_of_any_type_are_those_of_float64(t: int, u: int, c: int, dtype: torch.dtype, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, y = torch.rand(t, u, generator=random) < 0.5, torch.randn(t, c, generator=random).to(dtype)
    found, wanted = difference_in_means(a, y), difference_in_means(a, y.double())
    assert found.effect.dtype == torch.float64
    torch.testing.assert_close(found.effect, wanted.effect, rtol=0, atol=0, equal_nan=True)
    up, down = a.double().numpy(), (~a).double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = up.T @ y.double().numpy() / up.sum(0)[:, None] - down.T @ y.double().numpy() / down.sum(0)[:, None]
    np.testing.assert_allclose(found.effect.numpy(), plain, rtol=1e-9, atol=1e-9)
    for one, other in zip(adjusted(a, y, 0.5), adjusted(a, y.double(), 0.5), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    effect = y[0].abs()
    assert torch.equal(p_values(effect, effect + 1, None), p_values(effect.double(), (effect + 1).double(), None))
