"""Mahalanobis against the formulas in numpy, and what all peers promise, tried on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import nn

from benchmarks.detectors.base import Combination, Peer
from benchmarks.detectors.layers import LayerReader, default_layers
from benchmarks.detectors.mahalanobis import Mahalanobis, TiedGaussians
from ce_plugin.detection.protocol import DifferentiableDetector
from ce_plugin.errors import ArgumentError, InputError, ModelError, UnknownNameError


def network(dtype: torch.dtype = torch.float32, smooth: bool = False) -> nn.Sequential:
    """Two convolutional layers and a dense one; weights are the same in each test."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = (nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Linear(20, 3))
    act = nn.Softplus if smooth else nn.ReLU
    net = nn.Sequential(layers[0], act(), layers[1], nn.BatchNorm2d(5), act(), nn.MaxPool2d(2), nn.Flatten(), layers[2])
    return net.to(dtype)


def images(n: int = 80, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, 8, 8), dtype=np.float32)


def by_hand(train: np.ndarray, classes: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Equations 1 and 2 of the paper, minus the sign."""
    means = {c: train[classes == c].mean(0) for c in np.unique(classes)}
    scatter = sum((train[i] - means[c])[:, None] * (train[i] - means[c]) for i, c in enumerate(classes))
    precision = np.linalg.pinv(scatter / len(train))
    return np.array([min((f - m) @ precision @ (f - m) for m in means.values()) for f in test])


def test_gaussians_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    train, test, classes = rng.normal(size=(60, 6)), rng.normal(size=(9, 6)), np.arange(60) % 3
    gaussians = TiedGaussians.fitted(torch.tensor(train), torch.tensor(classes), 0.0)
    np.testing.assert_allclose(gaussians.distance(torch.tensor(test)), by_hand(train, classes, test), rtol=1e-9)


def test_a_singular_covariance_is_inverted_as_far_as_it_goes() -> None:
    rng = np.random.default_rng(0)
    train, classes = rng.normal(size=(40, 6)), np.arange(40) % 2
    train[:, 3], train[:, 4] = 7.0, train[:, 0]
    gaussians = TiedGaussians.fitted(torch.tensor(train), torch.tensor(classes), 0.0)
    np.testing.assert_allclose(gaussians.distance(torch.tensor(train)), by_hand(train, classes, train), rtol=1e-6)


def test_shrinkage_is_ledoit_and_wolfs() -> None:
    features = np.random.default_rng(0).normal(size=(20, 8))
    gaussians = TiedGaussians.fitted(torch.tensor(features), torch.zeros(20, dtype=torch.long), None)
    model = LedoitWolf().fit(features)
    np.testing.assert_allclose(gaussians.whiten @ gaussians.whiten.T, model.precision_, rtol=1e-9)


def test_small_classes_share_one_mean() -> None:
    features, classes = torch.arange(12.0)[:, None] ** 2, torch.tensor([0] * 6 + [1, 1, 2, 3, 4, 5])
    gaussians = TiedGaussians.fitted(features, classes, 0.0)
    assert sorted(gaussians.means.flatten().tolist()) == pytest.approx(
        [features[:6].mean().item(), features[6:].mean().item()]
    )


def test_the_score_is_the_sum_of_standardised_distances_of_a_linear_network() -> None:
    """A linear network, whose features are the pixels: everything by hand."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data = torch.tensor([[1.0, 0, -1, 0], [0, 0.5, 0, -1]])
    x = np.random.default_rng(1).random((60, 1, 2, 2), dtype=np.float32)
    detector = Mahalanobis(net, layers=["0"], shrinkage=0.0)
    detector.fit(x)
    flat = x.reshape(60, 4).astype(float)
    classes = net(torch.as_tensor(x)).argmax(1).numpy()
    assert min(np.bincount(classes)) >= 6
    assert detector.combination is not None
    wanted = (by_hand(flat, classes, flat) - detector.combination.mean) / detector.combination.scale
    np.testing.assert_allclose(detector.score(x), wanted, rtol=1e-5, atol=1e-5)


def test_distances_that_are_learnt_from_are_of_unseen_images() -> None:
    """Means and scales of the combination come from Gaussians that have not seen the image: those are larger."""
    rng = np.random.default_rng(0)
    x = rng.random((60, 1, 4, 4), dtype=np.float32)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    net[1].weight.data.zero_()  # one class
    detector = Mahalanobis(net, layers=["0"], shrinkage=0.0)
    detector.fit(x)
    seen = detector.score(x)
    unseen = detector.score(rng.random((400, 1, 4, 4), dtype=np.float32))
    assert seen.mean() < -0.6
    assert abs(unseen.mean()) < 0.4  # 80 % of the images, so a little larger


def test_labels_find_the_layer_that_tells() -> None:
    net, x = network(), images(120)
    attacked = np.clip(x + 0.5 * np.sign(images(120, 1) - 0.5), 0, 1).astype(np.float32)
    detector = Mahalanobis(net)
    both, labels = np.concatenate([x, attacked]), np.repeat([0, 1], 120)
    detector.fit(both, labels)
    score = detector.score(both)
    assert np.mean(score[120:, None] > score[None, :120]) > 0.95


@pytest.mark.parametrize("magnitude", [0.0, 0.02])
@pytest.mark.parametrize("labelled", [False, True])
def test_batch_size_and_order_do_not_matter(magnitude: float, labelled: bool) -> None:
    x = images()
    detector = Mahalanobis(network(torch.float64), magnitude=magnitude)
    detector.fit(x, np.arange(80) % 2 if labelled else None)
    score = detector.score(x)
    np.testing.assert_allclose(detector.score(x, batch_size=7), score, atol=1e-9)
    np.testing.assert_allclose(detector.score(x[::-1].copy())[::-1], score, atol=1e-9)


def test_preprocessing_moves_towards_the_nearest_class() -> None:
    x = images()
    plain, moved = (Mahalanobis(network(), layers=["1"], magnitude=m) for m in (0.0, 0.01))
    plain.fit(x)
    moved.fit(x)
    assert moved.combination is not None
    assert plain.combination is not None
    assert moved.combination.mean[0] < plain.combination.mean[0]
    assert (plain.passes, moved.passes) == (1.0, 5.0)


def test_gradient_is_that_of_finite_differences() -> None:
    net = network(torch.float64, smooth=True)
    detector = Mahalanobis(net)
    detector.fit(images())
    assert isinstance(detector, DifferentiableDetector)
    x = torch.as_tensor(images(2, 5)).double().requires_grad_()
    assert torch.autograd.gradcheck(detector.score_tensor, x, eps=1e-6, atol=1e-4)
    np.testing.assert_allclose(detector.score_tensor(x).detach(), detector.score(x.detach().numpy()), atol=1e-12)


def test_network_and_random_state_stay_as_they_were() -> None:
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net[0].weight.grad = grad = torch.ones_like(net[0].weight)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    detector = Mahalanobis(net, magnitude=0.01)
    detector.fit(images(), np.arange(80) % 2)
    detector.score(images())
    detector.score_tensor(torch.as_tensor(images(2)).requires_grad_()).sum().backward()
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net[0].weight.grad is grad
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy)  # noqa: NPY002


def test_two_fits_are_the_same_and_the_seed_draws_the_folds() -> None:
    def score(seed: int) -> np.ndarray:
        detector = Mahalanobis(network(), seed=seed)
        detector.fit(images())
        return detector.score(images(5, 2))

    assert np.array_equal(score(0), score(0))
    assert not np.allclose(score(0), score(1), rtol=1e-9)


def test_default_layers_are_the_ends_of_stages_and_dense_ones() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    assert default_layers(net, torch.zeros(1, 1, 8, 8)) == [net[3], net[6], net[9]]
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3), nn.Linear(3, 2))
    assert default_layers(plain, torch.zeros(1, 1, 8, 8)) == [plain[0], plain[2]]


def test_a_layer_written_over_later_is_read_as_it_was() -> None:
    """An in-place sum behind the layer must not change what was read, and the last call of a layer counts."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.head = nn.Linear(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act(x)
            y = self.act(y + 1)
            y += 100
            return self.head(y.mean((2, 3)))

    x = torch.rand(3, 1, 4, 4)
    for pool in (True, False):
        _, (read,) = LayerReader(Twice(), ["act"], pool=pool)(x)
        wanted = (x + 1).mean((2, 3)) if pool else (x + 1).flatten(1)
        torch.testing.assert_close(read, wanted)


def test_half_precision_values_are_summed_in_float32() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    _, (read,) = LayerReader(net.half(), ["0"])(torch.ones(1, 1, 4, 4).half())
    assert read.dtype == torch.float32


def test_read_only_images_are_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    x = images()
    x.flags.writeable = False
    detector = Mahalanobis(network())
    detector.fit(x)
    detector.score(x)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_combination_is_the_logistic_regression_of_standardised_statistics() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 4)
    statistics = rng.normal(size=(8, 2)) * [1, 100] + labels[:, None]
    z = (statistics - statistics.mean(0)) / statistics.std(0)
    wanted = LogisticRegression().fit(z, labels).decision_function(z)
    np.testing.assert_allclose(Combination.of_labels(statistics, labels)(torch.tensor(statistics)), wanted, rtol=1e-3)


def test_the_penalty_is_chosen_by_the_log_loss_of_images_left_out() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    statistics = rng.normal(size=(80, 12)) + labels[:, None] * (np.arange(12) < 2)
    z = (statistics - statistics.mean(0)) / statistics.std(0)
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    grid = {"C": np.logspace(-4, 4, 9)}
    model = GridSearchCV(LogisticRegression(max_iter=2000), grid, scoring="neg_log_loss", cv=folds).fit(z, labels)
    found = Combination.of_labels(statistics, labels, seed=3)(torch.tensor(statistics))
    np.testing.assert_allclose(found, model.decision_function(z), rtol=1e-2, atol=1e-3)
    assert model.best_params_["C"] < 1


def test_a_constant_statistic_says_nothing() -> None:
    statistics = np.stack([np.full(9, 0.3), np.arange(9.0)], 1)
    for two_sided in (False, True):
        score = Combination.of_clean(statistics, two_sided=two_sided)(torch.tensor([[0.3, 4.0]], dtype=torch.float64))
        assert score.abs().item() < 1e-9


def test_errors() -> None:
    net, x = network(), images(30)
    with pytest.raises(ArgumentError, match=r"Expected argument `network` to be a torch\.nn\.Module, but got str"):
        Mahalanobis("net")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Expected argument `magnitude`"):
        Mahalanobis(net, magnitude=-1)
    with pytest.raises(ArgumentError, match="Expected argument `shrinkage`"):
        Mahalanobis(net, shrinkage=2)
    with pytest.raises(ArgumentError, match=r"Expected argument `layers` to be a list"):
        Mahalanobis(net, layers=[])
    with pytest.raises(ArgumentError, match=r"Expected argument `layers` to be modules of the network"):
        Mahalanobis(net, layers=[nn.ReLU()])
    with pytest.raises(UnknownNameError, match="Expected argument `layers`"):
        Mahalanobis(net, layers=["nine"])
    detector: Peer = Mahalanobis(net)
    with pytest.raises(ArgumentError, match="a fitted one"):
        detector.score(x)
    with pytest.raises(ArgumentError, match="a fitted one"):
        Mahalanobis(net).score_tensor(torch.as_tensor(x))
    with pytest.raises(InputError, match="at least 20 clean images for Mahalanobis, but got 10"):
        detector.fit(x[:10])
    with pytest.raises(InputError, match=r"labels \(30,\), 0 clean and 1 adversarial"):
        detector.fit(x, np.arange(30))
    with pytest.raises(InputError, match="one kind only"):
        detector.fit(x, np.zeros(30))
    with pytest.raises(InputError, match=r"a numpy array of images \(N, C, H, W\)"):
        detector.fit(x[:, 0])
    with pytest.raises(InputError, match="floating-point"):
        detector.fit((255 * x).astype(np.uint8))
    with pytest.raises(InputError, match="finite"):
        detector.fit(np.full_like(x, np.nan))
    detector.fit(x)
    with pytest.raises(ArgumentError, match="Expected argument `batch_size`"):
        detector.score(x, batch_size=0)


def test_networks_that_have_no_layers_or_no_logits() -> None:
    with pytest.raises(ModelError, match="Pass `layers=`"):
        Mahalanobis(nn.Flatten()).fit(images(20))
    with pytest.raises(ModelError, match=r"one that returns logits \(N, classes\), but got shape"):
        Mahalanobis(nn.Conv2d(1, 1, 1)).fit(images(20))
    unused = network()
    unused.add_module("late", nn.Linear(3, 3))
    reader = LayerReader(unused, [unused[7]])
    assert reader(torch.as_tensor(images(2)))[1][0].shape == (2, 3)


def test_layers_that_are_not_run_are_named() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x.flatten(1))

    with pytest.raises(ModelError, match="layers that the network runs"):
        LayerReader(Part(), ["idle"])(torch.zeros(1, 1, 2, 2))
