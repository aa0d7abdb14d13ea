"""One HTML page: the tables, ROC curves, and attacked images with the detector's explanations."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detection._detectors import OURS, label
from benchmarks.detection._results import TITLES, Findings
from benchmarks.detection._scores import Result, TrialSpec, predictions
from benchmarks.detection._text_table import Table, marked
from benchmarks.harness.tables import WORST_CASE, worst_case_scores
from ce_plugin.datasets import FASHION_CLASSES

OUR_COLOUR, COLOURS = "#c2410c", ("#1d4ed8", "#0f766e", "#7c3aed", "#64748b", "#a16207")
_POINTS = 120


def curves(results: Sequence[Result], *, columns: int = 5) -> str:
    """ROC curves with a logarithmic false-alarm axis, of detectors with one fit each; the worst case comes first."""
    attacks = _evaluated(results[0])
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [WORST_CASE, *attacks]
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2.2 * rows + 0.5), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        peers = iter(COLOURS)
        for one in results:
            colour = OUR_COLOUR if one.detector == OURS else next(peers)
            clean, attacked = _scores(one, panel)
            rates = np.geomspace(1 / len(clean), 1, _POINTS)
            thresholds = np.quantile(clean, 1 - rates, method="higher")
            detected = [float((attacked > threshold).mean()) for threshold in thresholds]
            width = 2.2 if one.detector == OURS else 1.3
            axis.plot(rates, detected, color=colour, lw=width, label=label(one.detector).strip("*"))
        axis.axvline(0.05, color="#c4c7cc", lw=0.7, zorder=0)
        axis.axvline(0.01, color="#c4c7cc", lw=0.7, zorder=0)
        axis.set(xscale="log", ylim=(0, 1.01), xlim=(1e-3, 1))
        axis.set_title(panel, fontsize=9, loc="left", fontweight="bold" if panel == panels[0] else None)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles, words = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="upper left", ncol=len(words), frameon=False, fontsize=9)
    figure.supxlabel("false alarms on correctly classified clean images", fontsize=9)
    figure.supylabel("detected", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.32 / figure.get_figheight()))
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _evaluated(one: Result) -> list[str]:
    return [] if one.evaluation is None else [n for n, a in one.evaluation.attacks.items() if a.figures.evaluated]


def _scores(one: Result, panel: str) -> tuple[np.ndarray, np.ndarray]:
    """Clean and attacked scores of a panel."""
    sets = one.score_tables["all"].sets
    if panel != WORST_CASE:
        return sets["clean"].scores, sets[f"attack {panel}"].scores
    tried = {} if one.evaluation is None else one.evaluation.attacks
    scored = {name: sets[f"attack {name}"] for name, each in tried.items() if not each.excluded}
    rows = {name: np.isin(each.ids, one.among) for name, each in scored.items()}
    found = worst_case_scores({name: (each.ids[rows[name]], each.scores[rows[name]]) for name, each in scored.items()})
    return sets["clean"].scores, found.scores


EXAMPLES = 4


def write_html(folder: Path, tables: Sequence[Table], findings: Findings) -> Path:
    """Write the self-contained `detection.html` and return its path."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters["marked"] = marked
    page = environment.get_template("_page.html.j2").render(
        tables=tables, figures=_figures(findings), pictures=_pictures(findings), date=datetime.date.today().isoformat()
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "detection.html"
    file.write_text(page, encoding="utf-8")
    return file


def _figures(findings: Findings) -> list[dict[str, str]]:
    """ROC curves of our detector and the best published ones, on the first classifier of each problem."""
    found = []
    for protocol in ("P3", "P2"):
        for problem in findings.problems():
            shown = findings.shown(problem, protocol)
            results = [findings.results(problem, protocol)[name][0] for name in shown]
            if results:
                title = f"{TITLES[problem]}, {protocol}, classifier {results[0].seed}"
                found.append({"title": title, "svg": curves(results)})
    return found


def _pictures(findings: Findings) -> list[dict[str, Any]]:
    groups = [group for group in findings.groups if group.examples]
    return [{"title": f"{TITLES[one.problem]}, classifier {one.seed}", "attacks": one.examples} for one in groups]


def examples(setting: TrialSpec, results: Sequence[Result]) -> list[dict[str, Any]]:
    """The first images of each attack (not selected), with the result of one detector fitted to clean images."""
    fitted = [one for one in results if one.protocol == "P3" and one.evaluation is not None]
    fitted.sort(key=lambda one: (one.detector != OURS, -(one.evaluation.mean.value if _has_mean(one) else 0.0)))
    if not fitted:
        return []
    table = fitted[0].score_tables["all"]
    threshold = table.calibration.threshold(0.05)
    found = []
    for name, attacked in setting.data.attacks.items():
        some = attacked.select(np.argsort(attacked.ids)[:EXAMPLES])
        scored = table.sets[f"attack {name}"]
        scores = [float(scored.scores[scored.ids == one][0]) for one in some.ids]
        now = predictions(setting.problem.network, some.units())
        images = []
        for row, score in enumerate(scores):
            clean = setting.problem.images["test"][some.ids[row]]
            p = float(table.calibration.p_values(np.array([score]))[0])
            was = _class_name(setting, int(setting.problem.labels["test"][some.ids[row]]))
            change = 0.5 + 0.5 * (some.units()[row] - clean) / max(float(np.abs(some.units()[row] - clean).max()), 1e-9)
            three = [_png(picture) for picture in (clean, some.units()[row], change)]
            answer = {"p": f"{p:.2g}", "flagged": score > threshold}
            images.append({"three": three, "was": was, "now": _class_name(setting, int(now[row])), **answer})
        found.append({"name": name, "images": images, "detector": label(fitted[0].detector).strip("*")})
    return found


def _has_mean(one: Result) -> bool:
    return one.evaluation is not None and one.evaluation.mean is not None


def _class_name(setting: TrialSpec, k: int) -> str:
    return FASHION_CLASSES[k] if setting.problem.name == "fashion" else str(k)


def _png(image: np.ndarray) -> str:
    from PIL import Image

    pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    stream = io.BytesIO()
    if picture.width > 112:
        picture.resize((112, 112)).save(stream, "WEBP", quality=85)
        return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
