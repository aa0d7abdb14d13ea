"""The self-supervised networks that BEYOND needs: SimSiam on small grey images, cached.

They are trained on the classifier's training images, so that no image is used for calibration or evaluation as well.
Labels are used only for the linear classifier on the frozen backbone.

Source: Chen and He, CVPR 2021 (arXiv 2011.10566): SimSiam. He, Zhang, Chen, et al., ICML 2024: BEYOND.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.detection._classifiers import Array, Labels, cache_folder, kept
from benchmarks.detection._problems import train_split
from ce_plugin.randomness import derived_seed, generator

WIDTH = 128


@dataclass(frozen=True)
class Augmentation:
    """SimSiam's augmentations for small grey images: no colour changes, no blur.

    Args:
        flip: whether half of the images are mirrored.
        area: smallest share of the image that is cropped and resized.
        degrees: largest rotation, with black borders.
        jitter: largest change of brightness and contrast, as a share; each with probability 0.8.
    """

    flip: bool
    area: float = 0.2
    degrees: float = 10.0
    jitter: float = 0.4

    def __call__(self, images: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """Augment each of (N, 1, H, W) in [0, 1] independently; without a generator the global random state is used."""
        share = torch.rand(10, len(images), generator=draw)
        amount = 2 * share - 1
        side, ratio = (self.area + (1 - self.area) * share[0]).sqrt(), 0.75 ** (amount[1] / 2)
        extent = torch.stack([side * ratio, side / ratio]).clamp(max=1)
        right, down = (1 - extent) * amount[2:4]
        wide, high = extent
        if self.flip:
            wide = torch.where(share[5] < 0.5, -wide, wide)
        angle = math.radians(self.degrees) * amount[4]
        cosine, sine = angle.cos(), angle.sin()
        # Maps positions in the new image, -1 to 1 in each direction, to positions in the old one.
        turn = torch.stack([wide * cosine, -high * sine, right, wide * sine, high * cosine, down], 1)
        grid = F.affine_grid(turn.view(-1, 2, 3), list(images.shape), align_corners=False)
        light, contrast = torch.where(share[6:8] < 0.8, 1 + self.jitter * amount[8:], 1.0)[..., None, None, None]
        lit = F.grid_sample(images, grid, align_corners=False) * light
        return torch.lerp(lit.mean((1, 2, 3), keepdim=True), lit, contrast).clamp(0, 1)


@dataclass(frozen=True)
class Pretraining:
    """How a network is trained: SGD with momentum, with a cosine schedule to zero.

    Args:
        augmentation: makes the two views of an image, and BEYOND's neighbours.
        epochs: passes over the images.
        limit: largest number of training images.
        batch: images per step.
        rate: initial learning rate.
    """

    augmentation: Augmentation
    epochs: int
    limit: int = 20000
    batch: int = 64
    rate: float = 0.06


PRETRAINING = {
    "fashion": Pretraining(Augmentation(flip=True), epochs=8),
    "mnist": Pretraining(Augmentation(flip=False), epochs=60),
}


class SimSiam(nn.Module):
    """Three convolutions, the paper's projector and predictor, and a linear classifier.

    Attributes:
        backbone: (N, 1, 28, 28) to (N, 128).
        projector: to (N, 128), the projections of views that are compared.
        predictor: predicts one view's projection from the other's; used only in training.
        classifier: from the backbone to logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        convolutions = [part for pair in ((1, 32), (32, 64), (64, WIDTH)) for part in _halving(*pair)]
        self.backbone = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        last = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH, affine=False))
        self.projector = nn.Sequential(*_dense(WIDTH, WIDTH), *_dense(WIDTH, WIDTH), *last)
        self.predictor = nn.Sequential(*_dense(WIDTH, WIDTH // 4), nn.Linear(WIDTH // 4, WIDTH))
        self.classifier = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The logits (N, 10) of the linear classifier."""
        logits: Tensor = self.classifier(self.backbone(images))
        return logits

    def loss(self, one: Tensor, other: Tensor) -> Tensor:
        """Symmetric loss: minus the cosine between a predicted projection and the true one, which is detached."""
        z = [self.projector(self.backbone(view)) for view in (one, other)]
        p = [self.predictor(projection) for projection in z]
        return -(F.cosine_similarity(p[0], z[1].detach()) + F.cosine_similarity(p[1], z[0].detach())).mean() / 2


def simsiam(name: str, seed: int, cache: str | Path | None = None) -> SimSiam:
    """The network of a data set and seed, in eval mode: from the cache, or trained and cached."""
    file = cache_folder(cache) / "classifiers" / f"ssl-{name}-{seed}.pt"
    network = _fresh(seed)
    network.load_state_dict(
        kept(file, lambda: train(PRETRAINING[name], derived_seed(seed, "ssl", name), *train_split(name)))
    )
    return network.eval().requires_grad_(False)


def train(config: Pretraining, seed: int, images: Array, labels: Labels) -> SimSiam:
    """A network trained with this config, deterministic for a seed; in eval mode."""
    network, draw = _fresh(seed), generator(seed, "training")
    x, y = torch.from_numpy(images[: config.limit]), torch.from_numpy(labels[: config.limit])
    optimizer = torch.optim.SGD(network.parameters(), lr=config.rate, momentum=0.9, weight_decay=5e-4)
    each = max(1, len(x) // config.batch)  # a smaller last batch would give poor batch statistics
    for step in range(config.epochs * each):
        if step % each == 0:
            batches = torch.randperm(len(x), generator=draw).split(config.batch)
        optimizer.param_groups[0]["lr"] = config.rate * (1 + math.cos(math.pi * step / (config.epochs * each))) / 2
        chosen = x[batches[step % each]]
        loss = network.loss(config.augmentation(chosen, draw), config.augmentation(chosen, draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    views = torch.cat([x, config.augmentation(x, draw), config.augmentation(x, draw)])
    _classify(network, views, y.repeat(3))
    return network


def _fresh(seed: int) -> SimSiam:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SimSiam()


def _classify(network: SimSiam, views: Tensor, labels: Tensor) -> None:
    """Fit the linear classifier to the frozen backbone's features of images and augmented views."""
    with torch.no_grad():
        features = torch.cat([network.backbone(batch) for batch in views.split(250)])
    optimizer = torch.optim.LBFGS(network.classifier.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = network.classifier.weight.square().sum()
        loss = F.cross_entropy(network.classifier(features), labels) + 1e-5 * decay
        loss.backward()
        return loss

    optimizer.step(closure)


def _halving(inside: int, outside: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outside), nn.ReLU()]


def _dense(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Linear(inside, outside, bias=False), nn.BatchNorm1d(outside), nn.ReLU()]
