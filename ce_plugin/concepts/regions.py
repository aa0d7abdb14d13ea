"""From a map of activity to the region of the image where it is greatest."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["peak_regions"]


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
