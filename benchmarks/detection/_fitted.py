"""Caches of slow steps that are the same for all protocols: fits to clean images, and the statistics of ML-LOO."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from benchmarks.detectors import MLLOO
from ce_plugin.detection import CausalEffectDetector
from ce_plugin.detection.checkpoint import Checkpoint
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.fitting import FitConfig, Fitter, Split, State
from ce_plugin.errors import CEPluginError


class RememberingMLLOO(MLLOO):
    """ML-LOO that runs each image only once, because its dispersions do not depend on the fit."""

    def __init__(self, network: nn.Module, *, cell: int | None = None) -> None:
        super().__init__(network, cell=cell)
        self._read: dict[bytes, Tensor] = {}

    def _of_image(self, image: Tensor, masks: Tensor) -> Tensor:
        key = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
        if key not in self._read:
            self._read[key] = super()._of_image(image, masks)
        return self._read[key]


class KeptFitter(Fitter):
    """A fitter that caches its results in files.

    Args:
        network: the classifier.
        folder: folder of the files.
        code: checksum of the detector's code.
    """

    def __init__(self, network: nn.Module, folder: Path, code: str) -> None:
        super().__init__()
        self.network, self.folder, self.code = network, folder, code

    def file(self, classifier: ClassifierWrapper, config: FitConfig, split: Split) -> Path:
        """File for the state fitted to this split."""
        clean = (split.holdout, sorted(split.hashes), classifier.fingerprint(), self.code)
        text = repr((repr(replace(config, batch_size=1)), clean))
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.ce"

    def fit(
        self, classifier: ClassifierWrapper, config: FitConfig, split: Split, checkpoint: Checkpoint | None = None
    ) -> State:
        """The state fitted to the clean images of a split."""
        file = self.file(classifier, config, split)
        if file.is_file():
            try:
                return CausalEffectDetector.load(file, self.network).learned()
            except CEPluginError as error:
                print(f"{file.name} is not used: {error}", flush=True)
        state = super().fit(classifier, config, split, checkpoint)
        detector = CausalEffectDetector(
            self.network,
            config.signature,
            holdout=split.holdout,
            augmentation=config.augmentation,
            aggregate=config.aggregate,
            seed=config.seed,
        )
        detector.restore(state)
        file.parent.mkdir(parents=True, exist_ok=True)
        detector.save(file, force=True)
        return state
