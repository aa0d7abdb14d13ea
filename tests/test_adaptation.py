"""Domain adaptation: the gradient that is turned, what training does to planted domains, and pseudo-labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, InputError, ModelError
from ce_plugin.models import DannCNN, GradientReversal, pseudo_labels, train_adapted
from ce_plugin.models.adaptation import _batches, _schedule


class Linear(nn.Module):
    """Pictures of one row with two pixels: the class, and the domain."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Flatten(), nn.Linear(2, 4, bias=False))
            self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits

    def domain_weight(self) -> float:
        """How much the features depend on the pixel of the domain."""
        return float(self.features[1].weight[:, 1].detach().norm())


def planted(n: int = 256, shift: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Source, its labels, and target: the second pixel is -shift there and +shift here, and noise."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 2
    x = torch.randn(2, n, 1, 1, 2, generator=draw) * 0.5
    x[..., 0] += (2.0 * labels - 1)[:, None, None]
    x[0, ..., 1] -= shift
    x[1, ..., 1] += shift
    return x[0], labels, x[1]


def test_the_gradient_is_turned_round() -> None:
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    layer = GradientReversal(0.7)
    assert torch.equal(layer(z), z)
    outer = torch.randn(3, 4, dtype=torch.float64)
    (turned,) = torch.autograd.grad((layer(z).sin() * outer).sum(), z)
    torch.testing.assert_close(turned, -0.7 * z.cos() * outer)
    layer.weight = 0.0
    assert not torch.autograd.grad(layer(z).sum(), z)[0].any()
    assert repr(layer) == "GradientReversal(weight=0)"
    with pytest.raises(ArgumentError, match="`weight` to be a finite number, but got inf"):
        GradientReversal(math.inf)


def test_the_schedule_of_the_paper() -> None:
    assert _schedule(0.0) == 0
    assert _schedule(0.1) == pytest.approx(2 / (1 + math.exp(-1)) - 1)
    assert _schedule(1.0) == pytest.approx(1, abs=1e-4)


def test_features_lose_the_domain_with_reversal_and_keep_it_without() -> None:
    x, y, other = planted()
    ways = {"plain": {}, "reversed": {"target": other}, "not": {"target": other, "reverse": False}}
    found = {}
    for name, options in ways.items():
        net = Linear()
        trained = train_adapted(net, x, y, steps=300, lr=3e-3, weight=0.3, **options)
        found[name] = net.domain_weight()
        assert trained.class_loss[-50:].mean() < 0.4
        if name == "not":
            assert trained.domain_loss[-50:].mean() < 0.1
    assert found["reversed"] < 0.6 * found["plain"] < 0.6 * found["not"]


def test_equal_domains_leave_the_critic_guessing() -> None:
    x, y, other = planted(n=2000, shift=0.0)
    trained = train_adapted(Linear(), x, y, other, steps=200)
    assert trained.domain_loss[-100:].mean() == pytest.approx(math.log(2), abs=0.03)
    assert trained.critic is not None
    assert trained.critic(torch.zeros(5, 4)).shape == (5, 1)


def test_weight_zero_is_training_on_the_source() -> None:
    x, y, other = planted()
    alone, beside = Linear(), Linear()
    without = train_adapted(alone, x, y, steps=40)
    train_adapted(beside, x, y, other, steps=40, weight=0.0)
    for one, two in zip(alone.parameters(), beside.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert without.critic is None
    assert without.domain_loss.shape == (0,)


def test_training_depends_on_its_seed_alone_and_leaves_the_random_state() -> None:
    x, y, other = planted()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, third = Linear(), Linear(), Linear()
    train_adapted(first, x, y, other, steps=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    train_adapted(second, x, y, other, steps=10)
    train_adapted(third, x, y, other, steps=10, seed=1)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, third.head.weight)
    assert not first.training


def test_batches_take_each_image_once_before_any_again() -> None:
    batches = _batches(10, 4, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert len(next(_batches(3, 8, torch.Generator()))) == 8


def test_the_network_of_the_paper() -> None:
    net = DannCNN()
    assert sum(p.numel() for p in net.features.parameters()) == 32 * (3 * 25 + 1 + 2) + 48 * (32 * 25 + 1 + 2)
    assert sum(p.numel() for p in net.head.parameters()) == 100 * 769 + 10 * 101
    assert not torch.equal(DannCNN.seeded(1).head[0].weight, DannCNN.seeded(2).head[0].weight)
    with pytest.raises(ArgumentError, match="`widths` to be two whole numbers"):
        DannCNN((0, 4))


def test_pseudo_labels_are_the_confident_answers() -> None:
    net, (x, _, _) = Linear(), planted(n=64)
    chosen, answers = pseudo_labels(net, x, confidence=0.6, batch_size=7)
    sure, answer = net(x).softmax(1).max(1)
    assert 0 < len(chosen) < 64
    assert chosen.tolist() == [k for k in range(64) if sure[k] >= 0.6]
    assert torch.equal(answers, answer[chosen])
    assert net.training  # as before
    with pytest.raises(ArgumentError, match=r"`confidence` to be in \[0, 1\], but got 1\.5"):
        pseudo_labels(net, x, confidence=1.5)


def test_what_training_refuses() -> None:
    x, y, other = planted(n=8)
    for labels in (y[:5], y.float(), y[:, None]):
        with pytest.raises(InputError, match=r"`labels` to be class indices \(8,\)"):
            train_adapted(Linear(), x, labels, steps=1)
    for target in (other[:0], other[..., :1]):
        with pytest.raises(InputError, match="`target` to be one image or more of the source's shape"):
            train_adapted(Linear(), x, y, target, steps=1)
    with pytest.raises(ModelError, match="`features` and `head`, but got Linear"):
        train_adapted(nn.Linear(2, 2), x, y, steps=1)
    maps = DannCNN(widths=(2, 2))
    maps.features = maps.features[:-1]
    with pytest.raises(ModelError, match=r"features are \(N, D\), but got \(2, 2, 4, 4\)"):
        train_adapted(maps, torch.zeros(2, 3, 28, 28), y[:2], torch.zeros(2, 3, 28, 28), steps=1)
    for wrong, message in (({"steps": 0}, "steps"), ({"weight": -1.0}, "weight"), ({"lr": 0.0}, "lr")):
        with pytest.raises(ArgumentError, match=f"argument `{message}`"):
            train_adapted(Linear(), x, y, **{"steps": 1, **wrong})
