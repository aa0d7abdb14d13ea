"""The tables of the evaluation of detectors, from what was found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.common.results import RESULTS
from benchmarks.detection._adaptive_comparison import knowing
from benchmarks.detection._detectors import LEFT_OUT, OWN, label
from benchmarks.detection._findings import bars, better
from benchmarks.detection._results import TITLES, Group, Outcome
from benchmarks.detection._scores import CLEAN, NEEDED
from benchmarks.detection._text_table import Table, interval, number, percent
from benchmarks.harness import PROTOCOLS

KINDS = ("clean", "correct", "misclassified", "gauss", "sign", "shift", "contrast", "jpeg")


def tables(outcome: Outcome) -> list[Table]:
    """All sections, in order."""
    found = [_introduction(outcome), Table("Summary", [_SUMMARY])]
    for problem, protocol in _pairs(outcome):
        found.append(_summary(outcome, problem, protocol))
    found += [knowing(outcome, RESULTS), bars(outcome), better(outcome)]
    found.append(Table("Attack by attack", [_BY_ATTACK]))
    for problem, protocol in _pairs(outcome):
        found.append(_by_attack(outcome, problem, protocol))
    found.append(Table("False alarms", [_ALARMS]))
    for problem, protocol in _pairs(outcome):
        if protocol in ("P3", "P2"):
            found.append(_alarms(outcome, problem, protocol))
    return [*found, _cost(outcome), _failed(outcome)]


_SUMMARY = (
    "AUROC over the attacks that bound or minimise a norm: mean, and worst with the attack it belongs to. TPR: share "
    "of attacked images that are detected where 1 % or 5 % of the correctly classified clean images are flagged, mean "
    "over attacks. Worst case per image: a detector is credited for an image only with the attack that it detects "
    "least (MEAD), over the images that every attack was tried on. Brackets: 95 % bootstrap intervals; images are "
    "drawn with everything that was made of them, the same for all classifiers, attacks and detectors. Best mean first."
)
_BY_ATTACK = (
    "AUROC, mean over classifiers. Attacks that bound no norm (apart) count in no mean. Fewer successes than are "
    "needed on each classifier: not evaluated."
)
_ALARMS = (
    "Share of images flagged at the thresholds that were calibrated for 1 % and 5 %, mean over classifiers. Clean: all "
    "test images, which is what the thresholds promise; in brackets on how many classifiers the share lies in the 95 % "
    "interval that the numbers of calibration and test images allow. Correct and misclassified: parts of these. The "
    "others are correctly classified images that were altered: Gaussian and sign noise, shift, less contrast, JPEG."
)


def _pairs(outcome: Outcome) -> list[tuple[str, str]]:
    return [(a, b) for b in PROTOCOLS for a in outcome.problems() if outcome.results(a, b)]


def _introduction(outcome: Outcome) -> Table:
    protocols = "; ".join(f"**{name}** {what}" for name, what in PROTOCOLS.items())
    words = [
        "Attacks run through ART, those of Carlini and Wagner as attacks of ours in its form; rounded to eight bits; "
        "successful ones on correctly classified images. Their caps were set, and a few of them changed, when success "
        "rates and norms on these classifiers were known, but without a look at what any detector made of them. "
        "Detectors are fitted, calibrated and tried on disjoint images; what was chosen was chosen on others again. "
        f"Protocols: {protocols}. P1 and P4 learn from attacks on one half of the test images and are tried on the "
        "other half, and the other way round.",
        f"Negatives are the first {CLEAN} correctly classified test images, in an order without regard to classes, or "
        "all where there are fewer. P2 mixes the sizes of FGSM, on images of the fitting part.",
    ]
    rows = [_about(group) for group in outcome.groups]
    header = ["problem", "classifier", "accuracy", "clean images", "attacks made", "not made yet", "needed"]
    return Table("What was tried", words, header, rows)


def _about(group: Group) -> list[str]:
    missing = ", ".join(group.missing) or "none"
    counts = [str(group.n_clean), str(len(group.tried)), missing, str(NEEDED[group.problem])]
    return [TITLES[group.problem], str(group.seed), percent(group.accuracy), *counts]


def _summary(outcome: Outcome, problem: str, protocol: str) -> Table:
    header = [
        "detector",
        "mean",
        "worst",
        "of",
        "TPR at 1 %",
        "TPR at 5 %",
        "worst case per image",
        "mean by classifier",
    ]
    single, rows = outcome.results(problem, protocol), []
    for name, one in outcome.pooled(problem, protocol).items():
        least = "-" if one.worst_case is None else interval(one.worst_case.figures.auroc)
        means = [each.evaluation.mean for each in single[name] if each.evaluation is not None]
        seeds = " ".join(number(mean.value) for mean in means if mean is not None)
        cells = [interval(one.mean), interval(one.worst), one.worst_attack or "-", interval(one.tpr_1)]
        rows.append([label(name), *cells, interval(one.tpr_5), least, seeds])
    return Table(f"{TITLES[problem]}, {protocol}: {PROTOCOLS[protocol]}", [], header, rows, level=3)


def _by_attack(outcome: Outcome, problem: str, protocol: str) -> Table:
    known, shown = outcome.pooled(problem, protocol), outcome.shown(problem, protocol)
    attacks = list(dict.fromkeys(name for one in shown for name in known[one].attacks))
    rows, dropped = [], []
    for attack in sorted(attacks, key=lambda name: known[shown[0]].attacks[name].apart):
        tried = known[shown[0]].attacks[attack]
        count = str(tried.figures.n_attacked)
        if not tried.figures.evaluated:
            dropped.append(f"{attack} ({count} successes)")
            continue
        cells = [interval(known[name].attacks[attack].figures.auroc) for name in shown]
        rows.append([attack + (" (apart)" if tried.apart else ""), count, *_with_best(cells)])
    words = [f"Not evaluated: {', '.join(dropped)}."] if dropped else []
    title = f"{TITLES[problem]}, {protocol}"
    return Table(title, words, ["attack", "attacked", *map(label, shown)], rows, level=3)


def _with_best(cells: Sequence[str]) -> list[str]:
    """The greatest in bold; all that show the same figure."""
    heads = [cell.split(" ")[0] for cell in cells]
    most = max(float(head) for head in heads if head != "-")
    return [f"**{c}**" if h != "-" and float(h) == most else c for c, h in zip(cells, heads, strict=True)]


def _alarms(outcome: Outcome, problem: str, protocol: str) -> Table:
    results, rows = outcome.results(problem, protocol), []
    for name in outcome.pooled(problem, protocol):
        alarms = [one.alarms for one in results[name] if one.alarms is not None]
        cells = []
        for kind in KINDS:
            shares = [[rate.share for rate in one.rates[kind]] for one in alarms if kind in one.rates]
            cells.append(" / ".join(f"{100 * share:.1f}" for share in np.mean(shares, axis=0)) if shares else "-")
        held = [one.held() for one in alarms]
        within = " / ".join(f"{sum(bool(each[i]) for each in held)} of {len(held)}" for i in (0, 1))
        rows.append([label(name), str(alarms[0].n_calibration), f"{cells[0]} [{within}]", *cells[1:]])
    keep = [group.keep for group in outcome.groups if group.problem == problem]
    kept = ", ".join(f"{kind} {percent(float(np.mean([one[kind] for one in keep])))}" for kind in keep[0])
    words = [f"Per cent at 1 % / at 5 %. Altered images that keep their class: {kept}."]
    header = ["detector", "calibrated on", *KINDS]
    return Table(f"{TITLES[problem]}, {protocol}", words, header, rows, level=3)


def _cost(outcome: Outcome) -> Table:
    problems, rows = outcome.problems(), []
    names = dict.fromkeys(one.detector for group in outcome.groups for one in group.results)
    for name in sorted(names, key=lambda one: one not in OWN):
        cells = []
        for problem in problems:
            ones = [one for group in outcome.groups for one in group.results if one.detector == name]
            mine = [one for one in ones if one.problem == problem and one.seconds is not None]
            if not mine:
                cells += ["-", "-"]
                continue
            passes = {one.passes for one in mine if one.passes is not None}
            cells += [f"{max(passes):.3g}" if passes else "-", f"{1e3 * min(one.seconds or 0 for one in mine):.2g}"]
        rows.append([label(name), *cells])
    header = ["detector"] + [part for one in problems for part in (f"{TITLES[one]}: passes", "ms an image")]
    words = [
        "Forward passes of the classifier for one image, a backward pass counting two, and time of scoring on one "
        "thread (the least over protocols and classifiers; other work ran on the same machine)."
    ]
    return Table("Cost", words, header, rows)


def _failed(outcome: Outcome) -> Table:
    problems = outcome.problems()
    broken = [
        f"- {label(one.detector)} on {TITLES[one.problem]} ({one.seed}), {one.protocol}: {one.error}"
        for group in outcome.groups
        for one in group.results
        if one.error
    ]
    broken += [f"- {label(name)} on {TITLES[one]}: {why}" for (one, name), why in LEFT_OUT.items() if one in problems]
    return Table("What could not be evaluated", broken or ["Every detector ran wherever it was tried."])
