"""``ce-plugin nodes``: effects of all channels of a layer, ranked; under an attack, the channels that carry it."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ce_plugin.attribution import CausalMediation, LayerCausalEffect
from ce_plugin.cli._session import manifest, say
from ce_plugin.cli.question import Question
from ce_plugin.cli.results import csv_text, json_text, table, write_files
from ce_plugin.report import OUTCOMES, Carried, carried_by, carried_record
from ce_plugin.visualization import plot_nodes

__all__ = ["nodes"]


def nodes(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the command."""
    asked = Question.of(arguments)
    quiet = arguments.quiet
    explainer = LayerCausalEffect(
        asked.net.model, asked.layer, asked.intervention, outcome=arguments.outcome, seed=arguments.seed
    )
    cost = explainer.estimate_cost(asked.inputs)
    say(f"Layer {asked.layer}: {cost}" + (", and again under attack" if arguments.given else ""), quiet=quiet)
    clean = explainer.estimate(asked.inputs, show_progress=not quiet)
    effects = {"clean": clean.contribution[0].double().cpu()}
    carried: Carried | None = None
    if asked.attacked is not None:
        under = explainer.estimate(asked.attacked, show_progress=not quiet)
        effects[arguments.given] = under.contribution[0].double().cpu()
        say(f"Channels that carry {arguments.given.upper()}: each is patched, then sets of the best", quiet=quiet)
        carried = carried_by(_mediation(asked, asked.attacked, arguments), asked.inputs, asked.target)
    labels = clean.labels_of(0)
    classes = [asked.target] if arguments.target is not None else asked.classes(arguments.classes)
    ranked = _ranking(effects["clean"][:, asked.target])[: arguments.top]
    files: dict[str, str | bytes] = {
        "nodes.csv": _nodes_csv(asked, labels, classes, effects),
        "nodes.png": _plot(asked, arguments, labels, effects, ranked, carried),
    }
    found = {"cost": str(cost), "attack": asked.attack, **_findings(asked, labels, effects, ranked)}
    if carried is not None:
        files["carriers.csv"] = _carriers_csv(carried)
        found["carried"] = carried_record(carried, top=arguments.top)
    record = manifest(arguments, words, asked.net, asked.prints)
    files["manifest.json"] = json_text({**record, "layer": asked.layer, "findings": found})
    write_files(arguments.out, files)
    say(_summary(asked, arguments, labels, effects, ranked, carried), quiet=quiet)
    sys.stdout.write(f"Results: {arguments.out.absolute()}\n")
    return 0


def _mediation(asked: Question, attacked: Tensor, arguments: argparse.Namespace) -> CausalMediation:
    return CausalMediation(asked.net.model, asked.layer, attacked, outcome=arguments.outcome, seed=arguments.seed)


def _ranking(values: Tensor) -> list[int]:
    """Channels by the size of their contribution, equal ones in their own order."""
    order: list[int] = values.abs().argsort(descending=True, stable=True).tolist()
    return order


def _nodes_csv(asked: Question, labels: list[str], classes: list[int], effects: dict[str, Tensor]) -> str:
    """A row for each channel and class; contribution is minus the effect of Eq. 1: positive supports the class."""
    names = [asked.net.class_name(c) for c in classes]
    columns = [effects[evidence][:, classes].tolist() for evidence in effects]
    rows = (
        (label, c, names[place], *(column[unit][place] for column in columns))
        for unit, label in enumerate(labels)
        for place, c in enumerate(classes)
    )
    return csv_text(["channel", "class", "class_name", *(f"contribution_{evidence}" for evidence in effects)], rows)


def _carriers_csv(carried: Carried) -> str:
    rows = ((carried.labels[unit], float(carried.indirect[unit]), carried.share(unit)) for unit in carried.order)
    return csv_text(["channel", "natural_indirect_effect", "share_of_total_effect"], rows)


def _plot(
    asked: Question,
    arguments: argparse.Namespace,
    labels: list[str],
    effects: dict[str, Tensor],
    ranked: list[int],
    carried: Carried | None,
) -> bytes:
    outcome, name = OUTCOMES[arguments.outcome], asked.net.class_name(asked.target)
    shares = None
    if carried is not None and carried.order:
        best = carried.order[: arguments.top]
        shares = ([labels[unit] for unit in best], [carried.share(unit) for unit in best])
    figure = plot_nodes(
        [labels[unit] for unit in ranked],
        {evidence: [float(values[unit, asked.target]) for unit in ranked] for evidence, values in effects.items()},
        shares=shares,
        xlabel=f"contribution to the {outcome} of {name}",
        title=f"{arguments.image.name}, layer {asked.layer}",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _findings(asked: Question, labels: list[str], effects: dict[str, Tensor], ranked: list[int]) -> dict[str, Any]:
    target = asked.target
    return {
        "explained": {"index": target, "name": asked.net.class_name(target)},
        "channels": [
            {
                "channel": labels[unit],
                **{f"contribution_{evidence}": float(values[unit, target]) for evidence, values in effects.items()},
            }
            for unit in ranked
        ],
    }


def _summary(
    asked: Question,
    arguments: argparse.Namespace,
    labels: list[str],
    effects: dict[str, Tensor],
    ranked: list[int],
    carried: Carried | None,
) -> str:
    outcome, name = OUTCOMES[arguments.outcome], asked.net.class_name(asked.target)
    lines = [f"Answer: {asked.answers(asked.inputs)}"]
    if asked.attacked is not None:
        lines.append(f"Under {arguments.given.upper()}: {asked.answers(asked.attacked)}")
    lines += ["", f"Contribution to the {outcome} of {name} (positive supports it)"]
    rows = [[labels[u], *(f"{float(v[u, asked.target]):+.4f}" for v in effects.values())] for u in ranked]
    lines.append(table(["channel", *effects], rows))
    if carried is not None:
        lines += ["", *_carrier_lines(carried, arguments, f"{outcome} of {name}")]
    return "\n".join(lines)


def _carrier_lines(carried: Carried, arguments: argparse.Namespace, what: str) -> list[str]:
    attack = arguments.given.upper()
    if not carried.order:
        return [f"{attack} does not change the {what}."]
    rows = [
        [carried.labels[unit], f"{float(carried.indirect[unit]):+.4f}", f"{carried.share(unit):.1%}"]
        for unit in carried.order[: arguments.top]
    ]
    needed = ", ".join(f"{level:.0%}: {'not reached' if k is None else k}" for level, k in carried.needed.items())
    return [
        f"Channels that carry {attack}: it changes the {what} by {carried.total:+.3g}",
        table(["channel", "indirect effect", "share of the attack's"], rows),
        f"Best channels together that carry {needed} (of {len(carried.labels)}). One image's effects, chosen and tested"
        " on that image, hence optimistic.",
    ]
