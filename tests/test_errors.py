"""Bad input gets a clear error of the right family, before the network was run and with nothing lost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect, errors
from ce_plugin.designs import Design, Joint, LeaveOneIn, OneAtATime, RandomMask, RandomRegions, RandomWindows
from ce_plugin.errors import (
    ArgumentError,
    CEPluginError,
    CEPluginWarning,
    DesignError,
    InputError,
    ModelError,
    OutcomeError,
    ProbabilityWarning,
    TargetError,
    UnitError,
    UnknownNameError,
    expected,
    unknown_name,
)
from ce_plugin.interventions import PixelMask

NAN = float("nan")


class Count:
    """Not restored with the network's own attributes."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Counted(nn.Module):
    """A network that notes how often it is run."""

    def __init__(self, classes: int = 3, size: int = 16, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(size, classes)
        self.layer = layer or nn.Identity()
        self.count = Count()

    def forward(self, x: Tensor) -> Tensor:
        self.count.calls += 1
        return self.layer(self.linear(x.flatten(1)))


def image(n: int = 2) -> Tensor:
    return torch.rand(n, 1, 4, 4)


def with_value(value: float) -> Tensor:
    x = image(3)
    x[1, 0, 2, 2] = value
    return x


# --- the grammar -------------------------------------------------------------------------------------------------


def families() -> list[type]:
    return [thing for _, thing in inspect.getmembers(errors, inspect.isclass) if thing.__module__ == errors.__name__]


def test_every_family_is_an_error_of_the_plugin_and_an_ordinary_one() -> None:
    for family in families():
        assert family.__name__ in errors.__all__
        assert issubclass(family, (CEPluginError, CEPluginWarning))
        if issubclass(family, CEPluginError) and family is not CEPluginError:
            assert issubclass(family, (ValueError, TypeError, OSError))
        assert family.__doc__


def test_every_family_has_a_page() -> None:
    pages = {page.stem for page in (Path(__file__).parents[1] / "docs" / "errors").glob("*.md")}
    for family in families():
        if family not in (CEPluginError, CEPluginWarning):
            name = "".join("-" + c.lower() if c.isupper() else c for c in family.__name__).strip("-")
            assert name in pages


def test_the_grammar() -> None:
    assert expected("p", "a share", 2) == "Expected argument `p` to be a share, but got 2."
    assert expected("p", "a share", 2, "Write 0.2.").endswith("but got 2. Write 0.2.")
    error = unknown_name("fill", "zeros", ["zero", "mean"])
    assert str(error) == "Expected argument `fill` to be one of 'mean', 'zero', but got 'zeros'. Did you mean 'zero'?"
    assert "Did you mean" not in str(unknown_name("fill", "xyz", ["zero", "mean"]))
    assert str(unknown_name("layer", "conv7", [f"conv{i}" for i in range(70)])).count("'conv") < 12


# --- found before the network is run -----------------------------------------------------------------------------

RAGGED = torch.stack([torch.arange(16).reshape(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)])

BEFORE: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("NaN", lambda: {"inputs": with_value(NAN)}, InputError, r"`inputs` to be finite everywhere, .*example\(s\) \[1\]"),
    ("infinity", lambda: {"inputs": with_value(torch.inf)}, InputError, "finite everywhere"),
    ("no examples", lambda: {"inputs": image(0)}, InputError, r"one or more examples \(N, ...\)"),
    ("no pixels", lambda: {"inputs": torch.rand(2, 1, 0, 4)}, InputError, "not empty, but got shape"),
    ("a number", lambda: {"inputs": torch.tensor(1.0)}, InputError, r"one or more examples \(N, ...\)"),
    ("bytes", lambda: {"inputs": (255 * image()).byte()}, InputError, r"torch.uint8. Write `images.float\(\) / 255`"),
    ("integers", lambda: {"inputs": image().long()}, InputError, "of a floating-point type, but got torch.int64"),
    ("booleans", lambda: {"inputs": image() > 0.5}, InputError, "of a floating-point type, but got torch.bool"),
    ("complex", lambda: {"inputs": image() * 1j}, InputError, "of a floating-point type, but got torch.complex64"),
    ("numpy", lambda: {"inputs": image().numpy()}, InputError, r"but got ndarray. Write `torch.as_tensor\(x, dty"),
    ("a list", lambda: {"inputs": [image()]}, InputError, "a tensor, or a tuple of tensors, but got list"),
    ("an empty tuple", lambda: {"inputs": ()}, InputError, "one tensor or more, but got an empty tuple"),
    ("unequal", lambda: {"inputs": (image(2), image(3))}, InputError, r"`inputs\[1\]` to be as many examples as the"),
    ("arity", lambda: {"feature_mask": (torch.zeros(4, 4), torch.zeros(4, 4))}, UnitError, r"1 mask\(s\).*but got 2"),
    ("shape", lambda: {"feature_mask": torch.zeros(1, 1, 5, 4)}, UnitError, r"broadcasts to the input's shape \(2, 1"),
    ("rows", lambda: {"feature_mask": torch.zeros(3, 1, 4, 4)}, UnitError, "broadcasts to the input's shape"),
    ("rank", lambda: {"feature_mask": torch.zeros(1, 2, 1, 4, 4)}, UnitError, "broadcasts to the input's shape"),
    ("fractions", lambda: {"feature_mask": torch.full((4, 4), 0.5)}, UnitError, r"integer ids, but got fractional"),
    ("NaN ids", lambda: {"feature_mask": torch.full((4, 4), NAN)}, UnitError, r"integer ids, but got fractional"),
    ("infinite ids", lambda: {"feature_mask": torch.full((4, 4), torch.inf)}, UnitError, "integer ids"),
    ("complex ids", lambda: {"feature_mask": torch.zeros(4, 4) * 1j}, UnitError, "integer ids"),
    ("no mask", lambda: {"feature_mask": [[0, 1]]}, UnitError, "a tensor, or a tuple of tensors, but got list"),
    ("two kinds", lambda: {"feature_mask": torch.ones(4), "sliding_window_shapes": (1, 2, 2)}, UnitError, "None when"),
    ("strides alone", lambda: {"strides": 2}, UnitError, "`strides` to be None without `sliding_window_shapes`"),
    ("large window", lambda: {"sliding_window_shapes": (1, 5, 2)}, UnitError, "sizes from 1 to the input's"),
    ("empty window", lambda: {"sliding_window_shapes": (1, 0, 2)}, UnitError, "sizes from 1"),
    ("window rank", lambda: {"sliding_window_shapes": (2, 2)}, UnitError, "sizes from 1"),
    ("window arity", lambda: {"sliding_window_shapes": ((1, 2, 2), (1, 2, 2))}, UnitError, r"1 shape\(s\)"),
    ("no window", lambda: {"sliding_window_shapes": ()}, UnitError, "sizes from 1"),
    ("a number as window", lambda: {"sliding_window_shapes": 3}, UnitError, "`sliding_window_shapes` to be a tuple"),
    ("fractional window", lambda: {"sliding_window_shapes": (1, 2.5, 2)}, UnitError, "`sliding_window_shapes`"),
    ("large stride", lambda: {"sliding_window_shapes": (1, 2, 2), "strides": 3}, UnitError, "leave parts of the input"),
    ("no stride", lambda: {"sliding_window_shapes": (1, 2, 2), "strides": (1, 0, 1)}, UnitError, "steps from 1"),
    ("zero stride", lambda: {"sliding_window_shapes": (1, 2, 2), "strides": 0}, UnitError, "steps from 1"),
    ("stride rank", lambda: {"sliding_window_shapes": (1, 2, 2), "strides": (1, 1)}, UnitError, "steps from 1"),
    ("baseline shape", lambda: {"baselines": torch.zeros(5)}, InputError, "of a shape that broadcasts"),
    ("baseline arity", lambda: {"baselines": (0.0, 0.0)}, InputError, r"1 baseline\(s\), one per input, but got 2"),
    ("NaN baseline", lambda: {"baselines": NAN}, InputError, "`baselines` to be finite"),
    ("text baseline", lambda: {"baselines": "zero"}, InputError, "`baselines` to be a number or a tensor"),
    ("ids", lambda: {"ids": [1, 2, 3]}, InputError, "2 ids, one per example, but got 3"),
    ("text ids", lambda: {"ids": ["a", "b"]}, InputError, "one integer per example"),
    ("fractional ids", lambda: {"ids": [0.5, 1.5]}, InputError, "one integer per example"),
    ("float ids", lambda: {"ids": torch.rand(2)}, InputError, "one integer per example"),
    ("one id", lambda: {"ids": 3}, InputError, "one integer per example"),
    ("no batch", lambda: {"perturbations_per_eval": 0}, ArgumentError, "None or a positive integer, but got 0"),
    ("half a batch", lambda: {"perturbations_per_eval": 1.5}, ArgumentError, "None or a positive integer, but got 1.5"),
    ("groups", lambda: {"design": Joint([(0, 16)])}, DesignError, "below the number of units, 16, but got 16"),
    (
        "ragged groups", lambda: {"design": Joint([(0, 3)]), "feature_mask": RAGGED}, DesignError,
        "below the number of units, 1, but got 3",
    ),
    (
        "no grid", lambda: {"design": RandomRegions(), "feature_mask": RAGGED[:1]}, DesignError,
        "units that are not a grid",
    ),
    (
        "windows without a grid", lambda: {"design": RandomWindows(), "inputs": torch.rand(2, 16)}, DesignError,
        "units that are not a grid",
    ),
    ("one pair", lambda: {"design": RandomMask(0.5, 2, antithetic=True)}, DesignError, "n_trials|pairs|block"),
    ("too few for a fit", lambda: {"design": RandomRegions(0.5, 2)}, DesignError, "`n_trials` to be at least"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in BEFORE])
@pytest.mark.parametrize("method", ["attribute", "estimate"])
def test_found_before_the_network_is_run(method: str, make: Any, error: type[Exception], message: str) -> None:
    arguments = make()
    net = Counted()
    explainer = CausalEffect(net, PixelMask("zero"), arguments.pop("design", OneAtATime()))
    with pytest.raises(error, match=message) as caught:
        getattr(explainer, method)(arguments.pop("inputs", image()), **arguments)
    assert isinstance(caught.value, CEPluginError)
    assert net.count.calls == 0
    assert net.training


def test_the_constructor_refuses_what_it_cannot_use() -> None:
    net = Counted()
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: CausalEffect("resnet"), ModelError, "a callable or an ART classifier, but got str"),
        (lambda: CausalEffect(net, "blur"), ArgumentError, "`intervention` to be a Intervention or None, but got str"),
        (lambda: CausalEffect(net, None, "random"), ArgumentError, "`design` to be a Design or None, but got str"),
        (lambda: CausalEffect(net, OneAtATime()), ArgumentError, "`intervention`"),
        (lambda: CausalEffect(net, None, RandomMask), ArgumentError, "`design` to be a Design or None"),
        (lambda: CausalEffect(net, outcome="probabilty"), UnknownNameError, "Did you mean 'probability'"),
        (lambda: CausalEffect(net, outcome="logits"), UnknownNameError, "Did you mean 'logit'"),
        (lambda: CausalEffect(net, outcome=3), OutcomeError, "a name, an Outcome, None, or a callable"),
        (lambda: CausalEffect(net, normalization=(0.0, -1.0)), ArgumentError, "positive std"),
        (lambda: CausalEffect(net, normalization=0.5), ArgumentError, r"a pair \(mean, std\)"),
    ]
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            make()


# --- found with the first outputs --------------------------------------------------------------------------------

TARGETS: list[tuple[str, Any, str]] = [
    ("too large", 3, r"indices in 0 ... 2 for outputs \(2, 3\), but got 3"),
    ("too small", -4, "indices in 0 ... 2"),
    ("one of a list", [0, 3], "indices in 0 ... 2 .*, but got 3"),
    ("short list", [0], "a list with one entry for each of 2 examples, but got 1"),
    ("long list", [0, 1, 2], "a list with one entry for each of 2 examples, but got 3"),
    ("long tensor", torch.tensor([0, 1, 2]), "one target, or one for each of 2 examples, but got 3"),
    ("float", 1.5, "an int, a tuple of ints, an integer tensor"),
    ("floats", [0.0, 1.0], "an int, a tuple of ints, an integer tensor"),
    ("float tensor", torch.tensor([1.0]), "an integer tensor of one dimension, but got torch.float32"),
    ("bool tensor", torch.tensor([True, False]), "an integer tensor of one dimension, but got torch.bool"),
    ("matrix", torch.zeros(2, 2).long(), "an integer tensor of one dimension"),
    ("tuple too long", (0, 1), r"1 index per example for outputs \(2, 3\), but got \(0, 1\)"),
    ("text", "cat", "an int, a tuple of ints"),
    ("a flag", True, "`target` to be an index, but got True"),
]


@pytest.mark.parametrize(("target", "message"), [pytest.param(*case[1:], id=case[0]) for case in TARGETS])
@pytest.mark.parametrize("design", [OneAtATime(), LeaveOneIn(), RandomMask(0.5, 40)])
def test_targets_are_checked_with_the_first_outputs(design: Design, target: Any, message: str) -> None:
    net = Counted()
    with pytest.raises(TargetError, match=message):
        CausalEffect(net, PixelMask("zero"), design).attribute(image(), target=target)
    assert net.count.calls <= 3
    assert net.training


def test_a_missing_target() -> None:
    class Maps(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(len(x), 2, 3, 2)

    net = Maps(12)
    explainer = CausalEffect(net, PixelMask("zero"), OneAtATime())
    with pytest.raises(
        TargetError, match=r"an index into outputs \(2, 2, 3, 2\), but got None. Only for outputs \(N, C\)"
    ):
        explainer.attribute(image())
    with pytest.raises(TargetError, match=r"3 indices per example for outputs \(2, 2, 3, 2\), but got 1"):
        explainer.attribute(image(), target=1)
    assert net.count.calls <= 6  # a clean row is passed twice


def test_a_target_where_there_is_nothing_to_choose() -> None:
    with pytest.raises(TargetError, match="leave the target out"):
        CausalEffect(lambda x: x.flatten(1).sum(1), outcome=None).attribute(image(), target=1)


@pytest.mark.parametrize("outcome", ["probability", "log_odds", "margin", "prediction_weighted"])
def test_comparisons_of_one_class_with_itself(outcome: str) -> None:
    net = Counted(1)
    with pytest.raises(
        OutcomeError, match=rf"one for a single output .* but got '{outcome}'.*Write outcome=\"sigmoid\""
    ):
        CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=outcome).attribute(image())
    assert net.count.calls <= 3
    assert (
        CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome="sigmoid").attribute(image()).shape == image().shape
    )


@pytest.mark.parametrize(("outcome", "layer"), [("probability", nn.Softmax(1)), ("sigmoid", nn.Sigmoid())])
def test_probabilities_that_are_made_probabilities_again(outcome: str, layer: nn.Module) -> None:
    net = Counted(3, layer=layer)
    with pytest.warns(ProbabilityWarning, match="already seem to be probabilities.*Write outcome=None"):
        CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=outcome).attribute(image())


def test_probabilities_as_they_are(recwarn: pytest.WarningsRecorder) -> None:
    net = Counted(3, layer=nn.Softmax(1))
    CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=None).attribute(image())
    CausalEffect(Counted(3), PixelMask("zero"), OneAtATime()).attribute(image())
    assert not [w for w in recwarn if w.category is ProbabilityWarning]


def test_outputs_that_are_not_finite() -> None:
    net = Counted()
    nn.init.constant_(net.linear.bias, torch.nan)
    with pytest.raises(ModelError, match="a model with finite outputs on the clean inputs"):
        CausalEffect(net, PixelMask("zero"), OneAtATime()).attribute(image())
    assert net.count.calls <= 3


def test_a_callable_outcome_that_returns_something_else() -> None:
    for outcome, got in ((lambda o, r: None, "NoneType"), (lambda o, r: o.sum(), r"a tensor of shape \(\)")):
        with pytest.raises(OutcomeError, match=f"one row per example .*but got {got}"):
            CausalEffect(Counted(), PixelMask("zero"), OneAtATime(), outcome=outcome).attribute(image())


def test_more_outcomes_than_memory() -> None:
    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :1].expand(-1, 1 << 30)[:, : 1 << 20]

    with pytest.raises(ArgumentError, match=r"GiB of outcomes, but got .* Pass `target=`"):
        CausalEffect(Huge(), PixelMask("zero"), RandomMask(0.5, 1 << 20), outcome=None).estimate(image())


# --- designs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomMask(0.0), r"`p` to be a probability in \(0, 1\), but got 0.0. Write 0.1"),
        (lambda: RandomMask(1), r"a probability in \(0, 1\)"),
        (lambda: RandomMask(-0.1), r"a probability in \(0, 1\)"),
        (lambda: RandomMask(10), r"a probability in \(0, 1\)"),
        (lambda: RandomMask(NAN), r"a probability in \(0, 1\)"),
        (lambda: RandomMask("0.1"), r"a probability in \(0, 1\), but got '0.1'"),
        (lambda: RandomMask(0.1, 1), "`n_trials` to be a whole number, 2 or more, but got 1"),
        (lambda: RandomMask(0.1, 0), "2 or more"),
        (lambda: RandomMask(0.1, 10.5), "`n_trials` to be a whole number, 2 or more, but got 10.5"),
        (lambda: RandomMask(0.1, "10"), "2 or more"),
        (lambda: RandomMask(0.1, 7, antithetic=True), "even for antithetic pairs, but got 7"),
        (lambda: RandomMask(0.1, 4, balanced=True), "enough for every unit to flip and to idle"),
        (lambda: RandomMask(0.99, 4, balanced=True), "enough for every unit to flip and to idle"),
        (lambda: RandomMask(estimator="ols"), "`estimator` to be 'adjusted' or 'difference_in_means', but got 'ols'"),
        (lambda: RandomWindows(0.5, sizes=()), "`sizes`"),
        (lambda: RandomWindows(0.5, sizes=(0.0,)), "`sizes`"),
        (lambda: RandomWindows(1.5), "a share of the area"),
        (lambda: RandomRegions(0.5, length=0.0), "`length`"),
        (lambda: RandomRegions(0.5, 1), "2 or more"),
        (lambda: Joint([]), "one or more non-empty groups"),
        (lambda: Joint([()]), "one or more non-empty groups"),
        (lambda: Joint([(0, 0)]), "different indices"),
        (lambda: Joint([(-1,)]), "0 or larger"),
        (lambda: Joint([0, 1]), "`groups` to be one or more non-empty groups of unit indices"),
        (lambda: Joint([(0.5,)]), "`groups` to be one or more non-empty groups of unit indices"),
        (lambda: Joint(3), "`groups` to be one or more non-empty groups of unit indices"),
    ],
)
def test_bad_designs(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DesignError, match=message):
        make()


def test_designs_of_ones_own_that_lack_something() -> None:
    class Mine(Design):
        def n_trials_for(self, n_units: int) -> int:
            return 40

        def assignments(self, n_units: int, *, example: int = 0, grid: Any = None) -> Tensor:
            return torch.rand(40, n_units, generator=torch.Generator().manual_seed(0)) < 0.5

        def __repr__(self) -> str:
            return "Mine()"

    net, mine = Counted(), Mine()
    with pytest.raises(DesignError, match=r"knows its flip probability .*but got Mine\(\). Write `flip_probability`"):
        CausalEffect(net, PixelMask("zero"), mine).attribute(image())
    mine.estimator = "ols"
    with pytest.raises(DesignError, match=r"`design.estimator` to be one of .*but got 'ols' for Mine\(\)"):
        CausalEffect(net, PixelMask("zero"), mine).attribute(image())
    assert net.count.calls == 0
    mine.estimator = "difference_in_means"
    assert CausalEffect(net, PixelMask("zero"), mine).attribute(image()).shape == image().shape
