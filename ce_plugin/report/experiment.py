"""An experiment over data sets: from tables of effects to one table of numbers with intervals, plots, and its page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ce_plugin.effects import t_interval
from ce_plugin.errors import InputError, expected
from ce_plugin.evaluation.detectors import auroc
from ce_plugin.expected import EffectTable, ExpectedEstimate, Subset
from ce_plugin.files import table_files
from ce_plugin.randomness import numpy_generator
from ce_plugin.report.sections import Section, digits, save_page
from ce_plugin.visualization import plot_intervals, plot_ranked

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Draws of a bootstrap over images.
_DRAWS = 1000
LEAST_OF_HALVES = 4
"""Images that the question for the largest node takes: two halves with a spread each."""
# Folder of the plots.
_PLOTS = "plots"
_DPI = 110
_COLUMNS = ("site", "reading", "outcome", "what", "evidence", "effect", "low", "high", "p_value", "significant")


@dataclass(frozen=True)
class ExperimentStudy:
    """The tables of an experiment, and what is asked of them.

    Args:
        title, about: for the reader.
        tables: site -> table of effects.
        nodes: site -> the nodes that are shown.
        facts: what the reader must know of network, images and autoencoders.
        outcomes: which are shown.
        readings: of the paper's columns.
        level: of the intervals.
        fdr: false discovery rate over all nodes of a site.
        plain: of the detector: the site without autoencoder, from whose outputs its rivals are computed; "" for none.
        attacks: of the detector: names of evidences that are attacks.
        seed: of the bootstrap, and of the halves of the images.
        largest: whether the largest node is found on one half of the images and measured on the other.
    """

    title: str
    about: str
    tables: Mapping[str, EffectTable]
    nodes: Mapping[str, Sequence[int]]
    facts: Mapping[str, str] = field(default_factory=dict)
    outcomes: Sequence[str] = ("prediction_weighted", "log_odds")
    readings: Sequence[str] = ("A", "B")
    level: float = 0.95
    fdr: float = 0.05
    plain: str = ""
    attacks: Sequence[str] = ()
    seed: int = 0
    largest: bool = False

    def asked(self) -> Iterator[tuple[str, str, str, ExpectedEstimate]]:
        """Site, reading, outcome and answer of every question."""
        for site, table in self.tables.items():
            for outcome in self.outcomes:
                for reading in self.readings:
                    # An outcome that compares with its own reference has no reading B.
                    if reading == "A" or table.about["per_class"][outcome]:
                        yield site, reading, outcome, table.expected(outcome, reading=reading)  # type: ignore[arg-type]


def experiment_rows(study: ExperimentStudy) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """What the tables answer: the numbers that are shown, those of all nodes, and how many nodes matter.

    Returns:
        Rows of the nodes that were named, of the mean over all nodes and of inserting the autoencoder, each under
        every evidence and as a paired difference to the first; the same of every node; and how many nodes of a site
        differ from zero at the false discovery rate.
    """
    import pandas as pd

    shown: list[dict[str, Any]] = []
    every: list[pd.DataFrame] = []
    counts: list[dict[str, Any]] = []
    for site, reading, outcome, answer in study.asked():
        about = {"site": site, "reading": reading, "outcome": outcome}
        apart = [answer.difference(name, answer.evidences[0]) for name in answer.evidences[1:]]
        for part in (answer, *apart):
            frame = part.to_dataframe(study.level, study.fdr)
            frame = frame.rename(columns={"ci_low": "low", "ci_high": "high", "label": "what"})
            for key, value in reversed(about.items()):
                frame.insert(0, key, value)
            marked = part.significant(study.fdr)[:, :, 0]
            frame["significant"] = marked.reshape(-1).tolist()
            every.append(frame[[*_COLUMNS, "n_images"]])
            wanted = frame[frame["unit"].isin(list(study.nodes[site]))].copy()
            wanted["what"] = [f"node {unit}" for unit in wanted["unit"]]
            shown += wanted[[*_COLUMNS, "n_images"]].to_dict("records")
            shown += [{**about, **row} for row in _inserted(part, study.level)]
            for name, flags in zip(part.evidences, marked, strict=True):
                counts.append({**about, "evidence": name, "nodes": len(flags), "significant": int(flags.sum())})
        shown += [{**about, **row} for row in _means(study, site, outcome, reading)]
    return pd.DataFrame(shown), pd.concat(every, ignore_index=True), pd.DataFrame(counts)


def _inserted(answer: ExpectedEstimate, level: float) -> list[dict[str, Any]]:
    """What inserting the autoencoder does by itself."""
    effect, error = answer.insertion_effect, answer.insertion_error
    if effect is None or error is None:
        return []
    low, high = t_interval(effect, error, torch.full_like(effect, answer.n_images - 1), level)
    return [
        {
            "what": "inserting the autoencoder",
            "evidence": name,
            "effect": float(effect[e, 0]),
            "low": float(low[e, 0]),
            "high": float(high[e, 0]),
            "n_images": answer.n_images,
        }
        for e, name in enumerate(answer.evidences)
    ]


def _means(study: ExperimentStudy, site: str, outcome: str, reading: str) -> list[dict[str, Any]]:
    """The mean over all nodes, and which share of the first evidence's is left under the others."""
    table = study.tables[site]
    question: Literal["A", "B"] = "B" if reading == "B" else "A"
    _, values = table.values(outcome=outcome, reading=question)
    names = [name for name in table.evidences if reading == "A" or table.configuration["given"][name] != "none"]
    over = values[:, :, :, 0].double().mean(2)  # (n, E)
    series = {name: over[:, e] for e, name in enumerate(names)}
    series |= {f"{name} - {names[0]}": over[:, e] - over[:, 0] for e, name in enumerate(names) if e}
    rows = []
    for name, one in series.items():
        mean, error = one.mean(), one.std() / len(one) ** 0.5
        low, high = t_interval(mean, error, torch.full_like(mean, len(one) - 1), study.level)
        rows.append({"what": "mean of all nodes", "evidence": name, "effect": float(mean), "low": float(low),
                     "high": float(high), "n_images": len(one)})  # fmt: skip
    if reading == "A":
        rows += _shares(over.numpy(), names, study)
    return rows


def _shares(values: np.ndarray[Any, Any], names: Sequence[str], study: ExperimentStudy) -> list[dict[str, Any]]:
    """Effect under each other evidence as a share of that under the first, by a bootstrap over images."""
    n = len(values)
    draw = numpy_generator(study.seed, "experiment", 0)
    drawn = np.stack([draw.multinomial(n, np.full(n, 1 / n)) @ values / n for _ in range(_DRAWS)])  # (R, E)
    tail = (1 - study.level) / 2
    rows = []
    for e, name in enumerate(names[1:], 1):
        low, high = np.quantile(drawn[:, e] / drawn[:, 0], [tail, 1 - tail])
        rows.append({"what": "mean of all nodes, as a share", "evidence": f"{name} / {names[0]}",
                     "effect": float(values[:, e].mean() / values[:, 0].mean()), "low": float(low),
                     "high": float(high), "n_images": n})  # fmt: skip
    return rows


def largest_rows(study: ExperimentStudy) -> pd.DataFrame:
    """The node of the largest effect of each site, found on one half of the images and measured on the other.

    The largest of many measured values is too large, most of all where the others are near. Its value on images by
    which it was not chosen is not.

    Returns:
        Rows by outcome: of each site the node that is largest in size under the first evidence, with its effect on the
        half that chose it and on the other, under every evidence; ``first`` marks the largest of all sites.
    """
    import pandas as pd

    ids = np.unique(np.concatenate([table.ids for table in study.tables.values()]))
    if len(ids) < LEAST_OF_HALVES:
        raise InputError(expected("data", f"{LEAST_OF_HALVES} images or more, for two halves", f"{len(ids)}"))
    halves = np.array_split(numpy_generator(study.seed, "experiment halves", 0).permutation(ids), 2)
    rows: list[dict[str, Any]] = []
    for outcome in study.outcomes:
        found: dict[str, tuple[float, list[dict[str, Any]]]] = {}
        for site, table in study.tables.items():
            chosen, other = (table.expected(outcome, subset=Subset(ids=half.tolist())) for half in halves)
            node = int(chosen.effect[0, :, 0].abs().argmax())
            about = {"outcome": outcome, "site": site, "node": node}
            own = [
                {**about, "images": name, **row}
                for name, answer in (("chosen", chosen), ("other", other))
                for row in _of_node(answer, node, study.level)
            ]
            found[site] = abs(float(chosen.effect[0, node, 0])), own
        largest = max(found, key=lambda site: found[site][0])
        rows += [{**row, "first": site == largest} for site, (_, own) in found.items() for row in own]
    every: pd.DataFrame = pd.DataFrame(rows)
    return every


def _of_node(answer: ExpectedEstimate, node: int, level: float) -> Iterator[dict[str, Any]]:
    """A node's effect under each evidence."""
    low, high = answer.confidence_interval(level)
    for e, evidence in enumerate(answer.evidences):
        values = zip(("effect", "low", "high"), (answer.effect, low, high), strict=True)
        numbers = {name: float(one[e, node, 0]) for name, one in values}
        yield {"evidence": evidence, **numbers, "n_images": answer.n_images}


def detector_rows(study: ExperimentStudy) -> pd.DataFrame:
    """The index as a detector of attacked images: AUROC of each node, beside max-softmax and the squared norm of p.

    The index of an image is the prediction-weighted effect of the node; small in size means attacked, as the paper has
    it. Images are those that the network answers correctly without attack and wrongly with it, each in both forms; the
    intervals are of a bootstrap over images, both forms together.

    Returns:
        A row for each attack and score.
    """
    import pandas as pd

    p = _probabilities(study.tables[study.plain])
    rows = []
    frame = study.tables[study.plain].images()
    clean = frame[frame["evidence"] == study.tables[study.plain].evidences[0]].set_index("id").sort_index()
    for attack in study.attacks:
        attacked = frame[frame["evidence"] == attack].set_index("id").sort_index()
        fooled = ((clean["label"] == clean["predicted"]) & (attacked["predicted"] != attacked["label"])).to_numpy()
        scores = {"1 - max softmax": [-one.max(1) for one in (p["clean"], p[attack])]}
        scores["1 - |p|²"] = [1 - np.square(one).sum(1) for one in (p["clean"], p[attack])]
        for site, table in study.tables.items():
            ids, values = table.values(outcome="prediction_weighted")
            values = values[torch.from_numpy(ids.argsort())]
            at = [0, table.evidences.index(attack)]
            for node in study.nodes[site]:
                scores[f"index, {site}, node {node}"] = [-np.abs(values[:, e, node, 0].numpy()) for e in at]
            scores[f"index, {site}, sum of all nodes"] = [-np.abs(values[:, e, :, 0].sum(1).numpy()) for e in at]
        for name, (without, under) in scores.items():
            rows.append({"attack": attack, "score": name, **_auroc(without[fooled], under[fooled], study)})
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def _auroc(clean: np.ndarray[Any, Any], attacked: np.ndarray[Any, Any], study: ExperimentStudy) -> dict[str, Any]:
    """AUROC with its interval, pairs drawn together."""
    n = len(clean)
    if n < 2:
        return {"auroc": float("nan"), "low": float("nan"), "high": float("nan"), "pairs": n}
    draw = numpy_generator(study.seed, "experiment detector", 0)
    drawn = [auroc(clean[one], attacked[one]) for one in (draw.integers(0, n, n) for _ in range(_DRAWS // 5))]
    tail = (1 - study.level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return {"auroc": auroc(clean, attacked), "low": float(low), "high": float(high), "pairs": n}


def _probabilities(table: EffectTable) -> dict[str, np.ndarray[Any, Any]]:
    """Evidence -> probabilities of all classes, (n, C), by id; the first evidence is called clean."""
    import pandas as pd

    frame = pd.read_parquet(table.folder / "rows", columns=["id", "evidence", "outcome_probability"])
    found = {}
    for name, rows in frame.groupby("evidence", sort=False, observed=True):
        found[str(name)] = np.stack(rows.sort_values("id")["outcome_probability"].tolist())
    found["clean"] = found[table.evidences[0]]
    return found


@dataclass(frozen=True)
class Cell:
    """A number of the page, its interval, and whether it differs from zero among all nodes."""

    number: str
    interval: str = ""
    significant: bool = False

    def __str__(self) -> str:
        return f"{self.number}{'*' * self.significant}{' ' * bool(self.interval)}{self.interval}"


class ExperimentSection(Section[ExperimentStudy]):
    """The numbers that were asked for, each with its interval, and plots of them."""

    name, template = "experiment", "experiment.html.j2"

    def __init__(self, found: ExperimentStudy) -> None:
        self.shown, self.every, self.counts = experiment_rows(found)
        self.detector = detector_rows(found) if found.plain else None
        self.largest = largest_rows(found) if found.largest else None
        from ce_plugin.visualization.figure import png

        self.plots = {name: png(figure, _DPI) for name, figure in self._figures(found).items()}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Name of a table -> the table."""
        frames = {
            "experiment": self.shown,
            "nodes": self.every,
            "counts": self.counts,
            "detector": self.detector,
            "largest": self.largest,
        }
        return {name: frame for name, frame in frames.items() if frame is not None}

    def record(self, found: ExperimentStudy) -> dict[str, Any]:
        """All that the page shows."""
        frames = {
            "rows": self.shown, "nodes_that_matter": self.counts, "detector": self.detector, "largest": self.largest,
        }  # fmt: skip
        return {
            "title": found.title,
            "facts": dict(found.facts),
            **{
                name: None if frame is None else json.loads(frame.to_json(orient="records"))
                for name, frame in frames.items()
            },
            "configurations": {site: dict(table.configuration) for site, table in found.tables.items()},
        }

    def render(self, found: ExperimentStudy) -> dict[str, Any]:
        """Tables of text, and plots as data URIs."""
        uris = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in self.plots.items()}
        parts = self.parts(found)
        return {
            "study": found,
            "parts": [{**part, "plots": [(name, uris[name]) for name in part["plots"]]} for part in parts],
            "about": [" ".join(some.split()) for some in found.about.strip().split("\n\n")],
        }

    def parts(self, found: ExperimentStudy) -> list[dict[str, Any]]:
        """Tables of text: title, a word on it, names of plots, head, rows."""
        parts = []
        overview = [name for name in ("named.png", "shares.png") if name in self.plots]
        if overview:
            note = "The nodes that the recipe names, and the mean over all nodes as a share of that under the first "
            note += "evidence. What crosses the line shows no effect, or no change."
            parts.append(_part("At a glance", note, plots=overview))
        if self.largest is not None:
            parts.append(self._largest(self.largest))
        if self.detector is not None:
            lines = [
                [str(row.attack), str(row.score), _detected(row), f"{row.pairs:,}"]
                for row in self.detector.itertuples()
            ]
            head = ["attack", "score", "AUROC", "images, clean and attacked"]
            parts.append(_part("The index as a detector of attacked images", "", head, lines))
        for (site, reading, outcome), rows in _by_question(self.shown):
            evidences = list(dict.fromkeys(rows["evidence"]))
            lines = []
            for what, some in rows.groupby("what", sort=False):
                cells = {row.evidence: _cell(row) for row in some.itertuples()}
                lines.append([str(what), *(cells.get(name, "") for name in evidences)])
            lines.append(
                [f"nodes that differ from 0 (FDR {found.fdr:g})", *self._counted(site, reading, outcome, evidences)]
            )
            plots = [name for name in [_plot_name(site, reading, outcome)] if name in self.plots]
            parts.append(_part(f"{site}: {outcome}, reading {reading}", "", ["", *evidences], lines, plots))
        return parts

    def _counted(self, site: str, reading: str, outcome: str, evidences: Sequence[str]) -> list[str]:
        """How many nodes differ from zero under each evidence, in words."""
        counts = self.counts[
            (self.counts["site"] == site) & (self.counts["reading"] == reading) & (self.counts["outcome"] == outcome)
        ].set_index("evidence")
        return [
            f"{counts.loc[name, 'significant']} of {counts.loc[name, 'nodes']}" if name in counts.index else ""
            for name in evidences
        ]

    @staticmethod
    def _largest(frame: pd.DataFrame) -> dict[str, Any]:
        """The table of the largest nodes."""
        evidences = list(dict.fromkeys(frame["evidence"]))
        lines = []
        for (outcome, site, node), rows in frame.groupby(["outcome", "site", "node"], sort=False):
            cells = {(row.images, row.evidence): _cell(row) for row in rows.itertuples()}
            name = f"{site}, node {node}" + " (largest of all)" * bool(rows["first"].iloc[0])
            chosen = cells["chosen", evidences[0]]
            lines.append([str(outcome), name, chosen, *(cells["other", evidence] for evidence in evidences)])
        n = frame.groupby("images")["n_images"].max()
        head = ["outcome", "node", f"{evidences[0]}, images that chose it ({n['chosen']:,.0f})"]
        head += [f"{evidence}, other images ({n['other']:,.0f})" for evidence in evidences]
        note = "The largest of many measured values is too large; on images by which it was not chosen it is not."
        return _part("The largest node of each site, chosen on one half of the images", note, head, lines)

    def _figures(self, found: ExperimentStudy) -> dict[str, Figure]:
        """Name of a file -> figure."""
        figures = {}
        only = self.every[
            self.every["evidence"].isin([name for one in found.tables.values() for name in one.evidences])
        ]
        for (site, reading, outcome), rows in _by_question(only):
            ranked = {
                str(name): (own["effect"], own["low"], own["high"], own["significant"])
                for name, own in rows.groupby("evidence", sort=False)
            }
            labels = [str(unit) for unit in found.tables[site].unit_labels]
            figures[_plot_name(site, reading, outcome)] = plot_ranked(labels, ranked, ylabel=f"effect on {outcome}")
        shown = self.shown[self.shown["reading"] == "A"]
        named = shown[shown["what"].str.startswith("node ") & shown["evidence"].isin(only["evidence"])]
        if len(named):
            panels = _panels(named, named["site"] + ", " + named["what"])
            figures["named.png"] = plot_intervals(panels, xlabel="effect", title="Effects of the named nodes")
        shares = shown[shown["what"] == "mean of all nodes, as a share"]
        if len(shares):
            title = "Mean effect of all nodes, as a share"
            figures["shares.png"] = plot_intervals(_panels(shares, shares["site"]), at=1, xlabel="share", title=title)
        return figures


def _by_question(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Site, reading and outcome, and the rows that answer."""
    for (site, reading, outcome), rows in frame.groupby(["site", "reading", "outcome"], sort=False):
        yield (str(site), str(reading), str(outcome)), rows


def _panels(frame: pd.DataFrame, rows: pd.Series[str]) -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
    """Outcome -> row -> evidence -> number and interval."""
    panels: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    columns = (frame[name].tolist() for name in ("outcome", "evidence", "effect", "low", "high"))
    for name, outcome, evidence, *numbers in zip(rows, *columns, strict=True):
        effect, low, high = map(float, numbers)
        panels.setdefault(outcome, {}).setdefault(name, {})[evidence] = (effect, low, high)
    return panels


def _part(
    title: str, note: str, head: Sequence[str] = (), rows: Sequence[Sequence[Any]] = (), plots: Sequence[str] = ()
) -> dict[str, Any]:
    return {"title": title, "note": note, "head": list(head), "rows": list(rows), "plots": list(plots)}


def _plot_name(site: str, reading: str, outcome: str) -> str:
    plain = re.sub(r"[^\w.]+", "-", site)
    return f"nodes-{plain}-{outcome}-{reading}.png"


def _cell(row: Any) -> Cell:
    """A number with its interval."""
    significant = getattr(row, "significant", False) is True
    return Cell(digits(row.effect), f"[{digits(row.low)}, {digits(row.high)}]", significant)


def _detected(row: Any) -> Cell:
    return Cell(f"{row.auroc:.3f}", f"[{row.low:.3f}, {row.high:.3f}]")


def save_experiment(
    study: ExperimentStudy, out: str | Path, *, manifest: Mapping[str, Any], tables: str = "csv"
) -> Path:
    """Write the page ``experiment.html``, its tables and plots, and ``manifest.json``.

    ``experiment.md``, ``.csv`` and ``.json`` hold the numbers that were asked for, ``nodes.csv`` every node,
    ``counts.csv`` how many nodes differ from zero, ``largest.csv`` and ``detector.csv`` what their questions ask, and
    ``plots/`` the page's plots as PNG.

    Args:
        study: what was run.
        out: the folder, which :func:`~ce_plugin.report.check_out` has allowed.
        manifest: see :func:`~ce_plugin.report.build_manifest`.
        tables: suffix of the tables, see :func:`ce_plugin.files.table_files`.

    Returns:
        Path of the page.
    """
    section = ExperimentSection(study)
    files: dict[str, str | bytes] = {
        **table_files(section.tables(), tables),
        "experiment.md": markdown(study, section),
        "experiment.json": json.dumps(section.record(study), indent=1),
    }
    (Path(out) / _PLOTS).mkdir(parents=True, exist_ok=True)
    files |= {f"{_PLOTS}/{name}": png for name, png in section.plots.items()}
    return save_page(section, study, out, manifest, files)


def markdown(study: ExperimentStudy, section: ExperimentSection) -> str:
    """The page's tables as Markdown, with links to its plots."""
    lines = [f"### {study.title}", "", *study.about.strip().splitlines(), ""]
    lines += [f"* {name}: {text}" for name, text in study.facts.items()]
    lines += ["", f"In brackets {study.level:.0%} intervals over images, each number by itself; * differs from 0 at a "
              f"false discovery rate of {study.fdr:g} over all nodes of the site."]  # fmt: skip
    for part in section.parts(study):
        lines += ["", f"#### {part['title']}", ""]
        lines += [part["note"], ""] if part["note"] else []
        lines += [f"![{name}]({_PLOTS}/{name})" for name in part["plots"]]
        if part["head"]:
            lines += [""] * bool(part["plots"])
            lines += [_line(part["head"]), "|---" * len(part["head"]) + "|", *map(_line, part["rows"])]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[Any]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
