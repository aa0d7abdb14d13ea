"""The detector: an `EvasionDetector` of ART that measures effects of interventions on the network's logits."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.defences.detector.evasion import EvasionDetector
from torch import Tensor

from ce_plugin._lazy import renamed_keywords
from ce_plugin._version import __version__
from ce_plugin.detection.augmentation import Augmentation
from ce_plugin.detection.calibration import Calibration
from ce_plugin.detection.checkpoint import Checkpoint, Tick
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.explanation import Alarm, explained
from ce_plugin.detection.fitting import FitConfig, Fitter, Split, State, attacked_versions, attacks_on, check_attack
from ce_plugin.detection.protocol import Array
from ce_plugin.detection.scorers import AGGREGATES, Scorer
from ce_plugin.detection.signature import Signature
from ce_plugin.errors import (
    ArgumentError,
    CEPluginError,
    FileError,
    InferenceError,
    InputError,
    ModelError,
    check_integer,
    check_number,
    expected,
    unknown_name,
)
from ce_plugin.files import damaged, load, save
from ce_plugin.interventions.base import NormalizationLike
from ce_plugin.networks.guard import state_guard

Scores = npt.NDArray[np.float64]

_KIND = "CausalEffectDetector"
# Changes when a file of an older version can no longer be read.
_FORMAT = 3
_STATE = "state."  # before the names of the state's tensors in a file
_REFIT = "Fit again: what is usual changes with the network."


class CausalEffectDetector(EvasionDetector):  # type: ignore[misc]
    """Detects adversarial images by the effects of interventions on them.

    An attack changes the network's answer by a perturbation of the image; interventions that remove the perturbation,
    or push back against it, then have effects that they do not have on clean images. The detector measures the effects
    of a :class:`~ce_plugin.detection.Signature` on the logits and scores for each of its probes how far they lie from
    those of clean images of the same predicted class (a Mahalanobis distance of effects standardised by class), how
    much more than usual an intervention takes from the predicted class's margin, and how little it leaves. These scores
    are added up. The threshold is split-conformal: it holds its false-alarm rate on clean images whatever their
    distribution. No adversarial images are needed.

    Args:
        classifier: an ART ``PyTorchClassifier``, or a network from images to logits (N, K).
        signature: what is measured; None takes :meth:`Signature.of` the images' shape.
        clip_values: least and greatest value of an image; None takes the classifier's, or (0, 1).
        normalization: what is done to an image before a network that does not do it itself.
        fpr: false-alarm rate on clean images at which :meth:`detect` flags, in (0, 1).
        holdout: share of the clean images that :meth:`fit` keeps for calibration.
        augmentation: harmless alterations that are no reason for an alarm; "default" fits their strength to the kind of
            images, None leaves them out.
        aggregate: how deviations become one score, see :func:`~ce_plugin.detection.scorers.aggregate`.
        attacks: attacks that :meth:`fit` runs on its images to learn from: presets ("fgsm", "bim", "pgd", "jsma"),
            :class:`~ce_plugin.interventions.Adversarial` interventions, or attacks of ART.
        seed: of everything random.

    Attributes:
        classifier: the classifier, from images in image units to logits.
        state: the fitted state; None before :meth:`fit`.

    Raises:
        ModelError: no network.
        ArgumentError, UnknownNameError: an option that cannot be.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
        >>> images = np.random.default_rng(0).random((90, 1, 8, 8), dtype=np.float32)
        >>> from ce_plugin.detection import CounterAttack
        >>> quick = Signature([CounterAttack()])  # leave it out: the default trains a denoiser, in half a minute
        >>> detector = CausalEffectDetector(network, quick)
        >>> detector.fit(images)
        >>> report, is_adversarial = detector.detect(images[:5])
        >>> sorted(report)
        ['groups', 'p_values', 'predictions', 'scores', 'threshold']
        >>> is_adversarial.shape
        (5,)

    Source: the interventions are those of Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 1, used for detection instead
    of explanation; the threshold is that of inductive conformal prediction (Vovk, Gammerman, Shafer 2005).
    """

    name = "CausalEffectDetector"
    defence_params = ["aggregate", "attacks", "augmentation", "fpr", "holdout", "seed", "signature"]  # noqa: RUF012

    @renamed_keywords(benign="augmentation")
    def __init__(
        self,
        classifier: object,
        signature: Signature | None = None,
        *,
        clip_values: tuple[float, float] | None = None,
        normalization: NormalizationLike = None,
        fpr: float = 0.05,
        holdout: float = 0.3,
        augmentation: Augmentation | str | None = "default",
        aggregate: str = "soft_square",
        attacks: Sequence[Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = ClassifierWrapper(classifier, clip_values, normalization)
        self.signature = signature
        self.fpr = fpr
        self.holdout = holdout
        self.augmentation = augmentation
        self.aggregate = aggregate
        self.attacks = attacks
        self.seed = seed
        self._check_params()
        self.state: State | None = None
        self._version: tuple[tuple[int, ...], ...] = ()
        self._fitter = Fitter()

    def _check_params(self) -> None:
        """Whether the options can be; ART calls it after `set_params`."""
        for name in ("fpr", "holdout"):
            check_number(name, getattr(self, name), "a float in (0, 1)", above=0, below=1)
        if self.aggregate not in AGGREGATES:
            raise unknown_name("aggregate", self.aggregate, AGGREGATES)
        if self.signature is not None and not isinstance(self.signature, Signature):
            raise ArgumentError(expected("signature", "a Signature or None", type(self.signature).__name__))
        is_word = self.augmentation is None or (isinstance(self.augmentation, str) and self.augmentation == "default")
        if not is_word and not isinstance(self.augmentation, Augmentation):
            wanted = 'an Augmentation, "default" or None'
            raise ArgumentError(expected("augmentation", wanted, repr(self.augmentation)))
        check_integer("seed", self.seed)
        if self.attacks is not None and (not isinstance(self.attacks, (list, tuple)) or not self.attacks):
            hint = f"Write attacks=[{self.attacks!r}]." if isinstance(self.attacks, str) else ""
            raise ArgumentError(expected("attacks", "a list of attacks, or None", repr(self.attacks), hint))
        for one in self.attacks or ():
            check_attack(one)

    @property
    def protected(self) -> ClassifierWrapper:
        """The old name of :attr:`classifier`; it will be removed in the next version."""
        return self.classifier

    @renamed_keywords(benign="augmentation")
    def set_params(self, **kwargs: Any) -> None:
        """Change options; a change of any but ``fpr`` undoes the fit.

        Args:
            kwargs: options among :attr:`defence_params`.

        Raises:
            UnknownNameError: another name.
            ArgumentError: a value that cannot be; nothing is changed then.

        Example:
            >>> detector = CausalEffectDetector(torch.nn.Flatten())
            >>> detector.set_params(**{**detector.get_params(), "fpr": 0.01})
            >>> detector.fpr
            0.01
        """
        unknown = next((name for name in kwargs if name not in self.defence_params), None)
        if unknown is not None:
            raise unknown_name("params", unknown, self.defence_params)
        before = self.get_params()
        try:
            super().set_params(**kwargs)
        except (ArgumentError, ValueError):
            self.__dict__.update(before)
            raise
        for name, value in kwargs.items():
            if name != "fpr" and value is not before[name] and not bool(value == before[name]):
                self.state = None

    def __sklearn_clone__(self) -> CausalEffectDetector:
        """The same options and classifier, not fitted: what ``sklearn.base.clone`` (1.3 and later) returns.

        Example:
            >>> from sklearn.base import clone
            >>> clone(CausalEffectDetector(torch.nn.Flatten(), fpr=0.01)).fpr
            0.01
        """
        fresh = copy.copy(self)
        fresh.state, fresh._version, fresh._fitter = None, (), Fitter()
        return fresh

    @property
    def passes(self) -> float:
        """Forward passes for one image, a backward pass counting two; before :meth:`fit`, those of small images."""
        signature = self.signature if self.state is None else self.state.signature
        return (signature or Signature.small_images()).passes

    def fit(
        self,
        x: Array,
        y: npt.ArrayLike | None = None,
        batch_size: int = 128,
        nb_epochs: int = 20,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Tick | None = None,
        **kwargs: Any,
    ) -> None:
        """Learn what effects are like on clean images, and calibrate on those that are held out.

        Args:
            x: images (N, C, H, W), floating point, in image units.
            y: None: all are clean. Else 0 for clean and 1 for adversarial, (N,), (N, 1) or one-hot (N, 2).
            batch_size: images at a time; the result does not depend on it.
            nb_epochs: of what the signature trains, the denoiser; that takes at least its ``least_steps``, see
                :meth:`training_steps`.
            checkpoint: a folder, in which each stage of the fit is saved, and its training every 50 steps: a fit that
                was interrupted goes on from there as if it had not been, with the same settings and images. Delete it
                at the end.
            progress: called with the name of what is done, and how many steps of 64 images of it.
            kwargs: of ART's interface, not used.

        Raises:
            InputError: images or labels that cannot be used, too few clean images, or all of one predicted class.
            ArgumentError: too few images are held out for ``fpr``; ``signature`` or ``augmentation`` was made for
                images in another range than the clip values; a checkpoint of a fit with other settings or images.
            ModelError: a checkpoint of a fit on another network.
            FileError: the checkpoint is none, or cannot be written.
        """
        check_integer("batch_size", batch_size, "a positive whole number", least=1)
        check_integer("nb_epochs", nb_epochs, "a positive whole number", least=1)
        images = self.classifier.images(x)
        split = Split.of(images, y, self.holdout, self.seed)
        shape, clip_values = tuple(images.shape[1:]), self.classifier.clip_values
        signature = self.signature or Signature.of(shape, clip_values)
        augmentation = self.augmentation
        if isinstance(augmentation, str):
            augmentation = Augmentation.of(shape, clip_values)
        config = FitConfig(signature, augmentation, self.aggregate, self.seed, batch_size, nb_epochs)
        # Errors come before the work.
        attacks = attacks_on(self.classifier, self.attacks or (), batch_size)
        config.check(clip_values)
        split.check(self.classifier, batch_size)
        Calibration(np.zeros(int(split.held_out.sum()))).threshold(self.fpr)
        asked = {} if checkpoint is None else config.settings(self.classifier, split, attacks)
        saved = Checkpoint(checkpoint, asked, progress)
        state, attacked = self._fitter.fit(self.classifier, config, split, saved), split.attacked
        if attacks:
            parts = []
            for i, one in enumerate(attacks):
                name = f"attack {i + 1} {one.config.name}"
                parts.append(attacked_versions(self.classifier, one, split.to_fit, batch_size, saved, name))
            made = torch.cat(parts)
            if not len(made):
                wanted, hint = "attacks that turn some image over", "Take a stronger attack, or a larger eps."
                raise InputError(expected("attacks", wanted, f"none of {len(split.to_fit)}", hint))
            attacked = made if attacked is None else torch.cat([attacked, made])
        if attacked is not None:
            state = state.with_attacks(self.classifier, attacked, batch_size, saved)
        self.restore(state)

    def training_steps(self, n_images: int, shape: Sequence[int], nb_epochs: int = 20) -> dict[str, int]:
        """Steps of 64 images that each probe trains for in :meth:`fit`: those of the epochs, and at least a minimum.

        Args:
            n_images: clean images, those held out included.
            shape: of an image, (C, H, W).
            nb_epochs: as for :meth:`fit`.

        Returns:
            Name of a probe -> steps; probes that train nothing are left out.

        Example:
            >>> detector = CausalEffectDetector(torch.nn.Flatten())
            >>> detector.training_steps(120, (1, 8, 8), nb_epochs=3)  # `Denoising(least_steps=800)`
            {'denoising': 800}
        """
        check_integer("n_images", n_images, least=1)
        check_integer("nb_epochs", nb_epochs, "a positive whole number", least=1)
        signature = self.signature or Signature.of(shape, self.classifier.clip_values)
        n_fit = n_images - round(self.holdout * n_images)
        steps = {probe.name: probe.training_steps(n_fit, nb_epochs) for probe in signature.probes}
        return {name: count for name, count in steps.items() if count}

    def teach(self, x: Array, batch_size: int = 128) -> None:
        """Learn to recognise attacked images like these, after :meth:`fit`; those of an earlier call are forgotten.

        They should be no versions of images that calibrate the detector; ``fit(x, y)`` leaves such out.

        Args:
            x: adversarial images (N, C, H, W), image units.
            batch_size: images at a time.

        Raises:
            InferenceError: the detector is not fitted.
            ModelError: the network has changed since.
            InputError: images that cannot be used.
        """
        state, images = self._inputs(x, batch_size)
        self.restore(state.with_attacks(self.classifier, images, batch_size))

    def restore(self, state: State) -> None:
        """Take over a fitted state: :attr:`state` of this detector or of another one on the same network.

        Raises:
            ArgumentError: it is none.
        """
        given: object = state
        if not isinstance(given, State):
            hint = "`learned()` of a fitted detector gives it."
            raise ArgumentError(expected("state", "the fitted state of a detector", type(given).__name__, hint))
        self.state, self._version = state, self.classifier.version()

    def learned(self, *, quick: bool = False) -> State:
        """The fitted state, checked against the network.

        Args:
            quick: hash the network's parameters only where autograd's version counters have changed.

        Raises:
            InferenceError: not fitted.
            ModelError: the network is not the one that the detector was fitted on.
        """
        if self.state is None:
            hint = "Call `fit(x)` with clean images first."
            raise InferenceError(expected("detector", "a fitted one", "one that is not fitted", hint))
        version = self.classifier.version()
        if not quick or version != self._version:
            if self.classifier.fingerprint() != self.state.fingerprint:
                wanted = "the network that the detector was fitted on"
                raise ModelError(expected("classifier", wanted, "another", _REFIT))
            self._version = version
        return self.state

    def _inputs(self, x: Array, batch_size: int) -> tuple[State, Tensor]:
        """The fitted state, and the user's images, checked."""
        state = self.learned()
        check_integer("batch_size", batch_size, "a positive whole number", least=1)
        return state, self.classifier.images(x, state.shape)

    def score(self, x: Array, batch_size: int = 128) -> Scores:
        """How adversarial images look: greater is more so.

        Args:
            x: images (N, C, H, W), image units.
            batch_size: images at a time; the scores do not depend on it.

        Returns:
            (N,), float64.

        Raises:
            InferenceError: the detector is not fitted.
            ModelError: the network has changed since.
            InputError: images that cannot be used.
        """
        state, images = self._inputs(x, batch_size)
        sample = state.measure(self.classifier, images, batch_size)
        scores: Scores = state.scorer.score(state.scorer.deviations(sample)).numpy()
        return scores

    def decision_function(self, x: Array) -> Scores:
        """Score minus threshold, (N,): above zero is flagged; ready for scikit-learn's metrics with 1 = adversarial."""
        return self.score(x) - self.threshold

    @property
    def threshold(self) -> float:
        """Scores above it are flagged, at the false-alarm rate ``fpr``."""
        return self.learned(quick=True).calibration.threshold(self.fpr)

    def detect(
        self, x: Array, batch_size: int = 128, *, explain: bool = False, layer: str | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], npt.NDArray[np.bool_]]:
        """Flag adversarial images.

        Args:
            x: images (N, C, H, W), image units.
            batch_size: images at a time; nothing depends on it.
            explain: add an explanation of each flagged image.
            layer: dotted name of a layer whose channels the explanation names.
            kwargs: of ART's interface, not used.

        Returns:
            The report, and which images are flagged, (N,), bool. The report holds ``scores`` (N,), conformal
            ``p_values`` (N,), ``threshold``, ``predictions`` (N,), ``groups`` {name: (N,)}, how unusual each
            probe's response is in standard deviations of clean images, and with ``explain`` ``explanations``, one
            :class:`~ce_plugin.detection.Alarm` or None for each.

        Raises:
            InferenceError: the detector is not fitted.
            ModelError: the network has changed since.
            InputError: images that cannot be used.
        """
        state, images = self._inputs(x, batch_size)
        if repr(explain) not in ("True", "False"):
            raise ArgumentError(expected("explain", "True or False", repr(explain)))
        if layer is not None:
            self.classifier.module(layer)  # an unknown name is an error before the work
        threshold = state.calibration.threshold(self.fpr)
        sample = state.measure(self.classifier, images, batch_size)
        deviations = state.scorer.deviations(sample)
        scores: Scores = state.scorer.score(deviations).numpy()
        flagged = scores > threshold
        columns = state.by_column(deviations)
        report: dict[str, Any] = {
            "scores": scores,
            "p_values": state.calibration.p_values(scores),
            "threshold": threshold,
            "predictions": sample.predicted.numpy(),
            "groups": columns,
        }
        if explain:
            alarms: list[Alarm | None] = [None] * len(images)
            for i in np.flatnonzero(flagged).tolist():
                one, found = slice(i, i + 1), {name: float(values[i]) for name, values in columns.items()}
                alarms[i] = explained(self.classifier, state, sample.select(one), images[one], found, layer)
            report["explanations"] = alarms
        return report, flagged

    def calibrate(self, x: Array, fpr: float | None = None, batch_size: int = 128) -> Calibration:
        """Calibrate on other clean images than those held out by :meth:`fit`.

        Args:
            x: clean images (N, C, H, W) that the detector was not fitted on.
            fpr: false-alarm rate from now on; None keeps it.
            batch_size: images at a time.

        Returns:
            The calibration; its ``realised_interval(fpr)`` says where the true false-alarm rate lies.

        Raises:
            InputError: an image is among those that the detector was fitted on.
            ArgumentError: these images are too few for the false-alarm rate.
        """
        rate = self.fpr if fpr is None else check_number("fpr", fpr, "a float in (0, 1)", above=0, below=1)
        state, images = self._inputs(x, batch_size)
        Calibration(np.zeros(len(images))).threshold(rate)  # too few images are an error before the work
        state = state.recalibrated(self.classifier, images, batch_size)
        self.state, self.fpr = state, rate
        return state.calibration

    def score_tensor(self, images: Tensor) -> Tensor:
        """The scores (N,), with a gradient with respect to the images: what an attacker lowers.

        Args:
            images: (N, C, H, W), image units.

        Raises:
            InferenceError: not fitted.
            InputError: no images of the shape that it was fitted on.
            ArgumentError: a probe of the signature has no gradient.
        """
        state = self.learned(quick=True)
        wanted = f"a tensor (N, {', '.join(map(str, state.shape))}) of floating point"
        if not isinstance(images, Tensor) or tuple(images.shape[1:]) != state.shape or not images.is_floating_point():
            got = (
                f"shape {tuple(images.shape)} of {images.dtype}"
                if isinstance(images, Tensor)
                else type(images).__name__
            )
            raise InputError(expected("images", wanted, got))
        return state.score_tensor(self.classifier, images)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write what was learned to a file, without the network and without pickled code.

        Options are kept as well; of ``attacks`` only presets, which have names (what was learned from them is kept in
        any case).

        Args:
            path: the file.
            force: replace a file that exists.

        Raises:
            InferenceError: not fitted.
            FileError: the file exists, or cannot be written.
        """
        state, attacks, augmentation = self.learned(), self.attacks, self.augmentation
        if attacks is not None and not all(isinstance(one, str) for one in attacks):
            attacks = None  # no file holds an attack
        content: dict[str, Any] = {
            "file_format": _FORMAT,
            "versions": {"ce_plugin": __version__, "torch": str(torch.__version__)},
            "fingerprint": state.fingerprint,
            "shape": list(state.shape),
            "clip_values": list(self.classifier.clip_values),
            "probes": state.signature.settings(),
            "own_signature": self.signature is not None,
            "columns": state.columns,
            "sides": [scorer.sides for scorer in state.scorer.probes],
            "aggregate": self.aggregate,
            "fpr": float(self.fpr),
            "holdout": float(self.holdout),
            "seed": int(self.seed),  # JSON knows no number of numpy
            "augmentation": asdict(augmentation) if isinstance(augmentation, Augmentation) else augmentation,
            "attacks": attacks,
            "seen": torch.tensor(sorted(state.seen), dtype=torch.int64),
            "test_logits": self.classifier.test_logits(state.shape),
            **state.state_dict(prefix=_STATE),
        }
        return save(path, _KIND, 1, content, force=force)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], classifier: object, *, normalization: NormalizationLike = None
    ) -> CausalEffectDetector:
        """The detector in a file, on the classifier that it was fitted on.

        Probes of your own must be known: import the module that defines them first.

        Args:
            path: the file.
            classifier, normalization: as for the constructor.

        Raises:
            FileError: no such file, not one of a detector or of a format that this version does not read, or a probe
                of a kind that is not defined.
            ModelError: another classifier.
        """
        content = load(path, _KIND, 1)
        if content["file_format"] != _FORMAT:
            hint = f"Fit again, or use ce_plugin {content['versions']['ce_plugin']}."
            got = f"format {content['file_format']}"
            raise FileError(expected("path", f"a file of format {_FORMAT}", got, hint))
        try:
            with state_guard():  # modules draw the weights that the file's take the place of
                detector = cls._stored(content, classifier, normalization)
            _check_network(detector.classifier, content)
        except CEPluginError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise damaged(path, f"a file written by {_KIND}.save", error) from error
        return detector

    @classmethod
    def _stored(
        cls, content: dict[str, Any], classifier: object, normalization: NormalizationLike
    ) -> CausalEffectDetector:
        """The detector of the content of a file."""
        augmentation = content["augmentation"]
        if isinstance(augmentation, dict):
            augmentation = Augmentation(**{**augmentation, "value_range": tuple(augmentation["value_range"])})
        detector = cls(
            classifier,
            Signature.from_settings(content["probes"]) if content["own_signature"] else None,
            clip_values=tuple(content["clip_values"]),
            normalization=normalization,
            fpr=content["fpr"],
            holdout=content["holdout"],
            augmentation=augmentation,
            aggregate=content["aggregate"],
            attacks=content["attacks"],
            seed=content["seed"],
        )
        detector.restore(_stored_state(content))
        return detector

    @property
    def calibration(self) -> Calibration | None:
        """Scores of the held-out images; None before :meth:`fit`."""
        return None if self.state is None else self.state.calibration

    def __repr__(self) -> str:
        state = "not fitted" if self.state is None else repr(self.calibration)
        return f"CausalEffectDetector({state}, fpr={self.fpr:g}, passes={self.passes:g})"


def _stored_state(content: dict[str, Any]) -> State:
    """The state in a file of :meth:`CausalEffectDetector.save`."""
    signature, shape = Signature.from_settings(content["probes"]), tuple(content["shape"])
    for probe in signature.probes:
        probe.allocate(shape, tuple(content["clip_values"]))
    tensors = {name.removeprefix(_STATE): value for name, value in content.items() if name.startswith(_STATE)}
    attacks = tensors.get("scorer.attacks.mean")
    state = State(
        signature,
        Scorer(content["aggregate"], content["sides"], None if attacks is None else len(attacks)),
        columns=content["columns"],
        shape=shape,
        seen=frozenset(content["seen"].tolist()),
        fingerprint=content["fingerprint"],
        seed=content["seed"],
    )
    state.load_state_dict(tensors, assign=True)
    return state.calibrate(state.held_out, state.features)


def _check_network(classifier: ClassifierWrapper, content: dict[str, Any]) -> None:
    """Whether the classifier is the one that the detector was fitted on, its normalisation included."""
    wanted = "the network that the detector was fitted on"
    if classifier.fingerprint() != content["fingerprint"]:
        raise ModelError(expected("classifier", wanted, "one with other parameters", _REFIT))
    here, there = classifier.test_logits(tuple(content["shape"])), content["test_logits"]
    if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-2, atol=1e-2 * float(there.abs().max())):
        hint = "Pass the same normalization= and the same preprocessing."
        raise ModelError(expected("classifier", wanted, "one that answers a test image otherwise", hint))
