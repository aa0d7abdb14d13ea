"""How Sphinx builds this documentation (``make docs``)."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from ce_plugin._version import __version__  # noqa: E402

project = "ce_plugin"
author = "The ce-plugin contributors"
copyright = "2026, the ce-plugin contributors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
# Headings of included results, which are two levels down, are linked to as well.
myst_heading_anchors = 5
# Each benchmark result is a page of its own; included in another page, its headings start one level too deep.
# Two classes may have an attribute of the same name, so that a bare name in a signature is ambiguous.
suppress_warnings = ["myst.header", "ref.python"]
exclude_patterns = ["_build"]

# The scripts are run where there are data sets for them; without, their pages show the code alone.
FULL = os.environ.get("CE_PLUGIN_GALLERY") == "full"
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "filename_pattern": "/plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("matplotlib", "_figures.last_figure"),
    "capture_repr": (),
    "matplotlib_animations": (True, "jshtml"),
    "plot_gallery": bool(os.environ.get("CE_PLUGIN_DATA")),
    # A page that was rendered in the small mode is rendered again in the full one.
    "run_stale_examples": FULL,
    "min_reported_time": 0,
    "remove_config_comments": True,
    "show_signature": False,
    "download_all_examples": False,
}

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"ce_plugin {__version__}"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
# Captum's docstrings are Captum's: a method without one of its own shows none.
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types stand in the signature; repeated below it, `np.bool_` would be read as a link.
napoleon_attr_annotations = False
napoleon_use_rtype = False


def include_results(app: Any, docname: str, source: list[str]) -> None:
    """Append every result in benchmarks/results to the page on benchmarks."""
    if docname != "benchmarks":
        return
    results = sorted((HERE.parent / "benchmarks" / "results").glob("*.md"))
    pages = [f"```{{include}} ../benchmarks/results/{result.name}\n:heading-offset: 2\n```\n" for result in results]
    source[0] += "\n" + ("\n".join(pages) if pages else "No results have been recorded yet.\n")


def plain_signs(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: |x| and (B, *K) are mathematics there, not markup."""
    text = re.sub(r"^( +[\w, ]+,)\n +([\w, ]+: )", r"\1 \2", "\n".join(lines), flags=re.M)
    # "Raises: As :meth:`attribute`." names no error, so it must stay a sentence.
    text = re.sub(r"^( *)Raises:\n +(As :meth:.*)$", r"\1Raises: \2", text, flags=re.M)
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else _escaped(line) for line in text.split("\n")]


def _escaped(line: str) -> str:
    """The line with bars and single stars escaped, except inside ``code``, `names` and *emphasis*."""
    parts = re.split(r"(``.*?``|`.*?`|(?<![\w*])\*\w[^*]*(?<=\w)\*(?![\w*]))", line)
    return "".join(part if i % 2 else re.sub(r"(?<!\\)([*|])", r"\\\1", part) for i, part in enumerate(parts))


def short_names(
    app: Any, what: str, name: str, thing: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Remove module names from signatures that Sphinx cannot shorten itself, because of a default such as <factory>."""
    return re.sub(r"~(\w+\.)+", "", signature or "") or None, re.sub(r"~(\w+\.)+", "", returns or "") or None


def skip_fields(app: Any, what: str, name: str, thing: object, skip: bool, options: object) -> bool | None:
    """Fields of a named tuple are documented with the class."""
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field number") else None


def inline_math(writer: Any, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers render without a script."""
    writer.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_math(writer: Any, node: nodes.Element) -> None:
    """As :func:`inline_math`, on a line of its own."""
    formula = tex2mathml(node.astext(), as_block=True).replace("<math ", '<math displaystyle="true" ', 1)
    writer.body.append(f'<div class="math" style="padding: 0.4em 0">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-signature", short_names)
    app.connect("autodoc-skip-member", skip_fields)
    # Before napoleon, which turns sections into field lists, at the usual 500.
    app.connect("autodoc-process-docstring", plain_signs, priority=400)
    app.connect("source-read", include_results)
