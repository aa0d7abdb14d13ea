"""Denoise: the denoiser is called in image units, its gradient is kept, and what it may not return is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect
from ce_plugin.errors import ArgumentError, InputError
from ce_plugin.interventions import Context, Denoise


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape or (2, 3, 5, 4), generator=generator, dtype=torch.float64)


def test_the_denoiser_sees_image_units_and_the_model_gets_its_own() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    shaped = [torch.tensor(numbers, dtype=torch.float64).reshape(1, 3, 1, 1) for numbers in (mean, std)]
    seen: list[Tensor] = []

    def darker(image: Tensor) -> Tensor:
        seen.append(image)
        return image.square()

    x = images()
    found = Denoise(darker, normalization=(mean, std))((x - shaped[0]) / shaped[1])
    torch.testing.assert_close(seen[0], x, atol=1e-7, rtol=0)
    torch.testing.assert_close(found, (x.square() - shaped[0]) / shaped[1], atol=1e-6, rtol=0)


def test_the_gradient_goes_through_the_denoiser() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()).double().eval()
    denoise, x = Denoise(network), images().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: denoise.values(x, Context(ids=(0, 1))), x)


def test_what_comes_back_is_of_the_type_of_the_input() -> None:
    found = Denoise(lambda image: image.float() / 2)(images().half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, images().half() / 2)


def test_it_is_an_intervention_like_any_other() -> None:
    """On a linear network a pixel's contribution is known, and stands in each of its channels."""
    weights = torch.linspace(-1, 1, 60, dtype=torch.float64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 2, bias=False)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([weights, -weights]))
    x = images()
    found = CausalEffect(network, Denoise(lambda image: image / 4), outcome="logit").attribute(x, target=0)
    torch.testing.assert_close(found[:, 0], 0.75 * (x * weights.reshape(3, 5, 4)).sum(1))
    assert Denoise(lambda image: image, forward_equivalents=3).forward_equivalents == 3


def test_another_shape_and_what_is_no_denoiser_are_refused() -> None:
    with pytest.raises(InputError, match=r"`denoiser` to be one that returns images of shape \(2, 3, 5, 4\), but got"):
        Denoise(lambda image: image[:, :1])(images())
    with pytest.raises(ArgumentError, match="`denoiser` to be a network or function of images, but got str"):
        Denoise(json.dumps("not callable"))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`forward_equivalents` to be a number of passes, 0 or more, but got -1"):
        Denoise(nn.Identity(), forward_equivalents=-1)
    assert repr(Denoise(nn.Identity())) == "Denoise(Identity)"
