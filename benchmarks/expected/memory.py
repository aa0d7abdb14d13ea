"""Does a run over ten times as many images take more memory? Peaks of resident memory, a process each.

Linux only: VmHWM of /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from tempfile import TemporaryDirectory

from benchmarks.common.results import write


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(images: int, loaders: int) -> None:
    """Run over so many images and print the peak."""
    from benchmarks.expected._fashion import TestSet, classifier, explainer
    from ce_plugin.expected import run

    network = classifier()
    with TemporaryDirectory() as place:
        run(explainer(network), TestSet(images), f"{place}/run", classes="all", loaders=loaders)
    print(json.dumps({"peak": peak()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs=2, default=[1_000, 10_000])
    parser.add_argument("--loaders", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.loaders)
        return
    peaks = []
    for images in options.images:
        command = [sys.executable, "-m", "benchmarks.expected.memory", "--child", str(images)]
        done = subprocess.run([*command, "--loaders", str(options.loaders)], capture_output=True, text=True, check=True)
        peaks.append(int(json.loads(done.stdout.splitlines()[-1])["peak"]))
        print(images, f"{peaks[-1] / 2**20:.0f} MiB", flush=True)
    from benchmarks.expected._fashion import HOW

    few, many = options.images
    text = [
        "### Memory of a run",
        "",
        f"{HOW} All classes, batches of 32, files of 512 images. Peak of resident memory of a process, with",
        "everything that it loads (the data set is in memory).",
        "",
        "| images | peak, MiB | to the first |",
        "|---|---|---|",
        f"| {few:,} | {peaks[0] / 2**20:.0f} | |",
        f"| {many:,} | {peaks[1] / 2**20:.0f} | {peaks[1] / peaks[0] - 1:+.1%} |",
    ]
    write("expected_memory", "\n".join(text), {"images": options.images, "peaks": peaks}, "pyarrow")


if __name__ == "__main__":
    main()
