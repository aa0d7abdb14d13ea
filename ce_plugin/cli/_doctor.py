"""``ce-plugin doctor``: what this machine and environment can do, one line each."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from contextlib import suppress

import torch

from ce_plugin._version import __version__
from ce_plugin.trials.batches import free_memory

# What each optional package is for, and the extra that brings it.
_OPTIONAL = {
    "efficientnet-lite-pytorch": ("the network of the demo", "demo"),
    "timm": ("--model timm:NAME", "networks"),
    "transformers": ("--model hf:NAME", "networks"),
    "pyarrow": ("ce-plugin expected, experiment", "data"),
    "torchmetrics": ("ExpectedCausalEffect", "data"),
    "ray": ("many processes or machines", "cluster"),
    "grad-cam": ("ce-plugin compare", "compare"),
    "quantus": ("Quantus' metrics", "compare"),
    "xarray": ("Estimate.to_xarray", "data"),
}
_NEEDED = ("torch", "torchvision", "captum", "adversarial-robustness-toolbox", "numpy", "matplotlib")


def examined() -> str:
    """The report, as text.

    Example:
        >>> "torch" in examined()
        True
    """
    lines = [f"ce-plugin {__version__}, Python {platform.python_version()}, {platform.platform()}", "", "Packages"]
    lines += [
        f"  {_mark(version)} {name} {version or 'is missing'}" for name in _NEEDED for version in [_version(name)]
    ]
    lines += _misfits()
    lines += ["", "Optional"]
    for name, (purpose, extra) in _OPTIONAL.items():
        version = _version(name)
        how = f"is missing (pip install 'ce-plugin[{extra}]')"
        lines.append(f"  {_mark(version)} {name} {version or how}: {purpose}")
    lines += ["", "Devices", *(f"  ok {line}" for line in _devices())]
    if torch.version.cuda and not torch.cuda.is_available():
        lines.append("  -- this PyTorch is built for CUDA, and no GPU is found: the wheels for the CPU are far smaller")
        lines.append("     (pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu)")
    lines += ["", "Folders"]
    data = os.environ.get("CE_PLUGIN_DATA", "")
    found = os.path.isdir(data)
    said = "is set"
    if not found:
        said = f"{'names no folder' if data else 'is not set'}: tests, benchmarks and the gallery need it"
    lines.append(f"  {_mark(found)} CE_PLUGIN_DATA {said}")
    lines.append(f"  ok {shutil.disk_usage(os.curdir).free / 2**30:.0f} GiB are free here")
    return "\n".join(lines)


def _misfits() -> list[str]:
    """That torchvision does not go with torch, as where one is built for the CPU and the other one for CUDA."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        lines = [f"  -- torchvision cannot be imported ({' '.join(str(error).split())[:100]}): it and torch must come"]
        return [*lines, "     from one index (pip install --force-reinstall torch torchvision --index-url ...)"]
    return []


def _devices() -> list[str]:
    """One line for each device on which a network can run."""
    memory = free_memory(torch.device("cpu")) / 2**30
    lines = [f"cpu: {torch.get_num_threads()} threads of {os.cpu_count()} processors, {memory:.1f} GiB free"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = free_memory(torch.device("cuda", index)) / 2**30
            lines.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, {memory:.1f} GiB free")
    if sys.platform == "darwin" and torch.backends.mps.is_available():
        lines.append("mps: Apple's GPU (without float64)")
    return lines


def _version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _mark(there: object) -> str:
    return "ok" if there else "--"
