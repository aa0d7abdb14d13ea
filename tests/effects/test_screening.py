"""Screening: planted interactions of several forms are found among many units, exactly and at a stated cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ce_plugin.effects import Interactions, pairwise, screen
from ce_plugin.effects.screening import FlipOutcome
from ce_plugin.errors import ArgumentError, OutcomeError, UnitError
from ce_plugin.evaluation import PlantedInteraction

U, V, N = 7, 31, 80


def with_haystack(gate: Callable[[Tensor, Tensor], Tensor]) -> FlipOutcome:
    """A gate of units U and V, among linear effects and one unit whose own response is bent."""
    weight = torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
    weight[[U, V]] = 0
    return lambda a: a @ weight + 2 * torch.relu(3 * a[:, 3] - 1) + gate(a[:, U], a[:, V])


# Form, its interaction Y(11) - Y(10) - Y(01) + Y(00).
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "product": (lambda u, v: -2 * u * v, -2.0),
    "and, slope 0 exactly at a flip": (lambda u, v: -2 * torch.relu(u + v - 1), -2.0),
    "xor": (lambda u, v: (u - v).abs(), -2.0),
    "smooth xor": (lambda u, v: u + v - 2 * u * v, -2.0),
    "either one kills": (lambda u, v: 2 * torch.relu(1 - 5 * u - 5 * v), 2.0),
    "one kills the other": (lambda u, v: 2 * torch.relu(1 + u - 10 * v), -2.0),
    "one opens the other": (lambda u, v: -2 * torch.relu(u + 10 * v - 2), -2.0),
    "largest": (lambda u, v: 2 * torch.maximum(1 - u, 1 - v), -2.0),
    "smallest": (lambda u, v: -2 * torch.minimum(u, v), -2.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_first(form: str) -> None:
    gate, size = FORMS[form]
    found = pairwise(with_haystack(gate), N, top=5, dtype=torch.float64)
    assert found.screened
    assert found.pairs[0].tolist() == [U, V]
    assert float(found.interaction[0]) == pytest.approx(size, abs=1e-9)
    assert (found.n_trials, found.n_gradients) == (1 + N + len(found), N + 1)


def test_single_effects_sharpen_the_score() -> None:
    """Where either unit shuts the gate the slope is 10 and the effect 2: the gradients alone promise too much."""
    outcome = with_haystack(FORMS["either one kills"][0])
    single = outcome(torch.eye(N).double()) - outcome(torch.zeros(1, N).double())
    without, given = screen(outcome, N, dtype=torch.float64), screen(outcome, N, single=single, dtype=torch.float64)
    assert float(without[U, V]) == pytest.approx(10.0, abs=1e-9)
    assert float(given[U, V]) == pytest.approx(2.0, abs=1e-9)
    assert (given <= without).all()


def test_a_bent_response_is_no_interaction() -> None:
    """Unit 3's own response is bent; by exact single effects alone it would seem to interact with every unit."""
    outcome = with_haystack(lambda u, v: 0 * u)
    single = outcome(torch.eye(N).double()) - outcome(torch.zeros(1, N).double())
    options = {"dtype": torch.float64, "nudges": (0.0,)}
    assert screen(outcome, N, single=single, **options).abs().max() < 1e-12  # type: ignore[arg-type]
    assert len(pairwise(outcome, N, **options)) == 0  # type: ignore[arg-type]


def test_a_gate_that_is_shut_at_both_flips_takes_a_deeper_look() -> None:
    outcome = with_haystack(lambda u, v: -4 * torch.relu(u + v - 1.5))
    near = pairwise(outcome, N, top=5, dtype=torch.float64)
    assert [U, V] not in near.pairs.tolist()  # what the documentation says of first-order screens
    deep = pairwise(outcome, N, top=5, nudges=(1e-3, 0.75), dtype=torch.float64)
    assert deep.pairs[0].tolist() == [U, V]
    assert float(deep.interaction[0]) == pytest.approx(-2.0, abs=1e-9)
    assert deep.n_gradients == 2 * (N + 1)


def site_outcome(net: PlantedInteraction) -> FlipOutcome:
    """The network's logits where channel u of the layer is scaled by 1 - a_u, by a hook: ``ZeroOut`` at a = 1."""
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(net.main.dtype)

    def outcome(a: Tensor) -> Tensor:
        handle = net.layer.register_forward_hook(lambda module, args, h: h * (1 - a)[:, :, None, None])
        try:
            y: Tensor = net(x.expand(len(a), -1, -1, -1))
        finally:
            handle.remove()
        return y

    return outcome


@pytest.mark.parametrize("gate", ["product", "relu"])
def test_planted_interaction_among_200_units(gate: str) -> None:
    net = PlantedInteraction(200, (17, 143), -2.0, gate=gate).double()
    found = pairwise(site_outcome(net), 200, dtype=torch.float64)
    first = found.to_dataframe().iloc[0]
    assert (first["unit_u"], first["unit_v"], first["class"]) == (17, 143, 0)
    assert first["interaction"] == pytest.approx(-2.0, abs=1e-6)
    assert abs(first["single_u"]) < 1e-9
    assert abs(first["single_v"]) < 1e-9
    assert (found.n_trials, found.n_gradients) == (301, 201)  # all pairs: 20,101 trials
    assert all(p.grad is None for p in net.parameters())


def test_planted_interaction_in_single_precision() -> None:
    net = PlantedInteraction(200, (17, 143), -2.0)
    found = pairwise(site_outcome(net), 200, top=20)
    first = found.to_dataframe().iloc[0]
    assert (first["unit_u"], first["unit_v"]) == (17, 143)
    assert first["interaction"] == pytest.approx(-2.0, abs=1e-4)


def network(n: int, seed: int, classes: int = 2) -> FlipOutcome:
    g = torch.Generator().manual_seed(seed)
    w, b, v = (torch.randn(*shape, generator=g).double() for shape in ((n, 16), (16,), (16, classes)))
    return lambda a: torch.relu(a @ w + b) @ v


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10_000), st.integers(1, 40))
def test_exhaustive_is_a_plain_loop(n: int, seed: int, batch: int) -> None:
    outcome = network(n, seed)
    found = pairwise(outcome, n, batch_size=batch, dtype=torch.float64)
    assert not found.screened
    assert found.n_trials == 1 + n + n * (n - 1) // 2
    assert found.n_gradients == 0
    for (u, v), value in zip(itertools.combinations(range(n), 2), found.interaction, strict=True):
        a = torch.zeros(4, n).double()
        a[0, [u, v]], a[1, u], a[2, v] = 1.0, 1.0, 1.0
        both, one, other, none = outcome(a)
        torch.testing.assert_close(value, both - one - other + none, atol=1e-10, rtol=0)


def test_screened_pairs_are_those_of_the_exhaustive_run() -> None:
    outcome = network(20, 0)
    every = pairwise(outcome, 20, dtype=torch.float64)
    some = pairwise(outcome, 20, exhaustive=0, top=40, dtype=torch.float64)
    exact = {tuple(pair): value for pair, value in zip(every.pairs.tolist(), every.interaction, strict=True)}
    for pair, value in zip(some.pairs.tolist(), some.interaction, strict=True):
        torch.testing.assert_close(value, exact[tuple(pair)], atol=1e-10, rtol=0)
    scores = [float(some.scores[u, v]) for u, v in some.pairs.tolist()]  # type: ignore[index]
    assert scores == sorted(scores, reverse=True)
    largest = every.interaction.abs().amax(dim=1).topk(10).indices
    hit = sum(tuple(every.pairs[p].tolist()) in {tuple(q) for q in some.pairs.tolist()} for p in largest.tolist())
    assert hit >= 8  # 40 of 190 pairs by chance would hold 2 of them


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_batch_size_does_not_matter(batch: int) -> None:
    outcome = network(70, 3)
    found, other = (pairwise(outcome, 70, top=30, batch_size=b, dtype=torch.float64) for b in (32, batch))
    assert torch.equal(found.pairs, other.pairs)
    torch.testing.assert_close(found.interaction, other.interaction, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.scores, other.scores, atol=1e-12, rtol=0)
    assert (found.n_trials, found.n_gradients) == (other.n_trials, other.n_gradients)


def test_scores_are_symmetric_and_the_largest_over_columns() -> None:
    outcome = network(12, 5, classes=3)
    together = screen(outcome, 12, dtype=torch.float64)
    alone = [screen(lambda a, c=c: outcome(a)[:, c], 12, dtype=torch.float64) for c in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).amax(dim=0), atol=1e-12, rtol=0)
    assert torch.equal(together, together.T)
    assert together.diagonal().abs().max() == 0


def test_gradients_are_taken_where_they_are_switched_off_outside() -> None:
    with torch.no_grad():
        found = pairwise(lambda a: -2 * a[:, 0] * a[:, 1], 70)
    assert found.pairs.tolist() == [[0, 1]]
    assert not found.interaction.requires_grad
    assert torch.is_grad_enabled()


def test_table_and_text() -> None:
    names = [f"c{u}" for u in range(66)]
    found = pairwise(
        lambda a: a[:, 0] + a[:, 1] - 2 * a[:, 5] * a[:, 9] + a[:, 2] * a[:, 3], 66, unit_labels=names, name="logit"
    )
    frame = found.to_dataframe()
    assert frame["interaction"].abs().is_monotonic_decreasing
    assert frame.loc[0, ["label_u", "label_v", "interaction", "joint"]].tolist() == ["c5", "c9", -2.0, -2.0]
    assert frame["score"].notna().all()
    text = repr(found)
    assert "Interactions of logit: 2 of 2145 pairs of 66 units (screened, others may interact too)" in text
    assert "c5 x c9, class 0: -2" in text
    every = pairwise(lambda a: a[:, 0] * a[:, 1], 3)
    assert "3 of 3 pairs of 3 units (all of them)" in repr(every)
    assert every.to_dataframe()["score"].isna().all()


def test_no_interaction_is_an_empty_table() -> None:
    found = pairwise(lambda a: a.sum(dim=1), 100)
    assert isinstance(found, Interactions)
    assert len(found) == 0
    assert found.to_dataframe().empty
    assert "0 of 4950 pairs" in repr(found)
    assert found.single.flatten().tolist() == [1.0] * 100


def refuse(a: Tensor) -> Tensor:
    raise AssertionError("was run")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_units": 1}, ArgumentError, "`n_units` to be at least 2, but got 1"),
        ({"top": 0}, ArgumentError, "argument `(top|exhaustive)`"),
        ({"exhaustive": -1}, ArgumentError, "argument `(top|exhaustive)`"),
        ({"batch_size": 0}, ArgumentError, "`batch_size`"),
        ({"nudges": ()}, ArgumentError, "`nudges`"),
        ({"nudges": (1.5,)}, ArgumentError, r"`nudges` to be one or more numbers in \[0, 1\]"),
        ({"unit_labels": ["a"]}, UnitError, "`unit_labels` to be 80 names, but got 1"),
    ],
)
def test_errors_come_before_any_work(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pairwise(refuse, **{"n_units": N, **options})  # type: ignore[arg-type]


def test_outcomes_that_cannot_be_used_are_named() -> None:
    calls = []

    def constant(a: Tensor) -> Tensor:
        calls.append(len(a))
        return a.detach().sum(dim=1)

    with pytest.raises(OutcomeError, match=r"differentiable with respect to the states.*raise `exhaustive`"):
        pairwise(constant, 100)
    assert calls == [1]
    assert len(pairwise(constant, 100, exhaustive=100)) == 4950
    with pytest.raises(OutcomeError, match=r"a tensor \(B,\) or \(B, C\) for B = 1 states, but got shape \(\)"):
        pairwise(lambda a: a.sum(), 3)
    with pytest.raises(OutcomeError, match="but got float"):
        pairwise(lambda a: 1.0, 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(OutcomeError, match="finite on every state"):
        pairwise(lambda a: a.sum(dim=1).log(), 3)
    with pytest.raises(UnitError, match=r"`single` to be of shape \(3,\) or \(3, C\), but got \(2,\)"):
        screen(lambda a: a.prod(dim=1), 3, single=torch.zeros(2))
