"""Do two revisions give the same numbers? The calls of tests/golden_calls.py against both, bit for bit.

    python benchmarks/golden.py BASE                  the working tree as it is, against a revision
    python benchmarks/golden.py BASE HEAD             two revisions
    python benchmarks/golden.py BASE --allow CALL     numbers of this call may change

The calls are those of this checkout. The package of each revision is exported to a temporary folder and run in a
separate process with the same number of threads. Calls that a revision cannot run, because it lacks a name, are listed.
The exit status is 1 if a call that is not allowed differs or cannot be run.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CALLS = ROOT / "tests" / "golden_calls.py"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}


def exported(revision: str, folder: Path) -> Path:
    """Export the package of a revision to a folder."""
    git = ["git", "-C", str(ROOT), "archive", revision, "ce_plugin"]
    packed = subprocess.run(git, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def numbers(place: Path, folder: Path, threads: int) -> dict[str, Any]:
    """The results of every call with the package in a folder: arrays by name, or an error."""
    file = folder / "numbers.pickle"
    environment = {**os.environ, **KEEP, **dict.fromkeys(THREADS, str(threads)), "PYTHONPATH": str(place)}
    command = [sys.executable, str(CALLS), "--dump", str(file)]
    subprocess.run(command, env=environment, cwd=folder, check=True, stderr=subprocess.DEVNULL)
    found = pickle.loads(file.read_bytes())
    if not Path(found["package"]).resolve().is_relative_to(place.resolve()):
        raise SystemExit(f"{found['package']} was run instead of the package in {place}")
    calls: dict[str, Any] = found["calls"]
    return calls


def compared(base: Any, head: Any) -> tuple[str, str, bool]:
    """Number of arrays, a message about the call, and whether both sides are the same."""
    for name, one in (("BASE", base), ("HEAD", head)):
        if isinstance(one, str):
            return "-", f"cannot be run on {name}: {one.splitlines()[0]}", False
    far = {key: difference(base.get(key), head.get(key)) for key in {**base, **head}}
    wrong = {key: how for key, how in far.items() if how is not None}
    if not wrong:
        return str(len(far)), "identical", True
    worst = max(wrong, key=lambda key: wrong[key])
    size = "other words, shapes or names" if np.isinf(wrong[worst]) else f"{wrong[worst]:.2g} of the largest magnitude"
    return str(len(far)), f"{len(wrong)} differ, most {worst!r}: {size}", False


def difference(base: Any, head: Any) -> float | None:
    """None where two values are the same to the last bit; else the largest difference over the largest magnitude."""
    if not isinstance(base, np.ndarray) or not isinstance(head, np.ndarray):
        return None if type(base) is type(head) and base == head else np.inf
    if (base.shape, base.dtype) != (head.shape, head.dtype):
        return np.inf
    if base.tobytes() == head.tobytes():
        return None
    a, b = base.astype(np.float64), head.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return np.inf
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / (float(np.abs(a[finite]).max(initial=0.0)) or 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="a git revision")
    parser.add_argument("head", metavar="HEAD", nargs="?", help="another one (default: the working tree as it is)")
    parser.add_argument("--allow", default="", metavar="CALL[,CALL]", help="calls that may differ")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    options = parser.parse_args()
    allowed = {name for name in options.allow.split(",") if name}
    found = []
    for revision in (options.base, options.head):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            place = ROOT if revision is None else exported(revision, folder / "package")
            found.append(numbers(place, folder, options.threads))
    base, head = found
    if allowed - head.keys():
        raise SystemExit(f"no such calls: {', '.join(sorted(allowed - head.keys()))}")
    print("| call | arrays | |\n|---|---|---|")
    different = []
    for call in head:
        count, said, same = compared(base[call], head[call])
        if not same and call not in allowed:
            different.append(call)
        print(f"| {call} | {count} | {said}{' (allowed)' * (not same and call in allowed)} |")
    print(f"\n{len(head) - len(different)} of {len(head)} calls are identical or allowed to differ.")
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
