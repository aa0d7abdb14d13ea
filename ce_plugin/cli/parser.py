"""The words of the command line and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from ce_plugin._version import __version__

__all__ = ["DEFAULT_MODEL", "build_parser"]

DEFAULT_MODEL = "ce_plugin.models:efficientnet_lite0"

_DESCRIPTION = """\
Which parts of a picture cause a network's answer? ce-plugin covers patches of the photograph, watches what the
network answers, and writes a report with maps: clean and under attack, beside Grad-CAM and saliency."""

_EPILOG = """\
examples:
  ce-plugin demo
      two photographs that are installed with scikit-learn, explained under four attacks, in about a minute
  ce-plugin explain cat.jpg
      your own photograph, with the same network
  ce-plugin explain cat.jpg dog.jpg --model torchvision:resnet50 --attack pgd --attack jsma
      another network (torchvision downloads its weights once), and two attacks
  ce-plugin explain --help
      all options

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


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ce-plugin``.

    Example:
        >>> build_parser().parse_args(["explain", "cat.jpg", "--eps", "8/255"]).eps
        0.03137254901960784
    """
    parser = argparse.ArgumentParser(
        "ce-plugin", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ce-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="explain two photographs, clean and under four attacks",
        description="Explain scikit-learn's two photographs with EfficientNet-lite0, clean and under FGSM, BIM, PGD "
        "and JSMA. Nothing is downloaded.",
    )
    _report_options(demo, out="ce-plugin-demo", trials=200)
    explain = commands.add_parser(
        "explain",
        help="explain your own photographs",
        description="Explain photographs: which patches cause the network's answer?",
        epilog=_EXPLAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files (JPEG, PNG, WebP ...)")
    _network_options(explain.add_argument_group("the network"))
    _question_options(explain.add_argument_group("the question"))
    _report_options(explain, out="ce-plugin-report", trials=400)
    return parser


def _network_options(group: argparse._ArgumentGroup) -> None:
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
    group.add_argument("--size", type=_count, metavar="PIXELS", help="of the square that your own network sees (224)")
    group.add_argument(
        "--normalization",
        type=_normalization,
        metavar="MEAN/STD",
        help="what your own network expects: (value - MEAN) / STD, numbers per channel separated by commas, for "
        "example 0.485,0.456,0.406/0.229,0.224,0.225",
    )
    group.add_argument(
        "--value-range",
        type=_pair,
        metavar="LOW,HIGH",
        help="what black and white are before --normalization, for your own network (0,1)",
    )
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps ...")


def _question_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target", metavar="CLASS", help="name or index of the class to explain; default: the network's own answer"
    )
    group.add_argument(
        "--layer",
        metavar="NAME",
        help="dotted name of the layer at which Grad-CAM looks; default: the last convolution",
    )
    group.add_argument(
        "--attack",
        action="append",
        choices=("none", "fgsm", "bim", "pgd", "jsma"),
        help="explain the photograph under this attack as well; may be given several times (default: none)",
    )
    group.add_argument(
        "--eps",
        type=_share,
        default=8 / 255,
        metavar="SHARE",
        help="size of FGSM, BIM and PGD: largest change of a value, as a share of the range; default 8/255",
    )
    group.add_argument(
        "--design",
        choices=("regions", "random-mask", "one-at-a-time", "leave-one-in"),
        default="regions",
        help="which patches are covered in a trial: random coherent regions (default; smooth maps from few trials), "
        "random single patches, one patch, or all but one; the first two have standard errors",
    )
    group.add_argument(
        "--mask-share",
        type=_open_share,
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
        type=_count,
        metavar="N",
        help="cut the photograph into N x N patches; default 14, and 10 for random-mask, whose patches are estimated "
        "one by one; regions know 14 only",
    )
    group.add_argument(
        "--outcome",
        choices=("log_odds", "probability", "logit", "margin"),
        default="log_odds",
        help="what is measured; default log_odds, which also moves where a probability is next to 0 or 1",
    )


def _report_options(parser: argparse.ArgumentParser, *, out: str, trials: int) -> None:
    group = parser.add_argument_group("the run and the report")
    group.add_argument(
        "--trials",
        type=_count,
        default=trials,
        metavar="N",
        help=f"trials per picture and attack; more make more patches significant, and take longer; default {trials}",
    )
    group.add_argument("--seed", type=int, default=0, help="of everything random; default 0")
    group.add_argument(
        "--out", type=Path, default=Path(out), metavar="DIR", help=f"folder of the report; default {out}"
    )
    group.add_argument("--force", action="store_true", help="replace a report that is already there")
    group.add_argument("--quiet", action="store_true", help="no progress bar and no summary, only where the report is")


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def _share(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / (float(bottom) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share in (0, 1]: write 8/255 or 0.3, for example")
    return value


def _open_share(text: str) -> float:
    value = _share(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 covers everything in every trial: write 0.1, for example")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number, or numbers separated by commas") from None


def _normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, slash, std = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{text} is not MEAN/STD: write 127/128, or three numbers each with commas")
    return _numbers(mean), _numbers(std)


def _pair(text: str) -> tuple[float, float]:
    values = _numbers(text)
    if len(values) != 2 or not values[0] < values[1]:
        raise argparse.ArgumentTypeError(f"{text} is not LOW,HIGH: write 0,255, for example")
    return values[0], values[1]
