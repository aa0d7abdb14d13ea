"""Tables of the mediation benchmark."""

from __future__ import annotations

import textwrap
from statistics import median
from typing import Any

SHARE_KEYS = ("indirect", "indirect_low", "indirect_high", "direct", "direct_low", "direct_high")
BAR = 1e-6
PARTS = ("0.5", "0.9")
NEVER = float("inf")

Row = dict[str, Any]


def text(data: Row) -> str:
    """The whole page."""
    cuts, branches = ([row for row in data["layers"] if row["cut"] is kind] for kind in (True, False))
    took = sum(row["seconds"] for row in data["layers"])
    parts = [
        "## Mediation and interactions",
        *_planted(data["planted"]),
        *_interactions(data["interactions"], data["medians"]),
        *_scene(data),
        *_cuts(cuts, data["random_orders"]),
        *_branches(branches),
        *_views(data["views"], {row["label"]: row for row in cuts}),
        *_reading(cuts),
        _prose(f"The layers took {took:.0f} s by the clock, of one core that others were using too."),
    ]
    return "\n\n".join(parts)


def _prose(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _planted(rows: list[Row]) -> list[str]:
    worst = max(max(row["errors"].values()) for row in rows if row["dtype"] == "float64")
    single = max(max(row["errors"].values()) / row["largest_effect"] for row in rows if row["dtype"] == "float32")
    quantities = ("total", "indirect", "direct", "interaction")
    table = [
        ["a cut" if row["cut"] else "by-passed", row["dtype"], row["engine"]]
        + [f"{row['errors'][name]:.1e}" for name in quantities]
        + [f"{row['largest_effect']:.1f}"]
        for row in rows
    ]
    return [
        "### Planted layers: all four quantities",
        _prose(
            "`CausalMediation` against the closed form of `PlantedMediation` (12 channels, 4 classes): single",
            f"channels and four sets, every class, {rows[0]['images']} images on each of {rows[0]['networks']}",
            f"networks; the largest absolute error. Bar: {BAR:.0e} in float64:",
            f"**{'met' if worst <= BAR else 'MISSED'}**, {worst:.1e}. In float32 the error is at most {single:.1e} of",
            "the largest effect.",
        ),
        _table(["layer", "type", "engine", *quantities, "largest quantity"], table),
    ]


def _interactions(rows: list[Row], medians: dict[str, float]) -> list[str]:
    def worst(own: list[Row], key: str) -> float:
        return max(NEVER if row[key] is None else row[key] for row in own)

    table = []
    for gate in ("product", "relu"):
        own = [row for row in rows if row["gate"] == gate]
        table.append(
            [
                gate,
                f"{sum(row['rank'] == 1 for row in own)} of {len(own)}",
                f"{worst(own, 'rank_of_score'):g}",
                f"{worst(own, 'error'):.1e}",
                f"{max(max(row['single_effects']) for row in own):.1e}",
                f"{worst(own, 'largest_single'):.1f}",
                f"{worst(own, 'next_largest'):.2f}",
                f"{worst(own, 'trials'):g}",
                f"{worst(own, 'gradients'):g}",
            ]
        )
    head = ["gate", "found as the largest", "rank by the screen", "error of its size", "its largest single effect"]
    head += ["largest single effect of all", "largest other interaction", "trials", "gradients"]
    return [
        "### A planted pair among 200 units",
        _prose(
            "Two of 200 channels do nothing alone and -2 together (`PlantedInteraction`; the others have effects, and",
            "smaller interactions of their own); `LayerCausalEffect.interactions` with its defaults, float32, one",
            "image, ten networks and pairs for each kind of gate. 19,900 pairs are possible; the screen names 100,",
            f"which are run exactly. The worst of ten in each column; median time {medians['seconds']:.2f} s.",
        ),
        _table(head, table),
    ]


def _scene(data: Row) -> list[str]:
    scene, first = data["scene"], data["layers"][0]
    half = scene["images"] // 2
    return [
        "### Which channels carry PGD?",
        _prose(
            f"EfficientNet-lite0, float32, {scene['tried']} ImageNet photographs in a random order:",
            f"{scene['not_known']} that the network does not know are left out, and {scene['attack_failed']} whose",
            f"answer PGD ({data['eps']:g}/255, {data['steps']} steps) does not change; {scene['images']} remain, each",
            "of another class. Outcome: the logit of the clean class. Channels are ranked by their natural indirect",
            f"effect on {half} photographs; nested sets of the best are tried on the other {scene['images'] - half}.",
            f"Mean total effect there: {_range(first['logit']['total'], 1)} on the logit,",
            f"{_range(first['log_odds']['total'], 1)} on the log-odds.",
        ),
    ]


def _range(values: list[float], digits: int) -> str:
    return f"{values[0]:.{digits}f} ({values[1]:.{digits}f} to {values[2]:.{digits}f})"


def _needed(row: Row, part: str) -> str:
    low, high = row["interval"][part]
    return f"**{row['needed'][part] or 'not reached'}** [{low or '-'}, {high or '-'}]"


def _median(values: list[int | None]) -> str:
    middle = median([NEVER if value is None else value for value in values])
    return "not reached" if middle == NEVER else f"{middle:g}"


def _cuts(rows: list[Row], orders: int) -> list[str]:
    head = ["layer", "channels"]
    for part in ("50", "90"):
        head += [f"{part} %: chosen on other images", "random order", "the image's own order"]
    table = []
    for row in rows:
        cells = [f"{row['label']} (`{row['layer']}`)", str(row["channels"])]
        for part in PARTS:
            cells.append(_needed(row["logit"], part))
            cells += [_median(row["random"]["reached"][part]), _median(row["own"]["needed"][part])]
        table.append([*cells, ", ".join(str(row["log_odds"]["needed"][part]) for part in PARTS)])
    return [
        _prose(
            "**Cuts.** Everything passes through these layers, so that all of a layer's channels carry 100 % by",
            "construction. How many of them are needed? In brackets: fewer are surely too few, so many surely enough",
            "(95 %, from a bootstrap over the test images).",
        ),
        _table([*head, "log-odds 50 %, 90 %"], table),
        _prose(
            f"*Random order*: sets of the same sizes, channels in random order, median of {orders} orders. *The",
            "image's own order*: each choosing image's channels ranked and tried on that very image, median over",
            "images: what there is to be found for one attack. *Log-odds*: the same sets' share of the effect on the",
            "log-odds. These three columns know only the sizes that were run, up to a factor of 2 apart.",
        ),
    ]


def _branches(rows: list[Row]) -> list[str]:
    table = []
    for row in rows:
        whole, curve = row["whole"], row["logit"]
        size = max((size for size in curve["sizes"] if size <= row["channels"] / 4), default=1)
        at = curve["sizes"].index(size)
        part = [curve[key][at] for key in ("share", "low", "high")]
        chance = median(one[at] for one in row["random"]["share"])
        cells = [f"{row['label']} (`{row['layer']}`)", str(row["channels"])]
        cells += [_range([whole[key], whole[f"{key}_low"], whole[f"{key}_high"]], 2) for key in ("indirect", "direct")]
        table.append([*cells, str(size), _range(part, 2), f"{chance:.2f}", _needed(curve, "0.5")])
    head = ["layer", "channels", "all: NIE / TE", "all: 1 - NDE / TE", "best ones", "their NIE / TE"]
    return [
        _prose(
            "**Branches.** The last normalisation of a block with a skip connection: the block's input goes around",
            "it, and it is no cut. Shares of the total effect: what all channels of the branch carry by themselves",
            "(NIE), what is lost when they alone do not learn of the attack (1 - NDE), and what the best of them",
            "carry: the largest set of at most a quarter of the channels that was run.",
        ),
        _table([*head, "as many at random", "50 % of the total"], table),
    ]


def _views(rows: list[Row], cuts: dict[str, Row]) -> list[str]:
    used = [row for row in rows if "needed" in row]
    if not used:
        return []
    failed = len({row["file"] for row in rows if "needed" not in row})
    table = []
    for label in dict.fromkeys(row["label"] for row in used):
        own = [row for row in used if row["label"] == label]
        cells = [label, str(cuts[label]["channels"])]
        for part in PARTS:
            seen = sorted(row["needed"][part] for row in own if row["needed"][part])
            spread = f" ({seen[0]} to {seen[-1]})" if seen else ""
            cells.append(f"**{_median([row['needed'][part] for row in own])}**{spread}")
        cells += [str(cuts[label]["logit"]["needed"][part] or "not reached") for part in PARTS]
        table.append(cells)
    photographs = {row["file"]: row for row in used}
    counts = ", ".join(str(row["images"]) for row in photographs.values())
    left_out = f"Left out, with fewer than four views that can be used: {failed}." if failed else ""
    head = ["layer", "channels", "50 %: other views", "90 %: other views"]
    return [
        _prose(
            f"**Other views of the same photograph.** {len(photographs)} of the photographs, eight crops of each;",
            f"those that the network knows and the attack changes ({counts}) are halved: channels are ranked on some",
            "views and tried on the other views. Median over photographs (range), beside the numbers for other",
            "photographs from above.",
            left_out,
        ),
        _table([*head, "50 %: other photographs", "90 %: other photographs"], table),
    ]


def _reading(cuts: list[Row]) -> list[str]:
    head, stem = (next(row for row in cuts if row["label"] == label) for label in ("head", "stem"))
    return [
        _prose(
            "What it says. In the first layers the same channels carry the attack on different photographs:",
            f"{stem['logit']['needed']['0.5']} of the stem's {stem['channels']} carry half of it, where it takes",
            f"{_median(stem['random']['reached']['0.5'])} at random. Towards the head carriers belong to the class",
            f"that is attacked: for one image {_median(head['own']['needed']['0.5'])} of {head['channels']} are enough",
            "for half of it, but of those that were chosen on photographs of other classes it takes",
            f"{head['logit']['needed']['0.5']}, at random {_median(head['random']['reached']['0.5'])}. A list of *the*",
            "channels that carry PGD does not exist there without saying for which class.",
        ),
        _prose(
            "What it does not say. Shares are about the logit of the clean class, which an untargeted attack lowers",
            "while it raises another; another attack, size or network may travel otherwise. Sets grow in the order of",
            "single indirect effects, which need not give the best set of a size: numbers of channels are upper",
            "bounds on the smallest set.",
        ),
    ]
