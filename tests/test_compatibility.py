"""docs/works-with.md says what happens: kinds and settings of networks, and families of networks."""

from __future__ import annotations

import re

import pytest

from benchmarks.works_with import families
from benchmarks.works_with.settings import CASES, Case, run
from benchmarks.works_with.table import stored
from benchmarks.works_with.verdicts import EXACT, Verdict

STORED = stored()
# A tenth of the networks, of every way of building one; all of them are slow.
FEW = (
    "timm.mobilenetv3_small_050", "timm.levit_128s", "timm.vit_tiny_patch16_224", "timm.edgenext_xx_small",
    "timm.regnetx_002", "timm.ghostnet_050", "timm.starnet_s050", "timm.resnet10t", "torchvision.shufflenet_v2_x0_5",
    "torchvision.squeezenet1_1", "torchvision.mobilenet_v3_small", "transformers.ViT", "transformers.ResNet",
    "transformers.Swin",
)  # fmt: skip


def needs(package: str) -> None:
    """Skip what needs a package that is not there, or that does not take this PyTorch."""
    if package in ("transformers", "peft") and not pytest.importorskip("transformers").is_torch_available():
        pytest.skip("this version of transformers needs a newer PyTorch")
    pytest.importorskip(package)


def same(found: tuple[Verdict, Verdict], told: tuple[Verdict, Verdict]) -> None:
    """The verdicts of the table, or a reason that is as good where versions differ."""
    for one, other in zip(found, told, strict=True):
        assert one.verdict == other.verdict, f"{one}, but the table says {other}"


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_settings(case: Case) -> None:
    needs(case.needs)
    found = run(case)
    for verdict, wanted in zip(found, (case.layer, case.at_input), strict=True):
        assert verdict.verdict == wanted, verdict
        assert wanted == EXACT or re.search(case.reason, verdict.reason), verdict.reason
    same(found, STORED["settings"][case.name])


def check(family: str) -> None:
    needs(family.split(".")[0])
    net, image = families.network(family)
    same((families.at_layer(net, image), families.at_input(net, image)), STORED["networks"][family])


@pytest.mark.parametrize("family", FEW)
def test_a_few_networks(family: str) -> None:
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in families.families() if name not in FEW])
def test_every_network(family: str) -> None:
    check(family)
