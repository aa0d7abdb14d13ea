"""The network that the benchmark trains for BEYOND."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.detection import _detectors as detectors
from benchmarks.detection import _selfsupervised as ssl
from benchmarks.detectors import Beyond


def images(n: int = 32) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def trained(seed: int = 0) -> nn.Module:
    config = ssl.Pretraining(ssl.Augmentation(flip=True), epochs=1, batch=16)
    network: nn.Module = ssl.train(config, seed, images().numpy(), np.arange(32) % 10)
    return network


def test_training_depends_on_the_seed_alone_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = trained()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = trained().state_dict(), trained(seed=1).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in one.state_dict().items())
    assert not torch.equal(other["backbone.0.weight"], again["backbone.0.weight"])
    assert not any(module.training for module in one.modules())


def test_a_view_that_is_predicted_from_passes_a_gradient_and_its_target_none() -> None:
    network = ssl.SimSiam().eval()
    network.predictor.requires_grad_(False)
    nn.init.zeros_(network.predictor[-1].weight)  # what is predicted is constant: only the target's side is left
    network.loss(images(4), images(4).flip(0)).backward()
    gradients = [parameter.grad for parameter in network.projector.parameters()]
    assert gradients
    assert not any(gradient is not None and gradient.any() for gradient in gradients)


def test_views_stay_pictures_and_what_is_not_asked_for_is_not_done() -> None:
    views = ssl.Augmentation(flip=True)(images(), torch.Generator().manual_seed(1))
    assert views.shape == (32, 1, 28, 28)
    assert 0 <= float(views.min()) < float(views.max()) <= 1
    nothing = ssl.Augmentation(flip=False, area=1.0, degrees=0.0, jitter=0.0)
    # The shape of the cut is drawn all the same: black may come in at the edge, nothing else changes.
    flat = torch.full((8, 1, 28, 28), 0.5)
    torch.testing.assert_close(nothing(flat)[..., 1:-1, 1:-1], flat[..., 1:-1, 1:-1])


def test_about_half_of_the_pictures_are_flipped_where_that_is_asked() -> None:
    left = torch.zeros(200, 1, 28, 28)
    left[..., :14] = 1
    draw = torch.Generator().manual_seed(0)
    kind = {flip: ssl.Augmentation(flip=flip, area=0.9, degrees=0.0, jitter=0.0)(left, draw) for flip in (True, False)}
    share = {flip: float((x[..., :5].mean((1, 2, 3)) < 0.5).float().mean()) for flip, x in kind.items()}
    assert share[False] == 0
    assert 0.4 < share[True] < 0.6


def test_beyond_takes_it_and_scores_images_one_by_one() -> None:
    network = trained()
    detector = Beyond(nn.Flatten(), ssl_model=network, augmentations=ssl.Augmentation(flip=True), n_augmentations=8)
    x = images(6).numpy()
    before = torch.get_rng_state()
    detector.fit(x)
    scores = detector.score(x)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(detector.score(x[::-1].copy(), batch_size=2)[::-1], scores, atol=1e-6)
    assert len(np.unique(scores)) == 6


def test_a_network_that_is_in_the_cache_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ssl.Pretraining(ssl.Augmentation(flip=False), epochs=1, batch=16)
    monkeypatch.setitem(ssl.PRETRAINING, "mnist", config)
    monkeypatch.setattr(ssl, "train_split", lambda name: (images().numpy(), np.arange(32) % 10))
    before = torch.get_rng_state()
    first = ssl.simsiam("mnist", 3, tmp_path).state_dict()
    monkeypatch.setattr(ssl, "train_split", lambda name: pytest.fail("trained again"))
    assert all(
        torch.equal(first[name], tensor) for name, tensor in ssl.simsiam("mnist", 3, tmp_path).state_dict().items()
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert [file.name for file in tmp_path.rglob("*.pt")] == ["ssl-mnist-3.pt"]


def test_scores_of_beyond_belong_to_its_network_and_it_is_left_out_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(detectors, "simsiam", lambda name, seed, cache: trained(seed))
    problems = [SimpleNamespace(name="fashion", seed=seed, network=nn.Flatten()) for seed in (0, 1)]
    versions = [detectors.version(detectors.build("beyond", problem)) for problem in (*problems, problems[0])]
    assert versions[0] == versions[2] != versions[1]
    assert "beyond" in detectors.names()
    assert detectors.available("beyond", "mnist")
    assert not detectors.available("beyond", "imagenet")
