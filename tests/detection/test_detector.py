"""The detector: the same scores whatever the order and the batch, the rate that it promises, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _toy import classifier, patterns, quick_signature, same, snapshot
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ce_plugin.detection import (
    Augmentation,
    CausalEffectDetector,
    CounterAttack,
    Denoising,
    Detector,
    DifferentiableDetector,
    Interchange,
    NodeZeroing,
    PixelMasking,
    Signature,
    Smoothing,
    realised_interval,
)
from ce_plugin.detection.fitting import Split
from ce_plugin.errors import ArgumentError, InferenceError, InputError, ModelError, UnknownNameError
from ce_plugin.interventions import Adversarial, Smooth

X = patterns(240)[0]
NEW = patterns(60, seed=1)[0]


def made(net: nn.Module | None = None, signature: Signature | None = None, **options: Any) -> CausalEffectDetector:
    return CausalEffectDetector(net or classifier(), signature or quick_signature(), **options)


def fitted(net: nn.Module | None = None, signature: Signature | None = None, **options: Any) -> CausalEffectDetector:
    detector = made(net, signature, **options)
    detector.fit(X, nb_epochs=1)
    return detector


def noisy(x: np.ndarray, amount: float = 0.3, seed: int = 0) -> np.ndarray:
    """Something that is not clean: sign noise beyond what is harmless."""
    noise = np.random.default_rng(seed).choice([-amount, amount], x.shape)
    return np.clip(x + noise, 0, 1).astype(np.float32)


def split(x: np.ndarray, y: np.ndarray | None) -> Split:
    detector = made()
    return Split.of(torch.as_tensor(x), y, detector.holdout, detector.seed)


# --- the same whatever the order


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("n_classes", [2, 3, 30])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_and_order_do_not_matter(dtype: torch.dtype, tolerance: float, n_classes: int, channels: int) -> None:
    """Neither of the images that are scored nor of those that it is fitted on."""
    x, new = (patterns(n, n_classes, channels, seed=seed)[0] for n, seed in ((240, 0), (41, 1)))
    net = classifier(n_classes, channels, dtype)
    detector, other = made(net), made(net)
    detector.fit(x, batch_size=64)
    order = np.random.default_rng(0).permutation(len(x))
    other.fit(x[order], batch_size=23)
    scores = detector.score(new)
    apart = tolerance * scores.std()
    assert scores.shape == (41,)
    assert scores.dtype == np.float64
    mixed = np.random.default_rng(1).permutation(41)
    for batch_size in (1, 7, 100):
        np.testing.assert_allclose(detector.score(new[mixed], batch_size)[np.argsort(mixed)], scores, atol=apart)
    np.testing.assert_allclose(other.score(new), scores, atol=apart)
    assert other.threshold == pytest.approx(detector.threshold, abs=apart)


def test_what_is_trained_does_not_depend_on_the_order_either() -> None:
    net, order = classifier(dtype=torch.float32), np.random.default_rng(0).permutation(len(X))
    signature = Signature([Denoising(width=3, least_steps=3), PixelMasking(n_draws=2)])
    detector, other, third = (made(net, signature, seed=seed) for seed in (0, 0, 1))
    detector.fit(X, nb_epochs=1)
    other.fit(X[order], nb_epochs=1, batch_size=17)
    third.fit(X, nb_epochs=1)
    scores = detector.score(NEW)
    np.testing.assert_allclose(other.score(NEW), scores, atol=1e-4 * scores.std())
    assert np.abs(third.score(NEW) - scores).max() > 1e-3 * scores.std()


def test_every_form_of_the_images_has_the_same_scores() -> None:
    detector = fitted(classifier(dtype=torch.float32))
    scores = detector.score(NEW)
    np.testing.assert_array_equal(detector.score(NEW.astype(np.float64)), scores)
    np.testing.assert_array_equal(detector.score(torch.as_tensor(NEW)), scores)
    np.testing.assert_allclose(detector.score(NEW[::-1])[::-1], scores, rtol=1e-6)
    with torch.inference_mode():
        np.testing.assert_array_equal(detector.score(NEW), scores)
        np.testing.assert_array_equal(detector.detect(torch.as_tensor(NEW) * 1.0)[0]["scores"], scores)


# --- nothing else is touched


class Breaking(nn.Module):
    """A network that fails once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.broken = classifier(dtype=torch.float32), False
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("out of order")
        found: Tensor = self.net(self.drop(x))
        return found


def test_the_network_and_the_random_state_stay_as_they_are() -> None:
    net = Breaking().train()
    net.net[0].eval()
    net.net[3].weight.grad = torch.ones_like(net.net[3].weight)
    net.net[0].bias.requires_grad_(False)
    before = snapshot(net)
    signature = Signature([Denoising(width=2, least_steps=2), *quick_signature().probes, NodeZeroing("net.1")])
    detector = fitted(net, signature)
    assert same(before, snapshot(net))
    detector.score(NEW)
    detector.detect(noisy(NEW), explain=True, layer="net.1")
    assert same(before, snapshot(net))
    net.broken = True
    for call in (lambda: detector.score(NEW), lambda: detector.fit(X[:200], nb_epochs=1), lambda: detector.detect(NEW)):
        with pytest.raises(RuntimeError, match="out of order"):
            call()
        assert same(before, snapshot(net))
    net.broken = False
    assert detector.score(NEW).shape == (60,)  # what was learned is still there


# --- what it promises


def test_threshold_p_values_and_flags_say_the_same() -> None:
    detector = fitted()
    images = np.concatenate([NEW, noisy(NEW)])
    for fpr in (0.05, 0.2, 0.5):
        detector.set_params(fpr=fpr)
        report, flagged = detector.detect(images, batch_size=13)
        assert sorted(report) == ["groups", "p_values", "predictions", "scores", "threshold"]
        np.testing.assert_array_equal(flagged, report["p_values"] <= fpr)
        np.testing.assert_array_equal(flagged, report["scores"] > report["threshold"])
        assert report["threshold"] == detector.threshold
        np.testing.assert_array_equal(detector.decision_function(images), detector.score(images) - detector.threshold)
        assert flagged.dtype == np.bool_
    with torch.no_grad():
        predicted = classifier()(torch.as_tensor(images).double()).argmax(1)
    np.testing.assert_array_equal(report["predictions"], predicted)
    names = ["filters", "filters: Smooth.gauss(1.0)", "filters: Smooth.median(2)", "counter-attack"]
    assert list(report["groups"]) == names
    columns = np.stack(list(report["groups"].values()), 1)
    np.testing.assert_allclose((np.logaddexp(0, columns) ** 2).sum(1), report["scores"], rtol=1e-9)


def test_it_drops_into_the_metrics_of_scikit_learn_and_tells_noise_from_clean_images() -> None:
    detector = fitted()
    images, labels = np.concatenate([NEW, noisy(NEW)]), np.repeat([0, 1], 60)
    assert roc_auc_score(labels, detector.decision_function(images)) > 0.9


def test_false_alarms_are_as_many_as_promised() -> None:
    """On exchangeable images, over several splits: within the interval of a split, and right on average."""
    x = patterns(1200, seed=3)[0]
    shares = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(x))
        detector = made(seed=seed, fpr=0.1)
        detector.fit(x[order[:400]])
        _, flagged = detector.detect(x[order[400:]])
        shares.append(flagged.mean())
        low, high = realised_interval(detector.learned().calibration.n, 0.1, 0.999, n_test=800)
        assert low <= shares[-1] <= high
    assert 0.06 < np.mean(shares) < 0.14


def test_harmless_alterations_are_no_reason_for_an_alarm_where_they_were_learned() -> None:
    x, new = (patterns(n, seed=seed, noise=0.01)[0] for n, seed in ((240, 0), (60, 1)))
    altered = Augmentation()(torch.as_tensor(new), list(range(60)), seed=9).numpy()
    shares = []
    for augmentation in (None, "default"):
        detector = made(augmentation=augmentation, fpr=0.1)
        detector.fit(x)
        shares.append(detector.detect(altered)[1].mean())
    assert shares[0] > 0.5
    assert shares[1] < shares[0] - 0.1


def test_calibration_on_other_images() -> None:
    detector = fitted()
    before = detector.score(NEW)
    other = patterns(199, seed=2)[0]
    calibration = detector.calibrate(other, fpr=0.01)
    assert calibration.n == 199
    assert detector.fpr == 0.01
    np.testing.assert_allclose(calibration.scores, np.sort(detector.score(other)))
    assert detector.calibration is calibration
    assert detector.threshold == calibration.scores[-2]  # two in two hundred
    np.testing.assert_array_equal(detector.score(NEW), before)
    with pytest.raises(InputError, match=r"that the detector was not fitted on, but got 16[0-9] that it was"):
        detector.calibrate(X)
    with pytest.raises(ArgumentError, match=r"`fpr` to be at least 1 / 61.*takes 999 calibration images"):
        detector.calibrate(NEW, fpr=0.001)
    assert detector.calibration is calibration  # nothing was lost
    assert detector.fpr == 0.01


# --- attacked images


def test_labels_of_all_forms_mean_the_same() -> None:
    x, y = np.concatenate([X, noisy(X[:80])]), np.repeat([0, 1], [240, 80])
    plain = fitted()
    scores = []
    for labels in (y, y[:, None], np.eye(2)[y], y.tolist()):
        detector = made()
        detector.fit(x, labels)
        scores.append(detector.score(NEW))
        assert "known attacks" in detector.detect(NEW)[0]["groups"]
    for other in scores[1:]:
        np.testing.assert_array_equal(other, scores[0])
    assert "known attacks" not in plain.detect(NEW)[0]["groups"]
    plain.teach(split(x, y).attacked.numpy()[::-1].copy())
    np.testing.assert_allclose(plain.score(NEW), scores[0], rtol=1e-9)
    # The threshold is that of the scores with the attacked images.
    np.testing.assert_allclose(plain.threshold, detector.threshold, rtol=1e-9)
    assert plain.threshold != fitted().threshold
    clean = made()
    clean.fit(X, np.zeros(240))
    np.testing.assert_array_equal(clean.score(NEW), fitted().score(NEW))


def test_attacked_versions_of_images_that_are_held_out_are_left_out() -> None:
    changed = noisy(X, 0.02)
    some = split(np.concatenate([X, changed]), np.repeat([0, 1], 240))
    assert torch.equal(some.attacked, torch.as_tensor(changed)[~some.held_out])
    assert some.held_out.sum() == 72
    kept = some.held_out.numpy()
    # ... unless there are no others.
    few = split(np.concatenate([X, changed[kept]]), np.repeat([0, 1], [240, 72]))
    assert torch.equal(few.attacked, torch.as_tensor(changed[kept]))
    assert split(X, None).attacked is None


def test_it_makes_attacked_images_itself() -> None:
    net = classifier(dtype=torch.float32)
    before = snapshot(net)
    attack = Adversarial.fgsm(net, eps=0.3, clip_values=(0.0, 1.0))
    detector, named, other = (made(net, attacks=attacks) for attacks in ([attack], ["fgsm"], ["FastGradientMethod"]))
    detector.fit(X)
    named.fit(X)
    other.fit(X)
    assert same(before, snapshot(net))
    assert detector.learned().scorer.attacks is not None
    plain = fitted(net)
    # What clean images are like was learned from clean images alone.
    assert torch.equal(detector.learned().scorer.center, plain.learned().scorer.center)
    attacked = attack.perturb(torch.as_tensor(NEW), target=net(torch.as_tensor(NEW)).argmax(1)).numpy()
    images, labels = np.concatenate([NEW, attacked]), np.repeat([0, 1], 60)
    assert roc_auc_score(labels, detector.decision_function(images)) > 0.8
    with pytest.raises(UnknownNameError, match=r"`attack` to be one of .*'FastGradient'"):
        made(net, attacks=["FastGradient"]).fit(X)
    with pytest.raises(InputError, match=r"turn some image over, but got none of 16[0-9].*larger eps"):
        made(net, attacks=[Adversarial.fgsm(net, eps=1e-6, clip_values=(0.0, 1.0))]).fit(X)


def test_fitting_again_takes_up_what_is_known_only_where_nothing_has_changed() -> None:
    net = classifier()
    detector = fitted(net)
    first = detector.learned()
    detector.fit(X[::-1], nb_epochs=1, batch_size=50)
    assert detector.learned() is first
    detector.fit(X[:230], nb_epochs=1)
    assert detector.learned() is not first
    detector.fit(X, nb_epochs=1)
    with torch.no_grad():
        net[3].weight.mul_(1.5)
    detector.fit(X, nb_epochs=1)
    assert detector.learned().fingerprint != first.fingerprint


# --- options


def test_options_go_out_and_in_again() -> None:
    detector = fitted()
    options = detector.get_params()
    assert set(options) == {"aggregate", "attacks", "augmentation", "fpr", "holdout", "seed", "signature"}
    state = detector.learned()
    detector.set_params(**options)
    assert detector.learned() is state
    assert detector.get_params() == options
    detector.set_params(fpr=0.2)
    assert detector.learned() is state
    other = made()
    other.set_params(**{**options, "seed": 3, "augmentation": None})
    assert other.get_params() == {**options, "seed": 3, "augmentation": None}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"aggregate": "max"}, {"holdout": 0.4}, {"augmentation": None}, {"signature": None}]
)
def test_a_change_of_what_was_learned_undoes_the_fit(change: dict[str, Any]) -> None:
    detector = fitted()
    detector.set_params(**change)
    with pytest.raises(InferenceError, match="`detector` to be a fitted one"):
        detector.score(NEW)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fpr": 1.0}, r"`fpr` to be a float in \(0, 1\), but got 1.0"),
        ({"fpr": "5%"}, r"`fpr` to be a float in \(0, 1\), but got '5%'"),
        ({"fpr": float("nan")}, "`fpr` to be a float"),
        ({"holdout": 0}, r"`holdout` to be a float in \(0, 1\), but got 0"),
        ({"aggregate": "mean"}, "`aggregate` to be one of 'max', 'soft_square', 'sum', but got 'mean'"),
        ({"signature": [CounterAttack()]}, "`signature` to be a Signature or None, but got list"),
        ({"augmentation": "none"}, "`augmentation` to be an Augmentation, \"default\" or None, but got 'none'"),
        ({"attacks": "fgsm"}, "`attacks` to be a list of attacks, or None, but got 'fgsm'"),
        ({"attacks": []}, r"`attacks` to be a list of attacks, or None, but got \[\]"),
        ({"attacks": 5}, "`attacks` to be a list of attacks, or None, but got 5"),
        ({"seed": None}, "`seed` to be a whole number, but got None"),
        ({"seed": 0.5}, "`seed` to be a whole number, but got 0.5"),
    ],
)
def test_options_that_cannot_be_are_refused_and_change_nothing(option: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, UnknownNameError), match=message):
        CausalEffectDetector(classifier(), **option)
    detector = fitted()
    before, state = detector.get_params(), detector.learned()
    with pytest.raises((ArgumentError, UnknownNameError), match=message):
        detector.set_params(**option)
    assert detector.get_params() == before
    assert detector.learned() is state


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"`params` to be one of .*'frp'. Did you mean 'fpr'"):
        made().set_params(frp=0.01)


# --- what it refuses


def test_before_it_is_fitted_it_says_so() -> None:
    detector = made()
    calls = [
        lambda: detector.score(NEW),
        lambda: detector.detect(NEW),
        lambda: detector.threshold,
        lambda: detector.decision_function(NEW),
        lambda: detector.calibrate(NEW),
        lambda: detector.score_tensor(torch.as_tensor(NEW)),
        lambda: detector.teach(NEW),
        lambda: detector.save("nowhere"),
    ]
    for call in calls:
        with pytest.raises(InferenceError, match=r"a fitted one, .*Call `fit\(x\)` with clean images"):
            call()
    assert detector.calibration is None
    assert repr(detector).startswith("CausalEffectDetector(not fitted, fpr=0.05, passes=")


def test_too_few_images_are_counted_by_class() -> None:
    counts = r"28 and 12 \(\d+ of class 0, \d+ of class 1, \d+ of class 2\). About 50 of each predicted class"
    with pytest.raises(InputError, match=r"50 or more to fit to and 19 or more to calibrate on, but got " + counts):
        made().fit(X[:40])
    with pytest.raises(InputError, match="50 or more to fit to"):
        made(holdout=0.9).fit(X)
    one = X[np.arange(240) % 3 == 1]
    with pytest.raises(InputError, match=r"two predicted classes or more, but got \d+ of class 1. Pass images of all"):
        made().fit(np.concatenate([one, np.clip(one + 0.01, 0, 1)]))
    with pytest.raises(InputError, match=r"labels with clean images .* but got adversarial ones only"):
        made().fit(X, np.ones(240))


def test_a_rate_that_cannot_be_resolved_leaves_the_previous_fit() -> None:
    detector = fitted()
    state, scores = detector.learned(), detector.score(NEW)
    detector.set_params(fpr=0.001)
    with pytest.raises(ArgumentError, match=r"`fpr` to be at least 1 / 73.*999 calibration images"):
        detector.detect(NEW)
    with pytest.raises(ArgumentError, match=r"`fpr` to be at least 1 / 7"):
        detector.fit(X[:230])
    detector.set_params(fpr=0.05)
    assert detector.learned() is state
    np.testing.assert_array_equal(detector.score(NEW), scores)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("augmentation", Augmentation(noise=0.1)),
        ("signature", Signature([Smoothing("filters", [Smooth.bits(1)])])),
        ("signature", Signature([CounterAttack(steps=(0.1,))])),
        ("signature", Signature([Interchange("0", Smooth.gauss(1.0))])),
    ],
)
def test_what_was_made_for_another_range_of_values_is_refused(name: str, option: Any) -> None:
    bytes_ = {"signature": Signature([CounterAttack()]), "augmentation": None, "clip_values": (0.0, 255.0)}
    CausalEffectDetector(classifier(), **bytes_).fit(255 * X)  # nothing here depends on the range
    detector = CausalEffectDetector(classifier(), **{**bytes_, name: option})
    with pytest.raises(ArgumentError, match=rf"`{name}` to be made for .*\(0\.0, 255\.0\), but got \(0\.0, 1\.0\)"):
        detector.fit(255 * X)


def test_images_that_cannot_be_are_refused() -> None:
    detector = fitted()
    with pytest.raises(InputError, match=r"inside the clip values \[0, 1\], but got values from .* to 255"):
        detector.score(np.full((2, 1, 8, 8), 255.0))
    with pytest.raises(InputError, match=r"`x` to be images of shape \(1, 8, 8\), but got shape \(3, 8, 8\)"):
        detector.score(np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(InputError, match="`y` to be one label for each of the 240 images, but got 3 labels"):
        detector.fit(X, [0, 1, 0])
    with pytest.raises(ArgumentError, match="`batch_size` to be a positive whole number, but got 0"):
        detector.score(NEW, batch_size=0)
    with pytest.raises(ArgumentError, match="`nb_epochs` to be a positive whole number"):
        detector.fit(X, nb_epochs=0)
    with pytest.raises(UnknownNameError, match="`layer` to be one of '0', '1', '2', '3', but got 'conv'"):
        detector.detect(NEW, explain=True, layer="conv")


@pytest.mark.parametrize("past_autograd", [False, True])
def test_a_network_that_has_changed_is_another_one(past_autograd: bool) -> None:
    net = classifier()
    detector = fitted(net)
    scores = detector.score(NEW)
    before = net[3].weight.detach().clone()
    with torch.no_grad():
        (net[3].weight.data if past_autograd else net[3].weight).mul_(1.01)
    for call in (lambda: detector.score(NEW), lambda: detector.detect(NEW), lambda: detector.calibrate(NEW)):
        with pytest.raises(ModelError, match=r"the network that the detector was fitted on.*Fit again"):
            call()
    with torch.no_grad():
        net[3].weight.copy_(before)
    np.testing.assert_array_equal(detector.score(NEW), scores)


# --- gradients, other precisions


def test_the_score_has_the_gradient_of_finite_differences() -> None:
    net = classifier()
    signature = Signature([
        Smoothing("filters", [Smooth.gauss(1.0), Smooth.mean(3)]),
        CounterAttack(),
        Denoising(width=2, least_steps=2),
    ])  # fmt: skip
    detector = fitted(net, signature)
    x = torch.as_tensor(NEW[:4]).double().requires_grad_()
    np.testing.assert_allclose(detector.score_tensor(x).detach(), detector.score(NEW[:4]), rtol=1e-9)
    (gradient,) = torch.autograd.grad(detector.score_tensor(x).sum(), x)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        way = torch.randn(x.shape, generator=random, dtype=torch.float64)
        with torch.no_grad():
            ends = [detector.score_tensor(x + step * way) for step in (1e-4, -1e-4)]
        slope = (ends[0] - ends[1]) / 2e-4
        # The denoiser is in single precision.
        torch.testing.assert_close((gradient * way).flatten(1).sum(1), slope, rtol=2e-2, atol=2e-2)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert isinstance(detector, Detector)
    assert isinstance(detector, DifferentiableDetector)


def test_a_probe_without_a_gradient_says_so() -> None:
    detector = fitted(signature=Signature([NodeZeroing("1")]))
    with pytest.raises(ArgumentError, match=r"have a gradient, but got \['node zeroing'\], which have"):
        detector.score_tensor(torch.as_tensor(NEW))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    signature = Signature([*quick_signature().probes, Denoising(width=2, least_steps=2)])
    half, single = fitted(classifier(dtype=dtype), signature), fitted(classifier(dtype=torch.float32), signature)
    report, _ = half.detect(np.concatenate([NEW, noisy(NEW)]), explain=True)
    assert np.isfinite(report["scores"]).all()
    assert roc_auc_score(np.repeat([0, 1], 60), report["scores"]) > 0.8
    both = np.concatenate([NEW, noisy(NEW)])
    assert np.corrcoef(half.score(both), single.score(both))[0, 1] > 0.8


def test_a_network_that_ignores_its_input_has_no_alarms() -> None:
    """All effects are zero: nothing can be told, and nothing breaks down."""
    net = classifier()
    with torch.no_grad():
        net[0].weight.zero_()
    with pytest.raises(InputError, match="two predicted classes or more"):
        fitted(net)


def test_units_of_the_images_and_of_the_network() -> None:
    """Bytes and a normalisation: the same network, the same scores."""
    plain = fitted()
    net = classifier()
    with torch.no_grad():  # the same answers from images (x - 0.5) / 0.25
        bias = net[0].bias + 0.5 * net[0].weight.sum((1, 2, 3))
        net[0].bias.copy_(bias)
        net[0].weight.mul_(0.25)
    normal = made(net, normalization=(0.5, 0.25))
    normal.fit(X)
    np.testing.assert_allclose(normal.score(NEW), plain.score(NEW), rtol=1e-6)
