"""What takes long and depends on no protocol: what our detectors learn from clean images, and what ML-LOO reads."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from benchmarks.detectors import MLLOO
from ce_plugin.detection import CausalEffectDetector
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.fitting import Learner, Lesson, Recipe, State
from ce_plugin.errors import CEPluginError


class RememberingMLLOO(MLLOO):
    """ML-LOO that runs each image once, whatever it is fitted on: the dispersions are the image's alone."""

    def __init__(self, network: nn.Module, *, cell: int | None = None) -> None:
        super().__init__(network, cell=cell)
        self._read: dict[bytes, Tensor] = {}

    def _of_image(self, image: Tensor, masks: Tensor) -> Tensor:
        key = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
        if key not in self._read:
            self._read[key] = super()._of_image(image, masks)
        return self._read[key]


class KeptLearner(Learner):
    """A learner that reads what it has learned before from a file, and writes what is new.

    Args:
        network: the classifier.
        folder: of the files.
        code: checksum of the detector's code.
    """

    def __init__(self, network: nn.Module, folder: Path, code: str) -> None:
        super().__init__()
        self.network, self.folder, self.code = network, folder, code

    def file(self, protected: ClassifierWrapper, recipe: Recipe, lesson: Lesson) -> Path:
        """Where it is kept what this lesson teaches."""
        clean = (lesson.holdout, sorted(lesson.names), protected.fingerprint(), self.code)
        words = repr((repr(replace(recipe, batch_size=1)), clean))
        return self.folder / f"{hashlib.blake2b(words.encode(), digest_size=8).hexdigest()}.ce"

    def learn(self, protected: ClassifierWrapper, recipe: Recipe, lesson: Lesson) -> State:
        """What the lesson's clean images teach."""
        file = self.file(protected, recipe, lesson)
        if file.is_file():
            try:
                return CausalEffectDetector.load(file, self.network).learned()
            except CEPluginError as error:
                print(f"{file.name} is not used: {error}", flush=True)
        state = super().learn(protected, recipe, lesson)
        detector = CausalEffectDetector(
            self.network,
            recipe.signature,
            holdout=lesson.holdout,
            benign=recipe.benign,
            aggregate=recipe.aggregate,
            seed=recipe.seed,
        )
        detector.restore(state)
        file.parent.mkdir(parents=True, exist_ok=True)
        detector.save(file, force=True)
        return state
