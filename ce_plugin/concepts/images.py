"""Images from a tensor, a Dataset or a DataLoader: one source that can be read in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ce_plugin.errors import InputError, expected

Images = Union[Tensor, "Dataset[Any]", "DataLoader[Any]"]


class Source:
    """Images by number, on the network's device and of its floating point type.

    Args:
        items: a tensor (N, ...) or a Dataset whose items are images or (image, label, ...) tuples.
        device: where batches go.
        dtype: their type.
    """

    def __init__(self, items: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.items, self.device, self.dtype = items, device, dtype

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Sequence[int]) -> Tensor:
        """Some of the images, (n, ...)."""
        if isinstance(self.items, Tensor):
            batch = self.items[torch.as_tensor(indices, device=self.items.device)]
        else:
            images = [_image(self.items[int(i)], int(i)) for i in indices]
            if len({image.shape for image in images}) > 1:
                shapes = sorted({tuple(image.shape) for image in images})
                raise InputError(expected("images", "of one shape", f"{shapes}", "Resize or crop them in the Dataset."))
            batch = torch.stack(images)
        if not bool(batch.isfinite().all()):
            raise InputError(expected("images", "finite", "NaN or infinite values"))
        return batch.detach().to(self.device, self.dtype)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images, in order."""
        for start in range(0, len(self), batch_size):
            yield self.take(range(start, min(start + batch_size, len(self))))


def _image(item: object, index: int) -> Tensor:
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(image, Tensor) or not image.is_floating_point():
        came = f"{image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        hint = "Convert them in the Dataset (ToTensor, normalisation)."
        raise InputError(
            expected("images", "floating point tensors, as the network takes them", f"{came} (item {index})", hint)
        )
    return image


def as_source(images: Images, network: nn.Module, *, least: int = 1, name: str = "images") -> Source:
    """A source from what the user gave, before any work is done.

    Of a DataLoader only the data set is used: order and batches are chosen here, by seed.

    Raises:
        InputError: not images, too few of them, or of integer type.
    """
    items: Any = images.dataset if isinstance(images, DataLoader) else images
    known = isinstance(items, Tensor) or (hasattr(items, "__getitem__") and hasattr(items, "__len__"))
    if not known or isinstance(items, (IterableDataset, dict, str)):
        wanted = "a tensor (N, ...), a Dataset with a length, or a DataLoader of one"
        raise InputError(expected(name, wanted, type(items).__name__, "Collect a stream in a list or a tensor first."))
    if isinstance(items, Tensor) and (items.dim() < 2 or not items.is_floating_point()):
        came = f"{tuple(items.shape)} of {items.dtype}"
        raise InputError(expected(name, "of shape (N, ...), floating point, as the network takes them", came))
    if len(items) < least:
        raise InputError(expected(name, f"at least {least} image{'s' * (least > 1)}", f"{len(items)}"))
    if not isinstance(items, Tensor):
        _image(items[0], 0)
    first = next((p for p in (*network.parameters(), *network.buffers()) if p.is_floating_point()), None)
    device = torch.device("cpu") if first is None else first.device
    return Source(items, device, torch.get_default_dtype() if first is None else first.dtype)
