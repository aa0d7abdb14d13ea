"""ROC curves of detectors, attack by attack, as one SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from benchmarks.detection._detectors import OURS, label
from benchmarks.detection._scores import Result
from benchmarks.harness.tables import WORST_CASE, worst_case_scores

OUR_COLOUR, COLOURS = "#c2410c", ("#1d4ed8", "#0f766e", "#7c3aed", "#64748b", "#a16207")
_POINTS = 120


def curves(results: Sequence[Result], *, columns: int = 5) -> str:
    """Detection against false alarms (logarithmic) of detectors with one fit each; the worst case comes first."""
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
    sets = one.sheets["all"].sets
    if panel != WORST_CASE:
        return sets["clean"].scores, sets[f"attack {panel}"].scores
    tried = {} if one.evaluation is None else one.evaluation.attacks
    scored = {name: sets[f"attack {name}"] for name, each in tried.items() if not each.apart}
    rows = {name: np.isin(each.ids, one.among) for name, each in scored.items()}
    found = worst_case_scores({name: (each.ids[rows[name]], each.scores[rows[name]]) for name, each in scored.items()})
    return sets["clean"].scores, found.scores
