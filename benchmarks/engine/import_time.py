"""How long does importing take? The plugin's class against Captum's, and the help of the command line.

    python -m benchmarks.engine.import_time                ten pairs, alternating
    python -m benchmarks.engine.import_time --pairs 30

Each import runs in a separate process, on one thread, after a warm-up run that loads the files into memory. A pair is
Captum's import followed directly by the plugin's. The median of the ratios within pairs is reported, because other load
on the machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.results import write

ROOT = Path(__file__).resolve().parents[2]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CAPTUM = ("-c", "from captum.attr import FeatureAblation")
PLUGIN = ("-c", "from ce_plugin import CausalEffect")
HELP = {"ce-plugin --help": ("--help",), "ce-plugin explain --help": ("explain", "--help")}


def seconds(*words: str) -> float:
    """Time of a new interpreter with these arguments, from start to end."""
    environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="of imports; default 10")
    pairs = parser.parse_args().pairs
    for words in (CAPTUM, PLUGIN):
        seconds(*words)
    measured = [(seconds(*CAPTUM), seconds(*PLUGIN)) for _ in range(pairs)]
    ratios = sorted(plugin / captum for captum, plugin in measured)
    captum, plugin = (statistics.median(one) for one in zip(*measured, strict=True))
    shown = {name: [seconds("-m", "ce_plugin", *words) for _ in range(5)] for name, words in HELP.items()}
    lines = [
        "# Time of importing",
        "",
        f"Medians of {pairs} pairs, alternating, each import in a process of its own on one thread.",
        "",
        "| what | seconds |",
        "|---|---|",
        f"| `from captum.attr import FeatureAblation` | {captum:.2f} |",
        f"| `from ce_plugin import CausalEffect` | {plugin:.2f} |",
        *(f"| `{name}` (median of 5) | {statistics.median(times):.2f} |" for name, times in shown.items()),
        "",
        f"Within a pair the plugin takes {statistics.median(ratios):.2f} times as long as Captum "
        f"(from {ratios[0]:.2f} to {ratios[-1]:.2f}).",
    ]
    data: dict[str, Any] = {"pairs": measured, "median_ratio": statistics.median(ratios), "help": shown}
    write("import_time", "\n".join(lines), data)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
