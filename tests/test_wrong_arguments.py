"""Every wrong argument has an error of ours, before the network is run, and the code in its hint works."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin import CausalEffect, CausalEffectMap, CausalMediation, LayerCausalEffect
from ce_plugin.designs import Joint, OneAtATime, RandomMask, RandomRegions, RandomWindows
from ce_plugin.effects import Estimate, carried, nested_sets, next_sizes, pairwise, ranking
from ce_plugin.effects.smooth import smooth
from ce_plugin.errors import (
    ArgumentError,
    CEPluginError,
    DesignError,
    InferenceError,
    InputError,
    ModelError,
    OutcomeError,
    TargetError,
    UnitError,
    UnknownNameError,
)
from ce_plugin.interventions import MeanOut, Patch, PixelMask, Resample, Smooth
from ce_plugin.interventions.smoothing import Denoise
from ce_plugin.models import Framing, VisionModel
from ce_plugin.sites import Evidence, InputSite, LayerSite, patch_grid
from ce_plugin.visualization import overlay, plot_nodes, sheet, signal, spotlight

Call = Callable[[], Any]


class Counting(nn.Module):
    """A small classifier of images that counts its passes."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        Counting.passes += 1
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


NET = Counting().eval()
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Z: Any = (PixelMask("zero"), OneAtATime())
NAN = float("nan")
FOUND = Estimate(
    effect=torch.zeros(2, 4, 3), reference=torch.zeros(2, 3), class_shape=(3,), std_error=torch.ones(2, 4, 3),
    predicted=torch.zeros(2, dtype=torch.long), assignments=torch.zeros(2, 6, 4, dtype=torch.bool), p=0.5,
    outcomes=torch.zeros(2, 6, 3),
)  # fmt: skip


def anyhow(value: Any) -> Any:
    """The value as it is; what mypy would refuse is what is tested."""
    return value


def effect(**options: Any) -> CausalEffect:
    return CausalEffect(NET, **options)


def attribute(**arguments: Any) -> Call:
    return lambda: CausalEffect(NET, *Z).attribute(**{"inputs": X, "target": 0} | arguments)


def estimate(**arguments: Any) -> Call:
    return lambda: CausalEffect(NET, PixelMask(), RandomMask(0.5, 20)).estimate(**{"inputs": X} | arguments)


def at_layer(**arguments: Any) -> Call:
    return lambda: LayerCausalEffect(NET, "conv").attribute(**{"inputs": X, "target": 0} | arguments)


def cem(**arguments: Any) -> Call:
    return lambda: CausalEffectMap(NET, "conv").attribute(**{"inputs": X, "target": 0} | arguments)


def mediation(**arguments: Any) -> Call:
    return lambda: CausalMediation(NET, "conv", PixelMask()).estimate(**{"inputs": X} | arguments)


def carriers(**arguments: Any) -> Call:
    every = {"choosing": X, "testing": X / 2} | arguments
    return lambda: CausalMediation(NET, "conv", PixelMask()).carriers(**every)


def each(name: str, make: Callable[..., Any], values: list[Any], error: type[Exception], match: str = "") -> list[Any]:
    """One row for each wrong value of an argument."""
    rows = []
    for value in values:

        def call(value: Any = value) -> Any:
            made = make(**{name: value})
            return made() if isinstance(made, FunctionType) else made

        rows.append((call, error, match or f"`{name}`"))
    return rows


WRONG: list[tuple[Call, type[Exception], str]] = [
    # Constructors.
    *each("seed", effect, ["a", None, 1.5, True, NAN, [1], (0,), 1j], ArgumentError),
    *each("memory_budget", effect, ["1GB", 0, -1, 1.5, True, [1]], ArgumentError),
    *each("engine", effect, ["fast", None, 3, "FULL"], UnknownNameError),
    *each("outcome", effect, ["logits", "", "prob"], UnknownNameError),
    *each("outcome", effect, [3, [1], 0.5], OutcomeError),
    *each("intervention", effect, ["zero", 0.0, PixelMask, torch.zeros(1)], ArgumentError),
    *each("design", effect, ["random", 0.5, RandomMask, 3], ArgumentError),
    *each("output", effect, [1.5, [], [1, 2], object()], ArgumentError),
    *each("normalization", effect, ["a", 3, (1,), (0.0, 0.0), (0.0, -1.0), ("a", "b"), (NAN, 1.0)], ArgumentError),
    *each("forward_func", CausalEffect, [None, 3, "resnet", Counting, X, VisionModel], ModelError),
    *each("layer", lambda layer: LayerCausalEffect(NET, layer), [None, 3, 1.5, ["conv"]], ArgumentError),
    *each("layer", lambda layer: LayerCausalEffect(NET, layer), ["convv", "", "conv.0"], UnknownNameError),
    (lambda: LayerCausalEffect(NET, nn.Conv2d(3, 4, 3)), ModelError, "`layer`"),
    (lambda: LayerCausalEffect(lambda x: x, "conv"), ModelError, "`forward_func`"),
    *each(
        "weighting", lambda weighting: CausalEffectMap(NET, "conv", weighting=weighting), ["a", None], UnknownNameError
    ),
    (lambda: CausalEffectMap(NET, "conv", outcome="prediction_weighted"), OutcomeError, "`outcome`"),
    *each(
        "intervention", lambda intervention: CausalMediation(NET, "conv", intervention), [None, "a", 3], ArgumentError
    ),
    # Inputs.
    *each("inputs", attribute, [None, "a", 3.0, [X], {}, X.numpy(), (), X.numpy().astype("f8")], InputError),
    *each("inputs", attribute, [X.long(), X > 0, X * 1j, X[:0], torch.tensor(1.0), X * NAN, X / 0], InputError),
    *each("inputs", attribute, [X.to("meta"), X.to_sparse(), X.byte()], InputError),
    (attribute(inputs=(X, X[:1])), InputError, r"`inputs\[1\]`"),
    (attribute(inputs=(X, None)), InputError, r"`inputs\[1\]`"),
    *each("inputs", at_layer, [None, X.long(), X.to_sparse(), [X]], InputError),
    *each("inputs", cem, [None, X.long()], InputError),
    *each("inputs", mediation, [None, X.long(), (X, X)], InputError),
    # Targets.
    *each(
        "target",
        attribute,
        ["a", 1.5, True, {}, [0], [0, 1, 2], [0, "a"], [True, False], [(0, "a"), (1, 1)]],
        TargetError,
    ),
    *each(
        "target", attribute, [torch.tensor([0.5, 1.0]), torch.zeros(2, 2).long(), torch.tensor([0, 1, 2])], TargetError
    ),
    *each(
        "target",
        attribute,
        [np.array([0.5, 1.0]), np.array([[0, 1]]), np.array(["a", "b"]), np.array([0, 1, 2])],
        TargetError,
    ),
    *each("target", cem, ["a", 1.5, True, [0]], TargetError),
    # Other arguments of a call.
    *each(
        "baselines", attribute, ["a", X.numpy(), [0.0], (0.0, 0.0), NAN, X[:, :, :3], X * 1j, X.to_sparse()], InputError
    ),
    *each("layer_baselines", at_layer, ["a", (0.0, 0.0), NAN], InputError, "`baselines`"),
    *each("perturbations_per_eval", attribute, [0, -1, 1.5, "a", True, [1]], ArgumentError),
    *each("show_progress", attribute, ["yes", 1, None], ArgumentError),
    *each("keep_trials", estimate, ["yes", 1, None], ArgumentError),
    *each("attribute_to_layer_input", at_layer, ["yes", 1, None], ArgumentError),
    *each("ids", attribute, ["ab", 3, [0], [0, 1, 2], [0.5, 1], [None, 1]], InputError),
    *each("given", attribute, ["a", 3, [3], X, PixelMask], ArgumentError),
    *each("until", estimate, ["x", 0, -1, NAN, True, [1]], ArgumentError),
    (lambda: CausalEffect(NET, *Z).estimate(X, until=0.1), ArgumentError, "`until`"),
    *each("additional_forward_args", attribute, [X.to_sparse(), X.to("meta"), (1, X.to_sparse())], ArgumentError),
    (attribute(significant_only=True), InferenceError, "`significant_only`"),
    *each(
        "significant_only",
        lambda significant_only: CausalEffect(NET, PixelMask(), RandomMask(0.5, 20)).attribute(
            X, significant_only=significant_only
        ),
        ["yes", 0, 1, 2.0, -0.1, NAN, [0.05]],
        ArgumentError,
    ),
    # Units.
    *each(
        "feature_mask",
        attribute,
        ["a", 3, [[0]], torch.rand(8, 8), torch.zeros(9, 9), (torch.zeros(8, 8),) * 2],
        UnitError,
    ),
    *each(
        "sliding_window_shapes", attribute, ["a", 3, (3,), (3, 9, 9), (0, 1, 1), (3, 1.5, 1), (3, "a", 1)], UnitError
    ),
    (attribute(sliding_window_shapes=(3, 2, 2), strides="a"), UnitError, "`strides`"),
    (attribute(sliding_window_shapes=(3, 2, 2), strides=0), UnitError, "`strides`"),
    (attribute(sliding_window_shapes=(3, 2, 2), strides=3), UnitError, "`strides`"),
    (attribute(sliding_window_shapes=(3, 2, 2), strides=1.5), UnitError, "`strides`"),
    (attribute(strides=2), UnitError, "`strides`"),
    (attribute(sliding_window_shapes=(3, 2, 2), feature_mask=torch.zeros(8, 8)), UnitError, "`feature_mask`"),
    *each("cells", lambda cells: InputSite(cells=cells), [0, -1, 1.5, "a", True], UnitError),
    *each("channel_dim", lambda channel_dim: InputSite(channel_dim=channel_dim), [0, 1.5, "a", True], UnitError),
    *each(
        "channel_dim", lambda channel_dim: LayerSite("conv", channel_dim=channel_dim), [0, 1.5, "a", True], UnitError
    ),
    *each("units", lambda units: LayerSite("conv", units=units), ["channel", None, 3], UnknownNameError),
    *each(
        "n_heads", lambda n_heads: LayerSite("conv", "heads", n_heads=n_heads), [None, 0, 1.5, "a", True], ArgumentError
    ),
    *each("layer_mask", lambda layer_mask: LayerSite("conv", layer_mask=layer_mask), ["a", [0], 3], ArgumentError),
    *each(
        "reshape_transform",
        lambda reshape_transform: LayerSite("a", reshape_transform=reshape_transform),
        [3, "a"],
        ArgumentError,
    ),
    *each("call", lambda call: LayerSite("conv", call=call), [-1, 1.5, "a"], ArgumentError),
    (lambda: patch_grid(8, 8, 0), UnitError, "`cells`"),
    *each("units", lambda units: Evidence(PixelMask(), units=units), ["some", 3, [0.5], None], UnitError),
    *each("intervention", Evidence, [None, "a", 3], ArgumentError),
    (attribute(given=Evidence(PixelMask(), units=[999])), UnitError, "`units`"),
    # Designs.
    *each("p", RandomMask, ["0.1", 0, 1, -1, 2, NAN, None, True, [0.5], 1j], DesignError),
    *each("n_trials", RandomMask, [0, 1, 1.5, "a", None, True], DesignError),
    *each("seed", RandomMask, ["a", None, 1.5, True], DesignError),
    *each("balanced", RandomMask, ["yes", 1, None], DesignError),
    *each("estimator", RandomMask, ["smooth", None, 3], DesignError),
    (lambda: RandomMask(n_trials=3, antithetic=True), DesignError, "`n_trials`"),
    *each("length", RandomRegions, [0, -1, "a", None, NAN], DesignError),
    *each("sizes", RandomWindows, [(), "a", 3, (0,), (2.0,), ("a",), None], DesignError),
    *each("groups", Joint, [None, 3, [], [()], ["a"], [(0, 0)], [(-1,)], [(0.5,)]], DesignError),
    (lambda: Joint.pairs(anyhow(3)), DesignError, "`units`"),
    (lambda: Joint.pairs(anyhow("ab")), DesignError, "`units`"),
    (lambda: CausalEffect(NET, PixelMask(), Joint([(999,)])).attribute(X), DesignError, "`groups`"),
    (
        lambda: CausalEffect(NET, PixelMask(), RandomRegions()).attribute(X, feature_mask=torch.zeros(8, 8)),
        DesignError,
        "`design`",
    ),
    # Interventions.
    *each("fill", PixelMask, [(), None, "grey", [0], NAN, {}], CEPluginError),
    *each("sigma", lambda sigma: PixelMask("blur", sigma=sigma), [0, -1, "a", NAN, True], ArgumentError),
    *each(
        "region",
        lambda region: PixelMask(region=region),
        ["abcd", (1, 2), (2, 0, 1, 1), ("a", 0, 1, 1), 3, X],
        UnitError,
    ),
    *each("p", lambda p: PixelMask().perturb(X, p=p), [-1, 2, "a", NAN, True], ArgumentError),
    *each("seed", lambda seed: PixelMask().perturb(X, seed=seed), ["a", None, 1.5], ArgumentError),
    *each("variant", lambda variant: PixelMask().perturb(X, variant=variant), [1, -1, "a", 0.5], ArgumentError),
    *each("ids", lambda ids: PixelMask().perturb(X, ids=ids), ["ab", 3, [0], [0.5, 1]], InputError),
    *each("inputs", lambda inputs: PixelMask().perturb(inputs), [None, "a", torch.tensor(1.0)], InputError),
    *each("reference", MeanOut, [None, "a", 3, (), torch.tensor(1.0)], ArgumentError),
    *each("positions", lambda positions: MeanOut(X, positions=positions), ["yes", 1, None], ArgumentError),
    *each("n_donors", lambda n_donors: Resample(X, n_donors), [0, 3, 1.5, "a", True], ArgumentError),
    *each("counterpart", Patch, [None, "a", 3, ()], ArgumentError),
    *each("steps", Smooth, [3, "gauss", [], [3], [()], [("gauss",)], [("gauss", 1, 2)], None], ArgumentError),
    (lambda: Smooth([("gaus", 1.0)]), UnknownNameError, "`steps`"),
    *each("sigma", Smooth.gauss, ["a", 0, -1, NAN, None, True], ArgumentError),
    *each("size", Smooth.median, [0, 1.5, "a"], ArgumentError),
    *each("quality", Smooth.jpeg, [0, 101, 1.5, "a"], ArgumentError),
    *each(
        "value_range",
        lambda value_range: Smooth.bits(1, value_range=value_range),
        ["ab", 3, (1, 0), (0,), (0, NAN)],
        ArgumentError,
    ),
    (lambda: Smooth.chain(), ArgumentError, "`parts`"),
    (lambda: Smooth.chain(anyhow("gauss")), ArgumentError, "`parts`"),
    *each("denoiser", Denoise, [None, 3, "a"], ArgumentError),
    *each(
        "forward_equivalents",
        lambda forward_equivalents: Denoise(abs, forward_equivalents=forward_equivalents),
        [-1, "a", 0.5],
        ArgumentError,
    ),
    # Maps.
    *each("contrast", cem, [0, [0], "zzz", 1.5, [0.5], [True], [], [[1], [2], [3]], {}, ["a"]], CEPluginError),
    *each("relu_attributions", cem, ["yes", 1, None], ArgumentError),
    # Mediation.
    *each("sets", mediation, ["a", 3, [], [()], [(0, 0)], [(0.5,)]], DesignError),
    (carriers(testing=X), ArgumentError, "`testing`"),
    *each("levels", carriers, [(), "a", 0.5, (0,), ("a",)], ArgumentError),
    *each("level", carriers, ["a", 0, 1, 2, NAN], ArgumentError),
    *each("n_boot", carriers, ["a", 5, 1.5, None], ArgumentError),
    *each("targets", carriers, [3, (1,), None], ArgumentError),
    *each("ids", carriers, [3, (1,), None], ArgumentError),
    *each("top", lambda top: effect(design=OneAtATime()).interactions(X, top=top), [0, "a", 1.5], ArgumentError),
    *each("exhaustive", lambda exhaustive: effect().interactions(X, exhaustive=exhaustive), [-1, "a"], ArgumentError),
    # Results.
    *each("fdr", FOUND.significant, ["a", 0, 1, 2, NAN, None, True], ArgumentError),
    *each("level", FOUND.confidence_interval, ["a", 0, 1, 2, NAN, None, True], ArgumentError),
    *each("level", FOUND.half_width, ["a", 0, 1], ArgumentError),
    *each("level", FOUND.to_dataframe, ["a", 0, 1], ArgumentError),
    *each(
        "examples",
        lambda examples: FOUND[examples],
        ["a", 1.5, None, True, ["a"], [0.5], {}, slice("a", 1)],
        ArgumentError,
    ),
    *each("examples", lambda examples: FOUND[examples], [2, -3, [0, 9]], ArgumentError, "no example"),
    *each("pairs", FOUND.pairs, ["a", 3, [], [(0,)], [(0, "a")], [(0, 9)], [(1, 1)], [(0.5, 1)], None], UnitError),
    (lambda: FOUND.interaction, DesignError, "`design`"),
    *each("example", lambda example: FOUND.plot(example=example), [2, "a", 0.5, None], ArgumentError),
    *each("target", lambda target: FOUND.plot(target=target), [9, -1, "a", 0.5], TargetError),
    *each("top", lambda top: FOUND.plot(top=top), [0, "a", 1.5], ArgumentError),
    *each("width", lambda width: FOUND.plot(width=width), [0, "a", 1.5], ArgumentError),
    *each("fdr", lambda fdr: FOUND.plot(fdr=fdr), ["a", 0], ArgumentError),
    *each("image", lambda image: FOUND.plot(image), ["a", X[0].numpy(), X[0, 0, 0], np.zeros((8, 8, 3))], InputError),
    (lambda: FOUND.plot(torch.zeros(3, 30, 30)), UnitError, "`image`"),
    *each("order", nested_sets, [(), (0, 0)], UnitError),
    *each("sizes", lambda sizes: nested_sets((0, 1), sizes), [[0], [3], [0.5], ["a"]], UnitError),
    *each("sizes", lambda sizes: next_sizes(sizes, torch.zeros(2)), [[1], [2, 1], [0, 1], [1.5, 2]], UnitError),
    *each("mediation", ranking, [None, 3, FOUND], ArgumentError),
    (lambda: carried((0, 1), torch.ones(3, 2), torch.ones(3), levels=()), ArgumentError, "`levels`"),
    *each("n_units", lambda n_units: pairwise(lambda a: a[:, 0], n_units), [1, 0, "a", 1.5], ArgumentError),
    *each(
        "nudges", lambda nudges: pairwise(lambda a: a[:, 0], 99, nudges=nudges), [(), "a", (2,), ("a",)], ArgumentError
    ),
    (lambda: smooth(torch.zeros(9, 4) > 0, torch.zeros(9, 1), (3, 3)), UnitError, "`assignments`"),
    # Pictures.
    *each(
        "image",
        lambda image: overlay(torch.zeros(8, 8), image),
        [X[0] * 9 - 4, X[0].long(), X[0] * NAN, X[0, :2], None],
        InputError,
    ),
    *each("attribution", lambda attribution: overlay(attribution, X[0]), [None, X, X[0, 0, 0], X[0] * NAN], InputError),
    *each("scale", lambda scale: overlay(torch.zeros(8, 8), X[0], scale=scale), [0, -1, "a"], ArgumentError),
    *each("sign", lambda sign: overlay(torch.zeros(8, 8), X[0], sign=sign), ["negative", None], ArgumentError),
    (lambda: signal(torch.zeros(3), torch.zeros(2, 4)), InputError, "`attribution`"),
    (lambda: sheet([]), ArgumentError, "`rows`"),
    (lambda: sheet([[("a", X[0] * 9)]]), InputError, "`rows`"),
    (lambda: spotlight(X[0], (5, 0, 1, 1)), InputError, "`box`"),
    (lambda: plot_nodes([], {}), ArgumentError, "`labels`"),
    *each("size", Framing, ["224", 0, 1.5, None, True], ArgumentError),
    *each("resize", lambda resize: Framing(224, resize), ["256", 100], ArgumentError),
    *each(
        "interpolation", lambda interpolation: Framing(8, interpolation=interpolation), ["area", None], ArgumentError
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), WRONG)
def test_a_wrong_argument_has_an_error_of_ours_before_any_pass(call: Call, error: type[Exception], match: str) -> None:
    Counting.passes = 0
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, CEPluginError)
    assert Counting.passes == 0


def test_there_are_many_of_them() -> None:
    assert len(WRONG) >= 400


# What only a pass can tell.
LATE: list[tuple[Call, type[Exception], str]] = [
    (attribute(target=9), TargetError, "`target`"),
    (attribute(target=-9), TargetError, "`target`"),
    (attribute(target=(0, 0)), TargetError, "`target`"),
    (attribute(inputs=X[0]), InputError, r"a batch \(N, 3, ...\).*`x\[None\]`"),
    (attribute(inputs=X[0].movedim(0, -1)), InputError, r"`x.movedim\(-1, 0\)\[None\]`"),
    (attribute(inputs=X.double()), InputError, r"torch.float32, but got torch.float64. Write `x.to\(torch.float32\)`"),
    (attribute(inputs=X.half()), InputError, "torch.float32, but got torch.float16"),
    (attribute(inputs=X[:, :1]), InputError, "3 channels in dimension 1"),
    (attribute(inputs=X.movedim(1, -1)), InputError, r"`x.movedim\(-1, 1\)`"),
    (attribute(inputs=X[:, :, None]), InputError, "4 dimensions"),
    (at_layer(inputs=X[0]), InputError, r"`x\[None\]`"),
    (cem(inputs=X.double()), InputError, "torch.float64"),
    (mediation(inputs=X[:, :1]), InputError, "3 channels"),
    (cem(target=9), TargetError, "`target`"),
    (cem(contrast=9), TargetError, "`contrast`"),
    (lambda: LayerCausalEffect(NET, "conv", Patch(X[:1])).attribute(X), InputError, "`counterpart`"),
    (at_layer(layer_mask=torch.zeros(9, 9)), UnitError, "mask"),
    (lambda: LayerCausalEffect(NET, LayerSite("conv", channel_dim=9)).attribute(X), UnitError, "`channel_dim`"),
    (lambda: LayerCausalEffect(NET, LayerSite("conv", "heads", n_heads=3)).attribute(X), UnitError, "`n_heads`"),
    (lambda: LayerCausalEffect(NET, LayerSite("conv", "tokens")).attribute(X), UnitError, "`units`"),
    (lambda: CausalEffectMap(NET, "head").attribute(X), InputError, "`layer`"),
]


@pytest.mark.parametrize(("call", "error", "match"), LATE)
def test_what_a_pass_tells_is_ours_too(call: Call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, CEPluginError)


def hint(call: Call) -> str:
    """The last sentence of an error's message."""
    with pytest.raises(CEPluginError) as caught:
        call()
    return str(caught.value)


def test_hints_for_inputs_work_when_obeyed() -> None:
    explain = CausalEffect(NET, *Z)
    wrongs: list[Any] = [
        X[0], X[0].movedim(0, -1), X.double(), X.half(), X.movedim(1, -1), X.to_sparse(), X.numpy(),
        X.numpy().astype("f8"), X.tolist(), X.bool(),
    ]  # fmt: skip
    for wrong in wrongs:
        said = hint(lambda wrong=wrong: explain.attribute(wrong))
        code = said.rsplit("Write `", 1)[1].split("`")[0]
        obeyed = eval(code, {"torch": torch, "x": wrong})
        assert explain.attribute(obeyed).shape == obeyed.shape, code


def test_other_hints_work_when_obeyed() -> None:
    assert "Write `images.float() / 255`" in hint(attribute(inputs=(X * 255).byte()))
    attribute(inputs=(X * 255).byte().float() / 255)()
    assert "Write `p.to_dense()`" in hint(attribute(additional_forward_args=X.to_sparse()))
    attribute(additional_forward_args=X.to_sparse().to_dense())()
    assert "Write `torch.as_tensor(baselines)`" in hint(attribute(baselines=X.numpy()))
    attribute(baselines=torch.as_tensor(X.numpy()))()
    assert "Write `mask.long()`" in hint(attribute(feature_mask=torch.full((8, 8), 0.5)))
    attribute(feature_mask=torch.full((8, 8), 0.5).long())()
    assert "Write 'others'" in hint(cem(contrast=0)) or "or write 'others'" in hint(cem(contrast=0))
    cem(contrast="others")()
    cem(contrast=1)()
    assert "Write [0, 2]" in hint(lambda: Joint.pairs(anyhow(3)))
    Joint.pairs([0, 2])
    assert "Write [(0, 1), (0, 2)]" in hint(lambda: FOUND.pairs(anyhow("a")))
    assert "Write [(0,), (0, 1)]" in hint(mediation(sets="a"))
    mediation(sets=[(0,), (0, 1)])()
    assert "Make one: `Counting(...)`" in hint(lambda: CausalEffect(anyhow(Counting)))
    assert "use RandomMask" in hint(attribute(significant_only=True))
    CausalEffect(NET, PixelMask(), RandomMask(0.5, 40)).attribute(X, significant_only=True)
    assert "0.05 for five per cent" in hint(lambda: FOUND.significant(anyhow("a")))
    FOUND.significant(0.05)
    assert "Write 0.1 for ten per cent" in hint(lambda: RandomMask(anyhow("a")))
    RandomMask(0.1)
    assert "Write Smooth.gauss(1.0)" in hint(lambda: Smooth.chain(anyhow("gauss")))
    Smooth.chain(Smooth.gauss(1.0))
    assert "1 GB is 1 << 30" in hint(lambda: effect(memory_budget="1GB"))
    effect(memory_budget=1 << 30)
    assert "`targets=(a, b)`" in hint(carriers(targets=3))


def test_a_wrapper_of_a_network_is_advised() -> None:
    class Wrapper:
        network = NET

    assert "Pass its `.network`." in hint(lambda: CausalEffect(anyhow(Wrapper())))
    CausalEffect(Wrapper().network)


def test_hints_for_pictures_work_when_obeyed() -> None:
    flat = torch.zeros(8, 8)
    byte = (X[0] * 255).byte()
    assert "Write `image / 255`" in hint(lambda: overlay(flat, byte.float()))
    overlay(flat, byte.float() / 255)
    overlay(flat, byte)
    assert "Undo the normalisation: `x * std + mean`" in hint(lambda: overlay(flat, (X[0] - 0.5) / 0.25))
    overlay(flat, (X[0] - 0.5) / 0.25 * 0.25 + 0.5)
    pictures: list[Any] = [X[0].numpy(), X[0].movedim(0, -1).numpy(), byte.movedim(0, -1).numpy(), X[0].movedim(0, -1)]
    for image in pictures:
        said = hint(lambda image=image: overlay(flat, image))
        overlay(flat, eval(said.rsplit("Write `", 1)[1].split("`")[0], {"torch": torch, "image": image}))


def test_a_picture_is_the_same_in_bytes_and_in_floats() -> None:
    attribution, byte = torch.eye(8), (X[0] * 255).byte()
    one, other = overlay(attribution, byte), overlay(attribution, byte.double() / 255)
    assert np.array_equal(one.axes[0].images[0].get_array(), other.axes[0].images[0].get_array())


@pytest.mark.parametrize("target", [np.array([1, 2]), np.array(1), np.int64(1), [np.int64(1), np.int64(2)]])
def test_arrays_of_integers_are_targets(target: Any) -> None:
    plain = target.tolist() if isinstance(target, np.ndarray) else [int(t) for t in np.atleast_1d(np.asarray(target))]
    wanted = plain if isinstance(plain, int) or len(plain) > 1 else plain[0]
    assert torch.equal(attribute(target=target)(), attribute(target=wanted)())


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.text(max_size=3), st.binary(max_size=2),
    st.lists(st.one_of(st.integers(-2, 5), st.floats(), st.text(max_size=1), st.none()), max_size=3),
    st.tuples(st.integers(-2, 9), st.integers(-2, 9)), st.complex_numbers(), st.dictionaries(st.integers(), st.none()),
    st.sampled_from([torch.zeros(1), torch.zeros(2).long(), np.zeros(2), object(), nn.Identity(), PixelMask(), abs]),
)  # fmt: skip
OPTIONS = ("intervention", "design", "outcome", "normalization", "output", "seed", "memory_budget", "engine")
ARGUMENTS = ("inputs", "baselines", "target", "perturbations_per_eval", "given", "ids", "significant_only")
WINDOWS: Any = {"sliding_window_shapes": (3, 4, 4), "strides": 4}
TAKERS: dict[str, Callable[[Any], Any]] = {
    **{name: lambda value, name=name: effect(**{name: value}) for name in OPTIONS},
    **{name: lambda value, name=name: attribute(**{name: value}, **WINDOWS)() for name in ARGUMENTS},
    **{f"mask {name}": lambda value, name=name: RandomMask(**{name: value}) for name in ("p", "n_trials", "seed")},
    "estimator": lambda value: RandomMask(estimator=value),
    "weighting": lambda value: CausalEffectMap(NET, "conv", weighting=value),
    "units": lambda value: LayerSite("conv", units=value),
    "sign": lambda value: overlay(torch.zeros(8, 8), X[0], sign=value),
    "feature_mask": lambda value: attribute(feature_mask=value)(),
    "windows": lambda value: attribute(sliding_window_shapes=value, strides=1)(),
    "until": lambda value: estimate(until=value)(),
    "contrast": lambda value: cem(contrast=value)(),
    "channel_dim": lambda value: LayerCausalEffect(NET, LayerSite("conv", channel_dim=value)).attribute(X),
    "fill": lambda value: PixelMask(value)(X),
    "region": lambda value: PixelMask(region=value)(X),
    "significant": FOUND.significant,
    "examples": lambda value: FOUND[value],
    "pairs": FOUND.pairs,
    "groups": Joint,
    "steps": Smooth,
    "sizes": lambda value: RandomWindows(sizes=value),
    "image": lambda value: overlay(torch.zeros(8, 8), value),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=ANYTHING)
def test_any_value_works_or_has_an_error_of_ours(name: str, value: Any) -> None:
    said = "Expected argument"
    try:
        TAKERS[name](value)
    except CEPluginError as error:
        said = str(error)
    assert said.startswith(("Expected argument", "There is no example"))
