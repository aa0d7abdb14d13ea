"""What comes into a detector: labels in all forms, the classifier, images, and harmless alterations of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _toy import classifier, patterns, quick_signature, same, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ce_plugin.detection import Augmentation, CausalEffectDetector, Denoising, Signature
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.detection.denoiser import Denoiser, train_denoiser
from ce_plugin.detection.fitting import adversarial_labels
from ce_plugin.detection.probes import View
from ce_plugin.detection.signature import digests
from ce_plugin.errors import ArgumentError, InferenceError, InputError, ModelError, UnknownNameError
from ce_plugin.networks.art import build_classifier

# --- labels


@settings(max_examples=50, deadline=None)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=8))
def test_all_forms_of_labels_say_the_same(flags: list[bool]) -> None:
    n, column = len(flags), np.array(flags, dtype=float)
    one_hot = np.stack([1 - column, column], 1)
    for form in (flags, column, column[:, None], one_hot, one_hot.astype(np.int32).tolist(), torch.tensor(flags)):
        assert adversarial_labels(form, n).tolist() == flags
    assert not adversarial_labels(None, n).any()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([[1, 0], 1, 0], "labels of mixed form. Write all of them in one form"),
        (["clean", "adversarial", "clean"], "labels of mixed form"),
        ([0, 1, 2], "but got values 2. Classes of the images are not wanted here"),
        ([0.5, np.nan, 1], "but got values 0.5 and nan"),
        ([[1, 0], [1, 1], [0, 0]], "2 rows that do not have exactly one 1"),
        (np.eye(3), r"shape \(3, 3\). Classes of the images are not wanted"),
        (np.zeros((3, 2, 1)), r"shape \(3, 2, 1\)"),
        (1, r"shape \(\)"),
        ([0, 1], "one label for each of the 3 images, but got 2 labels"),
    ],
)
def test_labels_of_another_form_are_refused(y: object, message: str) -> None:
    with pytest.raises(InputError, match=f"Expected argument `y` to be .*{message}"):
        adversarial_labels(y, 3)  # type: ignore[arg-type]


# --- the classifier


def test_the_toolbox_s_classifier_is_its_network_with_its_preprocessing() -> None:
    net = classifier(channels=3, dtype=torch.float32)
    made = build_classifier(net, (3, 8, 8), 3, (0.0, 1.0), torch.device("cpu"))
    plain = ClassifierWrapper(made)
    x = torch.as_tensor(patterns(4, channels=3)[0])
    torch.testing.assert_close(plain(x), net(x))
    assert plain.clip_values == (0.0, 1.0)
    assert plain.module("0") is net[0]


def test_clip_values_are_those_given_those_of_the_classifier_or_0_to_1() -> None:
    made = build_classifier(classifier(dtype=torch.float32), (1, 8, 8), 3, (-1.0, 2.0), torch.device("cpu"))
    assert ClassifierWrapper(made).clip_values == (-1.0, 2.0)
    assert ClassifierWrapper(made, (0, 3)).clip_values == (0.0, 3.0)
    assert ClassifierWrapper(classifier()).clip_values == (0.0, 1.0)
    with pytest.raises(ArgumentError, match=r"`clip_values` to be a pair .* with low < high, but got \(1, 0\)"):
        ClassifierWrapper(classifier(), (1, 0))


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match=r"`classifier` to be an nn.Module or an ART Py.*but got function"):
        ClassifierWrapper(lambda x: x)
    x = torch.zeros(2, 1, 8, 8)
    for layers, shape in (
        ([nn.Flatten(), nn.Linear(64, 1)], r"shape \(2, 1\)"),
        ([nn.Identity()], r"shape \(2, 1, 8, 8\)"),
    ):
        with pytest.raises(ModelError, match=rf"a network with logits \(N, K\), K >= 2, but got {shape}"):
            ClassifierWrapper(nn.Sequential(*layers))(x)
    with pytest.raises(UnknownNameError, match=r"`layer` to be one of '0', '1', '2', '3', but got 'conv'"):
        ClassifierWrapper(classifier()).module("conv")


def test_the_fingerprint_is_that_of_every_parameter_and_buffer() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3)).eval()
    protected = ClassifierWrapper(net)
    first, version = protected.fingerprint(), protected.version()
    assert ClassifierWrapper(net).fingerprint() == first
    assert protected.version() == version
    with torch.no_grad():
        net[2].bias[1] += 1e-6
    assert protected.version() != version
    second = protected.fingerprint()
    assert second != first
    net[1].running_mean[0] = 0.1
    assert protected.fingerprint() not in (first, second)
    before = protected.version()
    assert protected.double().fingerprint() != second
    assert protected.version() != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_images_come_in_every_form_that_arrays_have(dtype: torch.dtype) -> None:
    protected, x = ClassifierWrapper(classifier(dtype=dtype)), patterns(6)[0]
    wanted = torch.as_tensor(x).to(dtype)
    frozen = x.copy()
    frozen.flags.writeable = False
    swapped = x.astype(">f4")
    for form in (x, x.astype(np.float64), frozen, swapped, torch.as_tensor(x), np.asfortranarray(x)):
        found = protected.images(form)
        assert found.dtype == dtype
        assert torch.equal(found, wanted)
    assert torch.equal(protected.images(x[::-1]), wanted.flip(0))
    assert not protected.images(torch.as_tensor(x).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.zeros((2, 8, 8), np.float32),
            r"images \(N, C, H, W\), N >= 1.* but got shape \(2, 8, 8\)",
        ),
        (np.zeros((0, 1, 8, 8), np.float32), r"but got shape \(0, 1, 8, 8\)"),
        ([[0.0]], "but got list"),
        (np.zeros((2, 1, 8, 8), np.uint8), r"of floating point, but got uint8. Convert it to float32 in image units"),
        (
            np.full((2, 1, 8, 8), 1.5, np.float32),
            r"clip values \[0, 1\], but got values from 1.5 to 1.5. Pass",
        ),
        (np.full((2, 1, 8, 8), -0.1, np.float32), r"values from -0.1 to -0.1"),
        (np.full((2, 1, 8, 8), np.nan, np.float32), "finite and inside the clip values .* but got values from nan"),
        (np.full((2, 1, 8, 8), np.inf, np.float32), "but got values from inf to inf"),
    ],
)
def test_images_that_cannot_be_are_refused(x: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassifierWrapper(classifier()).images(x)


def test_the_test_logits_see_the_normalisation_and_leaves_no_trace() -> None:
    net = classifier().train()
    before = snapshot(net)
    first = ClassifierWrapper(net).test_logits((1, 8, 8))
    assert torch.equal(ClassifierWrapper(net).test_logits((1, 8, 8)), first)
    assert not torch.allclose(ClassifierWrapper(net, normalization=(0.5, 0.5)).test_logits((1, 8, 8)), first)
    assert same(before, snapshot(net))


# --- measuring


def test_equal_images_have_equal_digests() -> None:
    x = torch.as_tensor(patterns(5)[0])
    names = digests(torch.cat([x, x[:2].double()]))
    assert names[:2] == names[5:]
    assert len(set(names)) == 5
    assert all(0 <= name < 2**63 for name in names)
    nudged = x.clone()
    nudged[0, 0, 0, 0] += 1e-6
    assert digests(nudged)[0] != names[0]
    assert digests(nudged)[1:] == names[1:5]


def test_measuring_does_not_depend_on_batches_and_leaves_no_trace() -> None:
    net = classifier().train()
    net[3].weight.grad = torch.ones_like(net[3].weight)
    net[0].bias.requires_grad_(False)
    protected, signature, x = ClassifierWrapper(net), quick_signature(), torch.as_tensor(patterns(11)[0]).double()
    before = snapshot(net)
    whole = signature.measure(protected, x, batch_size=64, seed=0)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    parts = signature.measure(protected, x[order], batch_size=3, seed=0)
    assert same(before, snapshot(net))
    for name, response in whole.responses.items():
        torch.testing.assert_close(parts.responses[name].effects, response.effects[order], atol=1e-11, rtol=0)
        torch.testing.assert_close(parts.responses[name].margins, response.margins[order], atol=1e-11, rtol=0)
        assert not response.effects.requires_grad
    with torch.inference_mode():
        again = signature.measure(protected, protected.images(x * 1.0), batch_size=64, seed=0)
    assert torch.equal(again.idle, whole.idle)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "8"])
def test_counts_are_positive_whole_numbers(count: object) -> None:
    with pytest.raises(ArgumentError, match="`batch_size` to be a positive whole number, but got"):
        CausalEffectDetector(classifier(), quick_signature()).fit(patterns(120)[0], batch_size=count)  # type: ignore[arg-type]


# --- harmless alterations


def test_alterations_belong_to_the_image_and_are_stored_in_256_levels() -> None:
    x = torch.as_tensor(patterns(60)[0])
    ids = list(range(60))
    altered = Augmentation()(x, ids, seed=0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(Augmentation()(x[order], [ids[i] for i in order], seed=0), altered[order])
    assert not torch.equal(Augmentation()(x, ids, seed=1), altered)
    torch.testing.assert_close((altered * 255).round() / 255, altered)
    assert 0 <= float(altered.min()) <= float(altered.max()) <= 1
    in_bytes = Augmentation(noise=0.15 * 255, value_range=(0, 255))(x * 255, ids, seed=0)
    torch.testing.assert_close(in_bytes / 255, altered, atol=1.01 / 255, rtol=0)


def test_each_kind_does_what_it_is_called() -> None:
    """Alone, against its own closed form: no noise at all, a shift by one pixel, a loss of contrast."""
    x, ids = torch.as_tensor(patterns(200)[0]).double(), list(range(200))
    stored = (x * 255).round() / 255
    nothing = Augmentation(noise=0, shift=0, contrast=0)(x, ids, seed=0)
    torch.testing.assert_close(nothing, stored)
    darker = Augmentation(noise=0, shift=0, contrast=0.5)(x, ids, seed=0)
    share = (darker.flatten(1) @ torch.ones(64).double()) / x.flatten(1).sum(1)
    assert 0.49 < float(share.min()) < 0.6
    assert 0.05 < float((share < 0.99).double().mean()) < 0.35  # one kind of six
    moved = Augmentation(noise=0, shift=1, contrast=0)(x, ids, seed=0)
    rows = (moved - stored).flatten(1).abs().amax(1) > 1e-9
    assert 0.05 < float(rows.double().mean()) < 0.35
    for image, other in zip(moved[rows], stored[rows], strict=True):
        padded = np.pad(other[0].numpy(), 1, mode="edge")
        shifts = [padded[dy : dy + 8, dx : dx + 8] for dy in range(3) for dx in range(3)]
        assert min(np.abs(image[0].numpy() - shifted).max() for shifted in shifts) < 1e-9
    noisy = (Augmentation(noise=0.1, shift=0, contrast=0)(x, ids, seed=0) - stored).flatten(1)
    assert 0.5 < float((noisy.abs().amax(1) > 1e-9).double().mean()) < 0.85  # four of six
    assert float(noisy.std(1).max()) < 0.13


def test_photographs_bear_less_noise() -> None:
    assert Augmentation.of((3, 224, 224)).noise < Augmentation.of((1, 28, 28)).noise
    assert Augmentation.of((1, 28, 28), (0, 255)).noise == pytest.approx(255 * Augmentation.of((1, 28, 28)).noise)


def test_bad_alterations_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`noise` to be a number in image units, 0 or more, but got -0\.1"):
        Augmentation(noise=-0.1)
    with pytest.raises(ArgumentError, match="`shift` to be a number of pixels, 0 or more, but got -1"):
        Augmentation(shift=-1)
    with pytest.raises(ArgumentError, match=r"`contrast` to be a share in \[0, 1\], but got 2"):
        Augmentation(contrast=2)
    with pytest.raises(ArgumentError, match=r"`value_range` to be a pair .* but got \(1\.0, 1\.0\)"):
        Augmentation(value_range=(1.0, 1.0))


# --- the denoiser


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 7, 5), (1, 2, 9, 16)])
def test_a_denoiser_keeps_shape_and_range(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(shape[1], width=3, value_range=(-1.0, 3.0)).eval()
    found = denoiser(20 * torch.randn(shape), torch.zeros(shape[0], 1, *shape[2:]))
    assert found.shape == shape
    assert -1 <= float(found.min()) <= float(found.max()) <= 3


def test_training_teaches_to_denoise_and_leaves_no_trace() -> None:
    net = classifier(dtype=torch.float32).train()
    net[3].weight.grad = torch.ones_like(net[3].weight)
    net[0].bias.requires_grad_(False)
    protected, x = ClassifierWrapper(net), torch.as_tensor(patterns(120)[0])
    before = snapshot(net)
    trained = train_denoiser(protected, x, width=4, n_steps=60, batch_size=32, seed=3)
    start = train_denoiser(protected, x, width=4, n_steps=1, seed=3)
    again = train_denoiser(protected, x, width=4, n_steps=1, seed=3)
    assert same(before, snapshot(net))
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), again.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert not trained.training
    new = torch.as_tensor(patterns(60, seed=5)[0])
    noisy = (new + 0.2 * torch.randn(new.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    with torch.no_grad():
        errors = [float((denoiser(noisy) - new).square().mean()) for denoiser in (start, trained)]
        answers = [float((net.eval()(denoiser(noisy)) - net(new)).square().mean()) for denoiser in (start, trained)]
    assert errors[1] < 0.5 * errors[0]
    assert answers[1] < answers[0]
    other = train_denoiser(protected, x, width=4, n_steps=1, seed=4)
    assert not torch.equal(other.fine.weight, start.fine.weight)


class Breaking(nn.Module):
    """A network that fails after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.net, self.left = classifier(dtype=torch.float32), calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of order")
        found: Tensor = self.net(x)
        return found


def test_an_error_while_training_leaves_no_trace() -> None:
    net = Breaking(3).train()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="out of order"):
        train_denoiser(ClassifierWrapper(net), torch.as_tensor(patterns(20)[0]), width=2, n_steps=9)
    assert same(before, snapshot(net))


def test_a_denoiser_is_trained_before_it_is_used_and_comes_back() -> None:
    protected, x = ClassifierWrapper(classifier(dtype=torch.float32)), torch.as_tensor(patterns(40)[0])
    probe = Denoising(width=3, least_steps=2)
    with pytest.raises(InferenceError, match="one whose denoiser is trained, but got one before `fit`"):
        probe.respond(View(protected, x))
    signature = Signature([probe])
    (ready,) = signature.fit(protected, x, n_epochs=1, seed=0).probes
    assert isinstance(ready, Denoising)
    assert ready.denoiser is not None
    state = torch.random.get_rng_state()
    probe.allocate((1, 8, 8), (0.0, 1.0))
    probe.load_state_dict(ready.state_dict(), assign=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        found = ready.respond(View(protected, x))
        torch.testing.assert_close(found.effects, protected(ready.denoiser(x)) - protected(x))
        again = probe.respond(View(protected, x))
    assert torch.equal(again.effects, found.effects)
    assert Denoising(width=3).denoiser is None
    assert not any(value.requires_grad for value in probe.parameters())
