"""Protocols, kept scores, the common bootstrap and the figures of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks.detectors import Mahalanobis, Margin
from benchmarks.harness import (
    CleanScores,
    ImageDraws,
    ImageSet,
    ProtocolData,
    Scored,
    ScoreTable,
    Task,
    evaluate,
    fit_detector,
    plan,
    pooled,
    score_task,
    sets_of,
)
from ce_plugin.detection.calibration import Calibration
from ce_plugin.errors import ArgumentError, FileError, InputError, UnknownNameError
from ce_plugin.evaluation import bootstrapped, false_alarms


class Recorder:
    """Scores by the first pixel; remembers what it was fitted on and what it scored."""

    name = "recorder"

    def __init__(self) -> None:
        self.fits: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.scored: list[int] = []

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> None:
        self.fits.append((x, y))

    def score(self, x: np.ndarray, batch_size: int = 128) -> np.ndarray:
        self.scored.append(len(x))
        return x[:, 0, 0, 0].astype(np.float64)


class OwnCalibration(Recorder):
    """A detector that holds out images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calibration: Calibration | None = None

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> None:
        super().fit(x, y)
        self.calibration = Calibration(np.arange(99.0))


def numbered(start: int, n: int) -> np.ndarray:
    """Images whose first pixel is their number over 10000: what became of each can be told."""
    images = np.zeros((n, 1, 2, 2), np.float32)
    images[:, 0, 0, 0] = (start + np.arange(n)) / 10000
    return images


def numbers(images: np.ndarray) -> list[int]:
    return np.rint(images[:, 0, 0, 0] * 10000).astype(int).tolist()


@pytest.fixture
def data() -> ProtocolData:
    """Pool 0-99, its FGSM 1000-1099, test 2000-2039, attacks 3000, 4000, 5000 and 6000 + number of the test image."""
    ids = np.arange(40)
    attacks = {
        name: ImageSet(name, numbered(start, 40)[rows], ids[rows], family, excluded)
        for name, start, rows, family, excluded in (
            ("fgsm", 3000, slice(None), "sign", False),
            ("pgd", 4000, slice(0, 30), "sign", False),
            ("jsma", 5000, slice(5, 40), "sparse", False),
            ("patch", 6000, slice(None), "patch", True),
        )
    }
    training_attacks = {"fgsm": ImageSet("fgsm", numbered(1000, 100)[::2], np.arange(100)[::2], "sign")}
    others = {"noise": ImageSet("noise", numbered(7000, 10), np.arange(10))}
    return ProtocolData(numbered(0, 100), training_attacks, ImageSet("clean", numbered(2000, 40), ids), attacks, others)


def test_clean_only_fits_on_clean_images_of_the_pool_and_calibrates_on_the_rest(data: ProtocolData) -> None:
    detector = Recorder()
    (task,) = plan("P3", data)
    calibration = fit_detector(detector, task, data)
    ((x, y),) = detector.fits
    assert y is None
    assert calibration.n == 30
    held = np.rint(calibration.scores * 10000).astype(int).tolist()
    assert sorted(numbers(x) + held) == list(range(100))


def test_p2_learns_from_fgsm_on_images_that_are_fitted_on(data: ProtocolData) -> None:
    detector = Recorder()
    (task,) = plan("P2", data)
    fit_detector(detector, task, data)
    ((x, y),) = detector.fits
    assert y is not None
    clean, training_attacks = numbers(x[y == 0]), numbers(x[y == 1])
    assert len(clean) == 70
    assert training_attacks  # some of the 50 lie in the 70 that are fitted on, and none elsewhere
    assert set(training_attacks) == {1000 + n for n in clean if n % 2 == 0}


@pytest.mark.parametrize("protocol", ["P1", "P4"])
def test_an_image_and_its_twin_never_stand_on_both_sides(data: ProtocolData, protocol: str) -> None:
    for task in plan(protocol, data):
        detector = Recorder()
        fit_detector(detector, task, data)
        ((x, y),) = detector.fits
        assert y is not None
        assert (np.asarray(numbers(x[y == 0])) < 100).all()
        training_attacks = {n % 1000 for n in numbers(x[y == 1])}
        scored = {int(i) for one in sets_of(task, data).values() for i in one.ids}
        assert training_attacks
        assert scored
        assert not training_attacks & scored


@pytest.mark.parametrize("protocol", ["P1", "P4"])
def test_two_folds_score_every_image_once(data: ProtocolData, protocol: str) -> None:
    for name, attack in data.attacks.items():
        mine = [task for task in plan(protocol, data) if name in task.tries]
        scored = [i for task in mine for i in sets_of(task, data)[f"attack {name}"].ids.tolist()]
        clean = [i for task in mine for i in sets_of(task, data)["clean"].ids.tolist()]
        assert sorted(scored) == attack.ids.tolist()
        assert sorted(clean) == data.clean.ids.tolist()


def test_p4_learns_from_other_families_and_never_from_excluded_attacks(data: ProtocolData) -> None:
    learnt = {task.key: set(task.learns) for task in plan("P4", data) if task.fold == 0}
    assert learnt == {"sign-0": {"jsma"}, "sparse-0": {"fgsm", "pgd"}, "patch-0": {"fgsm", "pgd", "jsma"}}


def test_a_detector_that_calibrates_itself_gets_all_images_and_its_calibration_is_taken(data: ProtocolData) -> None:
    detector = OwnCalibration()
    calibration = fit_detector(detector, plan("P2", data)[0], data)
    ((x, y),) = detector.fits
    assert y is not None
    assert sorted(numbers(x[y == 0])) == list(range(100))
    assert (y == 1).sum() == 50
    assert calibration is detector.calibration
    assert detector.scored == []


def test_limit_takes_fewer_images_of_the_pool(data: ProtocolData) -> None:
    detector = Recorder()
    calibration = fit_detector(detector, plan("P3", data)[0], data, limit=20)
    assert (len(detector.fits[0][0]), calibration.n) == (14, 6)
    with pytest.raises(ArgumentError, match="Expected argument `limit` to be a number of images"):
        fit_detector(detector, plan("P3", data)[0], data, limit=0)


def test_protocol_without_anything_to_learn_from(data: ProtocolData) -> None:
    bare = ProtocolData(data.pool, {}, data.clean, data.attacks)
    with pytest.raises(InputError, match="Expected argument `training_attacks` to be attacks on images of the pool"):
        plan("P2", bare)
    with pytest.raises(UnknownNameError, match="protocol"):
        plan("P5", data)
    alone = ProtocolData(data.pool, {}, data.clean, {"one": data.attacks["fgsm"].select(np.arange(40) < 1)})
    empty = plan("P1", alone)[0]  # learns from fold 1, where no attack was successful
    with pytest.raises(InputError, match="successful attacks among one"):
        fit_detector(Recorder(), empty, alone)


def test_image_sets_are_checked() -> None:
    with pytest.raises(InputError, match="one for each of 3 images"):
        ImageSet("a", numbered(0, 3), np.arange(2))
    with pytest.raises(InputError, match="each image once in 'a'"):
        ImageSet("a", numbered(0, 2), np.array([1, 1]))


def test_nothing_is_scored_twice(data: ProtocolData, tmp_path: Path) -> None:
    (task,) = plan("P3", data)
    first = Recorder()
    table = score_task(first, task, data)
    table.save(tmp_path / "table.npz", key="a")
    known = ScoreTable.load(tmp_path / "table.npz", key="a")
    again = Recorder()
    same = score_task(again, task, data, known=known)
    assert not again.fits
    assert not again.scored
    for name, one in table.sets.items():
        np.testing.assert_array_equal(one.scores, same.sets[name].scores)
    changed = dict(data.attacks) | {"pgd": ImageSet("pgd", numbered(8000, 7), np.arange(7), "sign")}
    new = ProtocolData(data.pool, data.training_attacks, data.clean, changed, data.others)
    third = Recorder()
    after = score_task(third, plan("P3", new)[0], new, known=known)
    assert third.scored == [30, 7]  # calibration, and the attack that changed; its time is known
    assert after.seconds == known.seconds
    np.testing.assert_allclose(after.sets["attack pgd"].scores, (8000 + np.arange(7)) / 10000, rtol=1e-6)


def test_scores_under_another_key_or_damaged_are_refused(data: ProtocolData, tmp_path: Path) -> None:
    file = tmp_path / "table.npz"
    score_task(Recorder(), plan("P3", data)[0], data).save(file, key="a")
    with pytest.raises(FileError, match="one written under the key b"):
        ScoreTable.load(file, key="b")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(FileError, match="a file of scores"):
        ScoreTable.load(file)
    with pytest.raises(FileError, match="a file of scores"):
        ScoreTable.load(tmp_path / "none.npz")


def test_an_attack_without_success_is_scored_as_nothing(data: ProtocolData) -> None:
    none = ImageSet("jsma", numbered(0, 0), np.arange(0), "sparse")
    new = ProtocolData(data.pool, data.training_attacks, data.clean, {"jsma": none})
    table = score_task(Recorder(), plan("P3", new)[0], new)
    assert table.sets["attack jsma"].scores.shape == (0,)
    found = evaluate(plan("P3", new), {"all": table}, ImageDraws(40, 10), detector="r", needed=1)
    assert found.mean is None
    assert not found.attacks["jsma"].figures.evaluated
    assert found.worst_case is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 30), st.booleans())
def test_each_sample_is_the_figure_of_the_repeated_images(seed: int, n: int, m: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    draws = ImageDraws(30, 5, seed)
    ids, other = random.permutation(30)[:n], random.permutation(30)[:m]
    clean, attacked = random.normal(size=n), random.normal(0.5, size=m)
    if ties:
        clean, attacked = clean.round(), attacked.round()
    found = CleanScores(clean, ids, draws, (0.1, 0.3)).against(attacked, other)
    for b in range(5):
        below, above = np.repeat(clean, draws.counts[b, ids]), np.repeat(attacked, draws.counts[b, other])
        if not len(below) or not len(above):
            assert np.isnan(found.auroc[b])
            continue
        truth = np.r_[np.zeros(len(below)), np.ones(len(above))]
        assert found.auroc[b] == pytest.approx(roc_auc_score(truth, np.r_[below, above]), abs=1e-12)
        for row, fpr in enumerate((0.1, 0.3)):
            best = max((float((above > t).mean()) for t in below if (below > t).mean() <= fpr + 1e-12), default=0.0)
            assert found.tpr[row, b] == pytest.approx(best, abs=1e-12)


def test_common_draws_agree_with_the_bootstrap_of_one_attack() -> None:
    random = np.random.default_rng(0)
    clean, attacked, ids = random.normal(size=400), random.normal(1.0, size=400), np.arange(400)
    mine = CleanScores(clean, ids, ImageDraws(400, 2000)).against(attacked, ids).auroc
    theirs = bootstrapped(clean, attacked, ids=(ids, ids), n_resamples=2000).auroc
    assert mine.mean() == pytest.approx(theirs.mean(), abs=0.002)
    assert mine.std() == pytest.approx(theirs.std(), rel=0.1)


def test_draws_are_checked() -> None:
    with pytest.raises(ArgumentError, match="n_resamples"):
        ImageDraws(3, 0)
    draws = ImageDraws(3, 2)
    with pytest.raises(InputError, match="numbers of the 3 test images"):
        CleanScores([1.0, 2.0], np.array([0, 3]), draws)
    with pytest.raises(InputError, match="one id for each score"):
        CleanScores([1.0, 2.0], np.array([0]), draws)


def one_fit(clean: np.ndarray, attacks: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[Task, ScoreTable]:
    sets = {"clean": Scored(np.arange(len(clean)), clean)}
    sets |= {f"attack {name}": Scored(ids, scores) for name, (ids, scores) in attacks.items()}
    return Task("all", (), "pool", tuple(attacks), alarms=True), ScoreTable(Calibration(clean), sets)


def test_mean_and_worst_leave_out_what_is_excluded_and_what_is_too_few() -> None:
    ids, clean = np.arange(100), np.arange(100.0)
    attacks = {
        "a": (ids, clean + 50),
        "b": (ids, clean + 20),
        "few": (ids[:9], clean[:9]),
        "excluded": (ids, clean - 90),
    }
    task, table = one_fit(clean, attacks)
    found = evaluate((task,), {"all": table}, ImageDraws(100, 50), detector="d", needed=10, excluded=["excluded"])
    truth = np.repeat([0, 1], 100)
    by_sklearn = [roc_auc_score(truth, np.r_[clean, clean + shift]) for shift in (50, 20)]
    assert found.mean is not None
    assert found.worst is not None
    assert found.mean.value == pytest.approx(np.mean(by_sklearn))
    assert (found.worst_attack, found.worst.value) == ("b", pytest.approx(by_sklearn[1]))
    assert found.mean.low < found.mean.value < found.mean.high
    assert found.attacks["excluded"].figures.evaluated
    assert not found.attacks["few"].figures.evaluated
    assert found.attacks["few"].figures.n_attacked == 9


def test_worst_case_takes_of_each_image_the_least_score_of_attacks_that_count() -> None:
    ids, clean = np.arange(100), np.arange(100.0)
    attacks = {"a": (ids, clean + 50), "b": (ids[:9], clean[:9] + 20), "excluded": (ids, clean - 90)}
    task, table = one_fit(clean, attacks)
    found = evaluate((task,), {"all": table}, ImageDraws(100, 50), detector="d", needed=10, excluded=["excluded"])
    least = np.where(ids < 9, clean + 20, clean + 50)
    assert found.worst_case is not None
    assert found.worst_case.figures.auroc is not None
    expected = roc_auc_score(np.repeat([0, 1], 100), np.r_[clean, least])
    assert found.worst_case.figures.auroc.value == pytest.approx(expected)
    few = evaluate(
        (task,), {"all": table}, ImageDraws(100, 50), detector="d", needed=9, excluded=["excluded"], among=ids[:9]
    )
    assert few.worst_case is not None
    assert few.worst_case.figures.auroc is not None
    assert few.worst_case.figures.n_attacked == 9
    expected = roc_auc_score(np.repeat([0, 1], (100, 9)), np.r_[clean, clean[:9] + 20])
    assert few.worst_case.figures.auroc.value == pytest.approx(expected)
    none = evaluate((task,), {"all": table}, ImageDraws(100, 50), detector="d", needed=9, among=np.array([500]))
    assert none.worst_case is None
    without = evaluate((task,), {"all": table}, ImageDraws(100, 50), detector="d", worst_case=False)
    assert without.worst_case is None


def test_a_fit_may_have_its_own_scale_in_each_fold() -> None:
    random = np.random.default_rng(0)
    tasks, score_tables, scaled = [], {}, {}
    for fold in (0, 1):
        ids = np.arange(fold, 200, 2)
        clean, attacked = random.normal(size=100), random.normal(1.0, size=100)
        key = f"a-{fold}"
        tasks.append(Task(key, ("a",), "test", ("a",), fold))
        for where, scale in ((score_tables, 1.0), (scaled, 1.0 + 999 * fold)):
            sets = {"clean": Scored(ids, clean * scale), "attack a": Scored(ids, attacked * scale)}
            where[key] = ScoreTable(Calibration(clean), sets)
    kept: dict[str, Any] = {"draws": ImageDraws(200, 20), "detector": "d", "needed": 50, "worst_case": False}
    one, other = evaluate(tasks, score_tables, **kept), evaluate(tasks, scaled, **kept)
    assert one.mean == other.mean
    by_fold = [
        roc_auc_score(np.repeat([0, 1], 100), np.r_[s.sets["clean"].scores, s.sets["attack a"].scores])
        for s in score_tables.values()
    ]
    assert one.mean is not None
    assert one.mean.value == pytest.approx(np.mean(by_fold))


def test_pooled_is_the_mean_over_classifiers_of_what_was_evaluated() -> None:
    ids, clean = np.arange(100), np.arange(100.0)
    first = one_fit(clean, {"a": (ids, clean + 50), "b": (ids, clean + 20)})
    second = one_fit(clean, {"a": (ids, clean + 30), "b": (ids[:3], clean[:3])})
    draws = ImageDraws(100, 50)
    both = [evaluate((t,), {"all": s}, draws, detector="d", needed=10) for t, s in (first, second)]
    found = pooled(both)
    values = [one.attacks["a"].figures.auroc.value for one in both]  # type: ignore[union-attr]
    assert found.n_seeds == 2
    assert found.attacks["a"].figures.auroc is not None
    assert found.attacks["a"].figures.auroc.value == pytest.approx(np.mean(values))
    assert found.attacks["b"].figures.auroc == both[0].attacks["b"].figures.auroc
    assert found.attacks["b"].figures.n_attacked == 103
    with pytest.raises(InputError, match="evaluations"):
        pooled([])


def test_missing_scores_are_an_error() -> None:
    task, _ = one_fit(np.arange(9.0), {})
    with pytest.raises(InputError, match="scores of each task"):
        evaluate((task,), {}, ImageDraws(9, 5), detector="d")


def test_false_alarms_count_misclassified_images_among_the_clean_ones() -> None:
    sets = {
        "clean": Scored(np.arange(90), np.arange(90.0)),
        "other misclassified": Scored(np.arange(10), np.full(10, 99.5)),
        "other noise": Scored(np.arange(4), np.array([10.0, 96, 97, 98])),
    }
    found = false_alarms(Calibration(np.arange(100.0)), ScoreTable(Calibration(np.arange(100.0)), sets).unattacked)
    assert found.rates["clean"][1].share == 0.1
    assert found.rates["correct"][1].share == 0.0
    assert found.rates["misclassified"][1].share == 1.0
    assert found.rates["noise"][1].share == 0.75
    assert found.due[1] == Calibration(np.arange(100.0)).realised_interval(0.05, n_test=100)
    ends = stats.betabinom(100, 5, 96).ppf([0.025, 0.975]) / 100
    assert found.due[1] == pytest.approx(tuple(ends))
    assert found.held()[1] is bool(ends[0] <= 0.1 <= ends[1])


def test_a_rate_that_calibration_cannot_resolve_raises_no_alarm() -> None:
    table = ScoreTable(Calibration(np.arange(30.0)), {"clean": Scored(np.arange(5), np.full(5, 100.0))})
    found = false_alarms(table.calibration, table.unattacked)
    assert found.due[0] is None
    assert found.held()[0] is None
    assert found.rates["clean"][0].share == 0.0
    assert found.rates["clean"][1].share == 1.0


def test_two_peers_end_to_end_tell_a_planted_attack(data: ProtocolData) -> None:
    random = np.random.default_rng(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()
    clean = random.random((300, 1, 4, 4)).astype(np.float32)
    attacked = ImageSet("odd", 1 - clean[200:] * 0.05, np.arange(100), "sign")
    one = ProtocolData(
        clean[:200], {"odd": attacked}, ImageSet("clean", clean[200:], np.arange(100)), {"odd": attacked}
    )
    draws = ImageDraws(100, 50)
    found = {}
    for make in (Margin, Mahalanobis):
        tasks = plan("P3", one)
        score_tables = {task.key: score_task(make(net), task, one) for task in tasks}
        found[make.name] = evaluate(tasks, score_tables, draws, detector=make.name, needed=50).mean
    assert found["Mahalanobis"] is not None
    assert found["margin"] is not None
    assert found["Mahalanobis"].value > 0.99
    assert found["Mahalanobis"].value > found["margin"].value
