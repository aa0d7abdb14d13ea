"""What was asked for in advance, and where a peer is better than ours, in words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.detection._detectors import OURS, OWN, label
from benchmarks.detection._results import TITLES, Outcome
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


def bars(outcome: Outcome) -> Table:
    """The bars of the issue, and whether ours clears them."""
    rows = []
    for (problem, protocol), (mean, worst) in BARS.items():
        one = outcome.pooled(problem, protocol).get(OURS)
        if one is None or one.mean is None or one.worst is None:
            continue
        where = f"{TITLES[problem]}, {protocol}"
        for what, least, figure in (("mean AUROC", mean, one.mean), ("worst AUROC", worst, one.worst)):
            rows.append([where, f"{what} at least {number(least)}", interval(figure), met(figure.value >= least)])
    rows += [row for problem in outcome.problems() for row in _promised(outcome, problem)]
    words = [] if rows else ["Ours has not been scored yet."]
    wanting = [f"{TITLES[group.problem]} ({group.seed})" for group in outcome.groups if group.missing]
    if rows and wanting:
        words.append(f"Preliminary: attacks have not been made for {', '.join(wanting)}.")
    return Table("What was asked for in advance", words, ["where", "asked", "found", ""], rows)


def _promised(outcome: Outcome, problem: str) -> Iterator[list[str]]:
    """False alarms and passes of ours, fitted on clean images."""
    ours = outcome.results(problem, "P3").get(OURS, [])
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


def better(outcome: Outcome) -> Table:
    """Wherever a peer's figure is greater than ours."""
    words = []
    for protocol in PROTOCOLS:
        for problem in outcome.problems():
            known = outcome.pooled(problem, protocol)
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
    """What a peer does better, in words."""
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
