"""The commands and their words."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ce_plugin._version import __version__
from ce_plugin.cli import _options as options
from ce_plugin.cli import values
from ce_plugin.cli._options import DEFAULT_MODEL
from ce_plugin.cli.concept_parser import add_concepts
from ce_plugin.cli.detect_parser import add_detect

__all__ = ["DEFAULT_MODEL", "build_parser"]

_DESCRIPTION = """\
Which parts of a picture, and which parts of a network, cause its answer? ce-plugin covers patches of the photograph,
sets channels of a layer, watches what the network answers, and writes maps, tables and a report: clean and under
attack, beside Grad-CAM and saliency."""

_EPILOG = """\
examples:
  ce-plugin demo
      two photographs that are installed with scikit-learn, explained under four attacks, and a detector
      tried on handwritten digits, in little more than a minute
  ce-plugin explain cat.jpg
      your own photograph, with the same network
  ce-plugin explain cat.jpg dog.jpg --model torchvision:resnet50 --attack pgd --attack jsma
      another network (torchvision downloads its weights once), and two attacks
  ce-plugin nodes cat.jpg --given pgd
      which channels of the last convolution cause the answer, and which carry an attack
  ce-plugin map cat.jpg --contrast "tiger cat"
      where the channels are that say "tabby" rather than "tiger cat"
  ce-plugin concepts train photographs --concepts 64 --out concepts.pt
      a few concepts in place of a layer's many channels; then: ce-plugin concepts show concepts.pt --images photographs
  ce-plugin detect fit photographs --out detector.ce
      learn what clean pictures are like; then: ce-plugin detect score inbox --detector detector.ce
  ce-plugin explain --help
      all options of a command

exit codes: 0 done; 1 something to put right, the message says what; 2 words not understood; 130 interrupted"""

_EXPLAIN_EPILOG = """\
examples:
  ce-plugin explain cat.jpg
  ce-plugin explain cat.jpg --model torchvision:resnet50 --target "tabby" --out cat-report
  ce-plugin explain leaf.png --model my_networks:leaves --weights leaves.pt --class-names leaves.txt \\
      --size 128 --normalization 0.485,0.456,0.406/0.229,0.224,0.225
  ce-plugin explain *.jpg --attack fgsm --attack pgd --eps 0.3 --out paper

A factory is a function without arguments that returns a torch.nn.Module or a ce_plugin.models.VisionModel.
The attacks' --eps is a share of the range from black to white. 8/255 changes a photograph hardly visibly; the 0.3 of
Yang et al. (2019) was meant for small pictures and destroys a photograph for the eye as well."""

_NODES_EPILOG = """\
examples:
  ce-plugin nodes cat.jpg
  ce-plugin nodes cat.jpg --layer _blocks.10 --target tabby --top 40
  ce-plugin nodes cat.jpg --model torchvision:vgg16 --layer features.29 --classes all
  ce-plugin nodes cat.jpg --given pgd --eps 2/255
  ce-plugin nodes cat.jpg --intervention mean --reference photographs

In the folder: nodes.csv (a row for each channel and class), nodes.png, manifest.json; with --given also carriers.csv,
the channels through which the attack's effect passes. Those are one image's effects: what holds over images,
ce_plugin.CausalMediation.carriers chooses on some images and tests on others."""

_MAP_EPILOG = """\
examples:
  ce-plugin map cat.jpg
  ce-plugin map cat.jpg --contrast others
  ce-plugin map cat.jpg --target tabby --contrast "tiger cat" --contrast lynx --given fgsm

In the folder: map.png (the map beside Grad-CAM), maps.npz (both as numbers, at the layer's own resolution and enlarged;
read it with numpy.load), manifest.json."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ce-plugin``.

    Example:
        >>> build_parser().parse_args(["explain", "cat.jpg", "--eps", "8/255"]).eps
        0.03137254901960784
    """
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("ce-plugin", description=_DESCRIPTION, epilog=_EPILOG, **shape)
    parser.add_argument("--version", action="version", version=f"ce-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _demo(
        commands.add_parser(
            "demo",
            help="explain two photographs under four attacks, and detect attacks on digits",
            description="Explain scikit-learn's two photographs with EfficientNet-lite0, clean and under FGSM, BIM, "
            "PGD and JSMA; and fit a detector that notices the same attacks on handwritten digits. Nothing is "
            "downloaded.",
        )
    )
    _explain(
        commands.add_parser(
            "explain",
            help="explain your own photographs",
            description="Explain photographs: which patches cause the network's answer?",
            epilog=_EXPLAIN_EPILOG,
            **shape,
        )
    )
    _nodes(
        commands.add_parser(
            "nodes",
            help="rank the channels of a layer, and those that carry an attack",
            description="Effects of all channels of a layer on the answer, each set by itself and exactly.",
            epilog=_NODES_EPILOG,
            **shape,
        )
    )
    _map(
        commands.add_parser(
            "map",
            help="draw the causal effect map of a layer beside Grad-CAM",
            description="The causal effect map of a layer: the channels' effects, laid where the channels are.",
            epilog=_MAP_EPILOG,
            **shape,
        )
    )
    add_concepts(commands)
    add_detect(commands)
    return parser


def _demo(parser: argparse.ArgumentParser) -> None:
    _report_options(parser, out="ce-plugin-demo", trials=200)


def _explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files (JPEG, PNG, WebP ...)")
    options.network_options(parser)
    group = parser.add_argument_group("the question")
    options.target_option(group)
    options.layer_option(group, "at which Grad-CAM looks and whose channels are set")
    group.add_argument(
        "--attack",
        action="append",
        choices=("none", "fgsm", "bim", "pgd", "jsma"),
        help="explain the photograph under this attack as well; may be given several times (default: none)",
    )
    options.eps_option(group)
    _trial_options(group)
    options.outcome_option(group, default="log_odds", why="which also moves where a probability is next to 0 or 1")
    _report_options(parser, out="ce-plugin-report", trials=400)


def _trial_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--design",
        choices=("regions", "random-mask", "one-at-a-time", "leave-one-in"),
        default="regions",
        help="which patches are covered in a trial: random coherent regions (default; smooth maps from few trials), "
        "random single patches, one patch, or all but one; the first two have standard errors",
    )
    group.add_argument(
        "--mask-share",
        type=values.open_share,
        metavar="P",
        help="share of the patches that a random trial covers; default 0.5 for regions, 0.1 for random-mask",
    )
    group.add_argument(
        "--fill",
        choices=("mixed", "blur", "zero", "mean", "noise"),
        default="mixed",
        help="what covers a patch: black, the mean colour and the blurred photograph in turn (mixed, the default), or "
        "one of them, or noise",
    )
    group.add_argument(
        "--grid",
        type=values.count,
        metavar="N",
        help="cut the photograph into N x N patches; default 14, and 10 for random-mask, whose patches are estimated "
        "one by one; regions know 14 only",
    )


def _report_options(parser: argparse.ArgumentParser, *, out: str, trials: int) -> None:
    group = parser.add_argument_group("the run and the report")
    group.add_argument(
        "--trials",
        type=values.count,
        default=trials,
        metavar="N",
        help=f"trials per picture and attack; more make more patches significant, and take longer; default {trials}",
    )
    options.seed_option(group)
    options.out_options(group, out=out, what="the report")


def _nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture file (JPEG, PNG, WebP ...)")
    options.network_options(parser)
    group = parser.add_argument_group("the question")
    options.layer_option(group, "whose channels are set")
    which = group.add_mutually_exclusive_group()
    options.target_option(which)
    which.add_argument(
        "--classes",
        type=values.classes,
        default=3,
        metavar="N",
        help="effects on the N most probable classes, or on all; default 3; the ranking is about the most probable",
    )
    options.attack_options(group)
    options.intervention_options(group)
    options.outcome_option(group, default="log_odds", why="which also moves where a probability is next to 0 or 1")
    group = parser.add_argument_group("the run and the results")
    group.add_argument(
        "--top", type=values.count, default=20, metavar="N", help="channels in the table and the plot; default 20"
    )
    options.seed_option(group)
    options.out_options(group, out="ce-plugin-nodes", what="the results")


def _map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture file (JPEG, PNG, WebP ...)")
    options.network_options(parser)
    group = parser.add_argument_group("the question")
    options.layer_option(group, "that the map is made of")
    options.target_option(group)
    group.add_argument(
        "--contrast",
        action="append",
        metavar="CLASS",
        help="rather than this class (name or index): its contributions are subtracted; several are averaged; others "
        "means all other classes",
    )
    group.add_argument(
        "--weighting",
        choices=("change", "activation"),
        default="change",
        help="where a channel's effect is laid: where setting it changes something (default), or where it is active",
    )
    options.attack_options(group)
    options.intervention_options(group)
    options.outcome_option(group, default="logit", why="because probabilities hide every class but the winner")
    group = parser.add_argument_group("the run and the results")
    options.seed_option(group)
    options.out_options(group, out="ce-plugin-map", what="the results")
