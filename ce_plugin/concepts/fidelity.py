"""How much a network's answers change when an autoencoder is inserted into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ce_plugin.concepts.images import Images, as_source
from ce_plugin.concepts.losses import check_outcome, kl_per_image
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.networks.forward import OutputSelector, double, select_logits
from ce_plugin.networks.guard import state_guard
from ce_plugin.networks.layers import Layer, find_layer, inserted, probe, read_layer


@dataclass(frozen=True)
class Fidelity:
    """How far a network with an autoencoder inserted answers as the network alone.

    Args:
        agreement: share of the images that keep their top class (with one output: its sign), in [0, 1].
        kl: mean divergence KL(original || inserted), in nats.
        outcome_change: mean absolute change of the probability of the class that was on top.
        n_images: how many images this was measured on.
    """

    agreement: float
    kl: float
    outcome_change: float
    n_images: int

    def reliable(self, min_fidelity: float) -> bool:
        """Whether at least this share of the images keeps its top class."""
        return self.agreement >= min_fidelity

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the agreement.

        Args:
            level: of confidence, in (0, 1).

        Raises:
            ArgumentError: a level outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ArgumentError(expected("level", "in (0, 1)", level))
        z = 2**0.5 * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
        n, share = self.n_images, self.agreement
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"{self.agreement:.1%} of {self.n_images} images keep their top class ({low:.1%} to {high:.1%}), "
            f"KL {self.kl:.4g}, change of outcome {self.outcome_change:.4g}"
        )


def measure_fidelity(
    network: nn.Module,
    layer: Layer,
    autoencoder: nn.Module,
    images: Images,
    *,
    batch_size: int = 32,
    outcome: str = "probability",
    output: OutputSelector = None,
) -> Fidelity:
    """Compare a network's answers with and without an autoencoder in the place of a layer's output.

    Args:
        network: run in eval mode and left as it was.
        layer: a submodule or its dotted name.
        autoencoder: a :class:`ConceptAutoencoder`, or any module that maps the layer's output to its own shape.
        images: (N, ...), a Dataset or a DataLoader of images or (image, label) pairs.
        batch_size: images per pass; the result does not depend on it beyond rounding.
        outcome: ``"probability"`` (softmax) or ``"sigmoid"`` (multi-label).
        output: which part of what the network returns holds the logits: a key, an index or a callable.

    Returns:
        A :class:`Fidelity`.

    Raises:
        ModelError: the layer is not reached once or returns nothing spatial, or the network returns no logits.
        InputError: the images cannot be used.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 4))
        >>> measure_fidelity(net, "0", nn.Identity(), torch.randn(6, 1, 5, 5)).agreement
        1.0
    """
    check_outcome(outcome)
    name, _ = find_layer(network, layer)
    source = as_source(images, network)
    pairs = []
    with state_guard(network, autoencoder), torch.no_grad():
        check_outcome(outcome, probe(network, name, source.take([0]), output)[1])
        for batch in source.batches(batch_size):
            before = select_logits(read_layer(network, name, batch)[1], output)
            with inserted(network, name, autoencoder):
                pairs.append((before, select_logits(network(batch), output)))
    return compare_outputs(pairs, outcome)


def compare_outputs(pairs: Iterable[tuple[Tensor, Tensor]], outcome: str) -> Fidelity:
    """The fidelity from pairs of logits, without and with the autoencoder, each (n, C)."""
    same, kl, change = [], [], []
    for without, instead in pairs:
        before, after = double(without), double(instead)
        kl.append(kl_per_image(before, after, outcome))
        if before.shape[1] == 1:
            same.append((before > 0) == (after > 0))
        else:
            same.append(before.argmax(1) == after.argmax(1))
        top = before.argmax(1, keepdim=True)
        p, q = (x.softmax(1) if outcome == "probability" else x.sigmoid() for x in (before, after))
        change.append((q.gather(1, top) - p.gather(1, top)).abs()[:, 0])
    return Fidelity(
        agreement=float(double(torch.cat(same)).mean()),
        kl=max(0.0, float(torch.cat(kl).mean())),
        outcome_change=float(torch.cat(change).mean()),
        n_images=sum(map(len, kl)),
    )
