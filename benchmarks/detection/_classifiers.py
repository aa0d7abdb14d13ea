"""The classifiers that are attacked: trained once per data set and seed, and cached."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_plugin.files import written_whole
from ce_plugin.models import FashionCNN, efficientnet_lite0
from ce_plugin.randomness import derived_seed, generator

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def cache_folder(cache: str | Path | None = None) -> Path:
    """Folder for weights and attacked images: the argument, or CE_PLUGIN_CACHE, or ~/.cache/ce-plugin."""
    root = cache or os.environ.get("CE_PLUGIN_CACHE") or Path.home() / ".cache" / "ce-plugin"
    return Path(root) / "detection"


@dataclass(frozen=True)
class Training:
    """How a classifier is trained: Adam, the rate falling to zero by a cosine.

    Args:
        epochs: passes over the images.
        rate: Adam's rate at the start.
        shift: largest random shift of the images in each direction, in pixels.
        degrees: largest random rotation, in degrees.
        batch: images per step.
    """

    epochs: int
    rate: float = 1e-3
    shift: float = 0.0
    degrees: float = 0.0
    batch: int = 100


TRAINING = {
    "fashion": Training(epochs=8),
    "mnist": Training(epochs=40, rate=2e-3, shift=2.0, degrees=10.0),
}


class UnitImages(nn.Module):
    """Wraps a network for images with values 0 to 255, so that it takes images in [0, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 224, 224) in [0, 1] to logits (N, 1000)."""
        logits: Tensor = self.model((images * 255.0 - 127.0) / 128.0)
        return logits


def imagenet_classifier() -> nn.Module:
    """EfficientNet-lite0 for images in [0, 1], in eval mode, with frozen parameters."""
    return UnitImages(efficientnet_lite0().model).eval().requires_grad_(False)


def small_classifier(name: str, seed: int, images: Array, labels: Labels, cache: str | Path | None = None) -> nn.Module:
    """The classifier of a data set and seed, in eval mode: from the cache, or trained and cached."""
    file = cache_folder(cache) / "classifiers" / f"{name}-{seed}.pt"
    network = FashionCNN()
    network.load_state_dict(kept(file, lambda: train(TRAINING[name], derived_seed(seed, name), images, labels)))
    # Pooling is vectorised in channels-last layout, which speeds up every gradient through a detector.
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def kept(file: Path, make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Load weights from the cache; if there are none, make the network now and cache its weights."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        made = make().state_dict()
        with written_whole(file) as stream:
            torch.save(made, stream)
    weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    return weights


def train(config: Training, seed: int, images: Array, labels: Labels) -> FashionCNN:
    """A `FashionCNN` trained with this config, deterministic for a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = FashionCNN()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    draw = generator(seed, "training")
    optimizer = torch.optim.Adam(network.parameters(), lr=config.rate, weight_decay=1e-5)
    steps, step = config.epochs * math.ceil(len(x) / config.batch), 0
    for epoch in range(config.epochs):
        start, total = time.time(), 0.0
        for chosen in torch.randperm(len(x), generator=draw).split(config.batch):
            optimizer.param_groups[0]["lr"] = config.rate * (1 + math.cos(math.pi * step / steps)) / 2
            batch = _moved(x[chosen], config, draw) if config.shift or config.degrees else x[chosen]
            loss = F.cross_entropy(network(batch), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, step = total + loss.item() * len(chosen), step + 1
        if epoch % 4 == 3:
            print(f"  epoch {epoch + 1}: loss {total / len(x):.4f}, {time.time() - start:.1f} s an epoch", flush=True)
    return network


def _moved(x: Tensor, config: Training, draw: torch.Generator) -> Tensor:
    """Each image rotated and shifted by its own amount, with black borders."""
    size = x.shape[-1]
    amount = torch.rand(len(x), 3, generator=draw) * 2 - 1
    angle = amount[:, 0] * math.radians(config.degrees)
    shift = amount[:, 1:].mul(config.shift).round() * 2 / size
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def checksum(network: nn.Module, start: int = 0) -> int:
    """A checksum of the network's weights, continued from another checksum."""
    for tensor in network.state_dict().values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            start = zlib.crc32(tensor.detach().cpu().float().numpy().tobytes(), start)
    return start


def predictions(network: nn.Module, images: Array, batch_size: int = 250) -> Labels:
    """Predicted classes, (N,)."""
    with torch.no_grad():
        parts = [network(batch).argmax(1) for batch in torch.from_numpy(images).split(batch_size)]
    return torch.cat(parts).numpy()
