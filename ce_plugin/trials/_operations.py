"""The kinds of operations through which differences can be followed."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ce_plugin.networks.graph import out_of_place


@dataclass(frozen=True)
class Operation:
    """An operation on ``source``; ``apply`` runs it on a tensor."""

    source: Any
    apply: Callable[..., Any]


@dataclass(frozen=True)
class Pointwise(Operation):
    """Each element of the result depends on the same element of the operands (the tensors among ``source``)."""


@dataclass(frozen=True)
class Separable(Operation):
    """Channels are treated separately, and the result has the same channels.

    ``spatial`` is what is reduced: "mean" over all positions, or a padding (left, right, top, bottom).
    """

    spatial: Any = None


@dataclass(frozen=True)
class Pool(Separable):
    """Pooling by windows: "max" or "avg"."""

    form: str = "max"
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False


@dataclass(frozen=True)
class Last(Operation):
    """Only the last dimensions are mixed: normalisation or a linear map of the features of each token."""

    dims: int = 1


@dataclass(frozen=True)
class Norm(Operation):
    """Batch normalisation with fixed statistics: one affine map per channel."""

    mean: Tensor = field(default_factory=torch.Tensor)
    var: Tensor = field(default_factory=torch.Tensor)
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


@dataclass(frozen=True)
class Conv(Operation):
    """Two-dimensional convolution with zero padding."""

    weight: Tensor = field(default_factory=torch.Tensor)
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return self.weight.shape[2], self.weight.shape[3]


@dataclass(frozen=True)
class Linear(Operation):
    """A linear map of the last dimension."""

    weight: Tensor = field(default_factory=torch.Tensor)


@dataclass(frozen=True)
class View(Operation):
    """The same elements in the same order, in another shape."""


@dataclass(frozen=True)
class Cat(Operation):
    """Concatenation; ``source`` are the parts."""

    dim: int = 0


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _conv2d(
    input: Any,  # noqa: A002 - the names that PyTorch's function has
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Operation | None:
    dilation = _pair(dilation)
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if padding != "valid" and any(r % 2 for r in reach):
            return None
        padding = [0, 0] if padding == "valid" else [r // 2 for r in reach]
    options = (_pair(stride), _pair(padding), dilation, groups)
    return Conv(input, lambda x: F.conv2d(x, weight, bias, *options), weight, bias, *options)


def _max_pool2d(
    input: Any,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Operation | None:
    if return_indices:
        return None
    stride = kernel_size if stride is None or stride == [] else stride
    sizes = (_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation))

    def apply(x: Tensor) -> Tensor:
        return F.max_pool2d(x, *sizes, ceil_mode=ceil_mode)

    return Pool(input, apply, None, "max", *sizes, ceil_mode)


def _avg_pool2d(
    input: Any,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Operation:
    stride = kernel_size if stride is None or stride == [] else stride
    sizes = (_pair(kernel_size), _pair(stride), _pair(padding))

    def apply(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, *sizes, ceil_mode, count_include_pad, divisor_override)

    return Pool(input, apply, None, "avg", *sizes, (1, 1), ceil_mode)


def _adaptive_avg_pool2d(input: Any, output_size: Any) -> Operation:  # noqa: A002
    mean = "mean" if output_size in (1, (1, 1), [1, 1]) else None
    return Separable(input, lambda x: F.adaptive_avg_pool2d(x, output_size), mean)


def _adaptive_max_pool2d(input: Any, output_size: Any, return_indices: bool = False) -> Operation | None:  # noqa: A002
    return None if return_indices else Separable(input, lambda x: F.adaptive_max_pool2d(x, output_size))


def _batch_norm(
    input: Any,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Operation | None:
    if training or running_mean is None or running_var is None:
        return None

    def apply(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)

    return Norm(input, apply, running_mean, running_var, weight, bias, eps)


def _linear(input: Any, weight: Tensor, bias: Tensor | None = None) -> Operation:  # noqa: A002
    return Linear(input, lambda x: F.linear(x, weight, bias), weight)


def _mean(input: Any, dim: Any = None, keepdim: bool = False) -> Operation | None:  # noqa: A002
    dims = [dim] if isinstance(dim, int) else dim
    if dims is None or len(dims) != 2 or sorted(d % 4 for d in dims) != [2, 3]:
        return None
    return Separable(input, lambda x: x.mean(dims, keepdim), "mean")


def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Operation | None:  # noqa: A002
    if len(pad) > 4 or len(pad) % 2:
        return None
    followed = tuple(pad) + (0,) * (4 - len(pad)) if mode == "constant" and min(pad) >= 0 else None
    return Separable(input, lambda x: F.pad(x, tuple(pad), mode, value), followed)


def _layer_norm(input: Any, normalized_shape: Any, *rest: Any, **options: Any) -> Operation:  # noqa: A002
    return Last(input, lambda x: F.layer_norm(x, normalized_shape, *rest, **options), len(normalized_shape))


def _cat(tensors: Any, dim: int = 0) -> Operation:
    return Cat(tuple(tensors), lambda parts: torch.cat(parts, dim), dim)


def _view(input: Any, *args: Any, **options: Any) -> Operation:  # noqa: A002
    return View(input, lambda x: x)


def _inactive(input: Any, *args: Any, **options: Any) -> Operation | None:  # noqa: A002
    training = options["training"] if "training" in options else (args[-1] if args else None)
    return Pointwise((input,), lambda x: x) if training is False else None


def _all_of(names: str, *homes: Any) -> list[Any]:
    return [getattr(home, name) for home in homes for name in names.split() if hasattr(home, name)]


_POINTWISE_NAMES = """relu relu6 silu gelu hardswish hardsigmoid hardtanh sigmoid tanh leaky_relu elu selu celu mish
    softplus softsign logsigmoid hardshrink softshrink tanhshrink threshold clamp clip abs exp log sqrt rsqrt square
    neg negative pow add sub mul div true_divide truediv maximum minimum multiply subtract divide clone contiguous
    detach erf sin cos reciprocal expm1 log1p"""
_POINTWISE_METHODS = set(_POINTWISE_NAMES.split())
_VIEW_NAMES = "flatten reshape view squeeze unsqueeze"
_METHODS = {"mean", *_VIEW_NAMES.split()}
_BUILDERS: dict[str, Callable[..., Operation | None]] = {
    "conv2d": _conv2d,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "adaptive_max_pool2d": _adaptive_max_pool2d,
    "batch_norm": _batch_norm,
    "linear": _linear,
    "mean": _mean,
    "pad": _pad,
    "layer_norm": _layer_norm,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "dropout": _inactive,
    "dropout2d": _inactive,
    **dict.fromkeys(_VIEW_NAMES.split(), _view),
}
_FUNCTIONS = {f: build for name, build in _BUILDERS.items() for f in _all_of(name, torch, F)}
# By name, because importing torchvision takes as long as importing torch.
_STOCHASTIC_DEPTH = ("torchvision.ops.stochastic_depth", "stochastic_depth")
_POINTWISE = set(_all_of(_POINTWISE_NAMES, torch, F, operator))
_ACTIVATIONS = _all_of(
    """ReLU ReLU6 SiLU GELU Hardswish Hardsigmoid Hardtanh Sigmoid Tanh LeakyReLU ELU SELU CELU Mish Softplus Softsign
    LogSigmoid Hardshrink Softshrink Tanhshrink Threshold Identity""",
    nn,
)
_UPSAMPLINGS = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
_PADDINGS: dict[type[nn.Module], str] = {
    nn.ZeroPad2d: "constant",
    nn.ConstantPad2d: "constant",
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
}
# What a module is as a function, and which of its attributes are the function's arguments.
_MODULES: dict[type[nn.Module], tuple[Callable[..., Operation | None], str]] = {
    nn.Conv2d: (_conv2d, "weight bias stride padding dilation groups"),
    nn.MaxPool2d: (_max_pool2d, "kernel_size stride padding dilation ceil_mode return_indices"),
    nn.AvgPool2d: (_avg_pool2d, "kernel_size stride padding ceil_mode count_include_pad divisor_override"),
    nn.AdaptiveAvgPool2d: (_adaptive_avg_pool2d, "output_size"),
    nn.AdaptiveMaxPool2d: (_adaptive_max_pool2d, "output_size return_indices"),
    nn.BatchNorm2d: (_batch_norm, "running_mean running_var weight bias training eps"),
    nn.BatchNorm1d: (_batch_norm, "running_mean running_var weight bias training eps"),
    nn.BatchNorm3d: (_batch_norm, "running_mean running_var weight bias training eps"),
    nn.Linear: (_linear, "weight bias"),
    nn.LayerNorm: (_layer_norm, "normalized_shape weight bias eps"),
    nn.Flatten: (_view, ""),
}


def _of_module(module: Any, x: Any) -> Operation | None:
    kind = type(module)
    inactive = kind in (nn.Dropout, nn.Dropout2d) and not module.training
    if kind in _ACTIVATIONS or inactive or (kind is nn.PReLU and module.num_parameters == 1):
        return Pointwise((x,), lambda value: out_of_place(module, (value,), {}))
    if kind in _UPSAMPLINGS:
        return Separable(x, module.forward)
    if kind in _PADDINGS:
        return _pad(x, module.padding, _PADDINGS[kind], getattr(module, "value", None))
    if kind in _MODULES and getattr(module, "padding_mode", "zeros") == "zeros":
        build, names = _MODULES[kind]
        return build(x, **{name: getattr(module, name) for name in names.split()})
    return None


def resolve(node: fx.Node, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """What a node does, if differences can be followed through it; None where it is to be run densely.

    Modules with hooks are run densely, so that their hooks see what they would see.
    """
    try:
        if module is not None:
            hooked = module._forward_hooks or module._forward_pre_hooks
            return None if hooked or len(args) != 1 or kwargs else _of_module(module, args[0])
        if node.op == "call_function":
            if node.target in _POINTWISE:
                return _elementwise(node.target, args, kwargs)
            home = getattr(node.target, "__module__", None), getattr(node.target, "__name__", None)
            build = _inactive if home == _STOCHASTIC_DEPTH else _FUNCTIONS.get(node.target)
            return build(*args, **kwargs) if build else None
        name = str(node.target)
        if name in _POINTWISE_METHODS:
            return _elementwise(lambda first, *rest, **options: getattr(first, name)(*rest, **options), args, kwargs)
        return _BUILDERS[name](*args, **kwargs) if name in _METHODS else None
    except TypeError:  # called in a way that the functions above do not foresee
        return None


def _elementwise(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    """Operands are the positional arguments; a tensor among the options would not be followed."""
    if any(not isinstance(value, (int, float, bool, str, type(None))) for value in kwargs.values()):
        raise TypeError("only numbers are options of an elementwise operation")
    return Pointwise(args, lambda *operands: function(*operands, **kwargs))
