"""Does glibc's allocator slow a convolutional network down on this CPU? Throughput with and without two variables.

Linux with glibc only. Writes results/allocator.md and .json.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys

from benchmarks.common.results import write

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
TIMED = """
import sys, time, torch
from ce_plugin.models import efficientnet_lite0
batch, passes = map(int, sys.argv[1:])
model = efficientnet_lite0().model
x = torch.rand(batch, 3, 224, 224).to(memory_format=torch.channels_last)
with torch.inference_mode():
    model(x)
    start = time.perf_counter()
    for _ in range(passes):
        model(x)
print(batch * passes / (time.perf_counter() - start))
"""


def throughput(batch: int, passes: int, extra: dict[str, str]) -> float:
    """Images per second in a separate process, because the variables are read when a process starts."""
    environment = {key: value for key, value in os.environ.items() if key not in KEEP}
    command = [sys.executable, "-c", TIMED, str(batch), str(passes)]
    run = subprocess.run(command, capture_output=True, text=True, env={**environment, **extra}, check=True)
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="batch sizes")
    parser.add_argument("--images", type=int, default=256, help="images per timing")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs of timings")
    options = parser.parse_args()
    rows, data = [], {}
    for batch in options.batches:
        passes = max(1, options.images // batch)
        pairs = [(throughput(batch, passes, {}), throughput(batch, passes, KEEP)) for _ in range(options.pairs)]
        plain, kept = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(after / before for before, after in pairs)
        ratio = statistics.median(ratios)
        data[str(batch)] = pairs
        rows.append(f"| {batch} | {plain:.1f} | {kept:.1f} | {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
        print(rows[-1], flush=True)
    settings = " ".join(f"{key}={value}" for key, value in KEEP.items())
    text = f"""# Memory that is kept instead of handed back

EfficientNet-lite0, forward passes of 224 x 224 images in channels-last layout, with and without
`{settings}` in the environment ({" ".join(platform.libc_ver())}). Medians of {options.pairs} interleaved pairs of
processes; in brackets the smallest and the largest ratio.

| batch | images/s as it is | images/s with memory kept | ratio |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""
    write("allocator", text, {"images_per_second": data})


if __name__ == "__main__":
    main()
