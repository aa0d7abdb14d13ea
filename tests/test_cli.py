"""The command line: reports for good words, one clear line and the right exit code for bad ones."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import nn

import ce_plugin.cli._explain as command
import ce_plugin.cli._session as session
from ce_plugin.cli import app, main
from ce_plugin.models import VisionModel, efficientnet_lite0

FACTORY = """
import torch
from torch import nn
from ce_plugin.models import Framing, VisionModel

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def full():
    return VisionModel(network(), "tiny", Framing(28), class_names=("cat", "dog", "bird"))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two pictures and a module with networks."""
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.jpg"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "tiny_networks.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_networks", raising=False)
    return tmp_path


def unboxed(shown: str) -> str:
    """What stands in the panels of the terminal, on one line."""
    return " ".join(shown.replace("│", " ").split())


FULL = ("--model", "tiny_networks:full", "--trials", "30", "--quiet")


def test_explain_writes_a_report_and_its_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "one.png", "two.jpg", *FULL, "--attack", "fgsm", "--eps", "0.2", "--seed", "5"]
    assert main(words) == 0
    page = folder / "ce-plugin-report" / "report.html"
    assert capsys.readouterr().out == f"Report: {page}\n"
    text = page.read_text()
    assert all(word in text for word in ("one.png", "two.jpg", "tiny", "FGSM", "Grad-CAM"))
    manifest = json.loads((page.parent / "manifest.json").read_text())
    assert manifest["command"] == "ce-plugin " + " ".join(words)
    assert manifest["seed"] == 5
    assert manifest["arguments"]["command"] == "explain"
    assert manifest["arguments"]["eps"] == 0.2
    assert "RandomRegions" in manifest["arguments"]["design"]
    assert set(manifest["inputs"]) == {"one.png", "two.jpg"}


def test_the_same_command_gives_the_same_report(folder: Path) -> None:
    pages = []
    for out in ("a", "b"):
        assert main(["explain", "one.png", *FULL, "--attack", "pgd", "--out", out]) == 0
        page = (folder / out / "report.html").read_text()
        pages.append([line for line in page.splitlines() if "<img" in line])
    assert len(pages[0]) >= 7  # two rows of pictures, or one and the perturbation
    assert pages[0] == pages[1]


def test_pictures_may_follow_options(folder: Path) -> None:
    assert main(["explain", *FULL, "one.png", "--eps", "0.2", "two.jpg", "--attack", "none"]) == 0
    manifest = json.loads((folder / "ce-plugin-report" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"one.png", "two.jpg"}
    assert (manifest["arguments"]["eps"], manifest["arguments"]["attacks"]) == (0.2, [])


@pytest.mark.parametrize("design", ["regions", "random-mask", "one-at-a-time", "leave-one-in"])
@pytest.mark.parametrize("outcome", ["log_odds", "probability", "logit", "margin"])
def test_every_design_and_outcome(folder: Path, design: str, outcome: str) -> None:
    assert main(["explain", "one.png", *FULL, "--design", design, "--outcome", outcome, "--fill", "mean"]) == 0


def test_options_of_a_plain_module(folder: Path) -> None:
    torch.manual_seed(1)
    state = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).state_dict()
    torch.save(state, folder / "w.pt")
    (folder / "names.txt").write_text("ant\nbee\ncow\n")
    words = "explain one.png --model tiny_networks:network --weights w.pt --class-names names.txt --size 20 --grid 4"
    words += " --normalization 0.5,0.5,0.5/0.2,0.2,0.2 --value-range 0,2 --design random-mask --target bee --trials 20"
    assert main([*words.split(), "--quiet"]) == 0
    text = (folder / "ce-plugin-report" / "report.html").read_text()
    assert "why “bee”?" in text
    assert "4 × 4 patches" in text


def test_progress_and_summary_unless_quiet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "one.png", "--model", "tiny_networks:full", "--trials", "20", "--attack", "fgsm"]) == 0
    captured = capsys.readouterr()
    assert "one.png: FGSM, effects" in captured.err
    assert captured.out.splitlines()[0].startswith("one.png: ")
    assert captured.out.splitlines()[1].startswith("  FGSM")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "none.png"], "an existing file, but got 'none.png'"),
        (["explain", "tiny_networks.py"], "a picture in a known format"),
        (["explain", "one.png", "one.png"], "each picture once"),
        (["explain", "one.png", "--model", "resnet50"], "torchvision:NAME or MODULE:FACTORY"),
        (["explain", "one.png", "--model", "torchvision:resnet5O"], "Did you mean 'resnet50'?"),
        (["explain", "one.png", "--model", "tiny_networks:ful"], "Did you mean 'full'?"),
        (["explain", "one.png", *FULL, "--weights", "none.pt"], "DEFAULT or an existing file"),
        (["explain", "one.png", *FULL, "--target", "dgo"], "Did you mean 'dog'?"),
        (["explain", "one.png", *FULL, "--target", "3"], "from 0 to 2, but got 3"),
        (["explain", "one.png", *FULL, "--grid", "7"], "14 for the design of regions"),
        (["explain", "one.png", *FULL, "--grid", "70", "--design", "random-mask"], "at most 28"),
        (["explain", "one.png", *FULL, "--device", "abacus"], "one that this machine has"),
        (["explain", "one.png", *FULL, "--class-names", "none.txt"], "a text file, one name per line"),
        (["explain", "one.png", *FULL, "--out", "one.png"], "a folder, but got the file"),
    ],
)
def test_mistakes_get_one_line_and_no_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ce-plugin: error: Expected argument ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (folder / "ce-plugin-report").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing command"),
        (["explain"], "IMAGE"),
        (["explain", "one.png", "--attack", "pdg"], "'pdg' is not one of 'none', 'fgsm'"),
        (["explain", "one.png", "--eps", "8"], "8 is not a share in (0, 1]: write 8/255"),
        (["explain", "one.png", "--eps", "8/0"], "8/0 is not a share"),
        (["explain", "one.png", "--trials", "-3"], "-3 is not a positive whole number"),
        (["explain", "one.png", "--normalization", "127"], "127 is not MEAN/STD"),
        (["explain", "one.png", "--normalization", "a/b"], "a is not a number"),
        (["explain", "one.png", "--value-range", "1,0"], "1,0 is not LOW,HIGH"),
        (["explain", "one.png", "--mask-share", "1"], "1 is all of it"),
    ],
)
def test_words_that_are_not_understood(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(words) == 2
    assert message in unboxed(capsys.readouterr().err)


def test_an_existing_out_is_refused_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = folder / "ce-plugin-report"
    report.mkdir()
    (report / "report.html").write_text("precious")
    with monkeypatch.context() as patch:
        patch.setattr(command, "read_image", lambda file: pytest.fail("work was done"))
        patch.setattr(session, "load_model", lambda *words: pytest.fail("work was done"))
        assert main(["explain", "one.png", *FULL]) == 1
    assert "--force" in capsys.readouterr().err
    assert (report / "report.html").read_text() == "precious"
    assert main(["explain", "one.png", *FULL, "--force"]) == 0
    assert "precious" not in (report / "report.html").read_text()


def test_an_interrupt_keeps_what_is_finished(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, names = command.study, []

    def interrupted(net: VisionModel, inputs: torch.Tensor, name: str, *rest: object, **options: object) -> object:
        names.append(name)
        if len(names) == 2:
            raise KeyboardInterrupt
        return study(net, inputs, name, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "study", interrupted)
    assert main(["explain", "one.png", "two.jpg", *FULL]) == 130
    text = (folder / "ce-plugin-report" / "report.html").read_text()
    assert "stopped early: 1 of 2 photographs" in text
    assert "interrupted" in capsys.readouterr().err


def test_warnings_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (30, 30), "black").save("black.png")
    assert main(["explain", "black.png", *FULL, "--fill", "zero"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert warned[0].startswith("ce-plugin: warning: ")
    assert "changes nothing" in warned[0]


def test_a_small_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(command, "Plan", partial(command.Plan, jsma_pairs=2))
    small = partial(command.digits_trial, n_train=300, n_fit=120, n_test=20, steps=2)
    monkeypatch.setattr(command, "digits_trial", small)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--trials", "8", "--quiet"]) == 0
    assert f"Report: {out / 'report.html'}" in capsys.readouterr().out
    text = (out / "report.html").read_text()
    for words in (
        "why “daisy”?",
        "why “palace”?",
        "FGSM",
        "BIM",
        "PGD",
        "JSMA",
        "Nodes that carry the attack",
        "Handwritten digits",
    ):
        assert words in text
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"].startswith("ce-plugin demo")
    detector = manifest["findings"]["detector on handwritten digits"]
    assert [one["attack"] for one in detector["attacks"]] == ["fgsm 0.3", "bim 0.3", "pgd 0.3", "jsma"]
    assert detector["true_classes_given"]
    layer = manifest["findings"]["flower.jpg"]["layer"]
    assert layer["name"] == "_conv_head"
    carried = layer["evidence"]["FGSM"]["carried"]
    assert carried["total_effect"] < 0
    assert 1 < carried["channels_needed"]["0.5"] < carried["channels_needed"]["0.9"] < 1280


@pytest.mark.slow
def test_the_whole_demo_in_its_time(tmp_path: Path) -> None:
    """In forward passes of its network, because processors differ: 90 seconds where 400 rows take four."""
    pytest.importorskip("efficientnet_lite_pytorch")
    network, rows = efficientnet_lite0().model, torch.zeros(16, 3, 224, 224).to(memory_format=torch.channels_last)

    def pace() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(25):
                network(rows)
        return time.perf_counter() - start

    pace()
    before, start = pace(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "ce_plugin", "demo", "--out", str(tmp_path / "demo")], check=True)
    taken = time.perf_counter() - start
    assert taken < 22.5 * max(before, pace())


def test_help_names_what_a_newcomer_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "demo",
        "explain",
        "nodes",
        "map",
        "concepts",
        "detect",
        "examples:",
        "exit codes",
        "ce-plugin explain cat.jpg",
    ):
        assert words in shown


def commands(group: Any, prefix: str = "ce-plugin") -> dict[str, Any]:
    """The commands of a group and of those in it, by what is written to call them."""
    found = {prefix: group}
    for name, inner in getattr(group, "commands", {}).items():
        found |= commands(inner, f"{prefix} {name}")
    return found


def test_every_option_has_its_help() -> None:
    found = commands(typer.main.get_command(app))
    assert found.keys() >= {"ce-plugin nodes", "ce-plugin map", "ce-plugin concepts train", "ce-plugin detect fit"}
    assert [name for name, command in found.items() if not command.help] == []
    options = [(name, option.name, option.help) for name, command in found.items() for option in command.params]
    assert [one for one in options if not one[2]] == []
    assert len(options) > 100


def test_every_help_can_be_shown_in_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, shown_by in commands(typer.main.get_command(app)).items():
        assert main([*name.split()[1:], "--help"]) == 0
        shown = capsys.readouterr().out
        epilog = (shown_by.epilog or "").splitlines()
        assert ("examples:" in shown) == bool(epilog)
        assert [line for line in epilog if line.startswith("  ") and line not in shown] == []  # none is wrapped
        assert "…" not in shown  # nor cut off


def test_help_does_not_wait_for_networks() -> None:
    code = "import sys; from ce_plugin.cli import main; main(['explain', '--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_the_shell(shell: str) -> None:
    """Commands, options, and the values of options, as the script of --show-completion asks for them."""

    def completed(words: str) -> str:
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_TYPER_COMPLETE_ARGS": words}
        asked |= {"_CE_PLUGIN_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        call = [sys.executable, "-c", "import sys; from ce_plugin.cli import main; sys.exit(main([]))"]
        environment = {**os.environ, **asked}
        return subprocess.run(call, env=environment, check=False, capture_output=True, text=True, timeout=120).stdout

    assert "explain" in completed("ce-plugin ex")
    assert "--mask-share" in completed("ce-plugin explain --mas")
    assert "one-at-a-time" in completed("ce-plugin explain --design one")
    assert "adaptive" in completed("ce-plugin detect evaluate --attacks ad")


def test_version_and_module_form() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "ce_plugin", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    from ce_plugin import __version__

    assert shown.stdout.strip() == f"ce-plugin {__version__}"


def test_unknown_layer_is_told_with_the_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "one.png", *FULL, "--layer", "00"]) == 1
    assert "`layer`" in capsys.readouterr().err
    assert not (folder / "ce-plugin-report").exists()


def test_layer_of_grad_cam(folder: Path) -> None:
    assert main(["explain", "one.png", *FULL, "--layer", "0"]) == 0


# --- faults of files, terminals and networks


def _pictures(folder: Path, *names: bytes) -> None:
    for name in names:
        Image.new("RGB", (40, 50), (200, 100, 50)).save(folder / os.fsdecode(name))


def test_explain_survives_its_worst_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _pictures(folder, b"caf\xe9.png", b"=a.png", b"new\nline.png")
    (folder / "cut.jpg").write_bytes((folder / "two.jpg").read_bytes()[:300])
    (folder / "<b>.png").touch()
    files = sorted(file.name for file in folder.iterdir() if file.suffix in (".png", ".jpg"))
    assert main(["explain", *files, *FULL[:-1]]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("ce-plugin: warning: left out: ") == 2
    assert "left out: cut.jpg: Expected argument `image` to be a complete picture" in captured.err
    assert r"caf\xe9.png: " in captured.out
    page = (folder / "ce-plugin-report" / "report.html").read_text()
    assert "2 pictures could not be read" in page
    assert "&lt;b&gt;.png: " in page
    manifest = json.loads((folder / "ce-plugin-report" / "manifest.json").read_text())
    assert manifest["findings"].keys() == {"one.png", "two.jpg", r"caf\xe9.png", "=a.png", r"new\nline.png"}
    assert "truncated" in manifest["inputs"]["cut.jpg"]["unreadable"]
    capsys.readouterr()
    assert main(["explain", "cut.jpg", *FULL, "--out", "none"]) == 1
    assert "a complete picture" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_of_two_files_of_one_name_the_unreadable_one_is_known(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "one.png").rename(folder / "other" / "one.png")
    (folder / "one.png").touch()
    assert main(["explain", "one.png", "other/one.png", *FULL]) == 3
    manifest = json.loads((folder / "ce-plugin-report" / "manifest.json").read_text())
    assert manifest["findings"].keys() == {"other/one.png"}
    assert manifest["inputs"]["one.png"].keys() == {"unreadable"}
    assert manifest["inputs"]["other/one.png"].keys() == {"file", "sha256"}


GRAY = """
import torch
from torch import nn
from ce_plugin.models import Framing, VisionModel

def network(channels):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def gray(): return VisionModel(network(1), "gray", Framing(28))
def four(): return VisionModel(network(4), "four", Framing(28))
def lines(): return VisionModel(nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), "lines", Framing(28))
def fixed(): return VisionModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "fixed", Framing(28))
"""


@pytest.mark.parametrize("words", [["explain", "--trials", "20", "--attack", "fgsm"], ["nodes"], ["map"]])
def test_a_network_of_one_channel_gets_gray_pictures_and_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (folder / "own.py").write_text(GRAY)
    model = ["--model", "./own.py:gray"]
    layer = [] if words[0] == "explain" else ["--layer", "0.2", "--given", "fgsm"]
    assert main([words[0], "one.png", *words[1:], *layer, *model, "--out", "a"]) == 0
    assert "note: the network takes one channel: pictures are converted to gray" in capsys.readouterr().err
    assert main([words[0], "one.png", *words[1:], *layer, *model, "--out", "b", "--quiet"]) == 0
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "./own.py:four"], "takes pictures of shape (1, 3, 28, 28), but got the error RuntimeError: "),
        (["--model", "./own.py:fixed"], "Say with --size how large they are"),
        (["--model", "./own.py:network"], "which needs channels"),
        (["--model", "./none.py:gray"], "an existing .py file"),
        (["--model", "tiny_networks:nosuch"], "one of 'full', 'network', but got 'nosuch'.\n"),
        ([*FULL, "--size", "100000"], "`size` to be a number of pixels, 1 to 16384"),
        ([*FULL, "--out", "/proc/x"], "a folder that can be written to, but got '/proc/x'"),
        ([*FULL, "--out", "x" * 300], "File name too long"),
        ([*FULL, "--class-names", "blank.txt"], "whose line 2 is blank. Each line is a class"),
        ([*FULL, "--class-names", "empty.txt"], "which is empty"),
        ([*FULL, "--class-names", "two.txt"], "3 names, one for each class of the network, but got 2"),
        ([*FULL, "--class-names", "wide.txt"], "Save it as UTF-8"),
        ([*FULL, "--class-names", "."], "a text file, one name per line, but got the folder"),
    ],
)
def test_more_mistakes_get_one_line_and_no_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (folder / "own.py").write_text(GRAY)
    (folder / "blank.txt").write_text("cat\n\nbird\n")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "two.txt").write_text("cat\ndog\n")
    (folder / "wide.txt").write_text("cat\ndog\nbird\n", encoding="utf-16")
    before = sorted(folder.iterdir())
    test_mistakes_get_one_line_and_no_traceback(folder, capsys, ["explain", "one.png", *words], message)
    assert [file for file in sorted(folder.iterdir()) if file.name != "__pycache__"] == before


def test_channels_of_a_picture_whose_name_is_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a reference whose worst picture is unreadable."""
    (folder / "own.py").write_text(GRAY)
    _pictures(folder, b"caf\xe9\n.png")
    (folder / "reference").mkdir()
    for name in ("a.png", "b.png"):
        (folder / "reference" / name).write_bytes((folder / "one.png").read_bytes())
    (folder / "reference" / "cut.png").write_bytes((folder / "one.png").read_bytes()[:90])
    for verb in ("nodes", "map"):
        words = [verb, os.fsdecode(b"caf\xe9\n.png"), "--model", "./own.py:gray", "--layer", "0.2", "--out", verb]
        assert main([*words, "--intervention", "mean", "--reference", "reference", "--quiet"]) == 3
        manifest = json.loads((folder / verb / "manifest.json").read_text())
        assert manifest["inputs"].keys() == {r"caf\xe9\n.png", "reference/cut.png"}
        assert "left out: cut.png" in capsys.readouterr().err


def test_a_network_without_convolution_may_take_gray(folder: Path) -> None:
    (folder / "own.py").write_text(GRAY)
    assert main(["explain", "one.png", "--model", "./own.py:lines", "--trials", "20", "--quiet"]) == 0


def test_names_of_classes_are_read_as_written(folder: Path) -> None:
    (folder / "names.txt").write_text("\ufeffäpfel\n  dog \nbird\n\n\n", encoding="utf-8")
    words = ["explain", "one.png", *FULL, "--class-names", "names.txt", "--target"]
    for name in ("äpfel", "dog", "2"):
        assert main([*words, name, "--force"]) == 0


def test_a_class_of_contrast_is_blamed_on_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = "def named(): return VisionModel(network(3), 'n', Framing(28), class_names=tuple('abc'))"
    (folder / "own.py").write_text(GRAY + named)
    assert main(["map", "one.png", "--model", "./own.py:named", "--layer", "0.2", "--contrast", "zzz"]) == 1
    assert "Expected argument `contrast` to be one of 'a', 'b', 'c', but got 'zzz'" in capsys.readouterr().err


def test_memory_that_does_not_suffice_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")):

        def large(*words: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(command, "study", large)
        assert main(["explain", "one.png", *FULL]) == 1
        assert "ce-plugin: error: not enough memory" in capsys.readouterr().err
        assert not (folder / "ce-plugin-report").exists()

    def wrong(*words: object, **options: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(command, "study", wrong)
    with pytest.raises(RuntimeError, match="a defect"):  # whose traceback is wanted
        main(["explain", "one.png", *FULL])


def test_a_folder_is_reserved_while_a_run_is_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run with the same folder ends before its work; the first one keeps it."""
    study, codes = command.study, []

    def meanwhile(*words: Any, **options: Any) -> object:
        monkeypatch.setattr(command, "study", study)
        codes.extend(main(["explain", "two.jpg", *FULL, *force]) for force in ([], ["--force"]))
        return study(*words, **options)

    monkeypatch.setattr(command, "study", meanwhile)
    assert main(["explain", "one.png", *FULL]) == 0
    assert codes == [1, 1]
    assert "one that no other run writes to" in capsys.readouterr().err
    assert "one.png" in (folder / "ce-plugin-report" / "report.html").read_text()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(["explain", "one.png", *FULL]) == 1
    assert "No space left on device). Make room on the disk" in capsys.readouterr().err
    assert not (folder / "ce-plugin-report").exists()


SCRIPT = """
import os, signal, sys, threading
from ce_plugin.cli import main
{before}
code = main(sys.argv[1:])
sys.stderr.write(f"code {{code}}\\n")
sys.exit(code)
"""


def _run(words: list[str], before: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", SCRIPT.format(before=before), *words]
    return subprocess.run(call, stderr=subprocess.PIPE, text=True, timeout=300, check=False, **options)


def test_a_closed_output_does_not_cost_the_result(folder: Path) -> None:
    """Nobody reads it; it is closed; it is a full device."""
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        for number, options in enumerate(({"stdout": write}, {"preexec_fn": lambda: os.close(1)}, {"stdout": full})):
            ended = _run(["explain", "one.png", *FULL, "--out", f"out{number}"], **options)
            assert ended.stderr.splitlines()[-1] == "code 0"
            assert "Traceback" not in ended.stderr
            assert "Exception ignored" not in ended.stderr
            assert (folder / f"out{number}" / "report.html").exists()
        assert "standard output cannot be written" in ended.stderr
        for words in (["--version"], ["explain", "--help"]):
            ended = _run(words, stdout=full)
            assert ended.stderr.startswith("ce-plugin: warning: standard output cannot be written")
            assert ended.stderr.splitlines()[1:] == ["code 1"]
    os.close(write)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_run_that_is_ended_from_outside_cleans_up(folder: Path, name: str) -> None:
    (folder / "own.py").write_text(f"import signal\ndef ended(): signal.raise_signal(signal.{name})\n")
    # Under nohup the tests themselves ignore SIGHUP, and their children would too.
    heeded = functools.partial(signal.signal, getattr(signal, name), signal.SIG_DFL)
    call = ["explain", "one.png", "--model", "./own.py:ended"]
    ended = _run(call, stdout=subprocess.PIPE, preexec_fn=heeded)
    assert ended.stderr == "ce-plugin: interrupted\ncode 130\n"
    assert not (folder / "ce-plugin-report").exists()


@pytest.mark.parametrize("module", ["ce_plugin.cli._commands", "torch"])
def test_an_interrupt_while_importing_is_one(folder: Path, module: str) -> None:
    before = f"""
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""
    ended = _run(["explain", "one.png", *FULL], before, stdout=subprocess.PIPE)
    assert ended.stderr == "ce-plugin: interrupted\ncode 130\n"
    assert not (folder / "ce-plugin-report").exists()
