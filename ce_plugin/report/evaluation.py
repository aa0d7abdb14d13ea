"""The page of a detector's evaluation: attacks that it is tried against, and what it detects; the demo's digits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ce_plugin.datasets import digits
from ce_plugin.errors import InputError, expected, unknown_name
from ce_plugin.files import data_frame, table_files
from ce_plugin.interventions.adversarial import Adversarial
from ce_plugin.models import DigitsCNN, VisionModel
from ce_plugin.randomness import generator
from ce_plugin.report.alarms import AlarmShown, Screened, alarm_shown, explained, scored
from ce_plugin.report.photograph import ATTACKS, share
from ce_plugin.report.sections import Section, save_page
from ce_plugin.visualization import data_uri, plot_roc, plot_scores

if TYPE_CHECKING:
    from ce_plugin.detection import Calibration, CausalEffectDetector, Rate
    from ce_plugin.detection.checkpoint import Checkpoint
    from ce_plugin.evaluation import Figures

# With fewer successful attacks no AUROC is given.
_NEEDED = 20
# Digits: eight pixels a side leave a filter nothing to smooth; the size of the attacks is the paper's, section 4.
_DIGIT_SIZE, _DIGIT_EPS = 16, 0.3


DETECTOR_ATTACKS = (*ATTACKS, "adaptive")
"""Attacks that a detector can be tried against: those of a report, and the one that knows the detector."""

_ITERATIONS = 10
_PAIRS = 20


@dataclass(frozen=True)
class DetectorAttack:
    """An attack.

    Attributes:
        name: in tables ("pgd 0.1").
        settings: of the attack, for the reader.
        bound: largest change of a value, as a share of the range; None where values may change as they like.
        craft: images (N, C, H, W) in image units, the classes to leave (N,), and their ids -> attacked images.
        seed: of random starts.
    """

    name: str
    settings: str
    bound: float | None
    craft: Callable[[Tensor, Tensor, Sequence[int]], Tensor] = field(repr=False)
    seed: int = 0


def detector_attack(
    detector: CausalEffectDetector, name: str, eps: float, *, batch_size: int = 128, seed: int = 0
) -> DetectorAttack:
    """An attack on the classifier that a detector protects.

    Args:
        detector: fitted, where the attack is "adaptive": only that one knows it.
        name: out of :data:`DETECTOR_ATTACKS`.
        eps: largest change of a value, as a share of the range; JSMA sets pairs of values to the end of the range.
        batch_size: images that are attacked together.
        seed: of random starts.

    Raises:
        UnknownNameError: another attack.

    Example:
        >>> from ce_plugin.detection import CausalEffectDetector
        >>> detector = CausalEffectDetector(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
        >>> attack = detector_attack(detector, "pgd", 0.1)
        >>> attack.name, attack.settings
        ('pgd 0.1', 'L-inf, eps 0.1 of the range, 10 steps')
    """
    if name not in DETECTOR_ATTACKS:
        raise unknown_name("attacks", name, DETECTOR_ATTACKS)
    if name == "adaptive":
        return _adaptive(detector, eps, batch_size, seed)
    attack = attack_to_learn(detector, name, eps, batch_size=batch_size)

    def craft(images: Tensor, classes: Tensor, ids: Sequence[int]) -> Tensor:
        like = detector.classifier.like
        found: Tensor = attack.perturb(images.to(like), target=classes.to(like.device), ids=ids, seed=seed)
        return found

    if name == "jsma":
        return DetectorAttack(
            name, f"L0, at most {_PAIRS} pairs of values set to the end of the range", None, craft, seed
        )
    settings = f"L-inf, eps {_levels(eps)} of the range" + (f", {_ITERATIONS} steps" if name != "fgsm" else "")
    return DetectorAttack(f"{name} {_levels(eps)}", settings, eps, craft, seed)


def attack_to_learn(detector: CausalEffectDetector, name: str, eps: float, *, batch_size: int = 128) -> Adversarial:
    """One of the paper's attacks on the classifier that a detector protects, as an intervention.

    Args:
        detector: fitted or not.
        name: out of :data:`ATTACKS`.
        eps, batch_size: as for :func:`detector_attack`.

    Raises:
        UnknownNameError: another attack.

    Example:
        >>> from ce_plugin.detection import CausalEffectDetector
        >>> detector = CausalEffectDetector(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
        >>> attack_to_learn(detector, "fgsm", 8 / 255).perturb(torch.rand(2, 1, 2, 2)).shape
        torch.Size([2, 1, 2, 2])
    """
    clip = detector.classifier.clip_values
    unit = clip[1] - clip[0]
    options: dict[str, Any] = {"eps": unit, "max_iter": _PAIRS} if name == "jsma" else {"eps": eps * unit}
    if name in ("bim", "pgd"):
        options["max_iter"] = _ITERATIONS
    return Adversarial.preset(name, detector.classifier, clip_values=clip, batch_size=batch_size, **options)


def _adaptive(detector: CausalEffectDetector, eps: float, batch_size: int, seed: int) -> DetectorAttack:
    """The attack that lowers the detector's score while it fools the classifier."""
    from ce_plugin.detection import AdaptiveEvasion
    from ce_plugin.networks.art import build_classifier

    classifier, state = detector.classifier, detector.learned()
    clip = classifier.clip_values
    n_classes = classifier.test_logits(state.shape).shape[1]
    art_classifier = build_classifier(classifier, state.shape, n_classes, clip, classifier.like.device)
    attack = AdaptiveEvasion(art_classifier, detector, eps=eps * (clip[1] - clip[0]), batch_size=batch_size, seed=seed)

    def craft(images: Tensor, classes: Tensor, ids: Sequence[int]) -> Tensor:
        found = attack.generate(images.float().cpu().numpy(), classes.cpu().numpy(), ids=ids)
        return torch.from_numpy(found)

    runs = f"{len(attack.losses)} losses x {attack.restarts} restarts x {attack.steps} steps"
    settings = f"L-inf, eps {_levels(eps)} of the range, knows network and detector, {runs}"
    return DetectorAttack(f"adaptive {_levels(eps)}", settings, eps, craft, seed)


def rounded(moved: Tensor, clean: Tensor, bound: float | None, clip_values: tuple[float, float]) -> Tensor:
    """What a file of eight bits would hold of attacked images, inside the attack's bound.

    Args:
        moved: attacked images, (N, C, H, W), image units.
        clean: those that were attacked.
        bound: largest change, as a share of the range; 0.1 is 25 of 255 levels, the nearest would step over it.
        clip_values: least and greatest value of an image.

    Example:
        >>> rounded(torch.tensor([0.3]), torch.tensor([0.2]), 0.1, (0.0, 1.0)).mul(255).round().tolist()
        [76.0]
    """
    low, high = clip_values
    unit = high - low
    levels = ((moved.detach().to(clean) - low) / unit * 255).round().clamp(0, 255)
    if bound is not None:
        original, step = (clean - low) / unit * 255, int(bound * 255 + 1e-6)
        levels = torch.minimum(torch.maximum(levels, original.round() - step), original.round() + step)
    return levels / 255 * unit + low


def _levels(eps: float) -> str:
    """In levels of a file where they are few, as for photographs."""
    return share(eps) if eps * 255 < 20 else f"{eps:.3g}"


@dataclass(frozen=True)
class AttackResult:
    """One attack, and what the detector made of it.

    Attributes:
        attack: its name.
        settings: of the attack, for the reader.
        n_tried: correctly classified pictures that were attacked.
        scores: of the successful ones, (S,).
        figures: AUROC and detection rates with intervals.
        flagged: share of the successful ones above the threshold; None without any.
        shown: examples.
        seconds: time that the attack took.
    """

    attack: str
    settings: str
    n_tried: int
    scores: npt.NDArray[np.float64] = field(repr=False)
    figures: Figures
    flagged: Rate | None
    shown: tuple[AlarmShown, ...] = field(repr=False)
    seconds: float


@dataclass(frozen=True)
class DetectorTrial:
    """A detector tried on clean pictures and on the same ones under attack.

    Attributes:
        clean: scores of all clean pictures, (N,).
        right: which of them the network classifies correctly, (N,).
        truth_known: whether classes were given; otherwise the network's answers count as correct.
        false_alarms: share of the clean pictures above the threshold.
        due: where that share is to lie with 95 % probability, by the number of calibration and of test pictures.
        tried: one for each attack.
        calibration, threshold, fpr: as in :class:`Screening`.
        passes: forward passes that one score takes.
        seconds: time that the detector took for one clean picture.
    """

    clean: npt.NDArray[np.float64] = field(repr=False)
    right: npt.NDArray[np.bool_] = field(repr=False)
    truth_known: bool
    false_alarms: Rate
    due: tuple[float, float]
    tried: tuple[AttackResult, ...]
    calibration: Calibration
    threshold: float
    fpr: float
    passes: float
    seconds: float


def try_detector(
    detector: CausalEffectDetector,
    images: Tensor,
    names: Sequence[str],
    attacks: Sequence[DetectorAttack],
    *,
    labels: Tensor | None = None,
    n_shown: int = 2,
    layer: str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> DetectorTrial:
    """Attack pictures, and see how many successful attacks the detector flags, and how many clean pictures.

    Only pictures that the network classifies correctly are attacked, and what an attack leaves is rounded to 256
    levels, as a file would, before it counts as successful or not.

    Args:
        detector: a fitted one.
        images: clean, not among those that it was fitted on, (N, C, H, W), image units.
        names: one for each.
        attacks: see :func:`~ce_plugin.report.detector_attack`.
        labels: true classes, (N,); None takes the network's own answers.
        n_shown: examples of each attack: the first that was flagged, then the first that was not.
        layer: as for :func:`screen`.
        batch_size: pictures at a time.
        seed: of the bootstrap.
        progress: called with the name of each step.
        checkpoint: a folder, in which attacked pictures and all scores are saved, some batches at a time: a trial that
            was interrupted goes on from there with the same result, with the same settings and pictures. Delete it at
            the end.

    Raises:
        InputError: a picture was fitted on, or none is classified correctly.
        ArgumentError, ModelError, FileError: the checkpoint is that of another trial, or none.

    Example:
        >>> from ce_plugin.detection import CausalEffectDetector, CounterAttack, Signature
        >>> from ce_plugin.report import detector_attack
        >>> images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> detector = CausalEffectDetector(network, Signature([CounterAttack()]))
        >>> detector.fit(images[:250])
        >>> attack = detector_attack(detector, "fgsm", 0.1)
        >>> trial = try_detector(detector, images[250:], [f"{i}.png" for i in range(50)], [attack])
        >>> trial.tried[0].n_tried, len(trial.clean)
        (50, 50)
    """
    from ce_plugin.detection import rate
    from ce_plugin.detection.checkpoint import Checkpoint

    progress = progress or (lambda step: None)
    _check_unseen(detector, images)
    asked = {} if checkpoint is None else _trial_settings(detector, images, attacks, labels, batch_size)
    saved = Checkpoint(checkpoint, asked)
    progress("clean pictures")
    rows, seconds = _scored(detector, "clean pictures", names, images, batch_size, saved)
    answers = torch.tensor([row.predicted for row in rows])
    truth = answers if labels is None else labels.cpu()
    right = (answers == truth).numpy()
    if not right.any():
        hint = "Look at the classes that were given, and at the network's normalisation."
        raise InputError(expected("images", "some that the network classifies correctly", "none of them", hint))
    clean = np.array([row.score for row in rows])
    data, tried = _Data(images, names, truth, clean, right), []
    for attack in attacks:
        progress(attack.name)
        tried.append(_attacked(detector, attack, data, n_shown, layer, seed, batch_size, saved))
    state = detector.learned()
    return DetectorTrial(
        clean=clean,
        right=right,
        truth_known=labels is not None,
        false_alarms=rate(clean > detector.threshold),
        due=state.calibration.realised_interval(detector.fpr, n_test=len(clean)),
        tried=tuple(tried),
        calibration=state.calibration,
        threshold=detector.threshold,
        fpr=detector.fpr,
        passes=detector.passes,
        seconds=seconds / len(images),
    )


def _scored(
    detector: CausalEffectDetector, what: str, names: Sequence[str], images: Tensor, batch_size: int, saved: Checkpoint
) -> tuple[list[Screened], float]:
    """What the detector says of the images, and the seconds that it took; in parts that are saved."""
    from ce_plugin.detection.checkpoint import shards

    def score(rows: slice) -> dict[str, Any]:
        start = time.perf_counter()
        found = scored(detector, names[rows], images[rows], batch_size)
        return {"scores": [asdict(row) for row in found], "seconds": time.perf_counter() - start}

    parts = [
        saved.stage(f"{what} {rows.start} scores", partial(score, rows)) for rows in shards(len(names), batch_size)
    ]
    return [Screened(**row) for part in parts for row in part["scores"]], sum(part["seconds"] for part in parts)


@dataclass(frozen=True)
class _Data:
    """What is attacked: images and their names, true classes, scores when clean, and which are classified correctly."""

    images: Tensor
    names: Sequence[str]
    truth: Tensor
    clean: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]


def _attacked(
    detector: CausalEffectDetector,
    attack: DetectorAttack,
    data: _Data,
    n_shown: int,
    layer: str | None,
    seed: int,
    batch_size: int,
    saved: Checkpoint,
) -> AttackResult:
    from ce_plugin.detection import rate
    from ce_plugin.evaluation import figures

    index = np.flatnonzero(data.right)
    before, truth = data.images[index], data.truth[index]
    found, seconds = _crafted(attack, before, truth, index.tolist(), batch_size, saved)
    moved = rounded(found, before, attack.bound, detector.classifier.clip_values)
    won = np.flatnonzero((_answers(detector, moved) != truth).numpy())
    rows, _ = _scored(detector, attack.name, [data.names[i] for i in index[won]], moved[won], 128, saved)
    scores = np.array([row.score for row in rows])
    measured = figures(
        data.clean[index], scores, detector=detector.name, attack=attack.name, ids=(index, index[won]), needed=_NEEDED,
        seed=seed,
    )  # fmt: skip
    shown = []
    for place in _examples(rows, n_shown):
        one = int(won[place])
        image = moved[one : one + 1]
        shown.append(explained(detector, rows[place], image, layer, before[one], int(truth[one])))
    flagged = rate(scores > detector.threshold) if len(scores) else None
    return AttackResult(attack.name, attack.settings, len(index), scores, measured, flagged, tuple(shown), seconds)


def _crafted(
    attack: DetectorAttack, images: Tensor, classes: Tensor, ids: list[int], batch_size: int, saved: Checkpoint
) -> tuple[Tensor, float]:
    """What the attack makes of the images, and the seconds that it took; in parts that are saved."""
    from ce_plugin.detection.checkpoint import shards

    def craft(rows: slice) -> dict[str, Any]:
        start = time.perf_counter()
        made = attack.craft(images[rows], classes[rows], ids[rows])
        return {"images": made.detach().cpu(), "seconds": time.perf_counter() - start}

    parts = [saved.stage(f"{attack.name} {rows.start}", partial(craft, rows)) for rows in shards(len(ids), batch_size)]
    return torch.cat([part["images"] for part in parts]), sum(part["seconds"] for part in parts)


def _trial_settings(
    detector: CausalEffectDetector,
    images: Tensor,
    attacks: Sequence[DetectorAttack],
    labels: Tensor | None,
    batch_size: int,
) -> dict[str, Any]:
    """What an interrupted trial must share with the one that goes on."""
    from ce_plugin.detection.signature import digests

    state = detector.learned()
    learned = [value.cpu().numpy().tobytes() for _, value in sorted(state.state_dict().items())]
    truth = None if labels is None else labels.tolist()
    return {
        "purpose": "evaluation",
        "network": state.fingerprint,
        "detector": blake2b(b"".join(learned), digest_size=16).hexdigest(),
        "images": blake2b(repr((digests(images), truth)).encode(), digest_size=16).hexdigest(),
        "clip_values": detector.classifier.clip_values,
        "normalization": repr(detector.classifier.normalization),
        "attacks": [(one.name, one.settings, one.bound, one.seed) for one in attacks],
        "batch_size": batch_size,
        "fpr": detector.fpr,
    }


def _examples(rows: Sequence[Screened], n: int) -> list[int]:
    """Which successful attacks are shown: flagged and missed ones in turn, the first of each first."""
    caught = [i for i, row in enumerate(rows) if row.flagged]
    missed = [i for i, row in enumerate(rows) if not row.flagged]
    kept = missed[: max(n // 2, n - len(caught))]
    return [*caught[: n - len(kept)], *kept]


def _answers(detector: CausalEffectDetector, images: Tensor, batch_size: int = 128) -> Tensor:
    classifier = detector.classifier
    with classifier.guarded(), torch.no_grad():
        parts = [classifier(part.to(classifier.like)).argmax(1).cpu() for part in torch.split(images, batch_size)]
    return torch.cat(parts)


def _check_unseen(detector: CausalEffectDetector, images: Tensor) -> None:
    from ce_plugin.detection.signature import digests

    seen = detector.learned().seen
    again = sum(name in seen for name in digests(images))
    if again:
        hint = "On its own pictures a detector looks better than it is: take others."
        wanted = "pictures that the detector was not fitted on"
        raise InputError(expected("images", wanted, f"{again} that it was", hint))


def digits_trial(
    *,
    seed: int = 0,
    n_train: int = 700,
    n_fit: int = 700,
    n_test: int = 150,
    steps: int = 120,
    progress: Callable[[str], None] | None = None,
) -> DetectorTrial:
    """Train a network on handwritten digits, fit a detector on other, clean ones, and try both on a third part.

    Args:
        seed: of everything random, which digit goes where included.
        n_train: digits that train the network.
        n_fit: digits that the detector is fitted and calibrated on.
        n_test: digits that are attacked; the three parts are disjoint.
        steps: training steps of the denoiser; the detector's own default is 800.
        progress: called with the name of each step.

    Example:
        >>> trial = digits_trial(n_train=100, n_fit=80, n_test=10, steps=1)
        >>> [tried.attack for tried in trial.tried]
        ['fgsm 0.3', 'bim 0.3', 'pgd 0.3', 'jsma']
    """
    from ce_plugin.detection import CausalEffectDetector, Denoising, Signature

    announce = progress or (lambda step: None)
    images, labels = digits(_DIGIT_SIZE)
    order = torch.randperm(len(images), generator=generator(seed, "digits"))
    train, fit, test = torch.split(order[: n_train + n_fit + n_test], [n_train, n_fit, n_test])
    announce("digits: training the network")
    network = DigitsCNN.trained(images[train], labels[train], seed=seed)
    announce("digits: fitting the detector on clean images")
    probes = [one for one in Signature.small_images().probes if not isinstance(one, Denoising)]
    detector = CausalEffectDetector(network, Signature([Denoising(least_steps=steps), *probes]), seed=seed)
    detector.fit(images[fit].numpy(), nb_epochs=1)
    return try_detector(
        detector,
        images[test],
        [f"digit {int(i)}" for i in test],
        [detector_attack(detector, name, _DIGIT_EPS, batch_size=n_test, seed=seed) for name in ATTACKS],
        labels=labels[test],
        seed=seed,
        progress=lambda step: announce(f"digits: {step}"),
    )


@dataclass(frozen=True)
class TrialSection(Section[DetectorTrial]):
    """A detector's figures, curves and examples."""

    class_name: Callable[[int], str]
    name, template = "detector on handwritten digits", "detector.html.j2"

    def record(self, found: DetectorTrial) -> dict[str, Any]:
        """Rates and figures."""
        return {
            "pictures": len(found.right),
            "correctly_classified": int(sum(found.right)),
            "true_classes_given": found.truth_known,
            "fpr": found.fpr,
            "threshold": found.threshold,
            "calibration_images": found.calibration.n,
            "false_alarms": found.false_alarms.to_dict(),
            "false_alarms_due": list(found.due),
            "forward_passes": found.passes,
            "attacks": [
                {
                    **one.figures.to_dict(),
                    "settings": one.settings,
                    "n_tried": one.n_tried,
                    "flagged": None if one.flagged is None else one.flagged.to_dict(),
                }
                for one in found.tried
            ],
        }

    def render(self, found: DetectorTrial) -> dict[str, Any]:
        """A row for each attack, curves, and examples."""
        scores = {one.attack: one.scores for one in found.tried if len(one.scores)}
        charts = []
        if scores:
            title = "Detected at each false-alarm rate"
            roc = plot_roc(found.clean[found.right], scores, fpr=found.fpr, title=title)
            histogram = plot_scores(found.calibration.scores, found.threshold, scores, title="Scores")
            charts = [(data_uri(roc), "ROC curves"), (data_uri(histogram), "histogram of scores with the threshold")]
        return {
            "trial": found,
            "n_right": int(sum(found.right)),
            "adaptive": any(one.attack.startswith("adaptive") for one in found.tried),
            "charts": charts,
            "alarms": [
                alarm_shown(shown, self.class_name, found.calibration, one.attack.upper())
                for one in found.tried
                for shown in one.shown
            ],
        }


class EvaluationSection(TrialSection):
    """The same as a page of its own."""

    name, template = "evaluation", "evaluation.html.j2"


def save_evaluation(
    trial: DetectorTrial,
    out: str | Path,
    *,
    net: VisionModel,
    detector: str,
    manifest: Mapping[str, Any],
    tables: str = "csv",
) -> Path:
    """Write ``evaluation.html``, ``evaluation.csv`` and ``manifest.json``; each appears only when it is complete.

    Args:
        trial: what :func:`~ce_plugin.report.try_detector` returned.
        out, net, detector, manifest, tables: as for :func:`~ce_plugin.report.save_screening`.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ce_plugin.detection import Calibration, rate
        >>> from ce_plugin.report import build_manifest
        >>> net, right = VisionModel(torch.nn.Linear(1, 1)), rate([True])
        >>> trial = DetectorTrial(None, [True], False, right, (0.0, 1.0), (), Calibration([0.1]), 0.6, 0.3, 7, 0.01)
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=net.model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = save_evaluation(trial, folder, net=net, detector="net.ce", manifest=manifest)
        ...     page.with_name("evaluation.csv").read_text().split(",")[:3]
        ['attack', 'settings', 'n_tried']
    """
    names = [f"{figure}{end}" for figure in ("auroc", "tpr_1", "tpr_5") for end in ("", "_low", "_high")]
    alarms = trial.false_alarms
    header = ["attack", "settings", "n_tried", "n_successful", *names, "flagged", "flagged_low", "flagged_high"]
    rows = [["clean", "", alarms.n, None, *[None] * len(names), alarms.share, alarms.low, alarms.high]]
    for one in trial.tried:
        known = one.figures.to_dict()
        shares = [None] * 3 if one.flagged is None else [one.flagged.share, one.flagged.low, one.flagged.high]
        rows.append([one.attack, one.settings, one.n_tried, len(one.scores), *(known[name] for name in names), *shares])
    section, files = EvaluationSection(net.class_name), table_files({"evaluation": data_frame(header, rows)}, tables)
    return save_page(section, trial, out, manifest, files, model=net.name, detector=detector)
