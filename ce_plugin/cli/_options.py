"""Options that several commands share, so that one word means one thing in all of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ce_plugin.cli import values

__all__ = [
    "DEFAULT_MODEL",
    "attack_options",
    "intervention_options",
    "layer_option",
    "network_options",
    "out_options",
    "outcome_option",
    "seed_option",
    "target_option",
]

DEFAULT_MODEL = "ce_plugin.models:efficientnet_lite0"

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def network_options(parser: argparse.ArgumentParser) -> None:
    """Which network, and how it wants to be fed."""
    group = parser.add_argument_group("the network")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="torchvision:NAME (for example torchvision:resnet50), or MODULE:FACTORY for your own; default: "
        "EfficientNet-lite0, which needs no download",
    )
    group.add_argument(
        "--weights",
        default="DEFAULT",
        metavar="FILE",
        help="DEFAULT: torchvision's own, or what the factory sets; or a file of torch.save(model.state_dict(), FILE)",
    )
    group.add_argument(
        "--class-names", type=Path, metavar="FILE", help="a text file with one class name per line, in order"
    )
    group.add_argument(
        "--size", type=values.count, metavar="PIXELS", help="of the square that your own network sees (224)"
    )
    group.add_argument(
        "--normalization",
        type=values.normalization,
        metavar="MEAN/STD",
        help="what your own network expects: (value - MEAN) / STD, numbers per channel separated by commas, for "
        "example 0.485,0.456,0.406/0.229,0.224,0.225",
    )
    group.add_argument(
        "--value-range",
        type=values.pair,
        metavar="LOW,HIGH",
        help="what black and white are before --normalization, for your own network (0,1)",
    )
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps ...")


def target_option(group: Parser) -> None:
    """The class that is asked about."""
    group.add_argument(
        "--target", metavar="CLASS", help="name or index of the class to explain; default: the network's own answer"
    )


def layer_option(group: Parser, what: str) -> None:
    """The layer; ``what`` says what happens there."""
    group.add_argument(
        "--layer", metavar="NAME", help=f"dotted name of the layer {what}; default: the last convolution"
    )


def attack_options(group: Parser) -> None:
    """An attack as evidence, and its size."""
    group.add_argument(
        "--given",
        choices=("fgsm", "bim", "pgd", "jsma"),
        help="put what is found on the photograph under this attack beside what is found on the clean one",
    )
    eps_option(group)


def eps_option(group: Parser) -> None:
    """The size of an attack."""
    group.add_argument(
        "--eps",
        type=values.share,
        default=8 / 255,
        metavar="SHARE",
        help="size of FGSM, BIM and PGD: largest change of a value, as a share of the range; default 8/255",
    )


def intervention_options(group: Parser) -> None:
    """What a channel is set to."""
    group.add_argument(
        "--intervention",
        choices=("zero", "mean", "resample"),
        default="zero",
        help="what a channel is set to: zero (default, the paper's Z0), its mean over the pictures of --reference, or "
        "its value in one of them",
    )
    group.add_argument(
        "--reference", type=Path, metavar="DIR", help="folder of the pictures that --intervention mean or resample uses"
    )


def outcome_option(group: Parser, *, default: str, why: str) -> None:
    """What is measured."""
    group.add_argument(
        "--outcome",
        choices=("log_odds", "probability", "logit", "margin"),
        default=default,
        help=f"what is measured; default {default}, {why}",
    )


def seed_option(group: Parser) -> None:
    """The seed."""
    group.add_argument("--seed", type=int, default=0, help="of everything random; default 0")


def out_options(group: Parser, *, out: str, what: str) -> None:
    """The folder of the results; ``what`` names them."""
    group.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"folder of {what}; default {out}")
    group.add_argument("--force", action="store_true", help=f"replace {what} if there already")
    quiet_option(group)


def quiet_option(group: Parser) -> None:
    """No words but the last."""
    group.add_argument("--quiet", action="store_true", help="no progress and no summary, only where the result is")
