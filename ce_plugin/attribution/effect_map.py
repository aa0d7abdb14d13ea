"""CausalEffectMap (CEM): the contributions of a layer's units, laid where the units change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn
from typing_extensions import Unpack

from ce_plugin.attribution._estimation import Target, check_target, flat_target
from ce_plugin.attribution._experiment import Call, Experiment, Given, Ids
from ce_plugin.attribution._explainer import Options, as_inputs, false_discovery_rate
from ce_plugin.attribution.layer_effect import ConceptCausalEffect, LayerCausalEffect
from ce_plugin.designs import Design
from ce_plugin.effects import Estimate, Outcome
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import ArgumentError, OutcomeError, TargetError, expected, unknown_name
from ce_plugin.interventions import Intervention
from ce_plugin.networks.forward import widest
from ce_plugin.sites import ConceptSite, InputSite, LayerSite, MaskUnits
from ce_plugin.trials.batches import checked_values

Contrast: TypeAlias = "int | Sequence[int] | Tensor | Literal['others'] | None"
_WEIGHTINGS = ("change", "activation")


class CausalEffectMap(LayerAttribution):  # type: ignore[misc]
    """The causal effect map (CEM) of a layer: where the units are that support a class, with their sign.

        CEM_c(s) = sum_u contribution_{u,c} |d_u(s)| / sum_s' |d_u(s')|

    with d_u the change that the intervention makes to unit u at position s, so that a map sums to the contributions.

    Args:
        forward_func: as in :class:`CausalEffect`.
        layer: with maps (N, C, h, w), or (N, C, l) of a signal, or (N, C, d, h, w) of a volume: a module, its dotted
            name, a :class:`LayerSite` (transformers need its ``reshape_transform``), or a :class:`ConceptSite`, whose
            map is made of concepts.
        intervention: what units are set to; None means :class:`~ce_plugin.interventions.ZeroOut`.
        design: None means each unit by itself, exactly.
        weighting: ``"change"`` as above; ``"activation"`` is the plain product of the paper's sentence,
            ``sum_u contribution_{u,c} A_u(s)`` with the clean activation A, which favours what is strongly active.
        device_ids, outcome, output, seed, memory_budget, engine: as in :class:`LayerCausalEffect`; the outcome is the
            logit here, because probabilities hide every class but the winner.

    Raises:
        UnknownNameError: ``weighting`` of unknown name; see also :class:`LayerCausalEffect`.
        OutcomeError: an outcome that is one number for all classes.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> cem = CausalEffectMap(net, "1").attribute(torch.rand(2, 1, 8, 8))
        >>> cem.shape, CausalEffectMap.interpolate(cem, (8, 8)).shape
        (torch.Size([2, 1, 6, 6]), torch.Size([2, 1, 8, 8]))

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Figure 3 (II), which gives no formula; the interface is that of
        captum's LayerGradCam.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | LayerSite | ConceptSite,
        intervention: Intervention | None = None,
        design: Design | None = None,
        *,
        weighting: Literal["change", "activation"] = "change",
        device_ids: list[int] | None = None,
        outcome: str | Outcome | OutcomeFunction | None = "logit",
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(weighting, str) or weighting not in _WEIGHTINGS:
            raise unknown_name("weighting", weighting, _WEIGHTINGS)
        self.effects: LayerCausalEffect
        if isinstance(layer, ConceptSite):
            self.effects = ConceptCausalEffect(
                forward_func, layer.place, layer.autoencoder, intervention, design, outcome=outcome, **options
            )
        else:
            self.effects = LayerCausalEffect(forward_func, layer, intervention, design, outcome=outcome, **options)
        super().__init__(forward_func, self.effects.layer, device_ids)
        self.weighting = weighting
        if not self.effects.outcome.per_class:
            hint = "Take 'logit', 'log_odds' or 'probability'."
            raise OutcomeError(expected("outcome", "one with a value for each class", f"{outcome!r}", hint))

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        *,
        contrast: Contrast = None,
        given: Given = None,
        ids: Ids = None,
        significant_only: bool | float | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """The map of one class.

        Args:
            inputs: of the network, (N, ...), or a tuple of such.
            target: as in captum; None means each example's predicted class.
            additional_forward_args, given, ids, show_progress: as in :meth:`CausalEffect.attribute`.
            attribute_to_layer_input: the layer's input is the site.
            relu_attributions: negative values become zero.
            contrast: "why A and not B": the mean contribution to these classes is subtracted. An index or several
                for all examples, a tensor with a row for each, or ``"others"`` (all but the target).
            significant_only: only units whose effect is significant, at this false discovery rate (True: 0.05); for
                random designs.

        Returns:
            (N, 1, h, w), signed: positive supports the class (rather than those of the contrast); (N, 1, l) or
            (N, 1, d, h, w) for other layers. ``CausalEffectMap.interpolate(map, sizes, mode)`` enlarges it, by the mode
            "linear", "bilinear" or "trilinear".

        Raises:
            As :meth:`CausalEffect.attribute`; InputError where the layer has no maps; TargetError for a contrast
            out of range.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
            >>> CausalEffectMap(net, "1").attribute(torch.rand(1, 1, 4, 4), target=0, contrast=[1]).shape
            torch.Size([1, 1, 2, 2])
        """
        n = len(as_inputs(inputs, self.effects.forward.modules)[0])
        check_target(target, n)
        against = None if contrast is None else _checked_contrast(contrast, target, n)
        if not isinstance(relu_attributions, bool):
            raise ArgumentError(expected("relu_attributions", "True or False", repr(relu_attributions)))
        call = Call(
            inputs=inputs, additional_forward_args=additional_forward_args, at_input=attribute_to_layer_input,
            show_progress=show_progress, given=given, ids=ids, keep_values=True,
        )  # fmt: skip
        estimate, weights = self._run(call, significant_only)
        chosen = _target_of(estimate, target)
        values = estimate.contribution
        own = values.gather(2, chosen.reshape(-1, 1, 1).expand(-1, values.shape[1], 1))
        if against is not None:
            own = own - _contrasted(values, chosen, against)
        found = effect_map(own, weights)
        return found.clamp(min=0) if relu_attributions else found

    def maps(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        given: Given = None,
        ids: Ids = None,
        significant_only: bool | float | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """The maps of every class from one run, (N, C, h, w), or in the layer's own number of dimensions.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
            >>> CausalEffectMap(net, "1").maps(torch.rand(1, 1, 4, 4)).shape
            torch.Size([1, 3, 2, 2])
        """
        call = Call(
            inputs=inputs, additional_forward_args=additional_forward_args, at_input=attribute_to_layer_input,
            show_progress=show_progress, given=given, ids=ids, keep_values=True,
        )  # fmt: skip
        estimate, weights = self._run(call, significant_only)
        return effect_map(estimate.contribution, weights)

    def _run(self, call: Call, significant_only: bool | float | None) -> tuple[Estimate, Tensor]:
        """Contributions of every class, zero where they are not significant, and the units' weights (N, U, h, w)."""
        experiment = self.effects._experiment(call)
        rate = None if significant_only is None else false_discovery_rate(significant_only, experiment)
        estimates = experiment.run()
        if len(estimates) > 1:
            hint = "Name one with `output=`."
            raise ArgumentError(expected("forward_func", "a model with one output head", sorted(estimates), hint))
        (estimate,) = estimates.values()
        if rate is not None:
            estimate.effect = estimate.effect.where(estimate.significant(rate), 0.0)
        return estimate, self._weights(experiment)

    def _weights(self, experiment: Experiment) -> Tensor:
        """Where the units are, (N, U, h, w): the mean over the draws of the evidence and the alternative values."""
        site, units, parts = experiment.site, experiment.spec.units, []
        if isinstance(site, InputSite) or not isinstance(units, MaskUnits):
            raise TypeError("maps are made at layers")
        for spec in experiment.kept:
            (clean,) = spec.inputs
            numbers = units.ids[0].to(clean.device).to(widest(clean.device)).expand(len(units.ids[0]), *clean.shape[1:])
            unit_of = site.map(numbers).round().long()
            if self.weighting == "activation":
                parts.append(activation_weights(site.map(clean), unit_of, units.width))
                continue
            changes = []
            for variant in range(spec.intervention.n_variants):
                do = checked_values(spec.intervention, clean, replace(spec.context, variant=variant))
                changes.append(change_weights(site.map(do - clean), unit_of, units.width))
            parts.append(torch.stack(changes).mean(0))
        return torch.stack(parts).mean(0)


def _target_of(estimate: Estimate, target: Target) -> Tensor:
    """Each example's class, as an index into the C classes, (N,)."""
    n, classes = len(estimate.effect), estimate.effect.shape[2]
    chosen = flat_target(target, (n, *estimate.class_shape))
    if chosen is None:
        if classes == 1:
            return torch.zeros(n, dtype=torch.int64, device=estimate.effect.device)
        if estimate.predicted is None:
            wanted = f"an index into outputs {(n, *estimate.class_shape)}"
            hint = "Only for outputs (N, C) the predicted class is the default."
            raise TargetError(expected("target", wanted, "None", hint))
        chosen = estimate.predicted
    return chosen.to(estimate.effect.device)


def _checked_contrast(contrast: object, target: Target, n: int) -> Tensor | str:
    """The contrast as indices (K,) or (N, K), or "others".

    Raises:
        TargetError: it is neither, or nothing but the target itself.
        UnknownNameError: another name.
    """
    if isinstance(contrast, str):
        if contrast != "others":
            raise unknown_name("contrast", contrast, ["others"])
        return contrast
    wanted = "a class index, several, or a row of them for each example"
    try:
        index = torch.as_tensor(contrast)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(expected("contrast", wanted, repr(contrast))) from error
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not whole or index.dim() > 2 or not index.numel():
        raise TargetError(expected("contrast", wanted, repr(contrast)))
    if index.dim() == 2 and len(index) != n:
        raise TargetError(expected("contrast", f"one row for each of {n} examples", f"{len(index)} rows"))
    if isinstance(target, int) and bool((index == target).all()):
        hint = "Name other classes, or write 'others'."
        raise TargetError(expected("contrast", "classes other than the target", target, hint))
    return index.reshape(1) if index.dim() == 0 else index


def _contrasted(values: Tensor, chosen: Tensor, contrast: Tensor | str) -> Tensor:
    """The mean contribution to the contrasting classes, (N, U, 1)."""
    n, _, classes = values.shape
    if isinstance(contrast, str):
        own = values.gather(2, chosen.reshape(-1, 1, 1).expand(-1, values.shape[1], 1))
        return (values.sum(2, keepdim=True) - own) / max(classes - 1, 1)
    if int(contrast.min()) < -classes or int(contrast.max()) >= classes:
        raise TargetError(expected("contrast", f"indices in 0 ... {classes - 1}", contrast.tolist()))
    rows = (contrast % classes).to(values.device).expand(n, -1)
    same = (rows == chosen[:, None]).all(1).nonzero()[:5, 0].tolist()
    if same:
        got, hint = f"the target of example(s) {same}", "Name other classes, or write 'others'."
        raise TargetError(expected("contrast", "classes other than the target", got, hint))
    return values.gather(2, rows[:, None].expand(-1, values.shape[1], -1)).mean(2, keepdim=True)


def change_weights(change: Tensor, unit_of: Tensor, n_units: int) -> Tensor:
    """Where each unit changes, as shares that sum to one: |d_u(s)| / sum_s' |d_u(s')|.

    Args:
        change: d, the value under ``do`` minus the clean one, (N, K, h, w); one or three dimensions of places do too.
        unit_of: the unit of each element, int64 (1 or N, K, h, w); ``n_units`` means none.
        n_units: number of units U.

    Returns:
        (N, U, h, w); 0 for a unit that does not change.

    Example:
        >>> change = torch.tensor([[[[1.0, -3.0]], [[0.0, 0.0]]]])
        >>> change_weights(change, torch.tensor([[[[0, 0]], [[1, 1]]]]), 2).squeeze().tolist()
        [[0.25, 0.75], [0.0, 0.0]]
    """
    mass = _by_unit(change.abs(), unit_of, n_units)
    total = mass.sum(tuple(range(2, mass.dim())), keepdim=True)
    return mass / total.clamp(min=torch.finfo(mass.dtype).tiny)


def activation_weights(clean: Tensor, unit_of: Tensor, n_units: int) -> Tensor:
    """The clean activation of each unit at each position, (N, U, h, w); arguments as in :func:`change_weights`.

    Example:
        >>> activation_weights(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.long), 1).item()
        2.0
    """
    return _by_unit(clean, unit_of, n_units)


def effect_map(contribution: Tensor, weights: Tensor) -> Tensor:
    """CEM_c(s) = sum_u contribution_{u,c} weight_u(s).

    Args:
        contribution: (N, U, C).
        weights: (N, U, h, w).

    Returns:
        (N, C, h, w).

    Example:
        >>> effect_map(torch.tensor([[[2.0], [-1.0]]]), torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])).squeeze().tolist()
        [1.5, -0.5]

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Figure 3 (II).
    """
    n, units, *places = weights.shape
    found = contribution.to(weights).transpose(1, 2) @ weights.reshape(n, units, -1)
    return found.reshape(n, contribution.shape[2], *places)


def _by_unit(values: Tensor, unit_of: Tensor, n_units: int) -> Tensor:
    """Sums over the elements of each unit at each position, (N, U, h, w)."""
    n, channels, *places = values.shape
    alone = torch.arange(channels, device=unit_of.device).reshape(1, -1, *[1] * len(places))
    if n_units == channels and bool((unit_of == alone).all()):
        return values
    index = unit_of.to(values.device).expand_as(values)
    # One row more, for what belongs to no unit.
    return values.new_zeros(n, n_units + 1, *places).scatter_add_(1, index, values)[:, :n_units]
