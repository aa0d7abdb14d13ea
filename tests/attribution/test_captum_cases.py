"""Captum's own test cases through our class: the same numbers, and the same manners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation, NoiseTunnel, Occlusion
from captum.metrics import infidelity, sensitivity_max
from captum.robust import AttackComparator, MinParamPerturbation
from torch import Tensor, nn

from ce_plugin import CausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.interventions import Adversarial, PixelMask

WHERE = "captum's wheels hold its test cases from version 0.9"
config = pytest.importorskip("captum.testing.attr.helpers.test_config", reason=WHERE).config
models = pytest.importorskip("captum.testing.helpers.basic_models", reason=WHERE)

CASES = [
    pytest.param(case, algorithm, id=f"{case['name']}-{algorithm.__name__}")
    for case in config
    for algorithm in case["algorithms"]
    if algorithm in (FeatureAblation, Occlusion) and not case.get("noise_tunnel")
]


def ours(case: dict[str, Any]) -> CausalEffect:
    return CausalEffect(case["model"], PixelMask("zero"), OneAtATime(), outcome=None)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_the_cases_are_there() -> None:
    assert len(CASES) == 14
    assert {case.values[1] for case in CASES} == {FeatureAblation, Occlusion}


@pytest.mark.parametrize(("case", "algorithm"), CASES)
def test_same_numbers(case: dict[str, Any], algorithm: type) -> None:
    args = copy.deepcopy(case["attribute_args"])
    theirs = algorithm(case["model"]).attribute(**args)
    found = ours(case).attribute(**copy.deepcopy(case["attribute_args"]))
    assert isinstance(found, tuple) == isinstance(theirs, tuple)
    for a, b in zip(as_tuple(found), as_tuple(theirs), strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5


@pytest.mark.parametrize(("case", "algorithm"), CASES)
def test_batch_equals_singles(case: dict[str, Any], algorithm: type) -> None:
    args = case["attribute_args"]
    inputs = as_tuple(args["inputs"])
    n = len(inputs[0])
    together = as_tuple(ours(case).attribute(**args))
    for i in range(n):
        single = {key: _one(value, i, n, key) for key, value in args.items()}
        for a, b in zip(as_tuple(ours(case).attribute(**single)), together, strict=True):
            assert torch.allclose(a[0], b[i], atol=1e-5)


def _one(value: Any, i: int, n: int, key: str) -> Any:
    """The i-th example's share of an argument of n examples."""
    if key in ("sliding_window_shapes", "strides", "perturbations_per_eval"):
        return value
    if isinstance(value, Tensor):
        return value[i : i + 1] if value.dim() and len(value) == n and n > 1 else value
    if isinstance(value, tuple) and key != "target":
        return tuple(_one(v, i, n, key) for v in value)
    if isinstance(value, list):
        return [value[i]]
    return value


@pytest.mark.parametrize(("case", "algorithm"), CASES)
def test_no_hook_is_left(case: dict[str, Any], algorithm: type) -> None:
    def broken(*args: Any) -> Tensor:
        case["model"](*args)
        raise RuntimeError("broken on purpose")

    ours(case).attribute(**case["attribute_args"])
    with pytest.raises(RuntimeError, match="on purpose"):
        CausalEffect(broken, outcome=None).attribute(**case["attribute_args"])
    for module in case["model"].modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


def test_noise_tunnel_without_noise_is_the_attribution() -> None:
    net, x = models.BasicModel_MultiLayer(), torch.randn(3, 3)
    explainer = CausalEffect(net, outcome=None)
    tunnel = NoiseTunnel(explainer).attribute(x, nt_samples=3, stdevs=0.0, target=1, nt_type="smoothgrad")
    assert torch.allclose(tunnel, explainer.attribute(x, target=1), atol=1e-5)


def test_infidelity_of_a_linear_network_is_zero() -> None:
    net, x = nn.Linear(4, 2), torch.randn(2, 4)

    def perturb(inputs: Tensor, baselines: Tensor) -> tuple[Tensor, Tensor]:
        flips = (torch.rand_like(inputs) < 0.5).float()
        # For a local (not multiplied) attribution, infidelity wants the perturbation itself, here in units of x.
        return flips, inputs * (1 - flips)

    contribution = CausalEffect(net, outcome=None).attribute(x, target=1)
    value = infidelity(net, perturb, x, contribution, baselines=torch.zeros_like(x), target=1)
    assert float(value.abs().max()) < 1e-8


def test_sensitivity_max_runs() -> None:
    net, x = models.BasicModel_ConvNet(), torch.rand(2, 1, 10, 10)
    explainer = CausalEffect(net, outcome=None)
    value = sensitivity_max(explainer.attribute, x, target=1, n_perturb_samples=2)
    assert value.shape == (2,)
    assert bool(torch.isfinite(value).all())


def test_attack_comparator_runs_our_interventions() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4)
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([5.0, 0.0, 0.0]))  # class 0 is the answer
    comparator = AttackComparator(net, metric=lambda out: out.log_softmax(1)[:, 0])
    comparator.add_attack(PixelMask("mean"), "mean")
    comparator.add_attack(Adversarial.fgsm(net, eps=0.1), "fgsm")
    result = comparator.evaluate(x)
    assert torch.allclose(result["mean"]["mean"], net(PixelMask("mean")(x)).log_softmax(1)[:, 0], atol=1e-5)
    assert bool((result["fgsm"]["mean"] < result["Original"]).all())


def test_min_param_perturbation_finds_the_smallest_share() -> None:
    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            light = x.flatten(1).mean(1)
            return torch.stack([light, torch.full_like(light, 0.5)], 1)

    def correct(out: Tensor, target: Tensor | int) -> Tensor:
        return out.argmax(1) == target

    search = MinParamPerturbation(
        Bright(), PixelMask("zero"), arg_name="p", arg_min=0.0, arg_max=1.0, arg_step=0.05,
        correct_fn=correct,
    )  # fmt: skip
    image, least = search.evaluate(torch.ones(1, 1, 20, 20), target=0, correct_fn_kwargs={"target": 0})
    assert image is not None
    assert least == pytest.approx(0.5, abs=0.1)
