"""Write a row of docs/works-with.md: what the test suite says on this interpreter and these versions.

    python -m benchmarks.works_with.versions LABEL JUNIT

JUNIT is what `pytest --junitxml` wrote. `make test-oldest` and `make test-python` call this. It fails where a test did.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.works_with.table import PAGE, VERSIONS, page, stored, versions

PACKAGES = (
    "torch", "torchvision", "captum", "adversarial-robustness-toolbox", "numpy", "scipy", "scikit-learn", "pandas",
    "matplotlib", "pillow", "tqdm", "typing_extensions", "Jinja2", "typer", "timm", "transformers", "peft",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def row(label: str, junit: Path) -> dict[str, Any]:
    """The row of a run."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{junit} holds no test suite")
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "label": label,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
    }


def main() -> None:
    """Replace the row of this label and interpreter, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("label", choices=("oldest", "newest"), help="of the row")
    parser.add_argument("junit", type=Path, help="what `pytest --junitxml` wrote")
    options = parser.parse_args()
    label, new = options.label, row(options.label, options.junit)
    minor = new["python"].rsplit(".", 1)[0]
    others = [old for old in versions() if (old["label"], old["python"].rsplit(".", 1)[0]) != (label, minor)]
    rows = sorted([*others, new], key=lambda each: (each["label"] != "oldest", int(each["python"].split(".")[1])))
    VERSIONS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(stored(), rows))
    print(f"{PAGE}: Python {new['python']}, {new['passed']} passed, {new['failed']} failed, {new['skipped']} skipped")
    sys.exit(bool(new["failed"]))


if __name__ == "__main__":
    main()
