"""The terms of the loss: closed forms, invariances, and who gets a gradient from which."""

from __future__ import annotations

import math

import pytest
import torch
from _planted_layer import CHANNELS, SOURCES, Mixture, sources
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin.concepts import (
    ConceptAutoencoder,
    deep_loss,
    inserted,
    interpretability_loss,
    shallow_loss,
    smoothness,
    sparsity,
)
from ce_plugin.errors import ArgumentError, InputError

CONVOLUTIONS = ("encoder.conv1", "encoder.conv2", "encoder.conv3", "decoder.conv4", "decoder.conv5")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_shallow_is_the_mean_absolute_difference_in_units_of_the_scale() -> None:
    h, r = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    assert float(shallow_loss(h, r)) == pytest.approx((h - r).abs().sum().item() / h.numel(), rel=1e-12)
    assert float(shallow_loss(h, r, 4.0)) == pytest.approx(float(shallow_loss(h, r)) / 4, rel=1e-12)
    assert float(shallow_loss(h, h)) == 0.0


def test_deep_is_torchs_kl_divergence() -> None:
    a, b = draw(5, 7), draw(5, 7, seed=1)
    p = torch.distributions.Categorical(logits=a)
    q = torch.distributions.Categorical(logits=b)
    torch.testing.assert_close(deep_loss(a, b), torch.distributions.kl_divergence(p, q).mean())
    assert float(deep_loss(a, a)) == 0.0


def test_deep_is_not_symmetric() -> None:
    a, b = draw(5, 7), 3 * draw(5, 7, seed=1)
    assert abs(float(deep_loss(a, b) - deep_loss(b, a))) > 0.1


def test_deep_for_several_labels_is_the_sum_of_bernoulli_divergences() -> None:
    a, b = draw(5, 7), draw(5, 7, seed=1)
    p = torch.distributions.Bernoulli(logits=a)
    q = torch.distributions.Bernoulli(logits=b)
    want = torch.distributions.kl_divergence(p, q).sum(1).mean()
    torch.testing.assert_close(deep_loss(a, b, "sigmoid"), want)


def test_deep_stays_finite_where_labels_are_saturated() -> None:
    a, b = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]])
    assert float(deep_loss(a, b, "sigmoid")) == pytest.approx(400.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_interpretability_does_not_depend_on_the_size_of_a_concept(seed: int, factor: float) -> None:
    code = draw(2, 3, 5, 4, seed=seed).relu()
    other = code.clone()
    other[:, 1] *= factor
    torch.testing.assert_close(interpretability_loss(code), interpretability_loss(other))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6))
def test_sparsity_of_one_active_position_out_of_n(height: int, width: int) -> None:
    code = torch.zeros(1, 1, height, width)
    code[0, 0, height // 2, width // 2] = 3.0
    assert float(sparsity(code)) == pytest.approx(1 / math.sqrt(height * width), rel=1e-5)
    assert float(sparsity(torch.full((1, 1, height, width), 3.0))) == pytest.approx(1.0)


def test_smoothness_of_a_step_and_of_a_checkerboard() -> None:
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1.0
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * torch.ones(1, 1, 4, 4)
    rms = math.sqrt(0.5)
    assert float(smoothness(step)) == pytest.approx((4 / 12) / rms)
    assert float(smoothness(board)) == pytest.approx(2 / rms)


def test_absent_concepts_are_left_out() -> None:
    code = draw(2, 2, 4, 4).abs()
    with_absent = torch.cat([code, torch.zeros(2, 3, 4, 4).double()], 1).requires_grad_()
    loss = interpretability_loss(with_absent)
    torch.testing.assert_close(loss, interpretability_loss(code))
    (gradient,) = torch.autograd.grad(loss, with_absent)
    assert bool(gradient.isfinite().all())
    assert float(interpretability_loss(torch.zeros(2, 3, 4, 4))) == 0.0


def test_errors_say_what_came() -> None:
    with pytest.raises(InputError, match=r"`reconstruction` to be of shape \(1, 2, 3, 3\), but got \(1, 2, 3, 4\)"):
        shallow_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
    with pytest.raises(InputError, match=r"`inserted_output` to be of shape \(1, 2\)"):
        deep_loss(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ArgumentError, match=r"`outcome` to be one of .*, but got 'logit'"):
        deep_loss(torch.zeros(1, 2), torch.zeros(1, 2), "logit")
    with pytest.raises(ArgumentError, match="softmax of a single output is always 1"):
        deep_loss(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ArgumentError, match="`smooth` to be zero or more, but got -1"):
        interpretability_loss(torch.zeros(1, 1, 2, 2), smooth=-1)


def gradients(term: str) -> dict[str, float]:
    """The largest gradient that a term alone gives to each convolution, and to the explained network."""
    network, autoencoder = Mixture().eval(), ConceptAutoencoder(CHANNELS, SOURCES)
    network.requires_grad_(False)
    x = sources(4)
    h = network.mix(x)
    code = autoencoder.encode(h)
    if term == "shallow":
        loss = shallow_loss(h, autoencoder.decode(code))
    elif term == "deep":
        with inserted(network, "mix", autoencoder):
            answer = network(x)
        loss = deep_loss(network(x), answer)
    else:
        loss = interpretability_loss(code)
    loss.backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    layers = {name: autoencoder.get_submodule(name) for name in CONVOLUTIONS}
    return {name: _largest(layer) for name, layer in layers.items()}


def _largest(layer: nn.Module) -> float:
    found = [0.0 if p.grad is None else float(p.grad.abs().max()) for p in layer.parameters()]
    return min(found)


@pytest.mark.parametrize("term", ["shallow", "deep"])
def test_shallow_and_deep_teach_all_five_layers(term: str) -> None:
    """In the authors' released code the KL term was never used and the last decoding layer got no gradient."""
    found = gradients(term)
    assert list(found) == list(CONVOLUTIONS)
    assert min(found.values()) > 1e-6, found


def test_interpretability_teaches_the_encoder_only() -> None:
    found = gradients("interpretability")
    assert min(found[name] for name in CONVOLUTIONS[:3]) > 1e-6, found
    assert [found[name] for name in CONVOLUTIONS[3:]] == [0.0, 0.0]
