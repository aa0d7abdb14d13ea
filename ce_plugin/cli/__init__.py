"""The command ``ce-plugin``: explain photographs from a terminal, and get a report.

Exit codes: 0 when all went well, 1 for something that can be put right (a message says what), 2 for a command line
that is not understood, 130 after an interrupt.
"""

from ce_plugin.cli._commands import app, main

__all__ = ["app", "main"]
