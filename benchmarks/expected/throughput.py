"""Rows per second: one process against a bare loop of `estimate`, and two of Ray's workers against one."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.common.networks import photographs
from benchmarks.common.results import write
from benchmarks.expected._fashion import TestSet, classifier
from ce_plugin import LayerCausalEffect
from ce_plugin.expected import RayCluster, Sample, run

BATCH = 32


class Photographs:
    """Photographs for a MobileNet v2, a few again and again.

    Args:
        n: number of images.
    """

    def __init__(self, n: int) -> None:
        self.images, self.n = photographs(64) * 2 - 1, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index % len(self.images)])


def mobilenet() -> nn.Module:
    """MobileNet v2 with its trained weights."""
    import os

    from ce_plugin.models import load_mobilenet

    file = Path(os.environ["CE_PLUGIN_DATA"]) / "mobilenet" / "mobilenet_v2_1.0_224_quant.npz"
    return load_mobilenet(file).model


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], str, int, int]] = {
    "FashionCNN, features.4": (classifier, TestSet, "features.4", 1024, 64),
    "MobileNet v2, head": (mobilenet, Photographs, "head", 64, 8),
}


class Rate(NamedTuple):
    """Rows per second of the processor, and by the wall's clock."""

    cpu: float
    wall: float


def rate(n: int, work: Callable[[], object]) -> Rate:
    """How fast n rows are made."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Rate(n / (time.process_time() - cpu), n / (time.perf_counter() - wall))


def bare(made: LayerCausalEffect, data: Any, n: int, batch: int) -> Rate:
    """A loop that calls `estimate` on ready batches and keeps nothing."""
    batches = torch.split(torch.stack([data[i].image for i in range(n)]), batch)

    def loop() -> None:
        for number, some in enumerate(batches):
            made.estimate(some, ids=range(number * batch, number * batch + len(some)))

    return rate(n, loop)


def local(made: LayerCausalEffect, data: Any, n: int, batch: int) -> Rate:
    """A whole run in this process, from opening the folder to the table."""
    with TemporaryDirectory() as place:
        options: dict[str, Any] = {"batch_size": batch, "outcomes": [made.outcome]}
        return rate(n, lambda: run(made, data, f"{place}/run", ids=range(n), **options))


def by_ray(made: LayerCausalEffect, data: Any, n: int, batch: int, workers: int) -> tuple[float, float]:
    """Rows per second of so many workers, once each has written its first file; and seconds until then."""
    shard = batch
    with TemporaryDirectory() as place:
        start = time.time()
        options: dict[str, Any] = {"batch_size": batch, "shard_size": shard, "outcomes": [made.outcome]}
        run(made, data, f"{place}/run", ids=range(n), cluster=RayCluster(workers), **options)
        written = sorted(file.stat().st_mtime for file in Path(place, "run", "rows").glob("*.parquet"))
    began = written[workers - 1]
    return (len(written) - workers) * shard / (written[-1] - began), began - start


def _pair(made: LayerCausalEffect, data: Any, n: int, batch: int, number: int) -> tuple[Rate, Rate]:
    """The run and the loop, in turn the one and the other first."""
    if number % 2:
        loop = bare(made, data, n, batch)
        return local(made, data, n, batch), loop
    return local(made, data, n, batch), bare(made, data, n, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs of timings")
    parser.add_argument("--ray-pairs", type=int, default=2, help="of one worker and two; 0 leaves Ray out")
    options = parser.parse_args()
    data: dict[str, Any] = {}
    rows = []
    for name in options.cases:
        build, images, layer, n, batch = CASES[name]
        made, own = LayerCausalEffect(build(), layer, outcome="log_odds"), images(8 * n)
        bare(made, own, batch, batch)
        pairs = [_pair(made, own, n, batch, number) for number in range(options.pairs)]
        cpu, wall = (statistics.median(mine[k] / loop[k] for mine, loop in pairs) for k in (0, 1))
        mine, loop = (statistics.median(one.cpu for one in column) for column in zip(*pairs, strict=True))
        data[name] = {"pairs": pairs, "ratio": cpu, "ratio_by_the_clock": wall, "images": n, "batch": batch}
        row = f"| {name} | {mine:.1f} | {loop:.1f} | {cpu:.3f} | {wall:.3f} "
        if options.ray_pairs:
            found = [[by_ray(made, own, 4 * n, batch, workers) for workers in (1, 2)] for _ in range(options.ray_pairs)]
            gain = statistics.median(two[0] / one[0] for one, two in found)
            one, two = (statistics.median(pair[k][0] for pair in found) for k in (0, 1))
            begin = statistics.median(pair[1][1] for pair in found)
            data[name] |= {"ray": found, "gain": gain}
            row += f"| {one:.1f} | {two:.1f} | {gain:.2f} | {begin:.0f} s |"
        else:
            row += "|"
        rows.append(row)
        print(rows[-1], flush=True)
    text = [
        "### Rows per second",
        "",
        "Effects of all channels of a layer on each image's own class (log-odds), on one thread. A whole run in",
        "one process, from the empty folder to the table, against a loop that calls `estimate` on the same",
        f"batches, ready in memory, and keeps nothing: medians of {options.pairs} interleaved pairs, per second of the",
        "processor; the ratio also by the wall's clock, on which other work counts.",
    ]
    if options.ray_pairs:
        text += [
            "Then one and two of Ray's workers, one thread each, by the wall's clock after each has written its first",
            "file, on a machine of two cores; the time until then beside it.",
        ]
    head = ["network, layer", "rows/s", "bare loop", "ratio", "ratio by the clock"]
    head += ["Ray, 1 worker", "Ray, 2 workers", "gain", "start of Ray"] if options.ray_pairs else []
    text += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    write("expected_throughput", "\n".join(text), data, "ray", "pyarrow")


if __name__ == "__main__":
    main()
