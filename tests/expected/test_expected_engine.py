"""Runs over data: what cannot be read, what is stopped and goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _worlds import explainer, inputs, network, pictures, small_cnn
from torch import nn

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.errors import ArgumentError, CEPluginError, FileError, InputError, ModelError
from ce_plugin.expected import EffectTable, RayCluster, Sample, engine, run
from ce_plugin.expected.rows import RowMaker

HERE = Path(__file__).parent


class Broken:
    """Every fifth image cannot be read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Sample:
        if index % 5 == 0:
            raise OSError("image file is truncated")
        return Sample(inputs(20)[index], 0)


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = run(explainer(), Broken(), tmp_path / "run", shard_size=6)
    assert len(found) == 16
    assert found.skipped == dict.fromkeys((0, 5, 10, 15), "image file is truncated")
    assert "image 10 was left out: image file is truncated" in caplog.text
    again = run(explainer(), Broken(), tmp_path / "run", shard_size=6, resume=True)
    assert sorted(again.skipped) == [0, 5, 10, 15]
    with pytest.raises(FileError, match="images that can be read, but got 0: image file is truncated"):
        run(explainer(), Broken(), tmp_path / "strict", strict=True)
    with pytest.raises(InputError, match="none; the first: image file is truncated"):
        run(explainer(), Broken(), tmp_path / "none", ids=[0, 5])


def test_forms_of_data_sets(tmp_path: Path) -> None:
    x = inputs(6)
    forms: list[Any] = [
        x,
        list(x),
        [(one, 1) for one in x],
        [(one, torch.tensor(1)) for one in x],
        torch.utils.data.TensorDataset(x, torch.ones(6).long()),
    ]
    effects = [run(explainer(), data, tmp_path / str(i)).expected().effect for i, data in enumerate(forms)]
    assert all(torch.equal(effects[0], one) for one in effects)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], InputError, "one image or more"),
        (iter([1]), ArgumentError, "a data set with a length"),
        ([3.0], ArgumentError, "items of type float"),
        ([(torch.zeros(4, dtype=torch.uint8), 0)], InputError, "floating-point tensors, but got torch.uint8"),
        ([(np.zeros(4), 0)], InputError, "ndarray.*transform=ToTensor"),
        ([torch.zeros(4), torch.zeros(5)], InputError, "images of one shape"),
        ([Sample(torch.zeros(4), 7)], InputError, "labels from 0 to 2, but got 7"),
        ([torch.full((4,), torch.nan)], InputError, "finite"),
    ],
)
def test_bad_data_is_said(tmp_path: Path, data: Any, error: type[CEPluginError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(explainer(), data, tmp_path / "run")
    assert not list(tmp_path.rglob("*.parquet"))


def test_bad_options_are_said(tmp_path: Path) -> None:
    x = inputs(4)
    with pytest.raises(InputError, match="each image once, but got 1 several times"):
        run(explainer(), x, tmp_path / "a", ids=[1, 1])
    with pytest.raises(InputError, match="from 0 to 3, but got 4"):
        run(explainer(), x, tmp_path / "a", ids=[4])
    with pytest.raises(ArgumentError, match="classes"):
        run(explainer(), x, tmp_path / "a", classes="some")  # type: ignore[arg-type]
    with pytest.raises(CEPluginError, match="class indices below 3, but got 3"):
        run(explainer(), x, tmp_path / "a", classes=[3])
    with pytest.raises(CEPluginError, match="batch_size"):
        run(explainer(), x, tmp_path / "a", batch_size=0)
    with pytest.raises(CEPluginError, match="shard_size"):
        run(explainer(), x, tmp_path / "a", shard_size=0)
    with pytest.raises(CEPluginError, match="workers"):
        RayCluster(workers=0)

    class Heads(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": x, "b": x}

    with pytest.raises(ModelError, match="one output head"):
        run(CausalEffect(Heads()), x, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_second_run_on_the_folder_waits_for_the_first(tmp_path: Path) -> None:
    class Nested:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> torch.Tensor:
            if index == 2:
                run(explainer(), inputs(4), tmp_path / "run", resume=True)
            return inputs(4)[index]

    with pytest.raises(FileError, match="no other run writes to"):
        run(explainer(), Nested(), tmp_path / "run", strict=True)


def test_a_full_disk_leaves_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ce_plugin import files

    flushed = files._flush
    count = 0

    def full(stream: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(28, "No space left on device")
        flushed(stream)

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(FileError, match="No space left"):
        run(explainer(), inputs(40), tmp_path / "run", shard_size=10)
    monkeypatch.undo()
    assert len(EffectTable(tmp_path / "run")) in (10, 20)
    assert len(run(explainer(), inputs(40), tmp_path / "run", shard_size=10, resume=True)) == 40


def test_files_hold_fewer_images_where_rows_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ce_plugin.expected import engine

    monkeypatch.setattr(engine, "_SHARD_BYTES", 1000)
    found = run(explainer(), inputs(20), tmp_path / "run", classes="all")
    assert len(list((found.folder / "rows").glob("*.parquet"))) > 3
    assert len(found) == 20


def test_what_python_brings_is_not_sent_to_workers(tmp_path: Path) -> None:
    """A list of images is of a built-in class, which every process has."""
    maker = RowMaker(explainer=explainer(), given=None, outcomes=None, classes="explained", keep_images=True)
    job = engine._Job(maker, engine._Reader([inputs(2)[0]], False), tmp_path, {}, 1)
    assert not {module.__name__ for module in job._unimportable()} & set(sys.builtin_module_names)


def test_random_state_and_mode_are_left_alone(tmp_path: Path) -> None:
    made = LayerCausalEffect(network().train(), "1", outcome="logit")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(made, inputs(10), tmp_path / "run", loaders=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in made.forward.modules)
    assert made.outcome.name == "logit"


_SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
from _worlds import pictures, small_cnn
from ce_plugin import LayerCausalEffect
from ce_plugin.expected import run
from ce_plugin.interventions import Adversarial

class Slow:
    data = pictures(60)
    fingerprint = "sixty pictures"
    def __len__(self): return 60
    def __getitem__(self, index):
        time.sleep(0.01)
        return self.data[index]

net = small_cnn()
given = {{"clean": None, "fgsm": Adversarial.fgsm(net, eps=0.1)}}
print("ready", flush=True)
run(LayerCausalEffect(net, "1", outcome="log_odds"), Slow(), {out!r}, given=given, classes="all",
    batch_size=4, shard_size=8, resume=True)
print("done", flush=True)
"""


def started(out: Path) -> subprocess.Popen[str]:
    code = _SCRIPT.format(here=str(HERE), out=str(out))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def resumed_after_kills(folder: Path, kills: int, seed: int) -> None:
    whole = started(folder / "whole")
    assert whole.wait(120) == 0
    moments = random.Random(seed)
    for _ in range(kills):
        child = started(folder / "killed")
        time.sleep(moments.uniform(0.0, 1.2))
        child.send_signal(signal.SIGKILL)
        child.wait(60)
        # What is there is whole, whenever it was killed.
        if (folder / "killed" / "manifest.json").exists():
            assert len(EffectTable(folder / "killed")) % 4 == 0
    assert started(folder / "killed").wait(120) == 0
    one, two = EffectTable(folder / "whole"), EffectTable(folder / "killed")
    assert two.ids.tolist() == list(range(60))
    for outcome in one.outcomes:
        a, b = one.expected(outcome, target="all"), two.expected(outcome, target="all")
        assert torch.equal(a.effect, b.effect)
        assert torch.equal(a.covariance, b.covariance)  # type: ignore[arg-type]
    hashes = [one.images()["image_sha256"].tolist() for one in (one, two)]
    assert hashes[0] == hashes[1]


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    resumed_after_kills(tmp_path, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_run_killed_ten_times_goes_on(tmp_path: Path) -> None:
    resumed_after_kills(tmp_path, kills=10, seed=2)


def test_an_explained_picture_and_windows(tmp_path: Path) -> None:
    """The default design of images, whose trials are drawn by the image's id."""
    from ce_plugin.designs import RandomRegions

    made = CausalEffect(small_cnn(), design=RandomRegions(n_trials=40), outcome="log_odds")
    data = pictures(3)
    found = run(made, data, tmp_path / "run", classes="all", batch_size=2)
    _, values = found.values(target="all")
    for i in range(3):
        alone = made.estimate(data[i].image[None], ids=[i]).effect[0]
        assert torch.allclose(values[i, 0], alone, atol=1e-5)
