"""Why an image raised an alarm: networks in which one place, one channel or one class only can be the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _toy import classifier, patterns
from torch import nn

from ce_plugin.detection import Alarm, CausalEffectDetector, CounterAttack, NodeZeroing, Signature, Smoothing
from ce_plugin.interventions import Smooth

X, NEW = patterns(240)[0], patterns(20, seed=1)[0]
SPOT = (slice(1, 4), slice(5, 8))


def spotted() -> nn.Module:
    """Class 1 from what lies in one spot alone, seen by the second of three channels; class 0 from a constant."""
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2)).double().eval()
    place = torch.zeros(3, 8, 8).double()
    place[1][SPOT] = 1.0
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 1.0, -1.0]).double().reshape(3, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, 0.0, 1.0]).double())
        net[3].weight.copy_(torch.stack([torch.zeros(192).double(), place.flatten()]))
        net[3].bias.copy_(torch.tensor([4.5, 0.0]).double())
    return net


def alarmed() -> tuple[Alarm, CausalEffectDetector]:
    """Clean images are smooth; the alarming one has grain in the spot, which smoothing takes away."""
    random = np.random.default_rng(0)
    level = random.uniform(0.3, 0.7, (200, 1, 1, 1)) * np.ones((1, 1, 8, 8))
    x = (level + 0.01 * random.standard_normal(level.shape)).clip(0, 1)
    net = spotted()
    detector = CausalEffectDetector(net, Signature([Smoothing("blur", [Smooth.clip(0.2, 0.8)])]), augmentation=None)
    detector.fit(x)
    odd = np.full((1, 1, 8, 8), 0.35)
    odd[0, 0][SPOT] = 0.2
    odd[0, 0, 2, 6] = 1.0
    odd[0, 0, 1:4, 5] = 1.0
    report, flagged = detector.detect(np.concatenate([x[:1], odd]), explain=True, layer="1")
    assert flagged.tolist() == [False, True]
    assert report["explanations"][0] is None
    assert report["predictions"].tolist()[1] == 1
    return report["explanations"][1], detector


def test_the_alarm_names_the_place_the_channel_and_the_effect() -> None:
    alarm, detector = alarmed()
    assert alarm.regions is not None
    assert alarm.regions.shape == (8, 8)
    # The largest in the window of four pixels that holds all of the spot.
    row, column = divmod(int(alarm.regions.argmax()), 8)
    assert row < 4 <= column
    assert float(alarm.regions.max()) > 0
    # Windows of four pixels that do not touch the spot find nothing.
    assert float(alarm.regions[6:].abs().max()) < 1e-9
    assert float(alarm.regions[:, :2].abs().max()) < 1e-9
    assert next(iter(alarm.channels)) == 1
    assert alarm.channels[1] == pytest.approx(4 * 0.2)  # four pixels of 1.0 become 0.8
    assert all(abs(value) < 1e-9 for channel, value in alarm.channels.items() if channel != 1)
    assert alarm.turned_to == 0
    assert alarm.intervention == "Smooth.clip(0.2, 0.8)"
    strongest = alarm.effects[0]
    assert strongest.what == "Smooth.clip(0.2, 0.8) on the logit of class 1"
    assert strongest.effect == pytest.approx(-0.8)
    assert strongest.deviations < -5
    assert list(alarm.deviations.values()) == sorted(alarm.deviations.values(), reverse=True)
    assert set(alarm.deviations) == {"blur", "blur: Smooth.clip(0.2, 0.8)"}
    assert str(alarm).startswith("Smooth.clip(0.2, 0.8) leaves class 0; blur")
    assert "on the logit of class 1: -0.8, usual" in str(alarm)
    assert detector.learned().signature.names == ("blur",)


def test_effects_are_the_most_unusual_ones_of_each_group_in_order() -> None:
    net = classifier()
    signature = Signature([Smoothing("filters", [Smooth.gauss(1.0), Smooth.median(2)]), CounterAttack(steps=(0.05,))])
    detector = CausalEffectDetector(net, signature, fpr=0.5)
    detector.fit(X)
    report, flagged = detector.detect(1 - NEW * 0.9, explain=True)
    assert flagged.any()
    for i in np.flatnonzero(flagged):
        alarm = report["explanations"][i]
        away = [abs(effect.deviations) for effect in alarm.effects]
        assert away == sorted(away, reverse=True)
        assert len(away) == 10
        assert alarm.deviations == {name: pytest.approx(values[i]) for name, values in report["groups"].items()}
        assert alarm.channels == {}
        x = torch.as_tensor(1 - NEW[i : i + 1] * 0.9).double()
        first = next(effect for effect in alarm.effects if effect.what.startswith("Smooth.gauss(1.0) on"))
        k = int(first.what[-1])
        with torch.no_grad():
            assert first.effect == pytest.approx(float((net(Smooth.gauss(1.0)(x)) - net(x))[0, k]))
            runs = {"Smooth.gauss(1.0)": net(Smooth.gauss(1.0)(x)), "Smooth.median(2)": net(Smooth.median(2)(x))}
        predicted = int(report["predictions"][i])
        left = {
            what: float(run[0, predicted] - np.delete(run[0].numpy(), predicted).max()) for what, run in runs.items()
        }
        assert alarm.intervention == min(left, key=left.__getitem__)
        assert alarm.turned_to == int(runs[alarm.intervention].argmax())


def test_a_signature_without_filters_explains_what_it_can() -> None:
    detector = CausalEffectDetector(classifier(), Signature([NodeZeroing("1")]), fpr=0.5)
    detector.fit(X)
    report, flagged = detector.detect(1 - NEW, explain=True, layer="1")
    alarm = report["explanations"][int(np.flatnonzero(flagged)[0])]
    assert alarm.regions is None
    assert alarm.channels == {}
    assert alarm.intervention == "no intervention"
    assert alarm.turned_to == report["predictions"][int(np.flatnonzero(flagged)[0])]
    assert list(alarm.deviations) == ["node zeroing"]


def test_explaining_changes_no_score_and_needs_no_batch() -> None:
    signature = Signature([Smoothing("filters", [Smooth.gauss(1.0)])])
    detector = CausalEffectDetector(classifier(30, 3), signature, fpr=0.5)
    detector.fit(patterns(300, 30, 3)[0])
    new = patterns(20, 30, 3, seed=1)[0]
    plain, _ = detector.detect(new)
    told, flagged = detector.detect(new, batch_size=3, explain=True, layer="0")
    np.testing.assert_allclose(told["scores"], plain["scores"])
    assert "explanations" not in plain
    assert [alarm is not None for alarm in told["explanations"]] == flagged.tolist()
