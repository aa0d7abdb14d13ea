"""What all attribution classes share: how they are set up, and from a call to a map or an estimate."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from numbers import Real
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, cast

import numpy as np
import torch
from captum.attr import PerturbationAttribution
from captum.log import log_usage
from torch import Tensor, nn

from ce_plugin.attribution._estimation import Target
from ce_plugin.attribution._experiment import Baselines, Call, Experiment, Given, Ids
from ce_plugin.designs import Design, Joint
from ce_plugin.effects import Estimate, Interactions, Outcome, resolve_outcome
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import (
    ArgumentError,
    InferenceError,
    InputError,
    check_integer,
    check_number,
    expected,
    unknown_name,
)
from ce_plugin.interventions import Context, Intervention, PixelMask
from ce_plugin.networks.forward import Forward, OutputSelector
from ce_plugin.networks.layout import input_channel_dim
from ce_plugin.sites import ConceptSite, Evidence, InputSite, LayerSite, Masks
from ce_plugin.trials._routing import Router

Engine: TypeAlias = Literal["auto", "suffix", "full"]
MapValues: TypeAlias = Literal["smoothed", "unbiased"]
Site: TypeAlias = "InputSite | LayerSite | ConceptSite"
Method = TypeVar("Method", bound=Callable[..., Any])


def logged(method: Method) -> Method:
    """Captum's ``log_usage``, which NoiseTunnel relies on (``attribute.__wrapped__``), without losing the types."""
    return cast(Method, log_usage()(method))


class Options(TypedDict, total=False):
    """The constructors' options that mean the same in every class; see :class:`ce_plugin.CausalEffect`."""

    output: OutputSelector
    seed: int
    memory_budget: int | None
    engine: Engine
    class_names: Sequence[str] | None


class Explainer(PerturbationAttribution):  # type: ignore[misc]
    """A captum attribution whose maps and estimates come from an :class:`Experiment`.

    Subclasses write :meth:`_setup`: where a call intervenes, by what, and in which trials.

    Args: see :class:`ce_plugin.CausalEffect`.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        intervention: Intervention | None = None,
        design: Design | None = None,
        *,
        outcome: str | Outcome | OutcomeFunction | None = "probability",
        output: OutputSelector = None,
        seed: int = 0,
        memory_budget: int | None = None,
        engine: Engine = "auto",
        class_names: Sequence[str] | None = None,
    ) -> None:
        for name, value, kind in (("intervention", intervention, Intervention), ("design", design, Design)):
            if value is not None and not isinstance(value, kind):
                raise ArgumentError(expected(name, f"a {kind.__name__} or None", type(value).__name__))
        if not isinstance(engine, str) or engine not in ("auto", "suffix", "full"):
            raise unknown_name("engine", engine, ("auto", "suffix", "full"))
        if memory_budget is not None:
            check_integer(
                "memory_budget", memory_budget, "None or a number of bytes, 1 or more (1 GB is 1 << 30)", least=1
            )
        self.forward = Forward(forward_func, output)
        super().__init__(forward_func)
        self.intervention = intervention
        self.design = design
        self.outcome = resolve_outcome(outcome)
        self.seed = check_integer("seed", seed)
        self.memory_budget = memory_budget
        self.engine = engine
        self.class_names = _checked_names(class_names)
        self._router = Router(self.forward, engine)

    def _settings(self) -> dict[str, str]:
        """What is done by this explainer, in words, with defaults left out that only the inputs decide."""
        network = ", ".join(type(module).__name__ for module in self.forward.modules) or "a function"
        found = {"network": network, "intervention": self.intervention, "design": self.design}
        shown = {name: value if isinstance(value, str) else repr(value) for name, value in found.items() if value}
        if self.class_names is not None:
            shown["classes"] = f"{len(self.class_names)} with names"
        return shown | {"outcome": self.outcome.name, "seed": str(self.seed)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._settings().items())})"

    def _repr_html_(self) -> str:
        return settings_html(self, self._settings())

    @property
    def multiplies_by_inputs(self) -> bool:
        """False: the map is a difference of outcomes, not a slope; captum's infidelity reads this."""
        return False

    def interactions(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        mask: Masks = None,
        *,
        top: int = 100,
        exhaustive: int = 64,
        nudges: Sequence[float] = (1e-3,),
        given: Given = None,
        ids: Ids = None,
    ) -> list[Interactions]:
        """How much more (or less) two units do together than the sum of what each does alone, for pairs of units.

            interaction_uv = Y(do u, v) - Y(do u) - Y(do v) + Y

        All pairs of up to ``exhaustive`` units; of more, the ``top`` pairs that the gradient at each single-flip state
        points at are run exactly.

        Args:
            inputs, target, additional_forward_args, given, ids: as in ``attribute``.
            mask: the units, ``feature_mask`` or ``layer_mask`` of ``attribute``.
            top, exhaustive, nudges: see :func:`~ce_plugin.effects.pairwise`.

        Returns:
            One :class:`~ce_plugin.effects.Interactions` for each example.

        Example:
            >>> import torch
            >>> from ce_plugin import CausalEffect
            >>> effect = CausalEffect(lambda x: x[:, :1] * x[:, 1:2], outcome=None)
            >>> found = effect.interactions(torch.ones(1, 3))[0]
            >>> found.pairs[0].tolist(), round(found.interaction[0, 0].item(), 3)
            ([0, 1], 1.0)
        """
        check_integer("top", top, least=1)
        check_integer("exhaustive", exhaustive, least=0)
        call = Call(
            inputs=inputs, target=target, additional_forward_args=additional_forward_args, mask=mask, given=given,
            ids=ids, predicted_only=True,
        )  # fmt: skip
        return self._experiment(call).interactions(top=top, exhaustive=exhaustive, nudges=nudges)

    @abstractmethod
    def _setup(self, call: Call, inputs: tuple[Tensor, ...]) -> tuple[Site, Intervention, Design]:
        """Where the call intervenes on these inputs, by what, and in which trials."""

    def _experiment(self, call: Call) -> Experiment:
        """The experiment that answers the call; its arguments are checked."""
        inputs = as_inputs(call.inputs, self.forward.modules)
        site, intervention, design = self._setup(call, inputs)
        return Experiment(
            call=call,
            inputs=inputs,
            args=as_args(call.additional_forward_args),
            evidences=[self._laid_out(one, inputs) for one in as_evidences(call.given)],
            ids=as_ids(call.ids, len(inputs[0])),
            site=site,
            intervention=intervention,
            design=design,
            outcome=self.outcome,
            forward=self.forward,
            router=self._router,
            seed=self.seed,
            memory_budget=self.memory_budget,
            class_names=self.class_names,
            normalization=getattr(self, "normalization", None),
        )

    def _input_layout(self, inputs: tuple[Tensor, ...]) -> tuple[int, str] | None:
        """The dimension of the channels in the input and what shows it, where it is not 1 by its rank alone."""
        shape = inputs[0].shape
        # Of several inputs nothing says which one the first module takes.
        found = input_channel_dim(self.forward.modules, shape) if len(shape) > 2 and len(inputs) == 1 else None
        return None if found is None or (len(shape) > 3 and found[0] == 1) else found

    def _laid_out(self, evidence: Evidence, inputs: tuple[Tensor, ...]) -> Evidence:
        """Evidence at the input with its channels where the network has them."""
        site, found = evidence.site, self._input_layout(inputs)
        if not isinstance(site, InputSite) or found is None:
            return evidence
        if site.channel_dim is None:
            site = replace(site, channel_dim=found[0])
        return replace(evidence, site=site, intervention=with_channels(evidence.intervention, found))

    def _estimates(self, call: Call) -> Estimate:
        """The estimate; a dict of them, which its type does not say, where the model has several heads."""
        return _unnamed(self._experiment(call).run(_unnamed))

    def _maps(
        self, call: Call, significant_only: bool | float | None, values: MapValues = "smoothed"
    ) -> tuple[Tensor, ...]:
        """The contributions of the call's units, each wherever its unit is."""
        if values not in ("smoothed", "unbiased"):
            raise unknown_name("values", values, ("smoothed", "unbiased"))
        experiment = self._experiment(call)
        design = experiment.design
        if values == "unbiased" and not (design.exact or design.has_errors):
            hint = "Leave out independent=0 or take 30 trials or more; values='smoothed' is the map."
            raise InferenceError(expected("values", f"'smoothed' for {design!r}", repr(values), hint))
        rate = None if significant_only is None else false_discovery_rate(significant_only, experiment)

        def maps(estimates: dict[str, Estimate]) -> tuple[Tensor, ...]:
            (estimate,) = estimates.values()
            shown = (estimate.smoothed_contribution if values == "smoothed" else estimate.contribution)[..., 0]
            if rate is not None:
                shown = shown.where(estimate.significant(rate)[..., 0], 0.0)
            units = experiment.spec.units
            if isinstance(design, Joint):
                # Each unit gets the mean over the groups that it is in.
                member = design.assignments(units.width).to(shown)
                shown = shown @ member / member.sum(0).clamp(min=1)
            return units.spread(shown)

        def as_given(estimates: dict[str, Estimate]) -> Tensor | tuple[Tensor, ...]:
            found = maps(estimates)
            return found if isinstance(call.inputs, tuple) else found[0]

        return maps(experiment.run(as_given))


def settings_html(explainer: object, settings: Mapping[str, str]) -> str:
    """What a notebook shows of an explainer."""
    rows = (f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in settings.items())
    return f"<table><caption>{type(explainer).__name__}</caption>{''.join(rows)}</table>"


def _unnamed(estimates: dict[str, Estimate]) -> Estimate:
    """The estimate, or a dict of them where the model has several heads."""
    return estimates[""] if list(estimates) == [""] else cast(Estimate, estimates)


def _checked_names(names: object) -> tuple[str, ...] | None:
    """One name for each class, or None; how many there must be the network's output will show."""
    wanted = "None or a name for each class"
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        hint = 'Write ["cat", "dog"], in the order of the outputs.'
        raise ArgumentError(expected("class_names", wanted, repr(names)[:60], hint))
    return tuple(names)


def with_channels(intervention: Intervention, found: tuple[int, str] | None) -> Intervention:
    """A mask whose fills treat the channels of the input where they are."""
    last = found is not None and found[0] != 1
    return intervention.with_channels(-1) if last and isinstance(intervention, PixelMask) else intervention


def false_discovery_rate(significant_only: bool | float, experiment: Experiment) -> float | None:
    """The rate that was asked for; None where all effects are wanted."""
    if significant_only is False:
        return None
    given: object = significant_only
    if given is not True:
        wanted, hint = "True, or a false discovery rate in (0, 1)", "Write 0.05 for five per cent."
        check_number("significant_only", given, wanted, above=0, below=1, hint=hint)
    if not experiment.design.has_errors and experiment.n_draws == 1:
        hint = "Only random designs or a data set have standard errors: use RandomMask(...), or leave it out."
        raise InferenceError(expected("significant_only", f"None for {experiment.design!r}", significant_only, hint))
    return 0.05 if significant_only is True else float(significant_only)


def as_inputs(inputs: Tensor | tuple[Tensor, ...], networks: Sequence[nn.Module] = ()) -> tuple[Tensor, ...]:
    """The inputs as a tuple.

    Args:
        inputs: as the user wrote them.
        networks: whose type is advised.

    Raises:
        InputError: they are no tensors, empty, of unequal length, sparse, without data, not of a floating-point type,
            or not finite.
    """
    tensors: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors:
        raise InputError(expected("inputs", "one tensor or more", "an empty tuple"))
    dtype = next((p.dtype for root in networks for p in root.parameters() if p.is_floating_point()), torch.float32)
    for position, x in enumerate(tensors):
        name = "inputs" if len(tensors) == 1 else f"inputs[{position}]"
        if not isinstance(x, Tensor):
            hint = f"Write `torch.as_tensor(x, dtype={dtype})`."
            hint = "" if x is None or isinstance(x, (str, dict)) else hint
            raise InputError(expected(name, "a tensor, or a tuple of tensors", type(x).__name__, hint))
        _check_input(name, x, dtype)
        if len(x) != len(tensors[0]):
            raise InputError(expected(name, f"as many examples as the first input, {len(tensors[0])}", len(x)))
    # What is computed here is no function of the user's graph.
    return tuple(map(Tensor.detach, tensors))


def _check_input(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise InputError(expected(name, "a dense tensor", kind, "Write `x.to_dense()`." if not x.is_nested else ""))
    if x.is_meta:
        raise InputError(expected(name, "a tensor with data", "one on the meta device"))
    if x.dim() == 0 or x.numel() == 0:
        raise InputError(expected(name, "one or more examples (N, ...), not empty", f"shape {tuple(x.shape)}"))
    if not x.is_floating_point():
        hint = "Write `images.float() / 255` if the model takes images in [0, 1]." if x.dtype == torch.uint8 else ""
        hint = hint or ("" if x.is_complex() or x.is_quantized else f"Write `x.to({dtype})`.")
        raise InputError(expected(name, "of a floating-point type", str(x.dtype), hint))
    if not bool(torch.isfinite(x).all()):
        bad = [i for i in range(len(x)) if not bool(torch.isfinite(x[i]).all())]
        raise InputError(expected(name, "finite everywhere", f"NaN or infinity in example(s) {bad[:5]}"))


def as_args(args: Any) -> tuple[object, ...]:
    """The additional forward arguments as a tuple.

    Raises:
        ArgumentError: a sparse tensor, or one without data.
    """
    found: tuple[object, ...] = () if args is None else args if isinstance(args, tuple) else (args,)
    for arg in found:
        if isinstance(arg, Tensor) and (arg.layout != torch.strided or arg.is_meta):
            hint = "" if arg.is_meta else "Write `p.to_dense()`."
            got = "one on the meta device" if arg.is_meta else str(arg.layout)
            raise ArgumentError(expected("additional_forward_args", "dense tensors, or anything else", got, hint))
    return found


def as_ids(ids: Ids, n: int) -> tuple[int, ...]:
    """One id per example; None gives all the same one.

    Raises:
        InputError: another number of ids than examples, or something else than integers.
    """
    if ids is None:
        return (0,) * n
    try:
        names = tuple(operator.index(i) for i in (ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else ids))
    except TypeError as error:
        hint = "Take the examples' indices in the data set."
        raise InputError(expected("ids", "one integer per example", repr(ids), hint)) from error
    if len(names) != n:
        raise InputError(expected("ids", f"{n} ids, one per example", len(names)))
    return names


def as_evidences(given: Given) -> list[Evidence]:
    """Evidence in the order in which it is set.

    Raises:
        ArgumentError: something that is neither an intervention nor evidence; random evidences that are drawn
            different numbers of times.
    """
    if given is None:
        return []
    every: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for one in every:
        if not isinstance(one, (Intervention, Evidence)):
            wanted, hint = "an intervention, an Evidence, or a list of them", "Write Evidence(intervention, units=...)."
            raise ArgumentError(expected("given", wanted, type(one).__name__, hint))
    evidences = [one if isinstance(one, Evidence) else Evidence(one) for one in every]
    draws = sorted({one.n_draws for one in evidences if one.is_random})
    if len(draws) > 1:
        wanted = "evidences that are drawn equally often (n_trials of their RandomMask)"
        raise ArgumentError(expected("given", wanted, f"{draws} draws"))
    return evidences


def as_baseline(baselines: Baselines, inputs: tuple[Tensor, ...] | None = None) -> Baseline:
    """Captum's baselines as an intervention.

    Args:
        baselines: a number or a tensor for each input.
        inputs: what they belong to; None for a layer, whose value is one tensor that is not known yet.

    Raises:
        InputError: another number of baselines than inputs, or one that does not broadcast or is not finite.
    """
    every = baselines if isinstance(baselines, tuple) else (baselines,)
    of: tuple[Tensor | None, ...] = (None,) if inputs is None else inputs
    if len(every) != len(of):
        raise InputError(expected("baselines", f"{len(of)} baseline(s), one per input", len(every)))
    for value, x in zip(every, of, strict=True):
        if not isinstance(value, (Real, Tensor, type(None))):
            kind = type(value).__name__
            hint = "Write `torch.as_tensor(baselines)`." if kind == "ndarray" else ""
            raise InputError(expected("baselines", "a number or a tensor for each input", kind, hint))
        if isinstance(value, Tensor) and (value.is_complex() or value.layout != torch.strided or value.is_meta):
            raise InputError(expected("baselines", "dense real tensors", f"{value.dtype}, {value.layout}"))
        if value is not None and not bool(torch.isfinite(torch.as_tensor(value)).all()):
            raise InputError(expected("baselines", "finite", "NaN or infinity"))
        if isinstance(value, Tensor) and x is not None:
            try:
                value.expand_as(x)
            except RuntimeError as error:
                wanted = f"of a shape that broadcasts to the input's {tuple(x.shape)}"
                raise InputError(expected("baselines", wanted, tuple(value.shape))) from error
    return Baseline(tuple(0.0 if value is None else value for value in every))


class Baseline(Intervention):
    """Captum's ``baselines`` as an intervention: values in *model* units that replace the fill.

    Args:
        baselines: a number or tensor for each input.
    """

    def __init__(self, baselines: tuple[Tensor | float, ...]) -> None:
        self.baselines = baselines

    def values(self, clean: Tensor, context: Context) -> Tensor:
        value = self.baselines[context.position]
        if not isinstance(value, Tensor):
            return torch.full_like(clean, float(value))
        return context.own(value.detach(), clean).to(clean).expand_as(clean)

    def __repr__(self) -> str:
        shown = (f"tensor{tuple(b.shape)}" if isinstance(b, Tensor) else repr(b) for b in self.baselines)
        return f"baselines({', '.join(shown)})"
