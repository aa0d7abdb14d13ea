"""Is an explanation right? Ground truth, and measures of faithfulness."""

from ce_plugin.evaluation.faithfulness import (
    FaithfulnessCurves,
    area_under_curve,
    insertion_deletion,
    pixel_order,
    reference_images,
)
from ce_plugin.evaluation.planted import PlantedNetwork, expected_effects

__all__ = [
    "FaithfulnessCurves",
    "PlantedNetwork",
    "area_under_curve",
    "expected_effects",
    "insertion_deletion",
    "pixel_order",
    "reference_images",
]
