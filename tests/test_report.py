"""The report: numbers that fit the network, a page that stands alone, a manifest that identifies what went in."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from jinja2 import UndefinedError
from torch import Tensor, nn

from ce_plugin.designs import OneAtATime, RandomMask
from ce_plugin.errors import ArgumentError, FileError, InputError, ModelError, TargetError, UnknownNameError
from ce_plugin.interventions import PixelMask
from ce_plugin.interventions.base import Normalization
from ce_plugin.models import Framing, VisionModel
from ce_plugin.networks import last_conv_layer
from ce_plugin.report import (
    Plan,
    Section,
    Study,
    build_manifest,
    check_out,
    file_sha256,
    grad_cam,
    render,
    saliency,
    save_report,
    state_sha256,
    study,
    tensor_sha256,
)


class Corners(nn.Module):
    """Class c adds up corner c of the picture; a convolution that changes nothing stands in front."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        half = x.shape[-1] // 2
        parts = [x[..., :half, :half], x[..., :half, half:], x[..., half:, :half], x[..., half:, half:]]
        return torch.stack([part.mean((1, 2, 3)) for part in parts], dim=1) * 4


@pytest.fixture
def net() -> VisionModel:
    return VisionModel(Corners(), "corners", Framing(8), class_names=("a & b", "<north>", "south", "east"))


@pytest.fixture
def photograph() -> Tensor:
    inputs = torch.full((1, 3, 8, 8), 0.5)
    inputs[:, :, :4, 4:] = 0.9
    return inputs


def _plan(**changes: object) -> Plan:
    options: dict[str, object] = {
        "attacks": (),
        "intervention": PixelMask("zero"),
        "design": OneAtATime(),
        "cells": 2,
        "outcome": "logit",
    }
    return Plan(**{**options, **changes})  # type: ignore[arg-type]


def test_contributions_are_those_of_the_closed_form(net: VisionModel, photograph: Tensor) -> None:
    (case,) = study(net, photograph, "p", _plan()).cases
    assert case.explained.index == case.top[0].index == 1
    (maps,) = case.maps
    expected = torch.zeros(8, 8)
    expected[:4, 4:] = 3.6  # the logit is 4 x the corner's mean, and covering sets it to zero
    assert torch.allclose(maps.contribution.float(), expected, atol=1e-5)
    # Exact designs outline what is not zero.
    assert case.outlines == "not zero"
    assert torch.equal(maps.outlined, expected > 0)
    assert (maps.n_outlined, maps.n_units) == (1, 4)
    probability = torch.tensor([2.0, 3.6, 2.0, 2.0]).softmax(0)
    assert case.top[0].probability == pytest.approx(float(probability[1]), abs=1e-5)
    assert case.top[0].log_odds == pytest.approx(float(torch.logit(probability[1])), abs=1e-4)


def test_random_designs_outline_what_is_significant(net: VisionModel, photograph: Tensor) -> None:
    plan = _plan(design=RandomMask(0.3, n_trials=100))
    (case,) = study(net, photograph, "p", plan).cases
    assert case.outlines == "significant"
    assert case.trials == 100
    assert case.maps[0].outlined[:4, 4:].all()
    assert case.maps[0].n_outlined == 1


def test_an_attack_that_changes_the_answer_gets_two_sets_of_maps(net: VisionModel, photograph: Tensor) -> None:
    clean, attacked = study(net, photograph, "p", _plan(attacks=("fgsm",), eps=0.3)).cases
    assert (clean.name, attacked.name) == ("Clean", "FGSM")
    assert clean.success is None
    assert attacked.success is True
    assert attacked.top[0].index != 1
    assert [maps.answer.index for maps in attacked.maps] == [1, attacked.top[0].index]
    assert attacked.perturbation is not None
    assert float(attacked.perturbation.abs().max()) == pytest.approx(0.3, abs=1e-5)
    assert torch.allclose(attacked.picture, photograph[0] + attacked.perturbation, atol=1e-6)
    assert attacked.explained.index == 1


def test_an_attack_that_fails_says_so(net: VisionModel, photograph: Tensor) -> None:
    _, attacked = study(net, photograph, "p", _plan(attacks=("fgsm",), eps=0.01)).cases
    assert attacked.success is False
    assert len(attacked.maps) == 1


def test_eps_is_a_share_of_the_range_in_any_units(photograph: Tensor) -> None:
    scaled = Normalization(0.0, 255.0)
    wide = VisionModel(Corners(), framing=Framing(8), normalization=scaled, value_range=(0.0, 255.0))
    _, attacked = study(wide, photograph, "p", _plan(attacks=("fgsm",), eps=0.1)).cases
    assert attacked.perturbation is not None
    assert float(attacked.perturbation.abs().max()) == pytest.approx(0.1, abs=1e-5)
    assert torch.allclose(attacked.picture, photograph[0] + attacked.perturbation, atol=1e-5)


def test_passes_are_counted_by_purpose(net: VisionModel, photograph: Tensor) -> None:
    clean, attacked = study(net, photograph, "p", _plan(attacks=("fgsm",), eps=0.3)).cases
    assert set(clean.passes) == {"causal effects", "strongest patches alone", "Grad-CAM and saliency"}
    # A reference and four trials, the runner's probes, and a region with 24 places.
    assert 5 + 25 <= clean.passes["causal effects"] <= 60
    assert clean.passes["Grad-CAM and saliency"] == 2
    assert attacked.passes["attack"] >= 1
    assert set(attacked.seconds) == set(attacked.passes)


def test_the_network_is_left_as_it_was(net: VisionModel, photograph: Tensor) -> None:
    net.model.train()
    before = state_sha256(net.model)
    random_state = torch.get_rng_state()
    study(net, photograph, "p", _plan(attacks=("fgsm", "jsma"), jsma_pairs=2))
    assert state_sha256(net.model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in net.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.model.modules())
    assert net.model.training


def test_a_target_is_explained_in_place_of_the_answer(net: VisionModel, photograph: Tensor) -> None:
    (case,) = study(net, photograph, "p", _plan(), target=2).cases
    assert case.explained.name == "south"
    assert case.maps[0].answer.index == 2


def test_study_refuses(net: VisionModel, photograph: Tensor) -> None:
    with pytest.raises(TargetError, match=r"`target` to be from 0 to 3, but got 4"):
        study(net, photograph, "p", _plan(), target=4)
    with pytest.raises(InputError, match=r"one photograph, \(1, C, H, W\)"):
        study(net, photograph.expand(2, 3, 8, 8), "p", _plan())
    segmenting = VisionModel(nn.Conv2d(3, 2, 1), framing=Framing(8))
    with pytest.raises(ModelError, match=r"returns \(N, C\) with C > 1, but got \(1, 2, 8, 8\)"):
        study(segmenting, photograph, "p", _plan())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attacks": ("pdg",)}, UnknownNameError, r"Did you mean 'pgd'\?"),
        ({"outcome": "probabilty"}, UnknownNameError, r"Did you mean 'probability'\?"),
        ({"eps": 8.0}, ArgumentError, r"`eps` to be in \(0, 1\], but got 8.0\. It is a share"),
        ({"fdr": 0.0}, ArgumentError, r"`fdr` to be in \(0, 1\)"),
        ({"cells": 0}, ArgumentError, r"`cells` to be at least 1"),
    ],
)
def test_plan_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Plan(**options)  # type: ignore[arg-type]


def test_last_conv_layer_is_the_last_that_sees_a_plane() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1))
    found = last_conv_layer(net, torch.zeros(1, 3, 8, 8))
    assert found is not None
    assert found == ("2", net[2])
    assert not net[2]._forward_hooks
    assert last_conv_layer(nn.Flatten(), torch.zeros(1, 3, 8, 8)) is None


def test_a_patch_embedding_is_no_layer_for_grad_cam() -> None:
    tokens = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2),
        nn.Flatten(2),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    assert last_conv_layer(tokens, torch.zeros(1, 3, 8, 8)) is None


def test_convolutions_with_modules_inside_are_found() -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.pad = nn.Identity()  # as in EfficientNet-lite
    net = nn.Sequential(nn.Conv2d(3, 3, 1), conv, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    found = last_conv_layer(net, torch.zeros(1, 3, 8, 8))
    assert found is not None
    assert found[1] is conv


def test_saliency_is_the_gradient(net: VisionModel, photograph: Tensor) -> None:
    expected = torch.zeros(1, 8, 8)
    expected[:, :4, 4:] = 4 / 48
    assert torch.allclose(saliency(net.model, photograph, 1), expected)
    assert grad_cam(net.model, net.model.conv, photograph, 1).shape == (1, 8, 8)
    assert not photograph.requires_grad


class _Page(HTMLParser):
    """Collects what a page refers to, and whether its elements are closed in order."""

    void = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.sources += [str(found[key]) for key in ("src", "href") if key in found]
        if tag == "img":
            self.images.append(found)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _studies(net: VisionModel, photograph: Tensor, **changes: object) -> tuple[list[Study], Plan]:
    plan = _plan(attacks=("fgsm", "bim"), eps=0.3, **changes)
    return [study(net, photograph, name, plan) for name in ("one.png", "two <b>.png")], plan


def _manifest(net: VisionModel) -> dict[str, object]:
    return build_manifest(
        arguments={"path": Path("a"), "nested": {"x": (1, 2)}, "design": OneAtATime()},
        command=["ce-plugin", "explain", "my photo.jpg"],
        seed=3,
        inputs={"one.png": {"sha256": "0"}},
        model=net.model,
    )


def test_the_page_stands_alone_and_says_what_was_found(net: VisionModel, photograph: Tensor) -> None:
    studies, plan = _studies(net, photograph)
    page = render(studies, model=net.name, plan=plan, experiment="patches were black", manifest=_manifest(net))
    parsed = _Page()
    parsed.feed(page)
    assert parsed.open == []
    assert all(source.startswith(("data:image/", "#photo-")) for source in parsed.sources)
    assert "http" not in re.sub(r"data:image/[^\"]+", "", page)
    # Each photograph: one at its head and 4 pictures clean; 8 for each attack that changed the answer. Of the layer 3
    # for each evidence, and one for each attack.
    changed = sum(bool(case.success) for one in studies for case in one.cases)
    failed = sum(case.success is False for one in studies for case in one.cases)
    assert changed > 0
    layer = 2 * (3 * 3 + 2)
    assert len(parsed.images) == 2 * 5 + 8 * changed + 5 * failed + layer
    assert all(image["alt"] for image in parsed.images)
    text = " ".join(parsed.text)
    # Names are text, whatever signs they hold.
    for words in ("two <b>.png", "<north>", "answer changed", "patches were black", "not zero", "ce-plugin explain"):
        assert words in text
    assert (
        json.loads(re.sub(r"&#34;|&quot;", '"', page.partition('id="manifest">')[2].partition("</pre>")[0]))["seed"]
        == 3
    )


def test_an_attack_on_few_values_says_how_many(net: VisionModel) -> None:
    # Enough pixels that a few are less than a hundredth.
    photograph = torch.full((1, 3, 40, 40), 0.5)
    photograph[:, :, :20, 20:] = 0.51
    plan = _plan(attacks=("jsma",), jsma_pairs=2)
    page = render([study(net, photograph, "p", plan)], model="m", plan=plan, experiment="e", manifest=_manifest(net))
    found = re.search(r"(\d) of 4,800 values changed; times 0.5, on gray, pixels drawn 3 × 3", page)
    assert found is not None
    assert 1 <= int(found.group(1)) <= 4
    assert "JSMA in at most 4 values" in page


def test_an_attack_that_destroys_photographs_is_said_to(net: VisionModel, photograph: Tensor) -> None:
    pages = []
    for eps in (8 / 255, 0.3):
        plan = _plan(attacks=("fgsm",), eps=eps)
        made = [study(net, photograph, "p", plan)]
        pages.append(render(made, model="m", plan=plan, experiment="e", manifest=_manifest(net)))
    assert "by at most 8/255 of the range" in pages[0]
    assert "damaged for the eye" not in pages[0]
    assert "damaged for the eye" in pages[1]


def test_the_page_of_a_random_design_names_its_error_rate(net: VisionModel, photograph: Tensor) -> None:
    plan = _plan(design=RandomMask(0.3, n_trials=40), fdr=0.1)
    page = render([study(net, photograph, "p", plan)], model="m", plan=plan, experiment="e", manifest=_manifest(net))
    assert "about 10% or fewer" in page
    assert "false discovery rate 10%" in page


def test_a_network_without_late_convolution_has_a_note_instead_of_grad_cam(photograph: Tensor) -> None:
    flat = VisionModel(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), framing=Framing(8))
    plan = _plan()
    page = render([study(flat, photograph, "p", plan)], model="m", plan=plan, experiment="e", manifest=_manifest(flat))
    assert "Grad-CAM needs a late convolution" in page
    assert "class 0" in page


class Darker(Section[dict[str, float]]):
    """A section as a user writes it: how sure the network is of the class at half the brightness."""

    name = "darker"
    template = "<p>{% for evidence, p in rows %}{{ evidence }} & half as bright: {{ p|probability }}; {% endfor %}</p>"

    def run(self, study: Study) -> dict[str, float]:
        study.progress(f"{study.name}: half as bright")
        with torch.no_grad():
            rows = {case.name: study.net.model(case.inputs / 2).softmax(1) for case in study.cases}
        return {name: float(row[0, study.target]) for name, row in rows.items()}

    def record(self, found: dict[str, float]) -> dict[str, object]:
        return {"p_half_as_bright": found}

    def render(self, found: dict[str, float]) -> dict[str, object]:
        return {"rows": list(found.items())}


def test_a_section_of_ones_own_is_run_recorded_and_shown(net: VisionModel, photograph: Tensor, tmp_path: Path) -> None:
    told: list[str] = []
    plan = _plan(attacks=("fgsm",), eps=0.3)
    found = study(net, photograph, "p", plan, sections=[Darker()], progress=told.append)
    assert told[-1] == "p: half as bright"
    expected = float(torch.tensor([1.0, 1.8, 1.0, 1.0]).softmax(0)[1])
    assert found.found["darker"]["Clean"] == pytest.approx(expected, abs=1e-5)
    page = save_report([found], tmp_path / "r", model="m", plan=plan, experiment="e", manifest=_manifest(net))
    written = json.loads((page.parent / "manifest.json").read_text())["findings"]["p"]
    assert list(written) == ["evidence", "layer", "darker"]
    assert written["darker"] == {"p_half_as_bright": found.found["darker"]}
    assert f"Clean & half as bright: {expected:.3f}; FGSM" in page.read_text()


def test_a_template_may_be_a_file_and_what_it_inserts_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "darker.html.j2").write_text("<b>{{ rows[0][0] }}</b> {{ rows[0][1]|signed }}")
    section = Darker()
    section.template = tmp_path / "darker.html.j2"
    assert section.html({"<clean>": -0.5}) == "<b>&lt;clean&gt;</b> −0.50"
    section.template = "{{ colums }}"
    with pytest.raises(UndefinedError, match="'colums' is undefined"):
        section.html({})


def test_two_sections_of_one_name_are_refused(net: VisionModel, photograph: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"`sections` to be of different names, but got .*darker, darker"):
        study(net, photograph, "p", _plan(), sections=[Darker(), Darker()])


def test_reports_are_written_whole_and_never_over_another(net: VisionModel, photograph: Tensor, tmp_path: Path) -> None:
    studies, plan = _studies(net, photograph)
    words = {"model": "m", "plan": plan, "experiment": "e", "manifest": _manifest(net)}
    page = save_report(studies, tmp_path / "new" / "report", **words)  # type: ignore[arg-type]
    assert sorted(file.name for file in page.parent.iterdir()) == ["manifest.json", "report.html"]
    written = json.loads((page.parent / "manifest.json").read_text())
    assert set(written.pop("findings")) == {"one.png", "two <b>.png"}
    assert written == json.loads(json.dumps(words["manifest"]))
    with pytest.raises(FileError, match=r"a folder that does not exist yet, but got .*--force"):
        save_report(studies, page.parent, **words)  # type: ignore[arg-type]
    (page.parent / "mine.txt").write_text("keep")
    save_report(studies[:1], page.parent, force=True, incomplete="stopped", **words)  # type: ignore[arg-type]
    assert "stopped" in page.read_text()
    assert (page.parent / "mine.txt").read_text() == "keep"


def test_of_reports_that_are_saved_at_once_one_is_written(net: VisionModel, tmp_path: Path) -> None:
    words = {"model": "m", "plan": Plan(), "experiment": "e", "manifest": _manifest(net)}

    def saved(k: int) -> bool:
        try:
            save_report([], tmp_path / "r", incomplete=f"of {k}", **words)  # type: ignore[arg-type]
        except FileError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        (winner,) = (k for k, done in enumerate(pool.map(saved, range(8))) if done)
    assert f"of {winner}" in (tmp_path / "r" / "report.html").read_text()


def test_out_is_checked(tmp_path: Path) -> None:
    assert check_out(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileError, match=r"`out` to be a folder, but got the file"):
        check_out(file, force=True)
    with pytest.raises(FileError, match=r"a folder that can be written to"):
        check_out(file / "below")


def test_the_manifest_identifies_what_went_in(net: VisionModel, tmp_path: Path) -> None:
    manifest = _manifest(net)
    assert manifest["command"] == "ce-plugin explain 'my photo.jpg'"
    assert manifest["arguments"] == {"path": "a", "nested": {"x": [1, 2]}, "design": repr(OneAtATime())}
    versions = manifest["versions"]
    assert isinstance(versions, dict)
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "torchvision", "captum", "adversarial-robustness-toolbox", "numpy"} <= set(versions)
    json.dumps(manifest)
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    changed = Corners()
    with torch.no_grad():
        changed.conv.weight[0, 0] += 1e-6
    assert state_sha256(changed) != state_sha256(net.model) == state_sha256(Corners())
    assert tensor_sha256(torch.zeros(2)) != tensor_sha256(torch.zeros(2, dtype=torch.float64))
