"""One photograph, clean and under attack: the runs whose results the report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ce_plugin.attribution import CausalEffect
from ce_plugin.effects import Estimate, resolve_outcome
from ce_plugin.errors import InputError, ModelError, TargetError, expected
from ce_plugin.models import VisionModel
from ce_plugin.report.attacks import evidence_name, planned_attack
from ce_plugin.report.findings import Answer, Case, ClassMaps, Plan, Study
from ce_plugin.report.layer import layer_study
from ce_plugin.report.meter import Meter
from ce_plugin.report.peers import grad_cam, last_conv_layer, named_layer, saliency
from ce_plugin.sites import InputSite, patch_grid

__all__ = ["check_class", "study"]

Progress = Callable[[str], None]


def study(
    net: VisionModel,
    inputs: Tensor,
    name: str,
    plan: Plan | None = None,
    *,
    target: int | None = None,
    example_id: int = 0,
    progress: Progress | None = None,
) -> Study:
    """Explain one photograph, clean and under each attack.

    Args:
        net: the network.
        inputs: the photograph as the network takes it, (1, C, H, W), see :meth:`VisionModel.inputs`.
        name: what the report calls the photograph.
        plan: what is run.
        target: class to explain; None means the answer on the clean photograph.
        example_id: names the photograph's random numbers, together with the plan's seed.
        progress: called with a few words before each step.

    Returns:
        Everything that a report shows.

    Raises:
        InputError: not one photograph.
        ModelError: the network does not return (N, C) with at least two classes.
        TargetError: there is no such class.
        UnknownNameError: there is no layer of the plan's name.

    Example:
        >>> layers = [nn.Conv2d(3, 2, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)]
        >>> found = study(VisionModel(nn.Sequential(*layers)), torch.rand(1, 3, 16, 16), "noise", Plan(attacks=()))
        >>> [case.name for case in found.cases]
        ['Clean']
    """
    plan = plan or Plan()
    tell = progress or (lambda words: None)
    if inputs.dim() != 4 or len(inputs) != 1:
        raise InputError(expected("inputs", "one photograph, (1, C, H, W)", tuple(inputs.shape)))
    layer = named_layer(net.model, plan.layer) if plan.layer else last_conv_layer(net.model, inputs)
    with torch.no_grad():
        explained = check_class(net.model(inputs), target)
    cases, seen = [], {}
    for evidence in ("clean", *plan.attacks):
        meter = Meter(net.model)
        label = evidence_name(evidence)
        attacked, settings = inputs, dict[str, Any]()
        if evidence != "clean":
            tell(f"{name}: {label} attack")
            attack, settings = planned_attack(net, evidence, plan)
            with meter("attack"):
                attacked = attack.perturb(inputs, ids=[example_id], seed=plan.seed)
        tell(f"{name}: {label}, effects")
        cases.append(_case(net, plan, evidence, inputs, attacked, explained, layer, meter, settings, example_id))
        seen[label] = attacked
    if layer is None:
        return Study(name, tuple(cases))
    cams = [case.maps[0].grad_cam for case in cases]
    looked = layer_study(
        net, layer[0], plan, seen, cams, explained, tell=lambda words: tell(f"{name}: {words}, channels")
    )
    return Study(name, tuple(cases), looked)


def check_class(output: object, target: int | None) -> int:
    """The class to explain, once the network's output for one example shows that there is one.

    Args:
        output: what the network returned.
        target: None means its answer.

    Raises:
        ModelError: the network does not return (N, C) with at least two classes.
        TargetError: there is no such class.

    Example:
        >>> check_class(torch.tensor([[0.1, 0.9]]), None)
        1
    """
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(expected("model", "a classifier that returns (N, C) with C > 1", got))
    if target is not None and not 0 <= target < output.shape[1]:
        raise TargetError(expected("target", f"from 0 to {output.shape[1] - 1}", target))
    return int(output[0].argmax()) if target is None else target


def _case(
    net: VisionModel,
    plan: Plan,
    evidence: str,
    clean: Tensor,
    inputs: Tensor,
    explained: int,
    layer: tuple[str, nn.Module] | None,
    meter: Meter,
    settings: Mapping[str, Any],
    example_id: int,
) -> Case:
    with torch.no_grad():
        clean_answer, answers = int(net.model(clean).argmax()), _answers(net, net.model(inputs))
    top = sorted(answers, key=lambda answer: -answer.probability)[:3]
    with meter("causal effects"):
        estimate = _explainer(net, plan).estimate(
            inputs,
            ids=[example_id],
            # Designs over a grid know the default one only.
            feature_mask=None if plan.cells == 14 else patch_grid(inputs.shape[2], inputs.shape[3], plan.cells),
            perturbations_per_eval=plan.perturbations_per_eval,
        )
    outlined, exact = _outlined(net, plan, estimate, inputs)
    changed = evidence != "clean" and top[0].index != clean_answer
    maps = []
    for index in dict.fromkeys([explained, top[0].index] if changed else [explained]):
        with meter("Grad-CAM and saliency"):
            gradients = saliency(net.model, inputs, index)[0]
            cam = None if layer is None else grad_cam(net.model, layer[1], inputs, index)[0]
        region = outlined[0, :, index]
        maps.append(
            ClassMaps(
                answer=answers[index],
                contribution=_spread(inputs, plan.cells, estimate.contribution[:, :, index]),
                outlined=_spread(inputs, plan.cells, region[None].double()) > 0.5,
                n_outlined=int(region.sum()),
                n_units=len(region),
                saliency=gradients,
                grad_cam=cam,
            )
        )
    span = net.value_range[1] - net.value_range[0]
    change = net.normalization.to_image(inputs) - net.normalization.to_image(clean)
    return Case(
        name=evidence_name(evidence),
        picture=net.pictures(inputs)[0],
        top=tuple(top),
        explained=answers[explained],
        maps=tuple(maps),
        perturbation=None if evidence == "clean" else (change[0] / span).cpu(),
        success=None if evidence == "clean" else changed,
        settings=settings,
        exact=exact,
        trials=int(estimate.n_trials),
        passes=dict(meter.passes),
        seconds=dict(meter.seconds),
    )


def _answers(net: VisionModel, output: Tensor) -> list[Answer]:
    probability = output.double().softmax(dim=1)[0].tolist()
    log_odds = resolve_outcome("log_odds")(output.double(), output.double())[0].tolist()
    return [Answer(i, net.class_name(i), p, o) for i, (p, o) in enumerate(zip(probability, log_odds, strict=True))]


def _explainer(net: VisionModel, plan: Plan) -> CausalEffect:
    return CausalEffect(
        net.model,
        plan.intervention,
        plan.design,
        outcome=plan.outcome,
        normalization=net.normalization,
        seed=plan.seed,
    )


def _outlined(net: VisionModel, plan: Plan, estimate: Estimate, inputs: Tensor) -> tuple[Tensor, bool]:
    """Which units to outline, bool (1, U, C), and whether that is for being not zero (exact designs)."""
    if estimate.std_error is not None:
        return estimate.significant(fdr=plan.fdr), False
    return estimate.effect.abs() > 10 * _float_noise(net.model, plan.outcome, inputs), True


def _float_noise(model: nn.Module, outcome: str, inputs: Tensor) -> float:
    """How far the same input's outcome moves when only the size of the batch changes."""
    measure = resolve_outcome(outcome)
    with torch.no_grad():
        rows = [model(inputs.expand(size, *inputs.shape[1:]).contiguous()) for size in (1, 2, 8)]
    values = [measure(row, row) for row in rows]
    moved = max(float((value - values[0]).abs().max()) for value in values)
    return max(moved, float(values[0].abs().max()) * torch.finfo(values[0].dtype).eps)


def _spread(inputs: Tensor, cells: int, values: Tensor) -> Tensor:
    """One value per unit as a plane (H, W)."""
    (plane,) = InputSite(cells=cells).units_of((inputs,)).spread(values.to(inputs.device))
    return plane[0].mean(dim=0).cpu()
