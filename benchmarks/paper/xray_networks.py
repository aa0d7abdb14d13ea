"""Networks for chest X-rays: DenseNet-121 with one sigmoid and with fourteen, trained here, and how well they read.

Not for clinical use. Data: chest-xray/ and cxr-pneumonia-cnn/ in the folder CE_PLUGIN_DATA. Adam at 1e-3, betas .9 and
.999, binary cross-entropy, at 64 x 64 pixels: what one CPU core does in about five minutes each. Test images are of
patients that no training image is of. Weights are cached (CE_PLUGIN_CACHE), so that a second call trains nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common.results import write
from benchmarks.paper._page import save_page
from benchmarks.paper._xrays import (
    NEEDED,
    SIZE,
    TRAINING,
    logits,
    network,
    nih_parts,
    pneumonia_parts,
    prepared,
    reading,
)
from ce_plugin.visualization import plot_intervals

NETWORKS = ("pneumonia CNN", "one sigmoid", "fourteen sigmoids")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for the page, its table and plot")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for name in NETWORKS:
        train, test = nih_parts() if name == "fourteen sigmoids" else pneumonia_parts()
        start, cpu = time.time(), time.process_time()
        net = network(name)
        took = {"seconds": round(time.time() - start), "cpu_seconds": round(time.process_time() - cpu)}
        images = prepared(net, test)
        found = reading(logits(net.model, images.x), images, net.class_names or ())
        rows += [{"network": name, **one.to_dict()} for one in found]
        about[name] = {
            "train_images": None if name == "pneumonia CNN" else len(train),
            "train_patients": None if name == "pneumonia CNN" else len(set(train.groups)),
            "test_images": len(test),
            "test_patients": len(set(test.groups)),
            **({"epochs": TRAINING[name].epochs, **took} if name in TRAINING else {}),
        }
        print(name, about[name], *found, sep="\n  ", flush=True)
    page = text(rows, about)
    save_page(options.out, "xray_networks", page, {"networks": rows}, {"networks": plot(rows)})
    write("xray_networks", page, {"networks": about, "size": SIZE, "findings": rows})


def plot(rows: list[dict[str, Any]]) -> Figure:
    """How well each finding is told."""
    areas = {
        f"{row['network']}: {row['attack']}": {"AUROC": (row["auroc"], row["auroc_low"], row["auroc_high"])}
        for row in rows
        if row["evaluated"]
    }
    return plot_intervals({"findings": areas}, at=0.5, xlabel="AUROC")


def text(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "### Networks for chest X-rays",
        "",
        "Not for clinical use. The pneumonia CNN was trained by others on images of the same hospital; both"
        " DenseNet-121 were trained here from random weights, by Adam at 1e-3 (falling by a cosine), betas .9 and .999,"
        f" binary cross-entropy, images of {SIZE} x {SIZE} pixels, mirrored at random. Settings were fixed beforehand;"
        " no test image is of a patient of a training image (children's X-rays: by the number in the file name).",
        "",
        "| network | training images (patients) | epochs | test images (patients) | training took |",
        "|---|---|---|---|---|",
    ]
    for name, one in about.items():
        trained = f"{one['train_images']} ({one['train_patients']})" if one["train_images"] else "by others"
        took = f"{one['cpu_seconds']} s of one core" if one.get("cpu_seconds", 0) > 30 else "from the cache"
        lines.append(
            f"| {name} | {trained} | {one.get('epochs', '')} | {one['test_images']} ({one['test_patients']}) |"
            f" {took if name in TRAINING else ''} |"
        )
    lines += [
        "",
        f"AUROC, 95 % intervals of a bootstrap over patients; not evaluated below {NEEDED} images with the finding.",
        "",
        "| network | finding | with / without | AUROC |",
        "|---|---|---|---|",
    ]
    for row in rows:
        value = "not evaluated"
        if row["evaluated"]:
            value = f"{row['auroc']:.3f} ({row['auroc_low']:.3f} to {row['auroc_high']:.3f})"
        lines.append(f"| {row['network']} | {row['attack']} | {row['n_attacked']} / {row['n_clean']} | {value} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
