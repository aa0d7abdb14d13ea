"""The numbers of the documented calls are those that were stored: no redesign changes what is seen."""

from __future__ import annotations

import numpy as np
import pytest
from golden_calls import CALLS, CHAOTIC, Value, run, stored

STORED = stored()
# Of the largest magnitude in an array, and the least difference that counts at all.
TOLERANCE, FLOOR = 1e-5, 1e-7
# Of chaotic calls, on any processor: floats, and the share of truths and whole numbers that differ. Up to .26 and
# 1 in 48 were seen between processors, two with AVX-512 among them.
CHAOTIC_TOLERANCE, CHAOTIC_SHARE = 0.4, 0.1


def difference(found: Value, wanted: Value, tolerance: float = TOLERANCE, share: float = 0.0) -> str | None:
    """How far found is from wanted, or None where they agree: words exactly, truths and whole numbers but a share."""
    if isinstance(found, (str, list)) or isinstance(wanted, (str, list)):
        return None if _same_words(found, wanted) else f"{found!r} instead of {wanted!r}"
    if (found.shape, found.dtype.kind) != (wanted.shape, wanted.dtype.kind):
        return f"{found.dtype} {found.shape} instead of {wanted.dtype} {wanted.shape}"
    if wanted.dtype.kind != "f":
        wrong = int((found != wanted).sum())
        return f"{wrong} of {wanted.size} values differ" if wrong > share * wanted.size else None
    finite = np.isfinite(wanted)
    if not np.array_equal(found[~finite], wanted[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return "NaN or infinity in other places"
    if not finite.any():
        return None
    largest = float(np.abs(wanted[finite]).max())
    off = float(np.abs(found[finite] - wanted[finite]).max())
    if off <= max(tolerance * largest, FLOOR):
        return None
    return f"off by {off:.3g}, {off / largest if largest else np.inf:.2g} of the largest magnitude {largest:.3g}"


def _same_words(found: Value, wanted: Value) -> bool:
    return type(found) is type(wanted) and found == wanted


def test_every_call_has_numbers() -> None:
    assert sorted(CALLS) == sorted(STORED), "run `python tests/golden_calls.py --write`"


@pytest.mark.parametrize("name", list(CALLS))
def test_numbers_are_as_they_were(name: str) -> None:
    found, wanted = run(name), STORED[name]
    said = [f"{key}: only there now" for key in found.keys() - wanted.keys()]
    said += [f"{key}: no longer there" for key in wanted.keys() - found.keys()]
    loose = (CHAOTIC_TOLERANCE, CHAOTIC_SHARE) if name in CHAOTIC else ()
    for key in [key for key in wanted if key in found]:
        far = difference(found[key], wanted[key], *loose)
        if far is not None:
            said.append(f"{key}: {far}")
    assert not said, f"{name} ({len(said)} of {len(wanted)} arrays):\n  " + "\n  ".join(said)


def test_differences_are_noticed() -> None:
    ones = np.ones(3)
    assert difference(ones, ones * (1 + 9e-6)) is None
    assert difference(ones, ones * (1 + 2e-5)) is not None
    assert difference(ones * 1e-8, ones * 2e-8) is None
    assert difference(np.array([1.0, np.nan]), np.array([1.0, np.nan])) is None
    assert difference(np.array([1.0, 2.0]), np.array([1.0, np.nan])) is not None
    assert difference(np.array([1, 2]), np.array([1, 3])) == "1 of 2 values differ"
    assert difference(["a"], ["b"]) == "['a'] instead of ['b']"
    assert difference(ones, np.ones((3, 1))) is not None
    assert difference(ones, ones * 1.5, 0.4) is None
    assert difference(ones, ones * 1.8, 0.4) is not None
    assert difference(np.arange(10), np.arange(10) + (np.arange(10) == 3), 0.4, 0.1) is None
    assert difference(np.arange(10), np.arange(10) + (np.arange(10) > 7), 0.4, 0.1) is not None
