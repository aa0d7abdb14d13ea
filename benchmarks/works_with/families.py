"""Classification networks of timm, torchvision and transformers: which route do they take, and is it exact?

The smallest network of each family, with random weights: effects of channels of a layer at 60 % of the depth, and of
windows of the input, by the engine's own choice of route against ``engine="full"``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.works_with.verdicts import Verdict, judged
from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.effects import Estimate
from ce_plugin.interventions import PixelMask
from ce_plugin.sites import LayerSite

CHANNELS, CELLS, CLASSES, DEPTH = 12, 6, 10, 0.6

# The smallest of each family in timm, and the side of its images where 64 will not do.
TIMM = {
    "beit_base_patch16_224": 64, "botnet26t_256": 256, "halonet26t": 256, "lambda_resnet26t": 256, "mobileone_s1": 64,
    "repvgg_a0": 64, "gernet_s": 64, "resnet32ts": 64,
    "cait_xxs24_224": 64, "coat_tiny": 64, "convit_tiny": 64, "convmixer_768_32": 64,
    "crossvit_tiny_240": 240, "darknet17": 64, "cspresnet50": 64, "davit_tiny": 64, "deit_tiny_patch16_224": 64,
    "densenet121": 64, "dla46x_c": 64, "dpn48b": 64, "edgenext_xx_small": 64, "efficientformer_l1": 224,
    "efficientformerv2_s0": 224, "mnasnet_small": 64, "efficientvit_b0": 64, "efficientvit_m0": 224,
    "eva02_tiny_patch14_224": 224, "fasternet_t0": 64, "fastvit_t8": 64, "focalnet_tiny_srf": 64,
    "gcvit_xxtiny": 224, "ghostnet_050": 64, "hardcorenas_b": 64, "hgnetv2_b0": 64, "hiera_tiny_224": 224,
    "hrnet_w18_small": 64, "inception_next_atto": 64, "inception_resnet_v2": 96, "inception_v4": 96, "levit_128s": 64,
    "mambaout_femto": 64, "maxvit_pico_rw_256": 64, "coatnet_pico_rw_224": 64, "poolformer_s12": 64,
    "caformer_s18": 64, "mixer_s32_224": 64, "gmlp_ti16_224": 64, "resmlp_12_224": 64, "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small_050": 64, "mobilevit_xxs": 64, "mvitv2_tiny": 224, "nest_tiny": 224, "nextvit_small": 64,
    "nf_regnet_b0": 64, "pit_ti_224": 224, "pvt_v2_b0": 64, "rdnet_tiny": 64, "regnetx_002": 64,
    "repghostnet_050": 64, "repvit_m0_9": 64, "resnest14d": 64, "resnet10t": 64, "rexnet_100": 64,
    "selecsls42": 64, "legacy_seresnet18": 64, "sequencer2d_s": 64, "shvit_s1": 64, "skresnet18": 64,
    "starnet_s050": 64, "swiftformer_xs": 64, "swin_tiny_patch4_window7_224": 64, "swinv2_tiny_window8_256": 64,
    "tiny_vit_5m_224": 224, "tnt_s_patch16_224": 64, "tresnet_m": 64,
    "twins_svt_small": 224, "vgg11": 64, "visformer_tiny": 224, "vit_tiny_patch16_224": 64,
    "vit_tiny_r_s16_p8_224": 224, "vit_relpos_small_patch16_224": 64, "vitamin_small_224": 64, "volo_d1_224": 64,
    "ese_vovnet19b_slim_dw": 64, "legacy_xception": 96, "xception41": 64, "xcit_nano_12_p16_224": 64,
    "cpubone_nano": 64, "csatv2": 64, "cspnext_tiny": 64, "iformer_t": 64, "lcnetv2_small": 64, "lowformer_b0": 64,
    "efficientvim_m1": 64, "res2next50": 64, "convnext_zepto_rms": 64, "resnetv2_18": 64, "swinv2_cr_tiny_224": 64,
}  # fmt: skip
TORCHVISION = {
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 128,
    "googlenet": 64, "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11": 64, "vit_b_16": 64, "wide_resnet50_2": 64,
}  # fmt: skip

_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_SIZES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_STAGES = {**_SIZES, "embedding_size": 8}
_WINDOWS = {"embed_dim": 16, "depths": [1, 2, 2], "num_heads": [2, 2, 2], "window_size": 4}
# Families of transformers, made tiny, and the side of their images where 64 will not do.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Beit": _TINY, "Bit": {**_STAGES, "num_groups": 8},
    "ConvNext": _SIZES, "ConvNextV2": _SIZES, "DeiT": _TINY, "Data2VecVision": _TINY,
    "Dinov2": {**_TINY, "mlp_ratio": 2},
    "FocalNet": {"embed_dim": 16, "depths": [1, 1, 2, 1]}, "IJepa": _TINY,
    "Levit": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]},
    "MobileNetV1": {"depth_multiplier": 0.25},
    "MobileNetV2": {"depth_multiplier": 0.35}, "MobileViT": {"hidden_sizes": [24, 32, 40]}, "PoolFormer": _SIZES,
    "PvtV2": {}, "RegNet": {**_STAGES, "groups_width": 8}, "ResNet": _STAGES,
    "Segformer": {"hidden_sizes": [8, 16, 40, 64]}, "SwiftFormer": {}, "Swin": _WINDOWS, "Swinv2": _WINDOWS,
    "ViT": _TINY, "ViTMSN": _TINY,
}  # fmt: skip


def families() -> list[str]:
    """All networks, as ``library.name``."""
    return [
        *(f"timm.{name}" for name in TIMM),
        *(f"torchvision.{name}" for name in TORCHVISION),
        *(f"transformers.{name}" for name in TRANSFORMERS),
    ]


def network(family: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and one image for it; the same at each call."""
    library, name = family.split(".", 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if library == "timm":
            side = TIMM[name]
            net = _of_timm(name, side)
        elif library == "torchvision":
            side = TORCHVISION[name]
            net = _of_torchvision(name, side)
        else:
            side = 224 if name == "Levit" else 64
            net = _of_transformers(name, side)
        _vary(net)
        _estimate_statistics(net, side)
        image = torch.rand(1, 3, side, side) * 2 - 1
    return net, image


def _of_timm(name: str, side: int) -> nn.Module:
    import timm

    try:
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, img_size=side)
    except TypeError:  # a network for images of any size takes no such argument
        net = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return net.eval()


def _of_torchvision(name: str, side: int) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {"num_classes": CLASSES}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": True}
    if name.startswith("vit"):
        options |= {"image_size": side}
    net: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return net.eval()


def _of_transformers(name: str, side: int) -> nn.Module:
    import transformers

    options = TRANSFORMERS[name]
    if "hidden_size" in options or "embed_dim" in options or name == "Levit":
        options = {"image_size": side, **options}
    if "hidden_size" in options:
        options = {"patch_size": 8, **options}
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    net: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return net.eval()


@torch.no_grad()
def _vary(net: nn.Module) -> None:
    """Weights whose signals neither vanish nor grow; values for scales and biases that start at one small number.

    As they are initialised, many networks hardly depend on what is inside them: the last layer, or what is added to a
    by-pass, is next to zero.
    """
    for parameter in net.parameters():
        flat = parameter.flatten()
        if parameter.dim() > 1:
            parameter.copy_(torch.randn_like(parameter) * (len(parameter) / parameter.numel()) ** 0.5)
        elif bool((flat == flat[0]).all()) and float(flat[0].abs()) < 0.5:
            parameter.add_(torch.randn_like(parameter) * 0.1)


@torch.no_grad()
def _estimate_statistics(net: nn.Module, side: int) -> None:
    """Batch-norm statistics of random images."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    net(torch.rand(4, 3, side, side) * 2 - 1)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def layer_at(net: nn.Module, image: Tensor, depth: float = DEPTH) -> LayerSite:
    """The last module that returns maps or tokens before a share ``depth`` of all modules has returned."""
    names = {module: name for name, module in net.named_modules() if name}
    returned: list[tuple[nn.Module, object]] = []
    handles = [m.register_forward_hook(lambda m, _, output: returned.append((m, output))) for m in names]
    try:
        with torch.inference_mode():
            net(image)
    finally:
        for handle in handles:
            handle.remove()
    order = [module for module, _ in returned]
    for module, value in reversed(returned[: int(len(returned) * depth)]):
        dim = _channel_dim(value)
        if dim is not None and order.count(module) == 1:
            return LayerSite(names[module], reshape_transform=partial(some_channels, dim=dim))
    raise ValueError("no module returns maps or tokens")


def _channel_dim(value: object) -> int | None:
    """Where a layer's value has its channels; None where it is no map or sequence of tokens of one image."""
    if not isinstance(value, Tensor) or len(value) != 1:
        return None
    if value.dim() == 3:
        return 2 if value.shape[1] > 1 else None
    if value.dim() != 4 or min(value.shape) == max(value.shape):
        return None
    # Images are square, and so are their maps.
    if value.shape[2] == value.shape[3] > 1:
        return 1
    return 3 if value.shape[1] == value.shape[2] > 1 else None


def some_channels(value: Tensor, dim: int, count: int = CHANNELS) -> Tensor:
    """A few channels of a layer's value, spread over all of them, as maps."""
    channels = value.movedim(dim, 1)
    chosen = torch.linspace(0, channels.shape[1] - 1, min(count, channels.shape[1])).round().long()
    maps = channels[:, chosen]
    return maps if maps.dim() == 4 else maps[..., None]


def at_layer(net: nn.Module, image: Tensor) -> Verdict:
    """Some channels of a layer in the middle."""
    site = layer_at(net, image)

    def estimate(engine: str) -> Estimate:
        found: Estimate = LayerCausalEffect(net, site, outcome=None, engine=engine, **_options(net)).estimate(image)
        return found

    return judged(str(site.layer), estimate)


def at_input(net: nn.Module, image: Tensor) -> Verdict:
    """The cells of a grid over the image."""
    index = torch.arange(image.shape[-1]) * CELLS // image.shape[-1]
    mask = (index[:, None] * CELLS + index)[None, None]

    def estimate(engine: str) -> Estimate:
        explainer = CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=None, engine=engine, **_options(net))
        found: Estimate = explainer.estimate(image, feature_mask=mask)
        return found

    return judged("input", estimate, "suffix")


def _options(net: nn.Module) -> dict[str, Any]:
    return {"output": "logits"} if type(net).__module__.startswith("transformers.") else {}
