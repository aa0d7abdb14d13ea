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
from itertools import product as product_of

import matplotlib.pyplot as plt
import torch
from captum.attr import LayerActivation, LayerGradientXActivation
from scipy.stats import binomtest, spearmanr
from torch import nn

from ce_plugin import LayerCausalEffect
from ce_plugin.datasets import data_folder, imagenet_samples, sample_photographs
from ce_plugin.effects import resolve_outcome
from ce_plugin.models import efficientnet_lite0, load_mobilenet, load_model
from ce_plugin.visualization import sheet

full = os.environ.get("CE_PLUGIN_GALLERY") == "full"
network = efficientnet_lite0()
mobilenet = load_mobilenet(data_folder("mobilenet") / "mobilenet_v2_1.0_224_quant.npz")

# %%
# Where the parameters are
# ------------------------
# A convolution of k x k from C to D channels has k * k * C * D weights and D biases; a linear layer from C
# to D values has C * D weights and D biases. For VGG-16 that is an estimate from thirteen convolutions of 3
# x 3 and three linear layers. The network itself is built without memory for its weights (PyTorch's "meta"
# device).
channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
linear = [512 * 7 * 7, 4096, 4096, 1000]
estimate = [9 * c * d + d for c, d in pairwise(channels)] + [c * d + d for c, d in pairwise(linear)]
with torch.device("meta"):
    vgg16 = load_model("torchvision:vgg16", weights=None)
layers = [module for module in vgg16.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
counted = [sum(p.numel() for p in layer.parameters()) for layer in layers]
print(f"VGG-16: {sum(counted):,} parameters; the estimate is {sum(estimate):,}; layer by layer: {counted == estimate}")
print(f"in its three fully connected layers: {sum(counted[-3:]) / sum(counted):.0%}")

figure, axes = plt.subplots(1, 3, figsize=(12, 2.8), layout="constrained")
nets = {"VGG-16": vgg16, "EfficientNet-lite0": network, "MobileNet v2": mobilenet}
for axis, (name, net) in zip(axes, nets.items(), strict=True):
    sizes = [size for m in net.model.modules() if (size := sum(p.numel() for p in m.parameters(recurse=False)))]
    axis.bar(range(1, len(sizes) + 1), [size / 1e6 for size in sizes], color="#666666")
    axis.set(title=f"{name}: {sum(sizes) / 1e6:.1f} million", xlabel="layer with parameters", ylabel="million")
plt.show()

# %%
# Right answers and whimsical questions
# -------------------------------------
# The output has 1000 values, one for each class, and softmax makes them add up to 1, whatever is shown. A
# file of VGG-16's weights in ``CE_PLUGIN_VGG16`` puts that network in EfficientNet-lite0's place here.
if os.environ.get("CE_PLUGIN_VGG16"):
    network = load_model("torchvision:vgg16", weights=os.environ["CE_PLUGIN_VGG16"])
daisy, palace = sample_photographs().values()
mixed = torch.cat([palace[..., 320:], palace[..., :320]], 2)[:, torch.arange(427).roll(213)]
noise = torch.randint(256, daisy.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
x = network.inputs([daisy, palace, daisy.flip(1), 255 - daisy, mixed, noise])
with torch.no_grad():
    top = network.model(x).softmax(1).topk(5)
answers = [
    [f"{100 * p:.0f} % {network.class_name(int(c))}" for p, c in zip(*one, strict=True)]
    for one in zip(top.values, top.indices, strict=True)
]
for name, one in zip(("daisy", "palace", "upside down", "negative", "quarters swapped", "noise"), answers, strict=True):
    print(f"{name:16}", "; ".join(one))
pictures = [(one[0], picture) for one, picture in zip(answers, network.pictures(x), strict=True)]
sheet([pictures[:3], pictures[3:]])

# %%
# The question
# ------------
# Which *fifth of the channels* could be zeroed without changing the answers? Counting cannot say, nor can
# how active a channel is: what counts is what would change without it. The candidates are the channels
# inside the blocks, behind their depthwise convolutions. Each one's effect on the margin of the answer over
# the runner-up is estimated to first order, by a gradient, on some photographs; the fifth with the smallest
# is then zeroed *at once*, in all layers, and others answer anew. (Several effects need not add up: so the
# joint intervention is run.)
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
    return resolve_outcome("margin")(logits, logits).gather(1, answer[: len(images), None])[:, 0]


def answers_without(gone: torch.Tensor) -> torch.Tensor:
    """The answers of the others under do(channels = 0), in all blocks at once: zero weights behind each."""
    pruned = copy.deepcopy(network.model)
    with torch.no_grad():
        for name, channels in zip(names, gone.split(widths), strict=True):
            pruned.get_submodule(name).weight[:, channels] = 0
        return pruned(x[n:]).argmax(1)


scores = {"effect, to first order": [], "mean activation": []}
for layer in map(network.model.get_submodule, names):
    product = LayerGradientXActivation(margin, layer).attribute(x[:n], attribute_to_layer_input=True)
    activation = LayerActivation(network.model, layer).attribute(x[:n], attribute_to_layer_input=True)
    scores["effect, to first order"].append(product.detach().sum((2, 3)).abs().mean(0))
    scores["mean activation"].append(activation.mean((0, 2, 3)))
widths = [len(one) for one in scores["mean activation"]]
ranked = {name: torch.cat(parts) for name, parts in scores.items()}
ranked["random number"] = torch.rand(sum(widths), generator=torch.Generator().manual_seed(0))

print(f"answers of {len(x) - n} photographs left unchanged by zeroing channels out of {sum(widths)}, 95 % intervals")
for share, (name, values) in product_of((0.1, 0.2, 0.4), ranked.items()):
    gone = torch.zeros(sum(widths), dtype=torch.bool)
    gone[values.argsort()[: round(share * sum(widths))]] = True
    same = int((answers_without(gone) == answer[n:]).sum())
    low, high = binomtest(same, len(x) - n).proportion_ci(method="wilson")
    print(f"  {share:.0%} with the smallest {name}: {same / (len(x) - n):.0%} ({low:.0%} to {high:.0%})")

# %%
# On the eight photographs of the small mode the first two rankings cannot be told apart, while a tenth
# drawn at random changed every answer; and no ranking left all answers as they were. The question has an
# answer, "most of them, if the fifth is well chosen", and it took the intervention to find it.
#
# A first-order effect is not an effect. How well it orders the channels of a layer is seen from the effects
# themselves: each channel of the first block set to zero, with the whole network behind it.
explainer = LayerCausalEffect(network.model, names[0], outcome="margin")
exact = explainer.estimate(x[:n], target=answer[:n], attribute_to_layer_input=True)
rho = spearmanr(exact.effect[:, :, 0].abs().mean(0), scores["effect, to first order"][0]).statistic
print(f"rank correlation of exact and first-order effects over the {widths[0]} channels of the first block: {rho:.2f}")

# %%
# References
# ----------
# * Simonyan and Zisserman 2015: Very deep convolutional networks (arXiv 1409.1556). Tan and Le 2019:
#   EfficientNet (arXiv 1905.11946). Sandler et al. 2018: MobileNetV2 (arXiv 1801.04381).
# * Molchanov et al. 2017: Pruning convolutional neural networks for resource efficient inference (arXiv
#   1611.06440), the first-order effect of a channel as a criterion.
# * Photographs: ``imagenet-samples``, and two that come with scikit-learn. With the whole of ImageNet's
#   validation set, read by ``torchvision.datasets.ImageNet``, the intervals would be narrower.
