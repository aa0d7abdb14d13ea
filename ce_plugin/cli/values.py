"""From the words after an option to its value; what is not understood is told by argparse, with exit code 2."""

from __future__ import annotations

import argparse

__all__ = ["classes", "count", "normalization", "open_share", "pair", "positive", "share", "weight"]


def count(text: str) -> int:
    """A positive whole number."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def classes(text: str) -> int | None:
    """How many classes: a positive whole number, or None for all."""
    return None if text == "all" else count(text)


def share(text: str) -> float:
    """A number in (0, 1], or a fraction such as 8/255."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / (float(bottom) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share in (0, 1]: write 8/255 or 0.3, for example")
    return value


def open_share(text: str) -> float:
    """A share below 1."""
    value = share(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 is all of it: write a share below 1, 0.1 for example")
    return value


def weight(text: str) -> float:
    """A number that is zero or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number that is zero or more")
    return value


def positive(text: str) -> float:
    """A number above zero."""
    try:
        value = weight(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return value


def normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """MEAN/STD, each a number or one per channel."""
    mean, slash, std = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{text} is not MEAN/STD: write 127/128, or three numbers each with commas")
    return _numbers(mean), _numbers(std)


def pair(text: str) -> tuple[float, float]:
    """LOW,HIGH with LOW below HIGH."""
    values = _numbers(text)
    if len(values) != 2 or not values[0] < values[1]:
        raise argparse.ArgumentTypeError(f"{text} is not LOW,HIGH: write 0,255, for example")
    return values[0], values[1]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number, or numbers separated by commas") from None
