"""Networks are refused where the same row does not give the same; outcomes that are not numbers are never effects."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin import CausalEffect, CausalEffectMap, CausalMediation, LayerCausalEffect
from ce_plugin.designs import Joint, OneAtATime, RandomMask
from ce_plugin.errors import ModelError, OutcomeError
from ce_plugin.interventions import Context, Intervention, MeanOut, PixelMask
from ce_plugin.trials._repeats import check_repeated

RANDOM = "a deterministic model, but got outputs that differ by"
MIXED = "whose outputs for an example depend on that example alone, but got outputs that change by"


class Noise(nn.Module):
    """Something that is random, or mixes the rows of a batch, or is neither although it looks like it."""

    RANDOM = ("dropout", "few", "noise", "gate", "own generator", "by place", "counted", "per batch")
    MIXED = ("batch norm", "batch mean")
    FINE = ("none", "no dropout", "drawn in vain", "eval")

    def __init__(self, kind: str, features: int) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.generator = torch.Generator().manual_seed(0)
        self.eval_dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        kind, shape = self.kind, (len(x), *[1] * (x.dim() - 1))
        if kind == "dropout":
            return F.dropout(x, 0.5)
        if kind == "few":
            return torch.cat([F.dropout(x[:, :4], 0.5), x[:, 4:]], 1)
        if kind == "noise":
            return x + 0.1 * torch.randn_like(x)
        if kind == "gate":
            return x * (torch.rand(shape) < 0.5)
        if kind == "own generator":
            return x + 0.1 * torch.randn(x.shape, generator=self.generator)
        if kind == "by place":
            return x + 0.1 * torch.arange(len(x)).view(shape)
        if kind == "counted":
            return x + 0.1 * self.calls
        if kind == "per batch":
            return x + torch.rand(())
        if kind == "batch norm":
            return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=len(x) > 1)
        if kind == "batch mean":
            return x - x.mean(0)
        if kind == "no dropout":
            return F.dropout(x, 0.5, training=self.training)
        if kind == "drawn in vain":
            return x + 0 * torch.randn_like(x)
        return self.eval_dropout(x) if kind == "eval" else x


class Net(nn.Module):
    def __init__(self, kind: str, before: bool) -> None:
        super().__init__()
        self.before = Noise(kind if before else "none", 8)
        self.layer = nn.Linear(8, 6)
        self.after = Noise("none" if before else kind, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.layer(self.before(x))).tanh())


def rows(n: int) -> Tensor:
    return torch.rand(n, 8, generator=torch.Generator().manual_seed(n)) + 0.5


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(Noise.RANDOM + Noise.FINE),
    before=st.booleans(),
    n=st.integers(1, 4),
    per_eval=st.sampled_from([None, 1, 3]),
    where=st.sampled_from(["input", "layer", "layer, full"]),
    random_design=st.booleans(),
)
def test_a_network_is_refused_where_it_is_random_and_only_there(
    kind: str, before: bool, n: int, per_eval: int | None, where: str, random_design: bool
) -> None:
    net = Net(kind, before)
    design = RandomMask(0.5, 40) if random_design else OneAtATime()
    explainer: Any = CausalEffect(net, PixelMask("zero"), design, outcome=None)
    if where != "input":
        engine: Any = "full" if where == "layer, full" else "auto"
        explainer = LayerCausalEffect(net, "layer", None, design, outcome=None, engine=engine)
    if kind in Noise.FINE:
        explainer.estimate(rows(n), perturbations_per_eval=per_eval)
        return
    if kind == "by place" and n < 3:
        return  # examples that pass alone all have the same place
    with pytest.raises(ModelError, match=f"{RANDOM}|{MIXED}" if kind == "by place" else RANDOM):
        explainer.estimate(rows(n), perturbations_per_eval=per_eval)


@pytest.mark.parametrize("kind", Noise.MIXED)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("where", ["input", "layer", "layer, full"])
def test_statistics_of_the_batch_are_named(kind: str, n: int, where: str) -> None:
    net = Net(kind, before=False)
    explainer: Any = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=None)
    if where != "input":
        explainer = LayerCausalEffect(net, "layer", outcome=None, engine="full" if where == "layer, full" else "auto")
    with pytest.raises(ModelError, match=MIXED):
        explainer.attribute(rows(n), target=0)
    # One row a pass: the batch is the row, and there is nothing to mix.
    if n == 1 and kind == "batch norm":
        explainer.attribute(rows(1), target=0, perturbations_per_eval=1)


def test_networks_that_are_random_only_under_an_intervention_are_found() -> None:
    class Under(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            empty = (x == 0).any(1, keepdim=True)
            return x.sum(1, keepdim=True) + torch.where(empty, torch.rand(len(x), 1), 0.0)

    for design in (OneAtATime(), RandomMask(0.5, 40), Joint([(0, 1)])):
        with pytest.raises(ModelError, match=RANDOM):
            CausalEffect(Under(), PixelMask("zero"), design, outcome=None).estimate(rows(2))
    with pytest.raises(ModelError, match=RANDOM):
        CausalEffect(Under(), PixelMask("zero"), outcome=None).interactions(rows(1))
    with pytest.raises(ModelError, match=RANDOM):
        CausalEffect(Under(), PixelMask("zero"), RandomMask(0.5, 400), outcome=None).estimate(rows(1), until=1e-3)


def test_other_faces_refuse_random_networks_too() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Noise("noise", 4), nn.Flatten(), nn.Linear(64, 3))
    x = torch.rand(2, 1, 6, 6)
    with pytest.raises(ModelError, match=RANDOM):
        CausalEffectMap(net, "0").attribute(x, target=0)
    with pytest.raises(ModelError, match=RANDOM):
        CausalMediation(net, "0", PixelMask("zero")).estimate(x)
    with pytest.raises(ModelError, match=RANDOM):  # one value for the batch
        CausalEffect(lambda x: F.dropout(x, 0.5).sum(), PixelMask("zero"), OneAtATime(), outcome=None).attribute(x)


def test_what_an_intervention_draws_is_not_the_networks() -> None:
    class Drawn(Intervention):
        per_trial = True

        def values(self, clean: Tensor, context: Context) -> Tensor:
            return torch.rand_like(clean)

        def __repr__(self) -> str:
            return "Drawn()"

    CausalEffect(Net("none", True), Drawn(), OneAtATime(), outcome=None).estimate(rows(2))


def test_rounding_between_batches_is_allowed() -> None:
    class Rounds(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(8, 2) * (1 + self.size * len(x))

    CausalEffect(Rounds(1e-7), PixelMask("zero"), OneAtATime(), outcome=None).estimate(rows(3))
    with pytest.raises(ModelError, match=MIXED):
        CausalEffect(Rounds(1e-2), PixelMask("zero"), OneAtATime(), outcome=None).estimate(rows(3))
    for dtype in (torch.bfloat16, torch.float64):
        net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).to(dtype)
        CausalEffect(net, PixelMask("zero"), OneAtATime()).estimate(rows(3).to(dtype))


def test_equal_means_within_a_share_of_the_range() -> None:
    seen = {"": torch.tensor([[0.0, 100.0]])}
    a, near, far = ({"": torch.tensor([[50.0, value]])} for value in (1.0, 1.0015, 1.003))
    check_repeated(a, lambda: near, seen, drawn=True)
    with pytest.raises(ModelError, match=RANDOM):
        check_repeated(a, lambda: far, seen, drawn=True)
    with pytest.raises(ModelError, match=RANDOM):
        check_repeated(a, iter([far, a]).__next__, seen)
    check_repeated(a, lambda: far, seen)  # as far apart whenever it is run: rounding for another number of rows
    nan = {"": torch.tensor([[torch.nan, torch.inf]])}
    check_repeated(nan, lambda: nan, nan)
    with pytest.raises(ModelError, match=f"{RANDOM} inf"):
        check_repeated(nan, lambda: a, seen, drawn=True)


class Recurrent(nn.Module):
    """Its state is built for so many rows."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)
        self.state = torch.zeros(1, n, 5), torch.zeros(1, n, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x, self.state)[0].mean(1))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("design", [OneAtATime(), RandomMask(0.5, 40)])
@pytest.mark.parametrize("where", ["input", "layer"])
def test_a_network_for_a_fixed_number_of_rows(n: int, design: Any, where: str) -> None:
    net, x = Recurrent(n), torch.rand(n, 6, 4)
    explainer: Any = CausalEffect(net, PixelMask("zero"), design)
    if where == "layer":
        explainer = LayerCausalEffect(net, "head", None, design, engine="full")
    hint = f"any number of rows, but got one that takes {n} and fails for .* Pass `perturbations_per_eval=1`"
    with pytest.raises(ModelError, match=hint) as error:
        explainer.estimate(x)
    assert isinstance(error.value.__cause__, RuntimeError)
    found = explainer.estimate(x, perturbations_per_eval=1)
    # Three rows of a network for one row at a time are three networks.
    each = Recurrent(1)
    each.load_state_dict(net.state_dict())
    for i in range(n):
        if where == "layer":
            one: Any = LayerCausalEffect(each, "head", None, design, engine="full")
        else:
            one = CausalEffect(each, PixelMask("zero"), design)
        single = one.estimate(x[i : i + 1], perturbations_per_eval=1)
        assert torch.allclose(single.effect[0], found.effect[i], atol=1e-6)


def test_a_network_that_fails_for_another_reason_says_its_own() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x == 0).any()):
                raise RuntimeError("zeros are not allowed here")
            return x

    with pytest.raises(RuntimeError, match="zeros are not allowed here"):
        CausalEffect(Fails(), PixelMask("zero"), OneAtATime(), outcome=None).estimate(rows(2))


class Divides(nn.Module):
    """By the smallest value of what it is given."""

    def __init__(self, where: str = "input") -> None:
        super().__init__()
        self.conv, self.head, self.where = nn.Conv2d(1, 2, 1), nn.Linear(2 * 36, 3), where
        nn.init.uniform_(self.conv.weight, 0.5, 1.0)
        nn.init.uniform_(self.conv.bias, 0.5, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x / x.amin((1, 2, 3), keepdim=True) if self.where == "input" else x
        h = self.conv(x)
        return self.head((h / h.amin((2, 3), keepdim=True) if self.where == "layer" else h).flatten(1))


def pictures() -> Tensor:
    return torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("design", [OneAtATime(), RandomMask(0.5, 200), RandomMask(0.02, 200), None])
def test_trials_that_are_not_numbers_are_an_error_whose_hint_works(design: Any) -> None:
    net, x = Divides(), pictures()
    message = r"finite outputs under PixelMask\('zero'\), but got NaN or infinity in \d+ of \d+ trials of example 0"
    explainer = CausalEffect(net, PixelMask("zero"), design)
    for run in (explainer.attribute, explainer.estimate):
        with pytest.raises(ModelError, match=message):
            run(x, target=0)
    if design is not None and not design.exact:
        with pytest.raises(ModelError, match="finite outputs"):
            explainer.estimate(x, target=0, until=0.01)
    with pytest.raises(ModelError, match="finite outputs"):
        explainer.interactions(x, target=0)
    assert CausalEffect(net, PixelMask("blur"), design).attribute(x, target=0).isfinite().all()


@pytest.mark.parametrize("engine", ["auto", "full"])
def test_so_they_are_at_layers(engine: Any) -> None:
    net, x = Divides("layer"), pictures()
    with pytest.raises(ModelError, match=r"finite outputs under ZeroOut\(\), but got NaN or infinity in 2 of 2 trials"):
        LayerCausalEffect(net, "conv", engine=engine).attribute(x, target=0)
    assert LayerCausalEffect(net, "conv", MeanOut(x), engine=engine).attribute(x, target=0).isfinite().all()
    with pytest.raises(ModelError, match="finite outputs"):
        CausalEffectMap(net, "conv").attribute(x, target=0)
    # One value for the batch.
    with pytest.raises(ModelError, match="finite outputs"):
        CausalEffect(lambda x: 1 / x.amin(), PixelMask("zero"), OneAtATime(), outcome=None).attribute(x)


@settings(max_examples=25, deadline=None)
@given(pixel=st.integers(0, 35), bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), n=st.integers(1, 3))
def test_one_trial_that_is_not_a_number_is_found(pixel: int, bad: float, n: int) -> None:
    def network(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return torch.where(flat[:, pixel : pixel + 1] == 0, bad, flat[:, :3])

    x = pictures()[:1].expand(n, 1, 6, 6)
    with pytest.raises(ModelError, match=f"infinity in 1 of 36 trials of example 0{' ' if n > 1 else '.'}"):
        CausalEffect(network, PixelMask("zero"), OneAtATime(), outcome=None).attribute(x, target=0)


def test_an_outcome_of_ones_own_is_named_where_the_outputs_are_numbers() -> None:
    def change(output: Tensor, reference: Tensor) -> Tensor:
        return (output - reference).log()

    def ratio(output: Tensor, reference: Tensor) -> Tensor:
        return 1 / (1 - (output != reference).float())

    x, net = pictures(), nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(OutcomeError, match="finite on the clean outputs, but got 'change'"):
        CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=change).attribute(x, target=0)
    with pytest.raises(OutcomeError, match=r"finite under PixelMask\('zero'\), but got 'ratio'.* in 36 of 36 trials"):
        CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=ratio).attribute(x, target=0)
    with pytest.raises(ModelError, match="finite outputs"):
        CausalEffect(Divides(), PixelMask("zero"), OneAtATime(), outcome=lambda o, r: o - r).attribute(x, target=0)


@pytest.mark.parametrize("per_eval", [None, 1, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_two_rows_more_are_run_and_counted(n: int, per_eval: int | None) -> None:
    passed = 0

    def network(x: Tensor) -> Tensor:
        nonlocal passed
        passed += len(x)
        return x[:, :2]

    explainer = CausalEffect(network, PixelMask("zero"), OneAtATime())
    cost = explainer.estimate_cost(rows(n))
    passed = 0
    estimate = explainer.estimate(rows(n), perturbations_per_eval=per_eval)
    assert passed == estimate.cost
    assert cost.forward_passes == n * 9 + 2
    # Where the user says how many rows a pass has, the two checks have as many as the passes that they repeat.
    assert passed - n * 9 == 2 if per_eval is None else passed - n * 9 <= n + (per_eval or 1) * n


@pytest.mark.parametrize("what", ["estimate", "estimate_cost", "attribute", "interactions"])
@pytest.mark.parametrize("engine", ["auto", "full"])
def test_the_random_state_stays_where_it_was(what: str, engine: Any) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).train()
    before = torch.get_rng_state()
    for explainer in (
        LayerCausalEffect(net, "0", engine=engine),
        LayerCausalEffect(net, "2", engine=engine),
        CausalEffect(net, PixelMask("zero"), OneAtATime(), engine=engine),
    ):
        getattr(explainer, what)(torch.ones(2, 1, 6, 6), target=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in net.modules())
