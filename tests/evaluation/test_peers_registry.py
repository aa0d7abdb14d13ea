"""What every peer promises, tried on all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.detectors import PEERS, BinaryActivation, BinaryInput, KernelDensity, Peer, peers
from ce_plugin.detection.protocol import Detector, DifferentiableDetector
from ce_plugin.errors import InputError, UnknownNameError

QUICK: dict[str, Callable[[nn.Module], Peer]] = {
    **PEERS,
    "kernel-density": lambda network: KernelDensity(network, n_passes=3),
    "art-binary-input": lambda network: BinaryInput(network, epochs=1),
    "art-binary-activation": lambda network: BinaryActivation(network, epochs=1),
}
DIFFERENTIABLE = {
    "max-softmax", "entropy", "margin", "feature-squeezing", "mahalanobis", "lid", "kernel-density",
    "nss", "art-binary-input", "art-binary-activation",
}  # fmt: skip


def network(channels: int = 1) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(96, 3),
        )  # fmt: skip


def images(n: int = 48, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, channels, 8, 8), dtype=np.float32)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("labelled", [False, True])
def test_scores_depend_on_the_image_alone_and_nothing_is_left_behind(name: str, labelled: bool) -> None:
    net = network(3).train()
    peer = QUICK[name](net)
    if peer.needs_labels and not labelled:
        with pytest.raises(InputError, match="learns from attacked images"):
            peer.fit(images(channels=3))
        return
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    x = images(channels=3)
    peer.fit(x, np.arange(48) % 2 if labelled else None)
    score = peer.score(x)
    assert isinstance(peer, Detector)
    assert score.shape == (48,)
    assert score.dtype == np.float64
    assert np.isfinite(score).all()
    assert len(np.unique(score)) > 20
    spread = score.std()
    np.testing.assert_allclose(peer.score(x, batch_size=5), score, atol=1e-4 * spread)
    np.testing.assert_allclose(peer.score(x[::-1].copy())[::-1], score, atol=1e-4 * spread)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy)  # noqa: NPY002
    assert peer.passes >= 0


@pytest.mark.parametrize("name", PEERS)
def test_the_gradient_is_there_where_it_is_promised(name: str) -> None:
    peer = QUICK[name](network())
    assert isinstance(peer, DifferentiableDetector) == (name in DIFFERENTIABLE)
    if name not in DIFFERENTIABLE:
        return
    x = images()
    peer.fit(x, np.arange(48) % 2)
    point = torch.as_tensor(images(4, seed=3)).requires_grad_()
    score = peer.score_tensor(point)
    np.testing.assert_allclose(score.detach(), peer.score(point.detach().numpy()), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(score.sum(), point)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().amax((1, 2, 3)).min() > 0


def test_peers_are_chosen_by_name_and_by_what_they_need() -> None:
    net = network()
    everything = peers(net)
    assert len(everything) == len(PEERS) == len({peer.name for peer in everything})
    assert all(peer.network is net for peer in everything)
    unlabelled = peers(net, labels=False)
    assert {peer.name for peer in everything} - {peer.name for peer in unlabelled} == {
        "ART BinaryInput",
        "ART BinaryActivation",
    }
    assert [peer.name for peer in peers(net, ["nss", "margin"])] == ["NSS", "margin"]
    with pytest.raises(UnknownNameError, match="Did you mean 'margin'"):
        peers(net, ["margins"])
