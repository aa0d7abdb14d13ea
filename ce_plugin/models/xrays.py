"""Networks for chest X-rays: CheXNet, and a small one for pneumonia. Not for clinical use."""

from __future__ import annotations

import re
from os import PathLike

from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, expected
from ce_plugin.interventions.base import Normalization
from ce_plugin.models.vision import Framing, VisionModel, load_state, read_weights, with_weights
from ce_plugin.networks.guard import state_guard

_FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
# torchvision's names until 2018: "denselayer1.norm.1" is "denselayer1.norm1" today.
_OLD = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)")


class PneumoniaCNN(nn.Module):
    """Three times a convolution of 3 x 3, ReLU and max pooling, and two linear layers with one output: pneumonia.

    Example:
        >>> import torch
        >>> PneumoniaCNN()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1, self.pool1 = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.relu2, self.pool2 = nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.conv3, self.relu3, self.pool3 = nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.fc1, self.relu4, self.fc2 = nn.Linear(2304, 128), nn.ReLU(), nn.Linear(128, 1)

    def forward(self, images: Tensor) -> Tensor:
        """X-rays (N, 3, 64, 64), values in [0, 1], to the logit (N, 1) of pneumonia."""
        x = self.pool1(self.relu1(self.conv1(images)))
        x = self.pool3(self.relu3(self.conv3(self.pool2(self.relu2(self.conv2(x))))))
        logit: Tensor = self.fc2(self.relu4(self.fc1(x.flatten(1))))
        return logit


def pneumonia_cnn(weights: str | PathLike[str] | None = None) -> VisionModel:
    """The small network for pneumonia in X-rays of children, with its preparation of pictures: 64 x 64, values 0 to 1.

    Its one output is a logit: take ``outcome="sigmoid"``.

    Raises:
        FileError, ModelError: as :func:`~ce_plugin.models.load_weights`.

    Example:
        >>> pneumonia_cnn().class_names
        ('pneumonia',)
    """
    return VisionModel(
        with_weights(PneumoniaCNN, weights),
        name=f"pneumonia CNN{'' if weights is not None else ' (untrained)'}",
        framing=Framing(64, interpolation="bicubic"),
        class_names=("pneumonia",),
    )


def chexnet(weights: str | PathLike[str] | None = None, class_names: tuple[str, ...] = _FINDINGS) -> VisionModel:
    """CheXNet: DenseNet-121 with a logit for each finding; take ``outcome="sigmoid"``.

    Args:
        weights: a checkpoint of this network, also with the names of older versions of torchvision and those that
            DataParallel and the well-known public code add (``module.densenet121.``, ``classifier.0``); read without
            running code from it. None: untrained, weights by a fixed seed.
        class_names: of the outputs; NIH's fourteen findings.

    Raises:
        ArgumentError: no class names.
        FileError, ModelError: as :func:`~ce_plugin.models.load_weights`.

    Example:
        >>> chexnet(class_names=("pneumonia",)).model.classifier.out_features
        1

    Source: Rajpurkar et al. 2017 (arXiv 1711.05225).
    """
    from torchvision.models import densenet121

    if not class_names:
        raise ArgumentError(expected("class_names", "one for each output", class_names))
    with state_guard(seed=0):
        model = densenet121(weights=None, num_classes=len(class_names))
    if weights is not None:
        load_state(model, {_today(name): value for name, value in read_weights(weights).items()})
    return VisionModel(
        model.eval(),
        name=f"CheXNet{'' if weights is not None else ' (untrained)'}",
        framing=Framing(224, resize=256),
        normalization=Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        class_names=tuple(class_names),
    )


def _today(name: str) -> str:
    """A parameter's name in torchvision's DenseNet of today."""
    own = name.removeprefix("module.").removeprefix("densenet121.").removeprefix("module.")
    return _OLD.sub(r"\1\2", own).replace("classifier.0.", "classifier.")
