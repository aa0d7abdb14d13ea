"""What a signature sees of an image: gradients against closed forms and finite differences, effects against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _toy import classifier, patterns
from torch import Tensor, nn

from ce_plugin.detection.probes import View, effects_on_logits, leading_logits, margin_under, outcome_names
from ce_plugin.interventions import Smooth


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_of_a_linear_network_is_the_difference_of_two_rows() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double().eval()
    x = drawn(5, 1, 3, 4).sigmoid()
    with torch.no_grad():
        view = View(net, x)
        gradient, margin = view.gradient(), view.margin()
    order = net(x).argsort(1, descending=True)
    wanted = net[1].weight[order[:, 0]] - net[1].weight[order[:, 1]]
    torch.testing.assert_close(gradient.flatten(1), wanted.detach())
    logits = net(x).sort(1, descending=True).values.detach()
    torch.testing.assert_close(margin, logits[:, 0] - logits[:, 1])
    assert torch.equal(view.predicted, order[:, 0])
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not gradient.requires_grad
    assert not x.requires_grad


def test_for_an_attacker_the_gradient_has_a_gradient() -> None:
    net = classifier()
    x = torch.as_tensor(patterns(2)[0]).double().requires_grad_()

    def looked_at(images: Tensor) -> Tensor:
        view = View(net, images)
        return view.gradient().flatten(1).square().sum(1) + view.margin() + view.do(Smooth.gauss(1.0)).square().sum(1)

    assert torch.autograd.gradcheck(looked_at, x)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_gradient_is_computed_once_and_answers_are_widened() -> None:
    calls = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier(dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            found: Tensor = self.net(x)
            return found

    view = View(Counted(), torch.as_tensor(patterns(3)[0]).bfloat16())
    assert torch.equal(view.gradient(), view.gradient())
    assert calls == [3, 3]  # the idle run, and one for the gradient
    assert view.logits.dtype == view.gradient().dtype == view.margin().dtype == torch.float32


@pytest.mark.parametrize("n_classes", [2, 20])
def test_with_few_classes_effects_are_differences(n_classes: int) -> None:
    do, idle = drawn(4, n_classes), drawn(4, n_classes, seed=1)
    assert torch.equal(effects_on_logits(do, idle), do - idle)
    assert torch.equal(leading_logits(idle), idle)


def test_with_many_classes_effects_are_those_of_the_leading_ones() -> None:
    """Each column once more, image by image in numpy."""
    do, idle = drawn(6, 30) * 3, drawn(6, 30, seed=1) * 3
    found = effects_on_logits(do, idle).numpy()
    for row, after, before in zip(found, do.numpy(), idle.numpy(), strict=True):
        order = np.argsort(-before)
        np.testing.assert_allclose(row[:9], (after - before)[order[:9]])
        others = np.arange(30) != order[0]
        assert row[9] == pytest.approx(after[others].max() - before[others].max())
        together = [np.log(np.exp(values[others]).sum()) for values in (after, before)]
        assert row[10] == pytest.approx(together[0] - together[1])
    np.testing.assert_array_equal(leading_logits(idle), np.sort(idle.numpy(), 1)[:, ::-1][:, :9])


def test_effects_of_many_classes_do_not_ask_what_classes_are_called() -> None:
    do, idle, order = drawn(3, 25), drawn(3, 25, seed=1), torch.randperm(25, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(effects_on_logits(do[:, order], idle[:, order]), effects_on_logits(do, idle))


@pytest.mark.parametrize("n_classes", [2, 20, 21, 30])
def test_every_column_has_a_name(n_classes: int) -> None:
    names = outcome_names(n_classes, "class {}".format)
    assert len(names) == effects_on_logits(drawn(1, n_classes), drawn(1, n_classes)).shape[1]
    assert len(set(names)) == len(names)


def test_margin_under_is_that_of_the_idle_answer() -> None:
    do, idle = drawn(5, 3, 4), drawn(5, 4, seed=1)
    found = margin_under(do, idle)
    for image in range(5):
        k = int(idle[image].argmax())
        for run in range(3):
            rivals = np.delete(do[image, run].numpy(), k)
            assert float(found[image, run]) == pytest.approx(float(do[image, run, k]) - rivals.max())
