"""What all attribution classes share: how they are set up, and how an experiment becomes a map or an estimate."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from captum.attr import PerturbationAttribution
from torch import Tensor, nn

from ce_plugin.attribution.experiment import Experiment
from ce_plugin.attribution.inputs import Given, Target
from ce_plugin.attribution.maps import spread
from ce_plugin.designs import Design
from ce_plugin.effects import Interactions, Outcome, resolve_outcome
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import ArgumentError, InferenceError, NormalizationWarning, expected, unknown_name
from ce_plugin.interventions import Intervention, Normalization
from ce_plugin.interventions.normalization import NormalizationLike
from ce_plugin.sites import Masks
from ce_plugin.trials import Forward
from ce_plugin.trials.forward import OutputSelector
from ce_plugin.trials.located import Locator

__all__ = ["Explainer"]

_ENGINES = ("auto", "suffix", "full")


class Explainer(PerturbationAttribution):  # type: ignore[misc]
    """A captum attribution whose maps and estimates come from an :class:`Experiment`.

    Args: see :class:`ce_plugin.CausalEffect`.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        intervention: Intervention | None,
        design: Design | None,
        *,
        outcome: str | Outcome | OutcomeFunction | None,
        normalization: NormalizationLike,
        output: OutputSelector,
        seed: int,
        memory_budget: int | None,
        engine: str,
    ) -> None:
        for name, value, kind in (("intervention", intervention, Intervention), ("design", design, Design)):
            if value is not None and not isinstance(value, kind):
                raise ArgumentError(expected(name, f"a {kind.__name__} or None", type(value).__name__))
        if engine not in _ENGINES:
            raise unknown_name("engine", engine, _ENGINES)
        self.forward = Forward(forward_func, output)
        super().__init__(forward_func)
        self.intervention = intervention
        self.design = design
        self.outcome = resolve_outcome(outcome)
        self.normalization = Normalization.of(normalization)
        self.seed = int(seed)
        self.memory_budget = memory_budget
        self.engine = engine
        self._locator = Locator(self.forward, engine)
        _warn_twice_normalized(self.forward.modules, self.normalization)

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
        ids: Sequence[int] | Tensor | None = None,
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
        experiment = self._of_pairs(inputs, target, additional_forward_args, mask, given, ids)
        return experiment.interactions(top=top, exhaustive=exhaustive, nudges=nudges)

    @abstractmethod
    def _of_pairs(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target,
        additional_forward_args: Any,
        mask: Masks,
        given: Given,
        ids: Sequence[int] | Tensor | None,
    ) -> Experiment:
        """An experiment about the outcome of one class."""

    def _maps(self, experiment: Experiment, significant_only: bool | float | None) -> tuple[Tensor, ...]:
        """The contributions of the experiment's units, each wherever its unit is."""
        rate = false_discovery_rate(significant_only, experiment)
        estimate = next(iter(experiment.run().values()))
        values = estimate.contribution[..., 0]
        if rate is not None:
            values = values.where(estimate.significant(rate)[..., 0], 0.0)
        return spread(experiment.setting.units, experiment.design, values)

    @staticmethod
    def _estimates(experiment: Experiment) -> Any:
        """The estimate, or a dict of them where the model has several heads."""
        estimates = experiment.run()
        return estimates[""] if list(estimates) == [""] else estimates


def false_discovery_rate(significant_only: bool | float | None, experiment: Experiment) -> float | None:
    """The rate that was asked for; None where all effects are wanted."""
    if significant_only is None or significant_only is False:
        return None
    if experiment.design.exact and experiment.n_draws == 1:
        todo = "Only random designs or a data set have sampling error: use RandomMask(...), or leave it out."
        raise InferenceError(expected("significant_only", f"None for {experiment.design!r}", significant_only, todo))
    rate = 0.05 if significant_only is True else significant_only
    if not 0 < rate < 1:
        todo = "Write 0.05 for five per cent."
        raise ArgumentError(expected("significant_only", "True, or a false discovery rate in (0, 1)", rate, todo))
    return float(rate)


def _warn_twice_normalized(modules: list[nn.Module], normalization: Normalization) -> None:
    inside = any(type(m).__name__ == "Normalize" for root in modules for m in root.modules())
    if inside and not normalization.is_identity:
        warnings.warn(
            "The model holds a Normalize, and `normalization=` says that the inputs were normalised before it. Leave "
            "`normalization` out unless both are true.",
            NormalizationWarning,
            stacklevel=4,
        )
