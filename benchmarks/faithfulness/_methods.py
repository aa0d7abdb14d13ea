"""The methods that are compared: ours as a user calls it, and the peers by Captum or by their papers' formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from captum.attr import IntegratedGradients, LayerGradCam, NoiseTunnel, Occlusion, Saliency
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.faithfulness._forward import Engine
from ce_plugin import CausalEffect
from ce_plugin.designs import RandomMask
from ce_plugin.interventions import PixelMask
from ce_plugin.randomness import generator

NORMALIZATION = (127.0, 128.0)
SIZE = 224
ROWS = 64


@dataclass(frozen=True)
class Scene:
    """One image to explain: (1, 3, 224, 224), its class index in the data set, the class that is explained."""

    x: Tensor
    ident: int
    target: int
    engine: Engine
    network: nn.Module
    kept: dict[str, Tensor] = field(default_factory=dict)


Method = Callable[..., Tensor]


def fill(x: Tensor, name: str) -> Tensor:
    """Black, the channels' mean, or the image blurred (25 pixels): PixelMask's fills."""
    filled: Tensor = PixelMask(name, normalization=NORMALIZATION)(x)
    return filled


def causal_effect(scene: Scene) -> Tensor:
    """Ours, with default settings; ids, so that no two images share their trials."""
    explainer = CausalEffect(scene.engine.logits, normalization=NORMALIZATION)
    found: Tensor = explainer.attribute(scene.x, ids=[scene.ident], perturbations_per_eval=ROWS)
    return found[0, 0]


def random_mask(scene: Scene) -> Tensor:
    """Ours with the paper's design: each patch masked with probability 0.1, adjusted estimator, default fills."""
    explainer = CausalEffect(
        scene.engine.logits,
        PixelMask(("zero", "mean", "blur"), normalization=NORMALIZATION),
        RandomMask(0.1, n_trials=399),
        normalization=NORMALIZATION,
    )
    found: Tensor = explainer.attribute(scene.x, ids=[scene.ident], perturbations_per_eval=ROWS)
    return found[0, 0]


def occlusion(scene: Scene, window: int, stride: int, baseline: str) -> Tensor:
    """Captum's Occlusion of the probability."""
    found: Tensor = Occlusion(scene.engine.probabilities).attribute(
        scene.x,
        (3, window, window),
        strides=(3, stride, stride),
        baselines=fill(scene.x, baseline),
        target=scene.target,
        perturbations_per_eval=ROWS,
    )
    return found[0, 0]


def finest_stride(window: int, passes: int = 399) -> int:
    """The smallest stride whose windows take at most so many passes."""
    return next(s for s in range(1, window + 1) if (-(-(SIZE - window) // s) + 1) ** 2 <= passes)


def probability(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network with a softmax."""

    def forward(images: Tensor) -> Tensor:
        return torch.softmax(network(images), dim=1)

    return forward


def integrated_gradients(scene: Scene, baseline: str, signed: bool) -> Tensor:
    """Captum's, 50 steps, of the probability; channels added."""
    if baseline not in scene.kept:  # the same for signed and absolute sums
        scene.kept[baseline] = IntegratedGradients(probability(scene.network)).attribute(
            scene.x, fill(scene.x, baseline), scene.target, n_steps=50, internal_batch_size=25
        )
    found = scene.kept[baseline].detach()[0]
    return found.sum(0) if signed else found.abs().sum(0)


def saliency(scene: Scene, output: str) -> Tensor:
    """Captum's: the absolute gradient, the greatest over channels."""
    forward = probability(scene.network) if output == "probability" else scene.network
    gradient: Tensor = Saliency(forward).attribute(scene.x.clone().requires_grad_(), scene.target)
    return gradient.detach()[0].amax(0)


def smooth_grad(scene: Scene, sigma: float) -> Tensor:
    """Captum's NoiseTunnel over Saliency of the logit, 50 samples."""
    torch.manual_seed(scene.ident)
    gradient: Tensor = NoiseTunnel(Saliency(scene.network)).attribute(
        scene.x.clone().requires_grad_(), nt_type="smoothgrad", nt_samples=50, nt_samples_batch_size=25, stdevs=sigma,
        target=scene.target,
    )  # fmt: skip
    return gradient.detach()[0].amax(0)


def grad_cam(scene: Scene, layer: str, output: str) -> Tensor:
    """Captum's LayerGradCam with ReLU, enlarged bilinearly."""
    forward = probability(scene.network) if output == "probability" else scene.network
    small = LayerGradCam(forward, _layer(scene.network, layer)).attribute(scene.x, scene.target, relu_attributions=True)
    return _enlarged(small.detach())


def ablation_cam(scene: Scene, output: str, relu: bool) -> Tensor:
    """Ramaswamy and Desai 2020: a channel's weight is the relative drop of the score when the channel is zero.

    The part of the network before the channels is run once: the numbers are those of a full pass for each channel.
    """
    network: Any = scene.network
    with torch.no_grad():
        planes = _features(network, scene.x)
        count = planes.shape[1]
        ablated = planes * (1 - torch.eye(count))[:, :, None, None]
        logits = torch.cat([_head(network, part) for part in (planes, *torch.split(ablated, 80))])
    scores = (logits.softmax(1) if output == "probability" else logits)[:, scene.target]
    weights = (scores[0] - scores[1:]) / scores[0]
    return _combined(planes, weights, relu)


def score_cam(scene: Scene, weights: str, relu: bool) -> Tensor:
    """Wang et al. 2020: a channel's weight is the score of the image multiplied by the channel, scaled to [0, 1]."""
    with torch.no_grad():
        planes = _features(scene.network, scene.x)
    masks = interpolate(planes, (SIZE, SIZE), mode="bilinear", align_corners=False)[0]
    low, high = masks.flatten(1).amin(1), masks.flatten(1).amax(1)
    masks = (masks - low[:, None, None]) / (high - low).clamp(min=1e-8)[:, None, None]
    if "score_cam" not in scene.kept:  # the same for all weights
        shown = [scene.engine.logits(scene.x * part[:, None]) for part in torch.split(masks, ROWS)]
        scene.kept["score_cam"] = torch.cat(shown)
    logits = scene.kept["score_cam"]
    channel = logits[:, scene.target].softmax(0) if weights == "softmax" else logits.softmax(1)[:, scene.target]
    return _combined(planes, channel, relu)


def rise(scene: Scene) -> Tensor:
    """Petsiuk et al. 2018: 399 soft masks from 7 x 7 grids, half of the cells shown, black where nothing is shown."""
    draw = generator(0, scene.ident, "rise")
    cells, cell = 7, SIZE // 7
    grids = (torch.rand(399, 1, cells, cells, generator=draw) < 0.5).float()
    shifts = torch.randint(cell, (399, 2), generator=draw).tolist()
    black, total = fill(scene.x, "zero"), torch.zeros(SIZE, SIZE)
    large = (cells + 1) * cell
    for start in range(0, 399, ROWS):
        some = interpolate(grids[start : start + ROWS], (large, large), mode="bilinear", align_corners=False)
        places = shifts[start : start + ROWS]
        masks = torch.stack([m[:, a : a + SIZE, b : b + SIZE] for m, (a, b) in zip(some, places, strict=True)])
        shown = scene.engine.probabilities(scene.x * masks + black * (1 - masks))[:, scene.target]
        total += (shown[:, None, None] * masks[:, 0]).sum(0)
    return total / (399 * 0.5)


def random(scene: Scene) -> Tensor:
    """A number per pixel."""
    return torch.rand(SIZE, SIZE, generator=generator(0, scene.ident, "random"))


def centre(scene: Scene) -> Tensor:
    """A Gaussian at the centre."""
    place = (torch.arange(SIZE) - (SIZE - 1) / 2) / (SIZE / 4)
    return torch.exp(-0.5 * (place[:, None] ** 2 + place**2))


# Each method with its passes (a backward pass counts two) and the settings that are tried on the choosing images.
METHODS: dict[str, tuple[Method, int, list[dict[str, Any]]]] = {
    "CausalEffect (default)": (causal_effect, 400, [{}]),
    "Occlusion": (
        occlusion,
        400,
        [
            {"window": w, "stride": finest_stride(w), "baseline": b}
            for w in (32, 48, 64, 72, 88, 104)
            for b in ("zero", "mean", "blur")
        ],
    ),
    "CausalEffect, RandomMask(0.1)": (random_mask, 400, [{}]),
    "RISE": (rise, 399, [{}]),
    "ScoreCAM": (
        score_cam,
        321,
        [{"weights": w, "relu": r} for w in ("softmax", "probability") for r in (True, False)],
    ),
    "AblationCAM": (
        ablation_cam,
        321,
        [{"output": o, "relu": r} for o in ("logit", "probability") for r in (True, False)],
    ),
    "Grad-CAM": (
        grad_cam,
        3,
        [
            {"layer": name, "output": o}
            for name in ("_conv_head", "_bn1", "_blocks[-1]")
            for o in ("logit", "probability")
        ],
    ),
    "IntegratedGradients": (
        integrated_gradients,
        150,
        [{"baseline": b, "signed": s} for b in ("zero", "mean") for s in (True, False)],
    ),
    "SmoothGrad": (smooth_grad, 150, [{"sigma": 0.1}, {"sigma": 0.3}, {"sigma": 0.6}]),
    "Saliency": (saliency, 3, [{"output": "logit"}, {"output": "probability"}]),
    "centre": (centre, 0, [{}]),
    "random": (random, 0, [{}]),
}


def passes_of(name: str, settings: dict[str, Any]) -> int:
    """Forward passes of one map; a backward pass counts two."""
    if name == "Occlusion":
        return int((-(-(SIZE - settings["window"]) // settings["stride"]) + 1) ** 2) + 1
    return METHODS[name][1]


def _combined(planes: Tensor, weights: Tensor, relu: bool) -> Tensor:
    """The weighted sum of the channels; these ones are not behind a ReLU themselves."""
    total = (weights[None, :, None, None] * planes).sum(1, keepdim=True)
    return _enlarged(total.relu() if relu else total)


def _enlarged(small: Tensor) -> Tensor:
    return interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]


def _layer(network: Any, name: str) -> nn.Module:
    found: nn.Module = network._blocks[-1] if name == "_blocks[-1]" else getattr(network, name)
    return found


def _features(network: Any, x: Tensor) -> Tensor:
    """The last block's planes, (1, 320, 7, 7)."""
    kept: list[Tensor] = []
    handle = network._blocks[-1].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        network(x)
    finally:
        handle.remove()
    return kept[0]


def _head(network: Any, planes: Tensor) -> Tensor:
    """From the last block's planes to the logits."""
    high = network._swish(network._bn1(network._conv_head(planes)))
    logits: Tensor = network._fc(network._avg_pooling(high).flatten(1))
    return logits
