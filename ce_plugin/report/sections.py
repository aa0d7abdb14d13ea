"""Sections, the parts that reports are made of; and how they are shown, put on a page and written."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from ce_plugin.errors import FileError, expected
from ce_plugin.files import write_files
from ce_plugin.visualization import NEGATIVE, POSITIVE, data_uri

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

Found = TypeVar("Found")


class Section(Generic[Found]):
    """One part of a report: what is run, what the manifest keeps of it, and what the page shows.

    Subclass it, set ``name`` and ``template``, and write :meth:`run`, :meth:`record` and :meth:`render`. Give an
    instance to :func:`~ce_plugin.report.study`: it is run on the photograph, stands in the manifest under its name, and
    on the page below the sections before it.

    Attributes:
        name: of the section's record in the manifest; a report has one section of each name.
        template: Jinja2: a :class:`~pathlib.Path`, the text itself, or the name of a template of this package
            ("layer.html.j2"). What it inserts is escaped, and a name that :meth:`render` does not give is an error.
            ``|probability``, ``|signed``, ``|digits`` and ``|percent`` format a number as the other sections do.

    Example:
        >>> class Size(Section[int]):
        ...     name, template = "size", "<p>{{ pixels }} pixels</p>"
        ...
        ...     def run(self, study):
        ...         return study.inputs[0, 0].numel()
        ...
        ...     def record(self, found):
        ...         return {"pixels": found}
        ...
        ...     def render(self, found):
        ...         return {"pixels": f"{found:,}"}
        >>> print(Size().html(1024))
        <p>1,024 pixels</p>
    """

    name: str
    template: str | Path

    def run(self, study: Any) -> Found:
        """What the section is about to find out.

        Args:
            study: the photograph, and what the sections before found; see :class:`~ce_plugin.report.Study`.
        """
        raise NotImplementedError

    def record(self, found: Found) -> dict[str, Any]:
        """What the manifest keeps: strings, numbers, lists and dictionaries.

        Args:
            found: what :meth:`run` returned.
        """
        raise NotImplementedError

    def render(self, found: Found) -> dict[str, Any]:
        """The names that the template uses, and their values.

        Args:
            found: what :meth:`run` returned.
        """
        raise NotImplementedError

    def html(self, found: Found) -> Markup:
        """The section as HTML.

        Args:
            found: what :meth:`run` returned.
        """
        return rendered(self.template, self.render(found))


def rendered(template: str | Path, names: Mapping[str, Any], manifest: Mapping[str, Any] | None = None) -> Markup:
    """A template filled in; that of a whole page, one with a manifest, knows it and the colours as well."""
    from markupsafe import Markup

    page: dict[str, Any] = {}
    if manifest is not None:
        page = {"manifest": manifest, "manifest_json": json.dumps(manifest, indent=2)}
        page |= {"positive": POSITIVE, "negative": NEGATIVE}
    if isinstance(template, Path):
        made = _environment().from_string(template.read_text(encoding="utf-8"))
    elif template.endswith(".j2"):
        made = _environment().get_template(template)
    else:
        made = _environment().from_string(template)
    return Markup(made.render(**names, **page))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ce_plugin"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"probability": probability, "signed": signed, "digits": digits, "percent": percent}
    return environment


def cell(title: str, alt: str, shown: Any, *, caption: str = "", top: Any = None) -> dict[str, Any]:
    """A picture with its text; a tensor is shown pixel by pixel."""
    raw = isinstance(shown, Tensor)
    return {"title": title, "alt": alt, "uri": data_uri(shown), "caption": caption, "top": top, "raw": raw, "text": ""}


def probability(value: float) -> str:
    """Three digits, or the power of ten."""
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def signed(value: float, places: int = 2) -> str:
    """With its sign, the minus being one."""
    return f"{value:+.{places}f}".replace("-", "−")


def digits(value: float) -> str:
    """With its sign and three digits, where sizes differ."""
    return f"{value:+.3g}".replace("-", "−")


def percent(value: float) -> str:
    """A share, with a digit where it is small."""
    text = f"{100 * value:.1f} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"
    return text.replace("-", "−")


def save_page(
    section: Section[Found],
    found: Found,
    out: str | Path,
    manifest: Mapping[str, Any],
    tables: Mapping[str, str],
    **names: Any,
) -> Path:
    """Write a section that is a whole page, its tables and the manifest.

    Args:
        section: its template extends ``base.html.j2``; the page is named after it.
        found: what it found; its record is added to the manifest.
        out, manifest, tables: as for :func:`write_page`.
        names: that the template uses as well.
    """
    full = {**manifest, "findings": section.record(found)}
    html = rendered(section.template, {**section.render(found), **names}, full)
    return write_page(out, str(section.template).removesuffix(".j2"), html, full, tables)


def write_page(
    out: str | Path, name: str, html: str, manifest: Mapping[str, Any], tables: Mapping[str, str] | None = None
) -> Path:
    """Write a page and what stands beside it; each file appears only when it is complete.

    Args:
        out: the folder, which :func:`check_out` has allowed.
        name: of the page.
        html: its text.
        manifest: see :func:`~ce_plugin.report.build_manifest`.
        tables: name -> text of other files.

    Returns:
        Path of the page.
    """
    write_files(out, {**(tables or {}), "manifest.json": manifest, name: html})
    return Path(out, name)


def check_out(out: str | Path, *, force: bool = False) -> Path:
    """Refuse a folder that must not, or cannot, be written to; meant to be called before any work.

    Args:
        out: the folder of the report.
        force: it may exist; then only the report's own two files in it are replaced.

    Returns:
        The folder, which is not made yet.

    Raises:
        FileError: it exists and ``force`` is False; it is a file; or it cannot be made here.

    Example:
        >>> check_out("a-new-folder").name
        'a-new-folder'
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileError(expected("out", "a folder", f"the file {str(folder)!r}", "Choose another name."))
    if folder.exists() and not force:
        hint = "Choose another name, or allow its report to be replaced with --force (force=True)."
        raise FileError(expected("out", "a folder that does not exist yet", repr(str(folder)), hint))
    nearest = folder
    while not nearest.exists():
        nearest = nearest.absolute().parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise FileError(expected("out", "a folder that can be written to", f"{str(folder)!r} in {str(nearest)!r}"))
    return folder
