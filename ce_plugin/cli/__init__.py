"""The command ``ce-plugin``: explain photographs from a terminal, and get a report.

Exit codes: 0 when all went well, 1 for something that can be put right (a message says what), 2 for words on the
command line that are not understood, 130 after an interrupt.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from ce_plugin.cli._app import build_parser
from ce_plugin.errors import CEPluginError

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``ce-plugin``; None means those of the terminal.

    Returns:
        The exit code.

    Raises:
        SystemExit: by argparse, with 0 after ``--help`` and ``--version`` and 2 for words that are not understood.

    Example:
        >>> main(["explain", "no-such-picture.jpg", "--quiet"])
        1
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(words)
    # Imported late: the help and a typing mistake shall not wait for networks and attacks.
    from ce_plugin.cli.run import run

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return run(arguments, words)
    except CEPluginError as error:
        sys.stderr.write(f"ce-plugin: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("ce-plugin: interrupted\n")
        return 130


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A warning as one line, without the line of code that gave it."""
    sys.stderr.write(f"ce-plugin: warning: {message}\n")
