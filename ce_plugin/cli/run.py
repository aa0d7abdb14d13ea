"""Which function runs which command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ce_plugin.cli._session import keep_freed_memory

__all__ = ["run"]


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Run one command and return the exit code.

    Args:
        arguments: as parsed.
        words: as written, for the manifest.

    Raises:
        CEPluginError: for whatever can be put right.
    """
    keep_freed_memory()
    if arguments.command in ("demo", "explain"):
        from ce_plugin.cli._explain import demo, explain

        return (demo if arguments.command == "demo" else explain)(arguments, words)
    if arguments.command == "nodes":
        from ce_plugin.cli._nodes import nodes

        return nodes(arguments, words)
    if arguments.command == "map":
        from ce_plugin.cli.maps import draw_map

        return draw_map(arguments, words)
    if arguments.command == "detect":
        from ce_plugin.cli import _detect as detect

        actions = {"fit": detect.fit, "score": detect.score, "evaluate": detect.evaluate}
        return actions[arguments.action](arguments, words)
    from ce_plugin.cli._concepts import show, train

    return (train if arguments.action == "train" else show)(arguments, words)
