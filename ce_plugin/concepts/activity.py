"""What each concept is and whether it is any good: where it is active, dead concepts, duplicates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ce_plugin.concepts.images import Images, as_source
from ce_plugin.concepts.model import ConceptAutoencoder
from ce_plugin.errors import ArgumentError, ModelError, expected
from ce_plugin.networks.forward import double
from ce_plugin.networks.guard import state_guard
from ce_plugin.networks.layers import Layer, find_layer, probe, read_layer

if TYPE_CHECKING:
    import pandas as pd


def peak_regions(maps: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The peak of each map and the box round the connected region that is at least half as high.

    Args:
        maps: (K, top, h, w), zero or more.
        size: height and width of the images, in pixels.

    Returns:
        Positions (row, column), (K, top, 2), and boxes (left, top, right, bottom) in pixels, (K, top, 4). Each cell of
        the map stands for its share of the image; what it depends on (its receptive field) may be larger.
    """
    from scipy.ndimage import label

    concepts, top, height, width = maps.shape
    flat = maps.flatten(2).argmax(2)
    positions = torch.stack([flat // width, flat % width], 2)
    boxes = torch.zeros(concepts, top, 4, dtype=torch.long)
    for k in range(concepts):
        for t in range(top):
            row, column = positions[k, t].tolist()
            regions, _ = label((maps[k, t] >= maps[k, t, row, column] / 2).numpy())
            inside = torch.from_numpy(regions == regions[row, column])
            rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
            boxes[k, t] = torch.tensor(
                [
                    int(columns[0]) * size[1] // width,
                    int(rows[0]) * size[0] // height,
                    -(-(int(columns[-1]) + 1) * size[1] // width),
                    -(-(int(rows[-1]) + 1) * size[0] // height),
                ]
            )
    return positions, boxes


# Less than this, relative to the largest of all concepts, is no activity and no effect.
_NOTHING = 1e-6


@dataclass(frozen=True)
class ConceptReport:
    """What a set of images shows about each of K concepts.

    Args:
        mean_activation: mean of the code over images and positions, (K,).
        share_active: share of the images in which a concept is active anywhere, (K,).
        effect: mean absolute change of the reconstruction when a concept is set to zero in the image that activates
            it most, (K,); in the layer's own units.
        dead: never active, or without effect on the reconstruction, (K,).
        duplicates: pairs ``(j, k, correlation, cosine)``, j < k: of the codes over all positions, and of what the two
            add to the reconstruction.
        examples: numbers of the images that activate a concept most, (K, top); -1 where fewer do at all.
        peaks: the code's greatest value in each, (K, top).
        positions: where that is in the code, (row, column), (K, top, 2).
        boxes: region around it that is at least half as active, as (left, top, right, bottom) in input pixels,
            right and bottom exclusive, (K, top, 4).
        n_images: how many images were looked at.
    """

    mean_activation: Tensor
    share_active: Tensor
    effect: Tensor
    dead: Tensor
    duplicates: tuple[tuple[int, int, float, float], ...]
    examples: Tensor
    peaks: Tensor
    positions: Tensor
    boxes: Tensor
    n_images: int

    @property
    def alive(self) -> Tensor:
        """Numbers of the concepts that are not dead."""
        return (~self.dead).nonzero()[:, 0]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per concept: activity, effect, whether it is dead, what it duplicates, its first example."""
        import pandas as pd

        twins: dict[int, list[int]] = {}
        for j, k, *_ in self.duplicates:
            twins.setdefault(j, []).append(k)
            twins.setdefault(k, []).append(j)
        frame: pd.DataFrame = pd.DataFrame(
            {
                "concept": range(len(self.dead)),
                "mean_activation": self.mean_activation.tolist(),
                "share_active": self.share_active.tolist(),
                "effect": self.effect.tolist(),
                "dead": self.dead.tolist(),
                "duplicates": [twins.get(k, []) for k in range(len(self.dead))],
                "example": self.examples[:, 0].tolist(),
            }
        )
        return frame

    def __str__(self) -> str:
        return (
            f"{len(self.dead)} concepts on {self.n_images} images: {int(self.dead.sum())} dead, "
            f"{len(self.duplicates)} pairs of duplicates"
        )


def examine(
    autoencoder: ConceptAutoencoder,
    network: nn.Module,
    layer: Layer,
    images: Images,
    *,
    top: int = 5,
    batch_size: int = 32,
    min_correlation: float = 0.95,
) -> ConceptReport:
    """Look at each concept on a set of images: activity, effect on the reconstruction, duplicates, best examples.

    Two concepts are duplicates where their codes correlate over all positions of all images, and what they add to the
    reconstruction points the same way; both by at least ``min_correlation``.

    Args:
        autoencoder: for this layer and network.
        network: run in eval mode and left as it was.
        layer: a submodule or its dotted name.
        images: (N, ...), a Dataset or a DataLoader of images or (image, label) pairs.
        top: how many examples per concept; fewer where there are fewer images.
        batch_size: images per pass; the result does not depend on it beyond rounding.
        min_correlation: in (0, 1].

    Returns:
        A :class:`ConceptReport`, on the CPU.

    Raises:
        ModelError: the autoencoder is for another layer or network; the layer is not reached once or returns nothing
            spatial.
        ArgumentError: ``top`` or ``batch_size`` below 1, or a correlation outside (0, 1].
        InputError: the images cannot be used.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 3))
        >>> autoencoder = ConceptAutoencoder(8, concepts=2)
        >>> report = examine(autoencoder, net, "0", torch.randn(10, 1, 8, 8), top=3)
        >>> report.examples.shape, report.boxes.shape, report.n_images
        (torch.Size([2, 3]), torch.Size([2, 3, 4]), 10)
    """
    for key, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ArgumentError(expected(key, "1 or more", value))
    if not 0.0 < min_correlation <= 1.0:
        raise ArgumentError(expected("min_correlation", "in (0, 1]", min_correlation))
    autoencoder.check(network, layer)
    name, _ = find_layer(network, layer)
    source = as_source(images, network)
    with state_guard(network, autoencoder), torch.no_grad():
        activations, _ = probe(network, name, source.take([0]), _any_output)
        if activations.shape[1] != autoencoder.channels:
            wanted = f"one for the {activations.shape[1]} channels of layer {name!r}"
            raise ModelError(expected("autoencoder", wanted, f"one for {autoencoder.channels}"))
        seen = _Activity(autoencoder.concepts, min(top, len(source)))
        for batch in source.batches(batch_size):
            seen.add(autoencoder.encode(read_layer(network, name, batch)[0]), batch.shape)

        def codes(rows: list[int]) -> Tensor:
            return autoencoder.encode(read_layer(network, name, source.take(rows))[0])

        directions = _directions(autoencoder, codes, seen.examples[:, 0])
    return seen.report(directions, min_correlation)


def _any_output(result: object) -> Tensor:
    """What the network answers does not matter here."""
    return torch.zeros(1, 1)


class _Activity:
    """Running sums over batches, and the most active examples so far."""

    def __init__(self, concepts: int, top: int) -> None:
        self.n_images, self.n_positions, self.top = 0, 0, top
        self.sums = torch.zeros(concepts, dtype=torch.float64)
        self.products = torch.zeros(concepts, concepts, dtype=torch.float64)
        self.active = torch.zeros(concepts, dtype=torch.long)
        self.peaks = torch.empty(concepts, 0)
        self.examples = torch.empty(concepts, 0, dtype=torch.long)
        self.maps = torch.empty(concepts, 0, 0, 0)
        self.size: tuple[int, ...] = ()

    def add(self, code: Tensor, shape: tuple[int, ...]) -> None:
        """The code of some images, (n, K, h, w), and the images' shape."""
        code = code.cpu()
        flat = double(code).transpose(0, 1).flatten(1)
        self.sums += flat.sum(1)
        self.products += flat @ flat.T
        self.n_positions += flat.shape[1]
        highest = code.flatten(2).amax(2).T
        self.active += (highest > 0).sum(1)
        numbers = torch.arange(self.n_images, self.n_images + len(code)).expand(len(highest), -1)
        self.n_images += len(code)
        self.size = tuple(shape[-2:])
        peaks = torch.cat([self.peaks.to(highest), highest], 1)
        # Stable, so that equal peaks keep the order of the images whatever the batches were.
        order = peaks.sort(dim=1, descending=True, stable=True).indices[:, : self.top]
        self.peaks = peaks.gather(1, order)
        self.examples = torch.cat([self.examples, numbers], 1).gather(1, order)
        maps = code.transpose(0, 1)
        if self.maps.shape[1]:
            maps = torch.cat([self.maps, maps], 1)
        self.maps = maps.gather(1, order[:, :, None, None].expand(-1, -1, *maps.shape[2:]))

    def report(self, directions: Tensor, min_correlation: float) -> ConceptReport:
        """All of it, with what each concept adds to the reconstruction, (K, C, h, w)."""
        effect = directions.abs().mean((1, 2, 3))
        largest = float(self.peaks.max())
        quiet = self.peaks[:, 0] <= _NOTHING * largest
        dead = quiet | (effect <= _NOTHING * float(effect.max()))
        positions, boxes = peak_regions(self.maps, self.size)
        nowhere = self.peaks <= 0
        return ConceptReport(
            mean_activation=self.sums / self.n_positions,
            share_active=self.active.double() / self.n_images,
            effect=effect,
            dead=dead,
            duplicates=self._duplicates(directions.mean((2, 3)), dead, min_correlation),
            examples=self.examples.masked_fill(nowhere, -1),
            peaks=self.peaks,
            positions=positions.masked_fill(nowhere[..., None], -1),
            boxes=boxes.masked_fill(nowhere[..., None], -1),
            n_images=self.n_images,
        )

    def _duplicates(self, directions: Tensor, dead: Tensor, least: float) -> tuple[tuple[int, int, float, float], ...]:
        mean = self.sums / self.n_positions
        covariance = self.products / self.n_positions - mean[:, None] * mean
        spread = covariance.diagonal().clamp_min(0).sqrt()
        correlation = (covariance / (spread[:, None] * spread).clamp_min(1e-300)).clamp(-1, 1)
        unit = nn.functional.normalize(directions.double(), dim=1)
        cosine = (unit @ unit.T).clamp(-1, 1)
        both = (correlation >= least) & (cosine >= least) & ~dead[:, None] & ~dead
        pairs = both.triu(1).nonzero().tolist()
        return tuple((j, k, float(correlation[j, k]), float(cosine[j, k])) for j, k in pairs)


def _directions(autoencoder: ConceptAutoencoder, codes: Callable[[list[int]], Tensor], examples: Tensor) -> Tensor:
    """What each concept adds to the reconstruction of the image that activates it most, (K, C, h, w)."""
    found = []
    for k, example in enumerate(examples.tolist()):
        code = codes([example])
        without = code.clone()
        without[:, k] = 0.0
        found.append((autoencoder.decode(code) - autoencoder.decode(without))[0].cpu())
    return torch.stack(found)
