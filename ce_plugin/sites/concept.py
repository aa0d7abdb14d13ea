"""The code of a concept autoencoder as a site: its units are concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.sites.layer import LayerSite
from ce_plugin.sites.units import MaskUnits

__all__ = ["ConceptSite"]


@dataclass(frozen=True)
class ConceptSite:
    """The innermost code of an autoencoder that is inserted at a layer; its channels are the concepts.

    The reference then is the network *with* the autoencoder inserted.

    Args:
        layer: a module of the network, its dotted name, or a :class:`LayerSite` that says more.
        autoencoder: trained on this layer of this network.

    Raises:
        ArgumentError: ``autoencoder`` is none.

    Example:
        >>> site = ConceptSite("features.3", ConceptAutoencoder(8, 2))
        >>> site
        ConceptSite('features.3', 2 concepts)

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), section 3.2; Harradon et al. 2018 (arXiv 1802.00541).
    """

    layer: nn.Module | str | LayerSite
    autoencoder: ConceptAutoencoder
    _layer: LayerSite = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: object = self.autoencoder
        if not isinstance(given, ConceptAutoencoder):
            raise ArgumentError(expected("autoencoder", "a ConceptAutoencoder", type(given).__name__))
        layer = self.layer if isinstance(self.layer, LayerSite) else LayerSite(self.layer)
        object.__setattr__(self, "_layer", layer)

    def __repr__(self) -> str:
        shown = repr(self.layer) if isinstance(self.layer, (str, LayerSite)) else type(self.layer).__name__
        return f"ConceptSite({shown}, {self.autoencoder.concepts} concepts)"

    @property
    def place(self) -> LayerSite:
        """Where the autoencoder is inserted."""
        return self._layer

    def module(self, networks: Sequence[nn.Module]) -> tuple[str, nn.Module]:
        """The layer's dotted name and the layer itself; see :meth:`LayerSite.module`."""
        return self.place.module(networks)

    def units_of(self, values: tuple[Tensor, ...]) -> MaskUnits:
        """The code's channels."""
        return LayerSite("code").units_of(values)

    def map(self, value: Tensor) -> Tensor:
        """The code is a map already, (N, K, h, w)."""
        return value
