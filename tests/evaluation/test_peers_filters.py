"""Filter effects: counterfactual information by zeroing filters by hand, prototypes, statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.detectors.filters import FilterEffects, filter_statistics
from ce_plugin.detection.protocol import Detector
from ce_plugin.errors import ModelError, UnknownNameError


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        layers = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 5, 2), nn.Linear(45, 3)
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), layers[2])
    net[3].running_mean += 0.05
    return net.double()


def images(n: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, 6, 6))


def test_information_is_the_fall_of_probability_when_a_filter_is_zeroed() -> None:
    net = network().eval()
    x = torch.tensor(images(8))
    information, classes = FilterEffects(net).information(x)
    p, rows = net(x).softmax(1), torch.arange(8)
    for unit in range(5):
        value = net[:3](x).detach().clone()
        value[:, unit] = 0
        without = net[3:](value).softmax(1)
        wanted = (p - without)[rows, classes].detach()
        torch.testing.assert_close(information[:, unit], wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(classes, p.argmax(1))


def test_statistics_by_hand() -> None:
    ci = torch.tensor([[0.4, 0.2, 0.0, -0.2], [0.0, 0.0, 0.0, 0.0]])
    prototype = torch.tensor([[0.3, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = filter_statistics(ci, prototype)
    cosine = 0.4 * 0.3 / (np.sqrt(0.24) * np.sqrt(0.18))
    wanted = [0.1, np.std([0.4, 0.2, 0, -0.2]), 0.4, 0.5, 0.25, 0.5, cosine]
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)
    assert found[1].tolist() == [0.0] * 7


def test_prototypes_are_of_the_class_or_of_all_where_it_is_small_or_unknown() -> None:
    information = torch.arange(14.0)[:, None]
    classes = torch.tensor([0] * 6 + [1] * 2 + [3] * 6)
    prototypes = FilterEffects(network())._learn((information, classes))
    rows = prototypes.row(torch.tensor([0, 1, 2, 3, 8]))
    assert rows.flatten().tolist() == [2.5, 6.5, 6.5, 10.5, 6.5]


@pytest.mark.parametrize("labelled", [False, True])
def test_images_with_other_effects_are_found(labelled: bool) -> None:
    """Images ten times as bright have effects of another size."""
    x = np.concatenate([images(), 10 * images(60, 1)])
    detector = FilterEffects(network())
    detector.fit(x if labelled else x[:60], np.repeat([0, 1], 60) if labelled else None)
    score = detector.score(x)
    assert np.mean(score[60:, None] > score[None, :60]) > 0.9


def test_batches_order_and_state() -> None:
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    detector = FilterEffects(net, layer="2")
    assert isinstance(detector, Detector)
    detector.fit(images(), np.arange(60) % 2)
    score = detector.score(images())
    np.testing.assert_allclose(detector.score(images(), batch_size=7), score, atol=1e-8)
    np.testing.assert_allclose(detector.score(images()[::-1].copy())[::-1], score, atol=1e-8)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert detector.passes > 1


def test_the_default_layer_is_the_convolution_run_last() -> None:
    named, found = FilterEffects(network().eval(), layer="2"), FilterEffects(network().eval())
    x = torch.tensor(images(3))
    torch.testing.assert_close(named.information(x)[0], found.information(x)[0])


def test_errors() -> None:
    with pytest.raises(ModelError, match="with `layer=`"):
        FilterEffects(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()).fit(images())
    with pytest.raises(UnknownNameError, match="Expected argument `layer`"):
        FilterEffects(network(), layer="nine")
