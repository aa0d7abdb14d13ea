"""Use your own network in the report: write a factory and name it on the command line.

    ce-plugin explain photo.jpg --model own_network:scenes --attack pgd

(in the folder of this file; the network below is untrained, so its predictions are meaningless).
"""

import torch
from torch import nn

from ce_plugin.interventions import Normalization
from ce_plugin.models import Framing, VisionModel


def scenes() -> VisionModel:
    """A small untrained network with everything that a report needs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))
    return VisionModel(
        model,
        name="scenes",
        framing=Framing(112, resize=128),
        normalization=Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        class_names=("coast", "forest", "street"),
    )


if __name__ == "__main__":
    from ce_plugin.datasets import sample_photographs
    from ce_plugin.report import Plan, study

    network = scenes()
    x = network.inputs([sample_photographs()["china.jpg"]])
    for case in study(network, x, "china.jpg", Plan(attacks=("pgd",))).cases:
        answers = ", ".join(f"{answer.name} {answer.probability:.2f}" for answer in case.top)
        print(f"{case.name}: {answers}; {case.maps[0].n_outlined} significant patches")
