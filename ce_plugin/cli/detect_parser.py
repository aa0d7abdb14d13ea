"""The words of ``ce-plugin detect``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ce_plugin.cli import _options as options
from ce_plugin.cli import values

__all__ = ["add_detect"]

_ATTACKS = ("fgsm", "bim", "pgd", "jsma")

_FIT_EPILOG = """\
examples:
  ce-plugin detect fit photographs --out detector.ce
  ce-plugin detect fit digits --model my_networks:digits --size 28 --grayscale --out digits.ce
  ce-plugin detect fit digits --model my_networks:digits --size 28 --grayscale --hardened --out digits.ce
  ce-plugin detect fit photographs --attacks fgsm --eps 2/255 --out detector.ce
  ce-plugin detect fit pictures --labels labels.csv --out detector.ce

Clean pictures are enough: of the kind that the network will see, of several classes, at least 75 and better a
thousand; about 500 held out for the threshold hold a false-alarm rate of 5 % to within two points. What it was fitted
with is in FILE.json."""

_SCORE_EPILOG = """\
examples:
  ce-plugin detect score inbox --detector detector.ce
  ce-plugin detect score one.png two.png --detector detector.ce --fpr 0.01 --out alarms
  ce-plugin detect score inbox --detector resnet.ce --model torchvision:resnet50 --layer layer4

In the folder: alarms.html (a page: the flagged pictures and why), scores.csv (a row for each picture: file, score,
p_value, flagged, predicted, class_name, and each verdict), manifest.json."""

_EVALUATE_EPILOG = """\
examples:
  ce-plugin detect evaluate unseen --detector detector.ce
  ce-plugin detect evaluate unseen --detector detector.ce --attacks pgd jsma --eps 2/255 8/255 --truth classes.csv
  ce-plugin detect evaluate unseen --detector detector.ce --attacks adaptive --eps 4/255 --limit 50

In the folder: evaluation.html (tables, curves, examples), evaluation.csv (a row for each attack), manifest.json.
Take pictures that detect fit was not given: those that it learned from are refused, and those that set the threshold
flatter the false alarms. The adaptive attack knows the detector and looks for pictures that fool it as well; it takes
up to four thousand steps through network and detector for each picture."""


def add_detect(commands: Any) -> None:
    """Add ``detect fit``, ``detect score`` and ``detect evaluate`` to the commands."""
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    detect = commands.add_parser(
        "detect",
        help="tell attacked pictures from clean ones, and say why",
        description="A detector of adversarial pictures: it intervenes on a picture and asks whether the network's "
        "answer moves as it does on clean ones.",
    )
    actions = detect.add_subparsers(dest="action", required=True, metavar="ACTION")
    _fit(
        actions.add_parser(
            "fit",
            help="learn what clean pictures are like",
            description="Fit a detector to clean pictures, and set its threshold on some that are held out; the "
            "network itself is not changed.",
            epilog=_FIT_EPILOG,
            **shape,
        )
    )
    _score(
        actions.add_parser(
            "score",
            help="judge pictures: a table, and a page that explains each alarm",
            description="Judge pictures. Flagged are those that differ from clean ones more than the share --fpr of "
            "clean pictures does.",
            epilog=_SCORE_EPILOG,
            **shape,
        )
    )
    _evaluate(
        actions.add_parser(
            "evaluate",
            help="attack clean pictures, and see what the detector notices",
            description="Attack clean pictures that the detector was not fitted on, and count the successful attacks "
            "that it flags, and the clean pictures.",
            epilog=_EVALUATE_EPILOG,
            **shape,
        )
    )


def _images(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGES", help=f"{what}: files, or folders, searched to their bottom"
    )


def _fit(parser: argparse.ArgumentParser) -> None:
    _images(parser, "clean pictures")
    options.network_options(parser)
    group = parser.add_argument_group("the detector")
    group.add_argument("--grayscale", action="store_true", help="the network takes one channel, not three")
    _fpr(group, 0.05, "share of clean pictures that may be flagged; default 0.05")
    group.add_argument(
        "--held-out",
        type=values.open_share,
        default=0.3,
        metavar="SHARE",
        help="share of the clean pictures that set the threshold and are not learned from; default 0.3",
    )
    group.add_argument(
        "--attacks",
        nargs="+",
        choices=_ATTACKS,
        metavar="ATTACK",
        help="learn from these attacks on the pictures as well: fgsm, bim, pgd, jsma; default: from clean ones only",
    )
    _eps(group)
    group.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="a table with the columns file and label, 0 or clean, 1 or adversarial, where some of the pictures are "
        "attacked ones to learn from; default: all are clean",
    )
    group.add_argument(
        "--hardened",
        action="store_true",
        help="for small pictures: prepare it for attackers who know it; fitting takes several times as long",
    )
    group.add_argument(
        "--epochs", type=values.count, default=20, metavar="N", help="of training the denoiser; default 20"
    )
    group = parser.add_argument_group("the run and the result")
    options.seed_option(group)
    group.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of the detector")
    group.add_argument("--force", action="store_true", help="replace FILE if there already")
    options.quiet_option(group)


def _score(parser: argparse.ArgumentParser) -> None:
    _images(parser, "pictures to judge")
    _detector(parser)
    options.network_options(parser)
    group = parser.add_argument_group("the question")
    _fpr(group, None, "flag this share of clean pictures; default: what the detector was fitted for")
    group.add_argument(
        "--explain", type=values.count, default=12, metavar="N", help="alarms that the page explains; default 12"
    )
    _layer(group)
    group = parser.add_argument_group("the run and the results")
    options.out_options(group, out="ce-plugin-alarms", what="the results")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _images(parser, "clean pictures")
    _detector(parser)
    options.network_options(parser)
    group = parser.add_argument_group("the question")
    group.add_argument(
        "--attacks",
        nargs="+",
        choices=(*_ATTACKS, "adaptive"),
        default=_ATTACKS,
        metavar="ATTACK",
        help="fgsm, bim, pgd, jsma, adaptive; default: the first four. Adaptive knows the detector",
    )
    _eps(group)
    group.add_argument(
        "--truth",
        type=Path,
        metavar="CSV",
        help="a table with the columns file and class (name or index): only what the network classifies correctly is "
        "attacked; default: its answers on the clean pictures count as correct",
    )
    _fpr(group, None, "flag this share of clean pictures; default: what the detector was fitted for")
    group.add_argument("--limit", type=values.count, metavar="N", help="take the first N pictures only")
    _layer(group)
    group = parser.add_argument_group("the run and the results")
    options.seed_option(group)
    options.out_options(group, out="ce-plugin-evaluation", what="the results")


def _detector(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detector", type=Path, required=True, metavar="FILE", help="what detect fit wrote")


def _fpr(group: argparse._ArgumentGroup, default: float | None, text: str) -> None:
    group.add_argument("--fpr", type=values.open_share, default=default, metavar="SHARE", help=text)


def _layer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--layer",
        metavar="NAME",
        help="dotted name of a layer: the channels that raise an alarm are named; default: none",
    )


def _eps(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--eps",
        nargs="+",
        type=values.share,
        metavar="SHARE",
        help="sizes of the attacks: largest change of a value, as a share of the range; default 8/255, and 0.1 for "
        "pictures of up to 64 pixels; JSMA has no size",
    )
