"""What is usual and how far from it an image is: closed forms, another library, gradients, and the way to a score."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from ce_plugin.detection.probes import SIDES, Response, margin_under
from ce_plugin.detection.scorers import (
    AGGREGATES,
    ClassScale,
    EffectDistance,
    MarginResidual,
    ProbeScorer,
    Sample,
    Scorer,
    aggregate,
)
from ce_plugin.errors import InputError, UnknownNameError

PRIOR = 20


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def median(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.median(values, axis=0))


# --- centres and scales


def test_centres_and_scales_are_shrunk_to_everyones() -> None:
    """Written down once more in numpy; the third class has no images."""
    effects, predicted = drawn(150, 4).numpy() * [1, 2, 3, 4] + 7, np.array([0] * 140 + [1] * 10)
    found = ClassScale().fit(torch.as_tensor(effects), torch.as_tensor(predicted), n_classes=3)
    everyone, center = median(effects), np.empty((3, 4))
    for k, n in enumerate((140, 10, 0)):
        own = median(effects[predicted == k]) if n else 0
        center[k] = (n * own + PRIOR * everyone) / (n + PRIOR)
    np.testing.assert_allclose(found.center, center)
    away = np.abs(effects - center[predicted])
    typical = 1.4826 * median(away)
    for k, n in enumerate((140, 10, 0)):
        own = 1.4826 * median(away[predicted == k]) if n else 0
        np.testing.assert_allclose(found.scale[k], np.sqrt((n * own**2 + PRIOR * typical**2) / (n + PRIOR)))
    np.testing.assert_allclose(found.scale[2], typical)


def test_a_class_of_many_images_speaks_for_itself() -> None:
    effects, predicted = drawn(40000, 1), torch.arange(40000) % 2
    scale = ClassScale().fit(effects * (1 + 4 * predicted[:, None]) + 10 * predicted[:, None], predicted, 2)
    torch.testing.assert_close(scale.scale[:, 0], torch.tensor([1.0, 5.0]).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(scale.center[:, 0], torch.tensor([0.0, 10.0]).double(), rtol=0.01, atol=0.1)


def test_constant_effects_are_not_blown_up() -> None:
    effects, predicted = drawn(60, 3), torch.arange(60) % 2
    effects[:, 1] = 3.0
    scale = ClassScale().fit(effects, predicted, 2)
    typical = 1.4826 * (effects - scale.center[predicted]).abs().quantile(0.5, dim=0)
    # Everyone's scale is a twentieth of the typical one (of the three, the middle one); 30 images say that it is 0.
    everyone = 0.05 * float(typical.median())
    assert float(scale.scale[0, 1]) == pytest.approx(everyone * (PRIOR / (30 + PRIOR)) ** 0.5, rel=0.05)
    nothing = ClassScale().fit(torch.zeros(60, 3), predicted, 2)
    assert bool((nothing(torch.zeros(2, 3), predicted[:2]) == 0).all())


# --- distances


def test_the_distance_is_that_of_mahalanobis_with_the_covariance_of_scikit_learn() -> None:
    effects, predicted = drawn(120, 5), torch.arange(120) % 3
    distance = EffectDistance().fit(effects, predicted, 3)
    scale = ClassScale().fit(effects, predicted, 3)
    values = np.arcsinh(scale(effects, predicted).numpy())
    covariance, _ = ledoit_wolf(values)
    precision = np.linalg.inv(covariance)
    new, classes = drawn(7, 5, seed=1) * 4, torch.arange(7) % 3
    odd = np.arcsinh(((new - scale.center[classes]) / scale.scale[classes]).numpy())
    wanted = [2 * np.log(mahalanobis(one, values.mean(0), precision)) for one in odd]
    np.testing.assert_allclose(distance(new, classes), wanted, rtol=1e-9)


def test_effects_that_are_too_small_count_as_well() -> None:
    """Clean images' effects are 5 +- 1 or so: none at all is as odd as twice as much."""
    effects, predicted = 5 + drawn(400, 4), torch.arange(400) % 2
    distance = EffectDistance().fit(effects, predicted, 2)
    usual = distance(effects, predicted)
    for odd in (0.0, 10.0):
        assert float(distance(torch.full((1, 4), odd), predicted[:1])) > float(usual.max())


def test_distance_and_reversal_have_the_gradient_of_finite_differences() -> None:
    effects, predicted = drawn(80, 3), torch.arange(80) % 2
    distance = EffectDistance().fit(effects, predicted, 2)
    assert torch.autograd.gradcheck(lambda e: distance(e, predicted[:3]), drawn(3, 3, seed=2).requires_grad_())
    idle = drawn(80, 4) * 3
    residual = MarginResidual().fit(margin_under(idle[:, None] + drawn(80, 2, 4, seed=1), idle), idle)
    inputs = drawn(3, 2, seed=3).requires_grad_(), (drawn(3, 4, seed=4) * 3).requires_grad_()
    assert torch.autograd.gradcheck(residual, inputs)


def loaded(empty: torch.nn.Module, fitted: torch.nn.Module) -> Any:
    """An empty module with the state of a fitted one, by way of a file."""
    stream = io.BytesIO()
    torch.save(fitted.state_dict(), stream)
    stream.seek(0)
    empty.load_state_dict(torch.load(stream, weights_only=True), assign=True)
    return empty


def test_the_state_dict_is_all_there_is() -> None:
    idle, effects = drawn(80, 3) * 3, drawn(80, 5)
    distance = EffectDistance().fit(effects, idle.argmax(1), 3)
    again = loaded(EffectDistance(), distance)
    assert torch.equal(again(effects, idle.argmax(1)), distance(effects, idle.argmax(1)))
    margins = margin_under(idle[:, None] + drawn(80, 2, 3, seed=1), idle)
    residual = MarginResidual().fit(margins, idle)
    assert torch.equal(loaded(MarginResidual(), residual)(margins, idle), residual(margins, idle))
    for keep in ((True, True), (True, False), (False, True)):
        few = margins[:, : 2 * keep[1]]
        part = Response(effects[:, : 5 * keep[0]], few, few.long(), few[:, :0])
        some = Sample({"a": part}, idle)
        scorer = ProbeScorer(part.sides).fit(part, some)
        assert scorer(part, some).shape == (80, keep[0] + 2 * keep[1])
        assert torch.equal(loaded(ProbeScorer(part.sides), scorer)(part, some), scorer(part, some))


def test_infinite_effects_are_refused() -> None:
    effects, predicted = drawn(60, 3), torch.arange(60) % 2
    effects[3, 1] = torch.inf
    with pytest.raises(InputError, match=r"`x` to be images with finite effects.*run it in float32"):
        EffectDistance().fit(effects, predicted, 2)
    with pytest.raises(InputError, match=r"`x` to be images with finite logits.*run it in float32"):
        MarginResidual().fit(effects, drawn(60, 3))


# --- margin residuals


@pytest.mark.parametrize("n_classes", [2, 3, 25])
def test_a_planted_relation_leaves_nothing_over(n_classes: int) -> None:
    """arsinh(m / s) is linear in the largest logits: what is left is what the ridge penalty holds back."""
    idle = drawn(3000, n_classes) * 3
    top = idle.topk(2, dim=1).values
    linear = 0.3 * top[:, :1] - 0.2 * top[:, 1:]
    # The unit is the typical margin: the planted one must have 2 for it, arsinh(1) is where the relation is centred.
    linear = linear - linear.median() + float(np.arcsinh(1.0))
    margins = 2 * linear.sinh()
    assert bool((linear > 0).float().mean() > 0.6)
    residual = MarginResidual().fit(margins, idle)
    left = residual(margins, idle) * residual.spread[idle.argmax(1)]
    wanted = (margins / residual.unit).asinh()
    assert float(left.square().mean() / wanted.var()) < 0.02
    noisy = MarginResidual().fit(margins + drawn(3000, 1, seed=1), idle)
    assert float(noisy.spread.mean()) > 3 * float(residual.spread.mean())


def test_the_less_is_left_the_greater_the_alarm() -> None:
    idle = drawn(300, 3) * 3
    margins = margin_under(idle[:, None] + 0.3 * drawn(300, 1, 3, seed=1), idle)
    residual = MarginResidual().fit(margins, idle)
    path = torch.linspace(20, -20, 41).double()[:, None]
    deviations = residual(path, idle[:1].expand(41, -1))[:, 0]
    assert bool((deviations.diff() > 0).all())
    usual = residual(margins, idle)
    assert abs(float(usual.mean())) < 0.1
    assert float(usual.std()) == pytest.approx(1, abs=0.15)
    # One-sided: an answer that nothing shakes adds next to nothing to a score.
    assert float(aggregate(deviations[:1, None])) < 0.01


def test_the_margin_side_asks_for_the_class_alone() -> None:
    idle = drawn(300, 3) * 3
    margins = margin_under(idle[:, None] + 0.3 * drawn(300, 2, 3, seed=1), idle)
    plain = MarginResidual(conditional=False).fit(margins, idle)
    torch.testing.assert_close(plain(margins, 2 * idle), plain(margins, idle))
    predicted, values = idle.argmax(1), (margins / margins.abs().median()).asinh()
    for k in range(3):
        own = predicted == k
        left = -plain(margins[own], idle[own]) * plain.spread[k]
        # Centred within each class, but for the ridge.
        torch.testing.assert_close(left, values[own] - values[own].mean(0), atol=0.05, rtol=0)
    again = loaded(MarginResidual(conditional=False), plain)
    assert torch.equal(again(margins, idle), plain(margins, idle))


# --- from deviations to a score

DEVIATIONS = st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=DEVIATIONS, how=st.sampled_from(AGGREGATES), column=st.integers(0, 2), more=st.floats(0, 20))
def test_a_score_never_falls_where_a_deviation_rises(
    rows: list[list[float]], how: str, column: int, more: float
) -> None:
    z = torch.tensor(rows).double()
    higher = z.clone()
    higher[:, column] += more
    assert bool((aggregate(higher, how) >= aggregate(z, how) - 1e-9).all())
    assert torch.equal(aggregate(z.flip(0), how).flip(0), aggregate(z, how))
    torch.testing.assert_close(aggregate(z.flip(1), how), aggregate(z, how))


@settings(max_examples=60, deadline=None)
@given(rows=DEVIATIONS)
def test_scores_are_those_of_the_table(rows: list[list[float]]) -> None:
    z = np.array(rows)
    np.testing.assert_allclose(aggregate(torch.as_tensor(z)), (np.logaddexp(0, z) ** 2).sum(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(aggregate(torch.as_tensor(z), "sum"), z.sum(1), atol=1e-9)
    np.testing.assert_allclose(aggregate(torch.as_tensor(z), "max"), z.max(1))


def test_an_unknown_aggregate_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"`aggregate` to be one of 'max', 'soft_square', 'sum', but got 'mean'"):
        aggregate(torch.zeros(1, 2), "mean")


# --- all of it


def sample(n: int, seed: int = 0) -> Sample:
    idle = drawn(n, 3, seed=seed) * 3
    do = idle[:, None] + drawn(n, 2, 3, seed=seed + 100)
    effects = (do - idle[:, None]).flatten(1)
    return Sample({"a": Response(effects, margin_under(do, idle), do.argmax(2), effects[:, :0])}, idle)


def test_deviations_are_centred_on_images_that_were_held_out() -> None:
    clean = sample(400)
    fitted = Scorer("sum").fit(clean, None, seed=0)
    # On its own images a distance is too small; on others it is not.
    others = fitted.deviations(sample(400, seed=1))[:, 0].mean()
    own = fitted.deviations(clean)[:, 0].mean()
    assert float(own) < float(others) - 0.1
    assert abs(float(others)) < 0.2


def test_what_was_learned_comes_back_and_is_sure_of_itself() -> None:
    clean, harmless = sample(200), sample(200, seed=5)
    fitted = Scorer("soft_square").fit(clean, harmless, seed=0)
    again = loaded(Scorer("soft_square", [SIDES[:2]]), fitted)
    deviations = fitted.deviations(clean)
    assert torch.equal(again.deviations(clean), deviations)
    assert torch.equal(again.score(deviations), fitted.score(deviations))
    same = Scorer("soft_square").fit(clean, harmless, seed=0)
    assert torch.equal(same.deviations(clean), deviations)
    assert not torch.equal(Scorer("soft_square").fit(clean, harmless, seed=1).center, fitted.center)
    assert not torch.equal(Scorer("soft_square").fit(clean, None, seed=0).center, fitted.center)


def test_what_does_not_lead_counts_beyond_two_standard_deviations() -> None:
    def two(n: int, seed: int) -> Sample:
        one, other = sample(n, seed), sample(n, seed + 50)
        return Sample({"a": one.responses["a"], "b": other.responses["a"]}, one.idle)

    clean = two(200, 0)
    plain, led = (Scorer("soft_square").fit(clean, None, seed=0, leading=names) for names in (None, ["b"]))
    deviations = plain.deviations(clean)
    assert torch.equal(led.deviations(clean), deviations)  # the report shows the same
    expected = torch.nn.functional.softplus(deviations - torch.tensor([2.0] * 3 + [0.0] * 3)).square().sum(1)
    torch.testing.assert_close(led.score(deviations), expected)
    assert bool((plain.allowance == 0).all())
    informed = led.with_attacks(two(40, 9), seed=0)
    every = informed.deviations(clean)  # the likeness to known attacks counts in full
    likeness = torch.nn.functional.softplus(every[:, -1]).square()
    torch.testing.assert_close(informed.score(every), expected + likeness)
    stored = loaded(Scorer("soft_square", [SIDES[:2]] * 2), led)
    assert torch.equal(stored.score(deviations), led.score(deviations))


def test_attacked_examples_add_a_deviation_and_leaves_the_others() -> None:
    clean = sample(200)
    fitted = Scorer("soft_square").fit(clean, sample(200, seed=5), seed=0)
    attacked = sample(60, seed=2)
    attacked.responses["a"].effects[:, 2] += 6
    informed, before = fitted.with_attacks(attacked, seed=0), fitted.deviations(clean)
    after = informed.deviations(clean)
    assert torch.equal(after[:, :-1], before)
    unseen = sample(60, seed=3)
    assert abs(float(informed.deviations(unseen)[:, -1].mean())) < 0.5
    unseen.responses["a"].effects[:, 2] += 6
    assert float(informed.deviations(unseen)[:, -1].mean()) > 2
    # With other examples, it is another likeness, not one more.
    again = informed.with_attacks(unseen, seed=0)
    assert again.deviations(clean).shape == after.shape
    torch.testing.assert_close(again.with_likeness(after, clean.features()), again.deviations(clean))
    assert fitted.attacks is None
    stored = loaded(Scorer("soft_square", [SIDES[:2]], clean.features().shape[1]), informed)
    assert torch.equal(stored.deviations(clean), after)


def test_some_rows_of_a_sample_and_several_samples() -> None:
    whole = sample(30)
    parts = [whole.select(slice(0, 10)), whole.select(torch.arange(10, 30))]
    again = Sample.joined(parts)
    assert len(again.idle) == 30
    assert torch.equal(again.idle, whole.idle)
    assert torch.equal(again.predicted, whole.idle.argmax(1))
    for name in ("effects", "margins", "answers", "left"):
        assert torch.equal(getattr(again.responses["a"], name), getattr(whole.responses["a"], name))
