"""The recipes of docs/recipes.md run as they are written; where a package is missing they are skipped, and say so."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ce_plugin import CausalEffect
from ce_plugin.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")


def block(heading: str, language: str = "python") -> str:
    """The first block of code below a heading."""
    part = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", part, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def names() -> dict[str, Any]:
    """What the page has made before its recipes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 3)).eval()
    images = torch.rand(2, 3, 28, 28)
    estimate = CausalEffect(model, class_names=["ant", "bee", "cat"]).estimate(images[:1], passes=60)
    return {
        "torch": torch, "model": model, "images": images, "labels": torch.tensor([0, 1]), "CausalEffect": CausalEffect,
        "figure": estimate.plot(), "table": estimate.to_dataframe(), "said": estimate.summary(), "epoch": 3,
    }  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which trackers write."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(heading: str, names: dict[str, Any], needs: str) -> None:
    """Run a recipe as the page has it."""
    try:
        importlib.import_module(needs)
    except ImportError as error:
        pytest.skip(f"{needs} is not installed, or cannot be used here: {error}")
    exec(compile(block(heading), f"recipe {heading}", "exec"), names)


def test_tensorboard(here: Path, names: dict[str, Any]) -> None:
    run("TensorBoard", names, "tensorboard")
    names["writer"].close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(here / "runs" / "explained"))
    events.Reload()
    (image,) = events.Images("effects")
    assert image.step == 3
    assert (image.width, image.height) == tuple(names["figure"].canvas.get_width_height())
    (text,) = events.Tensors("answer/text_summary")
    assert names["said"].encode() in text.tensor_proto.string_val[0]


def test_weights_and_biases(here: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("Weights & Biases", names, "wandb")
    (folder,) = (here / "wandb").glob("offline-run-*")
    media = sorted(file.suffix for file in (folder / "files" / "media").rglob("*") if file.is_file())
    assert media == [".json", ".png"]
    (record,) = folder.glob("*.wandb")
    begins = names["said"].partition("“")[0]  # JSON escapes what is not ASCII
    assert begins.encode() in record.read_bytes()


def test_mlflow(here: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    # What it writes to without a server was a folder, and is a data base in later releases: both are here then.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{here / 'mlruns'}")
    run("MLflow", names, "mlflow")
    kept = {file.name: file for file in (here / "mlruns").rglob("artifacts/*")}
    assert sorted(kept) == ["answer.txt", "effects.json", "effects.png"]
    assert kept["answer.txt"].read_text() == names["said"]


@pytest.mark.filterwarnings("ignore")
def test_lightning(here: Path, names: dict[str, Any]) -> None:
    run("Lightning", names, "lightning")
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = names["model"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.net(x)
            return found

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            assert not self.net.training

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = DataLoader(TensorDataset(names["images"], names["labels"]))
    trainer = lightning.Trainer(
        max_epochs=1, logger=TensorBoardLogger(str(here)), callbacks=[names["Explain"](names["images"][:1])],
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Module(), loader, loader)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    assert len(events.Images("effects")) == 1


def test_quantus(names: dict[str, Any]) -> None:
    run("Quantus", names, "quantus")
    assert np.isfinite(names["scores"]).all()
    assert len(names["scores"]) == 2


def test_the_command_of_the_workflow_is_understood(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workflow = block("GitHub Actions", "yaml")
    (line,) = re.findall(r"run: ce-plugin (.*)", workflow)
    # Options that are not understood have the exit code 2, files that are not there 1.
    assert main(line.split()) == 1
    assert "'pictures'" in capsys.readouterr().err
    assert re.findall(r"uses: (\S+)@v\d+", workflow) == [
        "actions/checkout",
        "actions/setup-python",
        "actions/upload-artifact",
    ]
