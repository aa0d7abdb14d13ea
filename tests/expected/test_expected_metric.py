"""ExpectedCausalEffect: truth by hand, merges in any split, torchmetrics' ways of using a metric."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from _worlds import explainer, inputs, logit_effects, network
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ce_plugin import LayerCausalEffect
from ce_plugin.designs import RandomMask
from ce_plugin.effects import Estimate
from ce_plugin.errors import ArgumentError, InferenceError, InputError, NoChangeWarning, UnknownNameError
from ce_plugin.expected import ExpectedCausalEffect, ExpectedEstimate
from ce_plugin.expected import metric as module
from ce_plugin.interventions import PixelMask, ZeroOut

HALF = {"clean": None, "dark": PixelMask(fill=0.5)}


def seen(n: int, *, first: int = 0, **options: object) -> ExpectedCausalEffect:
    metric = ExpectedCausalEffect(explainer(), **options)  # type: ignore[arg-type]
    metric.update(inputs(first + n)[first:], ids=range(first, first + n))
    return metric


def test_means_errors_and_p_values_are_those_of_the_images() -> None:
    x, net = inputs(40), network()
    answer = seen(40).compute()
    truth = logit_effects(net, x)
    assert isinstance(answer, Estimate)
    assert answer.n_images == 40
    assert torch.allclose(answer.effect[0], truth.mean(0), atol=1e-6)
    assert answer.std_error is not None
    assert torch.allclose(answer.std_error[0], truth.std(0) / 40**0.5, atol=1e-6)
    p = stats.ttest_1samp(truth.numpy(), 0).pvalue
    assert np.allclose(answer.p_values()[0].numpy(), p, rtol=1e-4, atol=1e-12)
    assert torch.allclose(answer.reference[0], net(x).double().mean(0), atol=1e-6)
    assert answer.reference_error is not None
    assert torch.allclose(answer.reference_error[0], net(x).double().std(0) / 40**0.5, atol=1e-6)


def test_a_difference_is_paired_on_the_same_images() -> None:
    x, net = inputs(30), network()
    answer = seen(30, given=HALF).compute()
    clean, dark = logit_effects(net, x), logit_effects(net, torch.full_like(x, 0.5))
    apart = answer.difference("dark", "clean")
    assert torch.allclose(apart.effect[0], (dark - clean).mean(0), atol=1e-6)
    p = stats.ttest_rel(dark.numpy(), clean.numpy()).pvalue
    assert np.allclose(apart.p_values()[0].numpy(), p, rtol=1e-3, atol=1e-12)
    assert apart.to_dataframe()["evidence"].unique().tolist() == ["dark - clean"]
    assert float(answer.difference("clean", "clean").std_error.abs().max()) == 0  # type: ignore[union-attr]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.randoms())
def test_any_split_and_order_merges_to_the_same(sizes: list[int], random: object) -> None:
    whole = seen(60, given=HALF).compute()
    bounds = [0, *np.cumsum(sizes).tolist(), 60]
    parts = [range(a, b) for a, b in itertools.pairwise(bounds)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    metric = ExpectedCausalEffect(explainer(), given=HALF)
    for own in parts:
        other = ExpectedCausalEffect(explainer(), given=HALF)  # an empty part stays idle
        if len(own):
            other.update(inputs(60)[list(own)], ids=own)
        metric.merge_state(other)
    answer = metric.compute()
    assert answer.n_images == 60
    assert torch.allclose(answer.effect, whole.effect, rtol=0, atol=1e-7)
    assert torch.allclose(answer.covariance, whole.covariance, rtol=0, atol=1e-7)  # type: ignore[arg-type]


def test_merging_is_exact_in_float64() -> None:
    values = torch.randn(50, 2, 7, 3, dtype=torch.float64) * 1e3 + 1e6
    whole = module.moments_of(values)
    parts = module.merged(
        [module.moments_of(values[:1]), module.moments_of(values[1:20]), module.moments_of(values[20:])]
    )
    assert parts is not None
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-12, atol=0)
    assert torch.allclose(parts.comoment, whole.comoment, rtol=1e-9, atol=0)
    by_numpy = np.cov(values[:, :, 4, 2].T.numpy())
    assert np.allclose(whole.comoment[:, :, 4, 2].numpy() / 49, by_numpy, rtol=1e-9)


def test_forward_gives_the_batch_and_keeps_all() -> None:
    metric = ExpectedCausalEffect(explainer())
    one = metric(inputs(20)[:8], ids=range(8))
    two = metric(inputs(20)[8:], ids=range(8, 20))
    assert (one.n_images, two.n_images, metric.compute().n_images) == (8, 12, 20)
    assert torch.allclose(metric.compute().effect, seen(20).compute().effect, atol=1e-7)
    metric.reset()
    metric.update(inputs(3), ids=range(3))
    assert metric.compute().n_images == 3


def test_the_network_is_no_part_of_the_metric() -> None:
    metric = seen(4)
    assert list(metric.modules()) == [metric]
    assert metric.state_dict() == {}
    twin = copy.deepcopy(metric)
    assert twin.explainer is metric.explainer
    twin.update(inputs(6)[4:], ids=(4, 5))
    assert (twin.compute().n_images, metric.compute().n_images) == (6, 4)
    back = pickle.loads(pickle.dumps(metric))
    back.update(inputs(6)[4:], ids=(4, 5))
    assert torch.equal(back.compute().effect, twin.compute().effect)


def test_processes_are_synchronised_also_idle_ones() -> None:
    here, there = seen(12, given=HALF), seen(8, first=12, given=HALF)
    states = [here.moments, there.moments, ExpectedCausalEffect(explainer(), given=HALF).moments]

    def gather(state: Tensor, group: object = None) -> list[Tensor]:
        return states

    for local in (here.moments, states[2]):
        options = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}
        metric = ExpectedCausalEffect(explainer(), given=HALF, **options)
        metric.moments, metric._update_count = local, 1
        answer = metric.compute()
        assert answer.n_images == 20
        assert torch.allclose(answer.effect, seen(20, given=HALF).compute().effect, atol=1e-7)
        assert torch.equal(metric.moments, local)  # its own again afterwards


def of_one_process(rank: int, folder: str) -> None:
    """One of three processes: the first sees no image."""
    torch.set_num_threads(1)
    file = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=file, rank=rank, world_size=3)
    metric = ExpectedCausalEffect(explainer(), given=HALF)
    own = list(range(60))[rank::3]
    own = [i for i in own if i < 20] if rank else []
    if own:
        metric.update(inputs(60)[own], ids=own)
    torch.save(metric.compute().effect, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_real_processes_are_synchronised(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(of_one_process, (str(tmp_path),), nprocs=3)
    ids = [i for i in range(20) if i % 3]
    metric = ExpectedCausalEffect(explainer(), given=HALF)
    metric.update(inputs(60)[ids], ids=ids)
    for rank in range(3):
        assert torch.allclose(torch.load(tmp_path / f"{rank}.pt"), metric.compute().effect, atol=1e-7)


def test_a_device_without_float64_leaves_the_state_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = seen(4)
    monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    assert metric.to("meta").moments.device.type == "cpu"
    monkeypatch.setattr(module, "widest", lambda device: torch.float64)
    assert metric.half().moments.dtype is torch.float64
    assert metric.to("meta").moments.device.type == "meta"


def test_random_designs_draw_anew_for_each_image() -> None:
    made = LayerCausalEffect(network(), "1", design=RandomMask(0.5, n_trials=40), outcome="logit")
    metric = ExpectedCausalEffect(made)
    x = inputs(1).repeat(200, 1)  # one image many times: what differs is what was drawn
    metric.update(x, ids=range(200))
    answer = metric.compute()
    truth = logit_effects(network(), x[:1])[0]
    low, high = answer.confidence_interval(0.999)
    assert bool(((low[0] - 1e-6 <= truth) & (truth <= high[0] + 1e-6)).all())
    assert float(answer.std_error.max()) > 0  # type: ignore[union-attr]


def test_one_number_keeps_its_dimensions() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Linear(1, 1))
    metric = ExpectedCausalEffect(LayerCausalEffect(net, "0", outcome=None))
    metric.update(inputs(5), ids=range(5))
    assert metric.compute().effect.shape == (1, 1, 1)
    assert metric.compute().p_values().shape == (1, 1, 1)


def test_an_intervention_that_never_changes_anything_warns() -> None:
    metric = ExpectedCausalEffect(LayerCausalEffect(network(), "1", ZeroOut(), outcome="logit"))
    net = metric.explainer.forward.modules[0]
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    metric.update(inputs(3), ids=range(3))
    with pytest.warns(NoChangeWarning, match=r"changes nothing in any image under \['clean'\]"):
        metric.compute()


def test_a_target_gives_one_class() -> None:
    metric = ExpectedCausalEffect(explainer())
    metric.update(inputs(9), target=2, ids=range(9))
    answer = metric.compute()
    assert answer.classes == (2,)
    assert torch.allclose(answer.effect[0, :, 0], logit_effects(network(), inputs(9)).mean(0)[:, 2], atol=1e-6)


def test_the_answer_is_saved_shown_and_picked(tmp_path: Path) -> None:
    answer = seen(10, given=HALF).compute()
    file = answer.save(f"{tmp_path}/answer")
    assert ExpectedEstimate.load(file).equals(answer)
    assert answer["dark"].evidences == ("dark",)
    assert torch.equal(answer["dark"].effect[0], answer.effect[1])
    frame = answer.to_dataframe()
    assert len(frame) == 2 * 5 * 3
    assert set(frame["evidence"]) == {"clean", "dark"}
    assert "mean of 10 images" in repr(answer)
    metric = seen(10)
    figure, axes = metric.plot(target=1)
    assert axes in figure.axes
    assert "class 1: mean of 10 images" in axes.get_title()


def test_wrong_use_is_said() -> None:
    with pytest.raises(ArgumentError, match="`explainer` to be an explainer"):
        ExpectedCausalEffect(network())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`given` to be evidence by name"):
        ExpectedCausalEffect(explainer(), given={})
    metric = ExpectedCausalEffect(explainer())
    with pytest.raises(InputError, match="`ids` to be one integer per image, but got None"):
        metric.update(inputs(2))
    with pytest.raises(InputError, match="each image once, but got 1 several times"):
        metric.update(inputs(2), ids=[1, 1])
    with pytest.raises(InputError, match="one image or more"):
        metric.compute()
    metric.update(inputs(1), ids=[0])
    with pytest.raises(InferenceError, match="two images or more"):
        metric.compute().p_values()
    with pytest.raises(UnknownNameError, match="evidence"):
        metric.compute().difference("clean", "dark")
    with pytest.raises(InputError, match="of the units and classes"):
        metric.update(inputs(1), target=0, ids=[1])
