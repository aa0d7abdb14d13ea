"""Maps of several classes of one image, by the methods that the pointing game compares.

Every function takes the network, a fast version of it for passes without gradients, one image (1, 3, S, S) and the
classes of its cells, and returns a map for each class (K, h, w) and a contrastive one: that of the class's logit minus
the mean logit of the other classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ce_plugin import CausalEffectMap

Logits = Callable[[Tensor], Tensor]
Maps = dict[str, Tensor]
ROWS = 16
# Name of the layer -> (module, whether its input is meant).
LAYERS = {"head": ("_avg_pooling", True), "block": ("_blocks.15", False)}


def passes(model: nn.Module, engine: str, size: int) -> Logits:
    """Logits of any number of images (N, 3, size, size), in chunks: by torch, or by OpenVINO in float32 or bfloat16."""
    if engine == "torch":

        def by_torch(images: Tensor) -> Tensor:
            with torch.inference_mode():
                chunks = torch.split(images.to(memory_format=torch.channels_last), ROWS)
                return torch.cat([model(chunk) for chunk in chunks]).clone()

        return by_torch
    openvino: Any = importlib.import_module("openvino")
    shape = [ROWS, 3, size, size]
    converted = openvino.convert_model(model, example_input=torch.zeros(shape), input=shape)
    precision = {"INFERENCE_PRECISION_HINT": engine.removeprefix("openvino-")}
    compiled = openvino.Core().compile_model(converted, "CPU", precision)

    def by_openvino(images: Tensor) -> Tensor:
        found = []
        for chunk in torch.split(images, ROWS):
            rows = chunk.contiguous().numpy()
            full = np.concatenate([rows, np.zeros((ROWS - len(rows), *rows.shape[1:]), np.float32)])
            found.append(torch.from_numpy(compiled([full])[0][: len(rows)].copy()))
        return torch.cat(found)

    return by_openvino


def causal_effect_map(
    model: nn.Module, logits: Logits, x: Tensor, classes: list[int], layer: str, weighting: str, outcome: str
) -> Maps:
    """Ours."""
    name, at_input = LAYERS[layer]
    explainer = CausalEffectMap(model, name, weighting=weighting, outcome=outcome)  # type: ignore[arg-type]
    maps = explainer.maps(x, attribute_to_layer_input=at_input)[0]
    return linear(maps[classes])


def grad_cam(model: nn.Module, logits: Logits, x: Tensor, classes: list[int], layer: str) -> Maps:
    """Captum's, without the ReLU, which the pointing game applies to all maps after enlarging them."""
    name, at_input = LAYERS[layer]

    def forward(images: Tensor) -> Tensor:
        own = model(images)[:, classes]
        return torch.cat([own, contrasts(own)], 1)

    explainer = LayerGradCam(forward, model.get_submodule(name))
    found = [explainer.attribute(x, k, attribute_to_layer_input=at_input)[0, 0] for k in range(2 * len(classes))]
    maps = torch.stack(found).detach()
    return {"plain": maps[: len(classes)], "contrastive": maps[len(classes) :]}


def ablation_cam(
    model: nn.Module, logits: Logits, x: Tensor, classes: list[int], layer: str, absolute: bool = False
) -> Maps:
    """Ramaswamy and Desai 2020: a channel's weight is the relative drop of the score when it is zero.

    A negative score inverts the map; ``absolute`` divides by the absolute score instead. The part of the network
    before the channels is run once: the numbers are those of a full pass for each channel.
    """
    planes, tail = cut(model, x, layer)
    with torch.inference_mode():
        own = tail(planes)[:, classes]
        rows = []
        for units in torch.split(torch.arange(planes.shape[1]), 64):
            ablated = planes.repeat(len(units), 1, 1, 1)
            ablated[torch.arange(len(units)), units] = 0
            rows.append(tail(ablated)[:, classes])
        ablated_scores = torch.cat(rows)
        forms = {"plain": (own, ablated_scores), "contrastive": (contrasts(own), contrasts(ablated_scores))}
        return {
            name: torch.einsum("uk,uhw->khw", (score - below) / (score.abs() if absolute else score), planes[0]).clone()
            for name, (score, below) in forms.items()
        }


def score_cam(model: nn.Module, logits: Logits, x: Tensor, classes: list[int], layer: str) -> Maps:
    """Wang et al. 2020: a channel's weight is the softmax over channels of the score of the masked image."""
    planes, _ = cut(model, x, layer)
    scores = []
    for some in torch.split(planes[0], 4 * ROWS):
        masks = interpolate(some[:, None], tuple(x.shape[2:]), mode="bilinear", align_corners=True)
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        scores.append(logits(x * (masks - low) / (high - low + 1e-8))[:, classes])
    own = torch.cat(scores)
    return {
        name: torch.einsum("uk,uhw->khw", score.softmax(0), planes[0])
        for name, score in (("plain", own), ("contrastive", contrasts(own)))
    }


def occlusion(
    model: nn.Module, logits: Logits, x: Tensor, classes: list[int], window: int, stride: int, fill: float
) -> Maps:
    """Zeiler and Fergus 2014 with overlapping windows: the mean drop over the windows that cover a pixel, as Captum's.

    Captum's own runs one class at a time; the numbers are the same (see the check).
    """
    size = x.shape[-1]
    steps = range(-(-(size - window) // stride) + 1)
    places = [
        (slice(i * stride, i * stride + window), slice(j * stride, j * stride + window)) for i in steps for j in steps
    ]
    own = logits(x)[:, classes]
    total, count = torch.zeros(len(classes), size, size), torch.zeros(size, size)
    for start in range(0, len(places), ROWS):
        some = places[start : start + ROWS]
        pictures = x.repeat(len(some), 1, 1, 1)
        for row, (i, j) in enumerate(some):
            pictures[row, :, i, j] = fill
        for (i, j), fall in zip(some, own - logits(pictures)[:, classes], strict=True):
            total[:, i, j] += fall[:, None, None]
            count[i, j] += 1
    return linear(total / count.clamp(min=1))


def contrasts(scores: Tensor) -> Tensor:
    """Each score minus the mean of the others, along dimension 1."""
    return scores - (scores.sum(1, keepdim=True) - scores) / (scores.shape[1] - 1)


def linear(maps: Tensor) -> Maps:
    """Plain and contrastive maps of a method whose maps are linear in the score."""
    return {"plain": maps, "contrastive": contrasts(maps.transpose(0, 1)).transpose(0, 1)}


def cut(model: Any, x: Tensor, layer: str) -> tuple[Tensor, Logits]:
    """The maps of a layer and the part of the network after them."""
    with torch.inference_mode():
        planes = model.extract_features(x)
        if layer == "block":
            planes = _block(model, x)

    def tail(planes: Tensor) -> Tensor:
        if layer == "block":
            planes = model._swish(model._bn1(model._conv_head(planes)))
        found: Tensor = model._fc(model._avg_pooling(planes).flatten(1))
        return found

    return planes.clone(), tail


def _block(model: Any, x: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = model._blocks[-1].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        model(x)
    finally:
        handle.remove()
    return kept[0]


METHODS: dict[str, Callable[..., Maps]] = {
    "CEM": causal_effect_map,
    "Grad-CAM": grad_cam,
    "AblationCAM": ablation_cam,
    "ScoreCAM": score_cam,
    "Occlusion": occlusion,
}
