"""The words of ``ce-plugin concepts``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ce_plugin.cli import _options as options
from ce_plugin.cli import values

__all__ = ["add_concepts"]

_TRAIN_EPILOG = """\
examples:
  ce-plugin concepts train photographs --concepts 64 --out concepts.pt
  ce-plugin concepts train photographs --model torchvision:vgg16 --layer features.29 --concepts 32 --out vgg.pt
  ce-plugin concepts train photographs --concepts 64 --out concepts.pt --resume

After every epoch the state is written beside the file, as FILE.checkpoint. An interrupted training goes on from there
with the same words and --resume, as if it had not been interrupted. What it was trained with is in FILE.json."""

_SHOW_EPILOG = """\
examples:
  ce-plugin concepts show concepts.pt --images photographs
  ce-plugin concepts show vgg.pt --model torchvision:vgg16 --images photographs --top 8 --out vgg-concepts

In the folder: concepts.html (a page with its pictures inside), concepts.csv, manifest.json. Show photographs that the
training has not seen: fidelity on those that it was trained on flatters."""


def add_concepts(commands: Any) -> None:
    """Add ``concepts train`` and ``concepts show`` to the commands."""
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    concepts = commands.add_parser(
        "concepts",
        help="train an autoencoder whose code are concepts, and look at them",
        description="Concepts: a few maps in place of a layer's many channels, with effects of their own.",
    )
    actions = concepts.add_subparsers(dest="action", required=True, metavar="ACTION")
    _train(
        actions.add_parser(
            "train",
            help="train the autoencoder of a layer",
            description="Train the autoencoder of a layer; the network itself is not changed.",
            epilog=_TRAIN_EPILOG,
            **shape,
        )
    )
    _show(
        actions.add_parser(
            "show",
            help="show each concept: pictures, regions, effects on the classes",
            description="Fidelity of the autoencoder, dead and duplicated concepts, and for each concept the pictures "
            "and regions that activate it most and its effects on the classes.",
            epilog=_SHOW_EPILOG,
            **shape,
        )
    )


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES_DIR", help="folder of pictures, searched to its bottom")
    options.network_options(parser)
    group = parser.add_argument_group("the autoencoder")
    options.layer_option(group, "whose activations are coded")
    group.add_argument(
        "--concepts",
        type=values.count,
        required=True,
        metavar="K",
        help="channels of the code, fewer than the layer has",
    )
    group.add_argument(
        "--hidden", type=values.count, metavar="N", help="channels between; default: the geometric mean of both ends"
    )
    group.add_argument(
        "--kernel-size", type=values.count, default=3, metavar="N", help="of its convolutions, odd; default 3"
    )
    group = parser.add_argument_group("the training")
    group.add_argument("--epochs", type=values.count, default=50, metavar="N", help="at most so many; default 50")
    group.add_argument(
        "--patience",
        type=values.count,
        default=8,
        metavar="N",
        help="stop after so many epochs without improvement on the held-out pictures; default 8",
    )
    group.add_argument("--batch-size", type=values.count, default=32, metavar="N", help="pictures per step; default 32")
    group.add_argument(
        "--learning-rate", type=values.positive, default=1e-3, metavar="RATE", help="at the start; default 0.001"
    )
    group.add_argument(
        "--held-out",
        type=values.open_share,
        default=0.2,
        metavar="SHARE",
        help="share of the pictures that choose the epoch and measure the fidelity; default 0.2",
    )
    for name, default, what in (
        ("shallow", 1.0, "the reconstruction of the activations"),
        ("deep", 1.0, "the network's answers"),
        ("interpretability", 0.01, "a sparse and smooth code"),
    ):
        text = f"weight of {what} in the loss; default {default:g}"
        group.add_argument(f"--lambda-{name}", type=values.weight, default=default, metavar="WEIGHT", help=text)
    group = parser.add_argument_group("the run and the result")
    options.seed_option(group)
    group.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of the trained autoencoder")
    group.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    group.add_argument("--force", action="store_true", help="replace FILE, and begin again, if there already")
    options.quiet_option(group)


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="what concepts train wrote")
    options.network_options(parser)
    group = parser.add_argument_group("the question")
    group.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of pictures, searched to its bottom"
    )
    group.add_argument("--limit", type=values.count, metavar="N", help="look at the first N pictures only")
    group.add_argument("--top", type=values.count, default=5, metavar="N", help="examples of a concept; default 5")
    group.add_argument(
        "--min-fidelity",
        type=values.weight,
        default=0.9,
        metavar="SHARE",
        help="refuse an autoencoder that changes the answer on more than the rest of the held-out pictures; 0 takes "
        "any; default 0.9",
    )
    options.outcome_option(group, default="log_odds", why="which also moves where a probability is next to 0 or 1")
    group = parser.add_argument_group("the run and the results")
    options.out_options(group, out="ce-plugin-concepts", what="the results")
