"""Figures and tables of the faithfulness benchmark."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.intervals import bounds, interval, ratio_interval
from benchmarks.faithfulness._methods import OURS

REFERENCES = ("blur", "mean", "zero")


def report_data(plan: list[tuple[str, dict[str, Any], int]], scores: dict[str, Any]) -> dict[str, Any]:
    """Means, intervals and paired differences; every score by method and file (order: blur, mean, zero)."""
    files, table = list(scores), np.stack(list(scores.values())).astype(np.float64)
    mean = table.mean(2)
    summary = {
        name: {
            "settings": settings,
            "by_reference": {reference: float(table[:, i, k].mean()) for k, reference in enumerate(REFERENCES)},
            "mean": float(mean[:, i].mean()),
            "interval": interval(mean[:, i]),
        }
        for i, (name, settings, _) in enumerate(plan)
    }
    place = {name: i for i, (name, _, _) in enumerate(plan)}
    ours = mean[:, place[OURS]]
    paired: dict[str, dict[str, Any]] = {}
    for name, i in place.items():
        if name != OURS:
            gap = ours - mean[:, i]
            paired[name] = {
                "difference": float(gap.mean()),
                "interval": interval(gap),
                "ratio": float(ours.mean() / mean[:, i].mean()),
                "ratio_interval": ratio_interval(ours, mean[:, i]) if mean[:, i].mean() > 0.05 else None,
                "wins": int((gap > 0).sum()),
                **{f"difference_{r}": float((table[:, place[OURS], k] - table[:, i, k]).mean())
                   for k, r in enumerate(REFERENCES)},
            }  # fmt: skip
    return {
        "images": len(files),
        "summary": summary,
        "runner_up": max(paired, key=lambda name: -paired[name]["difference"]),
        "paired": paired,
        "scores": {
            name: {file: [round(float(v), 5) for v in table[k, i]] for k, file in enumerate(files)}
            for name, i in place.items()
        },
    }


def written(settings: dict[str, Any]) -> str:
    """Settings as text."""
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "-"


def chosen_text(tried: list[dict[str, Any]], chosen: dict[str, Any]) -> str:
    """Section on the settings tried on the images for choosing."""
    lines = [
        "### Settings of the peers",
        "",
        "Insertion minus deletion, mean over the three references, 14 steps, on choosing images (class index not a",
        "multiple of ten). Occlusion's windows and fills were compared at a quarter of the passes first; the best four",
        "then ran with all of them, on more images.",
        "",
        "| method | settings | passes | images | score | |",
        "|---|---|---|---|---|---|",
    ]
    for one in tried:
        mark = "chosen" if chosen[one["method"]] == one["settings"] else ""
        lines.append(
            f"| {one['method']} | {written(one['settings'])} | {one['passes']} | {one['images']} "
            f"| {one['score']:.3f} | {mark} |"
        )
    return "\n".join(lines)


def report_text(data: dict[str, Any]) -> str:
    """The page in Markdown."""
    summary, best = data["summary"], data["runner_up"]
    gap = data["paired"][best]
    lines = [
        "## Faithfulness: insertion minus deletion",
        "",
        f"EfficientNet-lite0, {_count(data)} ImageNet photographs whose class index is a multiple of ten,",
        f"the predicted class, {data['steps']} steps. References: blurred (sigma 10 pixels), channel mean, black.",
        "Larger is better. Passes are counted as they are made, a backward pass as two. Defaults of CausalEffect",
        "and settings of the peers were chosen on other images (index not a multiple of ten; see",
        "faithfulness_choosing.md). Intervals: 95 % percentile bootstrap over images.",
        "",
        "| method | blur | channel mean | black | mean of the three | 95 % interval | passes | settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(summary, key=lambda key: -summary[key]["mean"]):
        row = summary[name]
        three = " | ".join(f"{row['by_reference'][reference]:.3f}" for reference in REFERENCES)
        lines.append(
            f"| {name} | {three} | **{row['mean']:.3f}** | {bounds(row['interval'])} | {data['passes'][name]:.4g} "
            f"| {written(row['settings'])} |"
        )
    lines += ["", f"**{OURS} against the runner-up, {best}**: paired difference {gap['difference']:+.3f}"]
    lines += [f"(95 % interval {bounds(gap['interval'])}), ratio {gap['ratio']:.2f}{_ratio(gap)}, better on"]
    lines += [f"{gap['wins']} of {data['images']} images."]
    lines += ["", *_paired(data), "", *_precision(data), "", *_remarks()]
    return "\n".join(lines)


def _count(data: dict[str, Any]) -> str:
    """Number of images; they are the first in a random order, so that they represent all."""
    if data["images"] == data["of"]:
        return f"all {data['of']}"
    return f"the first {data['images']} (in a seeded random order) of the {data['of']}"


def _ratio(gap: dict[str, Any]) -> str:
    low_high = gap["ratio_interval"]
    return f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else ""


def _paired(data: dict[str, Any]) -> list[str]:
    lines = [
        "| default minus | difference | 95 % interval | blur | channel mean | black | wins |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, gap in sorted(data["paired"].items(), key=lambda item: item[1]["difference"]):
        three = " | ".join(f"{gap[f'difference_{reference}']:+.3f}" for reference in REFERENCES)
        lines.append(f"| {name} | {gap['difference']:+.3f} | {bounds(gap['interval'])} | {three} | {gap['wins']} |")
    return lines


def _precision(data: dict[str, Any]) -> list[str]:
    if data["engine"] == "torch":
        return ["All passes in float32 by torch."]
    lines = [
        f"Precision: all passes without gradients, of every method and of the curves alike, ran through OpenVINO"
        f" ({data['engine'].removeprefix('openvino-')}); gradients were taken by torch in float32."
    ]
    same = data["agreement"]
    if same:
        lines += [
            f"On {same['images']} of the images everything was repeated in float32 by torch: scores per image and"
            f" method differ by {same['mean_absolute']:.4f} on average and {same['largest']:.4f} at most",
            f"(mean over the references); the predicted class differs on {same['other_class']} of them. Mean scores"
            " over these images in float32 and, in brackets, what bf16 adds: "
            + ", ".join(f"{name} {mean:.3f} ({gap:+.4f})" for name, (mean, gap) in same["by_method"].items())
            + ".",
        ]
    else:
        lines += ["How far that is from float32 was not measured in this run (`check`)."]
    return lines


def _remarks() -> list[str]:
    return [
        "What this does not say: half-deleted pictures are unlike anything the network was trained on, and the score",
        "rewards maps that are smooth, since scattered pixels destroy little of a picture (see how the centre does); a",
        "fill that a method shares with a reference helps it there, which is why there are three. It ranks orders of",
        "pixels and says nothing about the size of an effect, or about the coverage of its interval.",
        "Peers are those of Captum and pytorch-grad-cam; AblationCAM and ScoreCAM take a pass for each of the 1,280",
        "channels at the last value with positions.",
    ]
