"""LayerCausalEffect: effects of nodes inside the network, in Captum's layer form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn
from typing_extensions import Unpack

from ce_plugin.attribution._estimation import Target
from ce_plugin.attribution._experiment import Baselines, Call, Given, Ids
from ce_plugin.attribution._explainer import Explainer, Options, as_args, as_baseline, logged
from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.designs import Design, OneAtATime
from ce_plugin.effects import Estimate, Outcome
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import ArgumentError, CEPluginError, InputError, ModelError, expected
from ce_plugin.interventions import Intervention, ZeroOut
from ce_plugin.networks.layers import find_layer, last_map
from ce_plugin.networks.layout import misfit
from ce_plugin.sites import ConceptSite, LayerSite, Masks
from ce_plugin.trials import Cost
from ce_plugin.trials.batches import rows_of

logger = logging.getLogger("ce_plugin")


class LayerCausalEffect(Explainer, LayerAttribution):  # type: ignore[misc]
    """Causal effects of a layer's units (channels, tokens, heads, positions) on every class at once.

    Only what depends on the layer is computed again for each trial, and for single channels only where it differs:
    the effects of all channels of a last layer cost two or three forward passes, those of a layer in the middle a
    third to a ninth of what full passes would (``benchmarks/results/engine_speed.md``).

    Args:
        forward_func: as in :class:`CausalEffect`.
        layer: a module of the network, its dotted name, or a :class:`LayerSite` (other units than channels, tuple
            outputs, layers that are called several times, transformers).
        intervention: what a unit is set to; None means :class:`ZeroOut`, the paper's Z0.
        design: which units are set in each trial; None means each by itself, exactly (:class:`OneAtATime`).
        device_ids: as in captum, and not needed: the layer's value is found wherever the model runs.
        outcome, output, seed, memory_budget, class_names: as in :class:`CausalEffect`.
        engine: "auto" runs the part of the network that depends on the layer where it can be cut out, and passes
            every trial through the whole network where it cannot (the reason is logged once); "suffix" insists on
            the former; "full" on the latter. The numbers are the same up to rounding.

    Raises:
        ArgumentError, ModelError, UnknownNameError: see the documentation's pages on errors.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
        >>> estimate = LayerCausalEffect(net, "1", outcome="logit").estimate(torch.ones(1, 3))
        >>> by_hand = -net[:2](torch.ones(1, 3))[0, :, None] * net[2].weight.T
        >>> estimate.effect.shape, bool(torch.allclose(estimate.effect[0], by_hand, atol=1e-6))
        (torch.Size([1, 4, 2]), True)

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), section 3.3; the interface is that of captum's
        LayerFeatureAblation.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | LayerSite,
        intervention: Intervention | None = None,
        design: Design | None = None,
        *,
        device_ids: list[int] | None = None,
        outcome: str | Outcome | OutcomeFunction | None = "probability",
        **options: Unpack[Options],
    ) -> None:
        self.site = layer if isinstance(layer, LayerSite) else LayerSite(layer)
        Explainer.__init__(self, forward_func, intervention, design, outcome=outcome, **options)
        self.layer: nn.Module | None = self.site.module(self.forward.modules)[1]
        self.device_ids = device_ids

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        layer_baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        layer_mask: Masks = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        given: Given = None,
        ids: Ids = None,
        significant_only: bool | float | None = None,
    ) -> Tensor:
        """The contribution of each unit (minus its effect: positive supports the class), in the layer's shape.

        Args:
            inputs: of the network, (N, ...), or a tuple of such.
            layer_baselines: as in captum: a number or a tensor that broadcasts to the layer's value; replaces the
                intervention.
            target, additional_forward_args, show_progress, given, ids, significant_only: as in
                :meth:`CausalEffect.attribute`.
            layer_mask: integer ids that broadcast to the layer's value; equal ids are one unit.
            attribute_to_layer_input: the layer's input is the site, not its output.
            perturbations_per_eval: trials of each example per pass; None chooses it by memory and speed.

        Returns:
            A tensor of the layer's shape, (N, ...): each unit's contribution repeated over the unit.

        Raises:
            As :meth:`CausalEffect.attribute`; ModelError where the layer is not reached, or several times.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
            >>> LayerCausalEffect(net, "1").attribute(torch.rand(2, 1, 4, 4)).shape
            torch.Size([2, 4, 2, 2])
        """
        call = Call(
            inputs=inputs, baselines=layer_baselines, target=target, additional_forward_args=additional_forward_args,
            mask=layer_mask, at_input=attribute_to_layer_input, perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress, given=given, ids=ids, predicted_only=True,
        )  # fmt: skip
        (contribution,) = self._maps(call, significant_only)
        return contribution

    def estimate(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        layer_baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        layer_mask: Masks = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        given: Given = None,
        ids: Ids = None,
        until: float | None = None,
        keep_trials: bool = False,
        answer: bool = False,
        answer_target: Target = None,
    ) -> Estimate:
        """Effects of all units on all classes, (N, U, C), with standard errors where the design is random.

        Args: as in :meth:`attribute` and :meth:`CausalEffect.estimate`.

        Returns:
            An :class:`~ce_plugin.effects.Estimate`; a dict of them where the model has several heads.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
            >>> LayerCausalEffect(net, "0").estimate(torch.rand(2, 1, 4, 4)).effect.shape
            torch.Size([2, 4, 2])
        """
        call = Call(
            inputs=inputs, baselines=layer_baselines, target=target, additional_forward_args=additional_forward_args,
            mask=layer_mask, at_input=attribute_to_layer_input, perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress, given=given, ids=ids, until=until, keep_trials=keep_trials,
            answer=answer, answer_target=answer_target,
        )  # fmt: skip
        return self._estimates(call)

    def estimate_cost(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        layer_mask: Masks = None,
        attribute_to_layer_input: bool = False,
        *,
        given: Given = None,
        answer: bool = False,
    ) -> Cost:
        """What :meth:`estimate` with these arguments would cost, and by which route; one example is passed through.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> LayerCausalEffect(net, "0").estimate_cost(torch.ones(2, 3)).trials
            8
        """
        call = Call(
            inputs=inputs, target=target, additional_forward_args=additional_forward_args, mask=layer_mask,
            at_input=attribute_to_layer_input, given=given, answer=answer,
        )  # fmt: skip
        return self._experiment(call).cost()

    def _setup(self, call: Call, inputs: tuple[Tensor, ...]) -> tuple[LayerSite | ConceptSite, Intervention, Design]:
        intervention = self.intervention or ZeroOut()
        if call.baselines is not None:
            if self.intervention is not None:
                hint = "Baselines replace the intervention; leave one of them out."
                raise ArgumentError(expected("layer_baselines", f"None with {intervention!r}", "baselines", hint))
            intervention = as_baseline(call.baselines)
        return self._site(call, inputs), intervention, self.design or OneAtATime()

    def _site(self, call: Call, inputs: tuple[Tensor, ...]) -> LayerSite | ConceptSite:
        return _asked(self.site, call)


def _asked(site: LayerSite, call: Call) -> LayerSite:
    """The site with the units and the end of the layer that the call names."""
    if isinstance(call.mask, tuple) and len(call.mask) != 1:
        hint = "A layer's value is one tensor; `LayerSite(layer, element=...)` says which."
        raise ArgumentError(expected("layer_mask", "one mask", f"{len(call.mask)}", hint))
    mask = call.mask[0] if isinstance(call.mask, tuple) else call.mask
    site = site if mask is None else replace(site, layer_mask=mask)
    return replace(site, at_input=True) if call.at_input else site


class LastLayerCausalEffect(LayerCausalEffect):
    """Causal effects at the last value with positions before they are pooled away or flattened, found in each call.

    Args: as in :class:`LayerCausalEffect`.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        intervention: Intervention | None = None,
        design: Design | None = None,
        *,
        outcome: str | Outcome | OutcomeFunction | None = "probability",
        **options: Unpack[Options],
    ) -> None:
        Explainer.__init__(self, forward_func, intervention, design, outcome=outcome, **options)
        self.layer = self.device_ids = None

    def _site(self, call: Call, inputs: tuple[Tensor, ...]) -> LayerSite:
        args, n, networks = as_args(call.additional_forward_args), len(inputs[0]), self.forward.modules

        def run(rows: int) -> list[Tensor]:
            some = torch.arange(rows)
            return list(self.forward(rows_of(inputs, n, some), rows_of(args, n, some)).values())

        try:
            try:
                found = last_map(networks, partial(run, 1))
            except (RuntimeError, ValueError, TypeError, IndexError):  # a network may insist on the number of rows
                found = last_map(networks, partial(run, n))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            wrong = None if isinstance(error, CEPluginError) else misfit(networks, inputs)
            if wrong is None:
                raise
            raise InputError(expected("inputs", *wrong)) from error
        if found is None:
            hint = "Name one: `CausalEffectMap(model, 'features.28')`; `model.named_modules()` lists them."
            got = "None for a network in which no layer's positions are pooled away or flattened"
            raise ModelError(expected("layer", "a layer with maps (N, C, h, w)", got, hint))
        module, at_input, index = found
        name, _ = find_layer(networks, module)
        logger.info("layer: %s%s, call %d, is taken", "the input of " if at_input else "", name, index)
        return _asked(LayerSite(module, at_input=at_input, call=index), call)


class ConceptCausalEffect(LayerCausalEffect):
    """Causal effects of concepts: the channels of a concept autoencoder's code, inserted at a layer.

    The reference is the network *with* the autoencoder inserted. Inserting it changes the output by itself:
    ``Estimate.insertion_effect`` (N, C); a concept's total effect on the network is that plus its ``effect``.

    Args:
        forward_func: as in :class:`CausalEffect`.
        layer: where the autoencoder is inserted: a module, its dotted name, or a :class:`LayerSite`.
        autoencoder: trained on this layer of this network.
        min_fidelity: smallest share of held-out images whose top class the autoencoder must leave as it is.
        intervention, design, device_ids, outcome, output, seed, memory_budget, engine: as in
            :class:`LayerCausalEffect`.

    Raises:
        ModelError: the autoencoder belongs to another layer or network, was not trained, or is below
            ``min_fidelity``; the message holds the numbers.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        >>> untrained = ConceptAutoencoder(channels=8, concepts=2)
        >>> ConceptCausalEffect(net, "1", untrained, min_fidelity=0).estimate(torch.rand(1, 1, 4, 4)).effect.shape
        torch.Size([1, 2, 2])

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), sections 3.2 and 3.3: the effect of the node (L, N).
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | LayerSite,
        autoencoder: ConceptAutoencoder,
        intervention: Intervention | None = None,
        design: Design | None = None,
        *,
        min_fidelity: float = 0.9,
        device_ids: list[int] | None = None,
        outcome: str | Outcome | OutcomeFunction | None = "probability",
        **options: Unpack[Options],
    ) -> None:
        self.concept_site = ConceptSite(layer, autoencoder)
        super().__init__(
            forward_func,
            self.concept_site.place,
            intervention,
            design,
            device_ids=device_ids,
            outcome=outcome,
            **options,
        )
        self.autoencoder = autoencoder
        _, layer = self.concept_site.module(self.forward.modules)
        root = next(network for network in self.forward.modules if layer in set(network.modules()))
        autoencoder.check(root, layer, min_fidelity)

    def _site(self, call: Call, inputs: tuple[Tensor, ...]) -> ConceptSite:
        if call.mask is not None:
            hint = "Joint groups of concepts: pass design=Joint(groups)."
            raise ArgumentError(expected("layer_mask", "None: the units are concepts", "a mask", hint))
        if call.at_input and not self.concept_site.place.at_input:
            return ConceptSite(replace(self.concept_site.place, at_input=True), self.autoencoder)
        return self.concept_site
