"""A start close to the goal: the autoencoder as a linear one whose code is independent components."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ce_plugin.concepts.model import ConceptAutoencoder
from ce_plugin.randomness import generator

__all__ = ["independent_components", "start_linear"]

_ROUNDS, _TOLERANCE = 60, 1e-4
# Below this share of the largest variance a direction is rounding noise.
_RANK = 1e-7
# The code is zero at this quantile of a component: for what is absent nearly everywhere, that is where it is absent.
_ABSENT = 0.01


def independent_components(vectors: Tensor, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Directions in which data are a mixture of independent, skewed or heavy-tailed sources.

    The first principal components, whitened, then turned by FastICA (symmetric, log cosh).

    Args:
        vectors: centred data, (n, C).
        number: how many components are wanted, at most C.
        seed: of the first turn.

    Returns:
        ``unmixing (K, C)`` and ``mixing (C, K)``: ``vectors @ unmixing.T`` are sources of variance 1, each with its
        longer tail above zero, and ``sources @ mixing.T`` the closest to the data that K directions allow. K is
        smaller than ``number`` where the data have fewer directions.

    Source: Hyvarinen 1999, "Fast and robust fixed-point algorithms for independent component analysis".
    """
    values, directions = torch.linalg.eigh(vectors.T @ vectors / len(vectors))
    values, directions = values.flip(0)[:number], directions.flip(1)[:, :number]
    kept = values > _RANK * values[0].clamp_min(torch.finfo(values.dtype).tiny)
    values, directions = values[kept], directions[:, kept]
    if len(values) == 0:
        return vectors.new_zeros(0, vectors.shape[1]), vectors.new_zeros(vectors.shape[1], 0)
    whitening, colouring = (directions / values.sqrt()).T, directions * values.sqrt()
    # Single precision suffices for the turn, and takes half the time; most of it is spent here.
    white = (vectors @ whitening.T).float()
    draw = generator(seed, "components")
    turn = _orthogonal(torch.randn(len(values), len(values), generator=draw))
    for _ in range(_ROUNDS if len(values) > 1 else 0):
        bent = (white @ turn.T).tanh()
        new = _orthogonal(bent.T @ white / len(white) - (1 - bent.square()).mean(0)[:, None] * turn)
        moved = ((new * turn).sum(1).abs() - 1).abs().max()
        turn = new
        if moved < _TOLERANCE:
            break
    sign = (white @ turn.T).pow(3).mean(0).sign()
    turn = turn * torch.where(sign == 0, 1.0, sign)[:, None]
    turn = turn.to(whitening)
    return turn @ whitening, colouring @ turn.T


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthogonal rows of length 1."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def start_linear(autoencoder: ConceptAutoencoder, vectors: Tensor) -> None:
    """Set the first weights so that the code is ``relu(unmixing h + offset)`` and the reconstruction linear in it.

    Leaky ReLUs in a row before a ReLU do nothing to what it lets through, and nothing to a code that is never negative,
    so that identities in the middle of the kernels make the five layers one linear encoder and one linear decoder.
    What is left of the inner channels keeps its random weights on the way in and gets none on the way out: it does
    nothing yet, and learns.

    Args:
        autoencoder: standardised, untrained; one with fewer inner channels than concepts is left as it is.
        vectors: activations at some positions, (n, C), in the layer's own units; where they do not vary there is
            nothing to start from.
    """
    if autoencoder.hidden < autoencoder.concepts or len(vectors) < 2:
        return
    scale = autoencoder.get_buffer("encoder.standardize.scale").flatten().to(vectors)
    centred = vectors - autoencoder.get_buffer("encoder.standardize.mean").flatten().to(vectors)
    unmixing, mixing = independent_components(centred, autoencoder.concepts, autoencoder.seed)
    k = len(unmixing)
    if k == 0:
        return
    # One by one: torch.quantile takes no more than 16 million values at a time.
    lowest = torch.stack([component.quantile(_ABSENT) for component in unmixing @ centred.T])
    with torch.no_grad():
        eye = torch.eye(k).to(unmixing)
        _set(autoencoder.encoder, "conv1", k, unmixing * scale, -lowest)
        _set(autoencoder.encoder, "conv2", k, eye, None)
        _set(autoencoder.encoder, "conv3", k, eye, None)
        _set(autoencoder.decoder, "conv4", k, eye, None)
        _set(autoencoder.decoder, "conv5", len(mixing), mixing / scale[:, None], (mixing @ lowest) / scale)


def _set(part: nn.Sequential, name: str, rows: int, matrix: Tensor, bias: Tensor | None) -> None:
    """Put a matrix into the middle of the first ``rows`` kernels, nothing into the rest of them."""
    layer = part.get_submodule(name)
    weight, middle = layer.get_parameter("weight"), layer.get_parameter("weight").shape[-1] // 2
    weight[:rows] = 0.0
    weight[:rows, : matrix.shape[1], middle, middle] = matrix.to(weight)
    if bias is not None:
        layer.get_parameter("bias")[:rows] = bias.to(weight)
