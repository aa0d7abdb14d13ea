"""The answer: the region is grown by its rule, places keep its shape, and what is told is what was run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from ce_plugin import CausalEffect, Evidence, LayerCausalEffect
from ce_plugin.designs import Joint, OneAtATime, RandomMask, RandomRegions
from ce_plugin.effects import Estimate, RegionTest
from ce_plugin.effects.region import PLACEMENTS, grown_region, other_places, placements
from ce_plugin.errors import ArgumentError, ModelError, NoChangeWarning
from ce_plugin.interventions import PixelMask
from ce_plugin.sites import patch_grid

FILLS = ("zero", "mean", "blur")


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 12, classes)]
    return nn.Sequential(*layers).double().eval()


def pictures(n: int = 2) -> Tensor:
    return torch.rand(n, 3, 28, 28, generator=torch.Generator().manual_seed(1)).double()


def by_hand(net: nn.Module, x: Tensor, covered: Tensor, target: int) -> float:
    """P(target) with these patches set, the mean over the three fills, one pass at a time."""
    pixels = covered[patch_grid(28, 28, 14)[0, 0]]
    found = []
    for variant in range(len(FILLS)):
        filled = PixelMask(FILLS).perturb(x[None], variant=variant)[0]
        with torch.no_grad():
            found.append(float(net(torch.where(pixels, filled, x)[None]).softmax(1)[0, target]))
    return float(np.mean(found))


@pytest.mark.parametrize("outcome", ["probability", "log_odds"])
def test_covered_is_what_brute_force_gives(outcome: str) -> None:
    net, x = network(), pictures()
    estimate = CausalEffect(net, design=RandomRegions(n_trials=60), outcome=outcome).estimate(x, answer=True)
    test = estimate.answer
    assert test is not None
    for i in range(len(x)):
        with torch.no_grad():
            clean = net(x[i : i + 1]).softmax(1)[0]
        target = int(clean.argmax())
        assert int(test.target[i]) == target
        assert float(test.clean[i]) == pytest.approx(float(clean[target]), abs=1e-9)
        assert float(test.covered[i]) == pytest.approx(by_hand(net, x[i], test.region[i], target), abs=1e-5)
        places = other_places(test.region[i], (14, 14))
        every = {round(by_hand(net, x[i], place, target), 9) for place in places}
        assert {round(value, 9) for value in test.placed[i].tolist()} <= every


def test_p_value_and_interval_are_those_of_the_definition() -> None:
    placed = torch.rand(2, PLACEMENTS, generator=torch.Generator().manual_seed(2)).double()
    test = RegionTest(
        region=torch.ones(2, 3, dtype=torch.bool), target=torch.tensor([0, 1]), measured="probability",
        clean=torch.tensor([0.9, 0.9]).double(), covered=torch.tensor([0.5, -1.0]).double(), placed=placed,
    )  # fmt: skip
    for i in range(2):
        rank = 1 + sum(value <= float(test.covered[i]) for value in placed[i].tolist())
        assert float(test.p_values()[i]) == pytest.approx(rank / 25)
        low, high = stats.t.interval(0.95, 23, loc=placed[i].mean(), scale=placed[i].numpy().std(ddof=1) / 24**0.5)
        assert test.interval()[i].tolist() == pytest.approx([low, high], abs=1e-9)


def test_the_passes_are_counted_and_without_an_answer_nothing_more_is_run() -> None:
    net, seen = network(), [0]
    net.register_forward_pre_hook(lambda _, args: seen.__setitem__(0, seen[0] + len(args[0])))
    explainer = CausalEffect(net, design=RandomRegions(n_trials=60), engine="full")
    explainer.estimate(pictures(1))  # the first run also tries memory layouts
    seen[0] = 0
    plain, passes = explainer.estimate(pictures(1)), seen[0]
    seen[0] = 0
    told = explainer.estimate(pictures(1), answer=True)
    assert plain.answer is None
    assert told.answer is not None
    assert told.answer.passes == 25 * 3
    # One more clean pass is what the answer is compared with.
    assert seen[0] - passes == told.answer.passes + 1 == told.cost - plain.cost
    assert torch.equal(told.effect, plain.effect)


@pytest.mark.parametrize("engine", ["full", "auto"])
def test_the_cost_of_an_answer_is_known_before(engine: Any) -> None:
    x = pictures(2)
    explainer = CausalEffect(network(), design=RandomRegions(n_trials=60), engine=engine)
    plain, told = explainer.estimate_cost(x), explainer.estimate_cost(x, answer=True)
    assert told.forward_passes - plain.forward_passes == 2 * (25 * 3 + 1)
    layer = LayerCausalEffect(network(), "1", engine=engine)
    more = layer.estimate_cost(x, answer=True).forward_passes - layer.estimate_cost(x).forward_passes
    # A trial of a layer is the part of the network behind it.
    assert more == 2 * (25 + 1) if engine == "full" else 0 < more < 2 * (25 + 1)


def test_an_answer_may_be_about_another_class_than_the_predicted_one() -> None:
    net, x = network(), pictures()
    explainer = CausalEffect(net, design=RandomRegions(n_trials=60), class_names=["ant", "bee", "cat"])
    every = explainer.estimate(x, answer=True)
    other = [int(index) for index in (every.predicted + 1) % 3]  # type: ignore[operator]
    asked = explainer.estimate(x, answer=True, answer_target=other)
    assert torch.equal(asked.effect, every.effect)
    assert asked.answer is not None
    assert asked.answer.target.tolist() == other
    for i, index in enumerate(other):
        assert torch.equal(asked.answer.region[i], grown_region(asked.smoothed_contribution[i, :, index], (14, 14)))
        wanted = by_hand(net, x[i], asked.answer.region[i], index)
        assert float(asked.answer.covered[i]) == pytest.approx(wanted, abs=1e-5)
    name = asked.class_name(other[0])
    assert f"not “{name}” (" in asked.summary(0)
    assert f"“{name}” from" in asked.summary(0) or f"leaves “{name}” at" in asked.summary(0)
    assert f"for “{name}” by" in asked.summary(0)
    for wrong in ({"answer_target": 1}, {"answer": True, "target": 0, "answer_target": 1}):
        with pytest.raises(ArgumentError, match="`answer_target` to be None without"):
            explainer.estimate(x, **wrong)  # type: ignore[arg-type]


def test_what_is_done_to_units_of_a_layer_is_said() -> None:
    said = LayerCausalEffect(network(), "1").estimate(pictures(1), answer=True).summary()
    assert "Setting the strongest of 4 units to zero " in said
    assert "etting as many to zero at random, 24 times, leaves" in said
    assert "other places" not in said


def test_answers_do_not_depend_on_the_batch_and_repeat() -> None:
    explainer = CausalEffect(network(), design=RandomRegions(n_trials=60))
    x = pictures(3)
    together = explainer.estimate(x, ids=[4, 5, 6], answer=True).answer
    alone = explainer.estimate(x[1:2], ids=[5], answer=True).answer
    assert together is not None
    assert alone is not None
    assert torch.equal(together.region[1], alone.region[0])
    assert torch.allclose(together.placed[1], alone.placed[0], atol=1e-9)


def test_regions_of_layers_and_features_are_sets_of_units() -> None:
    net = network()
    layer = LayerCausalEffect(net, "1").estimate(pictures(1), answer=True).answer
    assert layer is not None
    assert layer.region.sum() == 1  # an eighth of four channels, but one at least
    assert layer.grid == ()
    features = nn.Linear(16, 2)
    answer = CausalEffect(features).estimate(torch.rand(1, 16), answer=True).answer
    assert answer is not None
    assert answer.region.sum() <= 2


def test_evidence_holds_where_the_region_is_covered() -> None:
    given = Evidence(PixelMask("mean"))  # the whole picture is its mean already: to cover it changes nothing
    explainer = CausalEffect(network(), PixelMask("mean"), RandomMask(0.3, n_trials=40))
    with pytest.warns(NoChangeWarning):
        answer = explainer.estimate(pictures(1), given=given, answer=True).answer
    assert answer is not None
    assert answer.covered.item() == pytest.approx(answer.clean.item(), abs=1e-9)
    assert not answer.is_shown(0)


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({}, {"answer": 1}, ArgumentError, "`answer` to be True or False"),
        (
            {"design": Joint([(0,), (1,)])},
            {"answer": True},
            ArgumentError,
            "`answer` to be False for evidence that is dr",
        ),
        (
            {},
            {"answer": True, "given": Evidence(PixelMask(), units=RandomMask(0.1, n_trials=2))},
            ArgumentError,
            "`answer` to be False.*drawn several times",
        ),
    ],
)
def test_what_has_no_answer_says_so(options: Any, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CausalEffect(network(), **options).estimate(pictures(1), **call)


def test_several_heads_and_batch_values_have_no_answer() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": x[:, :2], "b": x[:, 2:]}

    with pytest.raises(ModelError, match="one output head"):
        CausalEffect(Two(), design=OneAtATime()).estimate(torch.rand(1, 4), answer=True)
    with pytest.raises(ModelError, match="`answer=`"):
        CausalEffect(lambda x: x.sum(), outcome=None).estimate(torch.rand(2, 4), answer=True)


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_region_is_connected_and_every_place_keeps_its_shape(height: int, width: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(height * width, generator=g)
    region = grown_region(values, (height, width))
    assert bool(region[int(values.argmax())])
    assert int(region.sum()) <= max(round(height * width / 8), 1)
    cells = {tuple(cell) for cell in region.reshape(height, width).nonzero().tolist()}
    reached, front = set(), [next(iter(cells))]
    while front:
        row, column = front.pop()
        if (row, column) in cells - reached:
            reached.add((row, column))
            front += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    assert reached == cells
    places = other_places(region, (height, width), least=1)
    assert (places.sum(1) == region.sum()).all()
    assert not (places == region).all(1).any()
    assert len({tuple(place.tolist()) for place in places}) == len(places)
    own = sorted(_distances(region.reshape(height, width)))
    for place in places[:5]:
        assert sorted(_distances(place.reshape(height, width))) == own


def _distances(inside: Tensor) -> list[int]:
    """Squared distances of all pairs of cells, which turning and mirroring keep."""
    cells = inside.nonzero()
    return [int(d) for d in ((cells[:, None] - cells[None]) ** 2).sum(2).flatten()]


def test_places_lie_apart_where_there_are_enough() -> None:
    region = torch.zeros(196, dtype=torch.bool)
    region[90:95] = True
    drawn = placements(region, (14, 14), 24, torch.Generator().manual_seed(0))
    assert not (drawn & region).any()
    assert len({tuple(row.tolist()) for row in drawn}) == 24
    whole = torch.ones(4, dtype=torch.bool)
    assert placements(whole, (2, 2), 3, torch.Generator()).all()  # it has no other place


def test_the_sentence_says_what_was_found() -> None:
    names = ["cat", "dog", "owl"].__getitem__
    options: dict[str, Any] = {
        "region": torch.tensor([[1, 0, 0, 0]]).bool(), "target": torch.tensor([0]), "measured": "probability",
        "clean": torch.tensor([0.32]), "covered": torch.tensor([0.04]), "grid": (2, 2),
        "placed": torch.full((1, 24), 0.3) + 0.01 * torch.tensor([-1, 1]).repeat(12),
        "answers": torch.tensor([[0, 1, 2]]), "answered": torch.tensor([[0.62, 0.3, 0.08]]),
    }  # fmt: skip
    said = RegionTest(**options).sentence(0, names)
    assert said == (
        "Covering the outlined part at the top left takes “cat” from 32 % to 4 %; covering as much at 24 other places "
        "leaves 30 % on average (30 to 30)."
    )
    doubtful = RegionTest(**{**options, "covered": torch.tensor([0.3])}).sentence(0, names)
    assert "is not shown (p = 0.52)" in doubtful
    unsure = RegionTest(**{**options, "answered": torch.tensor([[0.32, 0.3, 0.08]])}).sentence(0, names)
    assert unsure.startswith("The network is unsure: “cat” 32 %, “dog” 30 %. ")
    wrong = RegionTest(**{**options, "answers": torch.tensor([[1, 0, 2]])}).sentence(0, names)
    assert wrong.startswith("The network answers “dog” (62 %), not “cat” (32 %). ")
    raised = RegionTest(**{**options, "covered": torch.tensor([0.5])}).sentence(0, names)
    assert "raises “cat” from 32 % to 50 %; covering as much at 24 other places" in raised
    assert raised.endswith("this part does not support “cat”.")
    same = RegionTest(**{**options, "covered": torch.tensor([0.318]), "placed": torch.full((1, 24), 0.319)})
    assert "leaves “cat” at 32 %; covering as much at 24 other places leaves 32 %" in same.sentence(0, names)


def test_a_map_that_looks_strong_without_anything_significant_says_why() -> None:
    noise = torch.randn(1, 16, 1, generator=torch.Generator().manual_seed(0))
    estimate = Estimate(
        effect=noise, std_error=torch.ones(1, 16, 1), reference=torch.ones(1, 1), class_shape=(1,), outcome="log_odds",
        settings={"grid": [4, 4]},
    )  # fmt: skip
    assert "None of 16 patches is significant by itself" in estimate.summary()
    assert "known to about ±2 only" in estimate.summary()


def test_what_a_patch_does_alone_is_not_what_the_map_says_of_it() -> None:
    """The map's strongest patch may have an effect of the other sign by itself, or none that is known."""
    estimate = Estimate(
        effect=torch.tensor([[[0.2], [-0.5]]]), std_error=torch.ones(1, 2, 1), reference=torch.ones(1, 1),
        smoothed=torch.tensor([[[-0.4], [-0.1]]]), class_shape=(1,), outcome="log_odds",
    )  # fmt: skip
    assert estimate.summary().startswith("Of 2 units the one at “0” supports class 0 most on the map.")
    opposed = replace(estimate, smoothed=-estimate.smoothed)
    assert opposed.summary().startswith("None of 2 units supports class 0.")
