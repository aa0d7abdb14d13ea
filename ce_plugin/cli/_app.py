"""The commands: what each is called, which options it takes, where it is run."""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from inspect import Parameter, Signature, getdoc
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand

from ce_plugin._version import __version__
from ce_plugin.cli import _options
from ce_plugin.errors import CEPluginError


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
    """Add a command: its options are the fields of a dataclass, it is run by ``runner``, which is imported then."""

    def call(context: typer.Context, **values: Any) -> None:
        _run(runner, options(**values), context.obj)

    hints = get_type_hints(options, include_extras=True)
    parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for one in fields(options):
        default = Parameter.empty if one.default is MISSING else one.default
        parameters.append(Parameter(one.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[one.name]))
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    text, epilog = _help_and_epilog(options)
    group.command(name, cls=_SeveralValues if group is _detect else None, help=text, epilog=epilog)(call)


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
      ce-plugin explain --help      all options of a command

    exit codes:
      0 done; 1 something to put right, the message says what;
      2 the command line was not understood; 130 interrupted
    """


_text, _epilog = _help_and_epilog(_root)
_settings = {"help_option_names": ["--help", "-h"]}
app = typer.Typer(
    callback=_root, help=_text, epilog=_epilog, context_settings=_settings, pretty_exceptions_enable=False
)
_concepts = typer.Typer(help="A few concepts in place of a layer's many channels: train them, and look at them.")
_detect = typer.Typer(help="Tell attacked pictures from clean ones, and say why.")

_command(app, "demo", _options.DemoOptions, "_explain:demo")
_command(app, "explain", _options.ExplainOptions, "_explain:explain")
_command(app, "nodes", _options.NodesOptions, "_nodes:nodes")
_command(app, "map", _options.MapOptions, "_nodes:draw_map")
_command(_concepts, "train", _options.TrainOptions, "_concepts:train")
_command(_concepts, "show", _options.ShowOptions, "_concepts:show")
_command(_detect, "fit", _options.FitOptions, "_detect:fit")
_command(_detect, "score", _options.ScoreOptions, "_detect:score")
_command(_detect, "evaluate", _options.EvaluateOptions, "_detect:evaluate")
app.add_typer(_concepts, name="concepts")
app.add_typer(_detect, name="detect")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows ``ce-plugin`` on the command line; None means that of the terminal.

    Returns:
        The exit code: 0 done, 1 something to put right, 2 the command line was not understood, 130 interrupted.

    Example:
        >>> main(["explain", "no-such-picture.jpg", "--quiet"])
        1
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        typer.main.get_command(app)(given, prog_name="ce-plugin", obj=given)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _run(runner: str, options: Any, argv: list[str]) -> None:
    """Run "module:function"; an error that can be put right becomes one line and an exit code."""
    module, _, function = runner.partition(":")
    _keep_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            getattr(importlib.import_module(f"ce_plugin.cli.{module}"), function)(options, argv)
    except CEPluginError as error:
        sys.stderr.write(f"ce-plugin: error: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("ce-plugin: interrupted\n")
        raise typer.Exit(130) from None


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
