"""MobileNets (versions 1 and 2) with the weights of TensorFlow's 8-bit files, as modules with named blocks."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, FileError, expected
from ce_plugin.files import existing_file
from ce_plugin.interventions.base import Normalization
from ce_plugin.models.imagenet import imagenet_classes
from ce_plugin.models.vision import Framing, VisionModel

_IMAGENET = 1000


class ConvUnit(nn.Sequential):
    """Padding as TensorFlow's "SAME", convolution with the batch norm folded in, and ReLU6 where there is one.

    TensorFlow pads as little as possible, and more at the right and bottom than at the left and top: a stride of 2 on
    an even side pads these alone.

    Args:
        weight: (O, I, k, k); of a depthwise convolution (C, 1, k, k).
        bias: (O,).
        stride: of the convolution.
        groups: 1, or C for a depthwise convolution.
        act: whether ReLU6 follows.

    Example:
        >>> ConvUnit(torch.ones(2, 3, 3, 3), torch.zeros(2), stride=2)(torch.ones(1, 3, 4, 4))[0, 0]
        tensor([[6., 6.],
                [6., 6.]], grad_fn=<SelectBackward0>)
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        size = weight.shape[-1]
        even = stride == 2 and size > 1
        if even:
            self.pad = nn.ZeroPad2d(((size - 2) // 2, (size - 1) // 2) * 2)
        own = nn.Conv2d(
            weight.shape[1] * groups,
            len(weight),
            size,
            stride,
            padding=0 if even else size // 2,
            groups=groups,
            device="meta",
        )
        own.weight, own.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.conv = own
        if act:
            self.act = nn.ReLU6()


class Block(nn.Module):
    """A depthwise separable convolution; in version 2 expanded before, and added to its input where shapes agree.

    Args:
        expand: 1 x 1 with ReLU6, or None.
        depthwise: 3 x 3 with ReLU6.
        project: 1 x 1; linear in version 2, with ReLU6 in version 1.
        residual: whether the input is added.

    Source: Howard et al. 2017 (arXiv 1704.04861); Sandler et al. 2018 (arXiv 1801.04381).
    """

    def __init__(self, expand: ConvUnit | None, depthwise: ConvUnit, project: ConvUnit, residual: bool) -> None:
        super().__init__()
        self.expand = expand if expand is not None else nn.Identity()
        self.depthwise, self.project, self.residual = depthwise, project, residual

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, h, w) to (N, C', h', w')."""
        out: Tensor = self.project(self.depthwise(self.expand(features)))
        return features + out if self.residual else out


class MobileNet(nn.Module):
    """A MobileNet: ``stem``, ``blocks.0`` ..., ``head`` (version 2), pooling and ``classifier``.

    Args:
        stem: the first convolution.
        blocks: in order.
        head: the convolution before the pooling; None in version 1.
        classifier: from the pooled features to logits.

    Example:
        >>> def unit(out: int, of: int, size: int, groups: int = 1) -> ConvUnit:
        ...     return ConvUnit(torch.ones(out, of, size, size), torch.zeros(out), groups=groups)
        >>> block = Block(None, unit(4, 1, 3, groups=4), unit(8, 4, 1), residual=False)
        >>> net = MobileNet(unit(4, 3, 3), [block], None, nn.Linear(8, 10))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: Howard et al. 2017 (arXiv 1704.04861); Sandler et al. 2018 (arXiv 1801.04381).
    """

    def __init__(self, stem: ConvUnit, blocks: list[Block], head: ConvUnit | None, classifier: nn.Linear) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.head = head if head is not None else nn.Identity()
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), classifier

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), sides that are multiples of 32, in model units, to logits (N, classes)."""
        logits: Tensor = self.classifier(self.pool(self.head(self.blocks(self.stem(images)))).flatten(1))
        return logits


def load_mobilenet(
    file: str | PathLike[str], *, size: int = 224, background: int = 0, class_names: Sequence[str] | None = None
) -> VisionModel:
    """A MobileNet from a file of 8-bit weights, with its preparation of photographs.

    The file is an npz archive: for each convolution k its integer weights minus the zero point (``w00`` ...), their
    scale (``s00`` ..., one number or one a channel), the bias with the batch norm folded in (``b00`` ...), and the list
    of operations (``graph``, JSON). Arithmetic is in float32; activations are not quantised.

    Args:
        file: ends in ``.npz``.
        size: side of the input, in pixels.
        background: which of the file's outputs stands for "nothing"; it is dropped. TensorFlow's ImageNet networks have
            it first (0), its networks for plants and animals last (-1).
        class_names: one for each output that is left; None takes ImageNet's where there are 1000.

    Returns:
        The network in eval mode, in channels-last layout. Pixels are 0 to 255 in image units, (v - 128) / 128 in model
        units; photographs are resized to 8/7 of the size and cropped.

    Raises:
        FileError: the file is missing, damaged or holds something else.
        ArgumentError: a number of names that is not the number of outputs, or no such background.

    Example:
        >>> load_mobilenet("missing.npz")
        Traceback (most recent call last):
        ce_plugin.errors.FileError: Expected argument `file` to be an existing .npz file, but got 'missing.npz'.
    """
    path = Path(file)
    if not path.is_file():
        raise FileError(expected("file", "an existing .npz file", repr(str(file))))
    try:
        with np.load(path, allow_pickle=False) as archive:
            layers = _layers(archive)
        model = _network(layers, background)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise FileError(expected("file", "a MobileNet's weights", f"{str(file)!r} ({error})")) from error
    outputs = model.classifier.out_features
    if class_names is None and outputs == _IMAGENET:
        class_names = imagenet_classes()
    if class_names is not None and len(class_names) != outputs:
        raise ArgumentError(expected("class_names", f"{outputs} names, one for each output", len(class_names)))
    return VisionModel(
        model.eval().to(memory_format=torch.channels_last),
        name=path.stem,
        framing=Framing(size, resize=size * 8 // 7, interpolation="bilinear"),
        normalization=Normalization(128.0, 128.0),
        value_range=(0.0, 255.0),
        class_names=None if class_names is None else tuple(class_names),
    )


def load_bird_mobilenet(folder: str | PathLike[str]) -> VisionModel:
    """The MobileNet v2 for 964 species of birds, with their names: ``Haemorhous cassinii (Cassin's Finch)`` ...

    Args:
        folder: holds ``mobilenet_v2_1.0_224_inat_bird_quant.npz`` and ``inat_bird_labels.txt``, whose last line is
            the background.

    Raises:
        FileError: a file is missing or damaged.
        ArgumentError: a number of names that is not the number of outputs.

    Example:
        >>> load_bird_mobilenet("no/such/folder")
        Traceback (most recent call last):
        ce_plugin.errors.FileError: Expected argument `folder` to be one with inat_bird_labels.txt, but got ...
    """
    names = existing_file(Path(folder) / "inat_bird_labels.txt", "folder", "one with inat_bird_labels.txt")
    lines = names.read_text(encoding="utf-8", errors="replace").splitlines()
    file = Path(folder) / "mobilenet_v2_1.0_224_inat_bird_quant.npz"
    return load_mobilenet(file, background=-1, class_names=lines[:-1])


# Kind ("conv", "dw", "add" or "gap"), weight, bias, stride, and whether ReLU6 follows.
_Layer = tuple[str, Tensor, Tensor, int, bool]


def _layers(archive: Any) -> list[_Layer]:
    """The operations of a file in order, with their weights in float32."""
    found: list[_Layer] = []
    for entry in json.loads(archive["graph"].tobytes()):
        kind = str(entry["op"])
        weight = bias = torch.empty(0)
        if kind in ("conv", "dw"):
            k = f"{int(entry['k']):02d}"
            scale = archive["s" + k].astype(np.float32).reshape(-1, 1, 1, 1)
            weight = torch.from_numpy(archive["w" + k].astype(np.float32) * scale)
            bias = torch.from_numpy(archive["b" + k].astype(np.float32))
        if kind in ("conv", "dw", "add", "gap"):
            found.append((kind, weight, bias, int(entry.get("stride", 1)), entry.get("act") == "relu6"))
    return found


def _network(layers: list[_Layer], background: int) -> MobileNet:
    """The modules of a list of operations: stem, blocks around the depthwise convolutions, head, classifier."""
    kinds = [layer[0] for layer in layers]
    pooling = kinds.index("gap")
    stem, blocks, position = _unit(layers[0]), [], 1
    while "dw" in kinds[position:pooling]:
        expand = None
        if kinds[position] == "conv":
            expand, position = _unit(layers[position]), position + 1
        depthwise, project = _unit(layers[position]), _unit(layers[position + 1])
        position += 2
        residual = kinds[position] == "add"
        blocks.append(Block(expand, depthwise, project, residual))
        position += residual
    head = _unit(layers[position]) if position < pooling else None
    _, weight, bias, _, _ = layers[pooling + 1]
    outputs = len(bias)
    if not -outputs <= background < outputs:
        raise ArgumentError(expected("background", f"one of {outputs} outputs", background))
    kept = [k for k in range(outputs) if k != background % outputs]
    classifier = nn.Linear(weight.shape[1], len(kept), device="meta")
    classifier.weight, classifier.bias = nn.Parameter(weight[kept].flatten(1)), nn.Parameter(bias[kept])
    return MobileNet(stem, blocks, head, classifier)


def _unit(layer: _Layer) -> ConvUnit:
    kind, weight, bias, stride, act = layer
    return ConvUnit(weight, bias, stride=stride, groups=len(weight) if kind == "dw" else 1, act=act)
