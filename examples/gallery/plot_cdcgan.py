"""
Generative networks: the class as something that can be set
===========================================================

**What you will learn**

* how a generator and a discriminator learn from each other, and what the loss, the settings and the class in the
  discriminator's input do;
* how a conditional generator makes the *class* an intervention, do(class = c), which gives the same picture as another
  class, and how to read the matrix of its effects on a classifier;
* how it paints parts of a picture as a class would have them, so that strokes that are not there can have an effect.
"""

import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torchvision.utils import make_grid

import ce_plugin
from ce_plugin import CausalEffect
from ce_plugin.datasets import data_folder, fashion_mnist, mnist
from ce_plugin.designs import OneAtATime
from ce_plugin.interventions import ClassCounterfactual, ClassInfill, PixelMask
from ce_plugin.models import GAN, mnist_cnn, train_gan
from ce_plugin.visualization import overlay, sheet

full = os.environ.get("CE_PLUGIN_GALLERY") == "full"
cache = Path(os.environ.get("CE_PLUGIN_CACHE", Path.cwd() / ".gallery-cache"))
cache.mkdir(parents=True, exist_ok=True)
split, count, steps = ("train", 20_000, 2000) if full else ("test", 500, 40)
digits = [part[:count] for part in mnist(data_folder("mnist"), split)]
clothes = [part[:count] for part in fashion_mnist(data_folder("fashion-mnist"), split)]


def train(images: torch.Tensor, labels: torch.Tensor | None = None, share: int = 1, **settings: object) -> GAN:
    """A training of all steps, or of a share of them; long ones are kept in the cache and can be interrupted."""
    options = {"steps": steps // share, "lr": 5e-4, "width": 32 if full else 8, "frames": 4, **settings}
    name = "-".join(str(value) for value in options.values()) + f"-{labels is None}-{float(images.mean()):.4f}"
    return train_gan(images, labels, checkpoint=cache / f"cdcgan-{name}.gan", show_progress=full, **options)


def montage(grid: torch.Tensor) -> torch.Tensor:
    """A grid of pictures (rows, columns, 1, 28, 28) as one."""
    return make_grid(grid.flatten(0, 1), nrow=grid.shape[1], padding=0)


# %%
# Two networks that learn from each other
# ---------------------------------------
# The discriminator learns to tell real pictures from made ones, the generator to have its pictures taken for
# real. A *conditional* pair is told the class as well: the generator beside its noise, the discriminator as
# a plane for each class beside the picture. Real pictures under a wrong class count as made ones here, so
# that the class is heeded early. Each column of a grid has one noise, each row one class. In the small mode
# 40 steps are made, which is enough for blots; in full 2000, and a fifth of them for what is only compared.
gans = {
    "DCGAN": train(digits[0], share=5),
    "conditional, MNIST": train(*digits, mismatched=True),
    "conditional, Fashion-MNIST": train(*clothes, mismatched=True),
    "no y in the discriminator": train(*digits, share=5, labels_for="generator"),
    "original loss": train(*digits, share=5, mismatched=True, loss="saturating"),
}
grown = gans["conditional, MNIST"].frames
sheet([[(f"step {k * steps // 4}", montage(frame)) for k, frame in enumerate(grown, 1)]], width=230)

# %%
# Clothes; what comes of it if the discriminator does not see the class: a picture then has to look real, and
# need not be of its row, so that rows of digits hardly differ; the original loss; and a DCGAN, which knows no
# classes. The last three are made in a fifth of the steps.
shown = [(name, montage(gan.frames[-1])) for name, gan in list(gans.items())[2:]]
shown.append(("DCGAN", montage(gans["DCGAN"].generator.grid(80).unflatten(1, (10, 8))[0])))
sheet([shown], width=230)

# %%
# The losses. The original game has the generator minimise log(1 - D), which is flat where D is sure that a
# picture was made; the non-saturating -log D is steep there. Losses are no measure of the pictures: those of
# a good pair go on swaying, since each is measured by the other.
figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="tight")
for one, name in zip(axes, ("conditional, MNIST", "no y in the discriminator", "original loss"), strict=True):
    window = max(1, len(gans[name].losses) // 100)
    smooth = gans[name].losses.unfold(0, window, window).mean(2)
    one.plot(torch.arange(len(smooth)) * window, smooth, label=["D", "G"])
    one.set(title=name, xlabel="step", ylabel="loss")
    one.legend()
plt.show()

# %%
# Are the pictures of their class?
# --------------------------------
# ``benchmarks/gallery/cdcgan.py`` asks networks that have nothing to do with the pair, and compares the mean
# distance of two pictures of a class with that of two real ones. This is what it measured:
measured = Path(ce_plugin.__file__).parents[1] / "benchmarks" / "results" / "gallery_cdcgan.json"
rows = json.loads(measured.read_text())["rows"] if measured.is_file() else []
print(f"{len(rows)} trainings; samples taken as their class (95 % interval), and their variety:")
for row in rows:
    (share, low, high), (ratio, *_) = row["agreement"], row["variety"]
    told = f"{share:.1%} ({low:.1%} to {high:.1%}), {ratio:.2f} of real"
    print(f"{row['asked']['data']}, {row['title']}, {row['asked']['steps']} steps: {told}")

# %%
# do(class = c)
# -------------
# A column of the grid is one noise under every class: pictures that differ by the class *alone*. That is an
# intervention on the label, not a comparison of threes with eights that other hands have written.
# ``ClassCounterfactual`` makes it one like any other. The classifier is a network that was trained elsewhere
# on real digits. A cell is the mean effect, over noises, of do(class = column) on the log-odds of the column,
# for pictures that were made as the row's class.
make, network = gans["conditional, MNIST"].generator, mnist_cnn(data_folder("digit-nets") / "mnist_cnn.npz")
unit, classes = network.normalization, range(10) if full else (3, 8)
z, one_unit = make.latents(range(500, 540 if full else 504)), torch.zeros(1, 1, 28, 28, dtype=torch.long)
effects = torch.zeros(len(classes), len(classes), len(z))
for row, source in enumerate(classes):
    x = unit.to_model(make(z, torch.full((len(z),), source)).detach())
    for column, c in enumerate(classes):
        if c != source:
            do = ClassCounterfactual(make, c, latents=z, normalization=unit)
            explainer = CausalEffect(network.model, do, OneAtATime(), outcome="log_odds")
            effects[row, column] = explainer.estimate(x, target=c, feature_mask=one_unit).effect[:, 0, 0]
matrix, half = effects.mean(2), 1.96 * effects.std(2) / len(z) ** 0.5
mean = matrix.sum() / (len(classes) ** 2 - len(classes))
print(f"mean effect on the log-odds {mean:+.1f}; 95 % intervals of the cells are at most +- {half.max():.1f}")
figure, axes = plt.subplots(figsize=(5, 4), layout="tight")
figure.colorbar(axes.imshow(matrix.masked_fill(matrix == 0, torch.nan)))
axes.set(xlabel="do(class = ...)", ylabel="made as", title="effect on the log-odds of the class that is set")
axes.set(xticks=range(len(classes)), xticklabels=classes, yticks=range(len(classes)), yticklabels=classes)
plt.show()

# %%
# A real digit has no noise that anyone knows. It is found (abduction): the latent variables under which the
# generator's picture of a three is the likeliest to be this one, by gradient steps. Then the class is set.
real = [part[3000:] for part in mnist(data_folder("mnist"), "test")]
three = unit.to_model(real[0][(real[1] == 3).nonzero()[:1, 0]])
search = {"normalization": unit, "source": 3, "steps": 150 if full else 10}
row = [(f"do(class = {c})", ClassCounterfactual(make, c, **search)(three)) for c in (3, 8, 5, 2, 9)]
sheet([[(name, network.pictures(x)[0]) for name, x in [("a real three", three), *row]]], width=130)

# %%
# What is behind a mask?
# ----------------------
# The left half of that three is masked: by zero, by a blur, and by what the generator has there for a class,
# given the right half. The titles say the classifier's answer.
quick = {"steps": 60 if full else 5, "starts": 2 if full else 1}
fills = {"zero": "zero", "blur": "blur", **{f"as {c}": ClassInfill(make, c, **quick) for c in (3, 8)}}
row = []
for name, fill in fills.items():
    x = PixelMask(fill, region=(0, 0, 12, 28), normalization=unit)(three)
    share, answer = network.model(x).softmax(1)[0].max(0)
    row.append((f"{name}: {answer} ({share:.2f})", network.pictures(x)[0]))
sheet([row], width=200)

# %%
# The question
# ------------
# *What makes this three no eight?* In part the strokes that it does not have. Each of 7 x 7 patches is set by
# itself, under each fill, and the effect on the logit of eight minus that of three is kept. Zero cannot change
# what is black already: its effects there are 0 by construction, however much the classifier looks at the
# gap. The generator can close it. Orange patches make the three more of an eight, blue ones less. Then they
# are set together, the most effective first, one more each time, until the answer is eight.
maps, windows = [], {"sliding_window_shapes": (1, 4, 4), "strides": (1, 4, 4)}
for name, fill in fills.items():
    explainer = CausalEffect(network.model, PixelMask(fill, normalization=unit), OneAtATime(), outcome="logit")
    logits = explainer.estimate(three, **windows).effect[0]
    effect = (logits[:, 8] - logits[:, 3]).reshape(7, 7)
    image = effect.repeat_interleave(4, 0).repeat_interleave(4, 1)
    regions = [image >= least for least in effect.flatten().sort(descending=True).values]
    changed = [PixelMask(fill, region=region, normalization=unit)(three) for region in regions]
    needed = [k for k, x in enumerate(changed, 1) if int(network.model(x).argmax()) == 8]
    dead, told = int((effect.abs() < 1e-4).sum()), f"{needed[0]} together make an eight" if needed else "never an eight"
    print(f"{name}: {dead} of 49 patches without any effect, the largest {effect.max():+.1f}; {told}")
    maps.append((name, overlay(image, network.pictures(three)[0])))
sheet([maps], width=200)

# %%
# What can only erase says nothing of strokes that are missing: compare how many patches have no effect under
# zero, and which fills ever reach an eight. Such an answer is the generator's as much as the classifier's: it
# says what the classifier makes of pictures that *this* generator takes for likely. After the 40 steps of the
# small mode that is little.

# %%
# References
# ----------
# * Goodfellow et al. 2014: Generative adversarial nets (arXiv 1406.2661), both losses; Radford, Metz,
#   Chintala 2016: DCGAN (arXiv 1511.06434); Mirza, Osindero 2014: conditional (arXiv 1411.1784); Reed et al.
#   2016 (arXiv 1605.05396): mismatched pairs.
# * Pearl 2009: Causality, section 7.1, on abduction, action and prediction; Pawlowski, Castro, Glocker 2020
#   (arXiv 2006.06485), with deep networks. Yang et al. 2019 (arXiv 1902.03380), condition II.
# * Yeh et al. 2017 (arXiv 1607.07539): in-painting by a generator; Chang et al. 2019 (arXiv 1807.08024): as a
#   fill for explanations.
# * MNIST: LeCun et al. 1998. Fashion-MNIST: Xiao et al. 2017 (arXiv 1708.07747). All files go to ``mnist/``
#   and ``fashion-mnist/``; the classifier's weights to ``digit-nets/``.
