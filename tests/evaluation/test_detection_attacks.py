"""Attacked images: what counts as success, what a file holds, and that nothing else is touched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.harness import attacks
from benchmarks.harness.attacks import Attacked, AttackSpec, attack_images, cached_attack
from benchmarks.harness.carlini import CarliniL2, CarliniLInf
from benchmarks.harness.distortions import DISTORTIONS, distorted
from benchmarks.harness.estimators import CountedNetwork, build_estimator, predict
from benchmarks.harness.suites import fit_suite, suite
from ce_plugin.errors import ArgumentError, FileError, InputError, UnknownNameError

WEIGHTS = torch.linspace(-1, 1, 16).roll(5)
SQUARE = AttackSpec("square", "query", "linf", "SquareAttack", {"eps": 0.1, "max_iter": 5, "p_init": 0.3})
FGSM = AttackSpec("fgsm", "sign", "linf", "FastGradientMethod", {"eps": 0.03}, tries=100, chunk=7)


def linear() -> nn.Module:
    """Two classes of 1 x 4 x 4 pictures; the margin of class 1 is 2 w.(x - 0.5)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([-WEIGHTS, WEIGHTS]))
        net[1].bias.copy_(torch.stack([WEIGHTS.sum() / 2, -WEIGHTS.sum() / 2]))
    return net.eval()


def pictures(count: int = 30, seed: int = 0) -> tuple[Any, Any]:
    """Random pictures of eight bits, in the middle of the range, and the classes that the linear network gives."""
    draw = np.random.default_rng(seed)
    images = (draw.integers(77, 178, (count, 1, 4, 4)) / 255).astype(np.float32)
    return images, predict(linear(), images).argmax(1)


def margins(images: Any) -> Any:
    """|w.(x - 0.5)| in closed form: a perturbation of L-inf size e moves it by e sum |w| at most."""
    return np.abs((images.reshape(len(images), -1).astype(float) - 0.5) @ WEIGHTS.numpy().astype(float))


class TestSuccess:
    def test_fgsm_succeeds_exactly_where_the_closed_form_says(self) -> None:
        images, labels = pictures(60)
        made = attack_images(FGSM, linear(), images, labels)
        # 0.03 is 7.65 / 255: the bound that eight bits can keep is 7 / 255.
        reach = 7 / 255 * WEIGHTS.abs().sum().item()
        assert made.success.tolist() == (margins(images) < reach).tolist()
        assert 0 < made.success.sum() < 60

    def test_images_are_of_eight_bits_and_within_the_bound(self) -> None:
        images, labels = pictures()
        made = attack_images(FGSM, linear(), images, labels)
        assert made.images.dtype == np.uint8
        change = np.abs(made.images.astype(int) - np.rint(images * 255).astype(int))
        assert change.max() == 7
        assert np.allclose(made.linf, 7 / 255, atol=1e-6)
        assert np.allclose(made.l2, 7 / 255 * 4, atol=1e-6)
        assert (made.changed == 16).all()

    def test_success_is_what_the_network_says_of_the_file(self) -> None:
        images, labels = pictures()
        made = attack_images(FGSM, linear(), images, labels)
        assert (predict(linear(), made.adversarial()).argmax(1) != labels[made.sources()]).all()
        stored = made.images.astype(np.float32) / np.float32(255)
        assert (predict(linear(), stored).argmax(1) == made.predicted).all()

    def test_only_correctly_classified_images_are_attacked_in_the_order_given(self) -> None:
        images, labels = pictures()
        wrong = labels.copy()
        wrong[[0, 3, 29]] = 1 - wrong[[0, 3, 29]]
        made = attack_images(FGSM, linear(), images, wrong, order=np.arange(30)[::-1])
        assert made.index.tolist() == [i for i in range(29, -1, -1) if i not in (0, 3, 29)]
        assert made.labels.tolist() == labels[made.index].tolist()

    def test_it_stops_after_enough_successes_and_at_most_tries(self) -> None:
        images, labels = pictures(60)
        whole = attack_images(FGSM, linear(), images, labels)
        some = attack_images(dataclasses.replace(FGSM, enough=5), linear(), images, labels)
        assert len(some.images) % 7 == 0
        assert some.success.sum() >= 5 > some.success[:-7].sum()
        assert some.images.tolist() == whole.images[: len(some.images)].tolist()
        assert len(attack_images(dataclasses.replace(FGSM, tries=11), linear(), images, labels).images) == 11

    def test_a_perturbation_that_rounding_undoes_is_lengthened_by_the_least_factor(self) -> None:
        images, labels = pictures(40)
        bare = AttackSpec("deepfool", "minimal", "l2", "DeepFool", {"epsilon": 1e-6}, tries=40, chunk=40)
        factors = (1.0, 1.02, 1.05, 1.1, 1.5, 2.0, 4.0)
        before = attack_images(bare, linear(), images, labels)
        after = attack_images(dataclasses.replace(bare, stretch=factors), linear(), images, labels)
        assert not before.success.all()
        assert after.success.all()
        assert (after.stretch[before.success] == 1.0).all()
        assert (after.stretch[~before.success] > 1.0).all()
        assert after.images[before.success].tolist() == before.images[before.success].tolist()

    def test_jsma_aims_at_the_runner_up(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).eval()
        with torch.no_grad():
            net[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0]]))
        image = np.zeros((1, 1, 2, 2), np.float32)
        image[0, 0] = np.array([[153, 51], [51, 0]], np.float32) / np.float32(255)
        spec = AttackSpec("jsma", "sparse", "l0", "SaliencyMapMethod", {"theta": 1.0, "gamma": 1.0}, aims=True)
        assert attack_images(spec, net, image, np.array([0])).predicted.tolist() == [1]


class TestCarlini:
    def test_both_find_the_closed_form_of_a_linear_network(self) -> None:
        images, labels = pictures(12)
        goal = np.eye(2, dtype=np.float32)[labels]
        near = CarliniL2(linear(), steps=8, max_iter=80).generate(images, goal)
        l2 = np.linalg.norm((near - images).reshape(12, -1), axis=1)
        assert np.allclose(l2, margins(images) / WEIGHTS.norm().item(), rtol=0.05, atol=0.01)
        small = CarliniLInf(linear()).generate(images, goal)
        linf = np.abs(small - images).reshape(12, -1).max(1)
        least = margins(images) / WEIGHTS.abs().sum().item()
        assert (linf >= least - 1e-4).all()
        assert np.mean(linf / (least + 0.005)) < 1.2

    @pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
    def test_confidence_is_a_lead_in_logits(self, confidence: float) -> None:
        images, labels = pictures(12)
        goal = np.eye(2, dtype=np.float32)[labels]
        found = CarliniL2(linear(), confidence=confidence).generate(images, goal)
        scores = predict(linear(), found)
        lead = scores[np.arange(12), 1 - labels] - scores[np.arange(12), labels]
        assert (lead >= confidence - 0.05).all()

    def test_an_image_without_a_solution_comes_back_as_it_was(self) -> None:
        images, labels = pictures(3)
        found = CarliniL2(linear(), confidence=1e6).generate(images, np.eye(2, dtype=np.float32)[labels])
        assert (found == images).all()


class TestEstimator:
    def test_it_answers_as_arts_own_classifier_does(self) -> None:
        from ce_plugin.networks.art import build_classifier

        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
        ours = build_estimator(CountedNetwork(net), (1, 4, 4), 3)
        theirs = build_classifier(CountedNetwork(net), (1, 4, 4), 3, (0.0, 1.0), torch.device("cpu"))
        x, y = pictures(9)[0], np.arange(9) % 3
        assert np.allclose(ours.predict(x), theirs.predict(x), atol=1e-6)
        for label in (None, 2, y):
            assert np.allclose(ours.class_gradient(x, label), theirs.class_gradient(x, label), atol=1e-6)
            assert ours.class_gradient(x, label).shape == theirs.class_gradient(x, label).shape

    def test_no_image_is_passed_twice(self) -> None:
        counted = CountedNetwork(linear())
        estimator = build_estimator(counted, (1, 4, 4), 2)
        x = pictures(5)[0]
        first, again = estimator.predict(x), estimator.predict(x[[3, 3, 0]])
        assert counted.images == 5
        assert (again == first[[3, 3, 0]]).all()


class TestStateAndOrder:
    def test_network_and_global_random_state_are_left_as_they_were(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 2)).train()
        with torch.no_grad():
            net[2].weight.copy_(torch.stack([-WEIGHTS, WEIGHTS]))
            net[2].bias.zero_()
        images = pictures(6)[0]
        labels = predict(net.eval(), images).argmax(1)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002 - the global state is what is looked at
        attack_images(SQUARE, net, images, labels)
        drawn = torch.rand(1), np.random.rand()  # noqa: NPY002
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        assert drawn == (torch.rand(1), np.random.rand())  # noqa: NPY002
        assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())

    def test_what_ran_before_changes_nothing(self) -> None:
        images, labels = pictures(10)
        pgd = AttackSpec(
            "pgd", "sign", "linf", "ProjectedGradientDescent", {"eps": 0.1, "eps_step": 0.02, "num_random_init": 1}
        )
        alone = attack_images(pgd, linear(), images, labels, seed=4)
        attack_images(SQUARE, linear(), images, labels, seed=4)
        assert attack_images(pgd, linear(), images, labels, seed=4).images.tolist() == alone.images.tolist()

    def test_another_seed_draws_other_numbers(self) -> None:
        images, labels = pictures(10)
        one, two = (attack_images(SQUARE, linear(), images, labels, seed=seed).images for seed in (0, 1))
        assert one.tolist() != two.tolist()


class TestFiles:
    def test_a_second_call_does_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        images, labels = pictures()
        file = tmp_path / "deep" / "fgsm.npz"
        made = cached_attack(file, FGSM, linear(), images, labels)
        stamp = file.stat().st_mtime_ns

        def never(*args: Any, **kwargs: Any) -> Attacked:
            raise AssertionError("attacked again")

        monkeypatch.setattr(attacks, "attack_images", never)
        again = cached_attack(file, FGSM, linear(), images, labels)
        assert file.stat().st_mtime_ns == stamp
        assert again.images.tolist() == made.images.tolist()
        assert (again.spec, again.forwards, again.seconds) == (made.spec, made.forwards, made.seconds)
        assert list(file.parent.iterdir()) == [file]

    def test_other_settings_network_or_images_are_made_again(self, tmp_path: Path) -> None:
        images, labels = pictures()
        file = tmp_path / "fgsm.npz"
        cached_attack(file, FGSM, linear(), images, labels)
        other = dataclasses.replace(FGSM, settings={"eps": 0.2})
        assert cached_attack(file, other, linear(), images, labels).linf.max() == pytest.approx(0.2, abs=1e-6)
        net = linear()
        with torch.no_grad():
            net[1].weight.mul_(2)  # type: ignore[operator, union-attr]
        stamp = file.stat().st_mtime_ns
        cached_attack(file, other, net, images, predict(net, images).argmax(1))
        assert file.stat().st_mtime_ns != stamp

    def test_a_damaged_file_is_made_again(self, tmp_path: Path) -> None:
        images, labels = pictures()
        file = tmp_path / "fgsm.npz"
        cached_attack(file, FGSM, linear(), images, labels)
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(FileError, match="a file of attacked images"):
            Attacked.load(file)
        assert len(cached_attack(file, FGSM, linear(), images, labels).images) == 30

    def test_a_file_of_another_key_is_refused(self, tmp_path: Path) -> None:
        images, labels = pictures()
        attack_images(FGSM, linear(), images, labels).save(tmp_path / "a.npz", "one")
        with pytest.raises(FileError, match="one made under the key two, but got one"):
            Attacked.load(tmp_path / "a.npz", "two")


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda x: x.astype(np.float64), "float32 of shape"),
            (lambda x: x[:, 0], "float32 of shape"),
            (lambda x: x[:0], "N at least 1"),
            (lambda x: x * 255, "values in"),
            (lambda x: np.full_like(x, np.nan), "values in"),
        ],
    )
    def test_images(self, change: Any, words: str) -> None:
        images, labels = pictures()
        with pytest.raises(InputError, match=words):
            attack_images(FGSM, linear(), change(images), labels[: len(change(images))])

    def test_labels_and_network(self) -> None:
        images, labels = pictures()
        with pytest.raises(InputError, match="one for each of 30 images, but got 29"):
            attack_images(FGSM, linear(), images, labels[1:])
        with pytest.raises(InputError, match="classifies correctly, but got none"):
            attack_images(FGSM, linear(), images, 1 - labels)

    def test_specs(self) -> None:
        with pytest.raises(ArgumentError, match="`tries`"):
            dataclasses.replace(FGSM, tries=0)
        with pytest.raises(ArgumentError, match="ascending factors"):
            dataclasses.replace(FGSM, stretch=(1.0, 3.0, 2.0))
        with pytest.raises(UnknownNameError, match="`name`"):
            suite("large")
        with pytest.raises(UnknownNameError, match="`attack`"):
            attack_images(dataclasses.replace(FGSM, attack="FastGradient"), linear(), *pictures())


class TestSuites:
    @pytest.mark.parametrize("name", ["small", "imagenet"])
    def test_every_attack_is_known_once_and_set_by_settings_that_exist(self, name: str) -> None:
        from benchmarks.harness.estimators import BUILDERS
        from ce_plugin.networks.art import attack_class

        names = [spec.name for spec in suite(name)]
        assert len(set(names)) == len(names)
        for spec in suite(name):
            if spec.attack not in BUILDERS:
                assert set(spec.settings) <= set(attack_class(spec.attack).attack_params)

    @pytest.mark.parametrize(("name", "least"), [("small", 200), ("imagenet", 50)])
    def test_enough_images_are_tried_for_the_number_that_is_evaluated(self, name: str, least: int) -> None:
        assert all(min(spec.tries, spec.enough) >= least for spec in suite(name))

    def test_only_fgsm_is_learnt_from(self) -> None:
        assert {spec.attack for name in ("small", "imagenet") for spec in fit_suite(name)} == {"FastGradientMethod"}


class TestBenign:
    @settings(max_examples=20, deadline=None)
    @given(st.sampled_from(sorted(DISTORTIONS)), st.integers(0, 5), st.sampled_from([1, 3]))
    def test_eight_bits_within_the_range_and_the_same_for_a_seed(self, kind: str, seed: int, channels: int) -> None:
        images = np.random.default_rng(seed).random((3, channels, 12, 16)).astype(np.float32)
        made = distorted(images, kind, seed)
        assert made.shape == images.shape
        assert made.dtype == np.float32
        assert made.min() >= 0
        assert made.max() <= 1
        assert np.allclose(made * 255, np.rint(made * 255), atol=1e-4)
        assert (distorted(images, kind, seed) == made).all()
        assert (distorted(images[:1], kind, seed) == made[:1]).all()

    def test_noise_has_the_size_that_is_asked_for(self) -> None:
        grey = np.full((4, 3, 32, 32), 128 / 255, np.float32)
        sign = distorted(grey, "sign", size=8 / 255) - grey
        assert np.allclose(np.abs(sign), 8 / 255, atol=1e-6)
        assert abs(sign.mean()) < 0.002
        gauss = distorted(grey, "gauss", size=0.1) - grey
        assert gauss.std() == pytest.approx(0.1, rel=0.03)
        # Equal norm: both are sqrt(D) times the size.
        assert np.linalg.norm(distorted(grey, "sign") - grey) == pytest.approx(np.linalg.norm(gauss), rel=0.05)

    def test_shift_moves_the_picture_by_one_or_two_pixels(self) -> None:
        images = np.zeros((20, 1, 16, 16), np.float32)
        images[:, :, 8, 8] = 1
        moved = np.argwhere(distorted(images, "shift")[:, 0] == 1)[:, 1:] - 8
        assert set(np.abs(moved).ravel().tolist()) == {1, 2}

    def test_contrast_keeps_the_mean(self) -> None:
        images = np.random.default_rng(0).random((2, 1, 16, 16)).astype(np.float32)
        made = distorted(images, "contrast")
        assert np.allclose(made.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=2e-3)
        assert np.allclose(made.std((1, 2, 3)), 0.8 * images.std((1, 2, 3)), rtol=0.01)

    def test_jpeg_is_pillows(self) -> None:
        import io

        from PIL import Image

        image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=75)
        wanted = np.asarray(Image.open(stream), dtype=np.float32).transpose(2, 0, 1) / 255
        offered = (image.transpose(2, 0, 1)[None] / 255).astype(np.float32)
        assert np.allclose(distorted(offered, "jpeg")[0], wanted, atol=1e-6)

    def test_bad_input(self) -> None:
        images = np.zeros((1, 2, 8, 8), np.float32)
        with pytest.raises(UnknownNameError, match="Did you mean 'gauss'"):
            distorted(images, "gaus")
        with pytest.raises(ArgumentError, match="`size`"):
            distorted(images, "gauss", size=0.0)
        with pytest.raises(InputError, match="1 or 3 channels"):
            distorted(images, "jpeg")
        with pytest.raises(InputError, match="values in"):
            distorted(images + 2, "gauss")
        with pytest.raises(InputError, match="floats of shape"):
            distorted(images[0], "gauss")
