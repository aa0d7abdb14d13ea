"""The adaptive attack: planted optima, monotony, what it returns, what it leaves alone, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ce_plugin.detection.adaptive import LOSSES, AdaptiveEvasion, AdaptiveReport
from ce_plugin.detection.adaptive.objective import Ball, Evaluation
from ce_plugin.detection.adaptive.search import Archive
from ce_plugin.errors import AttackError, InputError, ModelError, TargetError, UnknownNameError
from ce_plugin.networks.art import build_classifier
from ce_plugin.randomness import generator

SHAPE = (1, 3, 4)
SIZE = 12
CPU = torch.device("cpu")


class FromCentre:
    """Squared distance from a centre: a detector whose least score inside a half space and a ball is known."""

    name = "distance"

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre

    def fit(self, x: Any, y: Any = None) -> None: ...

    def score(self, x: Any, batch_size: int = 128) -> Any:
        return self.score_tensor(torch.as_tensor(x)).double().numpy()

    def score_tensor(self, images: Tensor) -> Tensor:
        return (images - self.centre).square().flatten(1).sum(dim=1)


class Rounding(FromCentre):
    """The same of images in few levels, rounded straight through."""

    def score_tensor(self, images: Tensor) -> Tensor:
        rounded = (images * 16).round() / 16
        return super().score_tensor(images + (rounded - images).detach())


class Noisy(FromCentre):
    """The same with noise from the global generator."""

    def score_tensor(self, images: Tensor) -> Tensor:
        return super().score_tensor(images + 0.01 * torch.randn_like(images))


def linear(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Class 1 where w x > w 0.5 + 0.1 |w|^2, w known."""
    weights = torch.linspace(-1, 1.4, SIZE, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 2)).to(dtype)
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros(SIZE), weights]))
        net[1].bias.copy_(torch.tensor([0.0, -float(weights.sum()) / 2 - 0.1 * float(weights.square().sum())]))
    return net


def curved(dtype: torch.dtype = torch.float64, classes: int = 4) -> nn.Sequential:
    """A small network with several classes, always the same."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 16), nn.Tanh(), nn.Linear(16, classes)).to(dtype)
    draw = generator(3, "weights")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * (1.5 if parameter.dim() == 2 else 0.1))
    return net


def images(n: int, dtype: Any = np.float64, seed: int = 0) -> Any:
    """Images on the grid of 8 bits."""
    return (np.random.default_rng(seed).integers(0, 256, (n, *SHAPE)) / 255).astype(dtype)


def classifier(net: nn.Module, classes: int, **options: Any) -> Any:
    return build_classifier(net, SHAPE, classes, (0.0, 1.0), CPU, **options)


def attack(net: nn.Module, detector: Any, classes: int = 2, **settings: Any) -> AdaptiveEvasion:
    return AdaptiveEvasion(classifier(net, classes), detector, **settings)


def report_of(made: AdaptiveEvasion) -> AdaptiveReport:
    assert made.report is not None
    return made.report


def closest(net: nn.Sequential, centre: Tensor, eps: float) -> float:
    """Least squared distance from the centre among misclassified points within eps (L-inf) of it, by bisection."""
    weights, bias = net[1].weight[1].detach(), float(net[1].bias[1].detach())
    flat, low, high = centre.flatten(), 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        reached = float(weights @ (flat + (middle * weights).clamp(-eps, eps)).clamp(0, 1)) + bias > 0
        low, high = (low, middle) if reached else (middle, high)
    return float(((flat + (high * weights).clamp(-eps, eps)).clamp(0, 1) - flat).square().sum())


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("eps", [0.25, 0.125])
def test_planted_optimum_in_the_box(loss: str, eps: float) -> None:
    """At eps 0.25 the nearest point of the half space is free; at 0.125 the largest weights hit the ball."""
    net, centre = linear(), torch.full(SHAPE, 0.5, dtype=torch.float64)
    made = attack(net, FromCentre(centre), eps=eps, losses=[loss], levels=None, restarts=1, steps=80)
    made.generate(centre[None].numpy())
    report = report_of(made)
    assert report.success.all()
    assert report.norm[0] <= eps + 1e-9
    best = closest(net, centre, eps)
    # Orthogonal steps are lost where the gradients are parallel, as they are at this optimum.
    assert best - 1e-9 <= report.score[0] <= best * (2.0 if loss == "orthogonal" else 1.02)


def test_planted_optimum_in_the_euclidean_ball() -> None:
    """The nearest point of the half space, c + w t, where the ball has room for it; no success where it has none."""
    net, centre = linear(), torch.full(SHAPE, 0.5, dtype=torch.float64)
    best = closest(net, centre, 1.0)
    for room, success in ((1.05, True), (0.95, False)):
        made = attack(net, FromCentre(centre), norm=2, eps=math.sqrt(best) * room, levels=None, restarts=1, steps=60)
        made.generate(centre[None].numpy())
        assert report_of(made).success[0] == success
        assert report_of(made).norm[0] <= math.sqrt(best) * room * (1 + 1e-6)
        if success:
            assert best - 1e-9 <= report_of(made).score[0] <= best * 1.05


def test_nothing_is_given_away_by_rounding_in_the_detector() -> None:
    net, centre = linear(), torch.full(SHAPE, 0.5, dtype=torch.float64)
    made = attack(net, Rounding(centre), eps=0.25, levels=None, restarts=2, steps=50)
    start = attack(net, FromCentre(centre + 10), eps=0.25, levels=None, steps=2, restarts=1)
    careless = start.generate(centre[None].numpy())
    found = made.generate(centre[None].numpy())
    assert report_of(made).success.all()
    # The levels are coarse, so the least rounded score is not known; it is far below that of a careless attack.
    score = Rounding(centre).score
    assert score(found)[0] < 0.5 * score(careless)[0]
    assert score(found)[0] <= 1.3 * closest(net, centre, 0.25)


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_lie_in_the_ball_and_on_the_grid(norm: Any, dtype: Any) -> None:
    eps = 0.2 if norm == "inf" else 0.5
    net = curved(torch.float32 if dtype == np.float32 else torch.float64)
    clean = images(20, dtype)
    made = attack(net, FromCentre(torch.tensor(clean[0])), 4, norm=norm, eps=eps, restarts=2, steps=12)
    found = made.generate(clean)
    report = report_of(made)
    assert found.dtype == dtype
    assert found.shape == clean.shape
    assert report.success.mean() > 0.5
    np.testing.assert_array_equal(found, (np.round(found.astype(np.float64) * 255) / 255).astype(dtype))
    assert found.min() >= 0
    assert found.max() <= 1
    change = (found - clean).reshape(20, -1).astype(np.float64)
    size = np.abs(change).max(1) if norm == "inf" else np.linalg.norm(change, axis=1)
    assert (size <= eps + 1e-6).all()
    np.testing.assert_allclose(report.norm, size, atol=1e-7)
    with torch.no_grad():
        logits, before = net(torch.tensor(found)), net(torch.tensor(clean)).argmax(1)
    np.testing.assert_array_equal(report.prediction, logits.argmax(1))
    np.testing.assert_array_equal(report.success, (logits.argmax(1) != before).numpy())
    np.testing.assert_allclose(report.score, made.detector.score(found), rtol=1e-5)


def test_images_between_the_levels_are_rounded_into_the_ball() -> None:
    clean = torch.rand(5, *SHAPE, generator=generator(0, "x"), dtype=torch.float64)
    for norm, eps in (("inf", 0.005), ("inf", 0.1), ("2", 0.05), ("2", 0.5)):
        ball = Ball(clean, eps, norm, (0.0, 1.0), 256)
        for seed in range(5):
            point = ball.random([generator(seed, i) for i in range(5)])
            assert ball.contains(point).all()
            assert ball.contains(ball.store(point)).all()
            assert ball.contains(ball.project(clean + 3 * (point - clean))).all()


def test_more_restarts_never_weaken() -> None:
    """Each restart only adds to those before, so that this holds image by image."""
    clean, net = images(8), curved()
    before = np.full(8, np.inf)
    for restarts in (1, 2, 4):
        made = attack(
            net, FromCentre(torch.tensor(clean[0])), 4, eps=0.3, restarts=restarts, steps=8, losses=["selective"]
        )
        made.generate(clean)
        score = np.where(report_of(made).success, report_of(made).score, np.inf)
        assert (score <= before + 1e-12).all()
        before = score
    assert np.isfinite(before).any()


def test_several_starts_leave_the_valley_that_one_stays_in() -> None:
    """Valleys at 0.3 and, deeper, at 0.7 of the first value: short steps from 0.4 lead to the near one."""

    class TwoValleys(FromCentre):
        def score_tensor(self, images: Tensor) -> Tensor:
            place = images.flatten(1)[:, 0] - 0.5
            return (place.square() - 0.04).square() - 0.002 * place

    clean, net = np.full((3, *SHAPE), 0.5), curved()
    clean[:, 0, 0, 0] = 0.4
    with torch.no_grad():
        wrong = (net(torch.tensor(clean)).argmax(1).numpy() + 1) % 4
    scores = {}
    for width in (1, 16):
        made = attack(
            net,
            TwoValleys(torch.zeros(1)),
            4,
            eps=0.4,
            eps_step=0.1,
            steps=40,
            restarts=1,
            width=width,
            levels=None,
            losses=["lagrangian"],
        )
        made.generate(clean, wrong)
        assert report_of(made).success.all()
        scores[width] = report_of(made).score
    np.testing.assert_allclose(scores[1], 0.0004, atol=5e-5)
    np.testing.assert_allclose(scores[16], -0.0004, atol=5e-5)


def test_the_best_of_several_starts() -> None:
    margin = torch.tensor([-1.0, 0.5, 2.0, -3.0, -2.0, -4.0, 1.0, -9.0, 3.0])
    score = torch.tensor([0.0, 7.0, 5.0, 1.0, 9.0, 0.0, torch.inf, 0.0, torch.inf], dtype=torch.float64)
    evaluated = Evaluation(margin, margin > 0, score, torch.arange(9))
    first = evaluated.foremost(3)
    assert first.tolist() == [2, 4, 8], "least score of the wrong ones; greatest margin where none has a score"
    assert evaluated.select(first).predicted.tolist() == [2, 4, 8]


def test_the_pool_keeps_the_best_finds_that_differ() -> None:
    clean = torch.zeros(2, *SHAPE)
    finds = torch.eye(SIZE)[:10].reshape(1, 10, *SHAPE).repeat(2, 1, 1, 1, 1)
    finds[0, 7] = finds[0, 2] + 0.01
    scores = torch.arange(10.0, 0, -1, dtype=torch.float64).repeat(2, 1)
    scores[0, 4] = torch.inf
    pool = Archive(clean)
    pool.offer(finds, scores, torch.arange(2))
    assert pool.scores[0].tolist() == [1, 2, 3, 4, 5, 7, 9, 10], "8 repeats 3, and 6 is none"
    assert pool.scores[1].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(pool.images[0, 0], finds[0, 9])
    pool.offer(finds[1:, 8:9] * 1.05, torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([1]))
    assert pool.scores[1].tolist() == [0.5, 1, 3, 4, 5, 6, 7, 8], "what is better takes the place of what it repeats"
    assert pool.scores[0, 0] == 1


def test_partners_are_other_finds_than_the_best() -> None:
    clean = torch.zeros(3, *SHAPE)
    otherwise = torch.full_like(clean, 7)
    pool, rows = Archive(clean), torch.arange(3)
    assert torch.equal(pool.partners(rows, torch.zeros(3), otherwise), otherwise)
    finds = torch.eye(SIZE)[:3].reshape(1, 3, *SHAPE).repeat(3, 1, 1, 1, 1)
    scores = torch.tensor([[1, 2, 3], [2, torch.inf, 1], [1, torch.inf, torch.inf]], dtype=torch.float64)
    pool.offer(finds, scores, rows)
    for share, second in ((0.0, 1), (0.499, 1), (0.5, 2), (0.999, 2)):
        found = pool.partners(rows, torch.full((3,), share), otherwise)
        assert torch.equal(found[0], finds[0, second])
        assert torch.equal(found[1], finds[1, 0]), "the only other one"
        assert torch.equal(found[2], otherwise[2]), "no other one"


def test_starts_between_finds_lower_a_rough_score() -> None:
    """From the fourth restart on runs start between finds: many narrow valleys, the deeper the nearer to a place."""

    class Rough(FromCentre):
        def score_tensor(self, images: Tensor) -> Tensor:
            place = images.flatten(1) - 0.6
            return place.square().sum(dim=1) + 0.05 * (1 - (60 * place).cos()).sum(dim=1)

    clean, net, scores = images(10), curved(), []
    for restarts in (3, 8):
        made = attack(net, Rough(torch.zeros(1)), 4, eps=0.3, restarts=restarts, steps=15, losses=["lagrangian"])
        made.generate(clean)
        scores.append(report_of(made).score[report_of(made).success])
    assert len(scores[0]) > 5
    assert scores[1].mean() < scores[0].mean() - 0.1


def test_more_steps_do_not_weaken_on_average() -> None:
    clean, net, means = images(12), curved(), []
    for steps in (3, 12, 48):
        made = attack(net, FromCentre(torch.tensor(clean[0])), 4, eps=0.3, restarts=1, steps=steps)
        made.generate(clean)
        means.append(np.where(report_of(made).success, report_of(made).score, 10.0).mean())
    assert means[0] > means[1] > means[2]


def test_a_larger_ball_that_is_given_earlier_results_never_weakens() -> None:
    clean, net, found = images(8), curved(), None
    before = np.full(8, np.inf)
    for eps in (0.1, 0.2, 0.3):
        made = attack(net, FromCentre(torch.tensor(clean[0])), 4, eps=eps, restarts=1, steps=5)
        found = made.generate(clean, starts=found)
        score = np.where(report_of(made).success, report_of(made).score, np.inf)
        assert (score <= before + 1e-12).all()
        before = score


def test_without_bounds_it_wins_by_the_images_of_another_class() -> None:
    """A detector that knows its clean images and is flat elsewhere: no gradient leads to them."""

    class Known(FromCentre):
        def score_tensor(self, images: Tensor) -> Tensor:
            far = (images[:, None] - self.centre).abs().flatten(2).amax(dim=2).amin(dim=1)
            return (far > 1e-6).to(images.dtype) + 0.0 * images.flatten(1).sum(dim=1)

    clean, pool, net = images(6), images(40, seed=1), curved()
    made = attack(net, Known(torch.tensor(pool)), 4, eps=math.inf, restarts=1, steps=3, candidates=pool)
    found = made.generate(clean)
    report = report_of(made)
    assert report.success.all()
    np.testing.assert_array_equal(report.score, 0)
    assert set(report.loss) == {"candidate"}
    assert all(any((image == other).all() for other in pool) for image in found)
    without = attack(net, Known(torch.tensor(pool)), 4, eps=math.inf, restarts=1, steps=3)
    without.generate(clean)
    assert (report_of(without).score == 1).all()


def test_batches_change_nothing() -> None:
    clean, net = images(7), curved()
    pool = images(9, seed=2)
    results = []
    for batch_size in (28, 12, 1):
        made = attack(
            net,
            FromCentre(torch.tensor(clean[0])),
            4,
            eps=0.3,
            restarts=4,
            steps=4,
            batch_size=batch_size,
            candidates=pool,
        )
        results.append((made.generate(clean), report_of(made)))
    for found, report in results[1:]:
        np.testing.assert_allclose(found, results[0][0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(report.score, results[0][1].score, rtol=1e-9)
        np.testing.assert_array_equal(report.loss, results[0][1].loss)
        for loss, curve in report.curves.items():
            np.testing.assert_allclose(curve, results[0][1].curves[loss], rtol=1e-9)
    some = [4, 2]
    made = attack(net, FromCentre(torch.tensor(clean[0])), 4, eps=0.3, restarts=4, steps=4, candidates=pool)
    np.testing.assert_allclose(made.generate(clean[some], ids=some), results[0][0][some], rtol=0, atol=1e-12)


def test_state_is_left_alone_also_after_an_error() -> None:
    class Breaking(FromCentre):
        def score_tensor(self, images: Tensor) -> Tensor:
            torch.rand(3)
            raise RuntimeError("broken")

    net = nn.Sequential(curved(), nn.Dropout(0.5)).train()
    grads = [torch.ones_like(p) for p in net.parameters()]
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        parameter.grad = grad
    clean = images(3)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for detector in (Noisy(torch.zeros(SHAPE)), Breaking(torch.zeros(SHAPE))):
        made = attack(net, detector, 4, eps=0.1, steps=2, restarts=2, eot=2)
        # ART puts a network into eval mode when a classifier is built.
        net.train()
        if isinstance(detector, Breaking):
            with pytest.raises(RuntimeError, match="broken"):
                made.generate(clean)
        else:
            again = made.generate(clean)
            np.testing.assert_array_equal(again, made.generate(clean))
        assert all(module.training for module in net.modules())
        assert all(p.grad is grad and (grad == 1).all() for p, grad in zip(net.parameters(), grads, strict=True))
        assert torch.equal(torch.get_rng_state(), state)
        assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002


def test_plateaus_and_broken_gradients_are_left_by_random_steps() -> None:
    """A detector with a gradient that is zero or not finite does not stop the attack on the classifier."""

    class Flat(FromCentre):
        def score_tensor(self, images: Tensor) -> Tensor:
            return 0 * images.flatten(1).sum(dim=1)

    class Broken(FromCentre):
        def score_tensor(self, images: Tensor) -> Tensor:
            return (0 * images).flatten(1).norm(dim=1).sqrt()

    clean = images(6)
    for detector in (Flat(torch.zeros(1)), Broken(torch.zeros(1))):
        for loss in LOSSES:
            made = attack(curved(), detector, 4, eps=0.4, steps=10, restarts=1, losses=[loss])
            made.generate(clean)
            assert report_of(made).success.mean() > 0.5
    dead = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 1), nn.Hardtanh(0, 1), nn.Linear(1, 2)).double()
    with torch.no_grad():
        for parameter, value in zip(
            dead.parameters(), (10.0, -62.0, torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -0.1])), strict=True
        ):
            parameter.copy_(torch.as_tensor(value))
    made = attack(dead, Flat(torch.zeros(1)), eps=0.3, steps=30, restarts=2)
    made.generate(np.full((2, *SHAPE), 128 / 255))
    assert report_of(made).success.all(), "random steps cross a plateau of the classifier"


def test_an_image_below_the_threshold_is_left_alone() -> None:
    clean, net = images(8), curved()
    made = attack(net, FromCentre(torch.tensor(clean[0])), 4, eps=0.3, steps=10, restarts=3, threshold=1e9)
    made.generate(clean)
    report = report_of(made)
    np.testing.assert_array_equal(report.unnoticed, report.success)
    # One run is enough for those that it fools.
    assert (report.restart[report.success] == 0).any()
    longer = attack(net, FromCentre(torch.tensor(clean[0])), 4, eps=0.3, steps=10, restarts=3)
    longer.generate(clean)
    assert (report_of(longer).score <= report.score + 1e-12)[report.success].all()
    assert report_of(longer).score.sum() < report.score.sum()


def test_labels_in_every_form_and_images_that_are_wrong_already() -> None:
    clean, net = images(6), curved()
    with torch.no_grad():
        predicted = net(torch.tensor(clean)).argmax(1).numpy()
    made = attack(net, FromCentre(torch.tensor(clean[0])), 4, eps=0.1, steps=3, restarts=1)
    default = made.generate(clean)
    for y in (predicted, predicted[:, None], np.eye(4)[predicted], predicted.astype(np.float32)):
        np.testing.assert_array_equal(made.generate(clean, y), default)
    made.generate(clean, (predicted + 1) % 4)
    assert report_of(made).success.all()


def test_curves_fall_and_say_how_flat_they_end() -> None:
    clean, net = images(8), curved()
    made = attack(net, FromCentre(torch.tensor(clean[0])), 4, eps=0.3, steps=20, restarts=2)
    made.generate(clean)
    curves = report_of(made).curves
    assert list(curves) == list(LOSSES)
    for curve in curves.values():
        assert curve.shape == (2, 21)
        assert (np.diff(curve, axis=1) <= 1e-12).all()
    late = report_of(made).late_gain()
    assert set(late) == set(LOSSES)
    assert all(gain >= 0 for gain in late.values())


def test_art_takes_it_for_an_attack() -> None:
    from art.attacks.attack import EvasionAttack

    made = attack(linear(), FromCentre(torch.zeros(1)), eps=0.2)
    assert isinstance(made, EvasionAttack)
    assert not made.targeted
    assert all(hasattr(made, name) for name in made.attack_params)
    made.set_params(eps=0.3, steps=7)
    assert (made.eps, made.steps) == (0.3, 7)
    assert "steps=7" in repr(made)
    with pytest.raises(AttackError, match="`eps` to be a number above 0"):
        made.set_params(eps=-1)
    with pytest.raises(ValueError, match="cannot be set"):
        made.set_params(size=1)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"eps": 0}, AttackError, "`eps` to be a number above 0, or math.inf, but got 0"),
        ({"eps": math.nan}, AttackError, "`eps` to be a number above 0"),
        ({"norm": 1}, AttackError, "`norm` to be 'inf' or 2, but got 1"),
        ({"steps": 0}, AttackError, "`steps` to be a whole number from 1, but got 0"),
        ({"restarts": 1.5}, AttackError, "`restarts` to be a whole number"),
        ({"width": 0}, AttackError, "`width` to be a whole number from 1, but got 0"),
        ({"levels": 1}, AttackError, "`levels` to be a whole number from 2"),
        ({"eot": 0}, AttackError, "`eot`"),
        ({"batch_size": 0}, AttackError, "`batch_size`"),
        ({"eps_step": 0}, AttackError, "`eps_step` to be a share of eps"),
        ({"seed": "x"}, AttackError, "`seed` to be an integer"),
        ({"threshold": "x"}, AttackError, "`threshold` to be a score"),
        ({"losses": []}, AttackError, "`losses` to be a sequence of names"),
        ({"losses": "selective"}, AttackError, "`losses` to be a sequence of names"),
        ({"losses": ["selectiv"]}, UnknownNameError, "Did you mean 'selective'?"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("?", r"\?")):
        attack(linear(), FromCentre(torch.zeros(1)), **settings)


def test_what_cannot_be_attacked() -> None:
    class Scores:
        def score(self, x: Any) -> Any: ...

    class Constant(FromCentre):
        def score_tensor(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images))

    class Whole(FromCentre):
        def score_tensor(self, images: Tensor) -> Tensor:
            return images.sum()

    x, net = images(2), linear()
    with pytest.raises(ModelError, match=r"`score_tensor`, but got Scores, which has none\. Give the class"):
        attack(net, Scores())
    with pytest.raises(ModelError, match="has a gradient"):
        attack(net, Constant(torch.zeros(1))).generate(x)
    with pytest.raises(ModelError, match=r"one score per image, \(2,\), but got \(\)"):
        attack(net, Whole(torch.zeros(1))).generate(x)
    bare = classifier(net, 2)
    bare._clip_values = None
    with pytest.raises(AttackError, match=r"a classifier with clip values, but got none\. Pass `clip_values=`"):
        AdaptiveEvasion(bare, FromCentre(torch.zeros(1))).generate(x)
    made = attack(net, FromCentre(torch.zeros(1)), eps=0.2)
    for wrong, words in (
        (x * 255, "inside the clip values"),
        (x * np.nan, "inside the clip values"),
        ((x * 255).astype(np.uint8), "of a floating type"),
        (x[:0], "of a floating type"),
    ):
        with pytest.raises(InputError, match=words):
            made.generate(wrong)
    with pytest.raises(InputError, match="one image for each of `x`, 2, but got 1"):
        made.generate(x, starts=x[:1])
    with pytest.raises(InputError, match=r"`candidates` to be images of shape \(1, 3, 4\)"):
        attack(net, FromCentre(torch.zeros(1)), candidates=x[:, :, 1:]).generate(x)
    with pytest.raises(InputError, match="one id per image, 2, but got 1"):
        made.generate(x, ids=[0])
    for y, words in ((np.array([0, 2]), "classes 0 to 1"), (np.array([0.5, 1]), "classes"), (np.zeros(3), "labels")):
        with pytest.raises(TargetError, match=words):
            made.generate(x, y)
    with pytest.raises(AttackError, match=r"large enough for one level, 0.003922, but got 0.003"):
        attack(net, FromCentre(torch.zeros(1)), eps=0.003).generate(x)
