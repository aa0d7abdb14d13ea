"""Evidence: interventions that hold in all trials and in the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect, Evidence, InputSite
from ce_plugin.designs import LeaveOneIn, OneAtATime, RandomMask
from ce_plugin.errors import ArgumentError, InferenceError, UnitError
from ce_plugin.interventions import Adversarial, Context, PixelMask
from ce_plugin.interventions.base import Intervention

DOUBLE = torch.float64


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(DOUBLE)


def inputs(n: int = 2) -> Tensor:
    return 0.2 + torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


def explainer(design: Any = None, fill: Any = "zero", **options: Any) -> CausalEffect:
    return CausalEffect(network(), PixelMask(fill), design or OneAtATime(), **options)


def unit_mask(chosen: list[int]) -> Tensor:
    mask = torch.zeros(16, dtype=torch.bool)
    mask[chosen] = True
    return mask.reshape(1, 1, 4, 4)


@pytest.mark.parametrize("design", [OneAtATime(), LeaveOneIn(), RandomMask(0.3, 40)])
def test_evidence_is_the_input_with_the_evidence_set(design: Any) -> None:
    x, mean = inputs(), PixelMask("mean")
    for given, evident in (
        (Evidence(mean), mean(x)),
        (mean, mean(x)),
        (Evidence(mean, units=[3, 5]), torch.where(unit_mask([3, 5]), mean(x), x)),
    ):
        found = explainer(design).estimate(x, given=given)
        wanted = explainer(design).estimate(evident)
        assert torch.allclose(found.effect, wanted.effect, atol=1e-12)
        assert torch.allclose(found.reference, wanted.reference, atol=1e-12)
        assert torch.allclose(
            explainer(design).attribute(x, given=given), explainer(design).attribute(evident), atol=1e-12
        )


def test_fills_of_the_trials_see_the_evident_image() -> None:
    x = inputs()
    found = explainer(fill="mean").estimate(x, given=Evidence(PixelMask(5.0), units=[0]))
    evident = torch.where(unit_mask([0]), torch.tensor(5.0, dtype=DOUBLE), x)
    assert torch.allclose(found.effect, explainer(fill="mean").estimate(evident).effect, atol=1e-12)


def test_evidences_are_set_one_after_the_other() -> None:
    x = inputs()
    first, second = Evidence(PixelMask(3.0), units=[0, 1]), Evidence(PixelMask("mean"), units=[1, 2])
    step = torch.where(unit_mask([0, 1]), torch.tensor(3.0, dtype=DOUBLE), x)
    step = torch.where(unit_mask([1, 2]), PixelMask("mean")(step), step)
    for given in ([first, second], (first, second)):
        found = explainer().estimate(x, given=given)
        assert torch.allclose(found.effect, explainer().estimate(step).effect, atol=1e-12)
    assert "PixelMask(3.0)" in found.evidence
    assert "PixelMask('mean')" in found.evidence
    assert explainer().estimate(x, given=[]).evidence == "none"


def test_evidence_at_units_of_its_own() -> None:
    x = inputs()
    halves = torch.tensor([[0, 0, 1, 1]]).expand(4, 4)[None, None]
    left = torch.cat([unit_mask([0, 1, 4, 5, 8, 9, 12, 13])] * 2)
    wanted = explainer().estimate(torch.where(left, torch.zeros_like(x), x)).effect
    found = explainer().estimate(x, given=Evidence(PixelMask("zero"), InputSite(halves), units=[0]))
    assert torch.allclose(found.effect, wanted, atol=1e-12)
    windows = InputSite(sliding_window_shapes=(1, 4, 2), strides=(1, 1, 2))
    found = explainer().estimate(x, given=Evidence(PixelMask("zero"), windows, units=(0,)))
    assert torch.allclose(found.effect, wanted, atol=1e-12)
    per_example = torch.cat([halves, 1 - halves])
    found = explainer().estimate(x, given=Evidence(PixelMask("zero"), InputSite(per_example), units=[0]))
    assert torch.allclose(found.effect[0], wanted[0], atol=1e-12)
    assert not torch.allclose(found.effect[1], wanted[1], atol=1e-3)


def test_random_evidence_is_averaged_over_its_draws() -> None:
    x, evidence = inputs(3), Evidence(PixelMask("zero"), units=RandomMask(0.3, 5))
    found = explainer().estimate(x, given=evidence, ids=[0, 1, 1])
    draws = []
    for draw in range(5):
        masks = torch.stack([evidence.assignment(16, example, draw).reshape(1, 4, 4) for example in (0, 1, 1)])
        draws.append(explainer().estimate(torch.where(masks, torch.zeros_like(x), x)))
    effects = torch.stack([draw.effect for draw in draws])
    assert torch.allclose(found.effect, effects.mean(0), atol=1e-12)
    assert torch.allclose(found.reference, torch.stack([draw.reference for draw in draws]).mean(0), atol=1e-12)
    assert torch.allclose(found.std_error, effects.std(0) / 5**0.5, atol=1e-12)
    assert (found.dof == 4).all()
    # A random mean has an error, also where the design is exact.
    assert explainer().attribute(x, given=evidence, significant_only=True).shape == x.shape
    with pytest.raises(InferenceError):
        explainer().attribute(x, given=PixelMask("mean"), significant_only=True)


def test_random_evidence_with_random_designs() -> None:
    x = inputs(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).to(DOUBLE)
    random = CausalEffect(net, PixelMask("zero"), RandomMask(0.5, 60), outcome=None)
    found = random.estimate(x, given=Evidence(PixelMask("zero"), units=RandomMask(0.25, 40)))
    # A pixel that the evidence has blackened already has no effect: 3/4 of the linear effect is left.
    wanted = -0.75 * x.flatten(1)[:, :, None] * net[1].weight.T.detach()
    assert ((found.effect - wanted).abs() <= 4.5 * found.std_error + 1e-12).all()
    assert found.std_error.max() < 0.1


def test_random_evidence_explains_one_class() -> None:
    """The class that is predicted may change with the draw, but one effect is that of one class."""

    def model(v: Tensor) -> Tensor:
        first = v.flatten(1)[:, 0]
        return torch.stack([first, 0.5 - first, 0 * first], 1)

    x = torch.ones(1, 1, 1, 4, dtype=DOUBLE)
    evidence = Evidence(PixelMask("zero"), units=RandomMask(0.5, 8))
    flips = torch.stack([evidence.assignment(4, 0, draw) for draw in range(8)])[:, 0]
    assert 0 < int(flips.sum()) < 8
    raw = CausalEffect(model, PixelMask("zero"), OneAtATime(), outcome=None)
    chosen = 1 if bool(flips[0]) else 0
    assert torch.equal(raw.attribute(x, given=evidence), raw.attribute(x, target=chosen, given=evidence))


def test_several_random_evidences_are_independent_of_each_other_and_of_the_design() -> None:
    x = torch.ones(1, 1, 8, 8)
    seen: list[Tensor] = []

    class Marks(Intervention):
        def values(self, clean: Tensor, context: Context) -> Tensor:
            seen.append(context.mask.expand_as(clean)[0].flatten())
            return clean * 0

    given = [Evidence(Marks(), units=RandomMask(0.5, 2)), Evidence(Marks(), units=RandomMask(0.5, 2))]
    design = RandomMask(0.5, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    CausalEffect(net, PixelMask("noise"), design).estimate(x, given=given)
    assert len(seen) == 4
    rows = [*seen, *design.assignments(64)]
    for a in range(len(rows)):
        for b in range(a):
            assert 0.25 < float((rows[a] == rows[b]).double().mean()) < 0.75


def test_random_evidences_are_drawn_equally_often() -> None:
    given = [Evidence(PixelMask("zero"), units=RandomMask(0.5, k)) for k in (2, 3)]
    with pytest.raises(ArgumentError, match=r"drawn equally often .*, but got \[2, 3\] draws"):
        explainer().estimate(inputs(), given=given)
    mixed = [Evidence(PixelMask("mean"), units=[0]), given[0]]
    assert (explainer().estimate(inputs(), given=mixed).dof == 1).all()


def test_batches_equal_singles_under_random_evidence() -> None:
    x, evidence = inputs(3), Evidence(PixelMask("noise"), units=RandomMask(0.3, 3))
    random = explainer(RandomMask(0.4, 30), ("zero", "noise"))
    whole = random.estimate(x, given=evidence, ids=[4, 5, 6])
    for i in range(3):
        single = random.estimate(x[i : i + 1], given=evidence, ids=[4 + i], perturbations_per_eval=1)
        assert torch.allclose(single.effect[0], whole.effect[i], atol=1e-10)


def test_evidence_on_a_tuple_of_inputs() -> None:
    a, b = torch.rand(2, 3, dtype=DOUBLE), torch.rand(2, 2, dtype=DOUBLE)
    raw = CausalEffect(lambda u, v: u.sum(1) * v.sum(1), PixelMask("zero"), OneAtATime(), outcome=None)
    found = raw.estimate((a, b), given=Evidence(PixelMask("zero"), units=[0, 4]))
    plain = raw.estimate((a * torch.tensor([0.0, 1, 1]), b * torch.tensor([1.0, 0])))
    assert torch.allclose(found.effect, plain.effect, atol=1e-12)


def test_an_attack_as_evidence() -> None:
    net, x = network().float(), inputs().float()
    attack = Adversarial.fgsm(net, eps=0.1, clip_values=(0.0, 1.2))
    found = CausalEffect(net, PixelMask("zero"), OneAtATime()).estimate(x, given=attack)
    wanted = CausalEffect(net, PixelMask("zero"), OneAtATime()).estimate(attack(x))
    assert torch.allclose(found.effect, wanted.effect, atol=1e-6)
    assert "fgsm" in found.evidence.lower() or "FastGradient" in found.evidence


def test_a_wrong_target_is_found_before_costly_evidence_is_made() -> None:
    class Costly(Intervention):
        forward_equivalents = 30
        made = 0

        def values(self, clean: Tensor, context: Context) -> Tensor:
            Costly.made += 1
            return clean * 0

    with pytest.raises(ValueError, match=r"argument `target`"):
        explainer().attribute(inputs(), target=[1, 3], given=Costly())
    assert Costly.made == 0
    cost = explainer().estimate_cost(inputs(), given=Costly())
    assert cost.forward_passes == 2 * (16 + 1 + 30) + 1 + 2
    assert explainer().estimate(inputs(), given=Costly()).cost == 2 * (16 + 1) + 1 + 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, ArgumentError, "argument `given` to be an intervention, an Evidence, or a list of them, but got int"),
        ("fgsm", ArgumentError, "but got str. Write Evidence"),
        ([PixelMask("zero"), "fgsm"], ArgumentError, "but got str"),
        (Evidence(PixelMask("mean"), units=[16]), UnitError, "indices of the site's 16 units"),
        (Evidence(PixelMask("mean"), units=[-1]), UnitError, "indices of the site's 16 units"),
        (Evidence(PixelMask("mean"), InputSite(torch.zeros(1, 5))), UnitError, "broadcasts to the input's shape"),
    ],
)
def test_bad_evidence_is_refused_before_the_network_is_run(given: Any, error: type[Exception], message: str) -> None:
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.flatten(1)

    with pytest.raises(error, match=message):
        CausalEffect(model, PixelMask("zero"), OneAtATime()).attribute(inputs(), target=0, given=given)
    assert not calls


@pytest.mark.parametrize("units", ["every", 0.1, None, [0.5]])
def test_units_of_evidence(units: Any) -> None:
    with pytest.raises(UnitError, match="argument `units` to be 'all', unit indices or a RandomMask"):
        Evidence(PixelMask("zero"), units=units)


def test_evidence_is_noted_in_one_line() -> None:
    assert repr(Evidence(PixelMask("mean"))) == "Evidence(PixelMask('mean'))"
    site = InputSite(torch.zeros(1, 1, 4, 4))
    assert repr(Evidence(PixelMask(0.5), site, [0])) == (
        "Evidence(PixelMask(0.5), site=InputSite(feature_mask=tensor(1, 1, 4, 4)), units=(0,))"
    )
    windows = InputSite(sliding_window_shapes=(1, 2, 2), strides=2)
    assert repr(windows) == "InputSite(sliding_window_shapes=(1, 2, 2), strides=2)"
    random = Evidence(PixelMask("zero"), units=RandomMask(0.5, 4))
    assert explainer().estimate(inputs(), given=random).evidence == repr(random)


def test_evidence_needs_an_intervention() -> None:
    with pytest.raises(ArgumentError, match="argument `intervention` to be an Intervention, but got str"):
        Evidence("zero")  # type: ignore[arg-type]
