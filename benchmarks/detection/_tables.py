"""Tables of the evaluation of detectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.common.results import RESULTS
from benchmarks.detection._adaptive_tables import knowing
from benchmarks.detection._detectors import LEFT_OUT, OURS, OWN, label
from benchmarks.detection._results import TITLES, Findings, Group
from benchmarks.detection._scores import CLEAN, NEEDED
from benchmarks.detection._text_table import Table, interval, met, number, percent
from benchmarks.harness import PROTOCOLS, Evaluation

BARS = {
    ("mnist", "P3"): (0.985, 0.93),
    ("fashion", "P3"): (0.975, 0.93),
    ("mnist", "P2"): (0.985, 0.93),
    ("fashion", "P2"): (0.98, 0.93),
}
"""Least mean and worst AUROC, written before anything was measured."""
MOST_PASSES = 12
NOISE = ("gauss", "sign")


def bars(findings: Findings) -> Table:
    """The targets that were set for our detector, and whether it reaches them."""
    rows = []
    for (problem, protocol), (mean, worst) in BARS.items():
        one = findings.pooled(problem, protocol).get(OURS)
        if one is None or one.mean is None or one.worst is None:
            continue
        where = f"{TITLES[problem]}, {protocol}"
        for what, least, figure in (("mean AUROC", mean, one.mean), ("worst AUROC", worst, one.worst)):
            rows.append([where, f"{what} at least {number(least)}", interval(figure), met(figure.value >= least)])
    rows += [row for problem in findings.problems() for row in _promised(findings, problem)]
    words = [] if rows else ["Ours has not been scored yet."]
    wanting = [f"{TITLES[group.problem]} ({group.seed})" for group in findings.groups if group.missing]
    if rows and wanting:
        words.append(f"Preliminary: attacks have not been made for {', '.join(wanting)}.")
    return Table("What was asked for in advance", words, ["where", "asked", "found", ""], rows)


def _promised(findings: Findings, problem: str) -> Iterator[list[str]]:
    """False alarms and passes of our detector, fitted on clean images."""
    ours = findings.results(problem, "P3").get(OURS, [])
    alarms = [one.alarms for one in ours if one.alarms is not None]
    for place, nominal in enumerate((0.01, 0.05)):
        if not alarms:
            return
        held = [one.held()[place] for one in alarms]
        found = ", ".join(percent(one.rates["clean"][place].share) for one in alarms)
        asked = f"false alarms within their interval of {nominal:.0%} on clean images"
        yield [f"{TITLES[problem]}, P3", asked, found, met(all(one is not False for one in held))]
        for kind in NOISE:
            share = float(np.mean([one.rates[kind][place].share for one in alarms]))
            asked = f"at most {3 * nominal:.0%} on {kind} noise (nominal {nominal:.0%})"
            yield [f"{TITLES[problem]}, P3", asked, percent(share), met(share <= 3 * nominal)]
    passes = max((one.passes or 0.0 for one in ours), default=0.0)
    yield [
        f"{TITLES[problem]}, P3",
        f"at most {MOST_PASSES} forward passes",
        f"{passes:.3g}",
        met(passes <= MOST_PASSES),
    ]


def better(findings: Findings) -> Table:
    """Every case in which a published detector has a higher figure than ours."""
    words = []
    for protocol in PROTOCOLS:
        for problem in findings.problems():
            known = findings.pooled(problem, protocol)
            if OURS in known and not set(known) <= set(OWN):
                words.append(_compared(f"**{TITLES[problem]}, {protocol}.** ", known))
    note = "Differences are in AUROC, with the paired 95 % interval of the mean's difference."
    return Table("Where a peer is better", [note, *words] if words else ["Ours has not been scored yet."])


def _compared(start: str, known: dict[str, Evaluation]) -> str:
    ours = known[OURS]
    said = []
    for name, peer in known.items():
        if name in OWN:
            continue
        parts = list(_differences(ours, peer))
        if parts:
            said.append(f"{label(name)}: {'; '.join(parts)}")
    return start + (
        ". ".join(said) + "." if said else "No peer is better in the mean, in the worst case or on any attack."
    )


def _differences(ours: Evaluation, peer: Evaluation) -> Iterator[str]:
    """Sentences that say where a published detector is better."""
    if ours.mean is not None and peer.mean is not None and peer.mean.value > ours.mean.value:
        low, high = np.nan, np.nan
        if ours.mean_samples is not None and peer.mean_samples is not None:
            low, high = np.nanquantile(peer.mean_samples - ours.mean_samples, [0.025, 0.975])
        gap = peer.mean.value - ours.mean.value
        yield f"mean {number(peer.mean.value)} against {number(ours.mean.value)} (+{gap:.3f} [{low:+.3f}, {high:+.3f}])"
    if ours.worst is not None and peer.worst is not None and peer.worst.value > ours.worst.value:
        yield f"worst attack {number(peer.worst.value)} against {number(ours.worst.value)}"
    least = [None if one.worst_case is None else one.worst_case.figures.auroc for one in (ours, peer)]
    if least[0] is not None and least[1] is not None and least[1].value > least[0].value:
        yield f"worst case per image {number(least[1].value)} against {number(least[0].value)}"
    won = []
    for attack, tried in peer.attacks.items():
        mine = ours.attacks[attack].figures.auroc if attack in ours.attacks else None
        theirs = tried.figures.auroc
        if mine is not None and theirs is not None and round(theirs.value, 3) > round(mine.value, 3):
            won.append(f"{attack} ({number(theirs.value)} against {number(mine.value)})")
    if won:
        yield "on " + ", ".join(won)


KINDS = ("clean", "correct", "misclassified", "gauss", "sign", "shift", "contrast", "jpeg")


def tables(findings: Findings) -> list[Table]:
    """All sections, in order."""
    found = [_introduction(findings), Table("Summary", [_SUMMARY])]
    for problem, protocol in _pairs(findings):
        found.append(_summary(findings, problem, protocol))
    found += [knowing(findings, RESULTS), bars(findings), better(findings)]
    found.append(Table("Attack by attack", [_BY_ATTACK]))
    for problem, protocol in _pairs(findings):
        found.append(_by_attack(findings, problem, protocol))
    found.append(Table("False alarms", [_ALARMS]))
    for problem, protocol in _pairs(findings):
        if protocol in ("P3", "P2"):
            found.append(_alarms(findings, problem, protocol))
    return [*found, _cost(findings), _failed(findings)]


_SUMMARY = (
    "AUROC over the attacks that bound or minimise a norm: mean, and worst with the attack it belongs to. TPR: share "
    "of attacked images that are detected where 1 % or 5 % of the correctly classified clean images are flagged, mean "
    "over attacks. Worst case per image: a detector is credited for an image only with the attack that it detects "
    "least (MEAD), over the images that every attack was tried on. Brackets: 95 % bootstrap intervals; images are "
    "drawn with everything that was made of them, the same for all classifiers, attacks and detectors. Best mean first."
)
_BY_ATTACK = (
    "AUROC, mean over classifiers. Attacks that bound no norm (excluded) count in no mean. Fewer successes than are "
    "needed on each classifier: not evaluated."
)
_ALARMS = (
    "Share of images flagged at the thresholds that were calibrated for 1 % and 5 %, mean over classifiers. Clean: all "
    "test images, which is what the thresholds promise; in brackets on how many classifiers the share lies in the 95 % "
    "interval that the numbers of calibration and test images allow. Correct and misclassified: parts of these. The "
    "others are correctly classified images that were altered: Gaussian and sign noise, shift, less contrast, JPEG."
)


def _pairs(findings: Findings) -> list[tuple[str, str]]:
    return [(a, b) for b in PROTOCOLS for a in findings.problems() if findings.results(a, b)]


def _introduction(findings: Findings) -> Table:
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
    rows = [_about(group) for group in findings.groups]
    header = ["problem", "classifier", "accuracy", "clean images", "attacks made", "not made yet", "needed"]
    return Table("What was tried", words, header, rows)


def _about(group: Group) -> list[str]:
    missing = ", ".join(group.missing) or "none"
    counts = [str(group.n_clean), str(len(group.tried)), missing, str(NEEDED[group.problem])]
    return [TITLES[group.problem], str(group.seed), percent(group.accuracy), *counts]


def _summary(findings: Findings, problem: str, protocol: str) -> Table:
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
    single, rows = findings.results(problem, protocol), []
    for name, one in findings.pooled(problem, protocol).items():
        least = "-" if one.worst_case is None else interval(one.worst_case.figures.auroc)
        means = [each.evaluation.mean for each in single[name] if each.evaluation is not None]
        seeds = " ".join(number(mean.value) for mean in means if mean is not None)
        cells = [interval(one.mean), interval(one.worst), one.worst_attack or "-", interval(one.tpr_1)]
        rows.append([label(name), *cells, interval(one.tpr_5), least, seeds])
    return Table(f"{TITLES[problem]}, {protocol}: {PROTOCOLS[protocol]}", [], header, rows, level=3)


def _by_attack(findings: Findings, problem: str, protocol: str) -> Table:
    known, shown = findings.pooled(problem, protocol), findings.shown(problem, protocol)
    attacks = list(dict.fromkeys(name for one in shown for name in known[one].attacks))
    rows, dropped = [], []
    for attack in sorted(attacks, key=lambda name: known[shown[0]].attacks[name].excluded):
        tried = known[shown[0]].attacks[attack]
        count = str(tried.figures.n_attacked)
        if not tried.figures.evaluated:
            dropped.append(f"{attack} ({count} successes)")
            continue
        cells = [interval(known[name].attacks[attack].figures.auroc) for name in shown]
        rows.append([attack + (" (excluded)" if tried.excluded else ""), count, *_with_best(cells)])
    words = [f"Not evaluated: {', '.join(dropped)}."] if dropped else []
    title = f"{TITLES[problem]}, {protocol}"
    return Table(title, words, ["attack", "attacked", *map(label, shown)], rows, level=3)


def _with_best(cells: Sequence[str]) -> list[str]:
    """The largest in bold, and all that are equal to it as printed."""
    heads = [cell.split(" ")[0] for cell in cells]
    most = max(float(head) for head in heads if head != "-")
    return [f"**{c}**" if h != "-" and float(h) == most else c for c, h in zip(cells, heads, strict=True)]


def _alarms(findings: Findings, problem: str, protocol: str) -> Table:
    results, rows = findings.results(problem, protocol), []
    for name in findings.pooled(problem, protocol):
        alarms = [one.alarms for one in results[name] if one.alarms is not None]
        cells = []
        for kind in KINDS:
            shares = [[rate.share for rate in one.rates[kind]] for one in alarms if kind in one.rates]
            cells.append(" / ".join(f"{100 * share:.1f}" for share in np.mean(shares, axis=0)) if shares else "-")
        held = [one.held() for one in alarms]
        within = " / ".join(f"{sum(bool(each[i]) for each in held)} of {len(held)}" for i in (0, 1))
        rows.append([label(name), str(alarms[0].n_calibration), f"{cells[0]} [{within}]", *cells[1:]])
    keep = [group.keep for group in findings.groups if group.problem == problem]
    kept = ", ".join(f"{kind} {percent(float(np.mean([one[kind] for one in keep])))}" for kind in keep[0])
    words = [f"Per cent at 1 % / at 5 %. Altered images that keep their class: {kept}."]
    header = ["detector", "calibrated on", *KINDS]
    return Table(f"{TITLES[problem]}, {protocol}", words, header, rows, level=3)


def _cost(findings: Findings) -> Table:
    problems, rows = findings.problems(), []
    names = dict.fromkeys(one.detector for group in findings.groups for one in group.results)
    for name in sorted(names, key=lambda one: one not in OWN):
        cells = []
        for problem in problems:
            ones = [one for group in findings.groups for one in group.results if one.detector == name]
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


def _failed(findings: Findings) -> Table:
    problems = findings.problems()
    broken = [
        f"- {label(one.detector)} on {TITLES[one.problem]} ({one.seed}), {one.protocol}: {one.error}"
        for group in findings.groups
        for one in group.results
        if one.error
    ]
    broken += [f"- {label(name)} on {TITLES[one]}: {why}" for (one, name), why in LEFT_OUT.items() if one in problems]
    return Table("What could not be evaluated", broken or ["Every detector ran wherever it was tried."])
