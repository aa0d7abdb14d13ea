"""``ce-plugin map``: the causal effect map of a layer beside Grad-CAM, clean and under an attack."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ce_plugin.attribution import CausalEffectMap
from ce_plugin.cli._session import manifest, say
from ce_plugin.cli.question import Question
from ce_plugin.cli.results import json_text, write_files
from ce_plugin.errors import ArgumentError, TargetError, expected
from ce_plugin.evaluation import rank_correlation
from ce_plugin.report import OUTCOMES, grad_cam, named_layer
from ce_plugin.visualization import overlay, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_map"]


def draw_map(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the command."""
    asked = Question.of(arguments)
    contrast = _contrast(asked, arguments.contrast)
    explainer = CausalEffectMap(
        asked.net.model,
        asked.layer,
        asked.intervention,
        outcome=arguments.outcome,
        weighting=arguments.weighting,
        seed=arguments.seed,
    )
    cost = explainer.effects.estimate_cost(asked.inputs)
    say(f"Layer {asked.layer}: {cost}" + (", and again under attack" if arguments.given else ""), quiet=arguments.quiet)
    seen = {"clean": asked.inputs}
    if asked.attacked is not None:
        seen[arguments.given] = asked.attacked
    arrays: dict[str, Tensor] = {}
    for name, inputs in seen.items():
        small = explainer.attribute(inputs, asked.target, contrast=contrast, show_progress=not arguments.quiet)
        arrays[f"{name}_effect_map"] = small[0, 0].detach().double().cpu()
        large = explainer.interpolate(small, tuple(inputs.shape[2:]), "bilinear")
        arrays[f"{name}_effect_map_enlarged"] = large[0, 0].detach().double().cpu()
        arrays[f"{name}_grad_cam"] = _grad_cam(asked, inputs)
    found: dict[str, Any] = {"cost": str(cost), "attack": asked.attack, "layer": asked.layer}
    found |= {"explained": {"index": asked.target, "name": asked.net.class_name(asked.target)}}
    if asked.attacked is not None:
        found["rank_correlation_with_clean"] = _correlations(arrays, arguments.given)
    record = manifest(arguments, words, asked.net, asked.prints)
    files: dict[str, str | bytes] = {
        "map.png": _picture(asked, arguments, arrays, seen),
        "maps.npz": _npz(arrays),
        "manifest.json": json_text({**record, "findings": found}),
    }
    write_files(arguments.out, files)
    say(_summary(asked, arguments, found), quiet=arguments.quiet)
    sys.stdout.write(f"Results: {arguments.out.absolute()}\n")
    return 0


def _contrast(asked: Question, named: list[str] | None) -> Any:
    """Class indices, "others", or None."""
    if named is None:
        return None
    if "others" in named:
        if len(named) > 1:
            hint = "Write others alone: it means all classes but the target."
            raise ArgumentError(expected("contrast", "others, or classes", " and ".join(named), hint))
        return "others"
    chosen = [asked.net.class_index(one) for one in named]
    classes = asked.logits.shape[1]
    for index in chosen:
        if not 0 <= index < classes or index == asked.target:
            wanted = f"from 0 to {classes - 1}, and not the target {asked.target}"
            raise TargetError(expected("contrast", wanted, index))
    return chosen


def _grad_cam(asked: Question, inputs: Tensor) -> Tensor:
    """Grad-CAM at the same layer, (H, W)."""
    _, module = named_layer(asked.net.model, asked.layer)
    return grad_cam(asked.net.model, module, inputs, asked.target)[0].double()


def _correlations(arrays: dict[str, Tensor], attack: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for kind in ("effect_map_enlarged", "grad_cam"):
        value = float(rank_correlation(arrays[f"clean_{kind}"][None], arrays[f"{attack}_{kind}"][None]))
        # JSON knows no NaN, which a constant map has.
        found[kind.removesuffix("_enlarged")] = None if value != value else value
    return found


def _question(asked: Question, arguments: argparse.Namespace) -> str:
    """ "tabby", or "tabby rather than lynx", for the reader."""
    name = asked.net.class_name(asked.target)
    if arguments.contrast is None:
        return name
    others = [c if c == "others" else asked.net.class_name(asked.net.class_index(c)) for c in arguments.contrast]
    return f"{name} rather than {', '.join(others)}"


def _picture(
    asked: Question, arguments: argparse.Namespace, arrays: dict[str, Tensor], seen: dict[str, Tensor]
) -> bytes:
    scale = max(float(arrays[f"{name}_effect_map_enlarged"].abs().max()) for name in seen)
    question, outcome = _question(asked, arguments), OUTCOMES[arguments.outcome]
    rows: list[list[tuple[str, Figure | Tensor]]] = []
    for name, inputs in seen.items():
        picture = asked.net.pictures(inputs)[0]
        cam = arrays[f"{name}_grad_cam"]
        effect = overlay(arrays[f"{name}_effect_map_enlarged"], picture, scale=scale or None)
        shown = overlay(cam, picture, scale=float(cam.max()) or None, sign="positive")
        title = arguments.image.name if name == "clean" else f"under {name.upper()}"
        rows.append([(title, picture), (f"causal effect map: {question}", effect), ("Grad-CAM", shown)])
    note = f"layer {asked.layer}; orange supports, blue opposes; full colour is ±{scale:.2g} {outcome}"
    buffer = io.BytesIO()
    sheet(rows, note=note).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _npz(arrays: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    plain: dict[str, Any] = {name: value.numpy() for name, value in arrays.items()}
    np.savez_compressed(buffer, **plain)
    return buffer.getvalue()


def _summary(asked: Question, arguments: argparse.Namespace, found: dict[str, Any]) -> str:
    lines = [f"Answer: {asked.answers(asked.inputs)}", f"Map of: {_question(asked, arguments)}"]
    if asked.attacked is not None:
        lines.insert(1, f"Under {arguments.given.upper()}: {asked.answers(asked.attacked)}")
        values = found["rank_correlation_with_clean"]
        shown = ", ".join(
            f"{kind.replace('_', ' ')} {'undefined' if v is None else f'{v:.2f}'}" for kind, v in values.items()
        )
        lines.append(f"Rank correlation with the clean map: {shown}")
    return "\n".join(lines)
