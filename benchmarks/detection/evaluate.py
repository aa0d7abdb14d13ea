"""Evaluate all detectors on all attacks that have been run; earlier scores are read from the cache.

    python -m benchmarks.detection.evaluate                             everything, by P3 and P2
    python -m benchmarks.detection.evaluate fashion --detectors margin mahalanobis --protocols P3
    python -m benchmarks.detection.evaluate --no-scoring                tables of what is in the cache
    python -m benchmarks.detection.evaluate --detectors causal-effects causal-effects-hardened ml-loo \\
        --record detection_additions                                    detectors added later, with ours

Attacks are run by `attacks`; missing ones are "not evaluated". Writes
`benchmarks/results/detection.md` and `.json` (or another `--record`), and one HTML page with curves and pictures to the
folder `--out`.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch

from benchmarks.common.results import write
from benchmarks.detection._detectors import available, names
from benchmarks.detection._page import examples, write_html
from benchmarks.detection._problems import PROBLEMS, SEEDS, check_problems, load
from benchmarks.detection._results import Findings, Group
from benchmarks.detection._scores import order, result, setting
from benchmarks.detection._tables import tables
from benchmarks.harness import PROTOCOLS, ImageDraws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", nargs="*", help=f"of {', '.join(PROBLEMS)}; all by default")
    parser.add_argument("--detectors", nargs="*", default=names(), choices=names(), help="which are scored")
    parser.add_argument("--protocols", nargs="*", default=("P3", "P2"), choices=tuple(PROTOCOLS))
    parser.add_argument("--seed", nargs="*", type=int, help="classifiers; all by default")
    parser.add_argument("--no-scoring", action="store_true", help="only tables of what is in the cache")
    parser.add_argument("--out", type=Path, help="folder for detection.html")
    parser.add_argument("--record", default="detection", help="name of the files in benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="do not write to benchmarks/results")
    parser.add_argument("--cache", help="folder of the cache; default CE_PLUGIN_CACHE or ~/.cache/ce-plugin")
    options = parser.parse_args()
    check_problems(parser, options.problem)
    torch.set_num_threads(1)
    findings = Findings()
    for name in options.problem or PROBLEMS:
        for seed in SEEDS[name]:
            if options.seed is None or seed in options.seed:
                run(findings, name, seed, options)
    built = tables(findings)
    if not options.dry:
        text = "# Detecting adversarial examples\n\n" + "\n\n".join(table.markdown() for table in built)
        write(options.record, text, findings.to_dict(), "adversarial-robustness-toolbox")
    if options.out:
        print(write_html(options.out, built, findings))


def run(findings: Findings, name: str, seed: int, options: argparse.Namespace) -> None:
    """All detectors and protocols on one classifier."""
    found = setting(load(name, seed, options.cache), options.cache)
    if not found.data.attacks:
        return
    draws = findings.draws.setdefault(name, ImageDraws(len(found.problem.images["test"])))
    group = Group.of(found)
    for protocol in PROTOCOLS:
        for detector in order([one for one in names() if available(one, name)]):
            make = not options.no_scoring and detector in options.detectors and protocol in options.protocols
            one = result(found, protocol, detector, draws, options.cache, make=make)
            if one is not None:
                group.results.append(one)
    if options.out and not any(other.problem == name for other in findings.groups):
        group.examples = examples(found, group.results)
    findings.groups.append(group)
    del found
    gc.collect()


if __name__ == "__main__":
    main()
