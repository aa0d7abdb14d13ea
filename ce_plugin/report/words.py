"""Numbers and pictures in the form in which a page shows them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ce_plugin.visualization import data_uri

__all__ = ["cell", "digits", "percent", "probability", "signed"]


def cell(title: str, alt: str, shown: Any, *, caption: str = "", top: Any = None) -> dict[str, Any]:
    """A picture with its words; a tensor is shown pixel by pixel."""
    raw = isinstance(shown, Tensor)
    return {"title": title, "alt": alt, "uri": data_uri(shown), "caption": caption, "top": top, "raw": raw, "text": ""}


def probability(value: float) -> str:
    """Three digits, or the power of ten."""
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def signed(value: float) -> str:
    """With its sign, the minus being one."""
    return f"{value:+.2f}".replace("-", "−")


def digits(value: float) -> str:
    """With its sign and three digits, where sizes differ."""
    return f"{value:+.3g}".replace("-", "−")


def percent(value: float) -> str:
    """A share, with a digit where it is small."""
    text = f"{100 * value:.1f} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"
    return text.replace("-", "−")
