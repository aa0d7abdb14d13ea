"""Over data sets: effects of many images as a table, expected effects as questions to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ce_plugin._lazy import lazy_names

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

if TYPE_CHECKING:
    from ce_plugin.expected.answer import ExpectedEstimate
    from ce_plugin.expected.engine import RayCluster, run
    from ce_plugin.expected.metric import ExpectedCausalEffect
    from ce_plugin.expected.rows import RowMaker, Sample
    from ce_plugin.expected.table import EffectTable, Subset
else:
    # Imported on first use: torchmetrics, which takes seconds, is needed by one of them.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "EffectTable": "ce_plugin.expected.table",
            "ExpectedCausalEffect": "ce_plugin.expected.metric",
            "ExpectedEstimate": "ce_plugin.expected.answer",
            "RayCluster": "ce_plugin.expected.engine",
            "RowMaker": "ce_plugin.expected.rows",
            "Sample": "ce_plugin.expected.rows",
            "Subset": "ce_plugin.expected.table",
            "run": "ce_plugin.expected.engine",
        },
    )
