"""ML-LOO: dispersions against numpy and scipy, attributions of linear networks in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.detectors.mlloo import MLLOO, dispersion
from ce_plugin.detection.protocol import Detector
from ce_plugin.errors import ArgumentError, InputError, UnknownNameError


def images(n: int = 40, seed: int = 0, channels: int = 1, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).random((n, channels, size, size))


def linear(inputs: int = 16) -> tuple[nn.Sequential, np.ndarray]:
    """A hidden layer of three linear neurons, in front of a head."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 3), nn.Linear(3, 2)).double()
    weight = np.random.default_rng(5).normal(size=(3, inputs))
    net[1].weight.data = torch.tensor(weight)
    return net, weight


def test_dispersions_are_those_of_numpy_and_scipy() -> None:
    values = np.random.default_rng(0).normal(size=(30, 4))
    tensor = torch.tensor(values)
    np.testing.assert_allclose(dispersion(tensor, "std"), values.std(0))
    np.testing.assert_allclose(dispersion(tensor, "iqr"), stats.iqr(values, axis=0))
    np.testing.assert_allclose(dispersion(tensor, "mad"), stats.median_abs_deviation(values, axis=0))


def test_attributions_of_a_linear_neuron_are_weight_times_pixel() -> None:
    net, weight = linear()
    x = images(3)
    detector = MLLOO(net, layers=["1"], dispersions=("std", "mad"))
    (read,) = detector._extract(torch.tensor(x))
    phi = weight[None] * x.reshape(3, 1, 16)
    np.testing.assert_allclose(read[:, :3].detach(), phi.std(2), rtol=1e-9)
    np.testing.assert_allclose(read[:, 5:8].detach(), stats.median_abs_deviation(phi, axis=2), rtol=1e-9)
    assert read.shape == (3, 10)
    assert detector.passes == 16


def test_the_last_neurons_are_the_probabilities_of_all_classes() -> None:
    net, _ = linear()
    x = torch.tensor(images(1))
    without = [x.masked_fill((torch.arange(16) == i).reshape(1, 1, 4, 4), 0.5) for i in range(16)]
    p = net(torch.cat(without)).softmax(1).detach().numpy()
    (read,) = MLLOO(net, layers=["1"], fill=0.5)._extract(x)
    np.testing.assert_allclose(read[0, 3:].detach(), stats.iqr(p, axis=0), rtol=1e-9)


def test_cells_cover_the_image_once_and_all_channels() -> None:
    net, weight = linear(inputs=2 * 5 * 5)
    x = images(2, channels=2, size=5)
    detector = MLLOO(net, layers=["1"], dispersions=["std"], cell=2)
    (read,) = detector._extract(torch.tensor(x))
    product = (weight.reshape(3, 1, 2, 5, 5) * x[None]).sum(2)
    cells = [product[:, :, i : i + 2, j : j + 2].sum((2, 3)) for i in (0, 2, 4) for j in (0, 2, 4)]
    np.testing.assert_allclose(read[:, :3].detach(), np.std(cells, 0).T, rtol=1e-9)
    assert detector.passes == 9


def test_large_images_have_a_grid_of_fourteen() -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    detector = MLLOO(net, layers=["0"])
    detector._extract(torch.rand(1, 1, 56, 56))
    assert detector.passes == 196


def test_both_ways_of_fitting_find_images_whose_effects_scatter() -> None:
    net, _ = linear()
    x = np.concatenate([images(60), 3 * images(60, 1)])
    for fit_on in ((x[:60], None), (x, np.repeat([0, 1], 60))):
        detector = MLLOO(net)
        detector.fit(*fit_on)
        score = detector.score(x)
        assert np.mean(score[60:, None] > score[None, :60]) > 0.95


def test_clean_only_is_two_sided() -> None:
    net, _ = linear()
    detector = MLLOO(net, layers=["1"])
    detector.fit(images(60))
    usual, small = detector.score(images(20, 1)), detector.score(0.01 * images(20, 2))
    assert np.median(small) > np.median(usual)


def test_batches_order_and_state() -> None:
    net, _ = linear()
    net.train()
    detector = MLLOO(net)
    assert isinstance(detector, Detector)
    detector.fit(images(), np.arange(40) % 2)
    score = detector.score(images())
    np.testing.assert_allclose(detector.score(images(), batch_size=3), score, atol=1e-9)
    np.testing.assert_allclose(detector.score(images()[::-1].copy())[::-1], score, atol=1e-9)
    assert net.training


def test_errors() -> None:
    net, _ = linear()
    with pytest.raises(ArgumentError, match="Expected argument `dispersions` to be a sequence"):
        MLLOO(net, dispersions="iqr")
    with pytest.raises(UnknownNameError, match="Expected argument `dispersions` to be one of 'iqr', 'mad', 'std'"):
        MLLOO(net, dispersions=["range"])
    with pytest.raises(ArgumentError, match="Expected argument `cell`"):
        MLLOO(net, cell=0)
    with pytest.raises(InputError, match="at least 9 pixels each way"):
        MLLOO(net, cell=9).fit(images())


def test_cells_that_are_blank_already_are_not_run_and_count_as_no_effect() -> None:
    net, weight = linear()
    x = images(1)
    x[0, 0, :2] = 0.0
    rows: list[int] = []
    net.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    (read,) = MLLOO(net, layers=["1"], dispersions=("std",))._extract(torch.tensor(x))
    assert sum(rows) == 1 + 8  # the image itself, and its lower half pixel by pixel
    np.testing.assert_allclose(read[0, :3].detach(), (weight * x.reshape(1, 16)).std(1), rtol=1e-9)
