"""A network as a callable, in torch or in faster arithmetic by OpenVINO."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROWS = 16
ENGINES = ("torch", "openvino-f32", "openvino-bf16")


class Engine:
    """Logits of a network for any number of images; without gradients.

    Args:
        network: in eval mode, for images (N, 3, 224, 224).
        name: ``"torch"`` (float32), or OpenVINO's runtime in float32 or bfloat16.

    Attributes:
        rows: number of images so far.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        self.name, self.rows = name, 0
        self._call = _torch(network) if name == "torch" else _openvino(network, name)

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, 224, 224) to (N, K)."""
        self.rows += len(images)
        return self._call(images)

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, 3, 224, 224) to (N, K)."""
        return self.logits(images).softmax(1)


class Accelerated(nn.Module):
    """A network in its engine's arithmetic where no gradient is taken."""

    def __init__(self, network: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._logits = network, logits

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x) if torch.is_grad_enabled() else self._logits(x)
        return found


def _torch(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network as it is."""

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            chunks = torch.split(images.to(memory_format=torch.channels_last), ROWS)
            found = torch.cat([network(chunk) for chunk in chunks])
        return found.clone()

    return logits


def _openvino(network: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """The network compiled for chunks of ROWS images, two of them at a time."""
    openvino: Any = importlib.import_module("openvino")  # without type hints, and optional
    example = torch.zeros(ROWS, 3, 224, 224)
    converted = openvino.convert_model(network, example_input=example, input=[ROWS, 3, 224, 224])
    options = {
        "INFERENCE_PRECISION_HINT": name.removeprefix("openvino-"),
        "NUM_STREAMS": str(torch.get_num_threads()),
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "ENABLE_CPU_PINNING": "NO",  # other processes use the other cores
    }
    queue = openvino.AsyncInferQueue(openvino.Core().compile_model(converted, "CPU", options))
    found: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    queue.set_callback(lambda request, place: found.__setitem__(place, request.get_output_tensor().data.copy()))

    def logits(images: Tensor) -> Tensor:
        found.clear()
        for place, chunk in enumerate(torch.split(images.contiguous(), ROWS)):
            rows = chunk.numpy()
            if len(rows) < ROWS:
                rows = np.concatenate([rows, np.zeros((ROWS - len(rows), *rows.shape[1:]), np.float32)])
            queue.start_async([rows], place)
        queue.wait_all()
        return torch.from_numpy(np.concatenate([found[place] for place in sorted(found)])[: len(images)])

    return logits
