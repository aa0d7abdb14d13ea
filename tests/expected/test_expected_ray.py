"""Ray's workers write the same table, also where some of them die."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _worlds import explainer, inputs, pictures, small_cnn

from ce_plugin import LayerCausalEffect
from ce_plugin.errors import FileError
from ce_plugin.expected import RayCluster, Sample, run
from ce_plugin.interventions import Adversarial

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="needs the extra [cluster]")


class Slow:
    """Pictures that take a while, and leave the id of the process that read them."""

    fingerprint = "pictures"

    def __init__(self, n: int, notes: Path) -> None:
        self.data, self.notes = pictures(n), notes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        time.sleep(0.02)
        (self.notes / f"{os.getpid()}").touch()
        return self.data[index]


def test_ray_writes_the_same_table_with_any_number_of_workers(tmp_path: Path) -> None:
    net = small_cnn()
    options: dict[str, Any] = {
        "given": {"clean": None, "fgsm": Adversarial.fgsm(net, eps=0.1)}, "classes": "all", "shard_size": 8,
    }  # fmt: skip
    made = LayerCausalEffect(net, "1", outcome="log_odds")
    local = run(made, pictures(40), tmp_path / "local", **options)
    for workers in (1, 2, 3):
        there = run(made, pictures(40), tmp_path / f"ray{workers}", cluster=RayCluster(workers), **options)
        a, b = local.expected(target="all"), there.expected(target="all")
        assert b.n_images == 40
        assert torch.allclose(a.effect, b.effect, rtol=0, atol=1e-6 * float(a.effect.abs().max()))


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    net = small_cnn()
    options: dict[str, Any] = {"classes": "all", "shard_size": 5}
    made = LayerCausalEffect(net, "1", outcome="log_odds")
    (tmp_path / "notes").mkdir()
    whole = run(made, pictures(100), tmp_path / "whole", **options)
    killed: list[int] = []

    def kill() -> None:
        """Five times a worker that has read pictures."""
        while len(killed) < 5:
            time.sleep(0.5)
            for note in (tmp_path / "notes").iterdir():
                pid = int(note.name)
                if pid not in (*killed, os.getpid()):
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
                    break

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    data = Slow(100, tmp_path / "notes")
    cluster = RayCluster(2)
    options |= {"cluster": cluster}
    found = run(made, data, tmp_path / "ray", **options)
    assert killed
    assert found.ids.tolist() == list(range(100))
    assert torch.equal(found.expected(target="all").effect, whole.expected(target="all").effect)


class Broken:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        if index == 7:
            raise OSError("image file is truncated")
        return Sample(inputs(12)[index])


def test_errors_and_unreadable_images_come_back(tmp_path: Path) -> None:
    found = run(explainer(), Broken(), tmp_path / "run", shard_size=4, cluster=RayCluster(1))
    assert found.skipped == {7: "image file is truncated"}
    assert len(found) == 11
    with pytest.raises(FileError, match="image file is truncated"):
        run(explainer(), Broken(), tmp_path / "strict", shard_size=4, cluster=RayCluster(1), strict=True)
