"""Fidelity, and what is found out about each concept: dead, duplicated, and where it is most active."""

from __future__ import annotations

import pytest
import torch
from _planted_layer import CHANNELS, SOURCES, Mixture, sources
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn

from ce_plugin.concepts import ConceptAutoencoder, Fidelity, examine, inserted, measure_fidelity
from ce_plugin.concepts.activity import peak_regions
from ce_plugin.concepts.fidelity import compare_outputs
from ce_plugin.errors import ArgumentError, ModelError


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.data())
def test_interval_is_wilsons(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    want = binomtest(k, n).proportion_ci(0.9, method="wilson")
    got = Fidelity(agreement=k / n, kl=0.0, outcome_change=0.0, n_images=n).interval(0.9)
    assert got == pytest.approx((want.low, want.high), abs=1e-9)


def test_fidelity_of_logits_by_hand() -> None:
    before = torch.tensor([[0.0, 0.0, 4.0], [3.0, 0.0, 0.0]])
    after = torch.tensor([[0.0, 0.0, 4.0], [0.0, 3.0, 0.0]])
    found = compare_outputs([(before, after)], "probability")
    p = before.double().softmax(1)[1]
    assert found.agreement == 0.5
    assert found.outcome_change == pytest.approx(float(p[0] - p[1]) / 2)
    assert found.kl == pytest.approx(3 * float(p[0] - p[1]) / 2)
    single = compare_outputs([(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [1.0]]))], "sigmoid")
    assert single.agreement == 0.5
    with pytest.raises(ArgumentError, match=r"`level` to be in \(0, 1\), but got 95"):
        found.interval(95)


def test_fidelity_does_not_depend_on_the_batch_size() -> None:
    network, autoencoder, x = Mixture().double(), ConceptAutoencoder(CHANNELS, 2).double(), sources(23).double()
    found = [measure_fidelity(network, "mix", autoencoder, x, batch_size=n) for n in (1, 5, 23)]
    assert found[0].agreement == found[1].agreement == found[2].agreement < 1
    assert found[0].kl == pytest.approx(found[2].kl, rel=1e-10)
    assert found[1].outcome_change == pytest.approx(found[2].outcome_change, rel=1e-10)


def test_inserting_is_undone_also_after_an_error() -> None:
    network, x = Mixture().eval(), sources(3)
    before = network(x)
    with inserted(network, "mix", ConceptAutoencoder(CHANNELS, 2)):
        assert not torch.allclose(network(x), before)
    with pytest.raises(RuntimeError), inserted(network, network.mix, nn.Linear(1, 1)):
        network(x)
    assert torch.equal(network(x), before)


def planted() -> tuple[Mixture, ConceptAutoencoder]:
    """Concepts written by hand: 0 to 2 are the sources, 3 repeats 1, 4 is never active, 5 is active without effect."""
    network = Mixture()
    network.mix.bias.data.zero_()
    autoencoder = ConceptAutoencoder(CHANNELS, 6, hidden=6, kernel_size=1)
    mixing = network.mix.weight.data[:, :, 0, 0]
    unmixing = torch.linalg.pinv(mixing)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.zero_()
        for name in ("encoder.conv2", "encoder.conv3", "decoder.conv4"):
            autoencoder.get_submodule(name).get_parameter("weight").copy_(torch.eye(6)[:, :, None, None])
        first = autoencoder.get_submodule("encoder.conv1")
        last = autoencoder.get_submodule("decoder.conv5")
        rows = torch.cat([unmixing, 0.5 * unmixing[1:2], -unmixing[0:1], unmixing[2:3]])
        first.get_parameter("weight").copy_(rows[:, :, None, None])
        first.get_parameter("bias")[4] = -1e-3
        columns = torch.cat([mixing, 0.5 * mixing[:, 1:2], mixing[:, :1], torch.zeros(CHANNELS, 1)], 1)
        last.get_parameter("weight").copy_(columns[:, :, None, None])
    return network, autoencoder


def test_dead_and_duplicated_concepts_are_found_as_such() -> None:
    network, autoencoder = planted()
    report = examine(autoencoder, network, "mix", sources(40))
    assert report.dead.tolist() == [False, False, False, False, True, True]
    assert report.alive.tolist() == [0, 1, 2, 3]
    # 5 has the code of 2 but adds nothing, 0 and 4 point the same way but are never active together.
    assert [pair[:2] for pair in report.duplicates] == [(1, 3)]
    assert report.duplicates[0][2:] == pytest.approx((1.0, 1.0), abs=1e-5)
    assert report.share_active[4] == 0
    assert report.share_active[5] > 0.5
    assert report.effect[5] == 0
    assert report.examples[4].tolist() == [-1] * 5
    assert "2 dead, 1 pairs of duplicates" in str(report)
    frame = report.to_dataframe()
    assert frame["duplicates"].tolist() == [[], [3], [], [1], [], []]
    assert frame["dead"].tolist() == report.dead.tolist()


def test_activity_and_examples_are_those_of_the_sources() -> None:
    network, autoencoder = planted()
    x = sources(40)
    report = examine(autoencoder, network, "mix", x, top=4)
    torch.testing.assert_close(report.mean_activation[:3].float(), x.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    for k in range(SOURCES):
        heights = x[:, k].flatten(1).amax(1)
        torch.testing.assert_close(report.peaks[k], heights.sort(descending=True).values[:4], atol=1e-4, rtol=1e-4)
        for example, (row, column), box in zip(
            report.examples[k].tolist(), report.positions[k].tolist(), report.boxes[k].tolist(), strict=True
        ):
            assert x[example, k, row, column] == pytest.approx(heights[example].item(), abs=1e-5)
            left, top, right, bottom = box
            assert left <= column < right
            assert top <= row < bottom
            inside = x[example, k, top:bottom, left:right]
            assert inside.max() == heights[example]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_nothing_depends_on_the_batches(batch_size: int) -> None:
    network, autoencoder = planted()
    x = sources(20)
    x[13:17] = x[5:9]  # ties keep the order of the images
    one = examine(autoencoder, network, "mix", x, batch_size=20)
    other = examine(autoencoder, network, "mix", x, batch_size=batch_size)
    assert torch.equal(one.examples, other.examples)
    assert torch.equal(one.boxes, other.boxes)
    torch.testing.assert_close(one.mean_activation, other.mean_activation)
    torch.testing.assert_close(one.effect, other.effect)


def test_regions_are_connected_and_scaled_to_the_image() -> None:
    code = torch.zeros(1, 1, 4, 6)
    code[0, 0, 1, 2:4] = torch.tensor([3.0, 5.0])
    code[0, 0, 1, 5] = 4.0  # as high, but elsewhere
    code[0, 0, 2, 3] = 2.0  # less than half
    positions, boxes = peak_regions(code, (32, 60))
    assert positions.tolist() == [[[1, 3]]]
    assert boxes.tolist() == [[[20, 8, 40, 16]]]


def test_examining_leaves_the_network_alone_and_needs_no_logits() -> None:
    class Pieces(Mixture):
        def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
            return [super().forward(x)]

    network = Pieces().train()
    report = examine(ConceptAutoencoder(CHANNELS, 2), network, "mix", sources(4), top=9)
    assert report.examples.shape == (2, 4)
    assert network.training
    assert not network.mix._forward_hooks


def test_what_examining_refuses() -> None:
    network, autoencoder = planted()
    with pytest.raises(ArgumentError, match="`top` to be 1 or more, but got 0"):
        examine(autoencoder, network, "mix", sources(4), top=0)
    with pytest.raises(ArgumentError, match=r"`min_correlation` to be in \(0, 1\], but got 2"):
        examine(autoencoder, network, "mix", sources(4), min_correlation=2)
    with pytest.raises(ModelError, match="one for the 9 channels of layer 'mix', but got one for 8"):
        examine(ConceptAutoencoder(8, 2), network, "mix", sources(4))
    autoencoder.layer_name = "drop"
    with pytest.raises(ModelError, match="one for layer 'mix', but got one for layer 'drop'"):
        examine(autoencoder, network, "mix", sources(4))
