"""The adaptive attack: it knows the detector, fools the classifier and keeps the detector's score low."""

from ce_plugin.detection.adaptive.attack import AdaptiveEvasion
from ce_plugin.detection.adaptive.objective import LOSSES
from ce_plugin.detection.adaptive.results import AdaptiveReport

__all__ = ["LOSSES", "AdaptiveEvasion", "AdaptiveReport"]
