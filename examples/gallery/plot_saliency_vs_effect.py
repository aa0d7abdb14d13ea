"""
Saliency and its kin against effects
====================================

**What you will learn**

* gradient, SmoothGrad and Grad-CAM beside the causal effect of each region (CE) and the causal effect map of the
  last layer (CEM), for two networks, on photographs that they get right and wrong;
* how to find by a number where the pictures agree and where they do not, instead of choosing what looks good;
* why a gradient can be exactly zero where an effect is not (saturation).

A gradient says what an *infinitely small* change of a pixel would do. An effect says what happens when the pixel,
or a region, *is set* to something else. For a linear model the two are one; networks are not linear.
"""

import os

import torch
from captum.attr import LayerActivation, LayerGradientXActivation
from scipy.stats import spearmanr
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.datasets import data_folder, imagenet_samples
from ce_plugin.evaluation import METHODS, Scene
from ce_plugin.interventions import PixelMask
from ce_plugin.models import efficientnet_lite0, load_mobilenet
from ce_plugin.visualization import overlay, sheet

full = os.environ.get("CE_PLUGIN_GALLERY") == "full"
passes, wanted, looked_at = (200, 3, 40) if full else (24, 1, 8)
mobilenet = load_mobilenet(data_folder("mobilenet") / "mobilenet_v2_1.0_224_quant.npz")
networks = [efficientnet_lite0(), mobilenet][: 2 if full else 1]
photographs = imagenet_samples(data_folder("imagenet-samples"))
samples = photographs.subset(range(9, len(photographs), len(photographs) // looked_at))

# %%
# Photographs that a network gets right and wrong
# -----------------------------------------------
# Of every so-manyth photograph of the data set, the first ones that each network names rightly and wrongly.
# What is explained is the network's own answer, whether it is right or not.
scenes = []
for network in networks:
    x = network.inputs([picture for picture, _ in samples])
    with torch.no_grad():
        answers = torch.cat([network.model(part).argmax(1) for part in x.split(20)])
    right = answers == samples.labels
    print(f"{network.name}: {int(right.sum())} of {len(samples)} photographs right")
    for k in [*right.nonzero().flatten()[:wanted].tolist(), *(~right).nonzero().flatten()[:wanted].tolist()]:
        scene = Scene(x[k : k + 1], int(answers[k]), network.model, network.normalization, ident=k)
        scenes.append((network, scene, int(samples.labels[k])))

# %%
# Five maps of each
# -----------------
# CE sets regions to black, the mean colour and a blur in turn; CEM sets each channel of the last layer to
# zero. The number in a title is the map's rank correlation with CE over the 14 x 14 patches: +1 is the same
# order.
methods = {"gradient": "saliency", "Grad-CAM": "grad-cam", "CEM": "causal-effect-map", "CE": "causal-effect"}
if full:
    methods = {"SmoothGrad": "smoothgrad", **methods}  # which takes 150 passes


def patches(values: torch.Tensor) -> torch.Tensor:
    """The mean over each of 14 x 14 patches of a map."""
    return adaptive_avg_pool2d(values[None], 14).flatten()


results = []
for network, scene, label in scenes:
    maps = {name: METHODS[method](scene, passes) for name, method in methods.items()}
    agreement = {name: spearmanr(patches(m), patches(maps["CE"])).statistic for name, m in maps.items()}
    results.append((agreement["gradient"], network, scene, label, maps, agreement))
results.sort(key=lambda result: -result[0])

rows = []
for _, network, scene, label, maps, agreement in results:
    picture, answer = network.pictures(scene.x)[0], network.class_name(scene.target)
    title = answer if scene.target == label else f"{answer}? no, {network.class_name(label)}"
    row = [(f"{name} ({agreement[name]:+.2f})", overlay(values, picture)) for name, values in maps.items()]
    rows.append([(title, picture), *row])
sheet(rows, width=200)

# %%
# Rows are in the order of how well the gradient agrees with the effects: the consistent cases first, the
# inconsistent ones last. A low number does not say which of the two is wrong about the network. The
# question at the end does.
for name in methods:
    values = torch.tensor([result[-1][name] for result in results])
    print(f"{name} with CE: mean {values.mean():+.2f}, from {values.min():+.2f} to {values.max():+.2f}")

# %%
# A gradient of exactly zero
# --------------------------
# ReLU6 lets nothing above 6 through. Where a unit is above, its gradient is exactly zero: a little more or
# less changes nothing. Setting it to zero does. All units of the first layer that are above 6 are set at
# once here.
network, scene = scenes[0][:2]
layer = network.model.get_submodule("_bn0")
value = LayerActivation(network.model, layer).attribute(scene.x)
product = LayerGradientXActivation(scene.probability, layer).attribute(scene.x, scene.target)
above = value > 6
effect = LayerCausalEffect(network.model, layer).estimate(scene.x, target=scene.target, layer_mask=above.long())
largest = (product / value)[above].abs().max()
print(f"{int(above.sum())} of {above.numel()} units are above 6; the largest gradient there: {largest}")
print(f"effect of setting them to zero: {effect.effect[0, 1, 0]:+.3f} on a probability of {effect.reference[0, 0]:.3f}")

# %%
# The question
# ------------
# What would have become of the answer *without the tenth of the photograph that a map calls most
# important*? Each map names its 20 patches; they are set to a blur, together, and the probability of the
# answer is measured. The map that found what the network depends on loses most. All maps are asked in the
# same way, also CE, which was made with trials of other regions, and the random map, which shows what any
# tenth is worth.
lost = {name: [] for name in [*methods, "random"]}
for _, network, scene, _, maps, _ in results:
    explainer = CausalEffect(network.model, PixelMask("blur", normalization=network.normalization))
    for name, values in {**maps, "random": METHODS["random"](scene)}.items():
        top = patches(values).argsort(descending=True)[:20]
        region = torch.zeros(196).index_fill(0, top, 1).reshape(1, 1, 14, 14)
        mask = interpolate(region, scene.size).long()
        effect = explainer.estimate(scene.x, target=scene.target, feature_mask=mask).effect
        lost[name].append(float(effect[0, 1, 0]))
for name, values in lost.items():
    print(f"without what {name} calls important: {100 * sum(values) / len(values):+.0f} points on average")

# %%
# On the two photographs of the small mode CE's patches were worth 39 points, those of the gradient 35, of
# Grad-CAM and CEM 26, any tenth 12: two photographs are an anecdote. ``ce-plugin compare`` asks the same of
# hundreds, with intervals.

# %%
# References
# ----------
# * Simonyan, Vedaldi, Zisserman 2014: Deep inside convolutional networks (arXiv 1312.6034), the gradient.
# * Smilkov et al. 2017: SmoothGrad (arXiv 1706.03825). Selvaraju et al. 2017: Grad-CAM (arXiv 1610.02391).
# * Sundararajan, Taly, Yan 2017: Axiomatic attribution for deep networks (arXiv 1703.01365), on saturation.
# * Yang et al. 2019: When causal intervention meets adversarial examples and image masking for deep neural
#   networks (arXiv 1902.03380), CE and CEM.
