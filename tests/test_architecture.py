"""docs/architecture.md is true: packages, their order, and the names on the way of a call are those of the code."""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREE = re.findall(r"^  (\w+)  +\S", PAGE.split("```text")[1].split("```")[0], re.M)
NAMES = sorted(set(re.findall(r"`(ce_plugin(?:\.\w+)+)`", PAGE)))


def test_the_tree_shows_every_package() -> None:
    entries = (
        path for path in (ROOT / "ce_plugin").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    )
    assert sorted(TREE) == sorted(path.stem for path in entries if not path.stem.startswith("_"))


def test_the_order_is_the_one_that_is_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    # In the contract, what is not built yet or may be missing stands in parentheses.
    enforced = [[re.sub(r"[() ]", "", name) for name in re.split(r"[|:]", layer)] for layer in layers]
    place = {name: level for level, names in enumerate(enforced) for name in names}
    assert set(TREE) <= set(place)
    assert [place[name] for name in TREE] == sorted(place[name] for name in TREE)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_on_the_page_exists(name: str) -> None:
    assert pkgutil.resolve_name(name) is not None


def test_every_path_on_the_page_exists() -> None:
    table = PAGE[PAGE.index("## Where to put") :]
    paths = re.findall(r"`((?:\w+/)*\w+\.py|\w+/)`", table)
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / "ce_plugin" / path).exists() or (ROOT / path).exists(), path
