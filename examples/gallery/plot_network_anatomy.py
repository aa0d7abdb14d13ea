"""
A network's anatomy, and its answers to whimsical questions
===========================================================

**What you will learn**

* where the parameters of VGG-16 are, counted and estimated from its architecture, beside two small networks;
* what a classifier answers to photographs, and to pictures that show nothing it knows: it always answers;
* which fifth of a network's channels could be zeroed without changing its answers, which no count tells.
"""

import copy
import os
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from captum.attr import LayerActivation, LayerGradientXActivation
from scipy.stats import binomtest, spearmanr
from torch import nn

from ce_plugin import LayerCausalEffect
from ce_plugin.datasets import data_folder, imagenet_samples, sample_photographs
from ce_plugin.models import efficientnet_lite0, load_mobilenet, load_model

full = os.environ.get("CE_PLUGIN_GALLERY") == "full"
network = efficientnet_lite0()
mobilenet = load_mobilenet(data_folder("mobilenet") / "mobilenet_v2_1.0_224_quant.npz")

# %%
# Where the parameters are
# ------------------------
# A convolution of k x k from C to D channels has k * k * C * D weights and D biases; a linear layer from C to D
# values has C * D weights and D biases. For VGG-16 that is an estimate from thirteen convolutions of 3 x 3 and
# three linear layers. The network itself is built without memory for its weights (PyTorch's "meta" device).
channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
linear = [512 * 7 * 7, 4096, 4096, 1000]
estimate = [9 * c * d + d for c, d in pairwise(channels)] + [c * d + d for c, d in pairwise(linear)]
with torch.device("meta"):
    vgg16 = load_model("torchvision:vgg16", weights=None)
counted = [
    sum(p.numel() for p in module.parameters())
    for module in vgg16.model.modules()
    if isinstance(module, nn.Conv2d | nn.Linear)
]
print(f"VGG-16: {sum(counted):,} parameters; the estimate is {sum(estimate):,}; layer by layer: {counted == estimate}")
print(f"in its three fully connected layers: {sum(counted[-3:]) / sum(counted):.0%}")

figure, axes = plt.subplots(1, 3, figsize=(12, 2.8))
for axis, net in zip(axes, (vgg16, network, mobilenet), strict=True):
    sizes = [sum(p.numel() for p in m.parameters(recurse=False)) for m in net.model.modules()]
    axis.bar(range(1, sum(s > 0 for s in sizes) + 1), [s / 1e6 for s in sizes if s], color="#666666")
    axis.set(title=f"{net.name[:24]}: {sum(sizes) / 1e6:.1f} million", xlabel="layer with parameters", ylabel="million")
figure.tight_layout()
plt.show()

# %%
# Right answers and whimsical questions
# -------------------------------------
# The output has 1000 values, one for each class, and softmax makes them add up to 1, whatever is shown. A file of
# VGG-16's weights in ``CE_PLUGIN_VGG16`` puts that network in EfficientNet-lite0's place here.
if os.environ.get("CE_PLUGIN_VGG16"):
    network = load_model("torchvision:vgg16", weights=os.environ["CE_PLUGIN_VGG16"])
daisy, palace = sample_photographs().values()
tiles = palace[:, :420, :].reshape(3, 6, 70, 8, 80).permute(1, 3, 0, 2, 4).flatten(0, 1)
order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))
jigsaw = tiles[order].reshape(6, 8, 3, 70, 80).permute(2, 0, 3, 1, 4).reshape(3, 420, 640)
noise = torch.randint(0, 256, (3, 256, 256), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
shown = {
    "daisy": daisy,
    "palace": palace,
    "upside down": daisy.flip(1),
    "negative": 255 - daisy,
    "jigsaw": jigsaw,
    "noise": noise,
}
x = network.inputs(list(shown.values()))
with torch.no_grad():
    top = network.model(x).softmax(1).topk(5)
figure, axes = plt.subplots(2, 3, figsize=(12, 7))
for i, (axis, name) in enumerate(zip(axes.flat, shown, strict=True)):
    axis.imshow(network.pictures(x)[i].permute(1, 2, 0))
    lines = [f"{p:.2f} {network.class_name(int(c))}" for p, c in zip(top.values[i], top.indices[i], strict=True)]
    axis.set_title(f"{name}: {lines[0]}", fontsize=9)
    axis.text(1.03, 0.5, "\n".join(lines), transform=axis.transAxes, va="center", fontsize=8)
    axis.set_axis_off()
figure.tight_layout()
plt.show()

# %%
# The question
# ------------
# Which *fifth of the channels* could be zeroed without changing the answers? Counting cannot say, nor can how
# active a channel is: what counts is what would change without it. The candidates are the channels inside the
# blocks, behind their depthwise convolutions. Each one's effect on the margin of the answer over the runner-up is
# estimated to first order, by a gradient, on some photographs; the fifth with the smallest is then zeroed *at
# once*, in all layers, and others answer anew. (Several effects need not add up: so the joint intervention is run.)
network = efficientnet_lite0()
samples = imagenet_samples(data_folder("imagenet-samples"))
chosen = range(4, len(samples), 9 if full else 75)
x, n = network.inputs([samples[k][0] for k in chosen]), 20 if full else 4  # the first n choose, the others answer
names = [f"_blocks.{k}._project_conv" for k in range(16)]
with torch.no_grad():
    answer = network.model(x).argmax(1)


def margin(images: torch.Tensor) -> torch.Tensor:
    """By how much the logit of the clean answer exceeds the next one, (N,)."""
    logits = network.model(images)
    rival = logits.scatter(1, answer[: len(images), None], -torch.inf).amax(1)
    return logits.gather(1, answer[: len(images), None])[:, 0] - rival


def answers_without(gone: torch.Tensor) -> torch.Tensor:
    """The answers of the others under do(channels = 0), in all blocks at once: zero weights behind each."""
    pruned = copy.deepcopy(network.model)
    with torch.no_grad():
        for name, channels in zip(names, gone.split(widths), strict=True):
            pruned.get_submodule(name).weight[:, channels] = 0
        return pruned(x[n:]).argmax(1)


scores: dict[str, list[torch.Tensor]] = {"effect, to first order": [], "mean activation": []}
for name in names:
    explainer = LayerGradientXActivation(margin, network.model.get_submodule(name))
    product = explainer.attribute(x[:n], attribute_to_layer_input=True).detach()
    scores["effect, to first order"].append(product.sum((2, 3)).abs().mean(0))
    activation = LayerActivation(network.model, network.model.get_submodule(name))
    scores["mean activation"].append(activation.attribute(x[:n], attribute_to_layer_input=True).mean((0, 2, 3)))
widths = [len(one) for one in scores["mean activation"]]
ranked = {name: torch.cat(parts) for name, parts in scores.items()}
ranked["random"] = torch.rand(sum(widths), generator=torch.Generator().manual_seed(0))

for share in (0.1, 0.2, 0.4):
    for name, values in ranked.items():
        gone = torch.zeros(sum(widths), dtype=torch.bool)
        gone[values.argsort()[: round(share * sum(widths))]] = True
        same = int((answers_without(gone) == answer[n:]).sum())
        low, high = binomtest(same, len(x) - n).proportion_ci(method="wilson")
        print(
            f"{share:.0%} of {sum(widths)} channels zeroed, the smallest by {name}: "
            f"{same} of {len(x) - n} answers unchanged (95 % interval {low:.2f} to {high:.2f})"
        )

# %%
# A first-order effect is not an effect. How well it orders the channels of one layer is seen from the effects
# themselves, each channel of the last block set to zero and the network run on from there:
explainer = LayerCausalEffect(network.model, names[-1], outcome="margin")
exact = explainer.estimate(x[:n], target=answer[:n], attribute_to_layer_input=True)
rho = spearmanr(exact.effect.flatten(1).abs().mean(0), scores["effect, to first order"][-1]).statistic
print(f"rank correlation of exact and first-order effects over the {widths[-1]} channels of the last block: {rho:.2f}")

# %%
# References
# ----------
# * Simonyan and Zisserman 2015: Very deep convolutional networks (arXiv 1409.1556). Tan and Le 2019: EfficientNet
#   (arXiv 1905.11946). Sandler et al. 2018: MobileNetV2 (arXiv 1801.04381).
# * Molchanov et al. 2017: Pruning convolutional neural networks for resource efficient inference (arXiv
#   1611.06440), the first-order effect of a channel as a criterion.
# * Photographs: ``imagenet-samples``, and two that come with scikit-learn. With the whole of ImageNet's validation
#   set, read by ``torchvision.datasets.ImageNet``, the intervals would be narrower.
