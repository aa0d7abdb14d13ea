"""CausalEffect: the truth by brute force, Captum's numbers, and nothing that depends on batches or on order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, Occlusion
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin import CausalEffect, Estimate
from ce_plugin.designs import Design, Joint, LeaveOneIn, OneAtATime, RandomMask, RandomRegions
from ce_plugin.effects import resolve_outcome
from ce_plugin.errors import ArgumentError, InferenceError, NormalizationWarning, TargetError
from ce_plugin.interventions import Adversarial, PixelMask

DOUBLE = torch.float64
OUTCOMES = ["probability", "sigmoid", "logit", "log_odds", "margin", "prediction_weighted", None]


def network(shape: tuple[int, ...] = (1, 4, 4), classes: int = 3, seed: int = 0) -> nn.Module:
    """A small network with plenty of interactions."""
    torch.manual_seed(seed)
    size = int(torch.tensor(shape).prod())
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, classes)).to(DOUBLE)


def inputs(n: int = 2, shape: tuple[int, ...] = (1, 4, 4), seed: int = 1) -> Tensor:
    return 0.2 + torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


QUARTERS = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])[None, None]


def table(net: nn.Module, x: Tensor, do: Tensor, mask: Tensor, outcome: str | None) -> Tensor:
    """Outcomes of one example under all assignments, (2, ..., 2, C), straight from the definition."""
    units = int(mask.max()) + 1
    measure = resolve_outcome(outcome)
    found = []
    with torch.no_grad():
        reference = net(x)
        for assignment in itertools.product([False, True], repeat=units):
            here = torch.tensor(assignment)[mask.expand_as(x)]
            found.append(measure(net(torch.where(here, do, x)), reference)[0])
    return torch.stack(found).reshape(*[2] * units, -1)


def effect(outcomes: Tensor, unit: int, others: float) -> Tensor:
    """Effect of a unit, averaged over the others, each set with probability ``others``."""
    difference = outcomes.select(unit, 1) - outcomes.select(unit, 0)
    while difference.dim() > 1:
        difference = (1 - others) * difference[0] + others * difference[1]
    return difference


# --- the truth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("fill", ["mean", ("zero", "blur", 0.7)])
@pytest.mark.parametrize(("design", "others"), [(OneAtATime(), 0.0), (LeaveOneIn(), 1.0)])
def test_exact_designs_are_brute_force(design: Design, others: float, fill: Any, outcome: str | None) -> None:
    net, x = network(), inputs()
    found = CausalEffect(net, PixelMask(fill), design, outcome=outcome).estimate(x, feature_mask=QUARTERS)
    for i in range(2):
        alternatives = []
        for one in fill if isinstance(fill, tuple) else (fill,):
            outcomes = table(net, x[i : i + 1], PixelMask(one)(x[i : i + 1]), QUARTERS, outcome)
            alternatives.append(torch.stack([effect(outcomes, u, others) for u in range(4)]))
        assert (found.effect[i] - torch.stack(alternatives).mean(0)).abs().max() < 1e-9


def test_joint_effects_and_interactions_are_brute_force() -> None:
    net, x = network(), inputs(1)
    groups = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)]
    found = CausalEffect(net, PixelMask("zero"), Joint(groups), outcome="logit").estimate(x, feature_mask=QUARTERS)
    outcomes = table(net, x, torch.zeros_like(x), QUARTERS, "logit")
    wanted = []
    for group in groups:
        cell = tuple(1 if u in group else 0 for u in range(4))
        wanted.append(outcomes[cell] - outcomes[0, 0, 0, 0])
    assert (found.effect[0] - torch.stack(wanted)).abs().max() < 1e-9
    singles = dict(zip(groups, wanted, strict=True))
    for g, group in enumerate(groups):
        interaction = singles[group] - sum(singles[(u,)] for u in group)
        assert (found.interaction[0, g] - interaction).abs().max() < 1e-9
    assert found.groups == tuple(groups)
    assert found.labels_of(0)[3] == "0+1"


def test_a_joint_designs_map_gives_each_unit_the_mean_over_its_groups() -> None:
    net, x = network(), inputs(2)
    explainer = CausalEffect(net, PixelMask("zero"), Joint([(0,), (0, 1), (3,)]), outcome="logit")
    values = explainer.estimate(x, target=0, feature_mask=QUARTERS).contribution[:, :, 0]
    found = explainer.attribute(x, target=0, feature_mask=QUARTERS)
    assert torch.allclose(found[:, 0, 0, 0], (values[:, 0] + values[:, 1]) / 2)
    assert torch.allclose(found[:, 0, 0, 3], values[:, 1])
    assert torch.allclose(found[:, 0, 3, 0], torch.zeros(2, dtype=DOUBLE))
    assert torch.allclose(found[:, 0, 3, 3], values[:, 2])


@pytest.mark.parametrize("estimator", ["adjusted", "difference_in_means"])
@pytest.mark.parametrize(("p", "form"), [(0.5, "plain"), (0.2, "plain"), (0.5, "antithetic"), (0.3, "balanced")])
def test_random_designs_are_near_the_enumerated_expected_effect(estimator: str, p: float, form: str) -> None:
    net, x = network(), inputs(2)
    design = RandomMask(
        p, 2000, estimator=estimator, antithetic=form == "antithetic", balanced=form == "balanced", seed=3
    )
    found = CausalEffect(net, PixelMask("zero"), design).estimate(x, feature_mask=QUARTERS, ids=[0, 1])
    for i in range(2):
        outcomes = table(net, x[i : i + 1], torch.zeros_like(x[:1]), QUARTERS, "probability")
        wanted = torch.stack([effect(outcomes, u, p) for u in range(4)])
        assert found.std_error is not None
        # 24 numbers: beyond 4.5 standard errors once in 6000 runs if the errors are right; the seed is fixed.
        assert ((found.effect[i] - wanted).abs() < 4.5 * found.std_error[i]).all()
        assert (found.effect[i] - wanted).abs().max() < 0.02
        assert found.std_error[i].max() < 0.02


@pytest.mark.parametrize("outcome", ["logit", None])
@pytest.mark.parametrize("design", [OneAtATime(), LeaveOneIn()])
def test_a_linear_networks_weights_are_recovered(design: Design, outcome: str | None) -> None:
    net, x = nn.Linear(7, 3).to(DOUBLE), inputs(3, (7,))
    found = CausalEffect(net, PixelMask("zero"), design, outcome=outcome).estimate(x)
    assert (found.contribution - x[:, :, None] * net.weight.T).abs().max() < 1e-9


def test_a_linear_networks_weights_from_fewer_trials_than_units() -> None:
    net, x = nn.Linear(60, 1).to(DOUBLE), inputs(1, (60,))
    found = CausalEffect(net, PixelMask("zero"), RandomMask(0.5, 50), outcome=None).estimate(x)
    wanted = x[0] * net.weight[0].detach()
    assert found.std_error is not None
    error = (found.contribution[0, :, 0] - wanted).abs() / found.std_error[0, :, 0]
    assert float((error < 2.1).double().mean()) > 0.85


# --- Captum's numbers --------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_sliding_windows_are_occlusion(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 3))
    height, width = data.draw(st.integers(3, 7)), data.draw(st.integers(3, 7))
    window = (
        data.draw(st.integers(1, channels)), data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    )  # fmt: skip
    stride = tuple(data.draw(st.integers(1, size)) for size in window)
    net, x = network((channels, height, width)), inputs(2, (channels, height, width))
    baseline = data.draw(st.sampled_from([0.0, 0.3]))
    arguments: dict[str, Any] = {"sliding_window_shapes": window, "strides": stride, "target": 1}
    found = CausalEffect(net, PixelMask(baseline), OneAtATime(), outcome=None).attribute(x, **arguments)
    wanted = Occlusion(net).attribute(x, baselines=baseline, **arguments)
    assert (found - wanted).abs().max() < 1e-6  # Captum's maps are of single precision


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_feature_masks_are_feature_ablation(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(5,), (2, 3), (1, 4, 4), (2, 3, 3), (2, 2, 2, 2)]))
    n = data.draw(st.integers(1, 3))
    leading = data.draw(st.sampled_from([1, n]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.randint(0, data.draw(st.integers(1, 6)), (leading, *shape), generator=generator)
    net, x = network(shape), inputs(n, shape)
    found = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=None).attribute(x, target=1, feature_mask=mask)
    # Captum wants the ids of each mask to be without gaps; one example at a time that is easily had.
    for i in range(n):
        own = mask[i if leading > 1 else 0].unique(return_inverse=True)[1][None]
        wanted = FeatureAblation(net).attribute(x[i : i + 1], target=1, feature_mask=own)
        assert (found[i] - wanted[0]).abs().max() < 1e-9


@pytest.mark.parametrize("value", [0.3, 2, "tensor", "row", "per example"])
def test_baselines_are_captums(value: Any) -> None:
    net, x = network(), inputs(2)
    if isinstance(value, str):
        shape = {"tensor": (1, 4, 4), "row": (1, 1, 4, 4), "per example": (2, 1, 4, 4)}[value]
        value = torch.rand(shape, dtype=DOUBLE)
    explainer = CausalEffect(net, PixelMask("mean", normalization=(5.0, 7.0)), OneAtATime(), outcome=None)
    found = explainer.attribute(x, value, 1)
    captums = value if not isinstance(value, Tensor) or value.dim() == 4 else value[None]
    pixels = torch.arange(16).reshape(1, 1, 4, 4)
    assert (found - FeatureAblation(net).attribute(x, captums, 1, feature_mask=pixels)).abs().max() < 1e-9


def test_baselines_of_a_tuple_of_inputs() -> None:
    net, x = network((4,)), (inputs(2, (2,)), inputs(2, (2,), seed=5))

    def both(a: Tensor, b: Tensor) -> Tensor:
        return net(torch.cat([a, b], 1))

    for baselines in ((0.3, torch.rand(2, 2, dtype=DOUBLE)), (torch.rand(1, 2, dtype=DOUBLE), 1)):
        found = CausalEffect(both, outcome=None).attribute(x, baselines, 1)
        wanted = FeatureAblation(both).attribute(x, baselines, 1)
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(found, wanted, strict=True))


# --- units -------------------------------------------------------------------------------------------------------


def test_ragged_units_are_padded_with_nan() -> None:
    net, x = network(), inputs(3)
    mask = torch.cat([QUARTERS, QUARTERS // 2, torch.full_like(QUARTERS, 7)])
    for design in (OneAtATime(), LeaveOneIn(), RandomMask(0.5, 40)):
        explainer = CausalEffect(net, PixelMask("zero"), design, outcome="logit")
        found = explainer.estimate(x, feature_mask=mask)
        assert found.n_units.tolist() == [4, 2, 1]
        assert found.effect.isnan().any(2).tolist() == [[False] * 4, [False] * 2 + [True] * 2, [False] + [True] * 3]
        assert [found.labels_of(i) for i in range(3)] == [["0", "1", "2", "3"], ["0", "1"], ["7"]]
        for i in range(3):
            single = explainer.estimate(x[i : i + 1], feature_mask=mask[i : i + 1])
            own = int(found.n_units[i])
            assert (single.effect[0] - found.effect[i, :own]).abs().max() < 1e-9
        mapped = explainer.attribute(x, target=0, feature_mask=mask)
        assert not mapped.isnan().any()
        assert torch.equal(mapped[1, 0, 3], found.contribution[1, 1, 0].expand(4))
        frame = found.to_dataframe()
        assert len(frame) == 7 * 3


def test_units_that_reach_over_a_tuple_of_inputs_are_joint() -> None:
    a, b = inputs(2, (3,)), inputs(2, (2,), seed=5)
    masks = torch.tensor([[0, 1, 5]]), torch.tensor([[5, 1]])
    found = CausalEffect(lambda u, v: u.prod(1) + v.prod(1), outcome=None).estimate((a, b), feature_mask=masks)
    whole = a.prod(1) + b.prod(1)
    wanted = torch.stack([b.prod(1), torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)], 1) - whole[:, None]
    assert torch.allclose(found.effect[:, :, 0], wanted, atol=1e-12)
    assert found.unit_labels == ["0", "1", "5"]


def test_default_units() -> None:
    net = network((2, 40, 30))
    found = CausalEffect(net, PixelMask("zero"), OneAtATime()).estimate(inputs(1, (2, 40, 30)))
    assert found.effect.shape == (1, 196, 3)
    small = CausalEffect(network(), PixelMask("zero"), OneAtATime()).estimate(inputs(1))
    assert small.effect.shape == (1, 16, 3)
    table_ = CausalEffect(network((6, 2))).estimate(inputs(1, (6, 2)))
    assert table_.effect.shape == (1, 12, 3)
    assert CausalEffect(lambda x: x, outcome=None).attribute(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_scalars_of_a_large_image_do_not_make_a_square_of_assignments() -> None:
    """150 528 units: all assignments would take 21 GiB; 40 rows at a time take 6 MiB."""

    def model(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)

    x, mask = torch.rand(1, 3, 224, 224), torch.arange(3 * 224 * 224).reshape(1, 3, 224, 224)
    explainer = CausalEffect(model, PixelMask("zero"), OneAtATime(), outcome=None)
    cost = explainer.estimate_cost(x, feature_mask=mask)
    assert (cost.trials, cost.forward_passes) == (150528, 150531)
    rows = OneAtATime().rows(150528, 100000, 100040)
    assert rows.shape == (40, 150528)
    assert rows.nonzero()[:, 1].tolist() == list(range(100000, 100040))


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        2,
        [2, 0],
        torch.tensor([2, 0]),
        torch.tensor([2]),
        torch.tensor(2),
        (2,),
        [(2,), (0,)],
        -1,
        np.int64(2),
    ],
)
@pytest.mark.parametrize("outcome", ["probability", "margin", None])
def test_all_forms_of_a_target_are_its_single_targets(target: Any, outcome: str | None) -> None:
    net, x = network(), inputs(2)
    explainer = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=outcome)
    every = explainer.estimate(x)
    assert every.effect.shape == (2, 16, 3)
    classes = [2, 0] if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() == 2) else [2, 2]
    one = explainer.estimate(x, target=target)
    assert one.class_shape == ()
    assert one.target.tolist() == classes
    mapped = explainer.attribute(x, target=target)
    for i, c in enumerate(classes):
        assert torch.allclose(one.effect[i, :, 0], every.effect[i, :, c], atol=1e-12)
        assert torch.allclose(mapped[i].flatten(), every.contribution[i, :, c], atol=1e-12)
        assert torch.allclose(one.reference[i, 0], every.reference[i, c], atol=1e-12)


def test_random_designs_answer_all_classes_as_one_by_one() -> None:
    net, x = network(), inputs(2)
    explainer = CausalEffect(net, PixelMask("zero"), RandomMask(0.3, 60))
    every = explainer.estimate(x)
    for c in range(3):
        one = explainer.estimate(x, target=c)
        assert torch.allclose(one.effect[..., 0], every.effect[..., c], atol=1e-10)
        assert torch.allclose(one.std_error[..., 0], every.std_error[..., c], atol=1e-10)


def test_without_a_target_the_predicted_class_is_explained() -> None:
    net, x = network(), inputs(6)
    predicted = net(x).argmax(1)
    assert len(set(predicted.tolist())) > 1
    explainer = CausalEffect(net, PixelMask("zero"), OneAtATime())
    assert torch.equal(explainer.attribute(x), explainer.attribute(x, target=predicted))
    assert torch.equal(explainer.estimate(x).predicted, predicted)


def test_outcomes_of_ones_own() -> None:
    net, x = network(), inputs(2)

    def twice(output: Tensor, reference: Tensor) -> Tensor:
        return 2 * output - reference

    own = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=twice).estimate(x)
    raw = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=None).estimate(x)
    assert torch.allclose(own.effect, 2 * raw.effect, atol=1e-12)
    assert torch.allclose(own.reference, raw.reference, atol=1e-12)
    assert own.outcome == "twice"

    def in_place(output: Tensor, reference: Tensor) -> Tensor:
        return output.mul_(2).sub_(reference)

    careless = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=in_place).estimate(x)
    assert torch.allclose(careless.effect, own.effect, atol=1e-12)

    def distance(output: Tensor, reference: Tensor) -> Tensor:
        return (output - reference).square().sum(1)

    far = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=distance)
    assert torch.allclose(far.estimate(x).effect[..., 0], raw.effect.square().sum(2), atol=1e-12)
    assert far.attribute(x).shape == x.shape


def test_prediction_weighted_is_one_number_for_all_classes() -> None:
    net, x = network(), inputs(2)
    explainer = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome="prediction_weighted")
    probability = CausalEffect(net, PixelMask("zero"), OneAtATime()).estimate(x)
    wanted = (probability.effect * probability.reference[:, None]).sum(2)
    assert torch.allclose(explainer.estimate(x).effect[..., 0], wanted, atol=1e-12)
    assert explainer.attribute(x).shape == x.shape
    with pytest.raises(TargetError, match=r"prediction_weighted.*leave the target out"):
        explainer.attribute(x, target=1)


# --- what must not matter ----------------------------------------------------------------------------------------

DESIGNS = {
    "one at a time": OneAtATime(),
    "leave one in": LeaveOneIn(),
    "joint": Joint([(0,), (1, 2), (3,)]),
    "random": RandomMask(0.4, 40),
    "antithetic": RandomMask(0.5, 40, antithetic=True),
    "balanced": RandomMask(0.25, 40, balanced=True, estimator="difference_in_means"),
    "regions": RandomRegions(0.5, 40),
}


def same(a: Estimate, b: Estimate, atol: float = 1e-9) -> bool:
    pairs = [(a.effect, b.effect), (a.reference, b.reference)]
    if a.std_error is not None and b.std_error is not None:
        pairs.append((a.std_error, b.std_error))
    return all(torch.allclose(u, v, atol=atol, equal_nan=True) for u, v in pairs)


def painter(images: Tensor, masks: Tensor) -> Tensor:
    return images * 0.5 + masks.flatten(1).double().mean(1).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("fill", ["zero", ("zero", "noise"), ("mean", painter, 0.3)])
@pytest.mark.parametrize("name", DESIGNS)
def test_batch_size_and_order_do_not_matter(name: str, fill: Any) -> None:
    net, x = network(), inputs(4)
    explainer = CausalEffect(net, PixelMask(fill), DESIGNS[name])
    ids = [7, 3, 3, 0]
    whole = explainer.estimate(x, ids=ids)
    for per_eval in (1, 2, 5, 100):
        assert same(whole, explainer.estimate(x, ids=ids, perturbations_per_eval=per_eval))
    order = [2, 0, 3, 1]
    assert same(whole[order], explainer.estimate(x[order], ids=[ids[i] for i in order]))
    for i in range(4):
        assert same(whole[i], explainer.estimate(x[i : i + 1], ids=ids[i : i + 1]))


@pytest.mark.parametrize("name", DESIGNS)
def test_a_batch_size_that_changes_midway_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ce_plugin.trials import batches

    net, x = network(), inputs(3)
    explainer = CausalEffect(net, PixelMask(("zero", "noise")), DESIGNS[name])
    whole = explainer.estimate(x, perturbations_per_eval=1000)

    def random_size(self: batches.BatchSize, seconds: float) -> None:
        self._queue = [int(torch.randint(1, 12, ()))]

    monkeypatch.setattr(batches.BatchSize, "_learn", random_size)
    # Each pass is timed only where it is full, so that the size keeps changing.
    assert same(whole, CausalEffect(lambda v: net(v), PixelMask(("zero", "noise")), DESIGNS[name]).estimate(x))


def test_ids_decide_who_shares_assignments() -> None:
    net = network()
    x = inputs(1).expand(3, -1, -1, -1)
    explainer = CausalEffect(net, PixelMask("zero"), RandomMask(0.3, 50))
    shared = explainer.estimate(x, keep_trials=True)
    assert torch.equal(shared.assignments[0], shared.assignments[1])
    assert torch.allclose(shared.effect[0], shared.effect[2], atol=1e-12)
    apart = explainer.estimate(x, ids=[0, 1, 1], keep_trials=True)
    assert not torch.equal(apart.assignments[0], apart.assignments[1])
    assert torch.equal(apart.assignments[1], apart.assignments[2])
    assert torch.equal(shared.assignments[0], apart.assignments[0])
    agreement = (apart.assignments[0] == apart.assignments[1]).double().mean()
    assert float(agreement) == pytest.approx(0.3**2 + 0.7**2, abs=0.06)
    assert same(explainer.estimate(x, ids=torch.tensor([0, 1, 1])), apart)


def test_seeds() -> None:
    net, x = network(), inputs(2)
    first = CausalEffect(net, PixelMask("noise"), RandomMask(0.3, 50, seed=1), seed=2)
    assert same(first.estimate(x), first.estimate(x), atol=0)
    for other in (
        CausalEffect(net, PixelMask("noise"), RandomMask(0.3, 50, seed=2), seed=2),
        CausalEffect(net, PixelMask("noise"), RandomMask(0.3, 50, seed=1), seed=3),
    ):
        assert not same(first.estimate(x), other.estimate(x), atol=1e-3)


def test_the_global_random_state_is_neither_read_nor_written() -> None:
    net, x = network(), inputs(2)
    explainer = CausalEffect(net, PixelMask("noise"), RandomMask(0.3, 50))
    torch.manual_seed(1)
    first = explainer.estimate(x)
    after = torch.rand(1)
    torch.manual_seed(2)
    assert same(first, explainer.estimate(x), atol=0)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


def test_inputs_and_baselines_are_not_changed() -> None:
    net, x, baseline = network(), inputs(2), torch.rand(1, 1, 4, 4, dtype=DOUBLE)
    copies = x.clone(), baseline.clone()
    x.requires_grad_()
    baseline.requires_grad_()
    found = CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(x, baseline)
    assert torch.equal(x.detach(), copies[0])
    assert torch.equal(baseline.detach(), copies[1])
    assert x.grad is None
    assert not found.requires_grad


# --- cost, memory, progress --------------------------------------------------------------------------------------


class Count:
    """What a network that is guarded can count on: the attributes of the network itself are restored."""

    __slots__ = ("calls", "largest", "refused", "rows")

    def __init__(self) -> None:
        self.calls = self.largest = self.refused = self.rows = 0


class Counted(nn.Module):
    """Counts the rows that go through, and the largest batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.count = net, Count()

    def forward(self, x: Tensor) -> Tensor:
        self.count.calls += 1
        self.count.rows += len(x)
        self.count.largest = max(self.count.largest, len(x))
        return self.net(x)


@pytest.mark.parametrize("fill", ["zero", ("zero", "noise", 0.1)])
@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("given_", [None, PixelMask("blur")])
def test_the_estimated_cost_is_what_a_run_takes(name: str, fill: Any, given_: Any) -> None:
    net, x = Counted(network()), inputs(3)
    explainer = CausalEffect(net, PixelMask(fill), DESIGNS[name])
    cost = explainer.estimate_cost(x, given=given_)
    assert net.count.rows == 1
    net.count.rows = 0
    estimate = explainer.estimate(x, given=given_)
    assert net.count.rows == cost.forward_passes == estimate.cost
    exact = DESIGNS[name].exact
    per_example = DESIGNS[name].n_trials_for(16) * (len(fill) if isinstance(fill, tuple) and exact else 1)
    assert cost.trials == 3 * per_example
    assert str(cost.trials) in str(cost)


def test_the_cost_of_convolutions_counts_the_search_for_a_memory_layout() -> None:
    net = Counted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)))
    explainer = CausalEffect(net, PixelMask("zero"), OneAtATime())
    x = torch.rand(1, 3, 8, 8)
    for passes in (64 + 3 + 2, 64 + 3):  # known the second time
        assert explainer.estimate_cost(x).forward_passes == passes
        net.count.rows = 0
        explainer.attribute(x)
        assert net.count.rows == passes


def test_the_cost_with_masks_of_each_examples_own() -> None:
    net, x = network(), inputs(3)
    mask = torch.cat([QUARTERS, QUARTERS // 2, QUARTERS])
    cost = CausalEffect(net, PixelMask("zero"), OneAtATime()).estimate_cost(x, feature_mask=mask)
    assert (cost.trials, cost.forward_passes) == (10, 15)


def test_perturbations_per_eval_bounds_the_batch() -> None:
    net, x = Counted(network()), inputs(2)
    CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(x, perturbations_per_eval=3)
    assert net.count.largest == 6


@pytest.mark.parametrize("budget", [1, 40_000, 200_000])
def test_a_memory_budget_bounds_the_batch(budget: int) -> None:
    net, x = Counted(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 2))), torch.rand(40, 1, 8, 8)
    CausalEffect(net, PixelMask("zero"), RandomMask(0.5, 64), memory_budget=budget).attribute(x)
    row = 4 * (64 + 8 * 36)  # what the convolution reads and writes
    assert net.count.largest <= max(1, budget // row)
    assert budget == 1 or net.count.largest > 1


def test_a_budget_that_was_small_once_does_not_slow_later_runs_down() -> None:
    net, x = Counted(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 2))), torch.rand(2, 1, 8, 8)
    CausalEffect(net, PixelMask("zero"), RandomMask(0.5, 64), memory_budget=1).attribute(x)
    assert net.count.largest == 1
    CausalEffect(net, PixelMask("zero"), RandomMask(0.5, 200)).attribute(x)
    assert net.count.largest >= 8


class Small(Counted):
    """A device on which only so many rows fit."""

    def __init__(self, net: nn.Module, room: int) -> None:
        super().__init__(net)
        self.room = room

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room:
            self.count.refused += 1
            raise torch.OutOfMemoryError("pretended")
        return super().forward(x)


@pytest.mark.parametrize("room", [1, 3, 5])
@pytest.mark.parametrize("per_eval", [None, 16])
def test_running_out_of_memory_halves_the_batch(room: int, per_eval: int | None) -> None:
    x = inputs(6)
    net = Small(network(), room)
    explainer = CausalEffect(net, PixelMask(("zero", "noise")), RandomMask(0.4, 40))
    found = explainer.estimate(x, perturbations_per_eval=per_eval)
    wanted = CausalEffect(network(), PixelMask(("zero", "noise")), RandomMask(0.4, 40)).estimate(x)
    assert same(found, wanted)
    assert 0 < net.count.refused < 20
    assert net.count.largest <= room


def test_where_not_even_one_row_fits_the_error_is_the_devices() -> None:
    net = Small(network(), 0)
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(inputs(2))
    assert net.training


def test_progress_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    net, x = network(), inputs(2)
    explainer = CausalEffect(net, PixelMask("zero"), OneAtATime())
    explainer.attribute(x)
    assert capsys.readouterr().err == ""
    explainer.attribute(x, show_progress=True)
    assert "trials: 100%" in (shown := capsys.readouterr().err)
    assert "32/32" in shown


# --- until, significance, saving ---------------------------------------------------------------------------------


def test_until_stops_when_the_intervals_are_narrow_enough() -> None:
    weights = torch.tensor([[1.0], [2.0], [0.0]], dtype=DOUBLE)
    net = Counted(nn.Linear(3, 1).to(DOUBLE))
    x = torch.ones(2, 3, dtype=DOUBLE)

    def noisy(v: Tensor) -> Tensor:
        # The second example's outcome has an interaction that keeps its intervals wide.
        return net(v) * 0 + v @ weights + 5 * (v[:, 0] * v[:, 1] * v[:, 2])[:, None]

    x[0] *= 0.05
    design = RandomMask(0.5, 1000)
    found = CausalEffect(noisy, PixelMask("zero"), design, outcome=None).estimate(x, until=0.35)
    used = found.settings["trials_per_example"]
    assert used[0] == 100
    assert 150 <= used[1] < 1000
    assert used[1] % 50 == 0
    assert found.peeked
    assert (found.half_width() <= 0.35).all()
    assert net.count.rows == found.cost == 2 + 2 + sum(used)  # two rows are passed twice
    before = CausalEffect(noisy, PixelMask("zero"), RandomMask(0.5, 1000), outcome=None).estimate(x, until=1e-9)
    assert before.settings["trials_per_example"] == [1000, 1000]
    assert same(before, CausalEffect(noisy, PixelMask("zero"), design, outcome=None).estimate(x))


@pytest.mark.parametrize(
    ("options", "until"),
    [
        ({}, 0.009),
        ({"antithetic": True}, 0.009),
        ({"balanced": True}, 0.009),
        ({"estimator": "difference_in_means"}, 0.03),
    ],
)
def test_until_gives_a_batch_what_it_gives_each_example(options: dict[str, Any], until: float) -> None:
    net, x = network(), inputs(4) * torch.tensor([0.2, 1.0, 2.0, 5.0], dtype=DOUBLE).reshape(4, 1, 1, 1)
    explainer = CausalEffect(net, PixelMask(("zero", 0.5)), RandomMask(0.3, 400, **options))
    whole = explainer.estimate(x, until=until, ids=[0, 1, 2, 3], keep_trials=True)
    used = whole.settings["trials_per_example"]
    assert len(set(used)) > 1
    for i in range(4):
        single = explainer.estimate(x[i : i + 1], until=until, ids=[i])
        assert single.settings["trials_per_example"] == [used[i]]
        assert same(single, whole[i])
    pairs = whole.pairs([(0, 1)])
    assert torch.isfinite(pairs.effect).all()


def test_until_asks_an_attack_for_its_values_once() -> None:
    asked = []

    def infill(images: Tensor) -> Tensor:
        asked.append(len(images))
        return images * 0

    net, x = network(), inputs(2)
    CausalEffect(net, PixelMask(infill), RandomMask(0.3, 400)).estimate(x, until=1e-9)
    # Once for the trials, once to see whether anything changes.
    assert asked == [2, 2]


@pytest.mark.parametrize("until", [0.0, -1.0, float("nan")])
def test_until_needs_a_width(until: float) -> None:
    explainer = CausalEffect(network(), PixelMask("zero"), RandomMask(0.3, 400))
    with pytest.raises(ArgumentError, match="argument `until` to be a positive half-width"):
        explainer.estimate(inputs(), until=until)


def test_until_needs_standard_errors() -> None:
    explainer = CausalEffect(network(), PixelMask("zero"), OneAtATime())
    with pytest.raises(ArgumentError, match=r"with standard errors, but got 0.1 for OneAtATime\(\)"):
        explainer.estimate(inputs(), until=0.1)
    images = torch.rand(1, 1, 8, 8, dtype=DOUBLE)
    for design in (RandomRegions(n_trials=29), RandomRegions(independent=0)):
        with pytest.raises(ArgumentError, match="with standard errors"):
            CausalEffect(network_of_images(), design=design).estimate(images, until=0.1)


def network_of_images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()


@pytest.mark.parametrize("design", [RandomRegions(n_trials=29), RandomRegions(n_trials=40, independent=0)])
def test_a_smooth_map_alone_has_no_errors(design: Design) -> None:
    explainer, x = CausalEffect(network_of_images(), design=design), torch.rand(1, 1, 8, 8, dtype=DOUBLE)
    found = explainer.estimate(x, target=0)
    assert found.std_error is None
    assert torch.equal(found.effect, found.smoothed)
    with pytest.raises(InferenceError, match="a smooth map has no known error"):
        found.significant(fdr=0.05)
    assert found.to_dataframe()["significant"].isna().all()
    for keywords in ({"values": "unbiased"}, {"significant_only": True}):
        with pytest.raises(InferenceError):
            explainer.attribute(x, target=0, **keywords)
    assert torch.isfinite(explainer.attribute(x, target=0)).all()


def test_the_default_is_unbiased_with_a_smooth_map_beside_it() -> None:
    """One pixel alone counts: the effect says so, and its interval; the map, which attribute shows, is smoother."""
    x = torch.ones(1, 1, 14, 14, dtype=DOUBLE)

    def model(v: Tensor) -> Tensor:
        return torch.stack([v[:, 0, 6, 6], -v[:, 0, 6, 6]], 1)

    explainer = CausalEffect(model, PixelMask("zero"), outcome=None)
    found = explainer.estimate(x, target=0)
    assert "independent=0.4" in found.design
    unit = 6 * 14 + 6
    low, high = found.confidence_interval(0.95)
    assert low[0, unit, 0] <= -1 <= high[0, unit, 0]
    assert found.significant(fdr=0.05)[0, :, 0].nonzero().flatten().tolist() == [unit]
    assert float(found.smoothed[0, unit, 0]) > float(found.effect[0, unit, 0]) + 1e-3
    assert torch.allclose(explainer.attribute(x, target=0)[0, 0].flatten(), -found.smoothed[0, :, 0])
    assert torch.allclose(explainer.attribute(x, target=0, values="unbiased")[0, 0].flatten(), -found.effect[0, :, 0])


def test_significant_only_sets_the_rest_to_zero() -> None:
    weights = torch.zeros(20, 1, dtype=DOUBLE)
    weights[3] = 1.0

    def model(v: Tensor) -> Tensor:
        # As good as random: depends on all units together, on none by itself.
        return v @ weights + 0.3 * (1e4 * v @ torch.linspace(0.1, 1.7, 20, dtype=DOUBLE)).sin()[:, None]

    x = torch.ones(2, 20, dtype=DOUBLE)
    explainer = CausalEffect(model, PixelMask("zero"), RandomMask(0.5, 400), outcome=None)
    estimate, full = explainer.estimate(x), explainer.attribute(x)
    for wanted, rate in ((0.05, True), (0.2, 0.2)):
        keep = estimate.significant(wanted)[..., 0]
        found = explainer.attribute(x, significant_only=rate)
        assert torch.equal(found != 0, keep)
        assert torch.equal(found[keep], full[keep])
        assert keep[:, 3].all()
        assert not keep.all()
    assert torch.equal(explainer.attribute(x, significant_only=False), full)


def test_significance_of_exact_designs_is_refused_before_the_run() -> None:
    net = Counted(network())
    with pytest.raises(InferenceError, match=r"`significant_only` to be None for OneAtATime\(\), but got True"):
        CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(inputs(), significant_only=True)
    for rate in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(
            ArgumentError, match=r"`significant_only` to be True, or a false discovery rate in \(0, 1\)"
        ):
            CausalEffect(net, PixelMask("zero"), RandomMask()).attribute(inputs(), significant_only=rate)
    assert net.count.calls == 0


def test_the_smallest_random_designs() -> None:
    """Units that are never flipped have no effect to show, and none that could be significant."""
    net, x = network((30,)), inputs(1, (30,))
    explainer = CausalEffect(net, PixelMask("zero"), RandomMask(0.1, 4, estimator="difference_in_means"))
    found = explainer.estimate(x)
    assert found.effect.isnan().any()
    shown = explainer.attribute(x, significant_only=True)
    assert not shown.isnan().any()


@pytest.mark.parametrize("name", DESIGNS)
def test_real_results_survive_saving_and_indexing(name: str, tmp_path: Path) -> None:
    net, x = network(), inputs(3)
    found = CausalEffect(net, PixelMask("noise"), DESIGNS[name]).estimate(x, ids=[0, 1, 2], keep_trials=True)
    loaded = Estimate.load(found.save(tmp_path / "result"))
    assert found.equals(loaded)
    assert loaded[1].effect.shape[0] == len(loaded[1]) == 1
    assert torch.equal(loaded[1].effect[0], found.effect[1])
    assert torch.equal(found[-1].effect[0], found.effect[2])
    assert [torch.equal(found[1:].effect, found.effect[1:]), len(found[[0, 2]])] == [True, 2]
    assert len(loaded.to_dataframe()) == found.effect.numel()


def test_what_a_result_says_about_itself() -> None:
    net, x = network(), inputs(2)
    found = CausalEffect(net, PixelMask("zero"), RandomMask(0.3, 50, seed=4), seed=5).estimate(x)
    assert (found.outcome, found.intervention, found.evidence) == ("probability", "PixelMask('zero')", "none")
    assert found.design == "RandomMask(0.3, n_trials=50, estimator='adjusted', seed=4)"
    assert found.n_trials == 50
    assert found.p == 0.3
    assert found.class_shape == (3,)
    assert not found.peeked
    assert found.settings["seconds"] > 0


def test_normalising_twice_warns() -> None:
    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 0.5) / 0.5

    net = nn.Sequential(Normalize(), network())
    with pytest.warns(NormalizationWarning, match="Leave `normalization` out unless both are true") as caught:
        CausalEffect(net, normalization=(0.5, 0.5))
    assert caught[0].filename == __file__


def test_the_default_intervention_takes_the_normalization() -> None:
    net, x = network((4,)), inputs(2, (4,))
    found = CausalEffect(net, design=OneAtATime(), outcome=None, normalization=(127.0, 128.0)).attribute(x, target=0)
    black = PixelMask(0.0, normalization=(127.0, 128.0))
    assert torch.equal(found, CausalEffect(net, black, OneAtATime(), outcome=None).attribute(x, target=0))


def test_defaults_run_on_everything() -> None:
    cases: list[tuple[Callable[..., Any], Any]] = [
        (network((3, 20, 24)), inputs(2, (3, 20, 24))),
        (network(), inputs(2)),
        (network((9,)), inputs(2, (9,))),
        (network((5, 2)), inputs(2, (5, 2))),
    ]
    for net, x in cases:
        assert CausalEffect(net).attribute(x).shape == x.shape
        assert CausalEffect(net).estimate(x).effect.shape[2] == 3


def test_which_pixels_carry_an_attack() -> None:
    """F_j: the value that do sets is the attacked pixel; the answer is brute force over pictures that mix both."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).train()
    x = torch.rand(3, 1, 4, 4)
    attack = Adversarial.fgsm(net, eps=0.2)
    attacked = attack(x)
    explainer = CausalEffect(net, attack, OneAtATime(), outcome="log_odds")
    found = explainer.estimate(x, feature_mask=QUARTERS)
    measure = resolve_outcome("log_odds")
    with torch.no_grad():
        reference = measure(net(x), net(x))
        for unit in range(4):
            outcome = measure(net(torch.where(QUARTERS.eq(unit), attacked, x)), net(x))
            assert torch.allclose(found.effect[:, unit], outcome - reference, atol=1e-4)
    single = explainer.estimate(x[2:], feature_mask=QUARTERS)
    assert torch.allclose(single.effect[0], found.effect[2], atol=1e-4)
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    cost = explainer.estimate_cost(x, feature_mask=QUARTERS)
    assert cost.trials == 12
    assert cost.forward_passes == 12 + 3 * (1 + attack.forward_equivalents) + 2
    random = CausalEffect(net, attack, RandomMask(0.5, 200), outcome="log_odds").estimate(x, until=1e-9)
    assert torch.isfinite(random.effect).all()


def test_baselines_do_not_go_with_an_attack() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(1, 1, 4, 4)
    with pytest.raises(ArgumentError, match=r"`baselines` to be None with .*Baselines replace the fill of a mask"):
        CausalEffect(net, Adversarial.fgsm(net, eps=0.1)).attribute(x, 0.0)
