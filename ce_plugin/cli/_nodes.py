"""``ce-plugin nodes`` and ``ce-plugin map``: the channels of a layer on one picture, clean and under an attack."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ce_plugin.attribution import CausalEffectMap, CausalMediation, LayerCausalEffect
from ce_plugin.cli._commands import LayerOptions, MapOptions, NodesOptions
from ce_plugin.cli._session import Pictures, layer_name, manifest, network, say, table
from ce_plugin.datasets import read_image
from ce_plugin.effects import RegionTest
from ce_plugin.errors import ArgumentError, TargetError, expected
from ce_plugin.evaluation import rank_correlation
from ce_plugin.files import data_frame, printable, table_files, write_files
from ce_plugin.interventions import Intervention, MeanOut, Resample, ZeroOut
from ce_plugin.models import VisionModel
from ce_plugin.networks.forward import double
from ce_plugin.networks.layers import find_layer
from ce_plugin.report import (
    OUTCOMES,
    Carried,
    Plan,
    carried_by,
    carried_record,
    check_class,
    file_sha256,
    grad_cam,
    planned_attack,
)
from ce_plugin.visualization import overlay, plot_nodes, sheet
from ce_plugin.visualization.figure import png

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Of --reference, at most so many pictures are read, and so many of them give a channel its value in turn.
_REFERENCES, _DONORS = 32, 8


@dataclass(frozen=True)
class Resolved:
    """The options of a command, resolved and checked before any work.

    Attributes:
        net: the network.
        images: evidence -> the picture as the network takes it, (1, C, H, W): "clean", and the attack's name.
        layer: dotted name.
        target: class index.
        logits: the network's output for the clean picture, (1, C).
        intervention: what a channel is set to.
        hashes: what identifies the picture, for the manifest.
        attack: settings of the attack, for the manifest; empty without one.
        unreadable: name -> why, of pictures of the reference that could not be read.
    """

    net: VisionModel
    images: dict[str, Tensor]
    layer: str
    target: int
    logits: Tensor
    intervention: Intervention
    hashes: dict[str, Any]
    attack: dict[str, Any]
    unreadable: dict[str, str]

    @property
    def target_name(self) -> str:
        """Name of the explained class."""
        return self.net.class_name(self.target)

    @property
    def explained(self) -> dict[str, Any]:
        """The explained class, for the manifest."""
        return {"index": self.target, "name": self.target_name}

    def answers(self) -> list[str]:
        """What the network answers to each picture, a line each."""
        lines = []
        for evidence, image in self.images.items():
            with torch.no_grad():
                probability = double(self.net.model(image)).softmax(1)[0]
            best = int(probability.argmax())
            text = f"{self.net.class_name(best)} ({float(probability[best]):.2f})"
            if best != self.target:
                text += f"; {self.target_name} ({float(probability[self.target]):.2g})"
            lines.append(f"{'Answer' if evidence == 'clean' else f'Under {evidence.upper()}'}: {text}")
        return lines


def _resolve(options: LayerOptions) -> Resolved:
    """Read the picture, load the network, find layer and class, make the attack.

    Raises:
        CEPluginError: whatever can be put right.
    """
    picture = read_image(options.image)
    net = network(options)
    intervention, unreadable = _intervention(options, net)
    images = {"clean": net.inputs([picture])}
    with torch.no_grad():
        logits = net.model(images["clean"])
    target = check_class(logits, None if options.target is None else net.class_index(options.target))
    layer = layer_name(net, images["clean"], options.layer)
    hashes: dict[str, Any] = {
        printable(options.image.name): {"file": str(options.image), "sha256": file_sha256(options.image)}
    }
    hashes |= {f"{options.reference}/{name}": {"unreadable": why} for name, why in unreadable.items()}
    settings: dict[str, Any] = {}
    if options.given is not None:
        attack, settings = planned_attack(net, options.given, Plan(attacks=(options.given,), eps=options.eps))
        images[options.given] = attack.perturb(images["clean"], ids=[0], seed=options.seed)
    return Resolved(net, images, layer, target, logits, intervention, hashes, settings, unreadable)


def _intervention(options: LayerOptions, net: VisionModel) -> tuple[Intervention, dict[str, str]]:
    """What a channel is set to, and which pictures for it could not be read, and why.

    Raises:
        ArgumentError: pictures are needed and none were given, or the other way round.
    """
    kind, folder = options.intervention, options.reference
    if kind == "zero":
        if folder is not None:
            hint = "Add --intervention mean or --intervention resample, or leave it out."
            raise ArgumentError(expected("reference", "left out with --intervention zero", repr(str(folder)), hint))
        return ZeroOut(), {}
    if folder is None:
        raise ArgumentError(expected("reference", f"a folder of pictures for --intervention {kind}", None))
    pictures = Pictures.in_folder(folder, net, limit=_REFERENCES, name="reference")
    reference = torch.stack([pictures[i] for i in range(len(pictures))])
    made = MeanOut(reference) if kind == "mean" else Resample(reference, n_donors=min(_DONORS, len(reference)))
    return made, pictures.unreadable


def _say_cost(resolved: Resolved, cost: object, *, quiet: bool) -> None:
    say(f"Layer {resolved.layer}: {cost}" + (", and again under attack" if resolved.attack else ""), quiet=quiet)


def _write(
    options: LayerOptions, argv: Sequence[str], resolved: Resolved, files: dict[str, str | bytes], findings: Any
) -> None:
    """Write the files and the manifest with the findings, and say where."""
    record = manifest(options, argv, resolved.net, resolved.hashes)
    write_files(options.out, {**files, "manifest.json": {**record, "layer": resolved.layer, "findings": findings}})


# --- nodes


@dataclass(frozen=True)
class _Channels:
    """What was found about the channels of the layer.

    Attributes:
        labels: of the channels.
        contributions: evidence -> (channels, classes); minus the effect of Eq. 1: positive supports the class.
        ranked: the channels of the largest contributions to the target on the clean picture, equal ones in their order.
        answers: evidence -> what setting the strongest channels together does, in a sentence.
        carried: which channels carry the attack; None without one.
    """

    labels: list[str]
    contributions: dict[str, Tensor]
    ranked: list[int]
    answers: dict[str, str]
    carried: Carried | None


def nodes(options: NodesOptions, argv: Sequence[str]) -> dict[str, str]:
    """Rank the channels of a layer, and those that carry an attack; returns what could not be read, and why."""
    resolved = _resolve(options)
    found, cost = _channels(options, resolved)
    tables = {"nodes": _nodes_table(options, resolved, found)}
    findings: dict[str, Any] = {"cost": str(cost), "attack": resolved.attack, "explained": resolved.explained}
    findings |= {"answers": found.answers, "channels": _top_channels(resolved, found)}
    if found.carried is not None:
        tables["carriers"] = _carriers_table(found.carried)
        findings["carried"] = carried_record(found.carried, top=options.top)
    files = {**table_files(tables, options.tables), "nodes.png": _plot(options, resolved, found)}
    _write(options, argv, resolved, files, findings)
    say(_nodes_summary(options, resolved, found), quiet=options.quiet)
    say(f"Results: {options.out.absolute()}")
    return resolved.unreadable


def _channels(options: NodesOptions, resolved: Resolved) -> tuple[_Channels, object]:
    """Set every channel, clean and under attack, and patch them; with what it cost."""
    model, quiet = resolved.net.model, options.quiet
    explainer = LayerCausalEffect(
        model, resolved.layer, resolved.intervention, outcome=options.outcome, seed=options.seed
    )
    cost = explainer.estimate_cost(resolved.images["clean"], answer=True)
    _say_cost(resolved, cost, quiet=quiet)
    estimates = {
        name: explainer.estimate(image, show_progress=not quiet, answer=True, answer_target=resolved.target)
        for name, image in resolved.images.items()
    }
    contributions = {name: double(estimate.contribution[0]) for name, estimate in estimates.items()}
    ranked = contributions["clean"][:, resolved.target].abs().argsort(descending=True, stable=True).tolist()
    carried = None
    if options.given is not None:
        say(f"Channels that carry {options.given.upper()}: each is patched, then sets of the best", quiet=quiet)
        attacked = resolved.images[options.given]
        mediation = CausalMediation(model, resolved.layer, attacked, outcome=options.outcome, seed=options.seed)
        carried = carried_by(mediation, resolved.images["clean"], resolved.target)
    answers = {name: _answer(resolved, estimate.answer) for name, estimate in estimates.items()}
    return _Channels(estimates["clean"].labels_of(0), contributions, ranked[: options.top], answers, carried), cost


def _answer(resolved: Resolved, test: RegionTest | None) -> str:
    """What setting the strongest channels together does, beside as many at random."""
    verb = "Setting {} to zero" if isinstance(resolved.intervention, ZeroOut) else "Intervening on"
    return "" if test is None else test.sentence(0, resolved.net.class_name, verb, "channels")


def _nodes_table(options: NodesOptions, resolved: Resolved, found: _Channels) -> pd.DataFrame:
    """A row for each channel and class."""
    classes = [resolved.target]
    if options.target is None:
        order = resolved.logits[0].argsort(descending=True, stable=True).tolist()
        others = [index for index in order if index != resolved.target]
        classes = (classes + others)[: options.classes]
    header = ["channel", "class", "class_name", *(f"contribution_{evidence}" for evidence in found.contributions)]
    columns = [values.tolist() for values in found.contributions.values()]
    rows = (
        (label, index, resolved.net.class_name(index), *(column[unit][index] for column in columns))
        for unit, label in enumerate(found.labels)
        for index in classes
    )
    return data_frame(header, rows)


def _carriers_table(carried: Carried) -> pd.DataFrame:
    rows = ((carried.labels[unit], float(carried.indirect[unit]), carried.share(unit)) for unit in carried.order)
    return data_frame(["channel", "natural_indirect_effect", "share_of_total_effect"], rows)


def _plot(options: NodesOptions, resolved: Resolved, found: _Channels) -> bytes:
    shares = None
    if found.carried is not None and found.carried.order:
        best = found.carried.order[: options.top]
        shares = ([found.labels[unit] for unit in best], [found.carried.share(unit) for unit in best])
    figure = plot_nodes(
        [found.labels[unit] for unit in found.ranked],
        {name: values[found.ranked, resolved.target].tolist() for name, values in found.contributions.items()},
        shares=shares,
        xlabel=f"contribution to the {OUTCOMES[options.outcome]} of {resolved.target_name}",
        title=f"{printable(options.image.name)}, layer {resolved.layer}",
    )
    return png(figure, dpi=150)


def _top_channels(resolved: Resolved, found: _Channels) -> list[dict[str, Any]]:
    """The ranked channels, for the manifest."""
    return [
        {"channel": found.labels[unit]}
        | {f"contribution_{name}": float(v[unit, resolved.target]) for name, v in found.contributions.items()}
        for unit in found.ranked
    ]


def _nodes_summary(options: NodesOptions, resolved: Resolved, found: _Channels) -> str:
    measured = f"{OUTCOMES[options.outcome]} of {resolved.target_name}"
    rows = [
        [found.labels[unit], *(f"{float(v[unit, resolved.target]):+.4f}" for v in found.contributions.values())]
        for unit in found.ranked
    ]
    told = [text if name == "clean" else f"Under {name.upper()}: {text}" for name, text in found.answers.items()]
    lines = [*resolved.answers(), *told, "", f"Contribution to the {measured} (positive supports it)"]
    lines.append(table(["channel", *found.contributions], rows))
    if found.carried is not None:
        lines += ["", *_carrier_lines(found.carried, str(options.given).upper(), measured, options.top)]
    return "\n".join(lines)


def _carrier_lines(carried: Carried, attack: str, measured: str, top: int) -> list[str]:
    if not carried.order:
        return [f"{attack} does not change the {measured}."]
    rows = [
        [carried.labels[unit], f"{float(carried.indirect[unit]):+.4f}", f"{carried.share(unit):.1%}"]
        for unit in carried.order[:top]
    ]
    needed = ", ".join(f"{level:.0%}: {'not reached' if k is None else k}" for level, k in carried.needed.items())
    return [
        f"Channels that carry {attack}: it changes the {measured} by {carried.total:+.3g}",
        table(["channel", "indirect effect", "share of the attack's"], rows),
        f"Best channels together that carry {needed} (of {len(carried.labels)}). One image's effects, chosen and tested"
        " on that image, hence optimistic.",
    ]


# --- map


def draw_map(options: MapOptions, argv: Sequence[str]) -> dict[str, str]:
    """Draw the causal effect map of a layer beside Grad-CAM; returns what could not be read, and why."""
    resolved = _resolve(options)
    contrast = _contrast(resolved, options.contrast)
    arrays, cost = _maps(options, resolved, contrast)
    findings: dict[str, Any] = {"cost": str(cost), "attack": resolved.attack, "layer": resolved.layer}
    findings["explained"] = resolved.explained
    if options.given is not None:
        findings["rank_correlation_with_clean"] = _correlations(arrays, options.given)
    explained = _explained(resolved, contrast)
    plain: dict[str, Any] = {name: value.numpy() for name, value in arrays.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **plain)
    files: dict[str, str | bytes] = {
        "map.png": _picture(options, resolved, arrays, explained),
        "maps.npz": buffer.getvalue(),
    }
    _write(options, argv, resolved, files, findings)
    lines = [*resolved.answers(), f"Map of: {explained}"]
    if options.given is not None:
        values = findings["rank_correlation_with_clean"].items()
        shown = ", ".join(f"{kind.replace('_', ' ')} {'undefined' if v is None else f'{v:.2f}'}" for kind, v in values)
        lines.append(f"Rank correlation with the clean map: {shown}")
    say("\n".join(lines), quiet=options.quiet)
    say(f"Results: {options.out.absolute()}")
    return resolved.unreadable


def _contrast(resolved: Resolved, named: list[str] | None) -> list[int] | Literal["others"] | None:
    """Class indices, "others", or None."""
    if not named:
        return None
    if "others" in named:
        if len(named) > 1:
            hint = "Write others alone: it means all classes but the target."
            raise ArgumentError(expected("contrast", "others, or classes", " and ".join(named), hint))
        return "others"
    chosen = [resolved.net.class_index(one, "contrast") for one in named]
    classes = resolved.logits.shape[1]
    for index in chosen:
        if not 0 <= index < classes or index == resolved.target:
            wanted = f"from 0 to {classes - 1}, and not the target {resolved.target}"
            raise TargetError(expected("contrast", wanted, index))
    return chosen


def _explained(resolved: Resolved, contrast: list[int] | Literal["others"] | None) -> str:
    """ "tabby", or "tabby rather than lynx", for the reader."""
    if contrast is None:
        return resolved.target_name
    others = contrast if contrast == "others" else ", ".join(resolved.net.class_name(index) for index in contrast)
    return f"{resolved.target_name} rather than {others}"


def _maps(options: MapOptions, resolved: Resolved, contrast: Any) -> tuple[dict[str, Tensor], object]:
    """The maps of each evidence by name, all of them (h, w), and what they cost."""
    model = resolved.net.model
    explainer = CausalEffectMap(
        model,
        resolved.layer,
        resolved.intervention,
        outcome=options.outcome,
        weighting=options.weighting,
        seed=options.seed,
    )
    cost = explainer.effects.estimate_cost(resolved.images["clean"])
    _say_cost(resolved, cost, quiet=options.quiet)
    _, module = find_layer(model, resolved.layer)
    arrays = {}
    for name, image in resolved.images.items():
        small = explainer.attribute(image, resolved.target, contrast=contrast, show_progress=not options.quiet)
        large = explainer.interpolate(small, tuple(image.shape[2:]), "bilinear")
        arrays[f"{name}_effect_map"] = double(small[0, 0].detach())
        arrays[f"{name}_effect_map_enlarged"] = double(large[0, 0].detach())
        arrays[f"{name}_grad_cam"] = double(grad_cam(model, module, image, resolved.target)[0])
    return arrays, cost


def _correlations(arrays: dict[str, Tensor], attack: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for kind in ("effect_map_enlarged", "grad_cam"):
        value = float(rank_correlation(arrays[f"clean_{kind}"][None], arrays[f"{attack}_{kind}"][None]))
        # JSON knows no NaN, which a constant map has.
        found[kind.removesuffix("_enlarged")] = None if value != value else value
    return found


def _picture(options: MapOptions, resolved: Resolved, arrays: dict[str, Tensor], explained: str) -> bytes:
    """For each evidence a row: the picture, the causal effect map, Grad-CAM."""
    scale = max(float(arrays[f"{name}_effect_map_enlarged"].abs().max()) for name in resolved.images)
    rows: list[list[tuple[str, Figure | Tensor]]] = []
    for name, image in resolved.images.items():
        picture = resolved.net.pictures(image)[0]
        cam = arrays[f"{name}_grad_cam"]
        effect = overlay(arrays[f"{name}_effect_map_enlarged"], picture, scale=scale or None)
        shown = overlay(cam, picture, scale=float(cam.max()) or None, sign="positive")
        title = printable(options.image.name) if name == "clean" else f"under {name.upper()}"
        rows.append([(title, picture), (f"causal effect map: {explained}", effect), ("Grad-CAM", shown)])
    note = f"layer {resolved.layer}; orange supports, blue opposes; full colour is ±{scale:.2g} "
    return png(sheet(rows, note=note + OUTCOMES[options.outcome]), dpi=150)
