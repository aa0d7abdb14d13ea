"""How good is an explanation (known effects, faithfulness, pointing, stability) or a detector (AUROC, false alarms)?"""

from ce_plugin.evaluation.comparison import MEASURES, Case, Comparison, Measure, box_share, compare
from ce_plugin.evaluation.detectors import (
    Alarms,
    Figures,
    Interval,
    Resampled,
    auroc,
    bootstrapped,
    false_alarms,
    figures,
    tpr_at_fpr,
)
from ce_plugin.evaluation.faithfulness import (
    FaithfulnessCurves,
    area_under_curve,
    insertion_deletion,
    pixel_order,
    reference_images,
)
from ce_plugin.evaluation.methods import (
    METHODS,
    Explanation,
    Method,
    Scene,
    attribution_method,
    explain,
    resolve_method,
)
from ce_plugin.evaluation.planted import (
    PlantedInteraction,
    PlantedMediation,
    PlantedNetwork,
    expected_effects,
    mediation_truth,
)
from ce_plugin.evaluation.pointing import Mosaics, confidently_classified, grid_pointing_game, mosaics, pointing_share
from ce_plugin.evaluation.quantus import quantus_explain_func, quantus_measure
from ce_plugin.evaluation.scenes import PlantedCase, PlantedScene, planted_scenes
from ce_plugin.evaluation.stability import map_stability, rank_correlation

__all__ = [
    "MEASURES",
    "METHODS",
    "Alarms",
    "Case",
    "Comparison",
    "Explanation",
    "FaithfulnessCurves",
    "Figures",
    "Interval",
    "Measure",
    "Method",
    "Mosaics",
    "PlantedCase",
    "PlantedInteraction",
    "PlantedMediation",
    "PlantedNetwork",
    "PlantedScene",
    "Resampled",
    "Scene",
    "area_under_curve",
    "attribution_method",
    "auroc",
    "bootstrapped",
    "box_share",
    "compare",
    "confidently_classified",
    "expected_effects",
    "explain",
    "false_alarms",
    "figures",
    "grid_pointing_game",
    "insertion_deletion",
    "map_stability",
    "mediation_truth",
    "mosaics",
    "pixel_order",
    "planted_scenes",
    "pointing_share",
    "quantus_explain_func",
    "quantus_measure",
    "rank_correlation",
    "reference_images",
    "resolve_method",
    "tpr_at_fpr",
]
