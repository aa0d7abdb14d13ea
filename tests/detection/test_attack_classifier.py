"""What is learned from attacked examples: what is recognised, what is not, and that it depends on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.detection.scorers import AttackClassifier


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_attacks_like_the_examples_stand_out_and_clean_images_are_centred() -> None:
    away = torch.tensor([0.0, 3.0, 0.0, -2.0]).double()
    attacks = AttackClassifier(4).fit(drawn(300, 2, 4), drawn(200, 4, seed=1) + away, seed=0)
    clean, shown = attacks(drawn(500, 4, seed=2)), attacks(drawn(500, 4, seed=3) + away)
    assert abs(float(clean.mean())) < 0.25
    assert 0.6 < float(clean.std()) < 1.4
    # The best that can be told from two Gaussians 3.6 apart: AUROC .995.
    assert float((shown[:, None] > clean).double().mean()) > 0.98


def test_it_learns_more_than_a_line() -> None:
    """Attacked images all around the clean ones, which no weighting of features tells apart."""
    angle = drawn(400, 2, seed=1)
    ring = 5 * angle / angle.norm(dim=1, keepdim=True)
    attacks = AttackClassifier(2).fit(drawn(400, 1, 2), ring, seed=0)
    assert float(attacks(ring[::7] * 1.02).min()) > float(attacks(drawn(300, 2, seed=4)).quantile(0.9))


def test_images_that_nobody_is_like_are_no_attack_of_this_kind() -> None:
    attacks = AttackClassifier(2).fit(drawn(300, 1, 2), drawn(300, 2, seed=1) + torch.tensor([6.0, 0.0]), seed=0)
    odd = attacks(torch.tensor([[-50.0, 0.0], [1e9, 0.0], [-1e9, 1e9]]).double())
    assert bool(odd.isfinite().all())
    assert float(odd[0]) < 1.5


def test_the_same_comes_out_whoever_draws_random_numbers() -> None:
    usual, attacked = drawn(60, 2, 3), drawn(20, 3, seed=1) + 2
    state = torch.random.get_rng_state()
    first = AttackClassifier(3).fit(usual, attacked, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(9)
    with torch.no_grad():
        again = AttackClassifier(3).fit(usual.float(), attacked.float(), seed=0)
    other = AttackClassifier(3).fit(usual, attacked, seed=1)
    features = drawn(10, 3, seed=5)
    torch.testing.assert_close(again(features), first(features), rtol=1e-2, atol=1e-2)
    assert not torch.equal(other(features), first(features))
    stored = AttackClassifier(3)
    stored.load_state_dict(first.state_dict(), assign=True)
    assert torch.equal(stored(features), first(features))


def test_it_has_a_gradient() -> None:
    attacks = AttackClassifier(3).fit(drawn(60, 1, 3), drawn(30, 3, seed=1) + 2, seed=0)
    features = drawn(4, 3, seed=5).requires_grad_()
    torch.autograd.gradcheck(attacks, (features,))
