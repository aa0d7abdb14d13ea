"""The three terms of the autoencoder's loss, as pure functions: shallow, deep, interpretability."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, expected

OUTCOMES = ("probability", "sigmoid")
# A concept below this root mean square is absent: it has no share in the loss, and no gradient.
_ABSENT = 1e-6


def shallow_loss(activations: Tensor, reconstruction: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Reconstruction at the layer: ``mean |h - h'| / scale``.

    Args:
        activations: h, (N, C, h, w).
        reconstruction: h', of the same shape.
        scale: a unit of activation; training takes the layer's own mean absolute deviation, so that 1 is what a
            constant would reach and one lambda suits every layer.

    Returns:
        A scalar.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> import torch
        >>> shallow_loss(torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2), scale=2.0)
        tensor(0.5000)

    Source: L1 of Yang et al., ICIP 2019, section 3.2 (Harradon et al. 2018, Eqn 7).
    """
    if activations.shape != reconstruction.shape:
        shape = tuple(activations.shape)
        raise InputError(expected("reconstruction", f"of shape {shape}", tuple(reconstruction.shape)))
    return (activations - reconstruction).abs().mean() / scale


def deep_loss(output: Tensor, inserted_output: Tensor, outcome: str = "probability") -> Tensor:
    """What the insertion does to the answer: ``KL(original || with the autoencoder inserted)`` in nats, image mean.

    Args:
        output: the network's logits, (N, C).
        inserted_output: its logits with the autoencoder inserted, (N, C).
        outcome: ``"probability"``: KL between the softmax distributions; ``"sigmoid"``: sum over the labels of the KL
            between the Bernoulli distributions of each (multi-label networks).

    Returns:
        A scalar, zero or more, with gradient to both arguments where they have one.

    Raises:
        InputError: the shapes differ.
        ArgumentError: an unknown outcome.

    Example:
        >>> import torch
        >>> deep_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
        tensor(49.3069)

    Source: KL of Yang et al., ICIP 2019, section 3.2 (Harradon et al. 2018, Eqn 7).
    """
    return kl_per_image(output, inserted_output, outcome).mean()


def kl_per_image(output: Tensor, inserted_output: Tensor, outcome: str) -> Tensor:
    """The divergence of each image, (N,)."""
    check_outcome(outcome, output)
    if output.shape != inserted_output.shape:
        shape = tuple(output.shape)
        raise InputError(expected("inserted_output", f"of shape {shape}", tuple(inserted_output.shape)))
    if outcome == "probability":
        p, q = output.log_softmax(1), inserted_output.log_softmax(1)
        return (p.exp() * (p - q)).sum(1)
    # From the logits, so that saturated labels do not become log(0).
    on = output.sigmoid() * (F.logsigmoid(output) - F.logsigmoid(inserted_output))
    off = (-output).sigmoid() * (F.logsigmoid(-output) - F.logsigmoid(-inserted_output))
    return (on + off).sum(1)


def check_outcome(outcome: str, output: Tensor | None = None) -> None:
    """That the outcome is known, and fits the output."""
    if outcome not in OUTCOMES:
        raise ArgumentError(expected("outcome", f"one of {OUTCOMES}", repr(outcome)))
    if output is not None and outcome == "probability" and output.shape[1] == 1:
        hint = "The softmax of a single output is always 1."
        raise ArgumentError(expected("outcome", "'sigmoid' where the network has one output", repr(outcome), hint))


def sparsity(code: Tensor) -> Tensor:
    """How far concepts are from being active at few positions of few images: ``mean_k mean|z_k| / rms(z_k)``.

    The ratio of the L1 to the L2 norm of each concept over the batch and its positions, in units in which a constant
    map has 1 and one active position out of n has ``1 / sqrt(n)``. Doubling a concept does not change it, so that a
    code cannot become "sparse" by shrinking while the decoder grows, as it can under a plain L1. Concepts that are
    absent from the whole batch are left out of the mean, so that nothing is gained by losing one.

    Args:
        code: z, (N, K, h, w).

    Example:
        >>> import torch
        >>> one = torch.zeros(1, 1, 2, 2)
        >>> one[0, 0, 1, 1] = 7.0
        >>> sparsity(one), sparsity(torch.ones(1, 1, 2, 2))
        (tensor(0.5000), tensor(1.))
    """
    return _relative(code.abs().mean((0, 2, 3)), code)


def smoothness(code: Tensor) -> Tensor:
    """How far concepts are from being smooth maps: ``mean_k (mean|z_k - below| + mean|z_k - right|) / rms(z_k)``.

    The total variation of each concept in units of its own root mean square; zero for constant maps.

    Args:
        code: z, (N, K, h, w); a direction of extent 1 has no neighbours and adds nothing.

    Example:
        >>> import torch
        >>> smoothness(torch.ones(1, 1, 4, 4)), smoothness(torch.eye(2)[None, None])
        (tensor(0.), tensor(2.8284))
    """
    total = code.new_zeros(code.shape[1])
    for axis in (2, 3):
        if code.shape[axis] > 1:
            total = total + code.diff(dim=axis).abs().mean((0, 2, 3))
    return _relative(total, code)


def _relative(amount: Tensor, code: Tensor) -> Tensor:
    """The mean, over the concepts that are there at all, of an amount in units of the concept's root mean square."""
    square = code.square().mean((0, 2, 3))
    absent = square < _ABSENT**2
    each = (amount / square.masked_fill(absent, 1.0).sqrt()).masked_fill(absent, 0.0)
    return each.sum() / (~absent).sum().clamp_min(1)


def interpretability_loss(code: Tensor, *, smooth: float = 0.5) -> Tensor:
    """Sparse and smooth concepts: ``sparsity(z) + smooth * smoothness(z)``.

    The paper and its source name this term without a formula, so this one is ours; ``train_autoencoder`` takes any
    other callable from a code to a scalar.

    Args:
        code: z, (N, K, h, w).
        smooth: weight of the smoothness, zero or more.

    Returns:
        A scalar, with gradient to the code.

    Raises:
        ArgumentError: a negative weight.

    Example:
        >>> import torch
        >>> interpretability_loss(torch.ones(2, 3, 4, 4))
        tensor(1.)

    Source: "lambda_interpretability" of Yang et al., ICIP 2019, section 3.2; Harradon et al. 2018 call for sparsity and
        smoothness. The ratio of norms: Hoyer 2004.
    """
    if smooth < 0:
        raise ArgumentError(expected("smooth", "zero or more", smooth))
    return sparsity(code) + smooth * smoothness(code)
