"""The table of what the package works with is made of results, and its versions are those that setup.cfg allows."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

from benchmarks.works_with import families
from benchmarks.works_with.settings import CASES
from benchmarks.works_with.table import PAGE, page, stored, versions
from benchmarks.works_with.verdicts import EXACT, FULL, REFUSED

ROOT = Path(__file__).resolve().parents[1]
STORED = stored()


def test_most_networks_take_a_fast_route() -> None:
    found = {name: pair for name, pair in STORED["networks"].items() if not name.startswith("transformers.")}
    assert len(found) >= 60
    assert set(found) | set(STORED["networks"]) == set(families.families())
    assert {verdict.verdict for pair in found.values() for verdict in pair} <= {EXACT, FULL, REFUSED}
    assert sum(layer.verdict == EXACT for layer, _ in found.values()) >= 0.8 * len(found)


def test_the_page_is_made_of_the_results() -> None:
    assert set(STORED["settings"]) == set(CASES)
    assert PAGE.read_text() == page(STORED, versions())


def setup() -> configparser.ConfigParser:
    """The package's metadata."""
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def required() -> dict[str, str]:
    """Lower bounds by package, of those that are needed on every interpreter."""
    lines = [line for line in setup()["options"]["install_requires"].splitlines() if line and ";" not in line]
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines)  # type: ignore[union-attr,misc]


def required_by_some() -> set[str]:
    """Packages that some interpreters need, because the standard library of others has what they do."""
    lines = setup()["options"]["install_requires"].splitlines()
    return {line.split(">=")[0] for line in lines if ";" in line}


def test_everything_that_is_imported_is_required() -> None:
    packages = {"PIL": "pillow", "art": "adversarial-robustness-toolbox", "sklearn": "scikit-learn", "jinja2": "Jinja2"}
    # Jinja2's own, whose strings its templates return; extras bring the demonstration's networks and a data set.
    brought, bring = {"markupsafe": "Jinja2"}, setup()["options.extras_require"]
    lines = [line for name in ("demo", "benchmark", "data") for line in bring[name].split()]
    extras = {re.split(r"[>=\[]", line)[0].replace("-", "_") for line in lines}
    names: set[str] = set()
    for path in (ROOT / "ce_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    names -= {*sys.stdlib_module_names, "ce_plugin", *extras, *required_by_some()}
    assert {brought.get(name, packages.get(name, name)) for name in names} == set(required())


def test_lower_bounds_are_those_that_were_tested() -> None:
    (oldest,) = [row for row in versions() if row["label"] == "oldest"]
    assert oldest["failed"] == 0
    assert oldest["python"].startswith("3.10.")
    bounds = {name: [int(part) for part in bound.split(".")] for name, bound in required().items()}
    for name, bound in bounds.items():
        ran = [int(part) for part in oldest["versions"][name].split("+")[0].split(".")]
        assert ran[: len(bound)] == bound, name


def test_classifiers_name_the_interpreters_that_were_tested() -> None:
    ran = {".".join(row["python"].split(".")[:2]) for row in versions() if row["failed"] == 0} | {"3.11"}
    named = re.findall(r"Python :: (3\.\d+)", setup()["metadata"]["classifiers"])
    assert set(named) == ran == {"3.10", "3.11", "3.12", "3.13"}


def test_extras_bring_what_the_table_needs() -> None:
    assert {"timm", "transformers", "peft"} <= set(setup()["options.extras_require"]["networks"].split())
