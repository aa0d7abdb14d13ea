"""One call of ``estimate``: from checked arguments through trials to an :class:`~ce_plugin.effects.Estimate`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ce_plugin.attribution._estimation import Answer, OutcomeMeasure, Target, answers, average, check_design
from ce_plugin.designs import Design, EveryUnit, Joint
from ce_plugin.effects import Estimate, Interactions, Outcome, half_width, pairwise
from ce_plugin.errors import ArgumentError, ModelError, NoChangeWarning, UnitError, expected
from ce_plugin.interventions import Context, Intervention
from ce_plugin.networks.forward import Forward
from ce_plugin.networks.guard import state_guard
from ce_plugin.sites import ConceptSite, Evidence, InputSite, LayerSite, MaskUnits, Units
from ce_plugin.trials import Cost, Runner, TrialSpec
from ce_plugin.trials.batches import checked_values, free_memory, rows_of_args
from ce_plugin.trials.downstream import CapturingForward, EvidenceForward, ForwardFromSite, LayerEvidence, SiteHook
from ce_plugin.trials.routing import CapturedSite, Router, hook_of
from ce_plugin.trials.runner import AggregateError, as_one_row, run_aggregated

__all__ = [
    "Experiment",
    "answers_of_batch",
    "answers_until",
    "check_memory",
    "check_shared",
    "cost_of",
    "donated",
    "evident",
    "flip_outcome",
    "held",
    "outputs_of_batch",
    "warn_unchanged",
]


def check_shared(spec: TrialSpec, until: float | None) -> None:
    """Whether all examples share what they must share to be one.

    Raises:
        ModelError: they do not.
    """
    shared = len(set(spec.context.ids)) == 1 and isinstance(spec.units.labels[0], str)
    if until is not None or not shared:
        hint = "Leave out `until=`, `ids=` and masks that differ between examples."
        wanted = "a model that returns one value per example for these options"
        raise ModelError(expected("forward_func", wanted, "one value per batch", hint))


def outputs_of_batch(spec: TrialSpec, runner: Runner, first: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch's outputs, (1, ...) for each head.

    Args:
        spec, runner: the experiment.
        first: the outputs of the first example alone.

    Raises:
        ModelError: some outputs have one value per example and others have not.
    """
    # Copies, because a network may write to its input.
    raw = runner.evaluate(tuple(x.clone() for x in spec.inputs), spec.args)
    heads = {name: as_one_row(head) for name, head in raw.items()}
    if any(heads[name].shape != one.shape for name, one in first.items()):
        shapes = [tuple(head.shape) for head in raw.values()]
        got = f"shapes {shapes} for {spec.n} examples, some not one for each"
        hint = "Name the part to explain with `output=`."
        raise ModelError(expected("forward_func", "a model with one value per example in every output", got, hint))
    return heads


def answers_of_batch(
    spec: TrialSpec, runner: Runner, measure: OutcomeMeasure, used: list[int], keep: bool
) -> dict[str, Answer]:
    """The effects on the batch's outcome."""
    outcomes = run_aggregated(runner, spec, measure)
    compared = measure.reference
    if spec.design.reference == "all":
        every = run_aggregated(runner, replace(spec, design=EveryUnit()), measure)
        compared = {name: outcome[:, 0] for name, outcome in every.items()}
    return answers(spec, outcomes, compared, measure, used[:1], keep)


def warn_unchanged(spec: TrialSpec) -> None:
    """Say so where an intervention changes nothing in an example.

    Warns:
        NoChangeWarning: it does not.
    """
    intervention = spec.intervention
    if intervention.per_trial or intervention.forward_equivalents:
        return  # unknown before the trials, or too dear to ask for twice (attacks warn by themselves)
    unchanged = torch.ones(spec.n, dtype=torch.bool)
    for variant in range(intervention.n_variants):
        for position, x in enumerate(spec.inputs):
            at = replace(spec.context, position=position, variant=variant)
            unchanged &= (checked_values(intervention, x, at) == x).reshape(spec.n, -1).all(1).cpu()
    if bool(unchanged.any()):
        warnings.warn(
            f"{intervention!r} changes nothing in example(s) {unchanged.nonzero()[:5, 0].tolist()}, so that their "
            "effects are zero by construction. Check its fill or region, and `normalization=`.",
            NoChangeWarning,
            stacklevel=6,
        )


def check_memory(spec: TrialSpec, measure: OutcomeMeasure, trials: int) -> None:
    """Whether the outcomes of all trials fit into memory.

    Raises:
        ArgumentError: they do not.
    """
    size = sum(r.shape[1] * r.element_size() for r in measure.reference.values()) * spec.n * trials
    free = free_memory(spec.device)
    if size > free:
        got = f"{size / 2**30:.1f} GiB ({spec.n} examples x {trials} trials x all classes)"
        hint = "Pass `target=`, fewer examples, or coarser units."
        raise ArgumentError(expected("inputs", f"few enough for {free / 2**30:.1f} GiB of outcomes", got, hint))


_ROWS = 16


def donated(
    intervention: Intervention,
    inputs: tuple[Tensor, ...],
    context: Context,
    forward: Forward | None = None,
    place: SiteHook | None = None,
    args: tuple[object, ...] = (),
) -> tuple[Tensor, ...] | None:
    """What ``context.donors`` is to be: the values at the site of the inputs that the intervention names.

    Args:
        intervention: names them.
        inputs: the examples' own inputs, (N, ...) each.
        context: ids and seed.
        forward, place, args: the network, the site and additional arguments; without a place the site is the input.

    Returns:
        One tensor for each tensor of the site, or None where the intervention needs no donors.
    """
    donors = intervention.donors(inputs, context)
    if donors is None:
        return None
    if place is None or forward is None:
        return tuple(intervention.collect([donor]) for donor in donors)
    return (intervention.collect(_batches(CapturingForward(forward, place, once=False), donors, args, len(inputs[0]))),)


def _batches(
    observed: CapturingForward, donors: tuple[Tensor, ...], args: tuple[object, ...], n: int
) -> Iterator[Tensor]:
    # One row at a time first would say nothing here: a layer's value takes no more memory than a pass to it.
    for start in range(0, len(donors[0]), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(donors[0])))
        some = tuple(donor[rows.to(donor.device)] for donor in donors)
        # Arguments of the examples go with their counterparts; a reference set of another length takes them whole.
        own = rows_of_args(args, n, rows) if len(donors[0]) == n else args
        yield observed.at_site(some, own)


def evident(
    inputs: tuple[Tensor, ...], evidences: Sequence[Evidence], context: Context, draw: int
) -> tuple[Tensor, ...]:
    """The inputs with their evidence set, one evidence after the other; what is set at layers is passed over.

    Args:
        inputs: (N, ...) each.
        evidences: in the order in which they are set.
        context: ids and seed of this draw.
        draw: which of the draws of random evidence.

    Warns:
        NoChangeWarning: an evidence changes nothing.
    """
    for order, evidence in enumerate(evidences):
        if not isinstance(evidence.site, InputSite):
            continue
        units = evidence.site.units_of(inputs)
        rows = _rows(evidence, units, context.ids, draw, order)
        masks = [mask.to(inputs[0].device) for mask in units.masks(rows, torch.arange(len(rows)))]
        donors = donated(evidence.intervention, inputs, context)
        values = [
            checked_values(evidence.intervention, x, replace(context, position=k, mask=mask, donors=donors))
            for k, (x, mask) in enumerate(zip(inputs, masks, strict=True))
        ]
        if not bool(torch.cat([(x != v).flatten() for x, v in zip(inputs, values, strict=True)]).any()):
            _warn_no_change(evidence.intervention)
        inputs = tuple(torch.where(m, v, x) for m, v, x in zip(masks, values, inputs, strict=True))
    return inputs


def held(
    forward: Forward,
    inputs: tuple[Tensor, ...],
    args: tuple[object, ...],
    evidences: Sequence[Evidence],
    context: Context,
    draw: int,
) -> tuple[Forward, tuple[object, ...]]:
    """The network whose layers hold their evidence, and its additional arguments; itself where there is none."""
    holds = []
    for order, evidence in enumerate(evidences):
        site = evidence.site
        if isinstance(site, (LayerSite, ConceptSite)):
            place = hook_of(site, forward.modules)
            donors = donated(evidence.intervention, inputs, context, forward, place, args)

            def chosen(n_units: int, evidence: Evidence = evidence, order: int = order) -> Tensor:
                return torch.stack([evidence.assignment(n_units, i, draw, order) for i in context.ids])

            holds.append(LayerEvidence(site, place, evidence.intervention, replace(context, donors=donors), chosen))
    if not holds:
        return forward, args
    return EvidenceForward(forward, holds), (*args, torch.arange(len(context.ids)))


def _rows(evidence: Evidence, units: Units, ids: tuple[int, ...], draw: int, order: int) -> Tensor:
    chosen = [evidence.assignment(int(units.n_units[i]), one, draw, order) for i, one in enumerate(ids)]
    return torch.stack([pad(row, (0, units.width - len(row))) for row in chosen])


def _warn_no_change(intervention: Intervention) -> None:
    warnings.warn(
        f"The evidence {intervention!r} changes nothing in any example. Check its fill or region, and "
        "`normalization=`.",
        NoChangeWarning,
        stacklevel=7,
    )


# Trials before the first look at the intervals of a run that may stop early, and between two looks.
_FIRST, _ROUND = 100, 50


def answers_until(
    spec: TrialSpec, runner: Runner, measure: OutcomeMeasure, most: list[int], until: float, keep: bool
) -> dict[str, Answer]:
    """Rounds of trials; an example leaves when all its intervals are at most ``until`` to either side.

    Args:
        spec, runner, measured: the experiment.
        most: the largest number of trials of each example.
        until: half-width of the 95 % intervals.
        keep: keep the trials in the answers.
    """
    n, last = spec.n, max(most)
    outcomes: dict[str, Tensor] = {}
    active, used, done = list(range(n)), list(most), 0
    found: dict[str, Answer] = {}
    while active and done < last:
        stop = min(last, _FIRST if done == 0 else done + _ROUND)
        new = runner.run(spec, done, stop, measure, active)
        outcomes = {name: torch.cat([outcomes[name], new[name]], 1) if outcomes else new[name] for name in new}
        used = [min(stop, most[i]) if i in active else used[i] for i in range(n)]
        done = stop
        found = answers(spec, outcomes, measure.reference, measure, used, keep)
        active = [i for i in active if used[i] == done and _widest(spec, found, i) > until]
    return found


def _widest(spec: TrialSpec, found: dict[str, Answer], example: int) -> float:
    """Half the width of an example's widest interval; infinite where a unit's error is not known yet."""
    widest = 0.0
    for answer in found.values():
        if answer.std_error is not None:
            own = slice(int(spec.units.n_units[example]))
            dof = None if answer.dof is None else answer.dof[example, own]
            widths = half_width(answer.std_error[example, own], dof, 0.95)
            widest = max(widest, float(widths.nan_to_num(torch.inf).max()))
    return widest


def flip_outcome(
    spec: TrialSpec, captured_site: CapturedSite, measure: OutcomeMeasure, example: int
) -> Callable[[Tensor], Tensor]:
    """From states (B, U) in [0, 1] to outcomes (B, C) of one example, the site's value being h + a (do - h).

    Args:
        spec: the experiment; its units are those of a mask.
        captured_site: runs the network from the site.
        measure: from outputs to outcomes.
        example: which one.

    Raises:
        UnitError: units that overlap.
        ModelError: several output heads.
    """
    units = spec.units
    if not isinstance(units, MaskUnits):
        hint = "Pass `feature_mask=` instead of windows."
        raise UnitError(expected("units", "units that do not overlap", "windows", hint))
    if spec.intervention.n_variants > 1 or spec.intervention.per_trial:
        raise UnitError(expected("intervention", "one with a single value for each unit", spec.intervention))
    if len(measure.reference) > 1:
        wanted, got = "a model with one output head", sorted(measure.reference)
        raise ModelError(expected("forward_func", wanted, got, "Name one with `output=`."))
    context = spec.context.select([example])
    clean = [x[example : example + 1].detach() for x in spec.inputs]
    do = [checked_values(spec.intervention, x, replace(context, position=position)) for position, x in enumerate(clean)]

    def outcome(states: Tensor) -> Tensor:
        examples = torch.full((len(states),), example)
        padded = torch.nn.functional.pad(states, (0, units.width - states.shape[1]))
        weights = units.masks(padded, examples)
        values = tuple(x + weight.to(x.device) * (x1 - x) for x, x1, weight in zip(clean, do, weights, strict=True))
        heads = captured_site.forward(values, spec.args_of(examples))
        (found,) = measure(heads, examples.to(states.device)).values()
        return found

    return outcome


@dataclass
class Experiment:
    """Everything that one run needs; the arguments are those of :class:`ce_plugin.CausalEffect`, checked and resolved.

    Making one checks all that can be checked without running the model.
    """

    forward: Forward
    inputs: tuple[Tensor, ...]
    args: tuple[object, ...]
    site: InputSite | LayerSite | ConceptSite
    intervention: Intervention
    design: Design
    outcome: Outcome
    evidences: list[Evidence]
    ids: tuple[int, ...]
    seed: int
    target: Target = None
    predicted_only: bool = False
    perturbations_per_eval: int | None = None
    memory_budget: int | None = None
    show_progress: bool = False
    until: float | None = None
    keep_trials: bool = False
    keep_values: bool = False
    router: Router | None = None

    def __post_init__(self) -> None:
        if self.until is not None and (self.design.exact or not self.until > 0):
            wanted = "a positive half-width, for a random design"
            raise ArgumentError(expected("until", wanted, f"{self.until} for {self.design!r}"))
        per_eval = self.perturbations_per_eval
        if per_eval is not None and (not isinstance(per_eval, int) or per_eval < 1):
            raise ArgumentError(expected("perturbations_per_eval", "None or a positive integer", per_eval))
        self.n = len(self.inputs[0])
        self.n_draws = max((evidence.n_draws for evidence in self.evidences), default=1)
        self.context = Context(ids=self.ids, seed=self.seed)
        self._router = self.router or Router(self.forward)
        self.runner = Runner(
            self.forward, None if per_eval is None else per_eval * self.n, self.memory_budget, self.show_progress
        )
        self.route, self.cut, self.seconds = "full", False, 0.0
        self.kept: list[TrialSpec] = []
        self._looked: CapturedSite | None = None
        if isinstance(self.site, InputSite):
            self._settle(self.inputs)
        else:
            hook_of(self.site, self.forward.modules)

    def _settle(self, values: tuple[Tensor, ...]) -> None:
        """Units and trials of the site's values, (N, ...) each, and whether the design fits them."""
        units = self.site.units_of(values)
        self.spec = TrialSpec(values, self.args, units, self.design, self.intervention, self.context)
        self.used = [self.spec.n_trials(i) for i in range(self.n)]
        check_design(self.spec)

    def _look(self) -> None:
        """At a layer the units are known only when one example has passed through it."""
        if isinstance(self.site, InputSite) or self._looked is not None:
            return
        first = torch.tensor([0])
        inputs = tuple(x[first.to(x.device)] for x in self.inputs)
        args = rows_of_args(self.args, self.n, first)
        self._looked = self._router.at(self.site, inputs, args, self.runner)
        self._settle(tuple(value.expand(self.n, *value.shape[1:]) for value in self._looked.values))

    def look(self) -> dict[str, Tensor]:
        """Pass one example through the network; its outputs, without its evidence."""
        with self._guard():
            self._look()
            return self._first()

    def first_captured_site(self) -> tuple[TrialSpec, CapturedSite]:
        """The site of one example and how its trials would be run; after :meth:`look`."""
        with self._guard():
            captured_site = self._looked
            if captured_site is None:
                first = torch.tensor([0])
                inputs = tuple(x[first.to(x.device)] for x in self.inputs)
                captured_site = CapturedSite(self.forward, inputs, rows_of_args(self.args, self.n, first))
            spec = replace(self.spec, inputs=captured_site.values)
            # Evidence at a layer is set by hooks, which only whole passes meet.
            held = any(not isinstance(evidence.site, InputSite) for evidence in self.evidences)
            return spec, captured_site if held else self._router.followed(captured_site, spec)

    @property
    def trials(self) -> int:
        """Trials of the whole run."""
        return self.n_draws * self.spec.repeats * sum(self.used)

    def run(self) -> dict[str, Estimate]:
        """The estimates of all heads; the model and the random state are afterwards as they were."""
        started = time.perf_counter()
        draws: list[dict[str, Answer]] = []
        with self._guard():
            if self.checks_first or self.n > 1:
                self._look()
            if self.checks_first:
                self._check_target(self._first())
            for draw in range(self.n_draws):
                draws.append(self._draw(draw))
                if self.predicted_only and self.target is None:
                    # One class for all draws: differences between classes are no effects.
                    self.target = next(iter(draws[0].values())).target
        seconds = time.perf_counter() - started
        return {name: self._estimate([draw[name] for draw in draws], seconds) for name in draws[0]}

    def _guard(self) -> AbstractContextManager[None]:
        """Everything that may hold a network is left as it was."""
        sources = [self.intervention, *(evidence.intervention for evidence in self.evidences)]
        sites = [self.site, *(evidence.site for evidence in self.evidences)]
        coders = [site.autoencoder for site in sites if isinstance(site, ConceptSite)]
        held_by = (self.forward.forward_func, self.outcome.function)
        return state_guard(*held_by, *self.forward.modules, *sources, *coders)

    @property
    def checks_first(self) -> bool:
        """Whether one example passes through the network before costly evidence is made."""
        return any(evidence.intervention.forward_equivalents for evidence in self.evidences)

    def _first(self) -> dict[str, Tensor]:
        """The outputs of the first example without its evidence."""
        if self._looked is not None and self._looked.outputs is not None:
            return self._looked.outputs
        first = torch.tensor([0])
        inputs = tuple(x[first.to(x.device)] for x in self.inputs)
        return self.runner.evaluate(inputs, rows_of_args(self.args, self.n, first))

    def _check_target(self, heads: dict[str, Tensor]) -> None:
        """Errors of the target and the outcome, from the outputs of one example or of all."""
        every = {
            name: head if len(head) == self.n else head.expand(self.n, *head.shape[1:]) for name, head in heads.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, with the outputs under evidence
            self._measured(every)

    def _measured(self, heads: dict[str, Tensor], decided: dict[str, Tensor] | None = None) -> OutcomeMeasure:
        if self.predicted_only and len(heads) > 1:
            hint = "Name one with `output=`, or call `estimate`, which returns them all."
            raise ModelError(expected("forward_func", "a model with one output head", sorted(heads), hint))
        return OutcomeMeasure(heads, self.outcome, self.target, self.predicted_only, decided)

    def _locate(self, context: Context, draw: int) -> CapturedSite:
        """The site under one draw of the evidence."""
        inputs = evident(self.inputs, self.evidences, context, draw)
        forward, args = held(self.forward, inputs, self.args, self.evidences, context, draw)
        if isinstance(self.site, InputSite):
            return CapturedSite(forward, inputs, args)
        if self._looked is not None and self.n == 1 and not self.evidences:
            return self._looked
        runner = self.runner if forward is self.forward else self.runner.of(forward)
        return self._router.at(self.site, inputs, args, runner)

    def _set(self, draw: int) -> tuple[TrialSpec, CapturedSite]:
        """The experiment under one draw of the random evidence; assignments are drawn anew for each."""
        context = replace(self.context, seed=self.seed + draw)
        design = self.design if draw == 0 else self.design.reseeded(self.design.seed + draw)
        captured_site = self._locate(context, draw)
        if not isinstance(self.site, InputSite) and self._looked is None:
            self._settle(captured_site.values)
        context = replace(context, donors=self._donors(captured_site, context))
        spec = replace(self.spec, inputs=captured_site.values, args=captured_site.args, context=context, design=design)
        warn_unchanged(spec)
        if self.keep_values:
            self.kept.append(spec)
        return spec, captured_site

    def _start(
        self, spec: TrialSpec, captured_site: CapturedSite
    ) -> tuple[CapturedSite, Runner, dict[str, Tensor], OutcomeMeasure]:
        """What runs the trials, the reference's outputs, and how trials are measured against them.

        Whether flips can be followed takes passes to find out; the target and the outcome are checked before.
        """
        known = captured_site.outputs
        if known is None:
            captured_site, runner, known = self._router.start(captured_site, self.runner, self.trials)
            measure = self._measured(known)
            followed = self._router.followed(captured_site, spec)
            if followed is captured_site:
                return captured_site, runner, known, measure
        else:
            self._check_target(known)
            followed = self._router.followed(captured_site, spec)
        captured_site, runner, heads = self._router.start(followed, self.runner, self.trials)
        with warnings.catch_warnings():
            if captured_site.outputs is None:
                warnings.simplefilter("ignore")  # they came with the outputs above
            return captured_site, runner, heads, self._measured(heads, captured_site.outputs)

    def _draw(self, draw: int) -> dict[str, Answer]:
        """The effects under one draw of the random evidence."""
        spec, captured_site = self._set(draw)
        try:
            captured_site, runner, heads, measure = self._start(spec, captured_site)
            check_memory(spec, measure, max(self.used))
            if self.until is not None:
                return answers_until(spec, runner, measure, self.used, self.until, self.keep_trials)
            outcomes = runner.run(spec, 0, max(self.used), measure)
            compared = measure.reference
            if spec.design.reference == "all":
                every = runner.run(replace(spec, design=EveryUnit()), 0, 1, measure)
                compared = {name: outcome[:, 0] for name, outcome in every.items()}
            self.route, self.cut, self.seconds = captured_site.taken, captured_site.is_cut, captured_site.seconds
            found = answers(spec, outcomes, compared, measure, self.used, self.keep_trials)
            return self._with_insertion(found, heads, captured_site) if isinstance(self.site, ConceptSite) else found
        except AggregateError:
            return self._aggregated(spec, self.runner.of(captured_site.forward))

    def _aggregated(self, spec: TrialSpec, runner: Runner) -> dict[str, Answer]:
        """A network that returns one value for the batch makes the batch one example."""
        check_shared(spec, self.until)
        heads = outputs_of_batch(spec, runner, self._first())
        return answers_of_batch(spec, runner, self._measured(heads), self.used, self.keep_trials)

    def _with_insertion(
        self, found: dict[str, Answer], heads: dict[str, Tensor], captured_site: CapturedSite
    ) -> dict[str, Answer]:
        """The answers with what inserting the autoencoder does by itself."""
        plain = self._measured(captured_site.outputs or heads)
        inserted = plain(heads, torch.arange(self.n, device=captured_site.values[0].device))
        return {
            name: replace(answer, insertion=inserted[name] - plain.reference[name]) for name, answer in found.items()
        }

    def _donors(self, captured_site: CapturedSite, context: Context) -> tuple[Tensor, ...] | None:
        """What the intervention's donors are at the site."""
        at = captured_site.forward
        if isinstance(at, ForwardFromSite):
            return donated(self.intervention, at.inputs, context, self.forward, at.place, self.args)
        return donated(self.intervention, captured_site.values, context)

    def interactions(self, **options: Any) -> list[Interactions]:
        """Pairwise interactions of each example's units; options are those of :func:`~ce_plugin.effects.pairwise`."""
        with self._guard():
            self._look()
            spec, captured_site = self._set(0)
            captured_site, runner, heads = self._router.start(captured_site, self.runner, 1)
            measure = self._measured(heads, captured_site.outputs)
            options.setdefault("batch_size", runner.rows or 32)
            found = []
            for i in range(self.n):
                outcome = flip_outcome(spec, captured_site, measure, i)
                own: dict[str, Any] = {
                    "name": self.outcome.name,
                    "device": spec.device,
                    "dtype": spec.inputs[0].dtype,
                }
                labels = spec.units.labels
                names = labels[i] if isinstance(labels[0], list) else labels
                found.append(pairwise(outcome, int(spec.units.n_units[i]), unit_labels=names, **own, **options))
        return found

    def _estimate(self, draws: list[Answer], seconds: float) -> Estimate:
        answer = average(draws)
        units = self.spec.units
        groups = self.design.groups if isinstance(self.design, Joint) else None
        n = len(answer.effect)
        labels: Any = units.labels if groups is None else ["+".join(map(str, group)) for group in groups]
        counts = units.n_units[:n].clone() if groups is None else torch.full((n,), len(groups))
        return Estimate(
            **{k: getattr(answer, k) for k in ("effect", "std_error", "dof", "reference", "target", "predicted")},
            class_shape=answer.class_shape,
            n_units=counts,
            unit_labels=labels,
            groups=groups,
            n_trials=int(answer.n_trials.max()),
            outcome=self.outcome.name,
            design=repr(self.design),
            intervention=repr(self.intervention),
            evidence=", ".join(map(repr, self.evidences)) or "none",
            seed=self.seed,
            cost=self.runner.passes if self.route == "full" else round(seconds / self.seconds, 1),
            peeked=self.until is not None,
            insertion_effect=answer.insertion,
            site=repr(self.site),
            settings={
                "seconds": seconds,
                "trials_per_example": answer.n_trials.tolist(),
                "route": self.route,
                "cut": self.cut,
                "units_of_site": units.width,
            },
            p=self.design.flip_probability(),
            assignments=answer.assignments,
            outcomes=answer.outcomes,
            blocks=None if answer.outcomes is None else self.design.blocks(answer.outcomes.shape[1]),
        )


def cost_of(experiment: Experiment) -> Cost:
    """Trials and passes of a run; one example passes once, to see how many outcomes it has."""
    heads = experiment.look()
    outcome, design, n = experiment.outcome, experiment.design, experiment.n
    one = experiment.target is not None or experiment.predicted_only or not outcome.per_class
    outcomes = sum(1 if one else head.numel() for head in heads.values())
    interventions = (experiment.intervention, *(evidence.intervention for evidence in experiment.evidences))
    extra = sum(intervention.forward_equivalents for intervention in interventions)
    # The outcome with all units set, which some designs compare with, is one more trial.
    every = experiment.spec.repeats if design.reference == "all" else 0
    route, each, once = _route(experiment)
    passes = experiment.trials * each + experiment.n_draws * n * (once + every + extra) + experiment.checks_first
    if route == "full":
        passes += experiment.runner.layout_passes(experiment.inputs, experiment.args, experiment.trials)
    return Cost(experiment.trials, passes, route, 4 * outcomes * n * max(experiment.used))


def _route(experiment: Experiment) -> tuple[str, float, float]:
    """How trials will be run, what a trial costs, and what is run once for each example, in forward passes."""
    spec, captured_site = experiment.first_captured_site()
    cut = captured_site.forward
    if not isinstance(cut, ForwardFromSite) or cut.suffix is None or cut.captured is None:
        return "full", 1, 1
    share = cut.suffix.share(cut.captured)
    # A clean pass, another for what by-passes the site, and the reference.
    once = 1 + (not cut.suffix.is_cut) + share
    if captured_site.flips is None:
        return captured_site.route, share, once
    each = captured_site.flips.cost(spec)
    return captured_site.flips.route, each, once
