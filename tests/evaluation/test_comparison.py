"""Methods beside each other: what measures say of maps that are right or wrong, resumption, tables, planted truth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn

from ce_plugin.errors import ArgumentError, FileError, InputError, UnknownNameError
from ce_plugin.evaluation import (
    MEASURES,
    METHODS,
    Case,
    Comparison,
    Method,
    PlantedScene,
    Scene,
    attribution_method,
    box_share,
    compare,
    planted_scenes,
    resolve_method,
)

SIDE = 16


class Spot(nn.Module):
    """Class 1 is the brightness of one quarter, class 0 that of the opposite one; two others are constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 8, stride=8, bias=False)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(2, 4)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([4.0, -4.0])[:, None, None, None].expand_as(self.conv.weight) / 64)
            self.head.weight.copy_(torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x)).flatten(1))


def case(number: int = 0, **changes: object) -> Case:
    x = torch.full((1, 1, SIDE, SIDE), 0.1)
    x[..., 8:, :8] = 0.9
    others = torch.full((3, 1, SIDE, SIDE), 0.1)
    boxes = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    boxes[8:, :8] = True
    scene = Scene(x, 1, Spot().eval(), ident=number)
    return replace(Case(scene, f"image {number}", others, boxes), **changes)  # type: ignore[arg-type]


def truth(x: Tensor, target: int) -> Tensor:
    """The network's brightest quarter."""
    quarters = nn.functional.avg_pool2d(x, x.shape[-1] // 2)
    return (
        (quarters == quarters.amax())
        .float()[0, 0]
        .repeat_interleave(x.shape[-1] // 2, 0)
        .repeat_interleave(x.shape[-1] // 2, 1)
    )


def wrong(x: Tensor, target: int) -> Tensor:
    return 1 - truth(x, target)


def judged(name: str, method: object, one: Case | None = None) -> dict[str, float]:
    one = one or case()
    own = resolve_method(method)
    return MEASURES[name].run(own, one, own(one.scene, 50), 50)


@pytest.mark.parametrize("name", ["faithfulness", "boxes", "infidelity"])
def test_a_right_map_is_better_than_a_wrong_one(name: str) -> None:
    right, false = judged(name, truth), judged(name, wrong)
    assert right.keys() == MEASURES[name].larger.keys()
    for value, larger in MEASURES[name].larger.items():
        assert (right[value] > false[value]) == larger, value


def test_pointing_counts_what_lies_in_the_right_picture() -> None:
    for number in range(4):  # each at another place of the mosaic
        one = case(number)
        assert judged("pointing", truth_of_mosaic, one)["grid pointing"] == pytest.approx(1.0)
        uniform = judged("pointing", lambda x, target: torch.ones(SIDE, SIDE), one)
        assert uniform["grid pointing"] == pytest.approx(0.25)


def truth_of_mosaic(x: Tensor, target: int) -> Tensor:
    """The quarter that is brightest on average."""
    return truth(x, target)


def test_boxes_count_shares_and_ties() -> None:
    boxes = torch.tensor([[True, True], [False, False]])
    assert box_share(torch.tensor([[1.0, 0.0], [1.0, -3.0]]), boxes) == {
        "share in boxes": 0.5,
        "greatest value in boxes": 0.5,
    }
    assert box_share(-torch.ones(2, 2), boxes)["share in boxes"] == 0
    for mask in (boxes.float(), torch.zeros(2, 2).bool(), boxes[:1]):
        with pytest.raises(InputError, match="boxes"):
            box_share(torch.ones(2, 2), mask)
    without = judged("boxes", truth, case(boxes=None))
    assert all(math.isnan(value) for value in without.values())


def test_faithfulness_is_that_of_a_hand_made_curve() -> None:
    """A map that orders by quarters: the score falls when the first quarter of pixels is replaced, and no more."""
    found = judged("faithfulness", truth)
    assert found["insertion - deletion, shared"] > 0.1
    assert found["insertion"] > found["deletion"]


def test_infidelity_of_a_linear_network_and_its_own_map_is_zero() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 1, bias=False)).eval()
    x = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    class Logit(nn.Module):
        """Scores whose sigmoid is linear in the image."""

        def forward(self, images: Tensor) -> Tensor:
            return torch.logit((0.5 + 0.05 * net(images)).clamp(0.01, 0.99))

    scene = Scene(x, 0, Logit().eval(), outcome="sigmoid")
    weight = net[1].weight.reshape(SIDE, SIDE)
    exact = resolve_method(lambda image, target: (weight * (image - image.mean()))[0, 0].detach())
    random = METHODS["random"]
    one = Case(scene)
    assert MEASURES["infidelity"].run(exact, one, exact(scene), 1)["infidelity"] < 1e-6
    assert MEASURES["infidelity"].run(random, one, random(scene), 1)["infidelity"] > 1e-5


def test_sensitivity_is_zero_where_a_map_does_not_depend_on_the_image() -> None:
    assert judged("sensitivity", "centre")["max-sensitivity"] == 0
    assert judged("sensitivity", "input-x-gradient")["max-sensitivity"] > 0.01
    assert math.isnan(judged("sensitivity", lambda x, target: torch.zeros(SIDE, SIDE))["max-sensitivity"])


def test_randomisation_sees_whether_a_map_depends_on_weights_and_class() -> None:
    blind = Method("blind", lambda scene, passes: scene.x[0, 0])
    found = judged("randomisation", blind)
    assert found == {"|rank correlation|, shuffled weights": 1.0, "|rank correlation|, random class": 1.0}
    planted = next(planted_scenes(1)).scene
    one = Case(planted)
    before = {name: value.clone() for name, value in planted.network.state_dict().items()}
    found = judged("randomisation", "integrated-gradients", one)
    assert found["|rank correlation|, shuffled weights"] < 0.9
    assert found["|rank correlation|, random class"] < 0.999
    assert all(torch.equal(value, before[name]) for name, value in planted.network.state_dict().items())
    # What explains one network only cannot be asked about another.
    bound = judged("randomisation", Saliency(one.scene.network), one)
    assert math.isnan(bound["|rank correlation|, shuffled weights"])
    free = judged("randomisation", attribution_method(Saliency), one)
    assert not math.isnan(free["|rank correlation|, random class"])


@pytest.mark.parametrize("outcome", ["probability", "sigmoid"])
def test_stability_is_one_where_a_map_keeps_its_order(outcome: str) -> None:
    one = case()
    one = replace(one, scene=replace(one.scene, outcome=outcome))
    assert judged("stability", "centre", one)["rank correlation, FGSM"] == 1.0
    seen = []

    def watched(x: Tensor, target: int) -> Tensor:
        seen.append(x)
        return x[0, 0]

    judged("stability", watched, one)
    change = (seen[1] - seen[0]).abs().max()
    assert float(change) == pytest.approx(8 / 255, abs=1e-6)
    # The attack lowers the score.
    assert float(one.scene.scores(seen[1])) < float(one.scene.scores(seen[0]))


@pytest.mark.parametrize("name", ["faithfulness", "pointing"])
def test_other_images_are_asked_for(name: str) -> None:
    with pytest.raises(InputError, match="others"):
        judged(name, truth, case(others=None))
    with pytest.raises(InputError, match="others"):
        case(others=torch.zeros(1, 3, 2, 2))
    with pytest.raises(InputError, match="boxes"):
        case(boxes=torch.zeros(2, 2).bool())


def test_the_table_is_paired_and_bounded() -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(size=40)
    records = [
        {"image": str(i), "method": name, "passes": 2, "seconds": 0.5, "values": {"score": base[i] + gap, "b": None}}
        for i in range(40)
        for name, gap in (("first", 0.0), ("second", 0.25))
        if (name, i) != ("second", 7)
    ]
    frame = Comparison(records, {"score": True}).table().set_index(["measure", "method"])
    assert "b" not in frame.index.get_level_values(0)
    first, second = frame.loc[("score", "first")], frame.loc[("score", "second")]
    assert (first["images"], second["images"]) == (40, 39)
    assert first["mean"] == pytest.approx(base.mean())
    # Paired: the difference is the same on every image, and its interval a point, though the means' are wide.
    assert second["difference"] == pytest.approx(0.25)
    assert second["difference_low"] == pytest.approx(0.25)
    assert first["mean_low"] < base.mean() - 0.1
    half = 1.96 * base.std(ddof=1) / 40**0.5
    assert first["mean_high"] - first["mean"] == pytest.approx(half, rel=0.15)
    assert math.isnan(first["difference"])


def test_baselines_are_always_there_and_names_are_checked() -> None:
    found = compare([case()], ["random"], ["boxes"])
    assert found.methods == ["random", "centre"]
    with pytest.raises(UnknownNameError, match="measures"):
        compare([case()], ["random"], ["faith"])
    with pytest.raises(UnknownNameError, match="method"):
        compare([case()], ["sailency"], ["boxes"])
    with pytest.raises(ArgumentError, match="methods"):
        compare([case()], [], ["boxes"])
    with pytest.raises(ArgumentError, match="methods"):
        compare([case()], ["saliency", "saliency"], ["boxes"])


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    methods, measures = ["saliency", "rise"], ["faithfulness", "boxes"]
    whole = compare([case(0), case(1)], methods, measures, passes=12, planted=2)
    done: list[str] = []

    def stop(name: str) -> None:
        done.append(name)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare([case(0), case(1)], methods, measures, passes=12, planted=2, kept=file, step=stop)
    with file.open("a") as stream:
        stream.write('{"image": "image 0", "method": "centre", "val')  # killed while it wrote
    again: list[str] = []
    found = compare([case(0), case(1)], methods, measures, passes=12, planted=2, kept=file, step=again.append)
    assert again[0] == done[3] == "image 0: centre"
    assert len(again) == 16 - 3
    strip = [{k: v for k, v in record.items() if k != "seconds"} for record in found.records]
    assert strip == [{k: v for k, v in record.items() if k != "seconds"} for record in whole.records]
    assert all(json.loads(line) for line in file.read_text().splitlines())
    # More images and methods are added to what is there.
    more: list[str] = []
    compare(
        [case(0), case(1), case(2)], [*methods, "grad-cam"], measures, passes=12, planted=2, kept=file, step=more.append
    )
    assert len(more) == 5 + 2 + 2
    with pytest.raises(FileError, match="passes 12, not 13"):
        compare([case(0)], methods, measures, passes=13, kept=file)
    with pytest.raises(FileError, match="network"):
        compare([case(0)], methods, measures, passes=12, kept=file, made_with={"network": "other"})
    file.write_text("something else\n")
    with pytest.raises(FileError, match="a file of records"):
        compare([case(0)], methods, measures, passes=12, kept=file)


def test_planted_truth_is_that_of_single_removals_where_effects_add_up() -> None:
    scene = PlantedScene(marks=6, seed=4).eval()
    with torch.no_grad():
        scene.head.strength.zero_()
        scene.head.outer.zero_()
    found = scene.contributions(1, "logit")
    with torch.no_grad():
        clean = scene(scene.x)[0, 1]
        for place in scene.places:
            x = scene.x.clone()
            row, column = divmod(place, scene.grid)
            x[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0
            assert float(found[row, column]) == pytest.approx(float(clean - scene(x)[0, 1]), abs=1e-5)
    assert int((found != 0).sum()) <= 6
    with pytest.raises(ArgumentError, match="marks"):
        PlantedScene(marks=13)


def test_methods_are_told_apart_by_planted_truth() -> None:
    cases = list(planted_scenes(6))
    mean = {
        name: float(np.mean([one.agreement(METHODS[name](one.scene, 200)) for one in cases]))
        for name in ("causal-effect", "integrated-gradients", "random", "centre")
    }
    assert mean["causal-effect"] > 0.8
    assert mean["integrated-gradients"] > 0.8
    assert abs(mean["random"]) < 0.3
    assert abs(mean["centre"]) < 0.3
    assert cases[0].agreement(torch.ones(28, 28)) == 0
