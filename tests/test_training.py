"""Training a classifier: it learns what is there, by its seed alone, and touches nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.models import train_classifier
from ce_plugin.randomness import generator


def bars(n: int = 96) -> tuple[Tensor, Tensor]:
    """Images with a bright bar on top, on the left, both or neither: two findings that are independent."""
    draw = generator(0, "bars")
    y = torch.rand(n, 2, generator=draw) < 0.5
    x = 0.3 * torch.rand(n, 1, 8, 8, generator=draw)
    x[y[:, 0], :, :2] += 0.7
    x[y[:, 1], :, :, :2] += 0.7
    return x, y


def network(outputs: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, outputs)
        )


def test_findings_that_may_be_true_together_are_learned() -> None:
    x, y = bars()
    net = network()
    losses = train_classifier(net, x[:64], y[:64], epochs=30, lr=1e-2, batch_size=16)
    assert len(losses) == 30
    assert losses[-1] < 0.2 < losses[0]
    assert bool(((net(x[64:]) > 0) == y[64:]).all())
    assert not any(module.training for module in net.modules())


def test_one_output_and_classes_are_learned_too() -> None:
    x, y = bars()
    one, four = network(1), network(4)
    train_classifier(one, x, y[:, 0].long(), epochs=30, lr=1e-2)
    assert bool(((one(x)[:, 0] > 0) == y[:, 0]).all())
    classes = 2 * y[:, 0].long() + y[:, 1].long()
    train_classifier(four, x, classes, epochs=40, lr=1e-2)
    assert torch.equal(four(x).argmax(1), classes)


def test_the_seed_alone_decides_and_the_global_state_stays() -> None:
    x, y = bars(40)
    first, second, other = network(), network(), network()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train_classifier(first, x, y, epochs=2, mirror=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(9)
    train_classifier(second, x, y, epochs=2, mirror=True)
    train_classifier(other, x, y, epochs=2, mirror=True, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_the_first_step_is_adams() -> None:
    """Adam's first step moves every weight by the rate, against the sign of the gradient of the mean loss."""
    x, y = bars(10)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    before = net[1].weight.detach().clone()
    loss = F.binary_cross_entropy_with_logits(net(x), y.float())
    (gradient,) = torch.autograd.grad(loss, [net[1].weight])
    (mean,) = train_classifier(net, x, y, epochs=1, lr=1e-3, batch_size=10)
    assert mean == pytest.approx(float(loss.detach()))
    torch.testing.assert_close(net[1].weight.detach() - before, -1e-3 * gradient.sign(), atol=1e-6, rtol=1e-3)


def test_mirrored_images_are_what_it_says() -> None:
    """What tells left from right cannot be learned from images that are turned at random."""
    x, y = bars(96)
    plain, turned = (nn.Sequential(nn.Flatten(), nn.Linear(64, 1)) for _ in range(2))
    side = torch.where(y[:, 1, None, None, None], x, x.flip(-1))
    side[:, :, :, :2] = y[:, 1, None, None, None].float()
    side[:, :, :, -2:] = 1 - y[:, 1, None, None, None].float()
    learned = train_classifier(plain, side, y[:, 1].long(), epochs=40, lr=1e-2)[-1]
    guessed = train_classifier(turned, side, y[:, 1].long(), epochs=40, lr=1e-2, mirror=True)[-1]
    assert learned < 0.2
    assert guessed > 0.5


def test_frozen_parameters_stay() -> None:
    x, y = bars(32)
    net = network()
    net[1].requires_grad_(False)
    before = net[1].weight.clone()
    train_classifier(net, x, y, epochs=2)
    assert torch.equal(net[1].weight, before)
    assert not net[1].weight.requires_grad


def test_a_last_step_of_one_image_is_left_out() -> None:
    x, y = bars(33)
    train_classifier(network(), x, y, epochs=1, batch_size=32)  # batch normalisation refuses one


def test_what_cannot_be_is_refused() -> None:
    x, y = bars(8)
    with pytest.raises(InputError, match=r"argument `labels` to be labels \(8,\) or \(8, K\)"):
        train_classifier(network(), x, y[:5], epochs=1)
    with pytest.raises(InputError, match=r"of shape \(8, 2\) like the network's outputs"):
        train_classifier(network(), x, torch.zeros(8, 3).bool(), epochs=1)
    with pytest.raises(InputError, match="class indices below 2"):
        train_classifier(network(), x, torch.full((8,), 2), epochs=1)
    with pytest.raises(InputError, match="0 and 1"):
        train_classifier(network(1), x, torch.full((8,), 2), epochs=1)
    with pytest.raises(ArgumentError, match="argument `epochs`"):
        train_classifier(network(), x, y, epochs=0)
    with pytest.raises(ArgumentError, match="argument `lr`"):
        train_classifier(network(), x, y, epochs=1, lr=0.0)
