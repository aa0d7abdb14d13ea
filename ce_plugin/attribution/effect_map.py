"""CausalEffectMap (CEM): the contributions of a layer's units, laid where their changes arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn
from typing_extensions import Unpack

from ce_plugin.attribution._estimation import Target, check_target, flat_target
from ce_plugin.attribution._experiment import Call, Experiment, Given, Ids, MapPart
from ce_plugin.attribution._explainer import Options, as_inputs, false_discovery_rate, logged, settings_html
from ce_plugin.attribution.layer_effect import ConceptCausalEffect, LastLayerCausalEffect, LayerCausalEffect
from ce_plugin.designs import Design, Joint
from ce_plugin.effects import Estimate, Outcome
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import ArgumentError, InputError, OutcomeError, TargetError, check_integer, expected, unknown_name
from ce_plugin.interventions import Intervention
from ce_plugin.networks.forward import widest
from ce_plugin.sites import ConceptSite, InputSite, LayerSite, MaskUnits
from ce_plugin.visualization.pictures import as_picture, overlay

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Contrast: TypeAlias = "int | Sequence[int] | Tensor | Literal['others'] | None"
_WEIGHTINGS = ("change", "activation")


class CausalEffectMap(LayerAttribution):  # type: ignore[misc]
    """The causal effect map (CEM) of a layer: where the units are that support a class, with their sign.

        CEM_c(s) = sum_u contribution_{u,c} w_u(s)
        w_u(s) = mean over f in F(u) with a change of |d_uf(s)| / sum_s' |d_uf(s')|
        d_uf(s) = f(do(u))(s) - f(clean)(s)

    F(u), the front, is where unit u's change arrives before anything mixes it: the change is followed through what acts
    on each channel and position by itself (activations, batch normalisation, scaling, concatenation, sums and products
    with what does not depend on the layer or depends on it only in this way), up to the distinct values that any other
    operation takes (a convolution, a pooling, attention, a sum with what already mixes) or that are the output. So a
    layer before an activation gives a map of what the activation lets through. A unit that changes nothing there has
    contribution 0, and a map sums to the contributions. Units of several channels add up |d| over them. Under several
    alternative values, donors or draws of evidence the products of contribution and weight are averaged; only random
    designs, whose trials take the values in turn, have one contribution for all of them. For concepts the front is the
    code. In a network that cannot be traced it is the layer itself, and a warning in the log says so.

    Take the last layer with positions, or the one before its activation, where maps are as faithful as Grad-CAM's.
    Further inside a network, before activations and at outputs of linear blocks (``_blocks.10`` of an EfficientNet,
    where changes of both signs still cancel), both are much less faithful
    (``benchmarks/results/faithfulness_maps.md``).

    Args:
        forward_func: as in :class:`CausalEffect`.
        layer: with maps (N, C, h, w), or (N, C, l) of a signal, or (N, C, d, h, w) of a volume: a module, its dotted
            name, a :class:`LayerSite` (transformers need its ``reshape_transform``), or a :class:`ConceptSite`, whose
            map is made of concepts. None takes the last value with positions before they are pooled away or flattened.
        intervention: what units are set to; None means :class:`~ce_plugin.interventions.ZeroOut`.
        design: None means each unit by itself, exactly; a :class:`~ce_plugin.designs.Joint` one makes a map of groups.
        weighting: ``"change"`` as above; ``"activation"`` is the plain product of the paper's sentence,
            ``sum_u contribution_{u,c} A_u(s)`` with the clean activation A of the layer, which favours what is strongly
            active.
        device_ids, outcome, output, seed, memory_budget, engine: as in :class:`LayerCausalEffect`; the outcome is the
            logit here, because probabilities hide every class but the winner.

    Raises:
        UnknownNameError: ``weighting`` of unknown name; see also :class:`LayerCausalEffect`.
        OutcomeError: an outcome that is one number for all classes.
        ModelError: at a call, without ``layer``, where no layer's positions are pooled away or flattened.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> x = torch.rand(2, 1, 8, 8)
        >>> cem = CausalEffectMap(net).attribute(x)
        >>> cem.shape, CausalEffectMap.interpolate(cem, (8, 8)).shape
        (torch.Size([2, 1, 6, 6]), torch.Size([2, 1, 8, 8]))
        >>> bool(torch.allclose(CausalEffectMap(net, "0").attribute(x), cem))  # before ReLU: the front is behind it
        True

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Figure 3 (II), which gives no formula; the interface is that of
        captum's LayerGradCam.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | LayerSite | ConceptSite | None = None,
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
        elif layer is None:
            self.effects = LastLayerCausalEffect(forward_func, intervention, design, outcome=outcome, **options)
        else:
            self.effects = LayerCausalEffect(forward_func, layer, intervention, design, outcome=outcome, **options)
        super().__init__(forward_func, self.effects.layer, device_ids)
        self.weighting = weighting
        if not self.effects.outcome.per_class:
            hint = "Take 'logit', 'log_odds' or 'probability'."
            raise OutcomeError(expected("outcome", "one with a value for each class", f"{outcome!r}", hint))

    def __repr__(self) -> str:
        settings = {**self.effects._settings(), "weighting": self.weighting}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in settings.items())})"

    def _repr_html_(self) -> str:
        return settings_html(self, {**self.effects._settings(), "weighting": self.weighting})

    @staticmethod
    def plot(
        found: Tensor,
        image: Tensor,
        *,
        example: int = 0,
        scale: float | None = None,
        width: int = 480,
        title: str | None = None,
        cmap: str | Colormap | None = None,
    ) -> Figure:
        """A map over its picture, enlarged to it; a figure, which shows itself in a notebook.

        Args:
            found: what :meth:`attribute` returned, (N, 1, h, w).
            image: the example's picture, (C, H, W), values in [0, 1] or bytes (uint8).
            example: index of the example.
            scale, width, title, cmap: see :func:`ce_plugin.visualization.overlay`.

        Raises:
            InputError: no such maps, or no picture.
            ArgumentError: no such example.

        Example:
            >>> import torch
            >>> found, image = torch.rand(2, 1, 3, 3), torch.rand(3, 12, 12)
            >>> CausalEffectMap.plot(found, image, example=1).get_size_inches().tolist()
            [4.8, 4.8]
        """
        if found.dim() != 4 or found.shape[1] != 1:
            raise InputError(expected("found", "maps of pictures, (N, 1, h, w)", tuple(found.shape)))
        check_integer("example", example)
        if not -len(found) <= example < len(found):
            raise ArgumentError(expected("example", f"below {len(found)}, the number of maps", example))
        size = tuple(as_picture(image).shape[1:])
        large = LayerAttribution.interpolate(found.detach()[example][None].cpu(), size, "bilinear")
        return overlay(large[0, 0], image, scale=scale, width=width, title=title, cmap=cmap)

    @logged
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
            show_progress=show_progress, given=given, ids=ids, weighting=self.weighting,
        )  # fmt: skip
        estimate, parts = self._run(call, significant_only)
        chosen = _target_of(estimate, target)
        maps = []
        for values, weights in parts:
            own = values.gather(2, chosen.reshape(-1, 1, 1).expand(-1, values.shape[1], 1))
            if against is not None:
                own = own - _contrasted(values, chosen, against)
            maps.append(effect_map(own, weights))
        found = torch.stack(maps).mean(0)
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
            show_progress=show_progress, given=given, ids=ids, weighting=self.weighting,
        )  # fmt: skip
        _, parts = self._run(call, significant_only)
        return torch.stack([effect_map(values, weights) for values, weights in parts]).mean(0)

    def _run(self, call: Call, significant_only: bool | float | None) -> tuple[Estimate, list[tuple[Tensor, Tensor]]]:
        """The estimate, and contributions (N, U, C) with weights (N, U, h, w) whose products' mean is the map.

        There is one pair for each draw of random evidence and each alternative value that is run by itself;
        contributions are zero where they are not significant.
        """
        experiment = self.effects._experiment(call)
        rate = None if significant_only is None else false_discovery_rate(significant_only, experiment)
        (estimate,) = experiment.run().values()
        parts = []
        for part in experiment.parts:
            values = -part.answer.effect.nan_to_num(0.0)  # where an example has no such unit
            if rate is not None:
                values = values.where(estimate.significant(rate), 0.0)
            parts.append((values, self._weights(experiment, part)))
        return estimate, parts

    def _weights(self, experiment: Experiment, part: MapPart) -> Tensor:
        """Where the units are, (N, U, h, w), or the groups of a joint design."""
        site, units, (clean,) = experiment.site, part.spec.units, part.spec.inputs
        if isinstance(site, InputSite) or not isinstance(units, MaskUnits):
            raise TypeError("maps are made at layers")
        numbers = units.ids[0].to(clean.device).to(widest(clean.device)).expand(-1, *clean.shape[1:])
        unit_of = site.map(numbers).round().long()
        found = []
        for i, shown in enumerate(part.shown):
            own = _by_unit(site.map(shown), unit_of[i % len(unit_of)], units.width)
            if isinstance(experiment.design, Joint):
                member = experiment.design.assignments(units.width).to(own)
                own = torch.einsum("gu,fu...->fg...", member, own)
            found.append(change_weights(own) if self.weighting == "change" else own[0])
        return torch.stack(found)


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


def change_weights(change: Tensor) -> Tensor:
    """Where each unit changes: mean over f in F(u) with a change of |d_uf(s)| / sum_s' |d_uf(s')|.

    Args:
        change: |d_uf(s)|, (F, U, h, w); one or three dimensions of places do too.

    Returns:
        (U, h, w), which sums to one for each unit; 0 for a unit that changes nothing.

    Example:
        >>> change = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]], [[[2.0, 2.0]], [[0.0, 0.0]]]])
        >>> change_weights(change).squeeze().tolist()
        [[0.375, 0.625], [0.0, 0.0]]
    """
    total = change.sum(tuple(range(2, change.dim())), keepdim=True)
    shares = change / total.clamp(min=torch.finfo(change.dtype).tiny)
    return shares.sum(0) / (total > 0).sum(0).clamp(min=1)


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
    """Sums over the elements of each unit at each position.

    Args:
        values: (F, K, h, w).
        unit_of: the unit of each element, int64 (K, h, w); ``n_units`` means none.
        n_units: number of units U.

    Returns:
        (F, U, h, w).
    """
    n, channels, *places = values.shape
    alone = torch.arange(channels, device=unit_of.device).reshape(-1, *[1] * len(places))
    if n_units == channels and bool((unit_of == alone).all()):
        return values
    index = unit_of.to(values.device).expand_as(values)
    # One row more, for what belongs to no unit.
    return values.new_zeros(n, n_units + 1, *places).scatter_add_(1, index, values)[:, :n_units]
