"""The attack that knows the detector: it fools the classifier and looks clean at once."""

from ce_plugin.detection.adaptive.attack import AdaptiveEvasion
from ce_plugin.detection.adaptive.objective import LOSSES
from ce_plugin.detection.adaptive.results import AdaptiveReport

__all__ = ["LOSSES", "AdaptiveEvasion", "AdaptiveReport"]
