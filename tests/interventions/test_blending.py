"""do(domain = M): what it sets, that it depends on (seed, id) alone, and its effects against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ce_plugin import CausalEffect, CausalMediation
from ce_plugin.datasets import data_folder as folder_of
from ce_plugin.datasets import imagenet_samples, mnist
from ce_plugin.designs import OneAtATime
from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.interventions import Blend

PHOTOGRAPHS = [(torch.arange(3 * h * w).reshape(3, h, w) % 256).to(torch.uint8) for h, w in ((40, 30), (28, 28))]


def test_black_becomes_a_patch_and_white_its_negative() -> None:
    black, white = torch.zeros(20, 3, 28, 28), torch.ones(20, 3, 28, 28)
    do_domain = Blend(PHOTOGRAPHS)
    patches = do_domain(black, ids=range(20))
    places = {
        (k, top, left): photograph[:, top : top + 28, left : left + 28] / 255.0
        for k, photograph in enumerate(PHOTOGRAPHS)
        for top in range(photograph.shape[1] - 27)
        for left in range(photograph.shape[2] - 27)
    }
    drawn = {next(where for where, p in places.items() if torch.equal(p, patch)) for patch in patches}
    assert {k for k, *_ in drawn} == {0, 1}
    assert len(drawn) > 10
    torch.testing.assert_close(do_domain(white, ids=range(20)), 1 - patches)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    x = torch.rand(5, 3, 28, 28)
    do_domain = Blend(torch.rand(4, 3, 32, 32))
    every = do_domain(x, ids=range(5), seed=3)
    for k in range(5):
        assert torch.equal(do_domain(x[k : k + 1], ids=[k], seed=3)[0], every[k])
    assert not torch.equal(do_domain(x, ids=range(5), seed=4), every)
    assert do_domain(x[:0], ids=[]).shape == (0, 3, 28, 28)


def test_grey_photographs_bytes_and_model_units() -> None:
    grey = (torch.rand(1, 1, 30, 30) * 255).to(torch.uint8)
    x = torch.rand(2, 3, 28, 28)
    as_bytes = Blend(grey)(x, ids=[0, 1])
    torch.testing.assert_close(as_bytes, Blend(grey / 255.0)(x, ids=[0, 1]))
    normalised = Blend(grey, normalization=(0.5, 0.25))((x - 0.5) / 0.25, ids=[0, 1])
    torch.testing.assert_close(normalised * 0.25 + 0.5, as_bytes)


def test_effects_of_the_domain_equal_brute_force() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    x, do_domain = torch.rand(2, 3, 8, 8, dtype=torch.float64), Blend(torch.rand(3, 3, 12, 12))
    other = do_domain(x, ids=[0, 1])
    strokes = (x.mean(1, keepdim=True) > 0.5).long()
    estimate = CausalEffect(net, do_domain, OneAtATime(), outcome="logit").estimate(x, feature_mask=strokes, ids=[0, 1])
    for unit in (0, 1):
        changed = net(torch.where(strokes == unit, other, x)) - net(x)
        torch.testing.assert_close(estimate.effect[:, unit].double(), changed, atol=1e-6, rtol=0)
    through = CausalMediation(net, "1", do_domain).estimate(x, ids=[0, 1])
    torch.testing.assert_close(through.total.double(), net(other) - net(x), atol=1e-6, rtol=0)


def test_what_it_refuses() -> None:
    with pytest.raises(ArgumentError, match="`photographs` to be one or more, but got none"):
        Blend([])
    for wrong in ([torch.zeros(28, 28)], [torch.zeros(4, 28, 28)], [torch.full((3, 28, 28), 2.0)], ["a.jpg"]):
        with pytest.raises(ArgumentError, match=r"`photographs` to be bytes \(C, H, W\)"):
            Blend(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"can cover, but got shape \(1, 1, 28, 28\)\. Repeat grey pictures"):
        Blend(PHOTOGRAPHS)(torch.zeros(1, 1, 28, 28))
    with pytest.raises(InputError, match="that a photograph"):
        Blend(PHOTOGRAPHS)(torch.zeros(1, 3, 41, 28))
    with pytest.raises(InputError, match=r"float images \(N, C, H, W\)"):
        Blend(PHOTOGRAPHS)(torch.zeros(3, 28, 28))


def test_digits_and_photographs(data_folder: object) -> None:
    digits, _ = mnist(folder_of("mnist"), "test")
    files = imagenet_samples(folder_of("imagenet-samples"))
    x = digits[:20].expand(-1, 3, -1, -1)
    other = Blend([files[k][0] for k in range(5)])(x, ids=range(20))
    assert 0 <= other.min() < other.max() <= 1
    assert (other - x).abs().mean() > 0.2  # most of a digit's picture is black, most of a photograph is not
