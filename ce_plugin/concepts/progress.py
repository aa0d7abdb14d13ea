"""How far a training has come: its history, its best epoch, and the file from which it goes on."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ce_plugin.concepts.files import read_file, write_file
from ce_plugin.concepts.model import ConceptAutoencoder
from ce_plugin.concepts.settings import Settings
from ce_plugin.errors import ArgumentError, ModelError, expected

__all__ = ["Progress"]

State = dict[str, Tensor]


class Progress:
    """The course of one training.

    Args:
        path: of the checkpoint, or None.
        settings: what is asked for.
        layer: name of the layer.
        fingerprint: of the network.

    Attributes:
        history: per epoch, each term on the images fitted on ("train_...") and on those held out ("validation_...").
        best: weights of the best epoch.
    """

    def __init__(self, path: str | PathLike[str] | None, settings: Settings, layer: str, fingerprint: str) -> None:
        self.path, self.settings, self.layer, self.fingerprint = path, settings, layer, fingerprint
        self.history: list[dict[str, float]] = []
        self.best: State = {}
        self._state: State = {}
        self._optimizer: dict[str, Any] | None = None
        self._n_images = 0

    @classmethod
    def open(cls, path: str | PathLike[str] | None, settings: Settings, layer: str, fingerprint: str) -> Progress:
        """A new training, or the one that the file holds.

        Raises:
            FileError: the file is no checkpoint.
            ModelError: it is one of another layer or network.
            ArgumentError: it is one with other settings.
        """
        progress = cls(path, settings, layer, fingerprint)
        if path is not None and Path(path).exists():
            progress._read(path)
        return progress

    def _read(self, path: str | PathLike[str]) -> None:
        content = read_file(path, "checkpoint")
        todo = "Choose another file, or delete this one to begin again."
        here = (self.layer, self.fingerprint)
        if (content["layer_name"], content["fingerprint"]) != here:
            came = f"one of layer {content['layer_name']!r} of network {content['fingerprint']}"
            wanted = f"one of layer {self.layer!r} of this network ({self.fingerprint})"
            raise ModelError(expected("checkpoint", wanted, came, todo))
        asked = self.settings.to_dict()
        other = {k: v for k, v in content["settings"].items() if k != "epochs" and asked.get(k) != v}
        if other:
            wanted = "one with " + ", ".join(f"{key}={asked.get(key)!r}" for key in other)
            came = "one with " + ", ".join(f"{key}={value!r}" for key, value in other.items())
            raise ArgumentError(expected("checkpoint", wanted, came, todo))
        self.history, self.best, self._state = content["history"], content["best"], content["state"]
        self._optimizer, self._n_images = content["optimizer"], content["n_images"]

    def begin(self, autoencoder: ConceptAutoencoder, n_images: int) -> None:
        """Check that the images are those of the checkpoint, or write the first one.

        Raises:
            ArgumentError: the checkpoint is of a training on other images.
        """
        now = autoencoder.state_dict()
        if self._state:
            keys = [key for key in now if key.startswith("encoder.standardize.")]
            same = n_images == self._n_images and all(
                self._state[key].shape == now[key].shape
                and torch.allclose(self._state[key], now[key].cpu(), rtol=1e-2, atol=1e-5)
                for key in keys
            )
            if not same:
                todo = "Choose another file, or delete this one to begin again."
                came = f"one of {self._n_images} others" if n_images != self._n_images else "one of others"
                raise ArgumentError(expected("checkpoint", f"one of these {n_images} images", came, todo))
            return
        self._n_images = n_images
        self.best = self._state = _copy(now)
        self._write()

    def restore(self, autoencoder: ConceptAutoencoder, optimizer: torch.optim.Optimizer) -> None:
        """Weights and optimizer as they were when the file was written."""
        autoencoder.load_state_dict(self._state)
        if self._optimizer is not None:
            optimizer.load_state_dict(self._optimizer)

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the patience is at its end."""
        return self.epoch >= self.settings.epochs or self._waited() >= self.settings.patience

    @property
    def rate(self) -> float:
        """The learning rate of the next epoch: halved after each half of the patience without improvement."""
        step = max(1, self.settings.patience // 2)
        halvings, best, waited = 0, float("inf"), 0
        for loss in self._losses():
            best, waited = (loss, 0) if loss < best else (best, waited + 1)
            halvings += waited > 0 and waited % step == 0
        return float(self.settings.lr * 0.5**halvings)

    def _losses(self) -> list[float]:
        return [record["validation_total"] for record in self.history]

    def _waited(self) -> int:
        losses = self._losses()
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def end_epoch(
        self,
        autoencoder: ConceptAutoencoder,
        optimizer: torch.optim.Optimizer,
        fitted: dict[str, float],
        checked: dict[str, float],
    ) -> None:
        """Take down what an epoch brought, and write the checkpoint."""
        record = {"epoch": float(self.epoch + 1), "lr": self.rate}
        record |= {f"train_{key}": value for key, value in fitted.items()}
        record |= {f"validation_{key}": value for key, value in checked.items()}
        self.history.append(record)
        self._state, self._optimizer = _copy(autoencoder.state_dict()), optimizer.state_dict()
        if self._waited() == 0:
            self.best = self._state
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            content = {
                "settings": self.settings.to_dict(),
                "layer_name": self.layer,
                "fingerprint": self.fingerprint,
                "n_images": self._n_images,
                "history": self.history,
                "best": self.best,
                "state": self._state,
                "optimizer": self._optimizer,
            }
            write_file(self.path, "checkpoint", content)


def _copy(state: dict[str, Any]) -> State:
    return {key: value.detach().cpu().clone() for key, value in state.items()}
