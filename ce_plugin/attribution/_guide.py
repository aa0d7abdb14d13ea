"""What a gradient says of the effects before any trial is run: the guide of designs that set regions of a grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d, interpolate

from ce_plugin.attribution._estimation import OutcomeMeasure
from ce_plugin.designs import Design
from ce_plugin.effects.outcomes import OUTCOMES
from ce_plugin.errors import CEPluginError, ModelError, expected
from ce_plugin.interventions import Intervention, PixelMask
from ce_plugin.networks.forward import Forward, double
from ce_plugin.networks.layers import MapWatch, has_positions, watched_maps
from ce_plugin.networks.layout import channel_dim
from ce_plugin.trials.batches import TrialSpec, rows_of

logger = logging.getLogger("ce_plugin")

PASSES = 3
"""A pass, and a backward pass, which counts as two."""

# The ways in which a network fails for one row, or with gradients: trials alone answer then.
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)
_POOLS: dict[int, Callable[..., Tensor]] = {1: adaptive_avg_pool1d, 2: adaptive_avg_pool2d, 3: adaptive_avg_pool3d}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def is_guided(design: Design, intervention: Intervention) -> bool:
    """Whether a gradient may say beforehand where effects will be: those of masks, on a smooth map."""
    return design.estimator == "smooth" and not design.exact and isinstance(intervention, PixelMask)


def has_map(seen: MapWatch, heads: Iterable[Tensor], dims: int) -> bool:
    """Whether a pass had a last value with positions, in so many dimensions."""
    return seen.value is not None and seen.value.dim() == dims + 2 and not any(map(has_positions, heads))


def gradient_guide(forward: Forward, spec: TrialSpec, measure: OutcomeMeasure) -> Tensor | None:
    """Minus gradient times activation, summed over channels, at the last value with positions, on the units' grid.

    This is the first-order effect of setting a position of that value to zero: where the network only pools and weighs
    afterwards, the map of Grad-CAM without its ReLU. Each example's explained class has one (its target, or the class
    predicted); columns of other classes are zero.

    Args:
        forward: what is explained, of one output head.
        spec: the trials; its units are the cells of a grid.
        measure: of the outcome whose gradient is taken; of a probability it is that of its log-odds, which points the
            same way and does not vanish where the probability is 1.

    Returns:
        (N, U, C), any scale, on the CPU; None where there is no such value, or no gradient: the reason is logged.
    """
    grid = spec.units.grid
    (name,) = measure.reference
    columns = _explained(measure, name)
    if grid is None or columns is None:
        return None
    maps: list[Tensor] = []
    try:
        for example in range(spec.n):
            one, _ = _one(forward, spec, example, lambda heads: measure)
            if one is None:
                logger.info("no gradient guides the map: the network has no last value with the inputs' positions")
                return None
            maps.append(one)
    except _FAILURES as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.info("no gradient guides the map: %s", _reason(error))
        return None
    guide = torch.zeros(spec.n, math.prod(grid), measure.reference[name].shape[1], dtype=torch.double)
    for i, one in enumerate(maps):
        on_grid = -_resized(double(one), grid).flatten()
        guide[i, :, int(columns[i])] = on_grid if bool(torch.isfinite(on_grid).all()) else 0
    return guide


def first_order(
    forward: Forward, spec: TrialSpec, measured: Callable[[dict[str, Tensor], bool], OutcomeMeasure]
) -> tuple[OutcomeMeasure, Tensor]:
    """Effects to first order: those of :func:`gradient_guide` in the outcome's unit, from the clean pass itself.

    Args:
        forward, spec: as there.
        measured: from outputs, (N, *K) for each head, and whether to warn, to the measure that explains one class of
            each example.

    Returns:
        The measure of the examples' outputs, and the effects (N, U, 1).

    Raises:
        ModelError: the network has no last value with positions, or no gradient.
    """
    outputs, maps = [], []
    for example in range(spec.n):
        try:
            one, head = _one(forward, spec, example, lambda heads: measured(_repeated(heads, spec.n), False))
        except _FAILURES as error:
            if isinstance(error, (torch.OutOfMemoryError, CEPluginError)):
                raise
            raise _no_gradient(_reason(error)) from error
        if one is None or spec.units.grid is None or not bool(torch.isfinite(one).all()):
            raise _no_gradient("none" if one is None else "one that is not finite")
        grid = spec.units.grid
        outputs.append(head)
        # A position of a coarse value is as large as several units, and of a fine one a part of a unit.
        maps.append(-_resized(double(one), grid).flatten() * (one.numel() / math.prod(grid)))
    measure = measured({name: torch.cat([head[name] for head in outputs]) for name in outputs[0]}, True)
    (reference,) = measure.reference.values()
    effect = torch.stack(maps)[..., None].to(reference)
    if measure.outcome is OUTCOMES["probability"]:
        effect = effect * (reference * (1 - reference))[:, None]  # of the log-odds
    return measure, effect


def _repeated(heads: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """One example's outputs, (1, *K) for each head, for each of n."""
    return {name: head.expand(n, *head.shape[1:]) for name, head in heads.items()}


def _no_gradient(got: str) -> ModelError:
    wanted = "a network with a last value that has positions, and a gradient, for so few passes"
    return ModelError(expected("forward_func", wanted, got, "Take 12 passes or more, with guide=None."))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _explained(measure: OutcomeMeasure, name: str) -> Tensor | None:
    """Each example's column whose effects are explained."""
    reference, predicted = measure.reference[name], measure.predicted[name]
    if reference.shape[1] == 1:
        return torch.zeros(len(reference), dtype=torch.long)
    return predicted if predicted is not None and measure.class_shapes[name] == (reference.shape[1],) else None


def _one(
    forward: Forward,
    spec: TrialSpec,
    example: int,
    measured: Callable[[dict[str, Tensor]], OutcomeMeasure],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """One example's map, with the value's own positions, and its outputs; no map where there is no such value."""
    row = torch.tensor([example])
    # Inference tensors cannot be followed: a clone made outside of inference mode can.
    with watched_maps(forward.modules) as seen, torch.inference_mode(False), torch.enable_grad():
        inputs = tuple(x.clone().requires_grad_() for x in rows_of(spec.inputs, spec.n, row))
        heads = forward(inputs, rows_of(spec.args, spec.n, row))
        outputs = {name: head.detach() for name, head in heads.items()}
        measure = measured(outputs)
        (name,) = measure.reference
        if seen.module is None or seen.value is None:
            return None, outputs
        if not has_map(seen, [heads[name]], len(spec.units.grid or ())):
            return None, outputs
        outcome = OUTCOMES["log_odds"] if measure.outcome is OUTCOMES["probability"] else measure.outcome
        found = outcome(heads[name], outputs[name]).reshape(-1)
        targets, predicted = measure.targets[name], measure.predicted[name]
        target = targets if targets is not None else predicted
        one = found[0] if target is None or len(found) == 1 else found[int(target[example])]
        (gradient,) = torch.autograd.grad(one, seen.value)
    value = seen.value.detach()
    layout = channel_dim(forward.modules, seen.module, value.shape, at_input=seen.at_input)
    dim = 1 if layout is None else layout[0]
    return (gradient * value).sum(dim, keepdim=True).movedim(dim, 1)[0, 0].cpu(), outputs


def _resized(values: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A map of any size on the grid: averaged where it is finer, interpolated where it is coarser."""
    there = values[None, None]
    if any(have > want for have, want in zip(values.shape, grid, strict=True)):
        there = _POOLS[len(grid)](there, tuple(min(pair) for pair in zip(values.shape, grid, strict=True)))
    return interpolate(there, grid, mode=_LINEAR[len(grid)], align_corners=False)[0, 0]
