"""CausalEffect: Captum's face of causal effects at the input."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor, nn

from ce_plugin.attribution._estimation import Target
from ce_plugin.attribution._experiment import Baselines, Call, Given, Ids
from ce_plugin.attribution._explainer import Engine, Explainer, MapValues, as_baseline, logged, with_channels
from ce_plugin.attribution._guide import PASSES, is_guided
from ce_plugin.designs import Design, FirstOrder, OneAtATime, RandomRegions
from ce_plugin.effects import Estimate, Outcome
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import ArgumentError, NormalizationWarning, check_integer, expected, unknown_name
from ce_plugin.interventions import Intervention, Normalization, PixelMask
from ce_plugin.interventions.base import NormalizationLike
from ce_plugin.networks.forward import OutputSelector
from ce_plugin.sites import InputSite, Masks, Strides, Windows
from ce_plugin.trials import Cost

logger = logging.getLogger("ce_plugin")
Guide: TypeAlias = Literal["gradient"] | None
Inputs = TypeVar("Inputs", bound="Tensor | tuple[Tensor, ...]")

# Below this many values a side there are so few units that each can be asked for by itself.
_SMALLEST_GRID = 5


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
        guide: "gradient": where a design sets regions to a fill, the smooth map begins at gradient times activation of
            the last value with positions (as Grad-CAM), and trials correct it; this takes three passes an example.
            Effects and their errors are as valid with it as without. None: trials alone, as also for functions in
            which no module is found.
        class_names: one for each class of the output; estimates, their frames, pictures and files carry them.

    **Defaults for images** (one tensor (N, C, H, W), no mask, no windows): the patches of a 14 x 14 grid are set, half
    of the image in each of 399 trials, to black, the image's mean and a blur in turn: coherent regions in six trials
    of ten, single patches in the others (:class:`~ce_plugin.designs.RandomRegions`). ``estimate`` gives the mean effect
    of each patch over what else is set, without bias, with intervals that hold for every patch
    (``benchmarks/results/coverage_regions.md``), and beside it, as ``Estimate.smoothed``, the smooth map that
    ``attribute`` returns. How well that map predicts what the network depends on, beside Grad-CAM and others, stands in
    ``benchmarks/results/faithfulness_default_choosing.md``.

    **Volumes** (N, C, D, H, W) have the same defaults on a grid of 8 x 8 x 8, **signals** (N, C, L) and **sequences**
    (N, L, C) on one of 64 pieces, where the network's first module shows which of the two they are.

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
        engine: Engine = "auto",
        guide: Guide = "gradient",
        class_names: Sequence[str] | None = None,
    ) -> None:
        if guide is not None and guide != "gradient":
            raise unknown_name("guide", guide, ("gradient", "None"))
        super().__init__(
            forward_func, intervention, design, outcome=outcome, output=output, seed=seed,
            memory_budget=memory_budget, engine=engine, class_names=class_names,
        )  # fmt: skip
        self.guide = guide
        self.normalization = Normalization.of(normalization)
        if not self.normalization.is_identity and _normalizes(self.forward.modules):
            warnings.warn(
                "The model holds a Normalize, and `normalization=` says that the inputs were normalised before it. "
                "Leave `normalization` out unless both are true.",
                NormalizationWarning,
                stacklevel=2,
            )

    @logged
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
        ids: Ids = None,
        significant_only: bool | float | None = None,
        values: MapValues = "smoothed",
        passes: int | None = None,
        on_update: Callable[[Inputs, float], object] | None = None,
    ) -> Inputs:
        """The contribution of each unit (minus its effect: positive supports the class), as a map.

        Args:
            inputs: (N, ...), or a tuple of such, of a floating-point type.
            baselines: as in captum, in model units; replaces the fill.
            target: as in captum; None explains each example's predicted class (given the evidence, and given its
                first draw where it is random).
            additional_forward_args: as in captum. Of a tensor with N rows each goes with its example, unless the model
                called on all examples shows that it belongs to all alike (which the log says, level INFO).
            feature_mask: integer ids that broadcast to the inputs; equal ids are one unit.
            perturbations_per_eval: trials of each example per forward pass; None chooses it by memory and speed.
            show_progress: a progress bar.
            sliding_window_shapes: windows as units, as in captum's Occlusion.
            strides: of the windows.
            given: evidence that holds in all trials and in the reference.
            ids: one integer per example; examples with equal ids (None: all of them) get equal assignments.
            significant_only: set units to zero whose effect is not significant: True at a false discovery rate of
                0.05, or the rate itself.
            values: "smoothed" gives the smooth map where the design has one (with independent trials), "unbiased" the
                effects themselves, one by one.
            passes: forward passes of each example, all counted (the clean one, two that show whether the network is
                deterministic, three of the guide), which say how many trials a random design has; None leaves that
                to the design. The default takes 3 passes or more: below 12 they are a gradient
                (:class:`~ce_plugin.designs.FirstOrder`), below 36 the map has no errors. On a CPU a network's first run
                of 32 trials or more takes two more, to find the memory layout that it likes, so that the number of
                trials does not depend on which run is the first.
            on_update: called with the map so far and the passes taken by each example: of a random design at 12 trials
                (24 where it has no smooth map), then each time there are twice as many, and at the end.

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
        call = Call(
            inputs=inputs, baselines=baselines, target=target, additional_forward_args=additional_forward_args,
            mask=feature_mask, perturbations_per_eval=perturbations_per_eval, show_progress=show_progress,
            windows=sliding_window_shapes, strides=strides, given=given, ids=ids, predicted_only=True,
            guided=self.guide is not None, passes=passes, on_update=on_update,
        )  # fmt: skip
        maps = self._maps(call, significant_only, values)
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
        ids: Ids = None,
        until: float | None = None,
        keep_trials: bool = False,
        passes: int | None = None,
        on_update: Callable[[Any, float], object] | None = None,
        answer: bool = False,
        answer_target: Target = None,
    ) -> Estimate:
        """Effects of all units on all classes, with standard errors where the design is random.

        Args:
            inputs, baselines, target, additional_forward_args, feature_mask, perturbations_per_eval, show_progress,
                sliding_window_shapes, strides, given, ids, passes: as in :meth:`attribute`; without a target all
                classes.
            until: stop an example's trials when all its 95 % intervals are at most this half-width; the design's
                number of trials is the most that is run. p-values do not cover such peeking, and are marked.
            on_update: called with what is returned, so far, and the passes taken by each example, as in
                :meth:`attribute`; with ``until`` whenever it looks at the intervals.
            keep_trials: keep assignments and outcomes, for :meth:`Estimate.pairs`.
            answer: also cover one region, chosen from the trials, and as much at 24 random places, each under every
                fill: ``Estimate.answer`` (:class:`~ce_plugin.effects.RegionTest`), which ``summary()`` reads. This
                takes 25 passes for each fill (75 by default), which ``cost`` includes.
            answer_target: the class that the answer is about, in the form of a target; None means the target or, where
                the effects are on all classes, the predicted class.

        Returns:
            An :class:`~ce_plugin.effects.Estimate`: effects (N, U, C) with the signs of Eq. 1 (removing a unit that
            supports a class has a negative effect). Where the model has several heads, a dict of them by name, which
            the annotation does not say: ``typing.cast(dict[str, Estimate], ...)`` tells a type checker.

        Raises:
            As :meth:`attribute`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> net = nn.Linear(3, 2)
            >>> CausalEffect(net, outcome="logit").estimate(torch.ones(1, 3)).effect.shape
            torch.Size([1, 3, 2])
        """
        call = Call(
            inputs=inputs, baselines=baselines, target=target, additional_forward_args=additional_forward_args,
            mask=feature_mask, perturbations_per_eval=perturbations_per_eval, show_progress=show_progress,
            windows=sliding_window_shapes, strides=strides, given=given, ids=ids, until=until,
            keep_trials=keep_trials, guided=self.guide is not None, passes=passes, on_update=on_update,
            answer=answer, answer_target=answer_target,
        )  # fmt: skip
        return self._estimates(call)

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
        answer: bool = False,
    ) -> Cost:
        """What :meth:`estimate` with these arguments would cost; only one example is passed through the model.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> CausalEffect(nn.Linear(3, 2)).estimate_cost(torch.ones(2, 3)).trials
            6
        """
        call = Call(
            inputs=inputs, target=target, additional_forward_args=additional_forward_args, mask=feature_mask,
            windows=sliding_window_shapes, strides=strides, given=given, guided=self.guide is not None, answer=answer,
        )  # fmt: skip
        return self._experiment(call).cost()

    def _setup(self, call: Call, inputs: tuple[Tensor, ...]) -> tuple[InputSite, Intervention, Design]:
        site = InputSite(call.mask, call.windows, call.strides)
        found = self._input_layout(inputs)
        if found is not None:
            site = replace(site, channel_dim=found[0])
            if site.is_grid(inputs):
                logger.info("inputs %s: dimension %d holds the channels, as %s has it", tuple(inputs[0].shape), *found)
        grid = site.is_grid(inputs) and min(site.sizes(inputs[0])) >= _SMALLEST_GRID
        intervention = self.intervention
        if intervention is None:
            # For images black, mean and blur in turn: no single fill then passes for evidence.
            fills = ("zero", "mean", "blur") if grid else "zero"
            intervention = PixelMask(fills, normalization=self.normalization)
        intervention = with_channels(intervention, found)
        if call.baselines is not None:
            if not isinstance(intervention, PixelMask):
                hint = "Baselines replace the fill of a mask; leave them out."
                raise ArgumentError(expected("baselines", f"None with {intervention!r}", "baselines", hint))
            intervention = as_baseline(call.baselines, inputs)
        design = self.design or (RandomRegions() if grid else OneAtATime())
        if isinstance(design, FirstOrder) and call.passes is not None:
            raise ArgumentError(expected("passes", f"None for {design!r}", call.passes))
        if call.passes is not None:
            guided = call.guided and is_guided(design, intervention) and bool(self.forward.modules)
            design = within(call.passes, design, guided, intervention.n_variants)
        return site, intervention, design


def within(passes: int, design: Design, guided: bool, fills: int) -> Design:
    """The design with as many trials as passes leave, beside the clean one, two checks and the guide.

    Of too few for trials a guided design leaves the gradient alone.

    Raises:
        ArgumentError: too few passes.
        DesignError: the design's units say how many trials there are.
    """
    other = 3 + (PASSES if guided else 0)
    trials = other + (fills + 3 if design.estimator == "smooth" else 2)
    least = PASSES if guided else trials
    check_integer("passes", passes, f"None or an integer, at least {least}", least=least)
    return design.sized(passes - other) if passes >= trials else FirstOrder()


def _normalizes(networks: list[nn.Module]) -> bool:
    """Whether a network normalises its inputs itself, as far as the names of its modules say."""
    return any(type(module).__name__ == "Normalize" for network in networks for module in network.modules())
