"""Killed while it writes files, does a run go on to the same numbers, and how much is done again?"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common.results import write
from benchmarks.expected._fashion import HOW, TestSet, classifier, evidences, explainer
from ce_plugin.expected import EffectTable, RayCluster, Sample, run

SHARD = 16


class Noted(TestSet):
    """Says which process reads images, and how many were read: by appending a byte to a file of its process's id."""

    notes = Path()

    def __getitem__(self, index: int) -> Sample:
        with (self.notes / str(os.getpid())).open("ab") as note:
            note.write(b"x")
        return super().__getitem__(index)


def work(out: Path, images: int, notes: Path, workers: int) -> EffectTable:
    """One run, or what is missing of it."""
    network = classifier()
    data = Noted(images)
    data.notes = notes
    cluster = RayCluster(workers) if workers else None
    options: dict[str, Any] = {"given": evidences(network), "classes": "all", "shard_size": SHARD, "resume": True}
    return run(explainer(network), data, out, cluster=cluster, **options)


def read(notes: Path) -> int:
    """Images that were read so far."""
    return sum(note.stat().st_size for note in notes.iterdir())


def same(one: EffectTable, other: EffectTable) -> bool:
    """Whether all answers are the same, bit by bit."""
    answers = [[table.expected(outcome, target="all").effect for outcome in table.outcomes] for table in (one, other)]
    return len(one) == len(other) and all(map(torch.equal, *answers))


def apart(one: EffectTable, other: EffectTable) -> float:
    """Largest difference of an answer, as a share of the largest effect."""
    found = 0.0
    for outcome in one.outcomes:
        a, b = (table.expected(outcome, target="all").effect for table in (one, other))
        found = max(found, float((a - b).abs().max() / a.abs().max()))
    return found


def killed(place: Path, images: int, kills: int, seconds: float) -> tuple[EffectTable, int]:
    """A run that is killed so many times while it writes files, and then left to finish; and how many halves of files
    that left.

    Each process first writes a file of its own. Then it is killed, in turn, when half a file is seen, and at a random
    moment of the next ``seconds``.
    """
    moments, rows = random.Random(0), place / "run" / "rows"
    command = [sys.executable, "-m", "benchmarks.expected.resume", "--child", str(place), "--images", str(images)]
    for number in range(kills):
        whole, halves = files(rows, "[0-9]*.parquet"), files(rows, ".*.part")
        child = subprocess.Popen([*command])
        while files(rows, "[0-9]*.parquet") == whole and child.poll() is None:
            time.sleep(0.01)
        if number % 2:
            time.sleep(moments.uniform(0, seconds))
        else:
            while files(rows, ".*.part") == halves and child.poll() is None:
                time.sleep(0.0005)
        if child.poll() is not None:
            raise SystemExit("The run ended before it was killed: take more --images.")
        child.send_signal(signal.SIGKILL)
        child.wait()
        print("killed with", len(files(rows, "[0-9]*.parquet")), "files written", flush=True)
    return work(place / "run", images, place / "notes", 0), len(files(rows, ".*.part"))


def files(folder: Path, pattern: str) -> set[str]:
    """Names of files."""
    return {file.name for file in folder.glob(pattern)}


def workers_killed(place: Path, images: int, kills: int) -> tuple[EffectTable, int]:
    """A run by two of Ray's workers, some of which are killed."""
    gone: list[int] = []

    def kill() -> None:
        while len(gone) < kills:
            time.sleep(2)
            alive = [int(note.name) for note in (place / "notes").iterdir()]
            for pid in alive:
                if pid not in (*gone, os.getpid()):
                    gone.append(pid)
                    os.kill(pid, signal.SIGKILL)
                    break

    threading.Thread(target=kill, daemon=True).start()
    return work(place / "run", images, place / "notes", 2), len(gone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--kills", type=int, default=10, help="of the process")
    parser.add_argument("--worker-kills", type=int, default=5, help="of workers of Ray; 0 leaves Ray out")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work(Path(options.child, "run"), options.images, Path(options.child, "notes"), 0)
        return
    with TemporaryDirectory() as folder:
        places = [Path(folder, name) for name in ("whole", "killed", "ray")]
        for place in places:
            (place / "notes").mkdir(parents=True)
        start = time.time()
        whole = work(places[0] / "run", options.images, places[0] / "notes", 0)
        seconds = time.time() - start
        # A random moment is one of the next two files.
        table, halves = killed(places[1], options.images, options.kills, 2 * seconds * SHARD / options.images)
        extra = read(places[1] / "notes") - read(places[0] / "notes")
        data: dict[str, Any] = {
            "kills": options.kills, "same": same(whole, table), "apart": apart(whole, table), "read_again": extra,
            "halves": halves,
        }  # fmt: skip
        rows = [f"| the process | {options.kills} | {data['apart']:.1e} | {extra} |"]
        if options.worker_kills:
            there, kills = workers_killed(places[2], options.images, options.worker_kills)
            again = read(places[2] / "notes") - read(places[0] / "notes")
            data["ray"] = {"kills": kills, "apart": apart(whole, there), "read_again": again}
            rows.append(f"| one of two workers of Ray | {kills} | {data['ray']['apart']:.1e} | {again} |")
    text = [
        "### Killed and resumed",
        "",
        f"{HOW} {options.images} images, clean, PWM, FGSM and PGD, all classes, files of {SHARD} images. `kill -9`",
        "once the process has written a file: in turn when half of the next one is seen on the disk, and at a random",
        f"moment of the next two ({data['halves']} of the kills left half a file); workers of Ray at random moments.",
        "The process is started again with `resume=True`, workers are replaced by Ray. Largest difference of an",
        "expected effect from the run that was left alone, as a share of the largest; and how many images were read",
        "again (one image more for each start, which is looked at before the run).",
        "",
        "| killed | times | difference | images read again |",
        "|---|---|---|---|",
        *rows,
    ]
    write("expected_resume", "\n".join(text), data, "ray", "pyarrow")


if __name__ == "__main__":
    main()
