"""The autoencoder of a layer's activations: its code's channels are the concepts whose effects can be asked for."""

from ce_plugin.concepts.activity import ConceptReport, examine
from ce_plugin.concepts.fidelity import Fidelity, measure_fidelity
from ce_plugin.concepts.losses import deep_loss, interpretability_loss, shallow_loss, smoothness, sparsity
from ce_plugin.concepts.model import ConceptAutoencoder
from ce_plugin.concepts.training import train_autoencoder
from ce_plugin.networks.layers import fingerprint, inserted

__all__ = [
    "ConceptAutoencoder",
    "ConceptReport",
    "Fidelity",
    "deep_loss",
    "examine",
    "fingerprint",
    "inserted",
    "interpretability_loss",
    "measure_fidelity",
    "shallow_loss",
    "smoothness",
    "sparsity",
    "train_autoencoder",
]
