"""The paper's experiments on X-rays: splits without leaks, and conditions II and III on networks with known answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.paper import conditions as paper
from benchmarks.paper import figure3, xray_detector
from benchmarks.paper._page import ends, flat, save_page
from benchmarks.paper._xrays import (
    GrayTwoClasses,
    Images,
    informative,
    mean_of,
    nih_parts,
    pneumonia_parts,
    reading,
    without_groups,
)
from ce_plugin.datasets import FINDINGS, Box, ImageFiles, XRays
from ce_plugin.interventions import Normalization
from ce_plugin.models import VisionModel
from ce_plugin.visualization import plot_intervals


class Corner(nn.Module):
    """Logits of which the first is the sum over the upper left 4 x 4 pixels, the second over all others."""

    def forward(self, x: Tensor) -> Tensor:
        corner = x[:, :, :4, :4].sum((1, 2, 3))
        return torch.stack([corner, x.sum((1, 2, 3)) - corner], 1)


class TwoHeads(nn.Module):
    """Nodes are the three channels; the first serves both outputs, the second and third one each."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.eye_(self.nodes.weight[:, :, 0, 0].detach())

    def forward(self, x: Tensor) -> Tensor:
        h = self.nodes(x)[:, :, 0, 0]
        return torch.stack([2 * h[:, 0] + h[:, 1], h[:, 0] + h[:, 2]], 1)


@pytest.fixture
def corner() -> Tensor:
    mask = torch.zeros(12, 12).bool()
    mask[:4, :4] = True
    return mask


def test_no_patient_is_on_both_sides(data_folder: Path) -> None:
    train, test = nih_parts()
    assert not set(train.groups) & set(test.groups)
    assert len(train) + len(test) == 1008  # of 1,000, and eight larger ones that have boxes
    assert sum(bool(test.boxes_of(i)) for i in range(len(test))) == 17
    assert not any(train.boxes_of(i) for i in range(len(train)))
    fit, held = pneumonia_parts()
    assert len(held) == 400
    assert not set(fit.groups) & set(held.groups)


def test_what_is_left_out_of_a_part_is_counted() -> None:
    data = ImageFiles(tuple(map(Path, "abc")), torch.zeros(3).long(), ("x",), ("1", "2", "1"))
    left = without_groups(data, ["1"])
    assert left.groups == ("2",)
    assert left.left_out == {"of patients in the other part": 2}


def test_findings_that_are_read_are_told_from_those_that_are_rare_or_guessed() -> None:
    n = 120
    draw = np.random.default_rng(0)
    y = torch.zeros(n, 3).bool()
    y[:40, :2], y[:19, 2] = True, True
    z = torch.from_numpy(draw.normal(size=(n, 3))) + 3 * y * torch.tensor([1.0, 0.0, 1.0])
    files = tuple(Path(f"{i}.png") for i in range(n))
    data = ImageFiles(files, y, ("read", "guessed", "rare"), tuple(str(i // 2) for i in range(n)))
    found = reading(z, Images(data, torch.zeros(n, 1), y), data.classes)
    assert informative(found) == [0]
    assert [one.evaluated for one in found] == [True, True, False]


def test_random_boxes_keep_their_size_and_reach_every_place(corner: Tensor) -> None:
    boxes = paper.random_boxes(corner, 4000)
    assert boxes.shape == (4000, 12, 12)
    assert set(boxes.any(2).sum(1).tolist()) == set(boxes.any(1).sum(1).tolist()) == {4}
    assert bool((boxes.flatten(1).sum(1) == 16).all())  # rectangles, without holes
    starts = boxes.flatten(1).int().argmax(1)
    counts = torch.bincount(starts, minlength=144)
    assert int((counts > 0).sum()) == 81  # 9 x 9 places
    assert float(counts[counts > 0].double().std()) < 2 * math.sqrt(4000 / 81)
    assert torch.equal(boxes, paper.random_boxes(corner, 4000))
    assert not torch.equal(boxes, paper.random_boxes(corner, 4000, ident=1))


@pytest.mark.filterwarnings("ignore:Alternative::")
@pytest.mark.parametrize("normalization", [Normalization(), Normalization(0.5, 0.25)])
def test_masking_a_box_that_is_all_takes_everything(corner: Tensor, normalization: Normalization) -> None:
    """Of an image of ones, black takes the box, the mean and the blur take nothing: a third of the sum."""
    x = normalization.to_model(torch.ones(1, 1, 12, 12))
    away = torch.zeros(12, 12).bool()
    away[6:10, 6:10] = True
    effects = paper.box_effects(Corner(), x, torch.stack([corner, away, corner | away]), normalization)
    step = float(normalization.to_model(torch.zeros(1, 1, 1, 1)) - x[0, 0, 0, 0])
    torch.testing.assert_close(effects, 16 * step / 3 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))


def test_condition_two_finds_the_box_that_the_network_looks_at(corner: Tensor) -> None:
    n = 6
    boxes = {f"{i}.png": (Box(0, 0.0, 0.0, 1 / 3, 1 / 3),) for i in range(n)}
    files = tuple(Path(f"{i}.png") for i in range(n))
    data = XRays(files, torch.ones(n, 14).bool(), FINDINGS, tuple("112233"), boxes=boxes)
    x = torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    tests = paper.box_tests(Corner(), Images(data, x, data.labels), Normalization(), draws=99)
    assert all(torch.equal(data.boxes_of(i)[0].mask(12, 12), corner) for i in range(n))
    assert max(one.p_value for one in tests) <= 0.1  # only boxes at the same place do as much
    one, every = paper.box_rows(tests, [0])
    assert one["boxes"] == every["boxes"] == 6
    assert one["beyond"]["n"] == 3  # patients
    assert one["beyond"]["high"] < 0 < one["others"]["low"]
    assert paper.box_rows(tests, [1])[0] == {"finding": FINDINGS[1], "boxes": 0}


def test_how_many_images_settle_a_sign() -> None:
    found = mean_of(torch.tensor([-1.0, 1.0] * 50) + 0.28)
    assert found.low < 0.28 < found.high
    sd = float(torch.tensor([-1.0, 1.0] * 50).std())
    assert found.needed == math.ceil(((1.959964 + 0.841621) * sd / 0.28) ** 2) == 102
    assert mean_of(torch.ones(1)).needed is None
    assert mean_of(torch.ones(5)).needed is None


def test_a_common_cause_makes_two_outputs_go_together_until_it_is_set() -> None:
    x = torch.randn(400, 3, 1, 1, generator=torch.Generator().manual_seed(0)) + 1
    found = paper.common_cause(TwoHeads(), "nodes", x, (0, 1), [str(i) for i in range(400)], share=1 / 3)
    assert found.nodes == (0,)
    assert abs(found.clean - 2 / math.sqrt(5 * 2)) < 0.1  # cov 2, variances 5 and 2
    assert abs(found.shared) < 0.15
    assert found.fall[1] > 0
    assert found.fall[1] < found.fall[0] < found.fall[2]
    # Without either of the other two: 2 / sqrt(4 * 2) and 2 / sqrt(5 * 1).
    assert 2 / math.sqrt(8) - 0.1 < found.other < 2 / math.sqrt(5) + 0.1
    torch.testing.assert_close(torch.tensor(found.effects), torch.tensor([-2.0, -1.0]), atol=0.25, rtol=0)


def test_condition_one_on_a_linear_network() -> None:
    x = torch.rand(60, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    effect, significant, confirmed = paper.nodes_at_zero(TwoHeads(), "nodes", x)
    weights = torch.tensor([[2.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(effect.double(), -(x.mean(0).flatten()[:, None] * weights).double())
    assert torch.equal(significant, weights > 0)
    torch.testing.assert_close(confirmed[0].float(), -2 * x[30:, 0, 0, 0])
    everything = paper.masked_at_random(TwoHeads(), x, Normalization(), share=1.0)
    torch.testing.assert_close(everything, -TwoHeads()(x))


class Pooled(nn.Module):
    """Convolution, ReLU, mean over positions, linear: where CAM is defined and the three maps are one but for scale."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.ModuleDict({"norm5": nn.Conv2d(3, 6, 3)})
            self.classifier = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features["norm5"](x).relu().mean((2, 3)))


def test_behind_pooling_and_a_linear_head_the_maps_are_one() -> None:
    net = VisionModel(Pooled().eval())
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 1])
    maps = {kind: explain(x, target) for kind, explain in figure3.maps_of(net, "features.norm5").items()}
    torch.testing.assert_close(maps["CEM"] * 36, maps["CAM"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        maps["CAM"].mean((1, 2, 3)), (net.model(x) - net.model.classifier.bias)[range(3), target]
    )


def test_rows_of_figure_three_compare_the_same_images() -> None:
    net = VisionModel(Pooled().eval())
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.zeros(4, 8, 8).bool()
    boxes[:, :, :4] = True
    pictures = figure3.Pictures(x, torch.zeros(4).long(), tuple("1123"), boxes)
    left = torch.ones(4, 1, 2, 2)
    left[:, :, :, 1] = -1
    maps = {"CEM": lambda x, target: left + 0.01 * x[:, :1, :2, :2], "zero": lambda x, target: torch.zeros(4, 1, 2, 2)}
    changed = {"flipped": x, "none": figure3.preset(net, "FGSM .03").perturb(x, target=pictures.target)}
    rows = figure3.compared(pictures, changed, maps, {})
    own = {(row["attack"], row["map"]): row for row in rows}
    assert own["flipped", "CEM"]["correlation"]["mean"] == 1
    assert own["flipped", "CEM"]["correlation"]["n"] == 3  # patients
    assert own["none", "zero"]["undefined"] == 4
    assert own["none", "zero"]["correlation"] is None
    assert own["clean", "CEM"]["share_in_box"]["mean"] == pytest.approx(1.0)
    assert own["clean", "zero"]["share_in_box"]["mean"] == 0.0
    assert own["clean", "CEM"]["area_of_box"]["mean"] == 0.5
    assert float((changed["none"] - x).abs().max()) <= 0.03 + 1e-6


def test_one_logit_as_two_classes() -> None:
    inner = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))
    x = torch.rand(5, 1, 4, 4)
    p = GrayTwoClasses(inner)(x).softmax(1)
    torch.testing.assert_close(p[:, 1], inner(x.expand(-1, 3, -1, -1))[:, 0].sigmoid())


def test_noise_is_as_large_as_the_attack_and_belongs_to_the_image() -> None:
    x = torch.full((3, 1, 6, 6), 0.5)
    noise = xray_detector.noisy(x, 0.03) - x
    torch.testing.assert_close(noise.abs(), torch.full_like(noise, 0.03))
    assert torch.equal(xray_detector.noisy(x[:2], 0.03) - x[:2], noise[:2])
    assert not torch.equal(noise[0], noise[1])


def test_a_page_holds_its_tables_and_plots(tmp_path: Path) -> None:
    rows = [{"finding": "=nodule", "masked": {"mean": -1.0, "low": -2.0, "high": 0.0, "n": 5, "needed": None}}]
    figure = plot_intervals({"nodule": {"masked": {"effect": ends(rows[0]["masked"])}}})
    save_page(
        tmp_path, "page", "### A title\n\n| a | b |\n|---|---|\n| 1 | <2 |", {"rows": flat(rows)}, {"plot": figure}
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "page.md", "plot.png", "rows.csv"]
    html = (tmp_path / "page.html").read_text()
    assert "<td>&lt;2</td>" in html
    assert 'src="data:image/' in html
    assert (tmp_path / "page.md").read_text().endswith("![plot](plot.png)\n")
    assert (tmp_path / "rows.csv").read_text().splitlines() == [
        "finding,masked_mean,masked_low,masked_high,masked_n,masked_needed",
        "'=nodule,-1.0,-2.0,0.0,5,",
    ]


def test_without_a_folder_no_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_page(None, "page", "text", {"rows": [{"a": 1}]}, {})
    assert not list(tmp_path.iterdir())
