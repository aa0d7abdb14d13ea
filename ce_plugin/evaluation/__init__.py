"""Is an explanation right? Ground truth, and measures of faithfulness."""

from ce_plugin.evaluation.faithfulness import (
    FaithfulnessCurves,
    area_under_curve,
    insertion_deletion,
    pixel_order,
    reference_images,
)

__all__ = ["FaithfulnessCurves", "area_under_curve", "insertion_deletion", "pixel_order", "reference_images"]
