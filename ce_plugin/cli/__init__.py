"""The command ``ce-plugin``: explain photographs from a terminal, and get a report.

Exit codes: 0 when all went well, 1 for something that can be put right (a message says what), 2 for a command line
that is not understood, 3 when all went well but for pictures that could not be read, 130 after an interrupt.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ce_plugin._lazy import lazy_names

__all__ = ["app", "main"]

if TYPE_CHECKING:
    from ce_plugin.cli._commands import app
else:
    __getattr__, __dir__ = lazy_names(__name__, {"app": "ce_plugin.cli._commands"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows ``ce-plugin`` on the command line; None means that of the terminal.

    Returns:
        The exit code: 0 done, 1 something to put right, 2 the command line was not understood, 3 done but for pictures
        that could not be read, 130 interrupted.

    Example:
        >>> main(["explain", "no-such-picture.jpg", "--quiet"])
        1
    """
    # A stream that was closed is None.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        # Imported only here, so that an interrupt while this happens is one too.
        from ce_plugin.cli._commands import run

        with _ended_as_if_interrupted():
            return run(argv)
    except KeyboardInterrupt:
        sys.stderr.write("ce-plugin: interrupted\n")
        return 130


@contextmanager
def _ended_as_if_interrupted() -> Iterator[None]:
    """Whoever ends the process, or closes its terminal, interrupts it: so it keeps what is finished and cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    named = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # What is ignored, as nohup has it, stays so.
    before = {one: signal.getsignal(one) for one in named if signal.getsignal(one) == signal.SIG_DFL}
    for one in before:
        signal.signal(one, signal.default_int_handler)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
