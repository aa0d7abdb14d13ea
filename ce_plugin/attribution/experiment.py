"""One call of ``estimate``: from checked arguments through trials to an :class:`~ce_plugin.effects.Estimate`."""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ce_plugin.attribution.estimation import Answer, answers, average, check_design
from ce_plugin.attribution.evident import evident, held
from ce_plugin.attribution.flips import flip_outcome
from ce_plugin.attribution.inputs import Target
from ce_plugin.attribution.measured import Measured
from ce_plugin.designs import Design, EveryUnit, Joint
from ce_plugin.effects import Estimate, Interactions, Outcome, half_width, pairwise
from ce_plugin.errors import ArgumentError, ModelError, NoChangeWarning, expected
from ce_plugin.guard import state_guard
from ce_plugin.interventions import Context, Intervention
from ce_plugin.sites import ConceptSite, Evidence, InputSite, LayerSite
from ce_plugin.trials import Cost, Forward, Runner, Setting
from ce_plugin.trials.batching import free_memory
from ce_plugin.trials.donors import donated
from ce_plugin.trials.downstream import Downstream
from ce_plugin.trials.located import Located, Locator, place_of
from ce_plugin.trials.runner import AggregateError, as_one_row, run_aggregated
from ce_plugin.trials.setting import rows_of_args
from ce_plugin.trials.values import checked_values

__all__ = ["Experiment"]

# Trials before the first look at the intervals of a run that may stop early, and between two looks.
_FIRST, _ROUND = 100, 50


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
    locator: Locator | None = None

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
        self._locator = self.locator or Locator(self.forward)
        self.runner = Runner(
            self.forward, None if per_eval is None else per_eval * self.n, self.memory_budget, self.show_progress
        )
        self.route, self.cut, self.seconds = "full", False, 0.0
        self.kept: list[Setting] = []
        self._looked: Located | None = None
        if isinstance(self.site, InputSite):
            self._settle(self.inputs)
        else:
            place_of(self.site, self.forward.modules)

    def _settle(self, values: tuple[Tensor, ...]) -> None:
        """Units and trials of the site's values, (N, ...) each, and whether the design fits them."""
        units = self.site.units_of(values)
        self.setting = Setting(values, self.args, units, self.design, self.intervention, self.context)
        self.used = [self.setting.n_trials(i) for i in range(self.n)]
        check_design(self.setting)

    def _look(self) -> None:
        """At a layer the units are known only when one example has passed through it."""
        if isinstance(self.site, InputSite) or self._looked is not None:
            return
        first = torch.tensor([0])
        inputs = tuple(x[first.to(x.device)] for x in self.inputs)
        args = rows_of_args(self.args, self.n, first)
        self._looked = self._locator.at(self.site, inputs, args, self.runner)
        self._settle(tuple(value.expand(self.n, *value.shape[1:]) for value in self._looked.values))

    @property
    def trials(self) -> int:
        """Trials of the whole run."""
        return self.n_draws * self.setting.repeats * sum(self.used)

    def cost(self) -> Cost:
        """Trials and passes of the run; one example passes once, to see how many outcomes it has."""
        with self._guard():
            self._look()
            heads = self._first()
        one = self.target is not None or self.predicted_only or not self.outcome.per_class
        outcomes = sum(1 if one else head.numel() for head in heads.values())
        extra = sum(i.forward_equivalents for i in (self.intervention, *(e.intervention for e in self.evidences)))
        # The outcome with all units set, which some designs compare with, is one more trial.
        every = self.setting.repeats if self.design.reference == "all" else 0
        route, each, once = self._route()
        passes = self.trials * each + self.n_draws * self.n * (once + every + extra) + self._checks_first
        if route == "full":
            passes += self.runner.layout_passes(self.inputs, self.args, self.trials)
        return Cost(self.trials, passes, route, 4 * outcomes * self.n * max(self.used))

    def _route(self) -> tuple[str, float, float]:
        """How trials will be run, what a trial costs, and what is run once for each example, in forward passes."""
        with self._guard():
            located = self._looked
            if located is None:
                first = torch.tensor([0])
                inputs = tuple(x[first.to(x.device)] for x in self.inputs)
                located = Located(self.forward, inputs, rows_of_args(self.args, self.n, first))
            held = any(not isinstance(evidence.site, InputSite) for evidence in self.evidences)
            if not held:
                located = self._locator.followed(located, replace(self.setting, inputs=located.values))
            cut = located.forward
            if held or not isinstance(cut, Downstream) or cut.suffix is None or cut.captured is None:
                return "full", 1, 1
            share = cut.suffix.share(cut.captured)
            # A clean pass, what by-passes the site, and the reference.
            once = 1 + (0 if cut.suffix.is_cut else 1) + share
            if located.flips is None:
                return located.route, share, once
            each = located.flips.cost(replace(self.setting, inputs=located.values))
            return located.flips.route, each, once

    def run(self) -> dict[str, Estimate]:
        """The estimates of all heads; the model and the random state are afterwards as they were."""
        started = time.perf_counter()
        draws: list[dict[str, Answer]] = []
        with self._guard():
            if self._checks_first or self.n > 1:
                self._look()
            if self._checks_first:
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
    def _checks_first(self) -> bool:
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
        """Errors of the target and the outcome, from the outputs of one example."""
        every = {name: head.repeat_interleave(self.n, 0) for name, head in heads.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, with the outputs under evidence
            self._measured(every)

    def _measured(self, heads: dict[str, Tensor], decided: dict[str, Tensor] | None = None) -> Measured:
        if self.predicted_only and len(heads) > 1:
            todo = "Name one with `output=`, or call `estimate`, which returns them all."
            raise ModelError(expected("forward_func", "a model with one output head", sorted(heads), todo))
        return Measured(heads, self.outcome, self.target, self.predicted_only, decided)

    def _locate(self, context: Context, draw: int) -> Located:
        """The site under one draw of the evidence."""
        inputs = evident(self.inputs, self.evidences, context, draw)
        forward, args = held(self.forward, inputs, self.args, self.evidences, context, draw)
        if isinstance(self.site, InputSite):
            return Located(forward, inputs, args)
        if self._looked is not None and self.n == 1 and not self.evidences:
            return self._looked
        runner = self.runner if forward is self.forward else self.runner.of(forward)
        return self._locator.at(self.site, inputs, args, runner)

    def _set(self, draw: int) -> tuple[Setting, Located]:
        """The experiment under one draw of the random evidence; assignments are drawn anew for each."""
        context = replace(self.context, seed=self.seed + draw)
        design = self.design if draw == 0 else self.design.reseeded(self.design.seed + draw)
        located = self._locate(context, draw)
        if not isinstance(self.site, InputSite) and self._looked is None:
            self._settle(located.values)
        context = replace(context, donors=self._donors(located, context))
        setting = replace(self.setting, inputs=located.values, args=located.args, context=context, design=design)
        self._warn_unchanged(setting)
        if self.keep_values:
            self.kept.append(setting)
        return setting, located

    def _draw(self, draw: int) -> dict[str, Answer]:
        """The effects under one draw of the random evidence."""
        setting, located = self._set(draw)
        try:
            located = self._locator.followed(located, setting)
            located, runner, heads = self._locator.start(located, self.runner, self.trials)
            measured = self._measured(heads, located.outputs)
            self._check_memory(measured)
            if self.until is not None:
                return self._until(setting, runner, measured)
            outcomes = runner.run(setting, 0, max(self.used), measured)
            compared = measured.reference
            if setting.design.reference == "all":
                every = runner.run(replace(setting, design=EveryUnit()), 0, 1, measured)
                compared = {name: outcome[:, 0] for name, outcome in every.items()}
            self.route, self.cut, self.seconds = located.taken, located.is_cut, located.seconds
            found = answers(setting, outcomes, compared, measured, self.used, self.keep_trials)
            return self._with_insertion(found, heads, located) if isinstance(self.site, ConceptSite) else found
        except AggregateError:
            return self._aggregated(setting, self.runner.of(located.forward))

    def _with_insertion(
        self, found: dict[str, Answer], heads: dict[str, Tensor], located: Located
    ) -> dict[str, Answer]:
        """The answers with what inserting the autoencoder does by itself."""
        plain = self._measured(located.outputs or heads)
        inserted = plain(heads, torch.arange(self.n, device=located.values[0].device))
        return {
            name: replace(answer, insertion=inserted[name] - plain.reference[name]) for name, answer in found.items()
        }

    def _donors(self, located: Located, context: Context) -> tuple[Tensor, ...] | None:
        """What the intervention's donors are at the site."""
        at = located.forward
        if isinstance(at, Downstream):
            return donated(self.intervention, at.inputs, context, self.forward, at.place, self.args)
        return donated(self.intervention, located.values, context)

    def interactions(self, **options: Any) -> list[Interactions]:
        """Pairwise interactions of each example's units; options are those of :func:`~ce_plugin.effects.pairwise`."""
        with self._guard():
            self._look()
            setting, located = self._set(0)
            located, runner, heads = self._locator.start(located, self.runner, 1)
            measured = self._measured(heads, located.outputs)
            options.setdefault("batch_size", runner.rows or 32)
            found = []
            for i in range(self.n):
                outcome = flip_outcome(setting, located, measured, i)
                own: dict[str, Any] = {
                    "name": self.outcome.name,
                    "device": setting.device,
                    "dtype": setting.inputs[0].dtype,
                }
                labels = setting.units.labels
                names = labels[i] if isinstance(labels[0], list) else labels
                found.append(pairwise(outcome, int(setting.units.n_units[i]), unit_labels=names, **own, **options))
        return found

    def _until(self, setting: Setting, runner: Runner, measured: Measured) -> dict[str, Answer]:
        """Rounds of trials; an example leaves when all its intervals are narrow enough."""
        outcomes: dict[str, Tensor] = {}
        active, used, done = list(range(self.n)), list(self.used), 0
        found: dict[str, Answer] = {}
        while active and done < max(self.used):
            stop = min(max(self.used), _FIRST if done == 0 else done + _ROUND)
            new = runner.run(setting, done, stop, measured, active)
            outcomes = {name: torch.cat([outcomes[name], new[name]], 1) if outcomes else new[name] for name in new}
            used = [min(stop, self.used[i]) if i in active else used[i] for i in range(self.n)]
            done = stop
            found = answers(setting, outcomes, measured.reference, measured, used, self.keep_trials)
            active = [i for i in active if used[i] == done and self._widest(found, i) > (self.until or 0.0)]
        return found

    def _widest(self, found: dict[str, Answer], example: int) -> float:
        """Half the width of an example's widest interval; infinite where a unit's error is not known yet."""
        widest = 0.0
        for answer in found.values():
            if answer.std_error is not None:
                own = slice(int(self.setting.units.n_units[example]))
                dof = None if answer.dof is None else answer.dof[example, own]
                widths = half_width(answer.std_error[example, own], dof, 0.95)
                widest = max(widest, float(widths.nan_to_num(torch.inf).max()))
        return widest

    def _aggregated(self, setting: Setting, runner: Runner) -> dict[str, Answer]:
        """A network that returns one value for the batch makes the batch one example."""
        shared = len(set(self.ids)) == 1 and isinstance(setting.units.labels[0], str)
        if self.until is not None or not shared:
            todo = "Leave out `until=`, `ids=` and masks that differ between examples."
            wanted = "a model that returns one value per example for these options"
            raise ModelError(expected("forward_func", wanted, "one value per batch", todo))
        # Copies, because a network may write to its input.
        raw = runner.evaluate(tuple(x.clone() for x in setting.inputs), setting.args)
        heads = {name: as_one_row(head) for name, head in raw.items()}
        if any(heads[name].shape != one.shape for name, one in self._first().items()):
            got = f"shapes {[tuple(head.shape) for head in raw.values()]} for {self.n} examples, some not one for each"
            todo = "Name the part to explain with `output=`."
            raise ModelError(expected("forward_func", "a model with one value per example in every output", got, todo))
        measured = self._measured(heads)
        outcomes = run_aggregated(runner, setting, measured)
        compared = measured.reference
        if setting.design.reference == "all":
            every = run_aggregated(runner, replace(setting, design=EveryUnit()), measured)
            compared = {name: outcome[:, 0] for name, outcome in every.items()}
        return answers(setting, outcomes, compared, measured, self.used[:1], self.keep_trials)

    def _warn_unchanged(self, setting: Setting) -> None:
        if self.intervention.per_trial or self.intervention.forward_equivalents:
            return  # unknown before the trials, or too dear to ask for twice (attacks warn by themselves)
        unchanged = torch.ones(self.n, dtype=torch.bool)
        for variant in range(self.intervention.n_variants):
            for position, x in enumerate(setting.inputs):
                at = replace(setting.context, position=position, variant=variant)
                unchanged &= (checked_values(self.intervention, x, at) == x).reshape(self.n, -1).all(1).cpu()
        if bool(unchanged.any()):
            warnings.warn(
                f"{self.intervention!r} changes nothing in example(s) {unchanged.nonzero()[:5, 0].tolist()}, so that "
                "their effects are zero by construction. Check its fill or region, and `normalization=`.",
                NoChangeWarning,
                stacklevel=5,
            )

    def _check_memory(self, measured: Measured) -> None:
        size = sum(r.shape[1] * r.element_size() for r in measured.reference.values()) * self.n * max(self.used)
        free = free_memory(self.setting.device)
        if size > free:
            got = f"{size / 2**30:.1f} GiB ({self.n} examples x {max(self.used)} trials x all classes)"
            todo = "Pass `target=`, fewer examples, or coarser units."
            raise ArgumentError(expected("inputs", f"few enough for {free / 2**30:.1f} GiB of outcomes", got, todo))

    def _estimate(self, draws: list[Answer], seconds: float) -> Estimate:
        answer = average(draws)
        units = self.setting.units
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
