"""How much code is there, and how much of it does a reader cross to follow a usual call?

    python -m benchmarks.structure                 modules, code lines, files and functions crossed by six calls
    python -m benchmarks.structure --list layer    the functions of one call, in the order in which they are entered

A file is crossed when one of its functions runs; comprehensions and lambdas count as functions (up to Python 3.11).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import sys
import tempfile
import tokenize
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import ce_plugin
from benchmarks.common.results import write

PACKAGE = Path(ce_plugin.__file__).parent
_SILENT = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_OWN = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
"""


def code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _SILENT:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            held -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(held)


def network() -> nn.Module:
    """A small convolutional network."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


def calls(folder: Path) -> dict[str, Callable[[], object]]:
    """The usual calls by name."""
    from ce_plugin import CausalEffect, CausalEffectMap, LayerCausalEffect
    from ce_plugin.cli import main as command
    from ce_plugin.datasets import digits
    from ce_plugin.detection import CausalEffectDetector
    from ce_plugin.models import DigitsCNN

    x = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    images = digits()[0][:260].numpy()
    torch.manual_seed(0)
    detector = CausalEffectDetector(DigitsCNN().eval())
    picture = (np.random.default_rng(0).random((40, 40, 3)) * 255).astype("uint8")
    Image.fromarray(picture).save(folder / "a.png")
    (folder / "own_net.py").write_text(_OWN)
    sys.path.insert(0, str(folder))
    explain = ["explain", str(folder / "a.png"), "--model", "own_net:net", "--out", str(folder / "report")]
    return {
        "attribute": lambda: CausalEffect(network()).attribute(x),
        "layer": lambda: LayerCausalEffect(network(), "2", outcome="logit").estimate(x),
        "map": lambda: CausalEffectMap(network(), "3", outcome="logit").attribute(x, target=0),
        "fit": lambda: detector.fit(images, nb_epochs=1),
        "detect": lambda: detector.detect(images[:4]),
        "explain": lambda: command(explain),
    }


def crossed(call: Callable[[], object]) -> list[tuple[str, str]]:
    """(file, function) of the package in the order in which a call enters them."""
    seen: dict[tuple[str, str], None] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # Class bodies and modules are imports, and no calls; only functions have fast locals.
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and code.co_flags & 2:
            seen[str(Path(code.co_filename).relative_to(PACKAGE)), getattr(code, "co_qualname", code.co_name)] = None

    sys.setprofile(profile)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call()
    finally:
        sys.setprofile(None)
    return list(seen)


def main() -> None:
    """Count, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", metavar="CALL", help="only list the functions of this call")
    wanted = parser.parse_args().list
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: crossed(call) for name, call in calls(Path(folder)).items()}
    if wanted:
        print("\n".join(f"{file}: {function}" for file, function in found[wanted]))
        return
    modules = sorted(PACKAGE.rglob("*.py"))
    size = {"modules": len(modules), "code_lines": sum(code_lines(path.read_text("utf-8")) for path in modules)}
    total = f"{size['modules']} modules, {size['code_lines']:,} lines of code"
    rows = {name: (len({file for file, _ in seen}), len(seen)) for name, seen in found.items()}
    lines = [
        "# Structure of the package",
        "",
        f"{total} (without blank lines, comments and docstrings).",
        "",
        "| call | files crossed | functions crossed |",
        "|---|---|---|",
        *(f"| {name} | {files} | {functions} |" for name, (files, functions) in rows.items()),
    ]
    print("\n".join(lines))
    write("structure", "\n".join(lines), {**size, "crossed": rows})


if __name__ == "__main__":
    main()
