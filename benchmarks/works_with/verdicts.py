"""One row of the table: the engine's choice of route against full passes, and against interventions by hand."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ce_plugin.effects import Estimate
from ce_plugin.errors import CEPluginError, ModelError

EXACT, FULL, REFUSED, WRONG = "exact", "full route", "refused", "wrong"
# Largest difference between two ways to the same effects, as a share of the largest effect.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class Verdict:
    """How a network does at one site.

    Args:
        verdict: "exact" by a faster route, "full route", "refused" or "wrong".
        reason: of the full route, of the refusal, or what is wrong.
        site: a layer's name, or "input".
        route: see :class:`~ce_plugin.trials.Cost`.
        units: how many were set.
        effect: the largest.
        difference: the largest, to full passes, as a share of the largest effect.
        seconds: that all took.
    """

    verdict: str
    reason: str = ""
    site: str = ""
    route: str = ""
    units: int = 0
    effect: float = 0.0
    difference: float = 0.0
    seconds: float = 0.0


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the package logs inside."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, keep = logging.getLogger("ce_plugin"), Keep(logging.INFO)
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(keep)
        logger.setLevel(level)


def judged(
    site: str,
    estimate: Callable[[str], Estimate],
    engine: str = "auto",
    by_hand: Callable[[], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Verdict:
    """Compare what an engine finds with full passes.

    Args:
        site: of the row.
        estimate: from an engine's name to an estimate.
        engine: that is compared with ``"full"``.
        by_hand: the same effects, (N, U, C), without the package.
        dtype: that the network computes in.
    """
    start = time.perf_counter()
    with logged() as messages, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                found = estimate(engine)
            except ModelError:
                if engine == "auto":
                    raise
                found = estimate("auto")
            wanted = estimate("full")
        except CEPluginError as error:
            return Verdict(REFUSED, str(error), site, seconds=time.perf_counter() - start)
        others = [wanted.effect] if by_hand is None else [wanted.effect, by_hand()]
    largest = float(others[-1].abs().max())
    gaps = [float((found.effect - other).abs().max()) / max(largest, 1e-30) for other in others]
    route = str(found.settings["route"])
    because = [message.split("because ", 1)[1] for message in messages if "because " in message]
    # At the input all of the network follows: where nothing stood in the way, nothing was to be saved.
    verdict, reason = (
        (FULL, because[0] if because else "") if route == "full" and (because or site != "input") else (EXACT, "")
    )
    if not max(gaps) <= BOUNDS[dtype] or not largest > 0:
        verdict, reason = WRONG, f"differs by {max(gaps):.2g} of the largest effect, {largest:.2g}"
    seconds = time.perf_counter() - start
    return Verdict(verdict, reason, site, route, wanted.effect.shape[1], largest, max(gaps), seconds)
