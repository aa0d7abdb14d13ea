"""An experiment over data sets: from tables of effects to one table of numbers with intervals, and its page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ce_plugin.effects import t_interval
from ce_plugin.evaluation.detectors import auroc
from ce_plugin.expected import EffectTable, ExpectedEstimate
from ce_plugin.randomness import numpy_generator
from ce_plugin.report.sections import Section, digits, save_page

if TYPE_CHECKING:
    import pandas as pd

# Draws of a bootstrap over images.
_DRAWS = 1000
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
        seed: of the bootstrap.
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
        scores["- |p|²"] = [-np.square(one).sum(1) for one in (p["clean"], p[attack])]
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


class ExperimentSection(Section[ExperimentStudy]):
    """The numbers that were asked for, each with its interval."""

    name, template = "experiment", "experiment.html.j2"

    def __init__(self, shown: pd.DataFrame, counts: pd.DataFrame, detector: pd.DataFrame | None) -> None:
        self.shown, self.counts, self.detector = shown, counts, detector

    def record(self, found: ExperimentStudy) -> dict[str, Any]:
        """All that the page shows."""
        return {
            "title": found.title,
            "facts": dict(found.facts),
            "rows": json.loads(self.shown.to_json(orient="records")),
            "nodes_that_matter": json.loads(self.counts.to_json(orient="records")),
            "detector": None if self.detector is None else json.loads(self.detector.to_json(orient="records")),
            "configurations": {site: dict(table.configuration) for site, table in found.tables.items()},
        }

    def render(self, found: ExperimentStudy) -> dict[str, Any]:
        """Tables of text."""
        return {"study": found, "parts": self.parts(found)}

    def parts(self, found: ExperimentStudy) -> list[dict[str, Any]]:
        """Tables of text: title, head, rows."""
        parts = []
        for (site, reading, outcome), rows in self.shown.groupby(["site", "reading", "outcome"], sort=False):
            evidences = list(dict.fromkeys(rows["evidence"]))
            lines = []
            for what, some in rows.groupby("what", sort=False):
                cells = {row.evidence: _cell(row) for row in some.itertuples()}
                lines.append([str(what), *(cells.get(name, "") for name in evidences)])
            counts = self.counts[
                (self.counts["site"] == site)
                & (self.counts["reading"] == reading)
                & (self.counts["outcome"] == outcome)
            ].set_index("evidence")
            found_in = [
                f"{counts.loc[name, 'significant']} of {counts.loc[name, 'nodes']}" if name in counts.index else ""
                for name in evidences
            ]
            lines.append([f"nodes that differ from 0 (FDR {found.fdr:g})", *found_in])
            parts.append({"title": f"{site}: {outcome}, reading {reading}", "head": ["", *evidences], "rows": lines})
        if self.detector is not None:
            lines = [
                [str(row.attack), str(row.score), f"{row.auroc:.3f} [{row.low:.3f}, {row.high:.3f}]", f"{row.pairs:,}"]
                for row in self.detector.itertuples()
            ]
            head = ["attack", "score", "AUROC", "images, clean and attacked"]
            parts.append({"title": "The index as a detector of attacked images", "head": head, "rows": lines})
        return parts


def _cell(row: Any) -> str:
    """A number with its interval; a star where it differs from zero among all nodes."""
    star = "*" if row.significant is True else ""
    return f"{digits(row.effect)}{star} [{digits(row.low)}, {digits(row.high)}]"


def save_experiment(study: ExperimentStudy, out: str | Path, *, manifest: Mapping[str, Any]) -> Path:
    """Write ``experiment.html``, ``.md``, ``.csv`` and ``.json``, ``nodes.csv`` (every node) and ``manifest.json``.

    Args:
        study: what was run.
        out: the folder, which :func:`~ce_plugin.report.check_out` has allowed.
        manifest: see :func:`~ce_plugin.report.build_manifest`.

    Returns:
        Path of the page.
    """
    shown, every, counts = experiment_rows(study)
    detector = detector_rows(study) if study.plain else None
    section = ExperimentSection(shown, counts, detector)
    tables = {
        "experiment.md": markdown(study, section),
        "experiment.csv": shown.to_csv(index=False),
        "experiment.json": json.dumps(section.record(study), indent=1),
        "nodes.csv": every.to_csv(index=False),
        "counts.csv": counts.to_csv(index=False),
    }
    if detector is not None:
        tables["detector.csv"] = detector.to_csv(index=False)
    return save_page(section, study, out, manifest, tables)


def markdown(study: ExperimentStudy, section: ExperimentSection) -> str:
    """The page's tables as Markdown."""
    lines = [f"### {study.title}", "", *study.about.strip().splitlines(), ""]
    lines += [f"* {name}: {text}" for name, text in study.facts.items()]
    lines += ["", f"In brackets {study.level:.0%} intervals over images, each number by itself; * differs from 0 at a "
              f"false discovery rate of {study.fdr:g} over all nodes of the site."]  # fmt: skip
    for part in section.parts(study):
        head = [str(cell).replace("|", "\\|") for cell in part["head"]]
        lines += ["", f"#### {part['title']}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in part["rows"]]
    return "\n".join(lines) + "\n"
