"""With which networks, settings and versions does it work: exactly, in full, or refused?

    python -m benchmarks.works_with.table                      run everything, write results and docs/works-with.md
    python -m benchmarks.works_with.table --only settings      only kinds and settings, or only networks
    python -m benchmarks.works_with.table --names timm.levit_128s DataParallel
    python -m benchmarks.works_with.table --only page          run nothing, write the page from stored results

Results of what is not run are kept. `make test-oldest` and `make test-python` add their row to the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import RESULTS, write
from benchmarks.works_with import families
from benchmarks.works_with.settings import CASES, run
from benchmarks.works_with.verdicts import EXACT, FULL, REFUSED, WRONG, Verdict

PAGE = Path(__file__).resolve().parents[2] / "docs" / "works-with.md"
STORED, VERSIONS = RESULTS / "works_with.json", RESULTS / "versions.json"
Pair = tuple[Verdict, Verdict]

HEAD = """# Works with

This page is made by tests: each row is run, and a row that says something else than what happens fails. Weights are
random, so that nothing needs to be downloaded.

| | |
|---|---|
| **exact** | effects equal those of full passes, up to rounding; trials run only what changes, where that saves time |
| **full route** | the same effects; each trial passes through the whole network; the reason is logged |
| **refused** | an error of our own says why, and what to do, before any number is given |

Effects of a layer's channels, and of the cells of a grid over the input, are compared with `engine="full"`; in the
first tables also with hooks and masks by hand, without the package. At an input the whole network follows, so that
there is less to save: "exact" there means that the network can be followed window by window where that pays, or that
there is nothing to follow (inputs that are no images).
"""


def stored() -> dict[str, dict[str, Pair]]:
    """The verdicts of the latest runs: ``settings`` and ``networks``, by name."""
    if not STORED.exists():
        return {"settings": {}, "networks": {}}
    found = json.loads(STORED.read_text())
    return {
        kind: {name: (Verdict(**rows[0]), Verdict(**rows[1])) for name, rows in found[kind].items()}
        for kind in ("settings", "networks")
    }


def versions() -> list[dict[str, Any]]:
    """What the test suite said on other versions, the latest run on each."""
    found: list[dict[str, Any]] = json.loads(VERSIONS.read_text()) if VERSIONS.exists() else []
    return found


def _short(reason: str) -> str:
    """The first sentence of a message, fit for a cell."""
    sentence = reason.split(". ")[0].strip().rstrip(".").replace("|", "\\|")
    return sentence if len(sentence) < 160 else sentence[:157] + "..."


def _why(pair: Pair) -> str:
    reasons = dict.fromkeys(_short(verdict.reason) for verdict in pair if verdict.reason)
    return "; ".join(f"`{reason}`" if "`" not in reason else reason for reason in reasons)


def settings_table(found: Mapping[str, Pair]) -> list[str]:
    """A table for each section."""
    lines = ["## Kinds of networks and settings"]
    for section in dict.fromkeys(case.section for case in CASES.values()):
        lines += ["", f"### {section}", "", "| | at a layer | at the input | why |", "|---|---|---|---|"]
        for case in CASES.values():
            if case.section == section and case.name in found:
                layer, at_input = found[case.name]
                lines.append(f"| {case.name} | {layer.verdict} | {at_input.verdict} | {_why((layer, at_input))} |")
    return lines


def networks_table(found: Mapping[str, Pair]) -> list[str]:
    """Counts by library, and whatever is not exact."""
    lines = [
        "## Families of networks", "",
        "The smallest network of each family, at a layer at 60 % of its depth and at its input. All rows are in "
        "`benchmarks/results/works_with.md`.", "",
        "| library | networks | exact at a layer | full route | refused | exact at the input | full route | refused |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for library in dict.fromkeys(name.split(".")[0] for name in found):
        rows = [pair for name, pair in found.items() if name.startswith(f"{library}.")]
        counts = [
            sum(pair[k].verdict == verdict for pair in rows) for k in (0, 1) for verdict in (EXACT, FULL, REFUSED)
        ]
        lines.append(f"| {library} | {len(rows)} | {' | '.join(map(str, counts))} |")
    others = {name: pair for name, pair in found.items() if {verdict.verdict for verdict in pair} != {EXACT}}
    if others:
        lines += [
            "",
            "Those that are not exact at both:",
            "",
            "| network | at a layer | at the input | why |",
            "|---|---|---|---|",
        ]
        for name, pair in others.items():
            lines.append(f"| {name} | {pair[0].verdict} | {pair[1].verdict} | {_why(pair)} |")
    return lines


def versions_table(rows: list[dict[str, Any]]) -> list[str]:
    """One row for each interpreter and set of versions."""
    lines = [
        "## Versions", "",
        "What the tests say on the oldest versions that are allowed (`make test-oldest`), and on the newest ones for",
        "other interpreters (`make test-python PYTHON=python3.13`). Lower bounds in `setup.cfg` are those of the first",
        "row.",
    ]  # fmt: skip
    names = ["torch", "torchvision", "captum", "adversarial-robustness-toolbox", "numpy", "scipy"]
    lines += [
        "",
        f"| | Python | {' | '.join(names)} | passed | failed | skipped | on |",
        "|---" * (len(names) + 6) + "|",
    ]
    for row in rows:
        cells = [row["label"], row["python"], *(row["versions"].get(name, "") for name in names)]
        lines.append(
            f"| {' | '.join([*cells, str(row['passed']), str(row['failed']), str(row['skipped']), row['date']])} |"
        )
    return lines


def page(found: Mapping[str, Mapping[str, Pair]], rows: list[dict[str, Any]]) -> str:
    """docs/works-with.md."""
    parts = [HEAD.rstrip(), *map("\n".join, (settings_table(found["settings"]), networks_table(found["networks"])))]
    return "\n\n".join([*parts, "\n".join(versions_table(rows))]) + "\n"


def report(networks: Mapping[str, Pair]) -> str:
    """benchmarks/results/works_with.md."""
    lines = [
        "# Families of networks", "",
        "Effects of 12 channels of a layer at 60 % of the depth, and of the 36 cells of a grid over the input, by the",
        "engine's choice of route and by full passes. Difference: the largest, as a share of the largest effect.", "",
        "| network | layer | verdict | route | difference | input | route | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, (layer, at_input) in networks.items():
        lines.append(
            f"| {name} | {layer.site} | {layer.verdict} | {layer.route} | {layer.difference:.1e} "
            f"| {at_input.verdict} | {at_input.route} | {at_input.difference:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, store, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("settings", "networks", "page"))
    parser.add_argument("--names", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = stored()
    if options.only not in ("networks", "page"):
        for case in CASES.values():
            if (not options.names or case.name in options.names) and find_spec(case.needs):
                found["settings"][case.name] = _told(case.name, *run(case))
    if options.only not in ("settings", "page"):
        for family in families.families():
            if not options.names or family in options.names:
                net, image = families.network(family)
                pair = families.at_layer(net, image), families.at_input(net, image)
                found["networks"][family] = _told(family, *pair)
    found["settings"] = {name: found["settings"][name] for name in CASES if name in found["settings"]}
    found["networks"] = {name: found["networks"][name] for name in families.families() if name in found["networks"]}
    if options.only != "page":
        data = {kind: {name: [*map(asdict, pair)] for name, pair in rows.items()} for kind, rows in found.items()}
        write("works_with", report(found["networks"]), data, "timm", "transformers")
    PAGE.write_text(page(found, versions()))


def _told(name: str, layer: Verdict, at_input: Verdict) -> Pair:
    for verdict in (layer, at_input):
        mark = "  <-- WRONG" if verdict.verdict == WRONG else ""
        print(
            name,
            verdict.site,
            verdict.verdict,
            verdict.route,
            verdict.reason[:200],
            f"{verdict.seconds:.1f} s{mark}",
            flush=True,
        )
    return layer, at_input


if __name__ == "__main__":
    main()
