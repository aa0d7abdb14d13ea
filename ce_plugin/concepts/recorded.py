"""A frozen network's activations and logits for each image: computed once, kept in memory where they fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ce_plugin.concepts.images import Source
from ce_plugin.networks.forward import OutputSelector, is_opaque, select_logits
from ce_plugin.networks.graph import Suffix, SuffixConstants
from ce_plugin.networks.layers import find_layer, inserted, read_layer
from ce_plugin.networks.tracing import HookPoint, Untraceable, traced

_PROBE = 3


class Batch(NamedTuple):
    """Some images as the network sees them.

    Args:
        activations: the layer's output, (n, C, h, w).
        output: the network's logits, (n, classes).
        images: (n, ...), where the whole network has to be run again; else empty.
        beside: values that by-pass the layer, one row per image.
    """

    activations: Tensor
    output: Tensor
    images: Tensor
    beside: list[Tensor]


class Recorded:
    """Activations and answers of the images of a source, by number.

    Args:
        network: in eval mode, its parameters frozen, for as long as this is used.
        layer: name of the layer.
        source: the images.
        output: which part of what the network returns holds the logits.
        batch_size: images per pass when they are read.
        cache_bytes: what may be kept in memory; where it does not suffice, each batch is run again.
        tick: called with the number of images that were read.

    Raises:
        ModelError: the layer is not reached once or returns nothing spatial, or the network returns no logits.
    """

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        source: Source,
        output: OutputSelector,
        *,
        batch_size: int,
        cache_bytes: int,
        tick: Callable[[int], object] = lambda n: None,
    ) -> None:
        self.network, self.layer, self.source, self._output = network, layer, source, output
        self._cache: list[Tensor] | None = None
        with torch.no_grad():
            few = source.take([i % len(source) for i in range(_PROBE)])
            self.shape = read_layer(network, layer, few)[0].shape[1:]
            self._suffix: Suffix | None = None
            self._constants: SuffixConstants | None = None
            self._cut(few)
            first = self._run(few)
            each = sum(value[0].numel() * value.element_size() for value in (*first[:2], *first.beside))
            if each * len(source) <= cache_bytes:
                self._cache = self._read(batch_size, tick)

    def _cut(self, images: Tensor) -> None:
        """Cut the network at the layer; not where it cannot be traced, or its part gives other logits than the whole.

        Args:
            images: a few, on which the two are compared, as they are and with other activations.
        """
        if is_opaque(self.network):
            return
        with suppress(Untraceable), traced():
            suffix = Suffix(self.network, HookPoint(find_layer(self.network, self.layer)[1]))
            constants = suffix.capture((images,))
            if all(isinstance(value, Tensor) for value in constants.rows.values()):
                self._suffix, self._constants = suffix, constants
                if self._agrees(images):
                    return
        self._suffix = self._constants = None

    def _agrees(self, images: Tensor) -> bool:
        """Whether what follows the layer gives the whole network's logits, also for other activations."""
        batch = self._run(images)
        for activations in (batch.activations, batch.activations.roll(1, 1) + batch.activations.std()):
            wanted = self._whole(activations, images)
            error = (self.answer(activations, batch) - wanted).abs().max()
            if not bool(error <= 1e-4 * wanted.abs().max() + 1e-6):
                return False
        return True

    def __len__(self) -> int:
        return len(self.source)

    @property
    def cached(self) -> bool:
        """Whether everything is kept in memory."""
        return self._cache is not None

    @property
    def cut(self) -> bool:
        """Whether only what comes after the layer is run when its output is replaced."""
        return self._suffix is not None

    def _read(self, batch_size: int, tick: Callable[[int], object]) -> list[Tensor]:
        """All images, in one tensor per value; on the CPU, where there is more memory."""
        kept: list[Tensor] = []
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            batch = self._run(self.source.take(rows))
            values = [batch.activations, batch.output, *batch.beside]
            if not kept:
                kept = [torch.empty((len(self), *v.shape[1:]), dtype=v.dtype) for v in values]
            for whole, value in zip(kept, values, strict=True):
                whole[start : rows.stop] = value
            tick(len(rows))
        return kept

    def _run(self, images: Tensor) -> Batch:
        if self._suffix is None:
            activations, result = read_layer(self.network, self.layer, images)
            return Batch(activations, select_logits(result, self._output), images, [])
        captured = self._suffix.capture((images,))
        batch = Batch(captured.site, images[:0], images[:0], list(captured.rows.values()))
        return batch._replace(output=self.answer(batch.activations, batch))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of the images, on the network's device, without gradients."""
        with torch.no_grad():
            if self._cache is None:
                return self._run(self.source.take(indices))
            rows = torch.as_tensor(indices)
            activations, output, *beside = (v[rows].to(self.source.device) for v in self._cache)
            images = self.source.take(indices) if self._suffix is None else output[:0]
            return Batch(activations, output, images, beside)

    def answer(self, activations: Tensor, batch: Batch) -> Tensor:
        """The logits where the layer returns these activations, with gradient to them."""
        if self._suffix is None or self._constants is None:
            return self._whole(activations, batch.images)
        beside = dict(zip(self._constants.rows, batch.beside, strict=True))
        captured = replace(self._constants, site=activations, rows=beside)
        result = self._suffix.run(captured, activations, torch.arange(len(activations)))
        return select_logits(result, self._output)

    def _whole(self, activations: Tensor, images: Tensor) -> Tensor:
        """The logits where the layer returns these activations, by a pass through the whole network."""
        with inserted(self.network, self.layer, lambda _: activations):
            return select_logits(self.network(images), self._output)
