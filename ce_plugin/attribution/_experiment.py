"""One call of ``estimate``: from checked arguments through trials to an :class:`~ce_plugin.effects.Estimate`."""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ce_plugin.attribution._estimation import (
    Answer,
    OutcomeMeasure,
    Target,
    answers,
    average,
    check_design,
    check_finite,
    check_target,
    flat_target,
)
from ce_plugin.attribution._guide import PASSES, first_order, gradient_guide, has_map, is_guided
from ce_plugin.designs import Design, EveryUnit, FirstOrder, Joint
from ce_plugin.effects import Estimate, Interactions, Outcome, RegionTest, half_width, pairwise
from ce_plugin.effects.outcomes import OUTCOMES
from ce_plugin.effects.region import PLACEMENTS, grown_region, placements
from ce_plugin.effects.smooth import estimate_bytes
from ce_plugin.errors import (
    ArgumentError,
    CEPluginError,
    DesignError,
    InputError,
    ModelError,
    NoChangeWarning,
    UnitError,
    check_integer,
    check_number,
    expected,
)
from ce_plugin.interventions import Context, Intervention, Normalization, PixelMask
from ce_plugin.networks.forward import Forward, Shared
from ce_plugin.networks.guard import state_guard
from ce_plugin.networks.layers import watched_maps
from ce_plugin.networks.layout import misfit
from ce_plugin.networks.tracing import Untraceable, traced
from ce_plugin.randomness import generator
from ce_plugin.sites import ConceptSite, Evidence, InputSite, LayerSite, Masks, MaskUnits, Strides, Windows
from ce_plugin.trials._repeats import check_repeated, close
from ce_plugin.trials._routing import (
    CapturedSite,
    CapturingForward,
    EvidenceForward,
    ForwardFromSite,
    LayerEvidence,
    Router,
    SiteHook,
    hook_of,
)
from ce_plugin.trials._runner import OUTCOME_COPIES, AggregateError, Runner, run_aggregated
from ce_plugin.trials.batches import Cost, GivenTrials, TrialSpec, alternatives, checked_values, free_memory, rows_of
from ce_plugin.visualization.pictures import as_bytes

logger = logging.getLogger("ce_plugin")
Baselines: TypeAlias = "Tensor | float | tuple[Tensor | float, ...] | None"
Given: TypeAlias = "Intervention | Evidence | Sequence[Intervention | Evidence] | None"
Ids: TypeAlias = "Sequence[int] | Tensor | None"

# Trials before the first look at the intervals of a run that may stop early, and between two looks.
_FIRST, _ROUND = 100, 50
# Trials before the first update of a run that is watched, of smooth designs and of others; each has twice as many.
_SHOWN, _SHOWN_OTHERS = 12, 24
# The most examples that are passed together, and the most arguments, to find out which belong to all examples.
_TOGETHER, _UNCLEAR = 256, 4
# Donors that pass through the network together.
_DONORS = 16
# The most examples whose pictures an estimate keeps.
_PICTURED = 16
# Outcomes beside which the answer is told as a softmax probability.
_TOLD_AS_PROBABILITY = ("probability", "log_odds", "margin", "prediction_weighted")
_MOST_PROBABLE = 3


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call of ``attribute``, ``estimate``, ``estimate_cost`` or ``interactions`` asks for, as the user wrote it.

    Args:
        inputs, target, additional_forward_args, perturbations_per_eval, show_progress, given, ids, until, keep_trials:
            see :meth:`ce_plugin.CausalEffect.estimate`.
        baselines: of the inputs or of the layer.
        mask: ``feature_mask`` or ``layer_mask``.
        windows, strides: ``sliding_window_shapes`` and their steps, of an input.
        at_input: ``attribute_to_layer_input``.
        predicted_only: without a target explain each example's predicted class only.
        guided: a gradient may guide the map, where the design has one.
        passes: of each example, from which a random design's number of trials follows.
        on_update: is told what is known so far, and after how many passes of each example.
        answer: also run one region and random places of its shape, see :class:`~ce_plugin.effects.RegionTest`.
        answer_target: the class that the answer is about, where the effects are on all classes.
        weighting: of a map: keep what it is made of, under each draw of the evidence and each alternative value that
            is run by itself. None: no map is made.
    """

    inputs: Tensor | tuple[Tensor, ...]
    baselines: Baselines = None
    target: Target = None
    additional_forward_args: Any = None
    mask: Masks = None
    windows: Windows = None
    strides: Strides = None
    at_input: bool = False
    perturbations_per_eval: int | None = None
    show_progress: bool = False
    given: Given = None
    ids: Ids = None
    until: float | None = None
    keep_trials: bool = False
    predicted_only: bool = False
    guided: bool = False
    passes: int | None = None
    on_update: Callable[[Any, float], object] | None = None
    answer: bool = False
    answer_target: Target = None
    weighting: str | None = None


@dataclass(frozen=True)
class MapPart:
    """What a map is made of, under one draw of the evidence and one alternative value (or all that take turns).

    Attributes:
        spec: the trials.
        answer: the effects, of a network with one head.
        shown: for each example where its units are, (F, ...) in the layer's shape: where their changes arrive, or for
            maps of activations the clean value, (1, ...).
    """

    spec: TrialSpec
    answer: Answer
    shown: list[Tensor]


@dataclass(kw_only=True)
class Experiment:
    """Everything that one run needs, checked and resolved; making one checks all that needs no pass through the model.

    Args:
        call: how trials are run and what is kept of them.
        inputs, args, evidences, ids: what the call says of them, in one form.
        forward, router, outcome, seed, memory_budget: the explainer's.
        site, intervention, design: the explainer's, or the defaults for these inputs.
        class_names: one for each class of the output, where they are known.
        normalization: of images before the network; None: that of the intervention, where it has one.
    """

    call: Call
    inputs: tuple[Tensor, ...]
    args: tuple[object, ...]
    evidences: list[Evidence]
    ids: tuple[int, ...]
    site: InputSite | LayerSite | ConceptSite
    intervention: Intervention
    design: Design
    outcome: Outcome
    forward: Forward
    router: Router
    seed: int
    memory_budget: int | None
    class_names: tuple[str, ...] | None = None
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        until, per_eval = self.call.until, self.call.perturbations_per_eval
        if until is not None:
            wanted = "a positive half-width, for a design with standard errors"
            check_number("until", until, wanted, above=0)
            if not self.design.has_errors:
                raise ArgumentError(expected("until", wanted, f"{until} for {self.design!r}"))
        if per_eval is not None:
            check_integer("perturbations_per_eval", per_eval, "None or a positive integer", least=1)
        for name in ("at_input", "show_progress", "keep_trials", "answer"):
            value: object = getattr(self.call, name)
            if not isinstance(value, bool):
                named = "attribute_to_layer_input" if name == "at_input" else name
                raise ArgumentError(expected(named, "True or False", repr(value)))
        if self.call.on_update is not None and not callable(self.call.on_update):
            raise ArgumentError(expected("on_update", "None or a function", type(self.call.on_update).__name__))
        masks_input = isinstance(self.site, InputSite) and isinstance(self.intervention, PixelMask)
        if isinstance(self.design, FirstOrder) and not masks_input:
            raise DesignError(expected("design", "one with trials, for anything but masks of the input", self.design))
        check_target(self.call.target, len(self.inputs[0]))
        check_target(self.call.answer_target, len(self.inputs[0]))
        if self.call.answer_target is not None and (not self.call.answer or self.call.target is not None):
            wanted = "None without `answer=True`, or with a `target`, which the answer is about"
            raise ArgumentError(expected("answer_target", wanted, repr(self.call.answer_target)))
        self.n = len(self.inputs[0])
        self.target = self.call.target
        self.context = Context(ids=self.ids, seed=self.seed)
        rows = None if per_eval is None else per_eval * self.n
        self.runner = Runner(self.forward, rows, self.memory_budget, self.call.show_progress)
        self.route, self.cut, self.seconds, self.guided = "full", False, 0.0, False
        self.parts: list[MapPart] = []
        self.n_draws, self.evidence_forwards, self.evidence_at_layers = 1, 0, False
        for evidence in self.evidences:
            self.n_draws = max(self.n_draws, evidence.n_draws)
            self.evidence_forwards += evidence.intervention.forward_equivalents
            self.evidence_at_layers |= not isinstance(evidence.site, InputSite)
        if self.call.answer and (self.n_draws > 1 or isinstance(self.design, Joint)):
            got = "random evidence, drawn several times" if self.n_draws > 1 else repr(self.design)
            raise ArgumentError(expected("answer", "False for evidence that is drawn and for joint designs", got))
        self._example: CapturedSite | None = None
        self._ran: tuple[TrialSpec, CapturedSite]
        self.spec: TrialSpec
        if isinstance(self.site, InputSite):
            self._prepare(self.inputs)
        else:
            hook_of(self.site, self.forward.modules)

    def run(self, shown: Callable[[dict[str, Estimate]], Any] = dict) -> dict[str, Estimate]:
        """The estimates of all heads; the model and the random state are afterwards as they were.

        Args:
            shown: what who watches the run is shown of estimates.
        """
        self._started, self._shown = time.perf_counter(), shown
        draws: list[dict[str, Answer]] = []
        with self._guard():
            # Costly evidence is made only after one example has shown that the target and the outcome fit.
            if self.evidence_forwards or self.n > 1:
                self._look()
            if self.evidence_forwards:
                self._check_target(self._first_outputs())
            for draw in range(self.n_draws):
                draws.append(self._draw(draw, draws))
                if self.call.predicted_only and self.target is None:
                    # One class for all draws: differences between classes are no effects.
                    self.target = next(iter(draws[0].values())).target
            estimates = self._estimated(draws)
            if self.call.answer:
                ((name, estimate),) = estimates.items()
                answer = self._tested(estimate)
                # What it took is in the cost.
                estimates = {name: replace(self._estimated(draws)[name], answer=answer)}
            self._tell(estimates)
        return estimates

    def _tested(self, estimate: Estimate) -> RegionTest:
        """One region of each example, and as much elsewhere, in the network under the evidence of the trials."""
        spec, captured_site = self._ran
        rows = self._regions(estimate, spec)
        try:
            return self._covered(spec, captured_site, rows)
        except Untraceable as failure:
            return self._covered(spec, self.router.uncut(captured_site, failure), rows)

    def _regions(self, estimate: Estimate, spec: TrialSpec) -> tuple[Tensor, ...]:
        """For each example its region and then the random places, bool (1 + K, U)."""
        found, contribution = [], estimate.smoothed_contribution
        chosen = flat_target(self.call.answer_target, (self.n, *estimate.class_shape))
        chosen = estimate.predicted if chosen is None else chosen
        for i, own in enumerate(self.ids):
            column = 0 if contribution.shape[2] == 1 or chosen is None else int(chosen[i])
            region = grown_region(contribution[i, : int(spec.units.n_units[i]), column], spec.units.grid)
            draws = generator(self.seed, own, "placements")
            found.append(torch.cat([region[None], placements(region, spec.units.grid, PLACEMENTS, draws)]))
        return tuple(found)

    def _covered(self, spec: TrialSpec, captured_site: CapturedSite, rows: tuple[Tensor, ...]) -> RegionTest:
        """The outcomes of each example's region and places.

        Raises:
            Untraceable: they were to be run through a part of the network, which fails.
        """
        given = GivenTrials(**{**vars(spec), "design": EveryUnit()}, given=rows)
        trials = (1 + PLACEMENTS) * self.intervention.n_variants
        captured_site, runner, heads = self.router.start(captured_site, self.runner, self.n * trials)
        measure = self._told(heads, captured_site.outputs)
        ((name, outcomes),) = runner.run(given, 0, 1 + PLACEMENTS, measure).items()
        target, head = measure.targets[name], heads[name]
        answers = answered = None
        if measure.outcome is OUTCOMES["probability"]:
            answered, answers = head.softmax(1).cpu().topk(min(_MOST_PROBABLE, head.shape[1]), dim=1)
        outcomes = outcomes[..., 0].cpu()
        return RegionTest(
            region=torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True),
            target=torch.zeros(self.n, dtype=torch.long) if target is None else target.cpu(),
            measured=measure.outcome.name,
            clean=measure.reference[name][:, 0].cpu(),
            covered=outcomes[:, 0],
            placed=outcomes[:, 1:],
            answers=answers,
            answered=answered,
            grid=spec.units.grid or (),
            passes=trials,
        )

    def _told(self, heads: dict[str, Tensor], decided: dict[str, Tensor] | None = None) -> OutcomeMeasure:
        """How the answer is measured: the probability of one class where the network returns classes.

        Raises:
            ModelError, TargetError: there is no single class to speak of.
        """
        classes = all(head.dim() == 2 and head.shape[1] > 1 for head in heads.values())
        told = classes and self.outcome.name in _TOLD_AS_PROBABILITY
        outcome = OUTCOMES["probability"] if told else self.outcome
        target = self.target if self.call.answer_target is None else self.call.answer_target
        return OutcomeMeasure(heads, outcome, target, True, decided, warn=False)

    def _estimated(self, draws: list[dict[str, Answer]]) -> dict[str, Estimate]:
        """What the draws so far give."""
        seconds, estimates = time.perf_counter() - self._started, {}
        for name, answer in draws[0].items():
            several = average([draw[name] for draw in draws]) if len(draws) > 1 else answer
            estimates[name] = self._estimate(several, seconds)
        return estimates

    def _tell(self, estimates: dict[str, Estimate]) -> None:
        """Tell who watches the run what is known so far."""
        if self.call.on_update is not None:
            self.call.on_update(self._shown(estimates), self.runner.passes / self.n)

    def interactions(self, **options: Any) -> list[Interactions]:
        """Pairwise interactions of each example's units; options are those of :func:`~ce_plugin.effects.pairwise`."""
        with self._guard():
            self._look()
            spec, captured_site = self._set(0, repeat=True)
            try:
                return self._pairwise(spec, captured_site, **options)
            except Untraceable as failure:
                return self._pairwise(spec, self.router.uncut(captured_site, failure), **options)

    def _pairwise(self, spec: TrialSpec, captured_site: CapturedSite, **options: Any) -> list[Interactions]:
        captured_site, runner, heads = self.router.start(captured_site, self.runner, 1, repeat=True)
        measure = self._measured(heads, captured_site.outputs)
        options.setdefault("batch_size", runner.rows or 32)
        options |= {"name": self.outcome.name, "device": spec.device, "dtype": spec.inputs[0].dtype}
        labels, found = spec.units.labels, []
        for i in range(self.n):
            names = labels[i] if isinstance(labels[0], list) else labels
            outcome, n_units = flip_outcome(spec, captured_site, measure, i), int(spec.units.n_units[i])
            if i == 0:
                check_repeats(outcome, n_units)
            try:
                found.append(pairwise(outcome, n_units, unit_labels=names, **options))
            except RuntimeError as error:
                # Gradients through a traced part may fail where those through the whole network do not.
                if captured_site.route == "full" or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise Untraceable(str(error)) from error
        return found

    def cost(self) -> Cost:
        """Trials and passes of a run; one example passes once, to see how many outcomes it has."""
        if isinstance(self.design, FirstOrder):
            return Cost(0, self.n_draws * PASSES * self.n, "full", 0, self.runner.pass_bytes, self.memory_budget)
        with self._guard():
            self._look()
            with watched_maps(self.forward.modules if self._is_guided else []) as seen:
                heads = self._first_outputs()
            captured_site = self._example or CapturedSite(self.forward, *self._first())
            try:
                route, each, several, once, followed = self._route(captured_site)
            except Untraceable as failure:
                route, each, several, once, followed = self._route(self.router.uncut(captured_site, failure))
            grid = self.spec.units.grid
            guided = self._is_guided and grid is not None and has_map(seen, heads.values(), len(grid))
        # The outcome with all units set, which some designs compare with, is one more trial.
        once += self.spec.repeats if self.design.reference == "all" else 0
        once += self.intervention.forward_equivalents + self.evidence_forwards
        passes = self.trials * each + self.n_draws * self.n * once + (self.evidence_forwards > 0)
        # One clean row is run twice, and one trial.
        passes += 1 + each
        if self.call.answer:  # the region and the places, and what they are compared with
            passes += self.n * several * ((1 + PLACEMENTS) * self.intervention.n_variants + 1)
        if self._is_guided:
            passes += self.n_draws * (PASSES * self.n if guided else 1)
        if route == "full":
            passes += self.runner.layout_passes(self.inputs, self.args, self.trials)
        one = self.target is not None or self.call.predicted_only or not self.outcome.per_class
        outcomes = len(heads) if one else sum(head.numel() for head in heads.values())
        size = 4 * outcomes * self.n * max(self.used)
        taken = OUTCOME_COPIES * size + self.runner.pass_bytes + followed
        # After the passes; but what these took, the allocator still holds.
        taken += self._estimate_bytes(outcomes)
        return Cost(self.trials, passes, route, size, taken, self.memory_budget)

    def _route(self, captured_site: CapturedSite) -> tuple[str, float, float, float, int]:
        """How trials will be run; what one costs, also one of several units, and what is run once for each example, in
        forward passes; bytes.

        The bytes are those that following differences takes beside a pass through the network.
        """
        spec = replace(self.spec, inputs=captured_site.values)
        # Evidence at a layer is set by hooks, which only whole passes meet.
        if not self.evidence_at_layers:
            captured_site = self.router.followed(captured_site, spec)
        cut = captured_site.forward
        if not isinstance(cut, ForwardFromSite) or cut.suffix is None or cut.captured is None:
            return "full", 1, 1, 1, 0
        with traced():
            share = cut.suffix.share(cut.captured)
            # A clean pass, another for what by-passes the site, and the reference.
            once = 1 + (not cut.suffix.is_cut) + share
            each = share if captured_site.flips is None else captured_site.flips.cost(spec)
        followed = 0 if captured_site.flips is None else captured_site.flips.pass_bytes
        return captured_site.taken, each, share, once, followed

    @property
    def trials(self) -> int:
        """Trials of the whole run."""
        return self.n_draws * self.spec.repeats * sum(self.used)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Everything that may hold a network is left as it was; errors that the inputs explain say so.

        Raises:
            InputError: a pass failed, and the network's first module shows why.
        """
        holders = [self.outcome.function, self.intervention]
        if isinstance(self.site, ConceptSite):
            holders.append(self.site.autoencoder)
        for evidence in self.evidences:
            holders.append(evidence.intervention)
            if isinstance(evidence.site, ConceptSite):
                holders.append(evidence.site.autoencoder)
        try:
            with state_guard(*holders, networks=self.forward.modules):
                self.args = with_shared(self.runner, self.inputs, self.args)
                if isinstance(self.site, InputSite):
                    self.spec = replace(self.spec, args=self.args)
                yield
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            found = None if isinstance(error, CEPluginError) else misfit(self.forward.modules, self.inputs)
            if found is None:
                raise
            wanted, got, hint = found
            raise InputError(expected("inputs", wanted, got, hint)) from error

    def _prepare(self, values: tuple[Tensor, ...]) -> None:
        """Units and trials of the site's values, (N, ...) each, and whether the design fits them."""
        if isinstance(self.site, LayerSite):
            self.site = self.site.laid_out(values[0], self.forward.modules, maps=self.call.weighting is not None)
        units = self.site.units_of(values)
        self.spec = TrialSpec(values, self.args, units, self.design, self.intervention, self.context)
        self.used = list(map(self.spec.n_trials, range(self.n)))
        check_design(self.spec)

    def _first(self, rows: int = 1) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """The first examples' inputs and additional arguments, without their evidence."""
        first = torch.arange(rows)
        return rows_of(self.inputs, self.n, first), rows_of(self.args, self.n, first)

    def _first_outputs(self) -> dict[str, Tensor]:
        """The first example's outputs, without its evidence."""
        known = None if self._example is None else self._example.outputs
        return self.runner.first(self.inputs, self.args) if known is None else known

    def _look(self) -> None:
        """At a layer the units are known only when one example has passed through it."""
        if isinstance(self.site, InputSite) or self._example is not None:
            return
        fewest = self.runner.fewest(self.n)
        try:
            example = self.router.at(self.site, *self._first(fewest), self.runner)
        except CEPluginError:
            raise
        except Exception:
            # Where it is the number of rows that the network cannot take, the pass of all examples says so.
            if fewest < self.n:
                self.router.at(self.site, self.inputs, self.args, self.runner)
            raise
        outputs = {name: head[:1] for name, head in (example.outputs or {}).items()}
        self._example = replace(example, values=tuple(value[:1] for value in example.values), outputs=outputs)
        self._prepare(tuple(value.expand(self.n, *value.shape[1:]) for value in self._example.values))

    def _check_target(self, heads: dict[str, Tensor]) -> None:
        """Errors of the target and the outcome, from the outputs of one example or of all."""
        every = {}
        for name, head in heads.items():
            every[name] = head.expand(self.n, *head.shape[1:])
        self._measured(every, warn=False)  # warnings come with the outputs under evidence

    def _measured(
        self, heads: dict[str, Tensor], decided: dict[str, Tensor] | None = None, warn: bool = True
    ) -> OutcomeMeasure:
        measure = OutcomeMeasure(heads, self.outcome, self.target, self.call.predicted_only, decided, warn)
        if self.class_names is not None and len(heads) == 1:
            (head,) = heads.values()
            if head.dim() == 2 and head.shape[1] != len(self.class_names):
                wanted = f"{head.shape[1]} names, one for each class of the output"
                raise ArgumentError(expected("class_names", wanted, len(self.class_names)))
        if self.call.answer:
            self._told(heads, decided)  # what does not fit is said before the trials
        return measure

    def _draw(self, draw: int, before: list[dict[str, Answer]]) -> dict[str, Answer]:
        """The effects under one draw of the random evidence, after others."""
        repeat = not before
        spec, captured_site = self._set(draw, repeat)
        if isinstance(self.design, FirstOrder):
            self._ran = spec, captured_site
            return self._first_order(spec, captured_site)
        if self.call.weighting is None:
            self._before = before
            found, captured_site = self._cut_or_whole(spec, captured_site, repeat)
            self._ran = spec, captured_site
            return found
        parts: list[MapPart] = []
        for part in alternatives(spec):
            found, captured_site = self._cut_or_whole(part, captured_site, repeat and not parts)
            if len(found) > 1:
                hint = "Name one with `output=`."
                raise ArgumentError(expected("forward_func", "a model with one output head", sorted(found), hint))
            ((name, answer),) = found.items()
            by_change = self.call.weighting == "change"
            shown = self.router.changes(captured_site, part) if by_change else list(torch.split(part.inputs[0], 1))
            parts.append(MapPart(part, answer, shown))
        self.parts += parts
        return {name: replace(answer, effect=torch.stack([part.answer.effect for part in parts]).mean(0))}

    def _first_order(self, spec: TrialSpec, captured_site: CapturedSite) -> dict[str, Answer]:
        """Effects to first order, of the target or of the class predicted."""

        def measured(heads: dict[str, Tensor], warn: bool) -> OutcomeMeasure:
            return OutcomeMeasure(heads, self.outcome, self.target, predicted_only=True, warn=warn)

        measure, effect = first_order(captured_site.forward, spec, measured)
        self.guided = True
        self.runner.count(PASSES * spec.n)
        ((name, reference),) = measure.reference.items()
        target, predicted = measure.targets[name], measure.predicted[name]
        none = torch.zeros(spec.n, dtype=torch.long)
        return {name: Answer(effect, None, None, reference, target, predicted, measure.class_shapes[name], none)}

    def _cut_or_whole(
        self, spec: TrialSpec, captured_site: CapturedSite, repeat: bool
    ) -> tuple[dict[str, Answer], CapturedSite]:
        """The effects in trials from this site, and the site, with the whole network where its part of it fails."""
        try:
            return self._answers(spec, captured_site, repeat), captured_site
        except Untraceable as failure:
            captured_site = self.router.uncut(captured_site, failure)
            return self._answers(spec, captured_site, repeat), captured_site

    def _answers(self, spec: TrialSpec, captured_site: CapturedSite, repeat: bool) -> dict[str, Answer]:
        """The effects in trials from this site.

        Args:
            spec, captured_site: the experiment.
            repeat: run one clean row and one trial twice, which must give the same.

        Raises:
            Untraceable: they were to be run through a part of the network, which fails.
        """
        try:
            captured_site, runner, heads, measure = self._start(spec, captured_site, repeat)
            runner.outcome_bytes = check_memory(spec, measure, max(self.used))
            runner.estimate_bytes = self._estimate_bytes(max(one.shape[1] for one in measure.reference.values()))
            guide = self._guide(captured_site.forward, spec, measure)
            if self.call.until is not None or (self.call.on_update is not None and not self.design.exact):
                keep, tell = self.call.keep_trials, self._tell_of_round
                return answers_in_rounds(spec, runner, measure, self.used, self.call.until, keep, repeat, guide, tell)
            outcomes = runner.run(spec, 0, max(self.used), measure, repeat=repeat)
            compared = measure.reference
            if spec.design.reference == "all":
                every = runner.run(replace(spec, design=EveryUnit()), 0, 1, measure)
                compared = {name: outcome[:, 0] for name, outcome in every.items()}
            self.route, self.cut, self.seconds = captured_site.taken, captured_site.is_cut, captured_site.seconds
            found = answers(spec, outcomes, compared, measure, self.used, self.call.keep_trials, guide)
            return self._with_insertion(found, heads, captured_site) if isinstance(self.site, ConceptSite) else found
        except AggregateError:
            return self._aggregated(spec, self.runner.of(captured_site.forward))

    def _tell_of_round(self, found: dict[str, Answer]) -> None:
        if self.call.on_update is not None:
            self._tell(self._estimated([*self._before, found]))

    def _estimate_bytes(self, outcomes: int) -> int:
        """What a smooth estimate of so many outcomes takes; other estimators take next to nothing."""
        if self.design.exact or self.design.estimator != "smooth":
            return 0
        return estimate_bytes(max(self.used), self.spec.units.width, outcomes)

    @property
    def _is_guided(self) -> bool:
        """Whether a gradient guides the map."""
        return self.call.guided and is_guided(self.design, self.intervention) and bool(self.forward.modules)

    def _guide(self, forward: Forward, spec: TrialSpec, measure: OutcomeMeasure) -> Tensor | None:
        """What a gradient says of the effects, (N, U, C)."""
        if not self._is_guided or len(measure.reference) > 1:
            return None
        found = gradient_guide(forward, spec, measure)
        self.guided = found is not None
        self.runner.count(PASSES * spec.n if self.guided else 1)
        return found

    def _set(self, draw: int, repeat: bool) -> tuple[TrialSpec, CapturedSite]:
        """The trials under one draw of the random evidence, and the site; assignments are drawn anew for each."""
        context = replace(self.context, seed=self.seed + draw)
        design = self.design if draw == 0 else self.design.reseeded(self.design.seed + draw)
        inputs, forward, args = self.inputs, self.forward, self.args
        if self.evidences:
            inputs = with_evidence(inputs, self.evidences, context, draw)
            forward, args = layers_with_evidence(forward, inputs, args, self.evidences, context, draw)
        if isinstance(self.site, InputSite):
            captured_site = CapturedSite(forward, inputs, args)
        elif self._example is not None and self.n == 1 and not (self.evidences or repeat):
            captured_site = self._example
        else:
            runner = self.runner if forward is self.forward else self.runner.of(forward)
            captured_site = self.router.at(self.site, inputs, args, runner, repeat)
            if self._example is None:
                self._prepare(captured_site.values)
        at = captured_site.forward
        if isinstance(at, ForwardFromSite):
            donors = donated(self.intervention, at.inputs, context, self.forward, at.place, self.args)
        else:
            donors = donated(self.intervention, captured_site.values, context)
        context = replace(context, donors=donors)
        spec = replace(self.spec, inputs=captured_site.values, args=captured_site.args, context=context, design=design)
        warn_unchanged(spec)
        return spec, captured_site

    def _start(
        self, spec: TrialSpec, captured_site: CapturedSite, repeat: bool
    ) -> tuple[CapturedSite, Runner, dict[str, Tensor], OutcomeMeasure]:
        """What runs the trials, the reference's outputs, and how trials are measured against them.

        Whether flips can be followed takes passes to find out; the target and the outcome are checked before.
        """
        known = captured_site.outputs
        if known is None:
            captured_site, runner, known = self.router.start(captured_site, self.runner, self.trials, repeat)
            measure = self._measured(known)
            followed = self.router.followed(captured_site, spec)
            if followed is captured_site:
                return captured_site, runner, known, measure
        else:
            self._check_target(known)
            followed = self.router.followed(captured_site, spec)
        captured_site, runner, heads = self.router.start(followed, self.runner, self.trials)
        warn = captured_site.outputs is not None  # otherwise warnings came with the outputs above
        return captured_site, runner, heads, self._measured(heads, captured_site.outputs, warn)

    def _with_insertion(
        self, found: dict[str, Answer], heads: dict[str, Tensor], captured_site: CapturedSite
    ) -> dict[str, Answer]:
        """The answers with what inserting the autoencoder does by itself."""
        plain = self._measured(captured_site.outputs or heads)
        inserted = plain(heads, torch.arange(self.n, device=captured_site.values[0].device))
        for name in found:
            found[name] = replace(found[name], insertion_effect=inserted[name] - plain.reference[name])
        return found

    def _aggregated(self, spec: TrialSpec, runner: Runner) -> dict[str, Answer]:
        """A network that returns one value for the batch makes the batch one example.

        Raises:
            ModelError: the examples do not share what they must share, or some outputs have one value per example.
        """
        single = isinstance(spec.units.labels[0], str)
        if self.call.until is not None or self.call.answer or len(set(self.ids)) > 1 or not single:
            hint = "Leave out `until=`, `answer=`, `ids=` and masks that differ between examples."
            wanted = "a model that returns one value per example for these options"
            raise ModelError(expected("forward_func", wanted, "one value per batch", hint))
        found = misfit(self.forward.modules, self.inputs)
        if found is not None:
            # Without the dimension of the batch a convolution takes the examples for channels.
            raise InputError(expected("inputs", *found))
        heads = runner.evaluate_aggregated(spec.inputs, spec.args, repeat=True)
        if any(heads[name].shape != one.shape for name, one in self._first_outputs().items()):
            shapes = [tuple(head.shape) for head in heads.values()]
            wanted = "a model with one value per example in every output"
            got = f"shapes {shapes} for {spec.n} examples, some not one for each"
            raise ModelError(expected("forward_func", wanted, got, "Name the part to explain with `output=`."))
        measure = self._measured(heads)
        outcomes = run_aggregated(runner, spec, measure)
        compared = measure.reference
        if spec.design.reference == "all":
            every = run_aggregated(runner, replace(spec, design=EveryUnit()), measure)
            compared = {name: outcome[:, 0] for name, outcome in every.items()}
        return answers(spec, outcomes, compared, measure, self.used[:1], self.call.keep_trials)

    def _estimate(self, answer: Answer, seconds: float) -> Estimate:
        units, n = self.spec.units, len(answer.effect)
        labels: Any = units.labels
        groups, counts = None, units.n_units[:n].clone()
        if isinstance(self.design, Joint):
            groups = self.design.groups
            labels = ["+".join(map(str, group)) for group in groups]
            counts = torch.full((n,), len(groups))
        return Estimate(
            **vars(answer) | {"n_trials": int(answer.n_trials.max())},
            n_units=counts,
            unit_labels=labels,
            groups=groups,
            outcome=self.outcome.name,
            design=repr(self.design),
            intervention=repr(self.intervention),
            evidence=", ".join(map(repr, self.evidences)) or "none",
            seed=self.seed,
            cost=self.runner.passes if self.route == "full" else round(seconds / self.seconds, 1),
            peeked=self.call.until is not None,
            site=repr(self.site),
            settings={
                "seconds": seconds,
                "trials_per_example": answer.n_trials.tolist(),
                "route": self.route,
                "cut": self.cut,
                "guide": "gradient" if self.guided else None,
                "units_of_site": units.width,
                "grid": None if units.grid is None else list(units.grid),
                "channel_dim": None if isinstance(self.site, ConceptSite) else self.site.channel_dim,
            },
            p=self.design.flip_probability(),
            blocks=None if answer.outcomes is None else self.design.blocks(answer.outcomes.shape[1]),
            class_names=self.class_names,
            pictures=self._pictures(),
        )

    def _pictures(self) -> Tensor | None:
        """What the network saw, uint8 (N, C, H, W): of few images that are cut into the default grid."""
        if not isinstance(self.site, InputSite) or not self.site.is_grid(self.inputs) or self.n > _PICTURED:
            return None
        x = self._ran[0].inputs[0] if hasattr(self, "_ran") else self.inputs[0]
        if x.dim() != 4 or x.shape[1] not in (1, 3) or self.site.channel_dim not in (None, 1):
            return None
        own = self.intervention.normalization if isinstance(self.intervention, PixelMask) else Normalization()
        return as_bytes((self.normalization or own).to_image(x))


def with_shared(runner: Runner, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> tuple[object, ...]:
    """The additional arguments, with those tensors marked that belong to all examples alike.

    What a tensor with as many rows as examples means is not in its shape. What the model returns for all examples at
    once decides: a few of them, with the rows of the argument or with the whole of it, must give the same.

    Raises:
        ArgumentError: neither gives the same.
    """
    n = len(inputs[0])
    tensors = [k for k, arg in enumerate(args) if isinstance(arg, Tensor) and arg.dim()]
    if not tensors:
        return args
    unclear = [k for k in tensors if len(cast(Tensor, args[k])) == n][:_UNCLEAR]
    if n > _TOGETHER:
        logger.info("additional_forward_args: a row of each tensor with %d rows is taken for each example", n)
        return args
    shapes = [tuple(cast(Tensor, args[k]).shape) for k in tensors]
    try:
        whole = runner.evaluate(_copies(inputs), args)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        other = any(shape[0] not in (1, n) for shape in shapes)
        if isinstance(error, CEPluginError) or not other or misfit(runner.forward.modules, inputs) is not None:
            raise
        got = f"tensors of shapes {shapes}, at which it fails ({str(error).splitlines()[0]})"
        taken = f"what the model takes with inputs {tuple(inputs[0].shape)}"
        raise ArgumentError(expected("additional_forward_args", taken, got)) from error
    if any(not head.dim() or len(head) != n for head in whole.values()):
        return args  # one value for the batch, which is then passed as a whole
    choices = sorted(itertools.product((False, True), repeat=len(unclear)), key=sum)
    for index in (torch.tensor([0, n - 1, 0]), torch.tensor([0])):  # some networks take one row at a time only
        wanted = {name: head[index.to(head.device)] for name, head in whole.items()}
        for choice in choices:
            shared = {k for k, chosen in zip(unclear, choice, strict=True) if chosen}
            marked = tuple(Shared(cast(Tensor, arg)) if k in shared else arg for k, arg in enumerate(args))
            with suppress(RuntimeError, ValueError, TypeError, IndexError):
                found = runner.evaluate(_copies(rows_of(inputs, n, index)), rows_of(marked, n, index))
                if close(found, wanted):
                    for k in shared:
                        logger.info(
                            "additional_forward_args[%d] belongs to all examples: by rows the outputs differ", k
                        )
                    return marked
    again = runner.evaluate(_copies(inputs), args)
    if not close(again, whole):
        return args  # a random network, which is refused as one
    got = f"tensors of shapes {shapes}, with which examples give other outputs than all {n} together"
    hint = "Give each example its own row, (N, ...)."
    raise ArgumentError(expected("additional_forward_args", "one row for each example, or the same for all", got, hint))


def _copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies, because a network may write to its input."""
    return tuple(x.clone() for x in inputs)


def with_evidence(
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
        counts = units.n_units.tolist()
        chosen = [evidence.assignment(counts[i], one, draw, order) for i, one in enumerate(context.ids)]
        rows = pad_sequence(chosen, batch_first=True)
        masks = [mask.to(inputs[0].device) for mask in units.masks(rows, torch.arange(len(rows)))]
        donors = donated(evidence.intervention, inputs, context)
        changed, new = False, []
        for k, (x, mask) in enumerate(zip(inputs, masks, strict=True)):
            do = checked_values(evidence.intervention, x, replace(context, position=k, mask=mask, donors=donors))
            changed |= bool((x != do).any())
            new.append(torch.where(mask, do, x))
        if not changed:
            warnings.warn(
                f"The evidence {evidence.intervention!r} changes nothing in any example. Check its fill or region, and "
                "`normalization=`.",
                NoChangeWarning,
                stacklevel=7,
            )
        inputs = tuple(new)
    return inputs


def layers_with_evidence(
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
            hook = hook_of(site, forward.modules)
            donors = donated(evidence.intervention, inputs, context, forward, hook, args)

            def chosen(n_units: int, evidence: Evidence = evidence, order: int = order) -> Tensor:
                return torch.stack([evidence.assignment(n_units, i, draw, order) for i in context.ids])

            holds.append(
                LayerEvidence(
                    site, hook, evidence.intervention, replace(context, donors=donors), chosen, forward.modules
                )
            )
    if not holds:
        return forward, args
    return EvidenceForward(forward, holds), (*args, torch.arange(len(context.ids)))


def donated(
    intervention: Intervention,
    inputs: tuple[Tensor, ...],
    context: Context,
    forward: Forward | None = None,
    hook: SiteHook | None = None,
    args: tuple[object, ...] = (),
) -> tuple[Tensor, ...] | None:
    """What ``context.donors`` is to be: the values at the site of the inputs that the intervention names.

    Args:
        intervention: names them.
        inputs: the examples' own inputs, (N, ...) each.
        context: ids and seed.
        forward, hook, args: the network, the site and additional arguments; without a hook the site is the input.

    Returns:
        One tensor for each tensor of the site, or None where the intervention needs no donors.
    """
    donors = intervention.donors(inputs, context)
    if donors is None:
        return None
    if hook is None or forward is None:
        return tuple(intervention.collect([donor]) for donor in donors)
    capture = CapturingForward(forward, hook, once=False)
    return (intervention.collect(_values_at_site(capture, donors, args, len(inputs[0]))),)


def _values_at_site(
    capture: CapturingForward, donors: tuple[Tensor, ...], args: tuple[object, ...], n: int
) -> Iterator[Tensor]:
    # No single row is measured first: a layer's value takes no more memory than the pass that computes it.
    for start in range(0, len(donors[0]), _DONORS):
        rows = torch.arange(start, min(start + _DONORS, len(donors[0])))
        some = rows_of(donors, len(donors[0]), rows)
        # Arguments of the examples go with their counterparts; a reference set of another length takes them whole.
        own = rows_of(args, n, rows) if len(donors[0]) == n else args
        yield capture.at_site(some, own)


def warn_unchanged(spec: TrialSpec) -> None:
    """Warn of examples in which an intervention, or one of its alternative values, changes nothing.

    Warns:
        NoChangeWarning: there are such examples.
    """
    intervention, variants = spec.intervention, spec.intervention.n_variants
    if intervention.per_trial or intervention.forward_equivalents:
        return  # unknown before the trials, or too expensive to compute twice (attacks warn by themselves)
    unchanged = torch.ones(variants, spec.n, dtype=torch.bool)
    for variant in range(variants):
        for position, x in enumerate(spec.inputs):
            at = replace(spec.context, position=position, variant=variant)
            # A blur of a constant picture leaves it but for rounding.
            rounding = 8 * torch.finfo(x.dtype).eps * x.abs().max()
            same = (checked_values(intervention, x, at) - x).abs() <= rounding
            unchanged[variant] &= same.reshape(spec.n, -1).all(1).cpu()
    for variant in range(variants):
        examples = unchanged[variant].nonzero()[:5, 0].tolist()
        if not examples or (variant and bool(unchanged.all())):
            continue
        what, so = repr(intervention), "their effects are zero by construction"
        if not bool(unchanged.all(0)[examples].all()):
            what = f"Alternative {variant + 1} of the {variants} values of {what}"
            so = f"their effects are smaller by about 1/{variants}"
        warnings.warn(
            f"{what} changes nothing in example(s) {examples}, so that {so}. Check its fill or region, and "
            "`normalization=`.",
            NoChangeWarning,
            stacklevel=7,
        )


def check_memory(spec: TrialSpec, measure: OutcomeMeasure, trials: int) -> int:
    """Bytes that the outcomes of all trials take; they must fit into memory.

    Raises:
        ArgumentError: they do not.
    """
    size = 0
    for outcome in measure.reference.values():
        size += outcome.shape[1] * outcome.element_size() * spec.n * trials
    free = free_memory(spec.device)
    if size > free:
        got = f"{size / 2**30:.1f} GiB ({spec.n} examples x {trials} trials x all classes)"
        hint = "Pass `target=`, fewer examples, or coarser units."
        raise ArgumentError(expected("inputs", f"few enough for {free / 2**30:.1f} GiB of outcomes", got, hint))
    return size


def answers_in_rounds(
    spec: TrialSpec,
    runner: Runner,
    measure: OutcomeMeasure,
    most: list[int],
    until: float | None,
    keep: bool,
    repeat: bool,
    guide: Tensor | None,
    tell: Callable[[dict[str, Answer]], None],
) -> dict[str, Answer]:
    """Rounds of trials; an example leaves when all its intervals are at most ``until`` to either side.

    Args:
        spec, runner, measure: the experiment.
        most: the largest number of trials of each example.
        until: half-width of the 95 % intervals; None runs all trials.
        keep: keep the trials in the answers.
        repeat: run one trial twice, which must give the same.
        guide: see :func:`gradient_guide`.
        tell: is told the answers of every round but the last.
    """
    n, last = spec.n, max(most)
    outcomes: dict[str, Tensor] = {}
    active, used, done = list(range(n)), list(most), 0
    found: dict[str, Answer] = {}
    for stop in _rounds(spec.design, last, until):
        new = runner.run(spec, done, stop, measure, active, repeat and done == 0)
        outcomes = {name: torch.cat([outcomes[name], new[name]], 1) if outcomes else new[name] for name in new}
        used = [min(stop, most[i]) if i in active else used[i] for i in range(n)]
        done = stop
        found = answers(spec, outcomes, measure.reference, measure, used, keep, guide)
        if until is not None:
            active = [i for i in active if used[i] == done and _widest(spec, found, i) > until]
        if not active or done == last:
            break
        tell(found)
    return found


def _rounds(design: Design, last: int, until: float | None) -> list[int]:
    """Trials so far after each round: as many again in each, or twice as many where nobody looks at intervals."""
    if until is not None:
        return [*range(_FIRST, last, _ROUND), last]
    first = _SHOWN if design.estimator == "smooth" else _SHOWN_OTHERS
    return [*itertools.takewhile(lambda stop: stop < last, (first * 2**k for k in itertools.count())), last]


def _widest(spec: TrialSpec, found: dict[str, Answer], example: int) -> float:
    """Half the width of an example's widest interval; infinite where a unit's error is not known yet."""
    widest, own = 0.0, slice(int(spec.units.n_units[example]))
    for answer in found.values():
        if answer.std_error is None:
            return torch.inf
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
        padded = pad(states, (0, units.width - states.shape[1]))
        weights = units.masks(padded, examples)
        values = tuple(x + weight.to(x.device) * (x1 - x) for x, x1, weight in zip(clean, do, weights, strict=True))
        heads = captured_site.forward(values, spec.args_of(examples))
        (found,) = measure(heads, examples.to(states.device)).values()
        check_finite(spec, measure, found[None].detach(), torch.ones(1, len(found), dtype=torch.bool))
        return found

    return outcome


def check_repeats(outcome: Callable[[Tensor], Tensor], n_units: int) -> None:
    """That the state with every unit set has one outcome, by itself and beside the clean state.

    Raises:
        ModelError: it has not: the network is random, or mixes the rows of a batch.
    """

    def alone() -> dict[str, Tensor]:
        return {"": outcome(torch.ones(1, n_units))}

    with torch.no_grad():
        both = outcome(torch.tensor([[0.0], [1.0]]).expand(2, n_units))
        check_repeated({"": both[1:]}, alone, {"": both})
