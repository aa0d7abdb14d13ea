"""The paper's experiments by `ce-plugin experiment`: run, or gone on with in the cache, and written to the results.

What every call took is kept beside the run's folder, so that the results say what all of them took together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

from benchmarks.common.results import write
from ce_plugin.cli import main as ce_plugin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--images", type=int)
    parser.add_argument("--workers", type=int, default=1, help="processes of Ray, one thread each (default: none)")
    options = parser.parse_args()
    out = (
        Path(os.environ.get("CE_PLUGIN_CACHE") or Path.home() / ".cache" / "ce-plugin") / "experiments" / options.recipe
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("CE_PLUGIN_DATA"):
        raise SystemExit("Set CE_PLUGIN_DATA to the folder of the data sets.")
    start, cpu = time.time(), time.process_time()
    words = ["experiment", options.recipe, "--out", str(out), "--resume"]
    if options.workers > 1:
        words += ["--engine", "ray", "--workers", str(options.workers)]
    code = ce_plugin([*words, *([] if options.images is None else ["--images", str(options.images)])])
    if code:
        raise SystemExit(code)
    calls = out.with_name(f"{options.recipe}-calls.json")
    took = [
        *(json.loads(calls.read_text()) if calls.exists() else []),
        [time.time() - start, time.process_time() - cpu],
    ]
    calls.write_text(json.dumps(took))
    load = os.getloadavg()[1]  # over five minutes: on a calm machine about the number of workers
    seconds, cpu_seconds = (round(sum(column)) for column in zip(*took, strict=True))
    record = json.loads((out / "experiment.json").read_text())
    del record["configurations"]
    # The plots stay with the page, in the cache, and so does the section that is nothing else.
    text = re.sub(r"#### At a glance\n\n.*\n\n|(!\[.*\n)+\n?", "", (out / "experiment.md").read_text())
    said = f"From the empty folder to the page {seconds:,} s"
    # What Ray's workers take is not this process's.
    said += f", {cpu_seconds:,} s of one processor" if options.workers == 1 else f" with {options.workers} workers"
    said += f", in {len(took)} call{'s' if len(took) > 1 else ''}; the machine's load at the end was {load:.1f}."
    took_all = {"seconds": seconds, "cpu_seconds": cpu_seconds, "calls": took, "workers": options.workers}
    write(f"experiment_{options.recipe}", f"{text}\n{said}\n", {**took_all, **record}, "pyarrow")


if __name__ == "__main__":
    main()
