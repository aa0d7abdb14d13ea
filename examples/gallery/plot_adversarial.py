"""
Adversarial examples, and the smallest part of one that still fools
===================================================================

**What you will learn**

* how a photograph is given any class one likes, and how little has to change for it;
* FGSM, BIM, PGD, JSMA, a one-pixel attack and a patch beside each other, on a plain network and on one that was trained
  against attacks;
* which pixels of a perturbation do the work, found by their effects, and through which channels it travels.
"""

import os
import warnings

import torch
from art.attacks.evasion import PixelAttack
from art.estimators.classification import PyTorchClassifier
from torch import nn

from ce_plugin import CausalEffect, CausalMediation
from ce_plugin.datasets import cifar10_sheets, data_folder, imagenet_samples
from ce_plugin.designs import OneAtATime
from ce_plugin.errors import NoChangeWarning
from ce_plugin.interventions import Adversarial
from ce_plugin.models import cifar_resnet, efficientnet_lite0, load_robust
from ce_plugin.visualization import magnify, sheet

# An attack on one pixel that fails returns the picture as it was.
warnings.filterwarnings("ignore", category=NoChangeWarning)
full = os.environ.get("CE_PLUGIN_GALLERY") == "full"
plain = cifar_resnet(20, data_folder("cifar10") / "nets" / "resnet20.pt")
robust = load_robust(data_folder("robust-nets") / "cifar_cnn_a_adv4.npz")
pictures, labels = cifar10_sheets(data_folder("cifar10"))

# %%
# Any class one likes
# -------------------
# Gradient ascent on the score of a class, in 20 steps, each value kept within 4 of 255 grey levels of the
# photograph's.
network = efficientnet_lite0()
photographs = imagenet_samples(data_folder("imagenet-samples"))
x = network.inputs([photographs[photographs.labels.tolist().index(340)][0]])
options = {"clip_values": (0, 255), "normalization": network.normalization}
attack = Adversarial.bim(network.model, eps=4, max_iter=20, targeted_class=network.class_index("teapot"), **options)
pair = torch.cat([x, attack(x)])
names = [f"{network.class_name(int(c))} {p:.2f}" for p, c in zip(*network.model(pair).softmax(1).max(1), strict=True)]
before, after = network.pictures(pair)
magnified, factor = magnify(after - before)
print(f"before: {names[0]}; after: {names[1]}; the perturbation is shown {factor:.0f} times as large")
sheet([[(names[0], before), (f"perturbation x {factor:.0f}", magnified), (names[1], after)]], width=260)

# %%
# Six attacks on two networks
# ---------------------------
# FGSM, BIM and PGD change every value by at most 4 of 255; JSMA takes few values and changes them by much;
# the one-pixel attack (full mode only) searches by differential evolution, without gradients; the patch is
# PGD that may do what it wants in 8 x 8 pixels, and nothing elsewhere. Only pictures that a network gets
# right are attacked.
corner = torch.zeros(1, 32, 32)
corner[:, :8, :8] = 1


def one_pixel(net: nn.Module, normalization: tuple[float, ...]) -> Adversarial:
    """ART's PixelAttack on the probabilities of a network."""
    settings = {"input_shape": (3, 32, 32), "nb_classes": 10, "loss": None, "clip_values": (0.0, 1.0)}
    model = PyTorchClassifier(nn.Sequential(net, nn.Softmax(1)), preprocessing=normalization, **settings)
    attack = PixelAttack(model, th=1, es=1, max_iter=30, verbose=False)
    return Adversarial(attack, normalization=normalization, probabilities=True)


found = {}
for net in (plain, robust):
    x = net.normalization.to_model(pictures[: 80 if full else 24])
    found[net.name, "all"] = x = x[net.model(x).argmax(1) == labels[: len(x)]]
    x = x[: 10 if full else 2]
    options = {"normalization": net.normalization, "clip_values": (0.0, 1.0)}
    attacks = {
        "FGSM": Adversarial.fgsm(net.model, eps=4 / 255, **options),
        "BIM": Adversarial.bim(net.model, eps=4 / 255, **options),
        "PGD": Adversarial.pgd(net.model, eps=4 / 255, **options),
        "JSMA": Adversarial.jsma(net.model, eps=0.5, **options),
        "one pixel": one_pixel(net.model, (net.normalization.mean, net.normalization.std)),
        "patch": Adversarial.pgd(net.model, eps=1.0, max_iter=20, mask=corner, **options),
    }
    if not full:
        del attacks["one pixel"]  # 400 passes an iteration and picture
    rows = [[("clean", net.pictures(x)[0])], [("", torch.ones(3, 32, 32))]]
    for name, attack in attacks.items():
        found[net.name, name] = result = attack.run(x, ids=range(len(x)))
        print(f"{net.name}, {name}: {int(result.success.sum())} of {len(x)} fooled, L2 distance {result.l2.mean():.2f}")
        picture = net.pictures(result.clipped)[0]
        magnified, factor = magnify(picture - net.pictures(x)[0])
        rows[0].append((f"{name}: {net.class_name(int(result.prediction[0]))}", picture))
        rows[1].append((f"x {factor:g}", magnified))
    found[net.name, "x"] = x
    found[net.name, "sheet"] = sheet(rows, width=130)
found[plain.name, "sheet"]

# %%
# The same for the network that was trained against attacks of 4 / 255:
found[robust.name, "sheet"]

# %%
# The question
# ------------
# PGD changes all 1024 pixels. *How many of them does the attack need?* Each pixel of the picture is set to
# the attacked one by itself; its effect is that on the logit of the right answer minus that of the answer
# under attack. (The margin over the runner-up would not do: an attack need not end at the class that came
# second.) Then the pixels are set together, some more each time, in the order of their effects, the most
# harmful first, until the answer flips; and for comparison in the order of the size of a pixel's change,
# and at random. ``CausalMediation`` then asks inside: how many channels of a layer carry half of the
# attack's effect on the margin?
for net, layer in ((plain, "layer3"), (robust, "2")):
    x, result = found[net.name, "x"], found[net.name, "PGD"]
    needed = {"effect": [], "size of the change": [], "random": []}
    for k in result.success.nonzero().flatten().tolist():
        clean, attacked = x[k : k + 1], result.clipped[k : k + 1]
        mask = torch.arange(1024).reshape(1, 1, 32, 32)
        explainer = CausalEffect(net.model, design=OneAtATime(), outcome="logit")
        effects = explainer.estimate(clean, baselines=attacked, feature_mask=mask).effect[0]
        answer = int(result.clean_prediction[k])
        effect = effects[:, answer] - effects[:, int(result.prediction[k])]
        size = (attacked - clean).abs().sum(1).flatten()
        orders = (effect, -size, torch.rand(1024, generator=torch.Generator().manual_seed(k)))
        for name, order in zip(needed, orders, strict=True):
            rank = order.argsort().argsort().reshape(1, 1, 32, 32)
            counts = torch.arange(4, 1025, 4)[:, None, None, None]
            with torch.no_grad():
                answers = net.model(torch.where(rank < counts, attacked, clean)).argmax(1)
            needed[name].append(int(counts.flatten()[answers != answer][0]))
    told = ", ".join(f"{sum(v) / len(v):.0f} by {name}" for name, v in needed.items() if v)
    print(f"{net.name}: of 1024 pixels the attack needs {told or 'none, as it never succeeds'}")
    attack = Adversarial.pgd(net.model, eps=4 / 255, normalization=net.normalization, clip_values=(0.0, 1.0))
    mediation = CausalMediation(net.model, layer, attack, outcome="margin")
    every = found[net.name, "all"]
    print(f"{net.name}, {layer}: {mediation.carriers(every[::2], every[1::2])}")

# %%
# In the small mode (two pictures of ResNet-20, one of the robust network) about 116 of 1024 pixels were
# enough in the order of their effects, two to four times as many in the order of their size, and four to
# five times as many at random.

# %%
# References
# ----------
# * Goodfellow et al. 2015 (arXiv 1412.6572); Kurakin et al. 2017 (arXiv 1607.02533); Madry et al. 2018
#   (arXiv 1706.06083); Papernot et al. 2016 (arXiv 1511.07528); Su, Vargas, Sakurai 2019: One pixel attack
#   (arXiv 1710.08864); Brown et al. 2017: Adversarial patch (arXiv 1712.09665).
# * CIFAR-10: Krizhevsky 2009; the first pictures of the test set are read here, all of them by
#   ``torchvision.datasets.CIFAR10``. ResNet-20: He et al. 2016. The robust network: alpha-beta-CROWN (arXiv
#   2103.06624).
