"""The autoencoder whose code's channels are the concepts of a layer."""

from __future__ import annotations

from collections import OrderedDict
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ce_plugin.concepts.fidelity import Fidelity
from ce_plugin.errors import ArgumentError, InputError, ModelError, expected
from ce_plugin.files import damaged, load, save
from ce_plugin.networks.layers import Layer, find_layer, fingerprint
from ce_plugin.randomness import generator

_KIND, _VERSION = "ConceptAutoencoder", 1
_SLOPE = 0.1


class _Standardize(nn.Module):
    """(h - mean) / scale, with one fixed mean and scale per channel."""

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))

    def forward(self, activations: Tensor) -> Tensor:
        return (activations - self.mean) / self.scale


class _Restore(_Standardize):
    """The way back: h * scale + mean."""

    def forward(self, activations: Tensor) -> Tensor:
        return activations * self.scale + self.mean


class ConceptAutoencoder(nn.Module):
    """Five convolutions that squeeze a layer's activations into a few concepts and restore them.

    ``h (N, C, h, w) -> conv -> conv -> conv, ReLU -> code (N, K, h, w) -> conv -> conv -> h'``: two encoding layers, a
    low-dimensional middle, two decoding layers, of stride 1, so that the code can be laid over the image. Between them
    are leaky ReLUs. The code itself is behind a ReLU: it is never negative, so that zero means that a concept is
    absent, and setting a concept to zero (Z0) takes away what is there and puts nothing in. Activations enter
    standardised by the mean and scale of each channel on the training images (buffers, not trained), so that layers of
    every size of activation train alike and the padding at the border is the mean, not a black frame.

    Args:
        channels: channels C of the layer.
        concepts: channels K of the code, ``1 <= K < C``.
        hidden: channels of the other three inner convolutions; None means the geometric mean of C and K.
        kernel_size: odd; 1 looks at each position alone, and has a ninth of the weights of 3.
        seed: of the initial weights; the global random state is not touched.

    Raises:
        ArgumentError: a number out of its range.

    Attributes:
        encoder, decoder: sequences of plain modules; ``decoder`` is what can be spliced into a network's graph.
        layer_name, fingerprint: of the layer and network that it was trained for; empty before.
        fidelity: how much the network's answers change when it is inserted, on held-out images; None before training.
        history: one dictionary per epoch of training: each term of the loss on both parts of the images.

    Example:
        >>> autoencoder = ConceptAutoencoder(channels=8, concepts=2)
        >>> code = autoencoder.encode(torch.randn(1, 8, 5, 5))
        >>> code.shape, autoencoder.decode(code).shape, bool((code >= 0).all())
        (torch.Size([1, 2, 5, 5]), torch.Size([1, 8, 5, 5]), True)

    Source: Yang et al., ICIP 2019, section 3.2, after Harradon et al. 2018 (arXiv 1802.00541). Neither states the
        non-linearity; the authors' code has none, which allows negative codes.
    """

    def __init__(
        self, channels: int, concepts: int, hidden: int | None = None, kernel_size: int = 3, *, seed: int = 0
    ) -> None:
        super().__init__()
        check_sizes(channels, concepts, hidden, kernel_size)
        self.channels, self.concepts, self.kernel_size, self.seed = channels, concepts, kernel_size, seed
        self.hidden = hidden or round((channels * concepts) ** 0.5)
        self.layer_name, self.fingerprint = "", ""
        self.fidelity: Fidelity | None = None
        self.history: list[dict[str, float]] = []
        inner, draw = self.hidden, generator(seed, "autoencoder")

        def conv(before: int, after: int) -> nn.Conv2d:
            return _convolution(before, after, kernel_size, draw)

        self.encoder = nn.Sequential(
            OrderedDict[str, nn.Module](
                standardize=_Standardize(channels),
                conv1=conv(channels, inner),
                leaky1=nn.LeakyReLU(_SLOPE),
                conv2=conv(inner, inner),
                leaky2=nn.LeakyReLU(_SLOPE),
                conv3=conv(inner, concepts),
                relu3=nn.ReLU(),
            )
        )
        self.decoder = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv4=conv(concepts, inner),
                leaky4=nn.LeakyReLU(_SLOPE),
                conv5=conv(inner, channels),
                restore=_Restore(channels),
            )
        )

    def encode(self, activations: Tensor) -> Tensor:
        """The concepts in a layer's activations: (N, C, h, w) to (N, K, h, w), zero or more.

        Raises:
            InputError: the activations have another number of channels or no positions.
        """
        if activations.dim() != 4 or activations.shape[1] != self.channels:
            wanted = f"of shape (N, {self.channels}, h, w)"
            raise InputError(expected("activations", wanted, tuple(activations.shape), f"{self._made_for()}"))
        code: Tensor = self.encoder(activations)
        return code

    def decode(self, code: Tensor) -> Tensor:
        """The activations that a code stands for: (N, K, h, w) to (N, C, h, w)."""
        activations: Tensor = self.decoder(code)
        return activations

    def forward(self, activations: Tensor) -> Tensor:
        """The reconstruction: ``decode(encode(activations))``."""
        return self.decode(self.encode(activations))

    def standardize(self, mean: Tensor, scale: Tensor) -> None:
        """Set what each channel is standardised by; done once, before training.

        Args:
            mean: (C,).
            scale: (C,), above zero.

        Raises:
            ArgumentError: a shape other than (C,), or a scale that is not above zero.
        """
        for name, value in (("mean", mean), ("scale", scale)):
            if value.shape != (self.channels,) or not bool(value.isfinite().all()):
                raise ArgumentError(expected(name, f"({self.channels},), finite", tuple(value.shape)))
        if not bool((scale > 0).all()):
            raise ArgumentError(expected("scale", "above zero in every channel", float(scale.min())))
        for module in self.modules():
            if isinstance(module, _Standardize):
                module.mean.copy_(mean.view(1, -1, 1, 1))
                module.scale.copy_(scale.view(1, -1, 1, 1))

    def check(self, network: nn.Module, layer: Layer, min_fidelity: float = 0.0) -> Fidelity | None:
        """That this autoencoder is for this layer of this network, and good enough.

        Args:
            network: the explained network.
            layer: a submodule or its dotted name.
            min_fidelity: least share of held-out images whose top class the insertion keeps; 0 asks for nothing.

        Returns:
            The fidelity.

        Raises:
            ModelError: it was trained for another layer or network, was not trained, or its agreement is too small.
            ArgumentError: ``min_fidelity`` outside [0, 1].
        """
        if not 0.0 <= min_fidelity <= 1.0:
            raise ArgumentError(expected("min_fidelity", "a share in [0, 1]", min_fidelity))
        name, _ = find_layer(network, layer)
        if self.layer_name and name != self.layer_name:
            hint = "Train one for that layer, or explain this one."
            raise ModelError(expected("autoencoder", f"one for layer {name!r}", f"{self._made_for()}", hint))
        if self.fingerprint and (found := fingerprint(network)) != self.fingerprint:
            wanted = f"one for this {type(network).__name__} ({found})"
            hint = "Its weights differ from those that it was trained with: train it again."
            raise ModelError(expected("autoencoder", wanted, f"one for network {self.fingerprint}", hint))
        if min_fidelity > 0 and (self.fidelity is None or not self.fidelity.reliable(min_fidelity)):
            came = "one that was not trained" if self.fidelity is None else str(self.fidelity)
            hint = "Train it longer, on more images or with more concepts, or lower `min_fidelity`."
            wanted = f"one that keeps the top class of at least {min_fidelity:.1%} of the images"
            raise ModelError(expected("autoencoder", wanted, came, hint))
        return self.fidelity

    def _made_for(self) -> str:
        return f"one for layer {self.layer_name!r}" if self.layer_name else "one that was not trained"

    def extra_repr(self) -> str:
        """What the printed form says first."""
        made = f", layer={self.layer_name!r}" if self.layer_name else ""
        return f"channels={self.channels}, concepts={self.concepts}{made}, fidelity={self.fidelity}"

    def config(self) -> dict[str, int]:
        """What the constructor was called with."""
        keys = ("channels", "concepts", "hidden", "kernel_size", "seed")
        return {key: getattr(self, key) for key in keys}

    def save(self, path: str | PathLike[str], *, force: bool = False) -> Path:
        """Write weights and what they belong to; :meth:`load` reads them without running any code.

        Args:
            path: the file; its folder exists.
            force: replace a file that exists.

        Raises:
            FileError: the file exists and ``force`` is not set, or it cannot be written.
        """
        content = {
            "config": self.config(),
            "layer_name": self.layer_name,
            "fingerprint": self.fingerprint,
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "history": self.history,
            "state": dict(self.state_dict()),
        }
        return save(path, _KIND, _VERSION, content, force=force)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ConceptAutoencoder:
        """What :meth:`save` wrote, on the CPU and in eval mode.

        Raises:
            FileError: there is no such file, or it is not one that :meth:`save` wrote.
        """
        content = load(path, _KIND, _VERSION)
        try:
            loaded = cls(**content["config"])
            loaded.load_state_dict(content["state"], assign=True)
            loaded.layer_name, loaded.fingerprint = content["layer_name"], content["fingerprint"]
            loaded.fidelity = None if content["fidelity"] is None else Fidelity(**content["fidelity"])
            loaded.history = content["history"]
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise damaged(path, "a file written by ConceptAutoencoder.save", error) from error
        return loaded.eval()


def check_sizes(channels: int, concepts: int, hidden: int | None, kernel_size: int) -> None:
    """That an autoencoder of these sizes can be built."""
    if channels < 2:
        raise ArgumentError(expected("channels", "2 or more", channels))
    if not 1 <= concepts < channels:
        hint = "A code as wide as the layer has nothing to compress."
        raise ArgumentError(expected("concepts", f"at least 1 and below channels = {channels}", concepts, hint))
    if hidden is not None and hidden < 1:
        raise ArgumentError(expected("hidden", "None or a positive number of channels", hidden))
    if kernel_size < 1 or kernel_size % 2 == 0:
        hint = "Only odd kernels keep the spatial size."
        raise ArgumentError(expected("kernel_size", "a positive odd number", kernel_size, hint))


def _convolution(before: int, after: int, size: int, draw: torch.Generator) -> nn.Conv2d:
    """A convolution that keeps the spatial size; its weights (He et al. 2015) come from a generator of its own."""
    layer = nn.Conv2d(before, after, size, padding=size // 2, device="meta").to_empty(device="cpu")
    gain = (2.0 / (1.0 + _SLOPE**2)) ** 0.5
    with torch.no_grad():
        layer.weight.normal_(0.0, gain / (before * size**2) ** 0.5, generator=draw)
        nn.init.zeros_(layer.get_parameter("bias"))
    return layer
