"""The table of effects: rows that depend on the image alone, and questions without the network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from _worlds import explainer, inputs, logit_effects, network, pictures, small_cnn
from scipy import stats
from torch import Tensor

from ce_plugin import ConceptCausalEffect, Evidence, LayerCausalEffect
from ce_plugin.concepts import ConceptAutoencoder
from ce_plugin.designs import RandomMask
from ce_plugin.effects import resolve_outcome
from ce_plugin.errors import ArgumentError, FileError, InputError, OutcomeError, TargetError, UnknownNameError
from ce_plugin.expected import EffectTable, Sample, Subset, run
from ce_plugin.interventions import Adversarial, PixelMask

HALF = {"clean": None, "dark": PixelMask(fill=0.5)}


def samples(n: int) -> list[Sample]:
    return [Sample(x, i % 3, f"{i}.png") for i, x in enumerate(inputs(n))]


def table(folder: Path, n: int = 24, **options: Any) -> EffectTable:
    options = {"outcomes": ["logit", "prediction_weighted"], "classes": "all", "given": HALF} | options
    return run(explainer(), samples(n), folder / "run", **options)


def test_rows_are_the_effects_of_the_images(tmp_path: Path) -> None:
    found = table(tmp_path)
    frame = pd.read_parquet(tmp_path / "run" / "rows")
    assert len(frame) == 48
    frame = frame[frame["evidence"] == "clean"].set_index("id").loc[range(24)]
    truth = logit_effects(network(), inputs(24))
    assert np.allclose(np.stack(frame["effect_logit"]), truth.reshape(24, -1).numpy(), atol=1e-6)
    assert np.allclose(np.stack(frame["outcome_logit"]), network()(inputs(24)).numpy(), atol=1e-6)
    assert frame["path"].tolist() == [f"{i}.png" for i in range(24)]
    assert frame["label"].tolist() == [i % 3 for i in range(24)]
    answers = network()(inputs(24)).argmax(1).tolist()
    assert frame["predicted"].tolist() == frame["explained"].tolist() == answers
    assert list(found.images().columns) == ["id", "evidence", "path", "label", "explained", "predicted", "image_sha256"]


def test_the_paper_s_reduction_is_beside_the_others(tmp_path: Path) -> None:
    found = table(tmp_path)
    _, values = found.values(outcome="prediction_weighted", evidences=["clean"])
    single = LayerCausalEffect(network(), "1", outcome="prediction_weighted").estimate(inputs(24))
    assert torch.allclose(values[:, 0], single.effect, atol=1e-7)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7, "shard_size": 10}, {"loaders": 2}])
def test_any_split_gives_the_same_table(tmp_path: Path, options: dict[str, Any]) -> None:
    given = {"clean": None, "masked": Evidence(PixelMask("noise"), units=RandomMask(0.5, n_trials=2))}
    one = table(tmp_path / "a", 20, given=given)
    two = run(
        explainer(), samples(20), tmp_path / "b", ids=[*range(19, -1, -1)], given=given, classes="all",
        outcomes=["logit", "prediction_weighted"], **options,
    )  # fmt: skip
    for outcome in one.outcomes:
        ids, here = one.values(outcome=outcome, target="all")
        order, there = two.values(outcome=outcome, target="all")
        assert np.array_equal(ids, order)
        assert float((here - there).abs().max()) <= 1e-6 * float(here.abs().max())


def test_attacked_images_are_kept_in_eight_bits_with_their_hash(tmp_path: Path) -> None:
    net, data = small_cnn(), pictures(6)
    attack = Adversarial.pgd(net, eps=0.1, max_iter=3)
    made = LayerCausalEffect(net, "1", outcome="log_odds")
    run(made, data, tmp_path / "run", given={"clean": None, "pgd": attack}, classes="all")
    frame = pd.read_parquet(tmp_path / "run" / "rows").set_index(["evidence", "id"]).sort_index()
    assert frame.loc["clean", "image"].isna().all()
    for i in range(6):
        row = frame.loc[("pgd", i)]
        assert hashlib.sha256(row["image"]).hexdigest() == row["image_sha256"]
        levels = np.frombuffer(row["image"], np.uint8).reshape(1, 1, 8, 8)
        image = torch.from_numpy(levels.copy()).float() / 255
        alone = attack.perturb(data[i].image[None], ids=[i], seed=0)
        assert float((image - alone).abs().max()) <= 0.5 / 255 + 1e-6
        again = made.estimate(image, ids=[i]).effect
        assert np.allclose(row["effect_log_odds"], again.flatten().numpy(), atol=1e-6)
    assert np.array_equal(frame.loc["clean", "explained"], frame.loc["pgd", "explained"])


def test_means_and_paired_differences_are_those_of_the_rows(tmp_path: Path) -> None:
    answer = table(tmp_path, shard_size=5).expected("logit", target="all")
    clean = logit_effects(network(), inputs(24))
    dark = logit_effects(network(), torch.full((24, 4), 0.5))
    assert torch.allclose(answer["dark"].effect[0], dark.mean(0), atol=1e-6)
    assert torch.allclose(answer["clean"].std_error[0], clean.std(0) / 24**0.5, atol=1e-6)  # type: ignore[index]
    p = stats.ttest_rel(dark.numpy(), clean.numpy()).pvalue
    assert np.allclose(answer.difference("dark", "clean").p_values()[0].numpy(), p, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(
    "subset",
    [Subset(correct=True), Subset(correct=False), Subset(label=1), Subset(explained=2), Subset(ids=[3, 5, 8])],
)
def test_a_subset_is_the_mean_of_its_images(tmp_path: Path, subset: Subset) -> None:
    x, labels = inputs(60), torch.arange(60) % 3
    answers = network()(x).argmax(1)
    keep = torch.ones(60, dtype=torch.bool)
    if subset.correct is not None:
        keep = (answers == labels) == subset.correct
    if subset.label is not None:
        keep = labels == subset.label
    if subset.explained is not None:
        keep = answers == subset.explained
    if subset.ids is not None:
        keep = torch.isin(torch.arange(60), torch.tensor(list(subset.ids)))
    answer = table(tmp_path, 60, shard_size=16).expected("logit", target="all", subset=subset)
    assert answer.n_images == int(keep.sum()) > 0
    assert torch.allclose(answer["clean"].effect[0], logit_effects(network(), x)[keep].mean(0), atol=1e-6)


def test_the_share_of_images_on_which_a_unit_acts(tmp_path: Path) -> None:
    found = table(tmp_path, shard_size=7)
    answer = found.expected("logit", target="all")
    truth = (network()[:2](inputs(24)) != 0).double().mean(0)
    assert 0 < float(truth.min()) < 1
    assert answer.acting is not None
    assert torch.allclose(answer.acting[0], truth[:, None].expand(5, 3))
    frame = answer.to_dataframe()
    assert np.allclose(frame[frame["evidence"] == "clean"]["acting"], truth.repeat_interleave(3))
    assert answer.difference("dark", "clean").acting is not None
    assert answer["dark"].equals(answer[1])


def test_each_image_s_own_class_and_classes_by_name(tmp_path: Path) -> None:
    truth, answers = logit_effects(network(), inputs(24)), network()(inputs(24)).argmax(1)
    own = truth[torch.arange(24), :, answers]
    every = table(tmp_path / "all")
    explained = table(tmp_path / "explained", classes="explained")
    some = table(tmp_path / "some", classes=[2, 0])
    for one in (every, explained):
        assert torch.allclose(one.expected("logit").effect[0, :, 0], own.mean(0), atol=1e-6)
        assert one.expected("logit").classes == ("explained",)
    assert torch.allclose(some.expected("logit", target=[0, 2]).effect[0], truth.mean(0)[:, [0, 2]], atol=1e-6)
    assert some.expected("logit", target="all").classes == (2, 0)
    mine = int(answers[0])
    one = explained.expected("logit", target=mine, subset=Subset(explained=mine))
    assert torch.allclose(one.effect[0, :, 0], own[answers == mine].mean(0), atol=1e-6)
    with pytest.raises(
        TargetError, match=r"class that the table has .each image's explained class only.*classes='all'"
    ):
        explained.expected("logit", target=1)
    with pytest.raises(TargetError, match=r"\(2, 0\), but got 1"):
        some.expected("logit", target=1)
    if 1 in answers:
        with pytest.raises(TargetError, match=r"\(2, 0\), but got 1"):
            some.expected("logit")
    with pytest.raises(TargetError, match="one number for all classes"):
        every.expected("prediction_weighted", target=1)


def test_the_rows_of_files_with_one_image_each(tmp_path: Path) -> None:
    ids, values = table(tmp_path, 3, shard_size=1).values()
    assert ids.tolist() == [0, 1, 2]
    assert torch.equal(values, table(tmp_path / "whole", 3, batch_size=1).values()[1])


def test_weights_are_re_draws(tmp_path: Path) -> None:
    found, weights = table(tmp_path, shard_size=7), np.zeros(24)
    drawn = [0, 0, 3, 9, 9, 9, 23]
    np.add.at(weights, drawn, 1)
    answer = found.expected("logit", target="all", weights=weights)
    truth = logit_effects(network(), inputs(24))[drawn]
    assert answer.n_images == 7
    assert torch.allclose(answer["clean"].effect[0], truth.mean(0), atol=1e-6)
    assert torch.allclose(answer["clean"].std_error[0], truth.std(0) / 7**0.5, atol=1e-6)  # type: ignore[index]


def test_reading_b_is_the_evidence_s_effect_with_the_node_set(tmp_path: Path) -> None:
    net, x = network(), inputs(24)

    def with_node_zero(x: Tensor, unit: int) -> Tensor:
        hidden = net[:2](x).clone()
        hidden[:, unit] = 0
        return net[2](hidden).double()

    answer = table(tmp_path).expected("logit", target="all", reading="B")
    assert answer.evidences == ("dark",)
    half = torch.full_like(x, 0.5)
    for unit in range(5):
        by_hand = with_node_zero(half, unit) - with_node_zero(x, unit)
        assert torch.allclose(answer.effect[0, unit], by_hand.mean(0), atol=1e-5)
        assert torch.allclose(answer.std_error[0, unit], by_hand.std(0) / 24**0.5, atol=1e-5)  # type: ignore[index]
    assert torch.allclose(answer.reference[0], (net(half) - net(x)).double().mean(0), atol=1e-6)


def test_the_autoencoder_s_insertion_is_split_off(tmp_path: Path) -> None:
    net, data = small_cnn(), pictures(5)
    made = ConceptCausalEffect(net, "1", ConceptAutoencoder(channels=6, concepts=2), min_fidelity=0, outcome="log_odds")
    answer = run(made, data, tmp_path / "run").expected("log_odds")
    x = torch.stack([one.image for one in data])
    single = made.estimate(x, target=net(x).argmax(1))
    assert answer.insertion_error is not None
    assert torch.allclose(answer.insertion_error[0, 0], single.insertion_effect.double().std() / 5**0.5, atol=1e-5)
    assert answer.effect.shape == (1, 2, 1)
    assert torch.allclose(answer.insertion_effect[0, 0], single.insertion_effect.mean().double(), atol=1e-5)  # type: ignore[index]


def test_bootstrap_t_is_the_t_interval_where_effects_are_normal_and_wider_where_they_are_skewed(tmp_path: Path) -> None:
    x = inputs(300)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]))
        net[0].bias.zero_()
        net[1].weight.fill_(1.0)
    x[:, 1] = torch.where(torch.arange(300) % 50 == 0, 30.0, 0.0)  # one image of fifty
    found = run(LayerCausalEffect(net, "0", outcome=None), list(x), tmp_path / "run")
    low, high = found.bootstrap_t(n_resamples=999)
    answer = found.expected()
    a, b = answer.confidence_interval()
    assert abs(float(low[0, 0, 0] - a[0, 0, 0])) < 0.02
    assert abs(float(high[0, 0, 0] - b[0, 0, 0])) < 0.02
    assert (float(low[0, 1, 0]), float(high[0, 1, 0])) == (0, 0)  # a unit that does nothing
    assert float(low[0, 2, 0]) < float(a[0, 2, 0]) - 0.2  # effects are negative: the long side is below
    again = found.bootstrap_t(n_resamples=999)
    assert torch.equal(low, again[0])
    assert torch.equal(high, again[1])


def test_a_single_output_has_no_classes(tmp_path: Path) -> None:
    net = network(units=3, classes=1)
    net[2].bias -= net(inputs(12)).mean()  # type: ignore[operator]
    data = [Sample(x, int(net(x) > 0)) for x in inputs(12)]
    found = run(LayerCausalEffect(net, "1", outcome="sigmoid"), data, tmp_path / "a")
    assert found.expected(subset=Subset(correct=True)).n_images == 12  # one output: the answer is its sign
    assert set(found.images()["predicted"]) == {0, 1}
    assert found.outcomes == ("sigmoid",)
    assert found.expected().effect.shape == (1, 3, 1)
    with pytest.raises(OutcomeError, match="single output"):
        run(LayerCausalEffect(net, "1"), samples(4), tmp_path / "b")


def test_a_shard_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    table(tmp_path, ids=range(6))
    with pytest.raises(FileError, match="a folder that does not exist yet"):
        table(tmp_path)
    with pytest.raises(FileError, match=r"given.dark is .*0\.5.* there and .*0\.25.* here"):
        table(tmp_path, given={"clean": None, "dark": PixelMask(fill=0.25)}, resume=True)
    other = LayerCausalEffect(network(seed=9), "1", outcome="logit")
    options: dict[str, Any] = {"outcomes": ["logit", "prediction_weighted"], "classes": "all", "given": HALF}
    with pytest.raises(FileError, match=r"network is '\w+' there and '\w+' here"):
        run(other, samples(24), tmp_path / "run", resume=True, **options)
    with pytest.raises(FileError, match="data is '24 images"):
        run(explainer(), samples(25), tmp_path / "run", resume=True, **options)
    assert len(table(tmp_path, resume=True)) == 24
    other_run = table(tmp_path / "other", classes="explained", ids=range(6, 9))
    shard = next((other_run.folder / "rows").iterdir())
    (tmp_path / "run" / "rows" / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(FileError, match="classes is 'explained' there and 'all' here"):
        EffectTable(tmp_path / "run")


def test_damage_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="the folder of a run"):
        EffectTable(tmp_path)
    found = table(tmp_path, shard_size=8)
    shards = sorted((found.folder / "rows").iterdir())
    whole = shards[0].read_bytes()
    shards[0].with_name("0000000099-0000000099-aa.parquet").write_bytes(whole)
    with pytest.raises(FileError, match="each image once, but got image 0 in several shards"):
        EffectTable(found.folder)
    shards[0].with_name("0000000099-0000000099-aa.parquet").unlink()
    shards[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match=r"which is damaged\. Remove it and resume"):
        EffectTable(found.folder)
    shards[0].unlink()
    assert found.missing(range(24)) == []
    assert EffectTable(found.folder).missing(range(24)) == list(range(8))
    assert len(table(tmp_path, shard_size=8, resume=True)) == 24
    content = json.loads((found.folder / "manifest.json").read_text())
    (found.folder / "manifest.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(FileError, match="version 1, but got version 99"):
        EffectTable(found.folder)


def test_wrong_questions_are_said(tmp_path: Path) -> None:
    found = table(tmp_path)
    with pytest.raises(UnknownNameError, match="outcome"):
        found.expected("probability")
    with pytest.raises(UnknownNameError, match="evidence"):
        found.expected("logit", evidences=["clear"])
    with pytest.raises(UnknownNameError, match="reading"):
        found.expected("logit", reading="C")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="reading"):
        found.expected("prediction_weighted", reading="B")
    with pytest.raises(ArgumentError, match="one for each of 24 images"):
        found.expected("logit", weights=np.ones(3))
    with pytest.raises(InputError, match="one image or more"):
        found.expected("logit", subset=Subset(ids=[999]))
    with pytest.raises(ArgumentError, match="n_resamples"):
        found.bootstrap_t(n_resamples=10**8)


def test_shards_are_plain_parquet(tmp_path: Path) -> None:
    found = table(tmp_path, shard_size=10)
    names = sorted(file.name for file in (found.folder / "rows").iterdir())
    assert [name[:21] for name in names] == ["0000000000-0000000009", "0000000010-0000000019", "0000000020-0000000023"]
    schema = pq.read_schema(found.folder / "rows" / names[0])
    assert schema.field("effect_logit").type.list_size == 15
    assert json.loads(schema.metadata[b"ce_plugin"]) == found.configuration
    assert resolve_outcome("logit").name in found.outcomes
