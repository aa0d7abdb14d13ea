"""ConceptCausalEffect: effects of a concept autoencoder's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ce_plugin.attribution.layer_effect import Engine, LayerCausalEffect
from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.designs import Design
from ce_plugin.effects import Outcome
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.interventions import Intervention
from ce_plugin.sites import ConceptSite, LayerSite
from ce_plugin.trials.forward import OutputSelector

__all__ = ["ConceptCausalEffect"]


class ConceptCausalEffect(LayerCausalEffect):
    """Causal effects of concepts: the channels of a concept autoencoder's code, inserted at a layer.

    The reference is the network *with* the autoencoder inserted. Inserting it changes the output by itself:
    ``Estimate.insertion_effect`` (N, C); a concept's total effect on the network is that plus its ``effect``.

    Args:
        forward_func: as in :class:`CausalEffect`.
        layer: where the autoencoder is inserted: a module, its dotted name, or a :class:`LayerSite`.
        autoencoder: trained on this layer of this network.
        min_fidelity: smallest share of held-out images whose top class the autoencoder must leave as it is.
        intervention, design, device_ids, outcome, output, seed, memory_budget, engine: as in
            :class:`LayerCausalEffect`.

    Raises:
        ModelError: the autoencoder belongs to another layer or network, was not trained, or is below
            ``min_fidelity``; the message holds the numbers.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        >>> untrained = ConceptAutoencoder(channels=8, concepts=2)
        >>> ConceptCausalEffect(net, "1", untrained, min_fidelity=0).estimate(torch.rand(1, 1, 4, 4)).effect.shape
        torch.Size([1, 2, 2])

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), sections 3.2 and 3.3: the effect of the node (L, N).
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | LayerSite,
        autoencoder: ConceptAutoencoder,
        intervention: Intervention | None = None,
        design: Design | None = None,
        *,
        min_fidelity: float = 0.9,
        device_ids: list[int] | None = None,
        outcome: str | Outcome | OutcomeFunction | None = "probability",
        output: OutputSelector = None,
        seed: int = 0,
        memory_budget: int | None = None,
        engine: Engine = "auto",
    ) -> None:
        self.concept_site = ConceptSite(layer, autoencoder)
        super().__init__(
            forward_func, self.concept_site.place, intervention, design, device_ids=device_ids, outcome=outcome,
            output=output, seed=seed, memory_budget=memory_budget, engine=engine,
        )  # fmt: skip
        self.autoencoder = autoencoder
        root = next(network for network in self.forward.modules if self.layer in set(network.modules()))
        autoencoder.check(root, self.layer, min_fidelity)

    def _site(self, layer_mask: Tensor | tuple[Tensor, ...] | None, at_input: bool) -> ConceptSite:
        if layer_mask is not None:
            todo = "Joint groups of concepts: pass design=Joint(groups)."
            raise ArgumentError(expected("layer_mask", "None: the units are concepts", "a mask", todo))
        if at_input and not self.concept_site.place.at_input:
            place = replace(self.concept_site.place, at_input=True)
            return ConceptSite(place, self.autoencoder)
        return self.concept_site
