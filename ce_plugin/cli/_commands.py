"""The commands: which options each takes, and where it is run. Nothing here imports torch: help appears at once.

A command's options are the fields of a dataclass. A field's annotation holds type, converter and help; the docstring is
the help of the command, with its examples below the options. What runs a command is imported when it is called.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields
from functools import partial
from inspect import Parameter, Signature, getdoc
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from ce_plugin._version import __version__
from ce_plugin.errors import CEPluginError

# --- converters: from the text after an option to its value. typer hands the default to them as well.


def count(text: object) -> int:
    """A positive whole number."""
    value = int(str(text)) if str(text).isdecimal() else 0
    if value < 1:
        raise typer.BadParameter(f"{text} is not a positive whole number")
    return value


def natural(text: object) -> int:
    """A whole number that is zero or more."""
    if not str(text).isdecimal():
        raise typer.BadParameter(f"{text} is not a whole number")
    return int(str(text))


def class_count(text: str) -> int:
    """How many classes: a positive whole number, or 0 for ``all``."""
    return 0 if text == "all" else count(text)


def share(text: object) -> float:
    """A number in (0, 1], or a fraction such as 8/255."""
    top, slash, bottom = str(text).partition("/")
    try:
        value = float(top) / (float(bottom) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text} is not a share in (0, 1]: write 8/255 or 0.3, for example")
    return value


def open_share(text: object) -> float:
    """A share below 1."""
    value = share(text)
    if value == 1:
        raise typer.BadParameter("1 is all of it: write a share below 1, 0.1 for example")
    return value


def weight(text: object) -> float:
    """A number that is zero or more."""
    try:
        value = float(str(text))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{text} is not a number that is zero or more")
    return value


def positive(text: object) -> float:
    """A number above zero."""
    try:
        value = weight(text)
    except typer.BadParameter:
        value = 0.0
    if value == 0:
        raise typer.BadParameter(f"{text} is not a number above zero")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text} is not a number, or numbers separated by commas") from None


class MeanStd(NamedTuple):
    """What a network expects, (value - mean) / std: a number, or one per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ValueRange(NamedTuple):
    """What black and white are."""

    low: float
    high: float


def mean_and_std(text: str) -> MeanStd:
    """MEAN/STD, each a number or one per channel."""
    mean, slash, std = text.partition("/")
    if not slash:
        raise typer.BadParameter(f"{text} is not MEAN/STD: write 127/128, or three numbers each with commas")
    return MeanStd(numbers(mean), numbers(std))


def low_and_high(text: str) -> ValueRange:
    """LOW,HIGH with LOW below HIGH."""
    values = numbers(text)
    if len(values) != 2 or not values[0] < values[1]:
        raise typer.BadParameter(f"{text} is not LOW,HIGH: write 0,255, for example")
    return ValueRange(*values)


def names(text: str) -> tuple[str, ...]:
    """Words separated by commas, each once."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found or len(set(found)) < len(found):
        raise typer.BadParameter(f"{text!r} is not a list of different words with commas between them")
    return found


def one_of(*names: str) -> dict[str, Any]:
    """Converter and completion of an option that may be repeated, for which typer knows no ``Literal``."""

    def choice(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, names))}.")
        return text

    return {"parser": choice, "autocompletion": lambda incomplete: [one for one in names if one.startswith(incomplete)]}


# --- options that several commands share, so that one name means one thing in all of them


def _option(panel: str, metavar: str, text: str, *flags: str, shown: bool | str = True, **details: Any) -> Any:
    """An option of one panel of the help: what stands for its value, what it means, how it is read."""
    return typer.Option(*flags, metavar=metavar, help=text, show_default=shown, rich_help_panel=panel, **details)


_network, _experiment = partial(_option, "The network"), partial(_option, "The experiment")
_detector, _autoencoder = partial(_option, "The detector"), partial(_option, "The autoencoder")
_training, _run = partial(_option, "The training"), partial(_option, "The run")

ATTACKS = ("fgsm", "bim", "pgd", "jsma")

Images = Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Picture files, or folders and all below them.")]
Target = Annotated[
    str | None, _experiment("CLASS", "Name or index of the class to explain.", shown="the network's answer")
]
Layer = Annotated[str | None, _experiment("NAME", "Dotted name of the layer.", shown="the last convolution")]
Eps = Annotated[
    float,
    _experiment(
        "SHARE", "Largest change of a value by FGSM, BIM and PGD, as a share of the range.", parser=share, shown="8/255"
    ),
]
EpsOfMany = Annotated[
    list[float] | None,
    _experiment(
        "SHARE...",
        "Largest change of a value, as a share of the range.",
        parser=share,
        shown="8/255; 0.1 up to 64 pixels",
    ),
]
Outcome = Annotated[
    Literal["log_odds", "probability", "logit", "margin"],
    _experiment(
        "OUTCOME",
        "What is measured: log_odds, probability, logit or margin. A probability hardly moves near 0 and 1, and hides "
        "every class but the most probable one.",
    ),
]
Limit = Annotated[int | None, _experiment("N", "Take the first N pictures only.", parser=count)]
AlarmLayer = Annotated[
    str | None, _experiment("NAME", "Dotted name of a layer: the page then names the channels that raise an alarm.")
]
DetectorFile = Annotated[Path, _detector("FILE", "File that detect fit wrote.")]
Flagged = Annotated[
    float | None, _detector("SHARE", "Share of clean pictures that is flagged.", parser=open_share, shown="as fitted")
]
Trials = Annotated[int, _run("N", "Trials per picture and attack; more trials, smaller errors.", parser=count)]
Seed = Annotated[int, _run("N", "Seed of everything random.")]
Out = Annotated[Path, _run("DIR", "Folder of the results.")]
OutFile = Annotated[Path, _run("FILE", "File of the result.")]
Force = Annotated[bool, _run("", "Replace results that exist.", "--force")]
Tables = Annotated[
    Literal["csv", "json", "parquet"],
    _run("SUFFIX", "Tables as .csv (for spreadsheets and pandas), .json, or .parquet (needs pyarrow)."),
]
Quiet = Annotated[bool, _run("", "No progress and no summary, only where the results are.", "--quiet")]


# --- the options of each command


@dataclass(kw_only=True)
class NetworkOptions:
    """Which network, and how it wants to be fed."""

    model: Annotated[
        str,
        _network(
            "NAME",
            "torchvision:NAME, timm:NAME or hf:NAME (with their own preparation of pictures), or MODULE:FACTORY or "
            "FILE.py:FACTORY for your own.",
            shown="EfficientNet-lite0",
        ),
    ] = "ce_plugin.models:efficientnet_lite0"
    weights: Annotated[
        str,
        _network(
            "FILE",
            "A file of torch.save(model.state_dict(), FILE). DEFAULT: torchvision's own, or what the factory sets.",
        ),
    ] = "DEFAULT"
    class_names: Annotated[
        Path | None, _network("FILE", "Text file (UTF-8) with the name of each class on a line of its own, in order.")
    ] = None
    size: Annotated[
        int | None, _network("PIXELS", "Side of the square that your network sees.", parser=count, shown="224")
    ] = None
    normalization: Annotated[
        MeanStd | None,
        _network(
            "MEAN/STD",
            "Your network expects (value - MEAN) / STD; one number, or one per channel: "
            "0.485,0.456,0.406/0.229,0.224,0.225",
            parser=mean_and_std,
            shown="none",
        ),
    ] = None
    value_range: Annotated[
        ValueRange | None,
        _network("LOW,HIGH", "What black and white are before --normalization.", parser=low_and_high, shown="0,1"),
    ] = None
    device: Annotated[str, _network("DEVICE", "cpu, cuda, cuda:1, mps ...")] = "cpu"


@dataclass(kw_only=True)
class DemoOptions:
    """Explain two photographs under four attacks, and detect attacks on digits.

    scikit-learn's two photographs are explained with EfficientNet-lite0, clean and under FGSM, BIM, PGD and JSMA, and a
    detector is fitted that notices the same attacks on handwritten digits. Nothing is downloaded.
    """

    trials: Trials = 200
    seed: Seed = 0
    out: Out = Path("ce-plugin-demo")
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class ExplainOptions(NetworkOptions):
    r"""Explain your own photographs: which patches cause the network's answer?

    examples:
      ce-plugin explain cat.jpg
      ce-plugin explain cat.jpg --model torchvision:resnet50 --target tabby
      ce-plugin explain photographs --model timm:convnext_tiny
      ce-plugin explain --config ce-plugin-report/run.toml --out again
      ce-plugin explain leaf.png --model my_networks:leaves --weights leaves.pt \
          --class-names leaves.txt --size 128 --normalization 0.5/0.25
      ce-plugin explain *.jpg --attack fgsm --attack pgd --eps 0.3 --out paper

    A factory such as my_networks:leaves is a function without arguments that
    returns a torch.nn.Module or a ce_plugin.models.VisionModel.

    An --eps of 8/255 is hardly visible in a photograph; the 0.3 of Yang et al.
    (2019) was meant for small pictures and spoils a photograph for the eye too.
    """

    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE", help="Picture files (JPEG, PNG ...), folders, or patterns like 'in/*.jpg'."),
    ]
    target: Target = None
    layer: Layer = None
    attack: Annotated[
        list[str] | None,
        _experiment(
            "ATTACK", "Also under fgsm, bim, pgd or jsma; repeatable.", **one_of("none", *ATTACKS), shown="none"
        ),
    ] = None
    eps: Eps = 8 / 255
    design: Annotated[
        Literal["regions", "random-mask", "one-at-a-time", "leave-one-in"],
        _experiment(
            "DESIGN",
            "Which patches are covered in a trial: random coherent regions (and single patches for the tests), "
            "random-mask (random single patches), one-at-a-time, leave-one-in (all but one). The first two have "
            "standard errors.",
        ),
    ] = "regions"
    mask_share: Annotated[
        float | None,
        _experiment("P", "Share of patches that a trial covers.", parser=open_share, shown="0.5; random-mask 0.1"),
    ] = None
    fill: Annotated[
        Literal["mixed", "blur", "zero", "mean", "noise"],
        _experiment(
            "FILL",
            "What covers a patch: zero (black), mean (the mean colour), blur (the blurred photograph), these three in "
            "turn (mixed), or noise.",
        ),
    ] = "mixed"
    grid: Annotated[
        int | None,
        _experiment(
            "N", "Cut the photograph into N x N patches; regions: 14 only.", parser=count, shown="14; random-mask 10"
        ),
    ] = None
    outcome: Outcome = "log_odds"
    trials: Trials = 400
    seed: Seed = 0
    out: Out = Path("ce-plugin-report")
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class LayerOptions(NetworkOptions):
    """One picture, and the channels of one layer."""

    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file (JPEG, PNG, WebP ...).")]
    layer: Layer = None
    target: Target = None
    given: Annotated[
        Literal["fgsm", "bim", "pgd", "jsma"] | None,
        _experiment("ATTACK", "Show results under this attack beside the clean ones: fgsm, bim, pgd, jsma."),
    ] = None
    eps: Eps = 8 / 255
    intervention: Annotated[
        Literal["zero", "mean", "resample"],
        _experiment(
            "KIND",
            "What a channel is set to: zero (the paper's Z0), its mean over the pictures of --reference, or its value "
            "in some of them (resample).",
        ),
    ] = "zero"
    reference: Annotated[Path | None, _experiment("DIR", "Pictures for --intervention mean or resample.")] = None
    outcome: Outcome
    seed: Seed = 0
    out: Out
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class NodesOptions(LayerOptions):
    """Rank the channels of a layer, and those that carry an attack.

    The effect of every channel on the answer, each set by itself and exactly.

    examples:
      ce-plugin nodes cat.jpg
      ce-plugin nodes cat.jpg --layer _blocks.10 --target tabby --top 40
      ce-plugin nodes cat.jpg --model torchvision:vgg16 --layer features.29
      ce-plugin nodes cat.jpg --given pgd --eps 2/255
      ce-plugin nodes cat.jpg --intervention mean --reference photographs

    In the folder: nodes.csv (a row for each channel and class), nodes.png,
    manifest.json; with --given also carriers.csv, the channels through which the
    attack's effect passes. Those are effects on one image; to find what holds over
    images, ce_plugin.CausalMediation.carriers chooses on some, tests on others.
    """

    outcome: Outcome = "log_odds"
    classes: Annotated[
        int | None,
        _experiment(
            "N", "Effects on the N most probable classes, or all; not with --target.", parser=class_count, shown="3"
        ),
    ] = None
    top: Annotated[int, _experiment("N", "Channels in the table and in the plot.", parser=count)] = 20
    tables: Tables = "csv"
    out: Out = Path("ce-plugin-nodes")

    def __post_init__(self) -> None:
        if self.target is not None and self.classes is not None:
            raise typer.BadParameter("--classes is not allowed with --target")
        # From here on None means all of them.
        self.classes = 3 if self.classes is None else self.classes or None


@dataclass(kw_only=True)
class MapOptions(LayerOptions):
    """Draw the causal effect map of a layer beside Grad-CAM.

    The effects of the channels on the answer, laid where the channels are.

    examples:
      ce-plugin map cat.jpg
      ce-plugin map cat.jpg --contrast others
      ce-plugin map cat.jpg --target tabby --contrast lynx --given fgsm

    In the folder: map.png (the map beside Grad-CAM), maps.npz (both as numbers, at
    the layer's own resolution and enlarged; see numpy.load), manifest.json.
    """

    outcome: Outcome = "logit"
    contrast: Annotated[
        list[str] | None,
        _experiment(
            "CLASS",
            "Explain the target rather than this class (name or index, or others for all of them): its contributions "
            "are subtracted. May be repeated; several classes are averaged.",
        ),
    ] = None
    weighting: Annotated[
        Literal["change", "activation"],
        _experiment("KIND", "Lay effects where setting a channel has consequences, or where it is active."),
    ] = "change"
    out: Out = Path("ce-plugin-map")


@dataclass(kw_only=True)
class TrainOptions(NetworkOptions):
    r"""Train the autoencoder of a layer; the network itself is not changed.

    examples:
      ce-plugin concepts train photos --concepts 64 --out concepts.pt
      ce-plugin concepts train photos --concepts 64 --out concepts.pt --resume
      ce-plugin concepts train photos --model torchvision:vgg16 \
          --layer features.29 --concepts 32 --out vgg.pt

    After every epoch the state is written to FILE.checkpoint. An interrupted
    training goes on from there with the same options and --resume, and ends as if
    it had not been interrupted. What it was trained with is in FILE.json.
    """

    images: Annotated[Path, typer.Argument(metavar="IMAGES_DIR", help="Folder of pictures, and all below it.")]
    layer: Annotated[str | None, _autoencoder("NAME", "Dotted name of the layer.", shown="the last convolution")] = None
    concepts: Annotated[int, _autoencoder("K", "Channels of the code, fewer than the layer has.", parser=count)]
    hidden: Annotated[
        int | None, _autoencoder("N", "Channels in between.", parser=count, shown="geometric mean of layer and code")
    ] = None
    kernel_size: Annotated[int, _autoencoder("N", "Of its convolutions; odd.", parser=count)] = 3
    epochs: Annotated[int, _training("N", "At most this many epochs.", parser=count)] = 50
    patience: Annotated[int, _training("N", "Stop after so many epochs without improvement.", parser=count)] = 8
    batch_size: Annotated[int, _training("N", "Pictures per step.", parser=count)] = 32
    learning_rate: Annotated[float, _training("RATE", "At the start.", parser=positive)] = 1e-3
    held_out: Annotated[float, _training("SHARE", "Share of pictures that choose the epoch.", parser=open_share)] = 0.2
    lambda_shallow: Annotated[float, _training("WEIGHT", "Of the reconstruction in the loss.", parser=weight)] = 1.0
    lambda_deep: Annotated[float, _training("WEIGHT", "Of the network's answers in the loss.", parser=weight)] = 1.0
    lambda_interpretability: Annotated[
        float, _training("WEIGHT", "Of a sparse, smooth code in the loss.", parser=weight)
    ] = 0.01
    resume: Annotated[bool, _run("", "Go on with a training that was interrupted.", "--resume")] = False
    seed: Seed = 0
    out: OutFile
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class ShowOptions(NetworkOptions):
    r"""Show each concept: pictures, regions, and effects on the classes.

    Fidelity of the autoencoder, dead and duplicated concepts, and for each concept the pictures and regions that
    activate it most and its effects on the classes.

    examples:
      ce-plugin concepts show concepts.pt --images photographs
      ce-plugin concepts show vgg.pt --model torchvision:vgg16 \
          --images photographs --top 8 --out vgg-concepts

    In the folder: concepts.html (a page with its pictures inside), concepts.csv,
    manifest.json. Show pictures that were not trained on: on those that were,
    fidelity is flattered.
    """

    file: Annotated[Path, typer.Argument(metavar="FILE", help="File that concepts train wrote.")]
    images: Annotated[Path, _experiment("DIR", "Folder of pictures, and all below it.")]
    limit: Limit = None
    top: Annotated[int, _experiment("N", "Examples of each concept.", parser=count)] = 5
    min_fidelity: Annotated[
        float, _experiment("SHARE", "Least share of held-out answers that it keeps.", parser=weight)
    ] = 0.9
    outcome: Outcome = "log_odds"
    tables: Tables = "csv"
    out: Out = Path("ce-plugin-concepts")
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class FitOptions(NetworkOptions):
    r"""Fit a detector to clean pictures.

    Some of the pictures are held out to set its threshold. The network itself is not changed.

    examples:
      ce-plugin detect fit photos --out detector.ce
      ce-plugin detect fit photos --attacks fgsm --eps 2/255 --out detector.ce
      ce-plugin detect fit pictures --labels labels.csv --out detector.ce
      ce-plugin detect fit digits --model my_networks:digits --size 28 \
          --grayscale --adversarial-training --out digits.ce

    Clean pictures are enough: of the kind that the network will see, of several
    classes, at least 75 and better a thousand. About 500 held out for the threshold
    hold a false-alarm rate of 5 % to within two points. What the detector was
    fitted with is in FILE.json.

    What is done is saved in the folder FILE.checkpoint. An interrupted fit goes on
    from there with the same options and --resume, and ends as if it had not been
    interrupted.
    """

    images: Images
    grayscale: Annotated[
        bool, _detector("", "Gray pictures, for a network that would take three channels too.", "--grayscale")
    ] = False
    fpr: Annotated[float, _detector("SHARE", "Share of clean pictures that may be flagged.", parser=open_share)] = 0.05
    held_out: Annotated[
        float, _detector("SHARE", "Share of clean pictures kept to set the threshold.", parser=open_share)
    ] = 0.3
    epochs: Annotated[
        int | None,
        _detector(
            "N",
            "Epochs of the denoiser's training, for small pictures; as many as you ask for.",
            parser=count,
            shown="20, and at least 800 steps of 64 pictures, 3000 more with --adversarial-training",
        ),
    ] = None
    adversarial_training: Annotated[
        bool,
        _detector(
            "", "For small pictures: withstand attackers who know it; several times slower.", "--adversarial-training"
        ),
    ] = False
    hardened: Annotated[bool, _detector("", "Old name of --adversarial-training.", "--hardened", hidden=True)] = False
    attacks: Annotated[
        list[str] | None,
        _experiment(
            "ATTACK...", "Also train on fgsm, bim, pgd or jsma.", **one_of(*ATTACKS), shown="clean pictures only"
        ),
    ] = None
    eps: EpsOfMany = None
    labels: Annotated[
        Path | None,
        _experiment(
            "CSV",
            "Table with the columns file and label (0 or clean, 1 or adversarial), where some of the pictures are "
            "attacked ones to train on.",
        ),
    ] = None
    resume: Annotated[bool, _run("", "Go on with a fit that was interrupted.", "--resume")] = False
    seed: Seed = 0
    out: OutFile
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class ScoreOptions(NetworkOptions):
    r"""Score pictures: a table, and a page that explains each alarm.

    A picture is flagged when its score is one that at most the share --fpr of clean pictures reach.

    examples:
      ce-plugin detect score inbox --detector detector.ce
      ce-plugin detect score one.png two.png --detector detector.ce --fpr 0.01
      ce-plugin detect score inbox --detector resnet.ce \
          --model torchvision:resnet50 --layer layer4

    In the folder: alarms.html (the flagged pictures, and why), scores.csv (a row for
    each picture: file, score, p_value, flagged, predicted, class_name, the scores
    of the detector's parts, and why it could not be read, where it could not),
    manifest.json.
    """

    images: Images
    detector: DetectorFile
    fpr: Flagged = None
    explain: Annotated[int, _experiment("N", "Alarms that the page explains.", parser=count)] = 12
    layer: AlarmLayer = None
    tables: Tables = "csv"
    out: Out = Path("ce-plugin-alarms")
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class EvaluateOptions(NetworkOptions):
    r"""Attack clean pictures, and see how many attacks the detector notices.

    Take pictures that it was not fitted on. The page counts the successful attacks that are flagged, and the clean
    pictures.

    examples:
      ce-plugin detect evaluate unseen --detector detector.ce
      ce-plugin detect evaluate unseen --detector detector.ce \
          --attacks pgd jsma --eps 2/255 8/255 --truth classes.csv
      ce-plugin detect evaluate unseen --detector detector.ce \
          --attacks adaptive --eps 4/255 --limit 50

    In the folder: evaluation.html (tables, curves, examples), evaluation.csv (a row
    for each attack), manifest.json. Pictures that the detector was trained on are
    refused; those that set its threshold flatter the false alarms. The adaptive
    attack knows the detector and looks for pictures that fool it as well; it takes
    up to four thousand steps through network and detector for each picture.

    Attacked pictures and scores are saved in a folder beside, OUT.checkpoint. An interrupted
    evaluation goes on from there with the same options and --resume.
    """

    images: Images
    detector: DetectorFile
    fpr: Flagged = None
    attacks: Annotated[
        list[str] | None,
        _experiment(
            "ATTACK...",
            "fgsm, bim, pgd, jsma; adaptive knows the detector.",
            **one_of(*ATTACKS, "adaptive"),
            shown="the first four",
        ),
    ] = None
    eps: EpsOfMany = None
    truth: Annotated[
        Path | None,
        _experiment(
            "CSV",
            "Table with the columns file and class (name or index): only pictures that the network classifies "
            "correctly are attacked. Without it, its answers count as correct.",
        ),
    ] = None
    limit: Limit = None
    layer: AlarmLayer = None
    resume: Annotated[bool, _run("", "Go on with an evaluation that was interrupted.", "--resume")] = False
    seed: Seed = 0
    tables: Tables = "csv"
    out: Out = Path("ce-plugin-evaluation")
    force: Force = False
    quiet: Quiet = False

    def __post_init__(self) -> None:
        self.attacks = self.attacks or list(ATTACKS)


@dataclass(kw_only=True)
class ExpectedOptions(NetworkOptions):
    r"""Effects of every image of a data set: a table that answers questions without the network.

    DATA is a folder of pictures (subfolders are classes), a Parquet file or a folder of them, torchvision:NAME:SPLIT
    (torchvision:CIFAR10:test), or MODULE:FUNCTION that returns a data set.

    examples:
      ce-plugin expected photos --layer features.28 --model torchvision:vgg16 \
          --given clean,pwm,fgsm --out vgg
      ce-plugin expected torchvision:FashionMNIST:test --root data \
          --model my_networks:fashion --size 28 --layer conv2 --classes all
      ce-plugin expected val.parquet --out run --engine ray --workers 4
      ce-plugin expected val.parquet --out run --resume
      ce-plugin expected show vgg --correct

    In the folder: manifest.json and rows/, Parquet files with one row an image and
    evidence, which pandas.read_parquet reads too. A run that was interrupted, or killed,
    goes on with the same options and --resume. Pictures that cannot be read are left
    out, and listed in skipped.csv.
    """

    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder, Parquet, torchvision:NAME or MODULE:FUNCTION.")]
    root: Annotated[Path, _experiment("DIR", "Where torchvision keeps its data sets.")] = Path("data")
    labels: Annotated[
        bool, _experiment("", "Subfolders are classes.", "--labels/--no-labels", shown="where all pictures lie in one")
    ] = True
    layer: Layer = None
    input: Annotated[bool, _experiment("", "Patches of the input instead of channels of a layer.", "--input")] = False
    given: Annotated[
        Any,
        _experiment(
            "EVIDENCE,...",
            "Under each of: clean; pwm (random patches set to black); fgsm, bim, pgd, jsma.",
            parser=names,
            shown="clean",
        ),
    ] = None
    eps: Eps = 8 / 255
    mask_share: Annotated[float, _experiment("P", "Share of patches that pwm masks.", parser=open_share)] = 0.1
    outcome: Annotated[
        Any,
        _experiment(
            "OUTCOME,...",
            "What is measured, all in one run: log_odds, probability, logit, margin, sigmoid, prediction_weighted.",
            parser=names,
            shown="log_odds, probability, prediction_weighted; of one output sigmoid, logit",
        ),
    ] = None
    classes: Annotated[
        Any,
        _experiment(
            "CLASSES",
            "Whose effects are stored: explained (each picture's own answer), all, or names or indices with commas.",
            parser=names,
            shown="explained",
        ),
    ] = None
    limit: Limit = None
    batch_size: Annotated[int, _run("N", "Pictures that are estimated together.", parser=count)] = 32
    shard_size: Annotated[
        int | None, _run("N", "Pictures of a file.", parser=count, shown="512, or as many as take 256 MB")
    ] = None
    loaders: Annotated[int, _run("N", "Processes that read pictures ahead.")] = 0
    engine: Annotated[Literal["local", "ray"], _run("ENGINE", "local: this process; ray: workers of Ray Data.")] = (
        "local"
    )
    workers: Annotated[int, _run("N", "Workers of Ray.", parser=count)] = 2
    address: Annotated[
        str | None, _run("ADDRESS", "Of a running Ray cluster, or auto.", shown="one on this machine")
    ] = None
    images: Annotated[
        bool, _run("", "Keep the attacked pictures with their rows.", "--images/--no-images", shown="images")
    ] = True
    strict: Annotated[bool, _run("", "Stop at the first picture that cannot be read.", "--strict")] = False
    resume: Annotated[bool, _run("", "Go on with a run of the same options.", "--resume")] = False
    trials: Annotated[int, _run("N", "Trials per picture, with --input.", parser=count)] = 400
    seed: Seed = 0
    tables: Tables = "csv"
    out: Out = Path("ce-plugin-expected")
    force: Force = False
    quiet: Quiet = False

    def __post_init__(self) -> None:
        if self.input and self.layer is not None:
            raise typer.BadParameter("--layer is not allowed with --input")


@dataclass(kw_only=True)
class ExpectedShowOptions:
    r"""Answer from the table of a run: expected effects with intervals, on the terminal and on a page.

    examples:
      ce-plugin expected show vgg
      ce-plugin expected show vgg --outcome probability --correct --top 40
      ce-plugin expected show fashion --target 3 --label 3 --reading B

    In the folder: expected.html (a page), expected.csv (a row for each evidence,
    unit, class and outcome), manifest.json. The pictures are the sample: intervals are for
    more pictures of their kind. Units that differ from zero are told at a false
    discovery rate over all units.
    """

    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of ce-plugin expected.")]
    outcome: Annotated[str | None, _experiment("OUTCOME", "Which outcome.", shown="all")] = None
    target: Annotated[
        str, _experiment("CLASS", "explained (each picture's own answer), all, or the index of a class.")
    ] = "explained"
    correct: Annotated[bool, _experiment("", "Only pictures that are answered correctly.", "--correct")] = False
    label: Annotated[int | None, _experiment("CLASS", "Only pictures of this class (index).")] = None
    answer: Annotated[int | None, _experiment("CLASS", "Only pictures that are answered so (index).")] = None
    reading: Annotated[
        Literal["A", "B"],
        _experiment(
            "READING",
            "A: effect of a unit given the evidence. B: effect of the evidence given that the unit is set.",
        ),
    ] = "A"
    level: Annotated[float, _experiment("SHARE", "Of the intervals.", parser=open_share)] = 0.95
    fdr: Annotated[float, _experiment("RATE", "False discovery rate over the units.", parser=open_share)] = 0.05
    top: Annotated[int, _experiment("N", "Units in the tables and plots.", parser=count)] = 20
    tables: Tables = "csv"
    out: Annotated[Path, _run("DIR", "Folder of the page.")] = Path("ce-plugin-expected-report")
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class ExperimentOptions:
    r"""Run an experiment of the paper, or one of your own, from its data to a table and a page.

    A recipe is a TOML file: data, network (trained where it says so), sites, evidence and questions. Every number has
    an interval.

    examples:
      ce-plugin experiment --list
      ce-plugin experiment table3 --data data --out table3
      ce-plugin experiment table3 --data data --images 500 --out try
      ce-plugin experiment table3 --print > mine.toml
      ce-plugin experiment ./mine.toml --data data --out mine --resume
      ce-plugin experiment table4-vgg16 --data data --weights vgg16.pth

    In the folder: experiment.html (a page), experiment.md, .csv and .json (the
    numbers), nodes.csv (every node), plots/, the trained network and autoencoders,
    tables/ (the effects of every image; see ce-plugin expected show),
    manifest.json. An experiment that was interrupted, or killed, goes on with
    --resume, also with more --images.
    """

    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a .toml file.", show_default=False)
    ] = None
    data: Annotated[Path, _experiment("DIR", "Folder of data sets.", envvar="CE_PLUGIN_DATA", shown="data")] = Path(
        "data"
    )
    images: Annotated[
        int | None, _experiment("N", "Take N images only, drawn at random.", parser=count, shown="as the recipe says")
    ] = None
    weights: Annotated[str | None, _experiment("FILE", "Weights of the network.", shown="as the recipe says")] = None
    list: Annotated[bool, _run("", "List the recipes.", "--list")] = False
    print: Annotated[bool, _run("", "Print the recipe.", "--print")] = False
    engine: Annotated[Literal["local", "ray"], _run("ENGINE", "local: this process; ray: workers of Ray Data.")] = (
        "local"
    )
    workers: Annotated[int, _run("N", "Workers of Ray.", parser=count)] = 2
    resume: Annotated[bool, _run("", "Go on with a run of the same recipe.", "--resume")] = False
    tables: Tables = "csv"
    out: Out = Path("ce-plugin-experiment")
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class CompareOptions(NetworkOptions):
    r"""Compare attribution methods on pictures of a data set: a table with intervals, passes and seconds.

    DATA is a folder of pictures, a Parquet file or a folder of them, torchvision:NAME:SPLIT, or MODULE:FUNCTION that
    returns a data set. The class that is explained is each picture's own answer.

    examples:
      ce-plugin compare photos --images 20
      ce-plugin compare photos --methods causal-effect,grad-cam,occlusion \
          --measures faithfulness,pointing,stability --passes 100
      ce-plugin compare photos --methods all --images 100 --out table --resume
      ce-plugin compare xrays --model nets.py:chest --outcome sigmoid \
          --measures boxes --boxes boxes.csv

    methods: causal-effect, random-mask, causal-effect-map, saliency,
      smoothgrad, input-x-gradient, integrated-gradients, grad-cam, occlusion,
      rise, kernel-shap, lime; with pytorch-grad-cam installed also
      ablation-cam and score-cam; the baselines random and centre are always
      there.

    measures: faithfulness (insertion and deletion), pointing (mosaics of
      four), boxes, infidelity, sensitivity, randomisation, stability (FGSM).

    The methods are compared with the first one, paired on the same pictures.
    In the folder: compare.html (a page), compare.csv (a row for each measure and
    method), images.csv (a row for each picture and method), compare.json,
    records.jsonl (what --resume goes on from; a run may also be given more
    pictures or methods), manifest.json. What the measures say, and do not: docs,
    "Comparing methods".
    """

    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder, Parquet, torchvision:NAME or MODULE:FUNCTION.")]
    root: Annotated[Path, _experiment("DIR", "Where torchvision keeps its data sets.")] = Path("data")
    methods: Annotated[
        Any,
        _experiment("METHOD,...", "Which methods; or all.", parser=names, shown="all that need no other package"),
    ] = None
    measures: Annotated[
        Any, _experiment("MEASURE,...", "How they are judged; or all.", parser=names, shown="faithfulness,pointing")
    ] = None
    images: Annotated[int, _experiment("N", "How many pictures, in a random order.", parser=count)] = 100
    passes: Annotated[
        int, _experiment("N", "Forward passes of a map, for methods that do as many as they are told.", parser=count)
    ] = 400
    planted: Annotated[int, _experiment("N", "Planted scenes, whose truth is known; 0 for none.", parser=natural)] = 20
    outcome: Annotated[
        Literal["probability", "sigmoid"],
        _experiment("OUTCOME", "What turns logits into scores: probability (softmax), or sigmoid."),
    ] = "probability"
    boxes: Annotated[
        Path | None,
        _experiment(
            "CSV", "Table with the columns file, x, y, width and height, in pixels of the file, of what is explained."
        ),
    ] = None
    strict: Annotated[bool, _run("", "Stop at the first picture that cannot be read.", "--strict")] = False
    resume: Annotated[bool, _run("", "Go on with a run of the same options.", "--resume")] = False
    seed: Seed = 0
    tables: Tables = "csv"
    out: Out = Path("ce-plugin-compare")
    force: Force = False
    quiet: Quiet = False


_GO_ON = (ExpectedOptions, ExperimentOptions, CompareOptions)
"""Whose folders may hold a run that is gone on with."""


# --- the commands


class _RunUnlessNamed(TyperGroup):
    """``expected DATA`` is ``expected run DATA``, where DATA is no command of the group."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


class _SeveralValues(TyperCommand):
    """A command of ``detect``, whose --attacks and --eps take several values at once: ``--eps 2/255 8/255``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        option = ""
        for word in args:
            if word.startswith("-"):
                option = word if word in ("--attacks", "--eps") else ""
            elif option and given[-1] != option:
                given.append(option)
            given.append(word)
        return super().parse_args(ctx, given)


def _help_and_epilog(described: object) -> tuple[str, str]:
    """From a docstring: its examples, and all that follows them, are shown below the options."""
    # The terminal wraps prose; indented lines stay as they are.
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", getdoc(described) or "")
    summary, examples, rest = text.partition("examples:\n")
    return summary.strip(), f"{examples}{rest}"


def _command(group: typer.Typer, name: str, options: type[Any], runner: str) -> None:
    """Add a command: its options are the fields of a dataclass, it is run by ``runner``, "module:function".

    An error that can be put right becomes one line and an exit code.
    """

    module, _, function = runner.partition(":")

    def call(context: typer.Context, config: Path | None = None, **values: Any) -> None:
        given = options(**values)
        _keep_freed_memory()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                run = getattr(importlib.import_module(f"ce_plugin.cli.{module}"), function)
                files = importlib.import_module("ce_plugin.files")
                files.check_tables(getattr(given, "tables", "csv"))
                replaced = given.force or (getattr(given, "resume", False) is True and options in _GO_ON)
                only_shows = options is ExperimentOptions and (given.list or given.print or given.recipe is None)
                place = (
                    nullcontext()
                    if only_shows
                    else files.reserved(given.out, folder=hints["out"] is not OutFile, force=replaced)
                )
                with place:
                    unreadable = run(given, context.obj)
                    if not only_shows and hints["out"] is not OutFile:
                        _write_config(given, context.command_path)
        except CEPluginError as error:
            sys.stderr.write(f"ce-plugin: error: {error}\n")
            raise typer.Exit(1) from None
        except (MemoryError, RuntimeError) as error:
            if not _is_about_memory(error):
                raise
            hint = "Take a smaller --size, a smaller network, or a machine with more memory."
            sys.stderr.write(f"ce-plugin: error: not enough memory ({' '.join(str(error).split())[:200]}). {hint}\n")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            sys.stderr.write("ce-plugin: interrupted\n")
            raise typer.Exit(130) from None
        if unreadable:
            raise typer.Exit(3)

    hints = get_type_hints(options, include_extras=True)
    parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for one in fields(options):
        default = Parameter.empty if one.default is MISSING else one.default
        parameters.append(Parameter(one.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[one.name]))
    parameters.append(Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=Config))
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    text, epilog = _help_and_epilog(options)
    group.command(name, cls=_SeveralValues if group is _detect else None, help=text, epilog=epilog)(call)


CONFIG = "run.toml"
"""Name of the file that a run leaves beside its results, for ``--config``."""


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Options from a TOML file; those on the command line come before them."""
    if file is None:
        return None
    # Imported here, as is typer's rule for what only some commands need.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file} cannot be read as TOML ({error})") from None
    known = {parameter.name for parameter in context.command.params} - {"config"}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise typer.BadParameter(f"{file}: {unknown[0]!r} is no option of {context.command_path}")
    context.default_map = values
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help=f"TOML file of options, as a run leaves it in its folder ({CONFIG}). The command line counts more.",
        is_eager=True,
        callback=_read_config,
        rich_help_panel="The run",
    ),
]


def _write_config(given: Any, command: str) -> None:
    """Leave the options of a run in its folder, from which ``--config`` runs it again."""
    from ce_plugin.files import written_whole

    lines = [f"# {command} --config {CONFIG} --out ANOTHER_FOLDER"]
    for one in fields(given):
        value = getattr(given, one.name)
        if value is None or one.name in ("out", "force") or value == one.default:
            continue
        lines.append(f"{one.name} = {_toml(value)}")
    # Names of files may be bytes that are no text; they come back as they were.
    with written_whole(Path(given.out) / CONFIG) as stream:
        stream.write(("\n".join(lines) + "\n").encode("utf-8", errors="surrogateescape"))


def _toml(value: object) -> str:
    """A value as TOML, in the form in which the command line takes it."""
    if isinstance(value, MeanStd):
        return json.dumps("/".join(",".join(map(repr, part)) for part in value))
    if isinstance(value, ValueRange):
        return json.dumps(f"{value.low!r},{value.high!r}")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, tuple):
        return json.dumps(",".join(map(str, value)))
    return repr(value) if isinstance(value, (int, float)) else json.dumps(str(value), ensure_ascii=False)


def _is_about_memory(error: Exception) -> bool:
    """Whether memory did not suffice, on the CPU or a device."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ce-plugin {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Which parts of a picture, and which parts of a network, cause its answer?

    ce-plugin covers patches of a photograph, sets channels of a layer, watches what the network answers, and writes
    maps, tables and a report: clean and under attack, beside Grad-CAM and saliency.

    examples:
      ce-plugin demo
      ce-plugin explain cat.jpg
      ce-plugin explain cat.jpg dog.jpg --model torchvision:resnet50 --attack pgd
      ce-plugin nodes cat.jpg --given pgd
      ce-plugin map cat.jpg --contrast "tiger cat"
      ce-plugin concepts train photographs --concepts 64 --out concepts.pt
      ce-plugin concepts show concepts.pt --images photographs
      ce-plugin detect fit photographs --out detector.ce
      ce-plugin detect score inbox --detector detector.ce
      ce-plugin expected photographs --layer _bn1 --given clean,fgsm
      ce-plugin expected show ce-plugin-expected
      ce-plugin experiment table3 --data data
      ce-plugin doctor              what this machine and environment can do
      ce-plugin explain --help      all options of a command

    exit codes:
      0 done; 1 something to put right, the message says what;
      2 the command line was not understood; 3 done, but for
      pictures that could not be read; 130 interrupted
    """


_text, _epilog = _help_and_epilog(_root)
_settings = {"help_option_names": ["--help", "-h"]}
app = typer.Typer(
    callback=_root, help=_text, epilog=_epilog, context_settings=_settings, pretty_exceptions_enable=False
)
_concepts = typer.Typer(help="A few concepts in place of a layer's many channels: train them, and look at them.")
_expected = typer.Typer(cls=_RunUnlessNamed, help="Effects over a data set: a table of all images, and its answers.")
_detect = typer.Typer(help="Tell attacked pictures from clean ones, and say why.")

_command(app, "demo", DemoOptions, "_explain:demo")
_command(app, "explain", ExplainOptions, "_explain:explain")
_command(app, "nodes", NodesOptions, "_nodes:nodes")
_command(app, "map", MapOptions, "_nodes:draw_map")
_command(app, "experiment", ExperimentOptions, "_experiment:run")
_command(app, "compare", CompareOptions, "_compare:run")
_command(_concepts, "train", TrainOptions, "_concepts:train")
_command(_concepts, "show", ShowOptions, "_concepts:show")
_command(_detect, "fit", FitOptions, "_detect:fit")
_command(_detect, "score", ScoreOptions, "_detect:score")
_command(_detect, "evaluate", EvaluateOptions, "_detect:evaluate")
_command(_expected, "run", ExpectedOptions, "_expected:run")
_command(_expected, "show", ExpectedShowOptions, "_expected:show")


@app.command("doctor")
def _doctor() -> None:
    """Say what this machine and environment can do: versions, devices, memory, optional packages, data."""
    from ce_plugin.cli._doctor import examined

    typer.echo(examined())


app.add_typer(_expected, name="expected")
app.add_typer(_concepts, name="concepts")
app.add_typer(_detect, name="detect")


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; see :func:`ce_plugin.cli.main`."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        typer.main.get_command(app)(given, prog_name="ce-plugin", obj=given)
    except SystemExit as ended:
        return int(ended.code or 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        drop_output(error)  # help or version to a full or broken device
        return 1
    return 0


def drop_output(error: Exception) -> None:
    """Write to nowhere from now on, for standard output cannot be written; also what Python writes at its end."""
    if not isinstance(error, BrokenPipeError):
        sys.stderr.write(f"ce-plugin: warning: standard output cannot be written ({error})\n")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A warning as one line, without the line of code that gave it."""
    sys.stderr.write(f"ce-plugin: warning: {message}\n")


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: convolutions on a CPU then run up to twice as fast (docs/performance.md)."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
