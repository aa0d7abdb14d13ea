"""Designs: which units are set in each trial."""

from ce_plugin.designs.base import Design
from ce_plugin.designs.exact import EveryUnit, Joint, LeaveOneIn, OneAtATime
from ce_plugin.designs.masks import RandomMask
from ce_plugin.designs.regions import RandomRegions, RandomWindows

__all__ = [
    "Design",
    "EveryUnit",
    "Joint",
    "LeaveOneIn",
    "OneAtATime",
    "RandomMask",
    "RandomRegions",
    "RandomWindows",
]
