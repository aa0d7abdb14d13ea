"""One call of ``estimate``: from checked arguments through trials to an :class:`~ce_plugin.effects.Estimate`."""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ce_plugin.attribution.aggregated import answers_of_batch, check_shared, outputs_of_batch
from ce_plugin.attribution.checks import check_memory, warn_unchanged
from ce_plugin.attribution.estimation import Answer, answers, average, check_design
from ce_plugin.attribution.evident import evident, held
from ce_plugin.attribution.flips import flip_outcome
from ce_plugin.attribution.inputs import Target
from ce_plugin.attribution.measured import Measured
from ce_plugin.attribution.stopping import answers_until
from ce_plugin.designs import Design, EveryUnit, Joint
from ce_plugin.effects import Estimate, Interactions, Outcome, pairwise
from ce_plugin.errors import ArgumentError, ModelError, expected
from ce_plugin.guard import state_guard
from ce_plugin.interventions import Context, Intervention
from ce_plugin.sites import ConceptSite, Evidence, InputSite, LayerSite
from ce_plugin.trials import Forward, Runner, Setting
from ce_plugin.trials.donors import donated
from ce_plugin.trials.downstream import Downstream
from ce_plugin.trials.located import Located, Locator, place_of
from ce_plugin.trials.runner import AggregateError
from ce_plugin.trials.setting import rows_of_args

__all__ = ["Experiment"]


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

    def look(self) -> dict[str, Tensor]:
        """Pass one example through the network; its outputs, without its evidence."""
        with self._guard():
            self._look()
            return self._first()

    def first_located(self) -> tuple[Setting, Located]:
        """The site of one example and how its trials would be run; after :meth:`look`."""
        with self._guard():
            located = self._looked
            if located is None:
                first = torch.tensor([0])
                inputs = tuple(x[first.to(x.device)] for x in self.inputs)
                located = Located(self.forward, inputs, rows_of_args(self.args, self.n, first))
            setting = replace(self.setting, inputs=located.values)
            # Evidence at a layer is set by hooks, which only whole passes meet.
            held = any(not isinstance(evidence.site, InputSite) for evidence in self.evidences)
            return setting, located if held else self._locator.followed(located, setting)

    @property
    def trials(self) -> int:
        """Trials of the whole run."""
        return self.n_draws * self.setting.repeats * sum(self.used)

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
        warn_unchanged(setting)
        if self.keep_values:
            self.kept.append(setting)
        return setting, located

    def _start(self, setting: Setting, located: Located) -> tuple[Located, Runner, dict[str, Tensor], Measured]:
        """What runs the trials, the reference's outputs, and how trials are measured against them.

        Whether flips can be followed takes passes to find out; the target and the outcome are checked before.
        """
        known = located.outputs
        if known is None:
            located, runner, known = self._locator.start(located, self.runner, self.trials)
            measured = self._measured(known)
            followed = self._locator.followed(located, setting)
            if followed is located:
                return located, runner, known, measured
        else:
            self._check_target(known)
            followed = self._locator.followed(located, setting)
        located, runner, heads = self._locator.start(followed, self.runner, self.trials)
        with warnings.catch_warnings():
            if located.outputs is None:
                warnings.simplefilter("ignore")  # they came with the outputs above
            return located, runner, heads, self._measured(heads, located.outputs)

    def _draw(self, draw: int) -> dict[str, Answer]:
        """The effects under one draw of the random evidence."""
        setting, located = self._set(draw)
        try:
            located, runner, heads, measured = self._start(setting, located)
            check_memory(setting, measured, max(self.used))
            if self.until is not None:
                return answers_until(setting, runner, measured, self.used, self.until, self.keep_trials)
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

    def _aggregated(self, setting: Setting, runner: Runner) -> dict[str, Answer]:
        """A network that returns one value for the batch makes the batch one example."""
        check_shared(setting, self.until)
        heads = outputs_of_batch(setting, runner, self._first())
        return answers_of_batch(setting, runner, self._measured(heads), self.used, self.keep_trials)

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
