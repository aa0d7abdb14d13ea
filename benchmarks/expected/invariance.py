"""Does the table depend on how the work is split? Batches, files, processes and Ray's workers give the same rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common.results import write
from benchmarks.expected._fashion import HOW, TestSet, classifier, evidences, explainer
from ce_plugin.expected import EffectTable, RayCluster, run


def splits(workers: list[int]) -> dict[str, dict[str, Any]]:
    """Name -> options of a run; the first is what others are compared with."""
    found: dict[str, dict[str, Any]] = {
        "batches of 32": {},
        "batches of 1": {"batch_size": 1},
        "batches of 100, files of 70": {"batch_size": 100, "shard_size": 70},
        "two reading processes": {"loaders": 2},
    }
    for n in workers:
        found[f"Ray, {n} worker{'s' * (n > 1)}"] = {"cluster": RayCluster(n), "shard_size": 64}
    return found


def largest(one: EffectTable, other: EffectTable, outcome: str, evidence: str) -> tuple[float, int]:
    """Largest difference of rows, as a share of the largest effect; and how many images' attacks differ."""
    name = {"outcome": outcome, "evidences": [evidence], "target": "all"}
    _, here = one.values(**name)  # type: ignore[arg-type]
    _, there = other.values(**name)  # type: ignore[arg-type]
    hashes = []
    for table in (one, other):
        frame = table.images()
        hashes.append(frame.loc[frame["evidence"] == evidence, "image_sha256"].fillna("none").tolist())
    same = torch.tensor([a == b for a, b in zip(*hashes, strict=True)])
    apart = (here - there).abs()[same]
    return float(apart.max() / here.abs().max()), int((~same).sum())


def differing(one: EffectTable, other: EffectTable, evidence: str) -> float:
    """Share of pixels of the attacked images that differ."""
    import pandas as pd

    pixels = []
    for table in (one, other):
        frame = pd.read_parquet(table.folder / "rows", columns=["id", "evidence", "image"])
        frame = frame[frame["evidence"] == evidence].sort_values("id")
        pixels.append(torch.frombuffer(bytearray(b"".join(frame["image"])), dtype=torch.uint8))
    return float((pixels[0] != pixels[1]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 3], help="of Ray; none leaves it out")
    options = parser.parse_args()
    network = classifier()
    given = evidences(network)
    made, data, rows = explainer(network), {}, []
    with TemporaryDirectory() as place:
        first: EffectTable | None = None
        for number, (name, split) in enumerate(splits(options.workers).items()):
            out = Path(place, str(number))
            table = run(made, TestSet(options.images), out, given=given, classes="all", **split)
            if first is None:
                first = table
                continue
            found: dict[str, Any] = {}
            for evidence in given:
                apart = {outcome: largest(first, table, outcome, evidence) for outcome in table.outcomes}
                found[evidence] = {"apart": {o: a for o, (a, _) in apart.items()}, "attacks": apart["log_odds"][1]}
                if evidence in ("FGSM", "PGD"):
                    found[evidence]["pixels"] = differing(first, table, evidence)
            data[name] = found
            worst = {e: max(one["apart"].values()) for e, one in found.items()}
            pixels = ", ".join(f"{found[e]['pixels']:.1e}" for e in ("FGSM", "PGD"))
            rows.append(f"| {name} | " + " | ".join(f"{value:.1e}" for value in worst.values()) + f" | {pixels} |")
            print(rows[-1], flush=True)
    text = [
        "### One table, however the work is split",
        "",
        f"{HOW} {options.images} images, all classes; log-odds and the prediction-weighted reduction. Largest",
        "difference of a row from the run in one process with batches of 32, as a share of the largest effect",
        "under that evidence, of images whose attacked pixels are the same; share of attacked pixels (8 bits)",
        "that differ. Attacks are crafted one image at a time.",
        "",
        "| split | " + " | ".join(given) + " | pixels that differ: FGSM, PGD |",
        "|---|" + "---|" * (len(given) + 1),
        *rows,
    ]
    write("expected_invariance", "\n".join(text), {"splits": data}, "ray", "pyarrow")


if __name__ == "__main__":
    main()
