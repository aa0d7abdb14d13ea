"""A simulated device that has no float64, as Apple's MPS has none: run as a script, it prints what each call gave.

With ``--float64`` it has it, as CUDA has: no tensor of the CPU may get among those of the device then either.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "single"
# What a real device takes together with tensors of the CPU.
_MIXED = {"index.Tensor", "index_put_.default", "index_put.default", "copy_.default", "_to_copy.default"}


class OnDevice(Tensor):
    """A tensor of the device; its values are computed on the CPU."""

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> OnDevice:
        if raw.dtype in (torch.float64, torch.complex128) and "--float64" not in sys.argv:
            raise TypeError("Cannot convert a tensor of this device to float64 dtype as it has none.")
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            layout=raw.layout, device=torch.device(DEVICE, 0), requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, raw: Tensor, requires_grad: bool = False) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"OnDevice({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: of tensors of the device, or that makes one."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [one for one in tensors if isinstance(one, OnDevice)]
    name = str(func).removeprefix("aten.")
    wanted = kwargs.get("device")
    away = wanted is not None and torch.device(wanted).type != DEVICE
    onto = wanted is not None and not away
    if here and name not in _MIXED and any(not isinstance(one, OnDevice) and one.dim() for one in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device ({name})")
    if onto:
        kwargs = {**kwargs, "device": "cpu"}
    raw_args, raw_kwargs = tree_map_only(OnDevice, lambda one: one.raw, (args, kwargs))
    out = func(*raw_args, **raw_kwargs)
    if name == "copy_.default" and not isinstance(args[0], OnDevice):
        return args[0]
    if not (onto or here) or away or (name == "_to_copy.default" and not onto and not here):
        return out
    copied = name == "_to_copy.default"
    if copied and raw_args[0] is out:
        out = out.clone()
    wrapped = tree_map_only(Tensor, OnDevice, out)
    return wrapped if copied or onto else return_and_correct_aliasing(func, args, kwargs, wrapped)


class Device(TorchDispatchMode):
    """Inside, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Constructors(TorchFunctionMode):
    """Of lists, tensors are made, also as indices, before any class or mode is asked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            made = func(*args, **{**kwargs, "device": None})
            return made if isinstance(made, OnDevice) else OnDevice(made)
        if func is Tensor.tolist:
            return func(*tree_map_only(OnDevice, lambda one: one.raw, args))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = tuple(torch.tensor(list(one)) if isinstance(one, (list, range)) else one for one in index)
            args = (args[0], lists, *args[2:])
        return func(*args, **kwargs)


def moved(value: Any) -> Any:
    """Tensors, and the networks' parameters and buffers, on the device."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(moved(parameter.detach()))
            for name, buffer in module._buffers.items():
                module._buffers[name] = moved(buffer)
        return value
    return tree_map(lambda one: OnDevice(one.clone()) if isinstance(one, Tensor) else one, value)


class Net(nn.Module):
    """Two layers and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def calls() -> dict[str, Callable[[Any], Any]]:
    """Name of a call -> the call, which is given a function that moves networks and tensors to the device."""
    from ce_plugin import CausalEffect, CausalEffectMap, CausalMediation, ExpectedCausalEffect, LayerCausalEffect
    from ce_plugin.concepts import train_autoencoder
    from ce_plugin.designs import Joint, OneAtATime, RandomMask, RandomRegions
    from ce_plugin.detection import CausalEffectDetector, CounterAttack, Signature, Smoothing
    from ce_plugin.effects import interactions, pairwise
    from ce_plugin.evaluation import insertion_deletion
    from ce_plugin.interventions import Adversarial, MeanOut, PixelMask, Resample, Smooth

    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    made = Net().eval()
    made.head.weight.data *= 20
    made.head.bias.data -= made(torch.rand(90, 1, 8, 8, generator=draw)).mean(0).detach()
    weights = {name: value.clone() for name, value in made.state_dict().items()}
    x, many = torch.rand(2, 1, 8, 8, generator=draw), torch.rand(90, 1, 8, 8, generator=draw)

    def net(to: Any) -> nn.Module:
        own = Net().eval()
        own.load_state_dict(weights)
        return to(own)

    def inferred(estimate: Any) -> list[Tensor]:
        found = [estimate.effect, estimate.std_error, *estimate.confidence_interval(), estimate.p_values()]
        return [*found, estimate.significant(0.5), estimate.effect.where(estimate.significant(0.5), 0.0)]

    mask = PixelMask("zero")

    def at_random(estimator: str) -> Callable[[Any], Any]:
        design = RandomMask(0.4, n_trials=60, estimator=estimator)
        return lambda to: inferred(CausalEffect(net(to), mask, design).estimate(to(x), sliding_window_shapes=(1, 2, 2),
                                                                                strides=(1, 2, 2)))  # fmt: skip

    def located(to: Any) -> Any:
        return inferred(CausalEffect(net(to), mask, RandomRegions(n_trials=60)).estimate(to(x)))

    def mediation(to: Any) -> Any:
        found = CausalMediation(net(to), "second", 1 - to(x)).estimate(to(x))
        return [*found.column(), found.interaction]

    def detector(to: Any) -> Any:
        signature = Signature([CounterAttack(), Smoothing("blur", [Smooth.gauss(1.0)])])
        found = CausalEffectDetector(net(to), signature)
        found.fit(to(many))
        leaf = to(x).requires_grad_()
        scores = found.score_tensor(leaf)
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        return [torch.as_tensor(found.score(to(x))), scores, gradient]

    def over_images(to: Any) -> Any:
        network = net(to)
        metric = ExpectedCausalEffect(LayerCausalEffect(network, "second", outcome="log_odds"))
        metric.to(next(network.parameters()).device)
        metric.update(to(many), ids=range(90))
        answer = metric.compute()
        return [answer.effect, answer.std_error, *answer.confidence_interval()]

    outcome = {"outcome": "log_odds"}
    return {
        "the default": lambda to: inferred(CausalEffect(net(to)).estimate(to(x))),
        "attribute": lambda to: CausalEffect(net(to), mask, OneAtATime()).attribute(to(x), target=1),
        "significant only": lambda to: CausalEffect(net(to)).attribute(to(x), significant_only=0.5),
        "difference in means": at_random("difference_in_means"),
        "adjusted": at_random("adjusted"),
        "located": located,
        "nodes": lambda to: LayerCausalEffect(net(to), "second", **outcome).estimate(to(x)).effect,
        "nodes at random": lambda to: inferred(
            LayerCausalEffect(net(to), "second", None, RandomMask(0.5, n_trials=40), **outcome).estimate(to(x))
        ),
        "windows": lambda to: LayerCausalEffect(net(to), "first").estimate(to(x), target=1).effect,
        "mean of a reference": lambda to: LayerCausalEffect(net(to), "first", MeanOut(to(many))).estimate(to(x)).effect,
        "resampling": lambda to: LayerCausalEffect(net(to), "first", Resample(to(many), 3)).estimate(to(x)).effect,
        "effect map": lambda to: CausalEffectMap(net(to), "second").attribute(to(x)),
        "effect map by activation": lambda to: CausalEffectMap(net(to), "second", weighting="activation").attribute(
            to(x)
        ),
        "pairs": lambda to: LayerCausalEffect(net(to), "second", None, Joint.pairs(range(6))).estimate(to(x)).effect,
        "interactions": lambda to: interactions(
            to(torch.rand(80, 3, generator=torch.Generator().manual_seed(0)) < 0.5),
            to(torch.rand(80, 2, generator=torch.Generator().manual_seed(1))), [(0, 1)], 0.5,
        ).effect,
        "screened pairs": lambda to: pairwise(
            lambda a: a[:, 0] - 2 * a[:, 70] * a[:, 99], 100, device=to(x).device, top=3
        ).interaction,
        "mediation": mediation,
        "attack": lambda to: CausalEffect(net(to), Adversarial.fgsm(net(to), eps=0.1)).estimate(to(x)).effect,
        "concepts": lambda to: train_autoencoder(
            net(to), "second", to(many), 2, epochs=2, batch_size=30
        ).fidelity.outcome_change,
        "insertion and deletion": lambda to: insertion_deletion(
            net(to), to(x), to(x), [0, 1], {"zero": to(torch.zeros_like(x))}
        ).score,
        "detector": detector,
        "over images": over_images,
    }  # fmt: skip


def main() -> dict[str, str]:
    """What became of each call: "equal" to its result on the CPU, or what went wrong."""
    # In inference mode tensors of other classes are not handed to their class.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()  # type: ignore[misc, assignment]
    _setup_privateuseone_for_python_backend(DEVICE)
    return {name: _outcome(call) for name, call in calls().items()}


def _outcome(call: Callable[[Any], Any]) -> str:
    try:
        on_cpu = call(lambda value: value)
        with Constructors(), Device():
            there = call(moved)
        pairs = zip(tree_leaves(on_cpu), tree_leaves(there), strict=True)
        values = [(_values(one), _values(other)) for one, other in pairs]
        same = all(torch.allclose(*pair, rtol=1e-3, atol=1e-5, equal_nan=True) for pair in values)
        return "equal" if same else f"{on_cpu} became {there}"
    except Exception:
        return traceback.format_exc()


def _values(one: Any) -> Tensor:
    tensor = one.raw if isinstance(one, OnDevice) else torch.as_tensor(one)
    return tensor.detach().double()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main()))
