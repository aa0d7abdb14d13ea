"""GAN training: losses by hand, the seed alone decides, resumed as if never interrupted, and what labels do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.errors import ArgumentError, FileError, InputError, TargetError, UnknownNameError
from ce_plugin.models import GAN, Discriminator, Generator, train_gan
from ce_plugin.models import gan as module
from ce_plugin.randomness import generator

SMALL = {"width": 2, "latent": 3, "batch_size": 4}


def halves(n: int = 40) -> tuple[Tensor, Tensor]:
    """Class 0 is bright on top, class 1 below."""
    y = torch.arange(n) % 2
    x = 0.1 * torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x[y == 0, :, :14] += 0.8
    x[y == 1, :, 14:] += 0.8
    return x, y


def weights(gan: GAN) -> Tensor:
    return torch.cat([p.detach().flatten() for p in (*gan.generator.parameters(), *gan.discriminator.parameters())])


@pytest.mark.parametrize(
    ("loss", "mismatched"), [("non-saturating", False), ("saturating", False), ("saturating", True)]
)
def test_the_losses_of_the_first_step_are_those_of_the_definition(loss: str, mismatched: bool) -> None:
    """-log s(D) and its kin, written with probabilities in float64, on the pictures and noise of the first step."""
    x, y = halves()
    gan = train_gan(x, y, steps=1, loss=loss, mismatched=mismatched, seed=5, **SMALL)  # type: ignore[arg-type]
    asked = {"steps": 1, "classes": 2, "lr": 2e-4, "discriminator_updates": 1, "loss": loss, "labels_for": "both"}
    asked |= {"mismatched": mismatched, "frames": 0, "seed": 5, "images": "", **SMALL}
    settings = module._Settings(**asked)  # type: ignore[arg-type]
    start = module._Training(settings, x, y)
    draw = generator(5, 0, "GAN")
    rows = torch.randint(len(x), (4,), generator=draw)
    made = start.generator(torch.randn(4, 3, generator=draw), y[rows])
    real, fake = start.discriminator(x[rows], y[rows]), start.discriminator(made, y[rows])
    not_real = (1 - fake.double().sigmoid()).log().mean()
    if mismatched:  # of two classes the wrong one is the other
        mistaken = start.discriminator(x[rows], 1 - y[rows]).double()
        not_real = (not_real + (1 - mistaken.sigmoid()).log().mean()) / 2
    by_hand = -real.double().sigmoid().log().mean() - not_real
    torch.testing.assert_close(gan.losses[0, 0].double(), by_hand.detach(), atol=1e-6, rtol=0)
    # The generator is judged by the discriminator after its update, whose running averages do not matter here.
    moved = gan.discriminator.train()(made, y[rows]).double().sigmoid()
    own = -moved.log().mean() if loss == "non-saturating" else (1 - moved).log().mean()
    torch.testing.assert_close(gan.losses[0, 1].double(), own.detach(), atol=1e-6, rtol=0)


def test_the_original_loss_has_no_gradient_where_the_discriminator_is_sure() -> None:
    """d/ds log(1 - s(D)) -> 0 and d/ds -log s(D) -> -1 as D -> -infinity: why the other one is used."""
    sure = torch.tensor(-20.0, requires_grad=True)
    (saturated,) = torch.autograd.grad(-F.softplus(sure), sure)
    (kept,) = torch.autograd.grad(F.softplus(-sure), sure)
    assert abs(float(saturated)) < 1e-8
    assert float(kept) == pytest.approx(-1, abs=1e-6)


def test_the_seed_alone_decides_and_the_global_state_stays() -> None:
    x, y = halves()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = train_gan(x, y, steps=3, **SMALL)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(9)
    again = train_gan(x, y, steps=3, **SMALL)  # type: ignore[arg-type]
    other = train_gan(x, y, steps=3, seed=1, **SMALL)  # type: ignore[arg-type]
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert not any(part.training for network in (first.generator, first.discriminator) for part in network.modules())
    assert all(p.requires_grad and p.grad is None for p in first.discriminator.parameters())


def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = halves()
    monkeypatch.setattr(module, "_SAVED", 2)
    options = {"steps": 5, "frames": 5, "discriminator_updates": 2, **SMALL}
    whole = train_gan(x, y, **options)  # type: ignore[arg-type]
    advance, calls = module._Training.advance, []

    def interrupted(self: module._Training) -> None:
        calls.append(self.step)
        if len(calls) == 4:  # step 3; steps 0 and 1 are in the file
            raise KeyboardInterrupt
        advance(self)

    file = tmp_path / "gan.pt"
    monkeypatch.setattr(module._Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_gan(x, y, checkpoint=file, **options)  # type: ignore[arg-type]
    resumed = train_gan(x, y, checkpoint=file, **options)  # type: ignore[arg-type]
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(whole.losses, resumed.losses)
    assert torch.equal(whole.frames, resumed.frames)
    train_gan(x, y, checkpoint=file, **options)  # type: ignore[arg-type]
    assert len(calls) == 7, "a finished one is read, not trained"


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    x, y = halves()
    file = tmp_path / "gan.pt"
    train_gan(x, y, steps=1, checkpoint=file, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"`checkpoint` to be one with lr=0\.1, but got one with lr=0\.0002"):
        train_gan(x, y, steps=1, lr=0.1, checkpoint=file, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`checkpoint` to be one with images="):
        train_gan(x.flip(0), y, steps=1, checkpoint=file, **SMALL)  # type: ignore[arg-type]
    file.write_bytes(b"none")
    with pytest.raises(FileError, match="a checkpoint of train_gan"):
        train_gan(x, y, steps=1, checkpoint=file, **SMALL)  # type: ignore[arg-type]


def test_labels_are_heeded_if_the_discriminator_sees_them() -> None:
    """After a short training class 0 is bright on top and class 1 below, from the same noise."""
    x, y = halves()
    options = {"steps": 60, "lr": 2e-3, "width": 4, "latent": 4, "batch_size": 16}
    grid = train_gan(x, y, **options).generator.grid(8).mean((1, 2))  # type: ignore[arg-type]
    top_heavy = grid[:, :14].mean((1, 2)) - grid[:, 14:].mean((1, 2))
    assert float(top_heavy[0]) > 0.2
    assert float(top_heavy[1]) < -0.2


def test_without_labels_there_is_one_row_and_the_class_is_not_asked_for() -> None:
    gan = train_gan(halves()[0], steps=2, frames=1, **SMALL)  # type: ignore[arg-type]
    assert gan.generator.classes == gan.discriminator.classes == 0
    assert gan.frames.shape == (1, 1, 8, 1, 28, 28)
    assert torch.equal(gan.frames[-1], gan.generator.grid(8))
    assert gan.generator(gan.generator.latents([0])).shape == (1, 1, 28, 28)


def test_without_y_the_discriminator_has_one_plane() -> None:
    gan = train_gan(*halves(), steps=1, labels_for="generator", **SMALL)  # type: ignore[arg-type]
    assert (gan.generator.classes, gan.discriminator.classes) == (2, 0)


def test_a_grid_has_a_class_a_row_and_the_same_noise_a_column() -> None:
    make = Generator(classes=3, latent=5, width=2).train()
    grid = make.grid(4, seed=7)
    assert make.training
    expected = make.eval()(make.latents(range(4), seed=7), torch.full((4,), 2))
    torch.testing.assert_close(grid[2], expected)
    assert 0 <= float(grid.min()) <= float(grid.max()) <= 1


def test_planes_of_the_class_are_what_the_discriminator_sees() -> None:
    """With the weights of a class's plane at zero its logit does not depend on the class, and else it does."""
    judge = Discriminator(classes=2, width=2).eval()
    x = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    x, classes = x.expand(2, -1, -1, -1), torch.tensor([0, 1])
    first, second = judge(x, classes).tolist()
    assert abs(first - second) > 1e-4
    torch.nn.init.zeros_(judge.layers[0].weight[:, 1:])  # type: ignore[index, arg-type]
    first, second = judge(x, classes).tolist()
    assert first == pytest.approx(second, abs=1e-6)


def test_errors() -> None:
    x, y = halves()
    for name, value in (("steps", 0), ("batch_size", 1), ("discriminator_updates", 0), ("latent", 0), ("lr", 0.0)):
        with pytest.raises(ArgumentError, match=f"argument `{name}`"):
            train_gan(x, y, **{"steps": 1, name: value})  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"`loss`.*Did you mean 'saturating'"):
        train_gan(x, y, steps=1, loss="saturatin")
    with pytest.raises(UnknownNameError, match="`labels_for`"):
        train_gan(x, y, steps=1, labels_for="nobody")
    for settings in ({"labels_for": "generator"}, {"labels": None}):
        with pytest.raises(ArgumentError, match="`mismatched` to be False where the discriminator sees no class"):
            train_gan(x, **{"labels": y, "steps": 1, "mismatched": True, **settings})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`images` to be float pictures \(N, 1, 28, 28\)"):
        train_gan(x[..., :27], y, steps=1)
    with pytest.raises(InputError, match=r"`images` to be of values in \[0, 1\]"):
        train_gan(2 * x, y, steps=1)
    with pytest.raises(InputError, match=r"`labels` to be classes \(40,\)"):
        train_gan(x, y[1:], steps=1)
    with pytest.raises(ArgumentError, match="`lr` to be so small that the loss stays finite"):
        train_gan(x, y, steps=30, lr=1e30, **SMALL)  # type: ignore[arg-type]
    make = Generator(classes=2)
    with pytest.raises(TargetError, match=r"`classes` to be whole numbers \(1,\)"):
        make(make.latents([0]))
    with pytest.raises(TargetError, match="in 0 to 1"):
        make(make.latents([0]), torch.tensor([2]))
