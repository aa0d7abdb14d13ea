"""The detector: an `EvasionDetector` of ART that judges an image by what interventions do to the network's answer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from art.defences.detector.evasion import EvasionDetector
from torch import Tensor

from ce_plugin._version import __version__
from ce_plugin.detection.benign import Benign
from ce_plugin.detection.calibration import Calibration
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.explanation import Alarm, explained
from ce_plugin.detection.fitting import Learner, Lesson, Recipe, State, attacked, check_enough
from ce_plugin.detection.protocol import Array
from ce_plugin.detection.scorers import AGGREGATES, Fitted
from ce_plugin.detection.signature import Signature, checked_count
from ce_plugin.errors import ArgumentError, FileError, InferenceError, ModelError, expected, unknown_name
from ce_plugin.files import load, save
from ce_plugin.interventions.base import NormalizationLike
from ce_plugin.networks.forward import load_art

__all__ = [
    "CausalEffectDetector",
    "check_options",
    "check_ranges",
    "read_detector",
    "same_option",
    "write_detector",
]


_KIND = "CausalEffectDetector"
# Changes when a file of an older version can no longer be read.
_FORMAT = 2


def write_detector(path: str | os.PathLike[str], detector: CausalEffectDetector, *, force: bool = False) -> Path:
    """Write what a fitted detector has learned; see :meth:`CausalEffectDetector.save`."""
    state = detector.learned()
    values: dict[str, Any] = {
        "file_format": _FORMAT,
        "versions": {"ce_plugin": __version__, "torch": str(torch.__version__)},
        "fingerprint": state.fingerprint,
        "shape": list(state.shape),
        "clip_values": list(detector.protected.clip_values),
        "groups": state.signature.settings(),
        "own_signature": detector.signature is not None,
        "aggregate": detector.aggregate,
        "fpr": float(detector.fpr),
        "holdout": float(detector.holdout),
        "seed": int(detector.seed),  # JSON knows no number of numpy
        "benign": asdict(detector.benign) if isinstance(detector.benign, Benign) else detector.benign,
        "attacks": _named(detector.attacks),
        "held": state.held,
        "traits": state.traits,
        "seen": torch.tensor(sorted(state.seen), dtype=torch.int64),
        "probe": detector.protected.probe(state.shape),
        **{f"fitted/{key}": value for key, value in state.fitted.tensors().items()},
        **{f"signature/{key}": value for key, value in state.signature.tensors().items()},
    }
    return save(path, _KIND, 1, values, force=force)


def read_detector(
    path: str | os.PathLike[str], kind: type[CausalEffectDetector], classifier: object, normalization: NormalizationLike
) -> CausalEffectDetector:
    """The detector in a file; see :meth:`CausalEffectDetector.load`."""
    values = load(path, _KIND, 1)
    if values["file_format"] != _FORMAT:
        hint = f"Fit again, or use ce_plugin {values['versions']['ce_plugin']}."
        got = f"format {values['file_format']}"
        raise FileError(expected("path", f"a file of format {_FORMAT}", got, hint))
    signature = Signature.from_settings(values["groups"])
    benign = values["benign"]
    detector = kind(
        classifier,
        signature if values["own_signature"] else None,
        clip_values=tuple(values["clip_values"]),
        normalization=normalization,
        fpr=values["fpr"],
        holdout=values["holdout"],
        benign=Benign(**{**benign, "value_range": tuple(benign["value_range"])})
        if isinstance(benign, dict)
        else benign,
        aggregate=values["aggregate"],
        attacks=values.get("attacks"),  # files of older versions have none
        seed=values["seed"],
    )
    _check_network(detector, values)
    learned = signature.with_tensors(_inside("signature/", values))
    fitted = Fitted.from_tensors(signature.names, _inside("fitted/", values), values["aggregate"])
    shape, seen = tuple(values["shape"]), frozenset(values["seen"].tolist())
    held = values["held"], values["traits"]
    detector.restore(State(fitted, learned, *held, shape, seen, values["fingerprint"], values["seed"]))
    return detector


def _check_network(detector: CausalEffectDetector, values: dict[str, Any]) -> None:
    """Whether the classifier is the one that the detector was fitted on, its normalisation included."""
    wanted = "the network that the detector was fitted on"
    if detector.protected.fingerprint() != values["fingerprint"]:
        hint = "Fit again: what is usual changes with the network."
        raise ModelError(expected("classifier", wanted, "one with other parameters", hint))
    here, there = detector.protected.probe(tuple(values["shape"])), values["probe"]
    if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-2, atol=1e-2 * float(there.abs().max())):
        hint = "Pass the same normalization= and the same preprocessing."
        raise ModelError(expected("classifier", wanted, "one that answers a test image otherwise", hint))


def _named(attacks: Sequence[Any] | None) -> list[str] | None:
    """Attacks that :meth:`CausalEffectDetector.fit` would run again, where they are names: no file holds an attack."""
    if attacks is None or not all(isinstance(one, str) for one in attacks):
        return None
    return list(attacks)


def _inside(start: str, values: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def check_options(options: Mapping[str, Any]) -> None:
    """Whether the options of :class:`CausalEffectDetector` can be.

    Args:
        options: by name.

    Raises:
        ArgumentError, UnknownNameError: the first that cannot.
    """
    for name in ("fpr", "holdout"):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ArgumentError(expected(name, "a float in (0, 1)", repr(value)))
    if options["aggregate"] not in AGGREGATES:
        raise unknown_name("aggregate", options["aggregate"], AGGREGATES)
    signature, benign, seed, attacks = (options[name] for name in ("signature", "benign", "seed", "attacks"))
    if signature is not None and not isinstance(signature, Signature):
        raise ArgumentError(expected("signature", "a Signature or None", type(signature).__name__))
    if benign not in (None, "default") and not isinstance(benign, Benign):
        raise ArgumentError(expected("benign", 'a Benign, "default" or None', repr(benign)))
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ArgumentError(expected("seed", "a whole number", repr(seed)))
    if attacks is not None and (not isinstance(attacks, (list, tuple)) or not attacks):
        raise ArgumentError(expected("attacks", "a list of attacks, or None", repr(attacks)))


def check_ranges(signature: Signature, benign: Benign | None, clip_values: tuple[float, float]) -> None:
    """Whether what alters images was made for images in this range of values.

    Raises:
        ArgumentError: a group's interventions, or the harmless alterations, were made for another one.
    """
    made_for = [("signature", values) for group in signature.groups for values in group.ranges()]
    if benign is not None:
        made_for.append(("benign", benign.value_range))
    for name, values in made_for:
        if tuple(values) != clip_values:
            hint = "Pass its `value_range=`, and sizes in the same units; or leave it out for the default."
            raise ArgumentError(expected(name, f"made for the clip values, {clip_values}", tuple(values), hint))


def same_option(mine: object, theirs: object) -> bool:
    """Whether an option keeps its value."""
    return mine is theirs or bool(mine == theirs)


load_art()


Scores = npt.NDArray[np.float64]


class CausalEffectDetector(EvasionDetector):  # type: ignore[misc]
    """Tells adversarial images by the effects of interventions on them.

    An attack moves the network's answer with what it put into the image; interventions that take it out, or push back,
    then have effects that they do not have on clean images. The detector measures the effects of a
    :class:`~ce_plugin.detection.Signature` on the logits and asks for each group of interventions how far they lie
    from those of clean images of the same predicted class (a Mahalanobis distance of effects standardised by class),
    how much more than usual an intervention takes from the predicted class's margin, and how little it leaves. What is
    unusual is added up. The threshold is split-conformal: it holds its false-alarm rate on clean images whatever their
    distribution. No adversarial images are needed.

    Args:
        classifier: an ART ``PyTorchClassifier``, or a network from images to logits (N, K).
        signature: what is measured; None takes :meth:`Signature.of` the images' shape.
        clip_values: least and greatest value of an image; None takes the classifier's, or (0, 1).
        normalization: what is done to an image before a network that does not do it itself.
        fpr: false-alarm rate on clean images at which :meth:`detect` flags, in (0, 1).
        holdout: share of the clean images that :meth:`fit` keeps for calibration.
        benign: harmless alterations that are no reason for an alarm; "default" fits their strength to the kind of
            images, None leaves them out.
        aggregate: how groups become one score, see :func:`~ce_plugin.detection.scorers.aggregate`.
        attacks: attacks that :meth:`fit` runs on its images to learn from: presets ("fgsm", "bim", "pgd", "jsma"),
            :class:`~ce_plugin.interventions.Adversarial` interventions, or attacks of ART.
        seed: of everything random.

    Attributes:
        state: what was learned; None before :meth:`fit`.

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

    Source: the interventions are those of Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 1, turned from explaining to
    telling apart; the threshold is that of inductive conformal prediction (Vovk, Gammerman, Shafer 2005).
    """

    name = "CausalEffectDetector"
    defence_params = ["aggregate", "attacks", "benign", "fpr", "holdout", "seed", "signature"]  # noqa: RUF012

    def __init__(
        self,
        classifier: object,
        signature: Signature | None = None,
        *,
        clip_values: tuple[float, float] | None = None,
        normalization: NormalizationLike = None,
        fpr: float = 0.05,
        holdout: float = 0.3,
        benign: Benign | str | None = "default",
        aggregate: str = "soft_square",
        attacks: Sequence[Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.protected = ClassifierWrapper(classifier, clip_values, normalization)
        self.signature = signature
        self.fpr = fpr
        self.holdout = holdout
        self.benign = benign
        self.aggregate = aggregate
        self.attacks = attacks
        self.seed = seed
        self._check_params()
        self.state: State | None = None
        self._version: tuple[tuple[int, ...], ...] = ()
        self._learner = Learner()

    def _check_params(self) -> None:
        """Whether the options can be; ART calls it after `set_params`."""
        check_options(self.get_params())

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
        if any(name != "fpr" and not same_option(before[name], value) for name, value in kwargs.items()):
            self.state = None

    @property
    def passes(self) -> float:
        """Forward passes for one image, a backward pass counting two; before :meth:`fit`, those of small images."""
        signature = self.signature if self.state is None else self.state.signature
        return (signature or Signature.small_images()).passes

    def fit(
        self, x: Array, y: npt.ArrayLike | None = None, batch_size: int = 128, nb_epochs: int = 20, **kwargs: Any
    ) -> None:
        """Learn what effects are like on clean images, and calibrate on those that are held out.

        Args:
            x: images (N, C, H, W), floating point, in image units.
            y: None: all are clean. Else 0 for clean and 1 for adversarial, (N,), (N, 1) or one-hot (N, 2).
            batch_size: images at a time; the result does not depend on it.
            nb_epochs: of what the signature trains, the denoiser.
            kwargs: of ART's interface, not used.

        Raises:
            InputError: images or labels that cannot be used, too few clean images, or all of one predicted class.
            ArgumentError: too few images are held out for ``fpr``; ``signature`` or ``benign`` was made for images in
                another range than the clip values.
        """
        images = self.protected.images(x)
        lesson = Lesson.of(images, y, self.holdout, self.seed)
        size, epochs = checked_count("batch_size", batch_size), checked_count("nb_epochs", nb_epochs)
        shape, clip_values = tuple(images.shape[1:]), self.protected.clip_values
        signature = self.signature or Signature.of(shape, clip_values)
        benign = Benign.of(shape, clip_values) if isinstance(self.benign, str) else self.benign
        # Errors come before the work.
        check_ranges(signature, benign, clip_values)
        check_enough(self.protected, lesson.clean, lesson.kept, size)
        Calibration(np.zeros(int(lesson.kept.sum()))).threshold(self.fpr)
        recipe = Recipe(signature, benign, self.aggregate, self.seed, size, epochs)
        state, taught = self._learner.learn(self.protected, recipe, lesson), lesson.adversarial
        if self.attacks is not None:
            made = attacked(self.protected, self.attacks, lesson.fitted, size)
            taught = made if taught is None else torch.cat([taught, made])
        if taught is not None:
            state = state.taught(self.protected, taught, size)
        self.restore(state)

    def teach(self, x: Array, batch_size: int = 128) -> None:
        """Learn to recognise attacked images like these, after :meth:`fit`; what was taught before is forgotten.

        They should be no versions of images that calibrate the detector; ``fit(x, y)`` leaves such out.

        Args:
            x: adversarial images (N, C, H, W), image units.
            batch_size: images at a time.

        Raises:
            InferenceError: the detector is not fitted.
            ModelError: the network has changed since.
            InputError: images that cannot be used.
        """
        state, size = self.learned(), checked_count("batch_size", batch_size)
        self.restore(state.taught(self.protected, state.checked(self.protected, x), size))

    def restore(self, state: State) -> None:
        """Take over what was learned; :attr:`state` of this detector or of another one on the same network."""
        self.state, self._version = state, self.protected.version()

    def learned(self, *, quick: bool = False) -> State:
        """What was learned.

        Args:
            quick: look at the network's parameters only where autograd says that they were written to.

        Raises:
            InferenceError: nothing was.
            ModelError: the network is not the one that it was learned on.
        """
        if self.state is None:
            hint = "Call `fit(x)` with clean images first."
            raise InferenceError(expected("detector", "a fitted one", "one that is not fitted", hint))
        version = self.protected.version()
        if not quick or version != self._version:
            if self.protected.fingerprint() != self.state.fingerprint:
                hint = "Fit again: what is usual changes with the network."
                raise ModelError(expected("classifier", "the network that the detector was fitted on", "another", hint))
            self._version = version
        return self.state

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
        state, size = self.learned(), checked_count("batch_size", batch_size)
        images = state.checked(self.protected, x)
        return state.scores(self.protected, images, size)

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
            explain: say for each flagged image what raised the alarm.
            layer: dotted name of a layer whose channels the explanation names.
            kwargs: of ART's interface, not used.

        Returns:
            The report, and which images are flagged, (N,), bool. The report holds ``scores`` (N,), conformal
            ``p_values`` (N,), ``threshold``, ``predictions`` (N,), ``groups`` {name: (N,)}, the groups' standardised
            distances, and with ``explain`` ``explanations``, one :class:`~ce_plugin.detection.Alarm` or None for each.

        Raises:
            InferenceError: the detector is not fitted.
            ModelError: the network has changed since.
            InputError: images that cannot be used.
        """
        state, size = self.learned(), checked_count("batch_size", batch_size)
        images = state.checked(self.protected, x)
        if explain and layer is not None:
            self.protected.module(layer)  # an unknown name is an error before the work
        threshold = self.threshold
        sample = state.measured(self.protected, images, size)
        deviations = state.fitted.deviations(sample)
        scores: Scores = state.fitted.score(deviations).numpy()
        flagged = scores > threshold
        report: dict[str, Any] = {
            "scores": scores,
            "p_values": state.calibration.p_values(scores),
            "threshold": threshold,
            "predictions": sample.predicted.numpy(),
            "groups": state.groups(deviations),
        }
        if explain:
            alarms: list[Alarm | None] = [None] * len(images)
            for i in np.flatnonzero(flagged).tolist():
                one = slice(i, i + 1)
                alarms[i] = explained(self.protected, state, sample.select(one), images[one], deviations[i], layer)
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
        state, size = self.learned(), checked_count("batch_size", batch_size)
        state = state.recalibrated(self.protected, state.checked(self.protected, x), size)
        rate = self.fpr if fpr is None else fpr
        state.calibration.threshold(rate)
        self.state, self.fpr = state, rate
        return state.calibration

    def score_tensor(self, images: Tensor) -> Tensor:
        """The scores (N,), with a gradient with respect to the images: what an attacker lowers.

        Args:
            images: (N, C, H, W), image units.

        Raises:
            InferenceError: not fitted.
            ArgumentError: a group of the signature has no gradient.
        """
        return self.learned(quick=True).score_tensor(self.protected, images)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write what was learned to a file, without the network and without pickled code.

        Options are kept as well; of ``attacks`` only presets, which have names (what they taught is kept in any case).

        Args:
            path: the file.
            force: replace a file that exists.

        Raises:
            InferenceError: not fitted.
            FileError: the file exists, or cannot be written.
        """
        self.learned()
        return write_detector(path, self, force=force)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], classifier: object, *, normalization: NormalizationLike = None
    ) -> CausalEffectDetector:
        """The detector in a file, on the classifier that it was fitted on.

        Args:
            path: the file.
            classifier, normalization: as for the constructor.

        Raises:
            FileError: no such file, or not one of a detector.
            ModelError: another classifier.
        """
        return read_detector(path, cls, classifier, normalization)

    @property
    def calibration(self) -> Calibration | None:
        """Scores of the held-out images; None before :meth:`fit`."""
        return None if self.state is None else self.state.calibration

    def __repr__(self) -> str:
        state = "not fitted" if self.state is None else repr(self.calibration)
        return f"CausalEffectDetector({state}, fpr={self.fpr:g}, passes={self.passes:g})"
