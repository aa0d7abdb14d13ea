"""CausalEffect: Captum's face of causal effects at the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from captum.log import log_usage
from torch import Tensor

from ce_plugin.attribution._estimation import Target
from ce_plugin.attribution._experiment import Experiment, cost_of
from ce_plugin.attribution._explainer import (
    Baselines,
    Explainer,
    Given,
    as_args,
    as_baseline,
    as_evidences,
    as_ids,
    as_inputs,
)
from ce_plugin.designs import Design, OneAtATime, RandomRegions
from ce_plugin.effects import Outcome
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.interventions import Intervention, Normalization, PixelMask
from ce_plugin.interventions.base import NormalizationLike
from ce_plugin.networks.forward import OutputSelector
from ce_plugin.sites import InputSite, Masks, Strides, Windows
from ce_plugin.trials import Cost

__all__ = [
    "CausalEffect",
    "default_design",
    "default_mask",
    "on_grid",
]


# Below this many pixels a side there are so few units that each can be asked for by itself.
_SMALLEST_GRID = 5


def on_grid(site: InputSite, inputs: tuple[Tensor, ...]) -> bool:
    """Whether these inputs are images whose patches can be set region by region."""
    return site.is_grid(inputs) and min(inputs[0].shape[2:]) >= _SMALLEST_GRID


def default_mask(grid: bool, normalization: Normalization) -> PixelMask:
    """Black, mean and blur in turn for images: no single fill then passes for evidence; zero for anything else."""
    return PixelMask(("zero", "mean", "blur") if grid else "zero", normalization=normalization)


def default_design(grid: bool) -> Design:
    """Random regions, 400 passes with the reference, for images; each unit by itself for anything else."""
    return RandomRegions() if grid else OneAtATime()


Inputs = TypeVar("Inputs", bound="Tensor | tuple[Tensor, ...]")


class CausalEffect(Explainer):
    """Causal effects of interventions on the input: what the output does when units are set to another value.

    Args:
        forward_func: a module, any callable that returns a tensor (or a dict of tensors), or an ART
            ``PyTorchClassifier``.
        intervention: supplies the value x' that ``do`` sets; None picks the default for the inputs (below).
        design: which units are set in each trial; None picks the default for the inputs (below).
        outcome: what is measured: ``"probability"`` (softmax), ``"sigmoid"``, ``"logit"``, ``"log_odds"``,
            ``"margin"``, ``"prediction_weighted"``, None (the output as it is), or a callable
            ``outcome(output, reference_output)``.
        normalization: pair ``(mean, std)`` saying what was done to the images *before* the model; fills of the
            default intervention are then in image units.
        output: which part of the output to explain, where the model returns a dict, a ModelOutput or a tuple: a key,
            an index, a callable, or a list of keys (several heads).
        seed: of random fills and attacks; designs have a seed of their own.
        memory_budget: bytes that a pass may take beyond model and inputs; None means half of what is free.
        engine: "auto" computes again only what a window changes, where windows are set one at a time and that pays;
            "suffix" insists on it; "full" passes every trial through the whole network.

    **Defaults for images** (one tensor (N, C, H, W), no mask, no windows): the patches of a 14 x 14 grid are set in
    random coherent regions, half of the image in each of 399 trials, to black, the image's mean and a blur in turn
    (:class:`~ce_plugin.designs.RandomRegions`); effects come from a regression with a smooth prior. This was chosen by
    insertion and deletion on photographs that the benchmark does not report: a trial that sets half of the image tells
    more than one that sets 30 % of it, and a smooth prior more than 196 separate effects. On the 100 reported ones it
    scored 0.441; Grad-CAM, SmoothGrad, RISE and the best Occlusion 0.313 to 0.286, RandomMask(0.1) 0.216
    (``benchmarks/results/faithfulness.md``). Its errors belong to that smooth picture: 95 % intervals cover that much
    or more on average, but next to nothing where a single patch stands out alone (``coverage_smooth.md``). Where each
    patch must be judged by itself, take RandomMask, whose intervals cover 95 % (``coverage.md``).

    **For anything else** each scalar (or unit of the mask) is set to zero by itself, exactly: FeatureAblation.

    Raises:
        ModelError: ``forward_func`` is not callable.
        UnknownNameError: an outcome of unknown name.

    Warns:
        NormalizationWarning: ``normalization`` is given and the model holds a ``Normalize`` as well.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Linear(3, 2)
        >>> x = torch.ones(1, 3)
        >>> contribution = CausalEffect(net, outcome="logit").attribute(x, target=0)
        >>> bool(torch.allclose(contribution, net.weight[:1] * x, atol=1e-6))
        True

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eqs. 1-3; the interface is that of captum's FeatureAblation.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        intervention: Intervention | None = None,
        design: Design | None = None,
        *,
        outcome: str | Outcome | OutcomeFunction | None = "probability",
        normalization: NormalizationLike = None,
        output: OutputSelector = None,
        seed: int = 0,
        memory_budget: int | None = None,
        engine: Literal["auto", "suffix", "full"] = "auto",
    ) -> None:
        super().__init__(
            forward_func, intervention, design, outcome=outcome, normalization=normalization, output=output,
            seed=seed, memory_budget=memory_budget, engine=engine,
        )  # fmt: skip

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: Masks = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        sliding_window_shapes: Windows = None,
        strides: Strides = None,
        given: Given = None,
        ids: Sequence[int] | Tensor | None = None,
        significant_only: bool | float | None = None,
    ) -> Inputs:
        """The contribution of each unit (minus its effect: positive supports the class), as a map.

        Args:
            inputs: (N, ...), or a tuple of such, of a floating-point type.
            baselines: as in captum, in model units; replaces the fill.
            target: as in captum; None explains each example's predicted class (given the evidence, and given its
                first draw where it is random).
            additional_forward_args: as in captum; tensors with N rows go with their example.
            feature_mask: integer ids that broadcast to the inputs; equal ids are one unit.
            perturbations_per_eval: trials of each example per forward pass; None chooses it by memory and speed.
            show_progress: a progress bar.
            sliding_window_shapes: windows as units, as in captum's Occlusion.
            strides: of the windows.
            given: evidence that holds in all trials and in the reference.
            ids: one integer per example; examples with equal ids (None: all of them) get equal assignments.
            significant_only: set units to zero whose effect is not significant: True at a false discovery rate of
                0.05, or the rate itself.

        Returns:
            Tensors of the inputs' shapes: each unit's contribution wherever it is, the mean over units that overlap.
            For a model that returns one value per batch the leading dimension is 1.

        Raises:
            InputError, UnitError, TargetError, OutcomeError, ModelError, DesignError, ArgumentError: before any
                trial is run; see the documentation's pages on errors.
            InferenceError: ``significant_only`` with a design that has no sampling error.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
            >>> CausalEffect(net).attribute(torch.rand(2, 1, 2, 2)).shape
            torch.Size([2, 1, 2, 2])
        """
        experiment = self._experiment(
            inputs, baselines, target, additional_forward_args, feature_mask, perturbations_per_eval, show_progress,
            sliding_window_shapes, strides, given, ids, predicted_only=True,
        )  # fmt: skip
        maps = self._maps(experiment, significant_only)
        return maps if isinstance(inputs, tuple) else maps[0]  # type: ignore[return-value]

    def estimate(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: Masks = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        sliding_window_shapes: Windows = None,
        strides: Strides = None,
        given: Given = None,
        ids: Sequence[int] | Tensor | None = None,
        until: float | None = None,
        keep_trials: bool = False,
    ) -> Any:
        """Effects of all units on all classes, with standard errors where the design is random.

        Args:
            inputs, baselines, target, additional_forward_args, feature_mask, perturbations_per_eval, show_progress,
                sliding_window_shapes, strides, given, ids: as in :meth:`attribute`; without a target all classes.
            until: stop an example's trials when all its 95 % intervals are at most this half-width; the design's
                number of trials is the most that is run. p-values do not cover such peeking, and are marked.
            keep_trials: keep assignments and outcomes, for :meth:`Estimate.pairs`.

        Returns:
            An :class:`~ce_plugin.effects.Estimate`: effects (N, U, C) with the signs of Eq. 1 (removing a unit that
            supports a class has a negative effect). A dict of them by name, where the model has several heads.

        Raises:
            As :meth:`attribute`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> net = nn.Linear(3, 2)
            >>> CausalEffect(net, outcome="logit").estimate(torch.ones(1, 3)).effect.shape
            torch.Size([1, 3, 2])
        """
        experiment = self._experiment(
            inputs, baselines, target, additional_forward_args, feature_mask, perturbations_per_eval, show_progress,
            sliding_window_shapes, strides, given, ids, until=until, keep_trials=keep_trials,
        )  # fmt: skip
        return self._estimates(experiment)

    def _of_pairs(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target,
        additional_forward_args: Any,
        mask: Masks,
        given: Given,
        ids: Sequence[int] | Tensor | None,
    ) -> Experiment:
        return self._experiment(
            inputs, None, target, additional_forward_args, mask, None, False, None, None, given, ids,
            predicted_only=True,
        )  # fmt: skip

    def estimate_cost(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: Masks = None,
        *,
        sliding_window_shapes: Windows = None,
        strides: Strides = None,
        given: Given = None,
    ) -> Cost:
        """What :meth:`estimate` with these arguments would cost; only one example is passed through the model.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> CausalEffect(nn.Linear(3, 2)).estimate_cost(torch.ones(2, 3)).trials
            6
        """
        experiment = self._experiment(
            inputs, None, target, additional_forward_args, feature_mask, None, False,
            sliding_window_shapes, strides, given, None,
        )  # fmt: skip
        return cost_of(experiment)

    def _experiment(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Baselines,
        target: Target,
        additional_forward_args: Any,
        feature_mask: Masks,
        perturbations_per_eval: int | None,
        show_progress: bool,
        sliding_window_shapes: Windows,
        strides: Strides,
        given: Given,
        ids: Sequence[int] | Tensor | None,
        **options: Any,
    ) -> Experiment:
        tensors = as_inputs(inputs)
        site = InputSite(feature_mask, sliding_window_shapes, strides)
        grid = on_grid(site, tensors)
        if baselines is not None and self.intervention is not None and not isinstance(self.intervention, PixelMask):
            hint = "Baselines replace the fill of a mask; leave them out."
            raise ArgumentError(expected("baselines", f"None with {self.intervention!r}", "baselines", hint))
        intervention = self.intervention or default_mask(grid, self.normalization)
        return Experiment(
            forward=self.forward,
            inputs=tensors,
            args=as_args(additional_forward_args),
            site=site,
            intervention=intervention if baselines is None else as_baseline(baselines, tensors),
            design=self.design or default_design(grid),
            outcome=self.outcome,
            evidences=as_evidences(given),
            ids=as_ids(ids, len(tensors[0])),
            seed=self.seed,
            target=target,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            memory_budget=self.memory_budget,
            router=self._router,
            **options,
        )
