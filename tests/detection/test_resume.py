"""A fit that is interrupted goes on where it was, and ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ce_plugin.detection import CausalEffectDetector, CounterAttack, Denoising, Signature, checkpoint, denoiser, scorers
from ce_plugin.detection.checkpoint import Checkpoint, discard, shards
from ce_plugin.errors import ArgumentError, FileError, ModelError
from ce_plugin.interventions import Adversarial


class InterruptError(Exception):
    """Stands for whatever ends a run."""


class Passes:
    """How many more passes a network can make; not in the network, which is left as it was."""

    left: int | None = None


class Fragile(nn.Module):
    """A network that fails at one of its passes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        if Passes.left is not None:
            if Passes.left == 0:
                raise InterruptError
            Passes.left -= 1
        return self.linear(x.flatten(1))


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD", 16)
    monkeypatch.setattr(denoiser, "_SAVED", 3)
    monkeypatch.setattr(scorers, "_STEPS", 10)


def images(n: int = 90) -> np.ndarray:
    return np.random.default_rng(0).random((n, 1, 8, 8), dtype=np.float32)


def signature(**options: Any) -> Signature:
    return Signature([Denoising(width=2, least_steps=8, **options), CounterAttack(steps=(0.05,))])


def detector(network: nn.Module, **options: Any) -> CausalEffectDetector:
    made = {
        "attacks": ["fgsm", Adversarial.pgd(network, eps=0.2, max_iter=2, batch_size=8)],
        "signature": signature(eps=0.1),
    }
    return CausalEffectDetector(network, **{**made, **options})


def fit(network: Fragile, folder: Path | None, **options: Any) -> tuple[CausalEffectDetector, list[str]]:
    done: list[str] = []
    found = detector(network, **options)
    found.fit(images(), batch_size=16, nb_epochs=1, checkpoint=folder, progress=lambda what, n: done.append(what))
    return found, done


def bits(found: CausalEffectDetector) -> dict[str, Tensor]:
    return dict(found.learned().state_dict())


@pytest.fixture(scope="module")
def whole() -> tuple[CausalEffectDetector, int]:
    """A fit that is not interrupted, and how many passes it takes."""
    network = Fragile()
    Passes.left = 10**6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_SHARD", 16)
        patch.setattr(scorers, "_STEPS", 10)
        found, _ = fit(network, None)
    passes = 10**6 - Passes.left
    Passes.left = None
    return found, passes


def assert_same(found: CausalEffectDetector, wanted: CausalEffectDetector) -> None:
    one, other = bits(found), bits(wanted)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert np.array_equal(found.score(images()), wanted.score(images()))


@pytest.mark.parametrize("share", [0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99])
def test_an_interrupted_fit_goes_on_and_ends_with_the_same_bits(
    share: float, whole: tuple[CausalEffectDetector, int], tmp_path: Path
) -> None:
    wanted, passes = whole
    network = Fragile()
    Passes.left = int(share * passes)
    with pytest.raises(InterruptError):
        fit(network, tmp_path / "run")
    Passes.left = 10**6
    found, _ = fit(network, tmp_path / "run")
    if share > 0.5:
        assert 10**6 - Passes.left < passes, "what was done is not done again"
    Passes.left = None
    assert_same(found, wanted)


def test_an_interrupt_at_every_tick(whole: tuple[CausalEffectDetector, int], tmp_path: Path) -> None:
    """Seven interruptions one after the other, each a little further."""
    network, before = Fragile(), -1
    for count in range(3, 22, 3):
        done: list[str] = []

        def tick(what: str, n: int, done: list[str] = done, count: int = count) -> None:
            done.append(what)
            if len(done) == count:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            detector(network).fit(images(), batch_size=16, nb_epochs=1, checkpoint=tmp_path / "run", progress=tick)
        files = len(list((tmp_path / "run").iterdir()))
        assert files >= before
        before = files
    assert_same(fit(network, tmp_path / "run")[0], whole[0])


def test_a_finished_run_is_read(whole: tuple[CausalEffectDetector, int], tmp_path: Path) -> None:
    network = Fragile()
    fit(network, tmp_path / "run")
    Passes.left = 10**6
    found, done = fit(network, tmp_path / "run")
    # The split's predictions, the denoiser's logits and cost, and which attacks won are computed again.
    assert 10**6 - Passes.left < whole[1] / 2
    Passes.left = None
    assert_same(found, whole[0])
    assert {"denoising", "clean images", "altered images", "images held out", "attacked images"} <= set(done)
    discard(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_result_does_not_depend_on_being_saved(
    whole: tuple[CausalEffectDetector, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD", 256)
    assert_same(fit(Fragile(), None)[0], whole[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, r"one with seed=1, but got one with seed=0.*delete this one to begin again"),
        ({"holdout": 0.4}, "holdout=0.4, but got one with holdout=0.3"),
        ({"attacks": ["fgsm"]}, "attacks="),
        ({"aggregate": "max"}, "aggregate='max', but got one with aggregate='soft_square'"),
        ({"augmentation": None}, "augmentation="),
        ({"signature": signature(eps=0.2)}, r"signature=.*eps=0.2.*eps=0.1"),
    ],
)
def test_other_settings_are_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    network = Fragile()
    Passes.left = 40
    with pytest.raises(InterruptError):
        fit(network, tmp_path)
    Passes.left = None
    with pytest.raises(ArgumentError, match=f"`checkpoint` to be .*{match}"):
        fit(network, tmp_path, **options)


def test_another_network_other_images_or_another_folder_are_refused(tmp_path: Path) -> None:
    network = Fragile()
    Passes.left = 40
    with pytest.raises(InterruptError):
        fit(network, tmp_path / "run")
    Passes.left = None
    with pytest.raises(ModelError, match="`checkpoint` to be one of a run on this network"):
        fit(Fragile(seed=1), tmp_path / "run")
    found = detector(network)
    with pytest.raises(ArgumentError, match="one of a run on these images, but got one on others"):
        found.fit(1 - images(), batch_size=16, nb_epochs=1, checkpoint=tmp_path / "run")
    with pytest.raises(ArgumentError, match="nb_epochs=2, but got one with nb_epochs=1"):
        found.fit(images(), batch_size=16, nb_epochs=2, checkpoint=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").touch()
    with pytest.raises(FileError, match="which holds other files"):
        found.fit(images(), batch_size=16, nb_epochs=1, checkpoint=tmp_path / "other")
    with pytest.raises(FileError, match="`checkpoint`"):
        found.fit(images(), checkpoint=tmp_path / "other" / "photo.png")
    with pytest.raises(ArgumentError, match="`checkpoint` to be the name of a folder"):
        found.fit(images(), checkpoint=3)
    assert (tmp_path / "other" / "photo.png").exists()


def test_a_damaged_stage_is_an_error(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path, {"seed": 0})
    first.tensor("scores", lambda: torch.ones(100))
    (file,) = tmp_path.glob("scores*")
    content = bytearray(file.read_bytes())
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError):
        Checkpoint(tmp_path, {"seed": 0}).read("scores")


def test_shards_are_whole_batches() -> None:
    for n in (1, 15, 16, 17, 100):
        for size in (1, 4, 16, 40):
            parts = list(shards(n, size))
            assert [i for one in parts for i in range(one.start, one.stop)] == list(range(n))
            assert all(one.start % size == 0 for one in parts)


def test_training_steps_say_the_minimum() -> None:
    made = CausalEffectDetector(Fragile())
    assert made.training_steps(120, (1, 8, 8), nb_epochs=3) == {"denoising": 800}
    assert made.training_steps(10_000, (1, 8, 8), nb_epochs=20) == {"denoising": 2187}
    assert made.training_steps(120, (3, 224, 224)) == {}
    made.set_params(signature=Signature([Denoising(least_steps=1)]))
    assert made.training_steps(1280, (1, 8, 8), nb_epochs=3) == {"denoising": 42}
