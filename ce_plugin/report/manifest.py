"""What is needed to run the same experiment again: versions, machine, seed, arguments, fingerprints of what went in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    from ce_plugin._version import __version__

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
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}},
        "machine": _machine(model),
    }
    plain: dict[str, Any] = json.loads(json.dumps(manifest, default=_plain))
    return plain


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _machine(model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters(), torch.empty(0, device="cpu")).device
    described: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "byte_order": sys.byteorder,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def _plain(value: Any) -> Any:
    """What JSON does not know: sets as lists, paths and devices as text, anything else as its repr."""
    if isinstance(value, (set, frozenset)):
        return list(value)
    return str(value) if isinstance(value, (Path, torch.device)) else repr(value)
