"""Over data sets: effects of many images as a table, expected effects as questions to it."""

from __future__ import annotations

from ce_plugin.errors import expected

try:
    import pyarrow  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    hint = "Install them: pip install 'ce-plugin[data]'"
    raise ModuleNotFoundError(
        expected("ce_plugin.expected", "imported with pyarrow and torchmetrics", error, hint)
    ) from error

from ce_plugin.expected.answer import ExpectedEstimate
from ce_plugin.expected.engine import RayCluster, run
from ce_plugin.expected.metric import ExpectedCausalEffect
from ce_plugin.expected.rows import RowMaker, Sample
from ce_plugin.expected.table import EffectTable, Subset

__all__ = [
    "EffectTable",
    "ExpectedCausalEffect",
    "ExpectedEstimate",
    "RayCluster",
    "RowMaker",
    "Sample",
    "Subset",
    "run",
]
