"""DCGAN and conditional DCGAN for small grey pictures: generator, discriminator, and their training."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ce_plugin.errors import (
    ArgumentError,
    InputError,
    TargetError,
    check_integer,
    check_number,
    expected,
    unknown_name,
)
from ce_plugin.files import load, save
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed, generator

_SIDE, _COARSE = 28, 7
_LOSSES = ("non-saturating", "saturating")
_WANTED, _VERSION = "a checkpoint of train_gan", 1
_HINT = "Choose another file, or delete this one to begin again."
# Steps between two writings of a checkpoint, and columns of the grids that are kept.
_SAVED, _COLUMNS = 50, 8


def _one_hot(classes: Tensor | None, count: int, n: int, like: Tensor) -> Tensor:
    """Classes (N,) as rows of zeros and a one, (N, count); (N, 0) of a network without classes."""
    if not count:
        return like.new_zeros(n, 0)
    if classes is None or classes.shape != (n,) or classes.is_floating_point():
        came = "None" if classes is None else f"{classes.dtype}, {tuple(classes.shape)}"
        raise TargetError(expected("classes", f"whole numbers ({n},), one for each picture", came))
    if n and not 0 <= int(classes.min()) <= int(classes.max()) < count:
        raise TargetError(expected("classes", f"in 0 to {count - 1}", sorted(set(classes.tolist()))[:9]))
    return F.one_hot(classes.to(like.device), count).to(like.dtype)


class Generator(nn.Module):
    """From noise, and a class, to a picture of 28 x 28: a linear layer and two transposed convolutions.

        x = (1 + tanh(...)) / 2,   z ~ N(0, 1), the class one-hot beside z

    Args:
        classes: number of classes; 0: the picture depends on z alone (DCGAN).
        latent: length of z.
        width: channels at 14 x 14; at 7 x 7 there are twice as many.

    Raises:
        ArgumentError: a number below its least.
        TargetError: at a call, classes that are missing or out of range.

    Example:
        >>> make = Generator(classes=10)
        >>> make(make.latents([0, 1]), torch.tensor([3, 8])).shape
        torch.Size([2, 1, 28, 28])

    Source: Radford, Metz, Chintala 2016 (arXiv 1511.06434); the class beside z: Mirza, Osindero 2014 (arXiv 1411.1784).
    """

    def __init__(self, classes: int = 0, *, latent: int = 64, width: int = 32) -> None:
        super().__init__()
        self.classes = check_integer("classes", classes, least=0)
        self.latent = check_integer("latent", latent, least=1)
        self.width = check_integer("width", width, least=1)
        self.start = nn.Sequential(
            nn.Linear(latent + classes, 2 * width * _COARSE**2, bias=False),
            nn.Unflatten(1, (2 * width, _COARSE, _COARSE)),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 4, 2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, padding=1),
            nn.Tanh(),
        )
        _initialise(self)

    def forward(self, z: Tensor, classes: Tensor | None = None) -> Tensor:
        """Noise (N, latent) and classes (N,) to pictures (N, 1, 28, 28), values in [0, 1]."""
        picture: Tensor = self.up(self.start(torch.cat([z, _one_hot(classes, self.classes, len(z), z)], 1)))
        return (picture + 1) / 2

    def latents(self, ids: Sequence[int], seed: int = 0) -> Tensor:
        """Noise for each id, drawn from (seed, id), (N, latent).

        Example:
            >>> make = Generator(latent=5)
            >>> torch.equal(make.latents([7]), make.latents([6, 7])[1:])
            True
        """
        drawn = [torch.randn(self.latent, generator=generator(seed, i, "latent")) for i in ids]
        return torch.stack(drawn).to(next(self.parameters()))

    def grid(self, columns: int, seed: int = 0) -> Tensor:
        """Pictures of every class (rows) from the same noise (a column each), (K, columns, 1, 28, 28); K is 1 or more.

        Example:
            >>> Generator(classes=10).eval().grid(3).shape
            torch.Size([10, 3, 1, 28, 28])
        """
        z, rows = self.latents(range(columns), seed), max(self.classes, 1)
        classes = torch.arange(rows).repeat_interleave(columns)
        with torch.no_grad(), state_guard(self):
            pictures: Tensor = self(z.repeat(rows, 1), classes)
        return pictures.reshape(rows, columns, *pictures.shape[1:])


class Discriminator(nn.Module):
    """From a picture of 28 x 28, and a class, to the logit of its being real: two convolutions and a linear layer.

    Args:
        classes: number of classes, each a plane of zeros or ones beside the picture; 0: it does not see the class.
        width: channels at 14 x 14; at 7 x 7 there are twice as many.

    Raises:
        ArgumentError: a number below its least.
        TargetError: at a call, classes that are missing or out of range.

    Example:
        >>> Discriminator(classes=10)(torch.zeros(2, 1, 28, 28), torch.tensor([3, 8])).shape
        torch.Size([2])

    Source: as :class:`Generator`.
    """

    def __init__(self, classes: int = 0, *, width: int = 32) -> None:
        super().__init__()
        self.classes = check_integer("classes", classes, least=0)
        self.width = check_integer("width", width, least=1)
        self.layers = nn.Sequential(
            nn.Conv2d(1 + classes, width, 4, 2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * _COARSE**2, 1),
        )
        _initialise(self)

    def forward(self, pictures: Tensor, classes: Tensor | None = None) -> Tensor:
        """Pictures (N, 1, 28, 28), values in [0, 1], and classes (N,) to logits (N,)."""
        x = 2 * pictures - 1
        planes = _one_hot(classes, self.classes, len(x), x)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        logits: Tensor = self.layers(torch.cat([x, planes], 1))
        return logits[:, 0]


def _initialise(network: nn.Module) -> None:
    """DCGAN's start: weights from N(0, 0.02), batch norm's from N(1, 0.02)."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)


@dataclass(frozen=True)
class GAN:
    """A trained pair, and how it came about.

    Attributes:
        generator: in eval mode.
        discriminator: in eval mode.
        losses: of discriminator and generator at each step, (steps, 2).
        frames: the generator's :meth:`~Generator.grid` of 8 columns at steps at equal distances, the last step being
            the last, (F, K, 8, 1, 28, 28).
    """

    generator: Generator
    discriminator: Discriminator
    losses: Tensor
    frames: Tensor


@dataclass(frozen=True)
class _Settings:
    """What a training was asked for; those of ``train_gan``. ``images`` tells these pictures and labels from others."""

    steps: int
    batch_size: int
    classes: int
    latent: int
    width: int
    lr: float
    discriminator_updates: int
    loss: str
    labels_for: str
    mismatched: bool
    frames: int
    seed: int
    images: str

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 2), ("discriminator_updates", 1), ("frames", 0)):
            check_integer(name, getattr(self, name), least=least)
        check_integer("seed", self.seed)
        check_number("lr", self.lr, "above zero", above=0)
        if self.loss not in _LOSSES:
            raise unknown_name("loss", self.loss, _LOSSES)
        if self.labels_for not in ("both", "generator"):
            raise unknown_name("labels_for", self.labels_for, ("both", "generator"))
        if self.mismatched and (self.classes < 2 or self.labels_for != "both"):
            wanted = "False where the discriminator sees no class, or one alone"
            raise ArgumentError(expected("mismatched", wanted, self.mismatched))


def train_gan(
    images: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int,
    batch_size: int = 64,
    latent: int = 64,
    width: int = 32,
    lr: float = 2e-4,
    discriminator_updates: int = 1,
    loss: str = "non-saturating",
    labels_for: str = "both",
    mismatched: bool = False,
    frames: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> GAN:
    """Train a DCGAN, or with labels a conditional one, with Adam (betas 0.5 and 0.999).

        D: min  -log s(D(x, y)) - log(1 - s(D(G(z, y), y)))
        G: min  -log s(D(G(z, y), y)), non-saturating; or
        G: min  log(1 - s(D(G(z, y), y))), saturating: the original game, without a gradient where D is sure

    Weights, pictures and noise of each step depend on ``seed`` alone; the global random state is as before afterwards.

    Args:
        images: (N, 1, 28, 28), values in [0, 1], on the CPU.
        labels: classes, (N,), whole numbers; None: a DCGAN.
        steps: updates of the generator.
        batch_size: pictures of an update, 2 or more.
        latent, width: see :class:`Generator`.
        lr: Adam's learning rate, of both.
        discriminator_updates: of the discriminator for each of the generator.
        loss: ``"non-saturating"`` or ``"saturating"``.
        labels_for: ``"both"``, or ``"generator"``: the discriminator does not see the class, so that nothing makes the
            generator heed it.
        mismatched: real pictures under a wrong class are shown to the discriminator too, and count as made ones (half
            of these), so that it learns early that the class matters (Reed et al. 2016).
        frames: how many grids to keep, at steps at equal distances; no more than there are steps.
        checkpoint: a file, written every 50 steps, from which an interrupted training goes on as if it had not been
            interrupted; a finished one is read and returned. All settings and the pictures must be the same.
        seed: any integer.
        show_progress: a bar of the steps.

    Returns:
        Both networks in eval mode, losses and frames, a :class:`GAN`.

    Raises:
        InputError: pictures or labels that cannot be used.
        ArgumentError: a number out of its range, a rate at which the loss does not stay finite, or a checkpoint of
            another training.
        UnknownNameError: an unknown loss, or ``labels_for``.
        FileError: the checkpoint is none, or cannot be written.

    Example:
        >>> gan = train_gan(torch.rand(20, 1, 28, 28), torch.arange(20) % 2, steps=2, width=2, frames=2)
        >>> gan.losses.shape, gan.frames.shape
        (torch.Size([2, 2]), torch.Size([2, 2, 8, 1, 28, 28]))

    Source: Goodfellow et al. 2014 (arXiv 1406.2661), both losses; Radford et al. 2016 (arXiv 1511.06434); Mirza,
    Osindero 2014 (arXiv 1411.1784); Reed et al. 2016 (arXiv 1605.05396), algorithm 1, the mismatched pairs.
    """
    _check_images(images, labels)
    settings = _Settings(
        steps=steps,
        batch_size=batch_size,
        classes=0 if labels is None else int(labels.max()) + 1,
        latent=latent,
        width=width,
        lr=lr,
        discriminator_updates=discriminator_updates,
        loss=loss,
        labels_for=labels_for,
        mismatched=mismatched,
        frames=frames,
        seed=seed,
        images=_digest(images, labels),
    )
    with torch.inference_mode(False), torch.enable_grad():
        training = _Training(settings, images, labels)
        if checkpoint is not None and Path(checkpoint).exists():
            training.restore(checkpoint)
        with tqdm(total=steps, initial=training.step, desc="GAN", unit="step", disable=not show_progress) as bar:
            while training.step < steps:
                training.advance()
                if checkpoint is not None and (training.step % _SAVED == 0 or training.step == steps):
                    training.save(checkpoint)
                bar.update()
    return training.result()


def _check_images(images: Tensor, labels: Tensor | None) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or not shape[0] or shape[1:] != (1, _SIDE, _SIDE) or not images.is_floating_point():
        wanted = f"float pictures (N, 1, {_SIDE}, {_SIDE}), one or more"
        raise InputError(expected("images", wanted, f"{images.dtype}, {shape}"))
    if not 0 <= float(images.min()) <= float(images.max()) <= 1:
        came = f"{float(images.min()):g} to {float(images.max()):g}"
        raise InputError(expected("images", "of values in [0, 1]", came))
    if labels is not None and (labels.shape != shape[:1] or labels.is_floating_point() or int(labels.min()) < 0):
        wanted = f"classes ({shape[0]},), whole numbers from 0"
        raise InputError(expected("labels", wanted, f"{labels.dtype}, {tuple(labels.shape)}"))


def _digest(images: Tensor, labels: Tensor | None) -> str:
    """Tells pictures and labels from others."""
    parts = [images] if labels is None else [images, labels]
    return "-".join(f"{zlib.crc32(part.contiguous().numpy().tobytes()):08x}" for part in parts)


class _Training:
    """The course of one training: networks, optimizers, what was kept, and the step from one state to the next."""

    def __init__(self, settings: _Settings, images: Tensor, labels: Tensor | None) -> None:
        self.settings, self.images, self.labels = settings, images, labels
        s = settings
        with state_guard(seed=derived_seed(s.seed, "GAN")):
            self.generator = Generator(s.classes, latent=s.latent, width=s.width)
            self.discriminator = Discriminator(s.classes if s.labels_for == "both" else 0, width=s.width)
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), lr=s.lr, betas=(0.5, 0.999))
            for name, network in self.networks.items()
        }
        self.step = 0
        self.losses, self.frames = torch.zeros(s.steps, 2), []
        self._shown = {s.steps * k // s.frames for k in range(1, s.frames + 1)}

    frames: list[Tensor]

    @property
    def networks(self) -> dict[str, Generator | Discriminator]:
        """Both networks by name."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def advance(self) -> None:
        """One step: the discriminator so often as asked for, and the generator once.

        Raises:
            ArgumentError: the loss is no longer finite.
        """
        s, draw = self.settings, generator(self.settings.seed, self.step, "GAN")
        self.generator.train()
        self.discriminator.train()
        for _ in range(s.discriminator_updates):
            rows = torch.randint(len(self.images), (s.batch_size,), generator=draw)
            classes = None if self.labels is None else self.labels[rows]
            made = self.generator(torch.randn(s.batch_size, s.latent, generator=draw), classes)
            seen = classes if s.labels_for == "both" else None
            real, fake = self.discriminator(self.images[rows], seen), self.discriminator(made.detach(), seen)
            not_real = F.softplus(fake).mean()
            if classes is not None and s.mismatched:
                wrong = (classes + torch.randint(1, s.classes, (s.batch_size,), generator=draw)) % s.classes
                not_real = (not_real + F.softplus(self.discriminator(self.images[rows], wrong)).mean()) / 2
            judged = F.softplus(-real).mean() + not_real
            self._update("discriminator", judged)
        # Its own parameters need no gradient here.
        self.discriminator.requires_grad_(False)
        fake = self.discriminator(made, seen)
        made_up = F.softplus(-fake).mean() if s.loss == "non-saturating" else -F.softplus(fake).mean()
        self._update("generator", made_up)
        self.discriminator.requires_grad_(True)
        self.losses[self.step] = torch.stack([judged.detach(), made_up.detach()])
        if not bool(self.losses[self.step].isfinite().all()):
            raise ArgumentError(expected("lr", "so small that the loss stays finite", s.lr, "Try a tenth of it."))
        self.step += 1
        if self.step in self._shown:
            self.frames.append(self.generator.grid(_COLUMNS, s.seed))

    def _update(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad()
        torch.autograd.backward(loss)
        self.optimizers[name].step()

    def save(self, path: str | PathLike[str]) -> None:
        """Write all that the next step depends on."""
        content = {
            "settings": asdict(self.settings),
            "step": self.step,
            "losses": self.losses,
            "frames": self.frames,
            **{name: network.state_dict() for name, network in self.networks.items()},
            **{f"{name}'s optimizer": optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }
        save(path, "GAN", _VERSION, content, force=True)

    def restore(self, path: str | PathLike[str]) -> None:
        """Go on where a file was written.

        Raises:
            FileError: it is no checkpoint.
            ArgumentError: it is one of other settings or pictures.
        """
        found: dict[str, Any] = load(path, "GAN", _VERSION, _WANTED)
        asked = asdict(self.settings)
        other = [name for name in asked if found["settings"].get(name) != asked[name]]
        if other:
            both = (asked, found["settings"])
            here, came = (", ".join(f"{name}={one.get(name)!r}" for name in other) for one in both)
            raise ArgumentError(expected("checkpoint", f"one with {here}", f"one with {came}", _HINT))
        for name, network in self.networks.items():
            network.load_state_dict(found[name])
            self.optimizers[name].load_state_dict(found[f"{name}'s optimizer"])
        self.step, self.losses, self.frames = found["step"], found["losses"], list(found["frames"])

    def result(self) -> GAN:
        """The networks as they are now, in eval mode."""
        for network in self.networks.values():
            network.eval().zero_grad()
        empty = torch.zeros(0, max(self.settings.classes, 1), _COLUMNS, 1, _SIDE, _SIDE)
        frames = torch.stack(self.frames) if self.frames else empty
        return GAN(self.generator, self.discriminator, self.losses, frames)
