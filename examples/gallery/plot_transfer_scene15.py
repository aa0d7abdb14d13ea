"""
Transfer learning: 15 scenes from the features of another task
==============================================================

**What you will learn**

* how well features that were learned for ImageNet tell kitchens from bedrooms, by network and depth, with a linear
  support vector machine behind them;
* how to choose layer, normalisation and C without looking at the test photographs;
* how to ask network and support vector machine *as one model* what causes its decisions.

15-Scene has photographs of 15 places, in grey. Networks trained on ImageNet want three channels: the grey one is
repeated. (Feeding one channel to the *sum* of each first filter over its three colours is the same computation;
their *average* fed with three equal channels is, too. The difference is printed.)
"""

import os
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.svm import LinearSVC
from torch import nn
from tqdm import tqdm

from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.datasets import class_folders, data_folder
from ce_plugin.models import efficientnet_lite0, load_mobilenet
from ce_plugin.networks import SklearnHead
from ce_plugin.visualization import overlay, sheet

full = os.environ.get("CE_PLUGIN_GALLERY") == "full"
cache = joblib.Memory(os.environ.get("CE_PLUGIN_CACHE", Path.cwd() / ".gallery-cache"), verbose=0)
splits = {name: class_folders(data_folder("scene15"), name) for name in ("train", "test")}
if not full:  # every 16th photograph, so that all classes are there
    splits = {name: files.subset(range(0, len(files), 16)) for name, files in splits.items()}
efficient = efficientnet_lite0()
mobile = load_mobilenet(data_folder("mobilenet") / "mobilenet_v2_1.0_224_quant.npz")

# %%
# Features at several depths
# --------------------------
# Each network as a list of its parts, and where to cut it; maps are averaged over their positions.
e, m = efficient.model, mobile.model
trunks = {
    "EfficientNet-lite0": (efficient, [e._conv_stem, e._bn0, e._swish, *e._blocks, e._conv_head, e._bn1, e._swish]),
    "MobileNet v2": (mobile, [m.stem, *m.blocks, m.head]),
}
cuts = {"EfficientNet-lite0": [9, 14, 22], "MobileNet v2": [8, 14, 19]}
grey = efficient.inputs([splits["test"][0][0]])
with torch.no_grad():
    summed = nn.functional.conv2d(e._conv_stem.static_padding(grey[:, :1]), e._conv_stem.weight.sum(1, True), stride=2)
    difference = (summed - e._conv_stem(grey)).abs().max()
print(f"one channel and the sums of the first filters, or three channels: they differ by {difference:.1e}")


@cache.cache
def features(name: str, split: str, full: bool) -> dict[int, torch.Tensor]:
    """Features of all photographs at each cut, {cut: (N, D)}."""
    network, trunk = trunks[name]
    found = {cut: [] for cut in cuts[name]}
    for k in tqdm(range(0, len(splits[split]), 25), desc=f"{name}, {split}"):
        z = network.inputs([splits[split][i][0] for i in range(k, min(k + 25, len(splits[split])))])
        for number, part in enumerate(trunk, 1):
            with torch.no_grad():
                z = part(z)
            if number in found:
                found[number].append(z.mean((2, 3)))
    return {cut: torch.cat(parts) for cut, parts in found.items()}


# %%
# Which layer, normalised or not, with which C?
# ---------------------------------------------
# All are chosen by cross-validation on the training photographs alone.
svm = LinearSVC(tol=1e-3, max_iter=5000)
steps = {
    "L2-normalised": (make_pipeline(Normalizer(), svm), [1, 10, 100]),
    "as they are": (make_pipeline(svm), [0.001, 0.01, 0.1]),
}
labels = {name: files.labels.numpy() for name, files in splits.items()}
searches = {}
for name in trunks:
    for cut, z in features(name, "train", full).items():
        for step, (pipeline, grid) in steps.items():
            search = GridSearchCV(pipeline, {"linearsvc__C": grid}, cv=5 if full else 3)
            searches[name, cut, step] = search.fit(z.numpy(), labels["train"])
            c = search.best_params_["linearsvc__C"]
            print(f"{name}, part {cut}, {step}: {search.best_score_:.3f} with C = {c}")
name, cut, step = max(searches, key=lambda key: searches[key].best_score_)
best = searches[name, cut, step]
print(f"chosen: {name}, part {cut}, {step}")

# %%
# The test photographs, once
# --------------------------
# The split is that of the source of these files, not the course's or Lazebnik's, and the photographs were
# stretched to squares: the figure cannot be compared with published ones. Beside it, a new softmax layer on
# the same features, which is what fine-tuning the head alone comes to.
z = {split: features(name, split, full)[cut].numpy() for split in splits}
n = len(z["test"])
head = make_pipeline(Normalizer(), LogisticRegression(C=100, max_iter=500)).fit(z["train"], labels["train"])
for what, classifier in (("support vector machine", best), ("softmax layer", head)):
    right = int((classifier.predict(z["test"]) == labels["test"]).sum())
    low, high = binomtest(right, n).proportion_ci(method="wilson")
    print(f"{what}: {right} of {n} right, {right / n:.3f} (95 % interval {low:.3f} to {high:.3f})")
classes = splits["test"].classes
figure, axes = plt.subplots(figsize=(7, 7), layout="tight")
shown = {"ax": axes, "display_labels": classes, "xticks_rotation": "vertical", "colorbar": False}
ConfusionMatrixDisplay.from_predictions(labels["test"], best.predict(z["test"]), **shown)
plt.show()

# %%
# The question
# ------------
# The decision is made by a network *and* a support vector machine that never saw a photograph. Which
# regions of the photograph cause the decision "kitchen"? ``SklearnHead`` makes one model of the two.
network, trunk = trunks[name]
model = nn.Sequential(*trunk[:cut], nn.AdaptiveAvgPool2d(1), nn.Flatten(), SklearnHead(best)).eval()
kitchen = next(k for k, scene in enumerate(classes) if scene.lower() == "kitchen")
chosen = (splits["test"].labels == kitchen).nonzero().flatten()[: 4 if full else 1].tolist()
x = network.inputs([splits["test"][k][0] for k in chosen])
explainer = CausalEffect(model, outcome="logit", normalization=network.normalization)
maps = explainer.attribute(x, target=kitchen, passes=300 if full else 40)
titles = [f"{classes[c]}: what causes {classes[kitchen]}" for c in model(x).argmax(1)]
pictures = [overlay(one, picture) for one, picture in zip(maps, network.pictures(x), strict=True)]
sheet([list(zip(titles, pictures, strict=True))])

# %%
# And which channels carry each class? The channels of the last layer are set to zero, one by one, for one
# photograph of each class (the first of the test photographs), and the effect on the class's own decision
# value is kept.
first = [int((splits["test"].labels == c).nonzero()[0]) for c in range(len(classes))][:: 1 if full else 5]
x = network.inputs([splits["test"][k][0] for k in first])
target = splits["test"].labels[first]
explainer = LayerCausalEffect(model, str(cut), outcome="logit")  # at the input of the pooling
estimate = explainer.estimate(x, target=target, attribute_to_layer_input=True)
for scene, value, own in zip(target, estimate.reference[:, 0], estimate.contribution[:, :, 0], strict=True):
    carriers = ", ".join(f"{k} ({own[k]:+.2f})" for k in own.topk(3).indices.tolist())
    print(f"{classes[scene]}: decision value {value:+.2f}; channels that carry it most: {carriers}")

# %%
# References
# ----------
# * Oliva and Torralba 2001; Fei-Fei and Perona 2005; Lazebnik, Schmid, Ponce 2006: the data set 15-Scene,
#   read here by ``ce_plugin.datasets.class_folders`` from a folder a class; the whole of it goes to
#   ``scene15/train`` and ``test``.
# * Sharif Razavian et al. 2014: CNN features off-the-shelf (arXiv 1403.6382).
# * Pedregosa et al. 2011: Scikit-learn. Tan and Le 2019 (arXiv 1905.11946); Sandler et al. 2018 (arXiv
#   1801.04381).
