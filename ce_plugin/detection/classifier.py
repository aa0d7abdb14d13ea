"""The classifier that a detector protects: one network from images in image units to logits, and its fingerprint."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ce_plugin.errors import InputError, ModelError, check_range, expected
from ce_plugin.interventions import Normalization
from ce_plugin.interventions.base import NormalizationLike
from ce_plugin.networks.forward import is_art_classifier, unwrap
from ce_plugin.networks.guard import state_guard
from ce_plugin.networks.layers import find_layer, fingerprint
from ce_plugin.randomness import generator


class ClassifierWrapper(nn.Module):
    """A classifier: images in image units to logits (N, K).

    Args:
        classifier: an ART ``PyTorchClassifier`` (its preprocessing and clip values are used) or a network.
        clip_values: least and greatest value of an image; None takes the classifier's, or (0, 1).
        normalization: what is done to an image before the network, where the network does not do it itself.

    Attributes:
        network: the user's network, with ART's preprocessing where there is any.
        clip_values: (low, high), in image units.

    Raises:
        ModelError: neither a network nor an ART classifier in PyTorch.
        ArgumentError: an empty range of values.

    Example:
        >>> classifier = ClassifierWrapper(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        >>> classifier(torch.zeros(2, 1, 2, 2)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        classifier: object,
        clip_values: tuple[float, float] | None = None,
        normalization: NormalizationLike = None,
    ) -> None:
        super().__init__()
        network, own = unwrap(classifier) if is_art_classifier(classifier) else (classifier, None)
        if not isinstance(network, nn.Module):
            hint = "Pass the network itself; a function can be wrapped into a module."
            got = type(classifier).__name__
            raise ModelError(expected("classifier", "an nn.Module or an ART PyTorchClassifier", got, hint))
        low, high = check_range("clip_values", clip_values if clip_values is not None else own or (0.0, 1.0))
        self.network = network
        # Where layers' names are looked up: without the wrapper that ART's preprocessing needs.
        inner = network.model if network is not classifier else network
        self._named: tuple[nn.Module] = (inner if isinstance(inner, nn.Module) else network,)
        self.clip_values = (float(low), float(high))
        self.normalization = Normalization.of(normalization)

    @property
    def like(self) -> Tensor:
        """A tensor of the network's device and dtype."""
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.zeros(())

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images in image units."""
        logits = self.network(self.normalization.to_model(images))
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            hint = "Wrap the network so that it returns the logits of its classes."
            raise ModelError(expected("classifier", "a network with logits (N, K), K >= 2", got, hint))
        return logits

    def guarded(self) -> state_guard:
        """Eval mode inside; the network and the random state as they were afterwards."""
        return state_guard(networks=[self.network])

    def images(self, x: object, shape: tuple[int, ...] | None = None) -> Tensor:
        """The user's images as a tensor of the network's device and dtype, checked.

        Args:
            x: an array, also one that is reversed, read-only or of the other byte order, as files have them; or a
                tensor.
            shape: of an image, (C, H, W), where that is known.

        Raises:
            InputError: not images (N, C, H, W), none, not finite, of another shape, or outside the clip values.
        """
        if not isinstance(x, (np.ndarray, Tensor)) or x.ndim != 4 or not len(x):
            got = f"shape {tuple(x.shape)}" if isinstance(x, (np.ndarray, Tensor)) else type(x).__name__
            raise InputError(expected("x", "images (N, C, H, W), N >= 1, as an array or a tensor", got))
        # Tensors that are made in inference mode cannot have a gradient later on.
        with torch.inference_mode(False):
            if isinstance(x, np.ndarray):
                native = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
                x = torch.from_numpy(native if native.flags.writeable else native.copy())
            images = x.clone() if x.is_inference() else x.detach()
            if not images.is_floating_point():
                hint = f"Convert it to float32 in image units {self.clip_values}."
                raise InputError(expected("x", "of floating point", str(images.dtype).removeprefix("torch."), hint))
            low, high = self.clip_values
            least, greatest = float(images.min()), float(images.max())
            if not (least >= low - 1e-6 and greatest <= high + 1e-6):
                hint = "Pass images in image units (normalization= says what the network wants), or other clip_values=."
                got = f"values from {least:g} to {greatest:g}"
                raise InputError(expected("x", f"finite and inside the clip values [{low:g}, {high:g}]", got, hint))
            if shape is not None and tuple(images.shape[1:]) != shape:
                raise InputError(expected("x", f"images of shape {shape}", f"shape {tuple(images.shape[1:])}"))
            return images.to(self.like)

    def predict(self, images: Tensor, batch_size: int) -> Tensor:
        """Predicted classes of images, (N,); the network and the random state stay as they are."""
        with self.guarded():
            return self.logits(images, batch_size).argmax(1)

    def logits(self, images: Tensor, batch_size: int) -> Tensor:
        """Logits (N, K) of any number of images, without gradients."""
        with torch.no_grad():
            return torch.cat(list(map(self, torch.split(images, batch_size))))

    def fingerprint(self) -> str:
        """A hash of the network's parameters and buffers."""
        return fingerprint(self.network, exact=True)

    def version(self) -> tuple[tuple[int, ...], ...]:
        """Identity and version counter of each tensor: cheap to read, unlike the fingerprint.

        Changes that bypass autograd, through ``parameter.data``, do not show.
        """
        values = self.network.state_dict(keep_vars=True).values()
        return tuple([(id(value), value._version, value.data_ptr()) for value in values])

    def test_logits(self, shape: tuple[int, ...]) -> Tensor:
        """Logits (1, K) of one fixed image of a shape (C, H, W), float32, on the CPU: other units, other logits."""
        low, high = self.clip_values
        noise = torch.rand((1, *shape), generator=generator(0, "probe")) * (high - low) + low
        with self.guarded(), torch.no_grad():
            logits: Tensor = self(noise.to(self.like))
        return logits.float().cpu()

    def module(self, layer: str) -> nn.Module:
        """The network's submodule of a dotted name.

        Raises:
            UnknownNameError: there is none.
        """
        return find_layer(self._named[0], layer)[1]
