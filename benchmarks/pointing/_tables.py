"""Tables of the pointing game."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.intervals import interval

CONFIDENT = 0.8


def written(settings: dict[str, Any]) -> str:
    """Settings as text."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())


def scaled(settings: dict[str, Any], size: str) -> dict[str, Any]:
    """Windows scale with the image: chosen at 224, twice as large at 448."""
    factor = 1 if size == "224" else 2
    return {k: v * factor if k in ("window", "stride") else v for k, v in settings.items()}


def summary(scores: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Means with bootstrap intervals over mosaics, and paired differences from the contrastive CEM."""
    ours = scores["CEM | contrastive"].mean(1)
    return {
        key: {
            "mosaics": len(table),
            "mean": float(table.mean()),
            "interval": interval(table.mean(1)),
            "at_chance_or_below": float((table <= 0.25).mean()),
            "empty": int((table == 0).sum()),
            "cem_minus": float((ours[: len(table)] - table.mean(1)).mean()),
            "cem_minus_interval": interval(ours[: len(table)] - table.mean(1)),
            "by_mosaic": [[round(v, 4) for v in row] for row in table.tolist()],
        }
        for key, table in scores.items()
    }


def text(data: dict[str, Any]) -> str:
    """The page in Markdown."""
    lines = [
        "## Grid pointing game",
        "",
        "EfficientNet-lite0; 2 x 2 mosaics of images of different classes, all classified rightly by themselves with a",
        f"probability of at least {CONFIDENT} ({data['confident']} images with an even class index). The share of a",
        "map's positive values inside the cell whose class is explained, after bilinear enlargement to the mosaic's",
        "size; a map without positive values scores 0, a constant one 0.25. Contrastive: the class's logit minus the",
        "mean logit of the mosaic's other three classes, for every method. Layers, weightings, outcomes and windows",
        "were chosen on mosaics of other images, for each form by itself (pointing_choosing.md; windows are doubled at",
        "448).",
        "All methods saw the same mosaics, ScoreCAM the first of them. Intervals: 95 % percentile bootstrap over",
        "mosaics; the last columns are paired differences between the contrastive CEM and the row.",
    ]
    for size, name in (("224", "shrunk into 224 x 224"), ("448", "four 224-pixel images in 448 x 448")):
        table = data["results"][size]
        lines += [
            "",
            f"### {name[0].upper()}{name[1:]}",
            "",
            "| method | form | settings | maps | share | 95 % interval | maps <= 0.25 | contrastive CEM minus this | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        settings = {f"{label} | {form}": settings for label, _, settings, form in data["plan"]}
        for key in sorted(table, key=lambda k: -table[k]["mean"]):
            row, (label, form) = table[key], key.split(" | ")
            low, high = row["interval"]
            below, above = row["cem_minus_interval"]
            lines.append(
                f"| {label} | {form} | {written(scaled(settings[key], size))} | {4 * row['mosaics']} "
                f"| **{row['mean']:.3f}** | {low:.3f} to {high:.3f} | {row['at_chance_or_below']:.0%} "
                f"| {row['cem_minus']:+.3f} | {below:+.3f} to {above:+.3f} |"
            )
    return "\n".join([*lines, "", *remarks(data)])


def remarks(data: dict[str, Any]) -> list[str]:
    """Remarks below the table."""
    lines = [
        "Where a global average pooling and one linear layer follow, as they do behind `head`, a channel's effect on a",
        "logit is its weight times its mean, whatever the other channels are. The CEM by change on logits is then",
        "Grad-CAM without its ReLU (and the CAM of Zhou et al. 2016), number for number, and the CEM by activation is",
        "AblationCAM times the score by which that divides (which turns the map over where the score is negative).",
        "On logits the CEM therefore cannot differ there from the same form of these two, and shares the first place;",
        "what it adds are outcomes that are no logits (by probability it leads the plain maps at 224), other",
        "interventions, and layers behind which the network is not linear.",
        f"ScoreCAM and Occlusion ran through {data['engine']}; all else in float32 by torch.",
    ]
    check = data["check"]
    if check:
        lines += [
            f"Checked: our AblationCAM against pytorch-grad-cam's on a map of the head:"
            f" largest difference {check['ablation_cam']:.1e} of the largest value; our Occlusion against Captum's:"
            f" {check['occlusion']:.1e}; contrastive CEM by change against contrastive Grad-CAM: {check['cem']:.1e};"
            f" {data['engine']} against torch: logits differ by at most {check['logits']:.2f}, the share of contrastive"
            f" Occlusion by {check['share']:.3f} on average and by {check['share_mean']:+.3f} in the mean over"
            f" {check['share_maps']} maps.",
        ]
    return lines
