"""Errors of the smooth estimator on planted effects over a grid: do 95 % intervals cover, and are discoveries true?

Fixed before the run: 14 x 14 units, 399 trials (the default of CausalEffect), five planted networks, 200 runs of each
design. There is no target: the figures say how far the errors of the default design can be trusted. The truth for an
interval is the best additive description of the outcome under the design (linear projection on 100,000 other trials),
which for additive networks is the planted effect itself.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.common.results import write
from ce_plugin.designs import Design, RandomRegions, RandomWindows
from ce_plugin.effects import benjamini_hochberg, half_width, p_values
from ce_plugin.effects.smooth import smooth

GRID, UNITS, TRIALS, RUNS, MANY = (14, 14), 196, 399, 200, 100_000
NETWORKS = ("smooth", "rough", "one patch", "smooth, interactions", "probability")


def bump(row: float, column: float, width: float) -> Tensor:
    """A Gaussian hill on the grid."""
    y, x = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    return torch.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2)).flatten().double()


def networks() -> tuple[Tensor, Tensor]:
    """Main effects (U, 5) and the pairs' strengths (P,) of the fourth and fifth."""
    seeded = torch.Generator().manual_seed(1)
    hills = -bump(5, 5, 2.0) + 0.5 * bump(10, 9, 1.5)
    main = torch.stack(
        [
            hills,
            0.3 * torch.randn(UNITS, generator=seeded, dtype=torch.double),
            -(torch.arange(UNITS) == 90).double(),
            hills,
            -0.5 * bump(6, 7, 1.5),
        ],
        dim=1,
    )
    return main, 0.5 * torch.randn(60, generator=seeded, dtype=torch.double)


def outcomes(a: Tensor) -> Tensor:
    """Outcomes (T, 5) of assignments (T, U)."""
    main, strength = networks()
    pairs = torch.randint(UNITS, (60, 2), generator=torch.Generator().manual_seed(2))
    flips = a.double()
    y = flips @ main
    crossed = (flips[:, pairs[:, 0]] - 0.5) * (flips[:, pairs[:, 1]] - 0.5) @ strength
    y[:, 3] += crossed
    y[:, 4] = torch.sigmoid(3.0 + 4 * y[:, 4] / main[:, 4].abs().sum() * 2 + 0.5 * crossed)
    return y


def projection(design: Design) -> Tensor:
    """Coefficients (U, 5) of the linear regression on very many trials."""
    a = torch.cat([design.reseeded(1000 + k).assignments(UNITS, grid=GRID) for k in range(MANY // TRIALS)]).double()
    x = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    return torch.linalg.lstsq(x, outcomes(a)).solution[:UNITS]


def run(design: Design, truth: Tensor) -> dict[str, Tensor]:
    """Coverage (R, U, 5), half-widths, and true and false discoveries (R, 5)."""
    covered, widths, false, found = [], [], [], []
    for example in range(RUNS):
        a = design.assignments(UNITS, example=example, grid=GRID)
        effects = smooth(a, outcomes(a), GRID)
        if effects.std_error is None:
            raise RuntimeError("the smooth estimator returns errors")
        wide = half_width(effects.std_error, effects.dof, 0.95)
        covered.append((effects.effect - truth).abs() <= wide)
        widths.append(wide.mean(0))
        hit = benjamini_hochberg(p_values(effects.effect[None], effects.std_error[None], None), axis=1)[0] <= 0.05
        null = truth.abs() < 0.02 * truth.abs().amax(0)
        found.append(hit.sum(0))
        false.append((hit & null).sum(0) / hit.sum(0).clamp(min=1))
    return {
        "covered": torch.stack(covered).double(),
        "width": torch.stack(widths),
        "false": torch.stack(false).double(),
        "found": torch.stack(found).double(),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows, data = [], {}
    for design in (RandomRegions(0.5, TRIALS), RandomWindows(0.5, TRIALS)):
        start = time.perf_counter()
        truth = projection(design)
        result = run(design, truth)
        print(f"{design}: {time.perf_counter() - start:.0f} s", flush=True)
        for c, name in enumerate(NETWORKS):
            by_run = result["covered"][:, :, c].mean(1)
            mean, se = float(by_run.mean()), float(by_run.std() / RUNS**0.5)
            by_unit = result["covered"][:, :, c].mean(0)
            ratio = float(result["width"][:, c].mean() / truth[:, c].abs().max())
            fdr, found = float(result["false"][:, c].mean()), float(result["found"][:, c].mean())
            share = float((by_unit < 0.85).double().mean())
            data[f"{design!r}: {name}"] = {
                "coverage": mean, "interval": [mean - 1.96 * se, mean + 1.96 * se], "worst_unit": float(by_unit.min()),
                "units_below_85": share, "half_width": ratio, "found": found, "fdr": fdr,
            }  # fmt: skip
            rows.append(
                f"| {type(design).__name__} | {name} | {mean:.3f} ({mean - 1.96 * se:.3f} to {mean + 1.96 * se:.3f}) "
                f"| {float(by_unit.min()):.2f} | {share:.0%} | {ratio:.2f} | {found:.0f} | {fdr:.3f} |"
            )
            print(rows[-1], flush=True)
    text = [
        "### Errors of the smooth estimator",
        "",
        f"{TRIALS} trials over 14 x 14 units, {RUNS} runs; no bar. Coverage of 95 % intervals: mean over units and",
        "runs with its run-level interval, the worst unit's, and the share of units below 85 %. Half-width in",
        "multiples of the largest effect. Discoveries at a false discovery rate of 0.05, and the share of them whose",
        "true effect is below 2 % of the largest.",
        "",
        "| design | planted effects | coverage | worst unit | units < 85 % | half-width | found | false |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    write("coverage_smooth", "\n".join(text), data)


if __name__ == "__main__":
    main()
