"""Sections, the parts that reports are made of; how they are shown, put on a page and written; and the manifest.

The manifest is what is needed to run the same experiment again: versions, machine, seed, arguments, and fingerprints of
what went in.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ce_plugin._version import __version__
from ce_plugin.files import write_files
from ce_plugin.visualization import NEGATIVE, POSITIVE, data_uri

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

Found = TypeVar("Found")

_DISTRIBUTIONS = (
    "torch",
    "torchvision",
    "captum",
    "adversarial-robustness-toolbox",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
)


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
    tables: Mapping[str, str | bytes],
    **names: Any,
) -> Path:
    """Write a section that is a whole page, its tables and the manifest; each file appears only when it is complete.

    Args:
        section: its template extends ``base.html.j2``; the page is named after it.
        found: what it found; its record is added to the manifest.
        out: the folder, which :func:`check_out` has allowed.
        manifest: see :func:`~ce_plugin.report.build_manifest`.
        tables: name -> content of other files.
        names: that the template uses as well.

    Returns:
        Path of the page.
    """
    full = {**manifest, "findings": section.record(found)}
    html = rendered(section.template, {**section.render(found), **names}, full)
    page = str(section.template).removesuffix(".j2")
    write_files(out, {**tables, "manifest.json": full, page: html})
    return Path(out, page)


def file_sha256(path: str | Path) -> str:
    """The SHA-256 fingerprint of a file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     file_sha256(file.name)[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """The SHA-256 fingerprint of a tensor's shape, type and values.

    Example:
        >>> tensor_sha256(torch.zeros(2)) == tensor_sha256(torch.zeros(2, 1))
        False
    """
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def state_sha256(model: nn.Module) -> str:
    """The SHA-256 fingerprint of a network's parameters and buffers.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> state_sha256(a) == state_sha256(b)
        False
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tensor_sha256(value) if isinstance(value, Tensor) else repr(value)}\n".encode())
    return digest.hexdigest()


def build_manifest(
    *, arguments: Mapping[str, Any], command: Sequence[str], seed: int, inputs: Mapping[str, Any], model: nn.Module
) -> dict[str, Any]:
    """The manifest of a report, ready for JSON.

    Args:
        arguments: every option with the value that was used, defaults included.
        command: the words of the command that does it again.
        seed: of everything random.
        inputs: name of each picture and what identifies it.
        model: the explained network.

    Returns:
        A dictionary of strings, numbers, lists and dictionaries.

    Example:
        >>> manifest = build_manifest(arguments={"eps": 0.3}, command=["ce-plugin", "demo"], seed=0, inputs={},
        ...                           model=nn.Linear(1, 1))
        >>> manifest["command"], manifest["seed"]
        ('ce-plugin demo', 0)
    """
    versions = dict.fromkeys(_DISTRIBUTIONS, "not installed as a package")
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = next(model.parameters(), torch.empty(0, device="cpu")).device
    machine = {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "byte_order": sys.byteorder,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    manifest = {
        "ce_plugin": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "seed": seed,
        "arguments": dict(arguments),
        "inputs": dict(inputs),
        "model": {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "parameters": sum(map(torch.numel, model.parameters())),
            "state_sha256": state_sha256(model),
        },
        "versions": {"python": platform.python_version(), **versions},
        "machine": machine,
    }
    plain: dict[str, Any] = json.loads(json.dumps(manifest, default=str))
    return plain
