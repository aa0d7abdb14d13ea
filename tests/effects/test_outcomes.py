"""Outcomes: definitions against float64 closed forms, stability at the extremes, errors before any work."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ce_plugin.effects.outcomes import OUTCOMES, Outcome, check_outcome, resolve_outcome
from ce_plugin.errors import OutcomeError, ProbabilityWarning, UnknownNameError

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [9.0, 1.0, -3.0, 8.5]], dtype=torch.double)


def out_of(name: str | None, z: Tensor, reference: Tensor | None = None) -> Tensor:
    return resolve_outcome(name)(z, z if reference is None else reference)


def test_definitions_one_class_at_a_time() -> None:
    p = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)
    for c in range(4):
        rest = [j for j in range(4) if j != c]
        others = LOGITS[:, rest]
        torch.testing.assert_close(out_of("probability", LOGITS)[:, c], p[:, c])
        torch.testing.assert_close(out_of("sigmoid", LOGITS)[:, c], 1 / (1 + (-LOGITS[:, c]).exp()))
        torch.testing.assert_close(out_of("log_odds", LOGITS)[:, c], LOGITS[:, c] - others.exp().sum(1).log())
        torch.testing.assert_close(out_of("log_odds", LOGITS)[:, c], (p[:, c] / (1 - p[:, c])).log())
        torch.testing.assert_close(out_of("margin", LOGITS)[:, c], LOGITS[:, c] - others.max(1).values)
    for name in (None, "raw", "logit"):
        assert torch.equal(out_of(name, LOGITS), LOGITS)


def test_log_odds_stays_exact_where_the_probability_has_become_one() -> None:
    z = torch.tensor([[200.0, 0.0, -50.0]])
    assert out_of("probability", z)[0, 0] == 1
    torch.testing.assert_close(out_of("log_odds", z), torch.tensor([[200.0, -200.0, -250.0]]))
    two = torch.tensor([[0.3, -0.4]], dtype=torch.double)
    torch.testing.assert_close(out_of("log_odds", two), torch.tensor([[0.7, -0.7]], dtype=torch.double))


def test_margin_of_a_tie_is_zero_for_both() -> None:
    assert out_of("margin", torch.tensor([[3.0, 3.0, 1.0]])).tolist() == [[0.0, 0.0, -2.0]]


@pytest.mark.parametrize("name", ["probability", "log_odds", "margin", "prediction_weighted"])
@given(shift=st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_nothing(name: str, shift: float) -> None:
    torch.testing.assert_close(out_of(name, LOGITS + shift), out_of(name, LOGITS), atol=1e-9, rtol=1e-9)


def test_prediction_weighted_is_inner_product_minus_norm_and_zero_for_uniform_predictions() -> None:
    reference = LOGITS.flip(0)
    p, q = reference.softmax(1), LOGITS.softmax(1)
    got = out_of("prediction_weighted", LOGITS, reference)
    assert got.shape == (3, 1)
    torch.testing.assert_close(got[:, 0], (p * q).sum(1) - (p * p).sum(1))
    assert got[1].abs() < 1e-15  # the second row of the reference is uniform
    assert got[0].abs() > 1e-3
    assert not resolve_outcome("prediction_weighted").per_class


@pytest.mark.parametrize("name", sorted(OUTCOMES))
def test_trailing_dimensions_are_separate_positions(name: str) -> None:
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    whole = out_of(name, z, z.roll(1, 1))
    at = out_of(name, z[..., 2, 3], z.roll(1, 1)[..., 2, 3])
    torch.testing.assert_close(whole[..., 2, 3], at)


@pytest.mark.parametrize("name", sorted(OUTCOMES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(name: str, dtype: torch.dtype) -> None:
    z = LOGITS.to(dtype)
    assert out_of(name, z).dtype == torch.float32
    torch.testing.assert_close(out_of(name, z), out_of(name, z.float()), rtol=0, atol=0)
    assert out_of(name, LOGITS).dtype == torch.float64


def test_callables_see_output_and_reference_and_keep_their_name() -> None:
    def gain(output: Tensor, reference_output: Tensor) -> Tensor:
        return output - 2 * reference_output

    outcome = resolve_outcome(gain)
    assert outcome.name == "gain"
    torch.testing.assert_close(outcome(LOGITS, LOGITS + 1), -LOGITS - 2)
    assert resolve_outcome(outcome) is outcome


@pytest.mark.parametrize(
    ("result", "said"), [(3.0, "float"), (torch.tensor(1.0), r"shape \(\)"), (torch.ones(2), "2,")]
)
def test_a_callable_with_a_wrong_result_is_named(result: object, said: str) -> None:
    def broken(output: Tensor, reference_output: Tensor) -> object:
        return result

    with pytest.raises(OutcomeError, match=rf"one row per example \(3 here\), but got .*{said}.*'broken'"):
        resolve_outcome(broken)(LOGITS, LOGITS)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'probability'"):
        resolve_outcome("probabilty")
    with pytest.raises(OutcomeError, match=r"a callable outcome.*but got int"):
        resolve_outcome(3)


@pytest.mark.parametrize("name", ["probability", "log_odds", "margin", "prediction_weighted"])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 8, 8)])
def test_comparing_classes_needs_classes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(OutcomeError, match=r'which compares classes.*Write outcome="sigmoid"'):
        check_outcome(resolve_outcome(name), torch.randn(shape))


@pytest.mark.parametrize("name", [None, "logit", "sigmoid"])
def test_a_single_output_is_fine_for_the_others(name: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_outcome(resolve_outcome(name), torch.tensor([[-3.0], [4.0]]))


def test_probabilities_below_a_softmax_or_sigmoid_warn() -> None:
    p = LOGITS.softmax(1)
    for name in ("probability", "log_odds", "prediction_weighted"):
        with pytest.warns(ProbabilityWarning, match="puts a softmax on top of them.*outcome=None"):
            check_outcome(resolve_outcome(name), p)
    with pytest.warns(ProbabilityWarning, match="puts a softmax"):
        check_outcome(resolve_outcome("probability"), p.half())
    with pytest.warns(ProbabilityWarning, match="puts a sigmoid"):
        check_outcome(resolve_outcome("sigmoid"), LOGITS.sigmoid())


def test_logits_and_own_outcomes_do_not_warn() -> None:
    p = LOGITS.softmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in OUTCOMES:
            check_outcome(resolve_outcome(name), LOGITS)
        check_outcome(resolve_outcome(None), p)
        check_outcome(Outcome("probability", lambda output, reference: output), p[:, :1])
