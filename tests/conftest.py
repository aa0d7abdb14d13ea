"""What all tests share: one thread (two cores are shared by all workers) and the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# How long examples take to be drawn says how busy the machine is, not whether a property holds.
settings.register_profile("busy machine", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data named by CE_PLUGIN_DATA; the test is skipped, saying so, where there is none."""
    named = os.environ.get("CE_PLUGIN_DATA", "")
    if not named or not Path(named).is_dir():
        pytest.skip("needs real data: set CE_PLUGIN_DATA to its folder")
    return Path(named)
