"""Kernel density against scikit-learn, dropout's uncertainty against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV, LeaveOneOut
from sklearn.neighbors import KernelDensity as SklearnDensity
from torch import nn

from benchmarks.detectors.density import ClassDensity, KernelDensity, likeliest_bandwidth
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import ArgumentError, ModelError
from ce_plugin.randomness import generator


def network(dropout: bool = False) -> nn.Sequential:
    """Pixels are the last hidden layer; the two classes are those of the sign of one difference."""
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.4 if dropout else 0.0), nn.Linear(16, 2, bias=False)).double()
    weight = torch.zeros(2, 16, dtype=torch.float64)
    weight[0, 0] = weight[1, 1] = 4.0
    net[2].weight.data = weight
    return net


def images(n: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, 4, 4))


def test_density_is_that_of_scikit_learn_in_the_predicted_class() -> None:
    x, test = images(), images(9, 1)
    detector = KernelDensity(network(), bandwidth=0.7)
    detector.fit(x)
    flat, new = x.reshape(100, 16), test.reshape(9, 16)
    classes, predicted = (flat[:, 1] > flat[:, 0]).astype(int), (new[:, 1] > new[:, 0]).astype(int)
    assert set(predicted) == {0, 1}
    norm = 8 * np.log(2 * np.pi * 0.7**2)  # scikit-learn's densities integrate to one
    models = [SklearnDensity(bandwidth=0.7).fit(flat[classes == c]) for c in (0, 1)]
    wanted = -np.array([models[c].score_samples(row[None])[0] + norm for c, row in zip(predicted, new, strict=True)])
    assert detector.combination is not None
    standardised = (wanted - detector.combination.mean) / detector.combination.scale
    np.testing.assert_allclose(detector.score(test), standardised, rtol=1e-6)


def test_bandwidth_is_that_of_the_greatest_leave_one_out_likelihood() -> None:
    points = np.random.default_rng(0).normal(size=(60, 3))
    found = likeliest_bandwidth(torch.tensor(points), torch.zeros(60, dtype=torch.long))
    distances = np.linalg.norm(points[:, None] - points, axis=2)[~np.eye(60, dtype=bool)]
    grid = {"bandwidth": np.median(distances) * np.logspace(-1.5, 0.5, 21)}
    best = GridSearchCV(SklearnDensity(), grid, cv=LeaveOneOut()).fit(points).best_params_["bandwidth"]
    assert found == pytest.approx(best, rel=0.03)  # medians of an even number of distances differ a little


def test_small_and_unseen_classes_have_the_density_of_all() -> None:
    features = torch.arange(14.0, dtype=torch.float64)[:, None]
    classes = torch.tensor([0] * 6 + [1] * 2 + [3] * 6)
    detector = KernelDensity(network(), bandwidth=1.0)
    density = detector._learn((features, classes, features[:, :0]))
    assert isinstance(density, ClassDensity)
    point = torch.tensor([[2.5]], dtype=torch.float64).expand(5, 1)
    found = density.log_density(point, torch.tensor([0, 1, 2, 3, 9])).exp()
    kernel = np.exp(-((np.arange(14) - 2.5) ** 2) / 2)
    everyone = kernel.mean()
    np.testing.assert_allclose(found, [kernel[:6].mean(), everyone, everyone, kernel[8:].mean(), everyone])


def test_dropout_uncertainty_is_the_variance_over_passes() -> None:
    net = network(dropout=True).eval()
    detector = KernelDensity(net, n_passes=7, seed=3)
    assert (detector.name, detector.passes) == ("KD+BU", 8.0)
    x = torch.tensor(images(5))
    weight, flat = net[2].weight.detach(), x.flatten(1)
    masks = [torch.rand(16, generator=generator(3, "dropout", t, 0)) >= 0.4 for t in range(7)]
    p = torch.stack([(flat * mask / 0.6 @ weight.T).softmax(1) for mask in masks])
    wanted = p.var(0, correction=0).sum(1)
    torch.testing.assert_close(detector._uncertainty(x)[:, 0], wanted)
    assert detector.passes == 2  # dropout stands in front of the last layer: the rest need not be run again


def test_dropout_elsewhere_runs_the_whole_network_and_comes_to_the_same() -> None:
    """A layer that changes nothing between dropout and the last layer hides that the rest could run once."""
    plain = network(dropout=True).eval()
    hidden = nn.Sequential(plain[0], plain[1], nn.LeakyReLU(1.0), plain[2])
    x = torch.tensor(images(5))
    short, long = KernelDensity(plain, n_passes=4), KernelDensity(hidden, n_passes=4)
    torch.testing.assert_close(short._uncertainty(x), long._uncertainty(x))
    assert (short.passes, long.passes) == (2.0, 5.0)
    assert not any(m._forward_hooks for m in hidden.modules())


def test_dropped_channels_are_whole_and_as_many_as_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(1, 400, 1), nn.Dropout2d(0.25), nn.Flatten(), nn.Linear(6400, 2))
    detector = KernelDensity(net)
    value = detector._dropping(net[1], 0, 0)(net[1], None, torch.ones(2, 400, 4, 4))
    assert torch.equal(value.amin((2, 3)), value.amax((2, 3)))
    assert (value[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert value.max().item() == pytest.approx(1 / 0.75)


def test_a_network_without_dropout_says_so() -> None:
    detector = KernelDensity(network())
    assert (detector.name, detector.passes) == ("KD", 1.0)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_batches_order_state_and_repetition(dropout: bool, labelled: bool) -> None:
    net = network(dropout).train()
    state = torch.get_rng_state()
    labels = np.arange(100) % 2 if labelled else None
    scores = []
    for size in (100, 13):
        detector = KernelDensity(net, n_passes=4)
        detector.fit(images(), labels)
        scores.append(detector.score(images(), batch_size=size))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-9)
    np.testing.assert_allclose(detector.score(images()[::-1].copy())[::-1], scores[0], atol=1e-9)
    assert net.training
    assert all(module.training for module in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dropout", [False, True])
def test_gradient_is_that_of_finite_differences(dropout: bool) -> None:
    detector = KernelDensity(network(dropout), n_passes=3)
    detector.fit(images())
    assert isinstance(detector, DifferentiableDetector)
    x = torch.tensor(images(2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(detector.score_tensor, x, atol=1e-4)


def test_images_far_from_their_class_score_higher() -> None:
    for labels in (None, np.repeat([0, 1], 100)):
        x = np.concatenate([images(), images(100, 1) + 0.5 * np.sign(images(100, 2) - 0.5)])
        detector = KernelDensity(network())
        detector.fit(x[:100] if labels is None else x, labels)
        score = detector.score(x)
        assert np.mean(score[100:, None] > score[None, :100]) > 0.95


def test_a_named_layer_is_read() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    by_name, by_default = KernelDensity(net, layer="2", bandwidth=1.0), KernelDensity(net, bandwidth=1.0)
    by_name.fit(images())
    by_default.fit(images())
    np.testing.assert_allclose(by_name.score(images(5, 1)), by_default.score(images(5, 1)), atol=1e-12)


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="Expected argument `bandwidth`"):
        KernelDensity(network(), bandwidth=0)
    with pytest.raises(ArgumentError, match="Expected argument `n_passes`"):
        KernelDensity(network(), n_passes=0)
    with pytest.raises(ModelError, match="with `layer=`"):
        KernelDensity(nn.Flatten()).fit(images())
