"""Denoising: the counterfactual input is the image as a learned denoiser gives it back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, expected
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.interventions.normalization import Normalization, NormalizationLike

__all__ = ["Denoise"]


class Denoise(Intervention):
    """x' = D(x): what a denoiser, learned from clean images, makes of the image.

    Args:
        denoiser: images in image units to images of the same shape: an ``nn.Module`` in eval mode or any function.
            It is called with gradients on where the caller has them on.
        normalization: pair ``(mean, std)`` saying what was done to the image before the model:
            ``model = (image - mean) / std``. None: model and image units are the same.
        forward_equivalents: what the denoiser costs for one image, in forward passes of the network.

    Raises:
        ArgumentError: not callable, or a negative cost.
        InputError: the denoiser returns another shape, when it is used.

    Example:
        >>> import torch
        >>> halved = Denoise(lambda images: images / 2)
        >>> halved(torch.ones(1, 1, 2, 2)).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]

    Source: denoisers before a classifier: Liao et al., CVPR 2018 (arXiv 1712.02976); here they are interventions, whose
    effects are what is looked at.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor], Tensor],
        *,
        normalization: NormalizationLike = None,
        forward_equivalents: int = 1,
    ) -> None:
        if not callable(denoiser):
            raise ArgumentError(expected("denoiser", "a network or function of images", type(denoiser).__name__))
        if forward_equivalents < 0:
            raise ArgumentError(expected("forward_equivalents", "a number of passes, 0 or more", forward_equivalents))
        self.denoiser = denoiser
        self.normalization = Normalization.of(normalization)
        self.forward_equivalents = forward_equivalents

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """x' = D(x), (N, C, H, W), in model units."""
        denoised = self.denoiser(self.normalization.to_image(clean))
        if denoised.shape != clean.shape:
            got = f"shape {tuple(denoised.shape)}"
            raise InputError(expected("denoiser", f"one that returns images of shape {tuple(clean.shape)}", got))
        return self.normalization.to_model(denoised).to(clean)

    def __repr__(self) -> str:
        return f"Denoise({type(self.denoiser).__name__})"
