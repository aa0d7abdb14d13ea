"""A small denoiser, learned from clean images and the network's answers to them: no attack on the network is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin.detection.checkpoint import Checkpoint
from ce_plugin.detection.classifier import ClassifierWrapper
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed, generator

_STEPS = 2
# All steps together reach two and a half times as far as the bound.
_REACH = 2.5
_INCREMENTS = 15


class Bounds:
    """A bound for each image in adversarial training: it grows when the answer was kept, and shrinks when it was not.

    One bound for all images would be too large for those near another class and too small for the others.

    Args:
        n: images.
        greatest: no bound is greater, in image units; it is reached in 15 steps.

    Attributes:
        values: the bounds, (n,).

    Example:
        >>> bounds = Bounds(3, 0.3)
        >>> bounds.update(torch.tensor([0, 1]), torch.tensor([True, False]))
        >>> bounds.of(torch.tensor([0, 1, 2]))
        tensor([0.0400, 0.0000, 0.0200])

    Source: the idea is that of instance-adaptive adversarial training, Balaji, Goldstein, Hoffman 2019
    (arXiv 1910.08051), section 3.
    """

    def __init__(self, n: int, greatest: float) -> None:
        self.greatest, self._increment = greatest, greatest / _INCREMENTS
        self.values = torch.full((n,), self._increment)

    def of(self, rows: Tensor) -> Tensor:
        """Bounds of some images, (n,)."""
        return self.values[rows]

    def update(self, rows: Tensor, held: Tensor) -> None:
        """Take whether some images kept their answers on their worst neighbours, (n,)."""
        change = torch.where(held.cpu(), self._increment, -self._increment)
        # An image may be among them twice.
        self.values = self.values.index_add(0, rows, change).clamp(0, self.greatest)


def worst_nearby(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    answers: Tensor,
    bounds: Tensor,
    value_range: tuple[float, float],
    random: torch.Generator,
) -> Tensor:
    """Of each image a neighbour whose answer is as unlikely as a few projected steps make it.

    From a uniformly random start, two steps along the sign of the gradient of -log p(answer).

    Args:
        run: images (N, C, H, W) to logits (N, K).
        images: (N, C, H, W), inside the range of values.
        answers: classes, (N,).
        bounds: greatest change of a value of each image, (N,), in image units.
        value_range: least and greatest value of an image.
        random: draws the starts, on the CPU.

    Returns:
        (N, C, H, W), without a gradient.

    Example:
        >>> images, answers = torch.full((2, 1, 1, 2), 0.5), torch.tensor([0, 1])
        >>> bounds, random = torch.tensor([0.1, 0.2]), torch.Generator().manual_seed(0)
        >>> worst_nearby(torch.nn.Flatten(), images, answers, bounds, (0.0, 1.0), random).flatten(1)
        tensor([[0.4000, 0.6000],
                [0.7000, 0.3000]])

    Source: projected gradient descent, Madry et al., ICLR 2018 (arXiv 1706.06083), section 2.1.
    """
    bound = bounds.to(images).reshape(-1, *[1] * (images.dim() - 1))
    least, greatest = value_range
    low, high = (images - bound).clamp_min(least), (images + bound).clamp_max(greatest)
    start = torch.rand(images.shape, generator=random).to(images)
    moved = low + (high - low) * start
    for _ in range(_STEPS):
        leaf = moved.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(run(leaf), answers, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        step = _REACH / _STEPS * bound * gradient.sign()
        moved = torch.minimum(torch.maximum(leaf.detach() + step, low), high)
    return moved


# The squared error of the logits (in their own variances) counts a hundredth of that of the pixels.
_LOGITS, _PIXELS = 0.1, 10.0
_LEARNING_RATE = 4e-3
STEP = 64
"""Images of one step."""
# Steps between two files of a checkpoint.
_SAVED = 50


class Denoiser(nn.Module):
    """A convolutional network of three scales with connections across, from an image and a mask to the image.

    Args:
        channels: of the images.
        width: channels of the finest scale; the coarser two have two and three times as many.
        value_range: least and greatest value of an image.

    Example:
        >>> Denoiser(3)(torch.rand(2, 3, 30, 21)).shape
        torch.Size([2, 3, 30, 21])
    """

    def __init__(self, channels: int, width: int = 16, value_range: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        self.channels, self.width, self.value_range = channels, width, value_range
        self.fine = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(2 * width, 3 * width, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(3 * width, 3 * width, 3, padding=1)
        self.to_middle = nn.Conv2d(3 * width, 2 * width, 1)
        self.mix_middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.to_fine = nn.Conv2d(2 * width, width, 1)
        self.mix_fine = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Denoised images, (N, C, H, W), inside the range of values in eval mode.

        Args:
            images: (N, C, H, W), image units.
            mask: (N, 1, H, W), 1 where a pixel is known, 0 where it is to be painted; None: all are.
        """
        low, high = self.value_range
        unit = (images - low) / (high - low)
        known = torch.ones_like(unit[:, :1]) if mask is None else mask.to(unit)
        fine = F.silu(self.fine(torch.cat([unit * known, known], 1)))
        middle = F.silu(self.middle(fine))
        coarse = F.silu(self.coarse(middle))
        coarse = coarse + F.silu(self.mix(coarse))
        up = F.interpolate(self.to_middle(coarse), size=middle.shape[-2:]) + middle
        up = F.silu(self.mix_middle(F.silu(up)))
        up = F.interpolate(self.to_fine(up), size=fine.shape[-2:]) + fine
        out: Tensor = self.out(F.silu(self.mix_fine(F.silu(up))))
        return (out if self.training else out.clamp(0, 1)) * (high - low) + low


def train_denoiser(
    classifier: ClassifierWrapper,
    images: Tensor,
    *,
    width: int = 16,
    n_steps: int,
    eps: float = 0.0,
    batch_size: int = STEP,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    name: str = "denoising",
) -> Denoiser:
    """A denoiser for these images and this classifier.

    It minimises 10 |D(x~) - x|^2 + 0.1 |f(D(x~)) - f(x)|^2 / var f, means over pixels and logits f, where x~ is a clean
    image with Gaussian, sign or coarse noise of a random strength and, for half of them, with random pixels missing.

    With ``eps`` it is adversarially trained: added is 10 |D(x^) - x|^2 - log p(k | D(x^)), where k is the class that f
    sees in x and x^ the image within a bound that makes this greatest, as far as a few steps find it
    (:func:`~ce_plugin.detection.denoiser.worst_nearby`). Each image has a bound of its own, which grows up to ``eps``
    while its answer holds (:class:`~ce_plugin.detection.denoiser.Bounds`).

    Args:
        classifier: the classifier; nothing of it is changed.
        images: clean ones, (N, C, H, W), image units.
        width: see :class:`Denoiser`.
        n_steps: of Adam, with a learning rate that rises and falls.
        eps: greatest change of a value in adversarial training, in image units; 0: plain training.
        batch_size: images per step.
        seed: of the weights and of everything drawn.
        checkpoint: written every 50 steps: a training that was interrupted goes on from there, with the same result.
        name: of the training in it.

    Returns:
        The denoiser in eval mode, on the images' device; its parameters want no gradient.

    Example:
        >>> classifier = ClassifierWrapper(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
        >>> denoiser = train_denoiser(classifier, torch.rand(32, 1, 8, 8), n_steps=2)
        >>> denoiser.training
        False

    Source: the loss on the classifier's logits is that of Liao et al., CVPR 2018 (arXiv 1712.02976), Eq. 4, which they
    train on attacked images; here the noise is random. Adversarial training is that of Madry et al., ICLR 2018 (arXiv
    1706.06083), Eq. 2.1, of D with f held fixed.
    """
    low, high = classifier.clip_values
    random, bounds = generator(seed, "denoiser"), Bounds(len(images), eps)
    checkpoint = checkpoint or Checkpoint()
    with classifier.guarded(), torch.enable_grad():
        with state_guard(seed=derived_seed(seed, "denoiser", "weights")):
            denoiser = Denoiser(images.shape[1], width, (low, high))
        denoiser = denoiser.to(images.device, torch.float32).train()
        classifier.network.requires_grad_(False)  # the guard gives it back
        logits = classifier.logits(images, batch_size).float()
        variance = logits.var(unbiased=False).clamp_min(1e-12)
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=_LEARNING_RATE / 2, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=max(n_steps, 2))
        progress = _Progress(checkpoint, name, denoiser, optimizer, schedule, random, bounds)
        for step in range(progress.restore(), n_steps):
            rows = torch.randint(len(images), (min(batch_size, len(images)),), generator=random)
            clean, wanted = images[rows.to(images.device)].float(), logits[rows.to(logits.device)]
            noisy, known = _corrupted(clean, high - low, random)
            restored = denoiser(noisy.clamp(low, high), known)
            loss = _PIXELS * ((restored - clean) / (high - low)).square().mean()
            found = classifier(restored.to(images.dtype)).float()
            loss = loss + _LOGITS * ((found - wanted).square() / variance).mean()
            if eps:
                pixels, answers = _adversarial_losses(denoiser, classifier, clean, wanted, rows, bounds, random)
                loss = loss + pixels + answers
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.done(step + 1, last=step + 1 == n_steps)
    return denoiser.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Progress:
    """The course of one training: all that its next step depends on."""

    checkpoint: Checkpoint
    name: str
    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    random: torch.Generator
    bounds: Bounds

    def restore(self) -> int:
        """Take over what the checkpoint holds; returns how many steps are done."""
        found = self.checkpoint.read(f"training {self.name}")
        if found is None:
            return 0
        step: int = found["step"]
        self.denoiser.load_state_dict(found["denoiser"])
        self.optimizer.load_state_dict(found["optimizer"])
        # The rate is a function of the step; what it is taken from is among the optimizer's own values.
        self.schedule.load_state_dict({"last_epoch": step, "_step_count": step + 1})
        self.random.set_state(found["random"])
        torch.default_generator.set_state(found["global"])
        self.bounds.values = found["bounds"]
        self.checkpoint.tick(self.name, step)
        return step

    def done(self, step: int, *, last: bool) -> None:
        """Take down that a step is done."""
        if last or step % _SAVED == 0:
            content = {
                "step": step,
                "denoiser": self.denoiser.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": self.random.get_state(),
                "global": torch.default_generator.get_state(),
                "bounds": self.bounds.values,
            }
            self.checkpoint.write(f"training {self.name}", content)
        self.checkpoint.tick(self.name, 1)


def _adversarial_losses(
    denoiser: Denoiser,
    classifier: ClassifierWrapper,
    clean: Tensor,
    wanted: Tensor,
    rows: Tensor,
    bounds: Bounds,
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Losses of pixels and of answers on the worst images near clean ones of these logits; bounds are moved."""
    low, high = classifier.clip_values
    dtype, predicted = classifier.like.dtype, wanted.argmax(1)

    def run(images: Tensor) -> Tensor:
        logits: Tensor = classifier(denoiser(images).to(dtype))
        return logits.float()

    worst = worst_nearby(run, clean, predicted, bounds.of(rows), (low, high), random)
    restored = denoiser(worst)
    logits = classifier(restored.to(dtype)).float()
    bounds.update(rows, logits.argmax(1) == predicted)
    pixels = ((restored - clean) / (high - low)).square().mean()
    return _PIXELS * pixels, F.cross_entropy(logits, predicted)


def _corrupted(clean: Tensor, unit: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with noise up to 0.3 of the range of values, and which pixels are known: all, or 30 to 80 %."""
    n, _, height, width = clean.shape
    each = (n, 1, 1, 1)
    white = torch.randn(clean.shape, generator=random)
    grid = (n, clean.shape[1], math.ceil(height / 3), math.ceil(width / 3))
    coarse = F.interpolate(torch.randn(grid, generator=random), size=(height, width), mode="bilinear")
    kind = torch.rand(each, generator=random)
    noise = torch.where(kind < 0.5, white, torch.where(kind < 0.8, white.sign(), 1.5 * coarse))
    noisy = clean + 0.3 * unit * torch.rand(each, generator=random).to(clean) * noise.to(clean)
    is_whole, some = torch.rand(each, generator=random) < 0.5, torch.rand(each, generator=random)
    share = torch.where(is_whole, torch.ones(()), 0.3 + 0.5 * some)
    return noisy, (torch.rand((n, 1, height, width), generator=random) < share).to(clean)
