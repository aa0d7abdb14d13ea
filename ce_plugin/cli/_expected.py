"""``ce-plugin expected``: effects of every picture of a data set, and the answers of the table that they make."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ce_plugin.attribution import CausalEffect, LayerCausalEffect
from ce_plugin.cli._commands import ATTACKS, ExpectedOptions, ExpectedShowOptions
from ce_plugin.cli._session import layer_name, network, say, table
from ce_plugin.datasets import ImageSource, labels_for, open_source
from ce_plugin.designs import RandomMask, RandomRegions
from ce_plugin.errors import TargetError, expected, unknown_name
from ce_plugin.expected import EffectTable, ExpectedEstimate, RayCluster, Sample, Subset
from ce_plugin.expected import run as run_over
from ce_plugin.files import data_frame, table_files, write_files
from ce_plugin.interventions import PixelMask
from ce_plugin.models import VisionModel
from ce_plugin.report import ExpectedStudy, Plan, planned_attack, save_expected
from ce_plugin.sites import Evidence

_OF_CLASSES = ("log_odds", "probability", "prediction_weighted")
_OF_ONE = ("sigmoid", "logit")
# Random masks of each picture.
_DRAWS = 2
# Of unreadable pictures, so many are named at the terminal; all are in the table of those skipped.
_NAMED = 10


@dataclass(frozen=True)
class Prepared:
    """The pictures of a source as a network takes them.

    Args:
        source: reads them.
        net: prepares them; it holds no weights, so that processes that read can have it.
        labels: instead of the source's own.
    """

    source: ImageSource
    net: VisionModel
    labels: Sequence[int | None] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.source.item(index)
        x = self.net.inputs([image])[0] if image.dtype == torch.uint8 else image
        return Sample(x, label if self.labels is None else self.labels[index], self.source.paths[index])

    @property
    def fingerprint(self) -> str:
        """Of the pictures, and how they are prepared."""
        net = self.net
        return f"{self.source.fingerprint}; {net.framing}, {net.normalization}, {net.value_range}, gray {net.grayscale}"


def run(options: ExpectedOptions, argv: Sequence[str]) -> dict[str, str]:
    """Write, or go on with, the table of a data set; returns what could not be read, and why."""
    source = open_source(options.data, root=options.root, labels=options.labels)
    net = network(options)
    if options.force and not options.resume:
        _remove(options.out)
    # A black picture says how many classes there are, which layer is meant, and what one picture costs.
    black = net.inputs([torch.zeros(3, net.framing.size, net.framing.size, dtype=torch.uint8)])
    with torch.no_grad():
        n_classes = net.model(black)[0].numel()
    data = Prepared(source, replace(net, model=nn.Identity()), labels_for(source, net.class_names, n_classes))
    outcomes = options.outcome or (_OF_CLASSES if n_classes > 1 else _OF_ONE)
    explainer: Any
    if options.input:
        design = RandomRegions(n_trials=options.trials, seed=options.seed)
        explainer = CausalEffect(
            net.model,
            design=design,
            outcome=outcomes[0],
            normalization=net.normalization,
            seed=options.seed,
            guide=None,
        )
    else:
        layer = layer_name(net, black, options.layer)
        explainer = LayerCausalEffect(net.model, layer, outcome=outcomes[0], seed=options.seed)
    # Whoever asks several outputs for a sigmoid says that each is a label of its own.
    labels = n_classes > 1 and "sigmoid" in outcomes
    given = {name: _evidence(name, net, options, labels) for name in options.given or ("clean",)}
    ids = range(len(data) if options.limit is None else min(options.limit, len(data)))
    cost = explainer.estimate_cost(black)
    say(f"{len(ids):,} pictures, each under {', '.join(given)}; of one: {cost}", quiet=options.quiet)
    cluster = RayCluster(options.workers, address=options.address, num_gpus=int(options.device != "cpu"))
    found = run_over(
        explainer,
        data,
        options.out,
        given=given,
        outcomes=outcomes,
        classes=_classes(options.classes, net),
        ids=ids,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        loaders=options.loaders,
        keep_images=options.images,
        resume=True,  # the folder is this run's alone: it was made, or emptied, or is to be gone on with
        strict=options.strict,
        show_progress=not options.quiet,
        cluster=cluster if options.engine == "ray" else None,
    )
    skipped = {source.paths[i]: why for i, why in found.skipped.items()}
    for name, why in [*skipped.items()][:_NAMED]:
        sys.stderr.write(f"ce-plugin: warning: left out: {name}: {why}\n")
    left_out = data_frame(["picture", "reason"], list(skipped.items()))
    write_files(options.out, table_files({"skipped": left_out}, options.tables))
    say(f"{found}\nTable: {options.out.absolute()} (ce-plugin expected show {options.out})", quiet=options.quiet)
    return skipped


def _remove(folder: Path) -> None:
    """The rows and the manifest of another run."""
    for file in [*(folder / "rows").glob("*.parquet"), folder / "manifest.json"]:
        file.unlink(missing_ok=True)


def _evidence(name: str, net: VisionModel, options: ExpectedOptions, multi_label: bool) -> Any:
    """The evidence with this name."""
    if name == "clean":
        return None
    if name == "pwm":
        mask = PixelMask("zero", normalization=net.normalization)
        return Evidence(mask, units=RandomMask(options.mask_share, n_trials=_DRAWS, seed=options.seed))
    if name not in ATTACKS:
        raise unknown_name("given", name, ("clean", "pwm", *ATTACKS))
    return planned_attack(net, name, Plan(attacks=(name,), eps=options.eps), multi_label=multi_label)[0]


def _classes(named: tuple[str, ...] | None, net: VisionModel) -> Any:
    """Whose effects are stored."""
    if named is None or named in (("explained",), ("all",)):
        return "explained" if named is None else named[0]
    return [net.class_index(one, "classes") for one in named]


# --- show


def show(options: ExpectedShowOptions, argv: Sequence[str]) -> None:
    """Answer from a table, on the terminal and on a page."""
    found = EffectTable(options.run)
    target: Any = options.target
    if target not in ("explained", "all"):
        if not target.isdecimal():
            raise TargetError(expected("target", "explained, all, or the index of a class", repr(target)))
        target = int(target)
    subset = Subset(correct=options.correct or None, label=options.label, explained=options.answer)
    names = found.outcomes if options.outcome is None else (options.outcome,)
    answers = {}
    for name in names:
        per_class = found.about["per_class"].get(name, True)
        if options.reading == "B" and not per_class:
            continue
        asked: Any = target if per_class else "explained"
        answers[name] = found.expected(name, target=asked, subset=subset, reading=options.reading)
    study = ExpectedStudy(answers, found.configuration, options.reading, options.level, options.fdr, options.top)
    page = save_expected(study, options.out, command=["ce-plugin", *argv], tables=options.tables)
    for name, answer in answers.items():
        say(_summary(name, answer, options), quiet=options.quiet)
    say(f"Page: {page.absolute()}")


def _summary(name: str, answer: ExpectedEstimate, options: ExpectedShowOptions) -> str:
    """The units of the largest effects, a line each."""
    lines = [f"\n{name}: mean of {answer.n_images:,.0f} pictures (effect, {options.level:.0%} interval; * significant)"]
    low, high = answer.confidence_interval(options.level)
    marked = answer.significant(options.fdr)
    columns = range(min(len(answer.classes), 3))
    order = answer.effect[0].abs().amax(1).argsort(descending=True, stable=True)[: options.top].tolist()
    rows = []
    for unit in order:
        for c in columns:
            cells = [
                f"{answer.effect[e, unit, c]:+.4g} [{low[e, unit, c]:+.3g}, {high[e, unit, c]:+.3g}]"
                + ("*" if marked[e, unit, c] else " ")
                for e in range(len(answer.evidences))
            ]
            rows.append([f"{answer.labels_of(0)[unit]}", str(answer.classes[c]), *cells])
    lines.append(table(["unit", "class", *answer.evidences], rows))
    counts = marked.any(2).sum(1).tolist()
    told = ", ".join(f"{e}: {count}" for e, count in zip(answer.evidences, counts, strict=True))
    lines.append(f"Units that matter at a false discovery rate of {options.fdr:g}, of {answer.effect.shape[1]}: {told}")
    return "\n".join(lines)
