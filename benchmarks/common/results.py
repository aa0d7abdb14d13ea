"""Writing results, with the machine, the versions and the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def machine(*packages: str) -> str:
    """One line: processor, cores, threads, versions."""
    names = ("torch", "torchvision", "captum", *packages)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    processor = platform.processor() or platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def write(name: str, text: str, data: dict[str, Any], *packages: str) -> None:
    """``results/NAME.md`` for people and ``results/NAME.json`` for programs, with machine, date and command."""
    script = Path(sys.argv[0]).resolve()
    parts = script.relative_to(ROOT.parent).with_suffix("").parts if script.is_relative_to(ROOT) else (script.stem,)
    command = shlex.join(["python", "-m", ".".join(parts), *sys.argv[1:]])
    record = {"machine": machine(*packages), "date": datetime.date.today().isoformat(), "command": command, **data}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    foot = f"\n{record['machine']}. {record['date']}. Command: `{command}`.\n"
    (RESULTS / f"{name}.md").write_text(text.rstrip() + "\n" + foot)
