"""The scripts of the benchmarks: each can be imported and says what it takes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").rglob("*.py")
    if '\nif __name__ == "__main__":\n' in file.read_text(encoding="utf-8")
)


def test_there_are_scripts_and_none_is_a_helper() -> None:
    assert len(SCRIPTS) >= 16
    assert not [name for name in SCRIPTS if name.rpartition(".")[2].startswith("_")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out
