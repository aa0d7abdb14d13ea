"""
Class visualisation: what does a network want to see?
=====================================================

**What you will learn**

* how an image is made from a class, by gradient ascent on the class's score, and what regularisation, blur and jitter
  do to it;
* that such an image convinces the network it was made for, and hardly ever another one;
* how to use it as an intervention, do(class = c), and ask which of its parts convince.
"""

import os

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import ArtistAnimation

from ce_plugin import CausalEffect
from ce_plugin.datasets import data_folder, imagenet_samples
from ce_plugin.designs import OneAtATime
from ce_plugin.interventions import ClassVisualization
from ce_plugin.models import efficientnet_lite0, load_mobilenet
from ce_plugin.visualization import overlay, sheet

full = os.environ.get("CE_PLUGIN_GALLERY") == "full"
steps = 120 if full else 20
networks = [efficientnet_lite0(), load_mobilenet(data_folder("mobilenet") / "mobilenet_v2_1.0_224_quant.npz")]
photographs = imagenet_samples(data_folder("imagenet-samples"))
rapeseed, flamingo = photographs.labels.tolist().index(984), 130
photograph, _ = photographs[rapeseed]


def make(k: int, start: str, **settings: float) -> ClassVisualization:
    """do(class = flamingo) for one of the networks."""
    options = {"steps": steps, "start": start, "normalization": networks[k].normalization, **settings}
    return ClassVisualization(networks[k].model, flamingo, clip_values=(0, 255), **options)


def seen(pictures: torch.Tensor) -> list[float]:
    """The probability of a flamingo that each network gives to a picture (3, H, W) in [0, 1]."""
    with torch.no_grad():
        given = [network.model(network.normalization.to_model(255 * pictures[None])) for network in networks]
    return [float(logits.softmax(1)[0, flamingo]) for logits in given]


# %%
# Regularisation, blur, jitter
# ----------------------------
# All start from the same noise. Without anything that holds it back, the ascent ends in a fine pattern; a
# title gives the probability of a flamingo by EfficientNet-lite0, for which it was made, and by MobileNet
# v2, which has never met it.
plain = {"l2": 0.0, "blur_every": 0, "jitter": 0}
settings = {
    "nothing": plain,
    "L2": {**plain, "l2": 20.0},
    "blur": {**plain, "blur_every": 4},
    "jitter": {**plain, "jitter": 16},
    "all three": {"l2": 5.0, "blur_every": 4, "jitter": 16},
    "all, twice the rate": {"l2": 5.0, "blur_every": 4, "jitter": 16, "lr": 5.1},
    "all, a quarter of the steps": {"l2": 5.0, "blur_every": 4, "jitter": 16, "steps": steps // 4},
}
names = list(settings) if full else ["nothing", "all three"]
noise, row = networks[0].inputs([photograph]), []
for name in names:
    picture = networks[0].pictures(make(0, "noise", **settings[name])(noise))[0]
    own, other = seen(picture)
    print(f"{name}: a flamingo to {networks[0].name} with probability {own:.3f}, to {networks[1].name} {other:.3f}")
    row.append((f"{name}: {own:.2f}, {other:.2f}", picture))
sheet([row], width=220)

# %%
# From a photograph, for two networks
# -----------------------------------
# The same ascent from a photograph of something else, in steps of one grey level and with nothing but
# jitter to hold it back. What the network asks for is little beside what the photograph shows, and not a
# flamingo to the eye.
gentle = {"l2": 0.0, "blur_every": 0, "jitter": 4, "lr": 1.0}
row, made = [("the photograph", networks[0].pictures(networks[0].inputs([photograph]))[0])], {}
for k, network in enumerate(networks[: 2 if full else 1]):
    made[k] = make(k, "input", **gentle)(network.inputs([photograph]))
    picture = network.pictures(made[k])[0]
    told = ", ".join(f"{p:.2f}" for p in seen(picture))
    change = 255 * (picture - network.pictures(network.inputs([photograph]))[0]).square().mean().sqrt()
    print(f"made for {network.name}: a flamingo to the two with {told}; changed by {change:.1f} grey levels (rms)")
    row.append((f"for {network.name[:18]}: {told}", picture))
sheet([row], width=260)

# %%
# How it comes about, from noise:
frames = make(0, "noise", **settings["all three"]).frames(noise, every=steps // 10)
figure, axes = plt.subplots(figsize=(3, 3), layout="tight")
axes.set_axis_off()
artists = [[axes.imshow(networks[0].pictures(frame)[0].permute(1, 2, 0))] for frame in frames]
animation = ArtistAnimation(figure, artists, interval=250)
plt.show()

# %%
# The question
# ------------
# The image of the class is a value that a photograph *could have had*. So which of its parts convince? Each
# of 7 x 7 patches of the photograph is set to the synthesised one, by itself: the effect on the log-odds of
# a flamingo. Then the most effective patches are set together. How many does the network need, and does the
# other network follow?
network = networks[0]
x = network.inputs([photograph])
explainer = CausalEffect(network.model, make(0, "input", **gentle), OneAtATime(), outcome="log_odds")
estimate = explainer.estimate(x, target=flamingo, sliding_window_shapes=(3, 32, 32), strides=(3, 32, 32))
effect = estimate.effect[0, :, 0]
for count in (1, 3, 5, 10, 20, 49):
    mask = torch.zeros(49).index_fill(0, effect.argsort(descending=True)[:count], 1).reshape(7, 7)
    mask = mask.repeat_interleave(32, 0).repeat_interleave(32, 1).bool()
    own, other = seen(network.pictures(torch.where(mask, made[0], x))[0])
    print(f"the {count} most effective patches: {network.name} {own:.3f}, {networks[1].name} {other:.3f}")
effects = effect.reshape(1, 7, 7).repeat_interleave(32, 1).repeat_interleave(32, 2)
overlay(effects, network.pictures(x)[0], title="effect of each patch of do(class = flamingo)")

# %%
# In the small mode 20 of the 49 patches were enough for a probability of 0.94, half as many for 0.01: the
# network adds up many small hints. MobileNet v2 stayed at 0.00 throughout, so that what convinces is the
# one network's, not the class's.

# %%
# References
# ----------
# * Erhan et al. 2009: Visualizing higher-layer features of a deep network (activation maximisation).
# * Simonyan, Vedaldi, Zisserman 2014 (arXiv 1312.6034); Yosinski et al. 2015 (arXiv 1506.06579), the blur;
#   Mordvintsev, Olah, Tyka 2015: Inceptionism, the jitter.
# * Ilyas et al. 2019: Adversarial examples are not bugs, they are features (arXiv 1905.02175), on what
#   transfers.
