"""The methods of the package's registry on photographs of the benchmarks, and the peers' settings that are tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from benchmarks.faithfulness._forward import Engine
from ce_plugin.evaluation.methods import METHODS, Scene
from ce_plugin.models.vision import VisionModel

PASSES = 400
OURS = "causal-effect"


class Photograph(Protocol):
    """One photograph: (1, 3, 224, 224) in model units, its class index in the data set, the explained class."""

    @property
    def x(self) -> Tensor: ...
    @property
    def ident(self) -> int: ...
    @property
    def target(self) -> int: ...
    @property
    def model(self) -> VisionModel: ...
    @property
    def engine(self) -> Engine: ...


def scene_of(one: Photograph) -> Scene:
    """The package's description of a photograph; passes without gradients go through the engine."""
    model = one.model
    return Scene(one.x, one.target, model.model, model.normalization, one.ident, forward=one.engine.logits)


def peer(one: Photograph, passes: int = PASSES, *, name: str, **settings: Any) -> Tensor:
    """A method of the registry on a photograph: its map (224, 224)."""
    return METHODS[name](scene_of(one), passes, **settings)


# The settings that are tried on the choosing images; the registry's defaults are those chosen.
TRIED: dict[str, list[dict[str, Any]]] = {
    "occlusion": [
        {"window": side / 224, "baseline": fill}
        for side in (32, 48, 64, 72, 88, 104)
        for fill in ("zero", "mean", "blur")
    ],
    "rise": [{"cells": cells, "baseline": fill} for cells in (4, 5, 7, 10) for fill in ("zero", "mean")],
    "kernel-shap": [{"cells": cells, "baseline": fill} for cells in (4, 5, 7, 10) for fill in ("zero", "mean")],
    "lime": [{"cells": cells, "alpha": alpha} for cells in (4, 5, 7, 10) for alpha in (0.1, 1.0)],
    "grad-cam": [{"output": output} for output in ("logit", "probability")],
    "integrated-gradients": [{"baseline": fill} for fill in ("zero", "mean")],
    "smoothgrad": [{"sigma": sigma} for sigma in (0.1, 0.3, 0.6)],
    "saliency": [{"output": output} for output in ("logit", "probability")],
}  # fmt: skip


def tried() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method with settings to try, and the settings."""
    for name, several in TRIED.items():
        for settings in several:
            yield name, settings
