"""
Activation maps: is the strongest channel the one that matters?
===============================================================

**What you will learn**

* what the channels of the first layers of a network respond to, drawn for every channel;
* how to measure what each of them *does* for the answer: set it to another value and let the network go on from there;
* that the two are different questions, and by how much.

An activation map shows where a channel is active. It does not show whether anything behind it listens. Here
each map has its channel's effect beside it: the change of the answer's probability if that channel alone is set
to zero.
"""

import os

import matplotlib.pyplot as plt
from captum.attr import LayerActivation
from scipy.stats import spearmanr

from ce_plugin import LayerCausalEffect
from ce_plugin.datasets import data_folder, imagenet_samples
from ce_plugin.interventions import MeanOut
from ce_plugin.models import efficientnet_lite0
from ce_plugin.visualization import sheet

full = os.environ.get("CE_PLUGIN_GALLERY") == "full"
network = efficientnet_lite0()
photographs = imagenet_samples(data_folder("imagenet-samples"))
chosen = [photographs.labels.tolist().index(c) for c in (1, 31, 88, 340, 919)[: 5 if full else 2]]
x = network.inputs([photographs[k][0] for k in chosen])

# %%
# Every channel of the first layers
# ---------------------------------
# The layers are taken behind their activation, as the input of what comes next: 32 channels of 112 x 112
# behind the first convolution, then (in the full mode) the 96 channels of the second block. Channels are
# drawn in the order of their effects, the one that supports the answer most first; a map's title is its
# channel's number and effect, in points of probability.
layers = {"first convolution": "_blocks.0._depthwise_conv", "second block": "_blocks.1._depthwise_conv"}
maps, estimates = {}, {}
for name, layer in list(layers.items())[: 2 if full else 1]:
    module = network.model.get_submodule(layer)
    maps[name] = LayerActivation(network.model, module).attribute(x, attribute_to_layer_input=True).detach()
    estimates[name] = LayerCausalEffect(network.model, layer).estimate(x, attribute_to_layer_input=True)

answer, rows = estimates["first convolution"].predicted, []
for name, estimate in estimates.items():
    for i, picture in enumerate(network.pictures(x)):
        effect = estimate.effect[i, :, answer[i]]
        tiles = [(f"{k}: {100 * effect[k]:+.1f}", maps[name][i, k, None] / 6) for k in effect.argsort().tolist()]
        tiles = [(f"{network.class_name(int(answer[i]))} {estimate.reference[i, answer[i]]:.2f}", picture), *tiles]
        rows += [(tiles + [("", picture.new_ones(1, 1, 1))] * 11)[k : k + 11] for k in range(0, len(tiles), 11)]
sheet(rows, width=110)

# %%
# Strong is not causal
# --------------------
# How strongly a channel responds is its mean activation. Were that what matters, the order of the channels
# by strength would be their order by the size of their effect: a rank correlation of 1. Points far to the
# right and at the bottom are the strong maps that hardly anything depends on.
every = range(len(x))
figure, axes = plt.subplots(1, len(estimates), figsize=(5.5 * len(estimates), 4), squeeze=False)
for axis, (name, estimate) in zip(axes[0], estimates.items(), strict=True):
    strength, size = maps[name].mean((2, 3)), estimate.effect[every, :, answer].abs()
    for i in every:
        rho = spearmanr(strength[i], size[i]).statistic
        same = int(strength[i].argmax()) == int(size[i].argmax())
        label = f"{network.class_name(int(answer[i]))}: {rho:+.2f}"
        print(f"{name}, rank correlation for {label}; is the strongest the most causal? {same}")
        axis.scatter(strength[i], 100 * size[i], s=14, label=label)
    axis.set(xlabel="mean activation", ylabel="size of the effect (points)", title=name)
    axis.legend(fontsize=7, title="rank correlation", title_fontsize=7)
plt.show()

# %%
# Zero is one intervention among others
# -------------------------------------
# A channel that is always active, as one that sees brightness, is at zero far from anything the network
# knows; its *mean* over other photographs removes only what it says about this one. The effects change with
# the intervention, and so does the order: an effect always answers "compared to what?".
layer = layers["first convolution"]
mean = LayerCausalEffect(network.model, layer, MeanOut(x)).estimate(x, attribute_to_layer_input=True, target=answer)
for i in every:
    zero = estimates["first convolution"].effect[i, :, answer[i]]
    rho = spearmanr(zero.abs(), mean.effect[i, :, 0].abs()).statistic
    print(f"{network.class_name(int(answer[i]))}: order under zero against order under the mean: {rho:+.2f}")

# %%
# The question
# ------------
# Which single channel decides: for which would the network have given *another answer*, had it been silent?
# No map of activations can say. The effects on all 1000 classes do, because the effect added to the
# reference is the output under the intervention.
for name, estimate in estimates.items():
    # The answer under do(channel = 0), (images, channels).
    under = (estimate.reference[:, None] + estimate.effect).argmax(2)
    for i in every:
        other = (under[i] != answer[i]).nonzero().flatten().tolist()
        told = ", ".join(f"{k} ({network.class_name(int(under[i, k]))})" for k in other) or "none"
        print(f"{name}, {network.class_name(int(answer[i]))}: the answer hangs on channel {told}")

# %%
# In the small mode (a goldfish, a tree frog) the rank correlations were +0.33 and +0.62, the strongest map
# was in neither case the most causal one, and the two interventions agreed to +0.78 and +0.66 on the order.

# %%
# References
# ----------
# * Zeiler and Fergus 2014: Visualizing and understanding convolutional networks (arXiv 1311.2901).
# * Yang et al. 2019: When causal intervention meets adversarial examples and image masking for deep neural
#   networks (arXiv 1902.03380), the intervention Z0.
# * Tan and Le 2019: EfficientNet (arXiv 1905.11946). The photographs are those of ``imagenet-samples``; the
#   full data set is ImageNet, which ``torchvision.datasets.ImageNet`` reads.
