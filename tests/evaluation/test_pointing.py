"""The grid pointing game: what is put where, closed forms of the share, a map that knows the answer, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, ModelError, TargetError
from ce_plugin.evaluation import Mosaics, confidently_classified, grid_pointing_game, mosaics, pointing_share


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), images=st.integers(4, 9), grid=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_mosaics_hold_their_members_in_their_cells(n: int, images: int, grid: int, seed: int) -> None:
    x, classes = draw(images, 3, 4, 6, seed=seed), [10 * i for i in range(images)]
    made = mosaics(x, classes, n, grid=grid, seed=seed)
    assert (len(made), made.grid) == (n, grid)
    for m in range(n):
        for cell in range(grid**2):
            i, j = divmod(cell, grid)
            member = int(made.members[m, cell])
            assert torch.equal(made.x[m, :, 4 * i : 4 * i + 4, 6 * j : 6 * j + 6], x[member])
            assert int(made.classes[m, cell]) == classes[member]
    # Every image about equally often.
    used = torch.bincount(made.members.flatten(), minlength=images)
    assert used.max() - used.min() <= 1


def test_no_class_twice_in_a_mosaic() -> None:
    made = mosaics(draw(12, 1, 2, 2), [0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4], 30)
    assert all(len(set(row)) == 4 for row in made.classes.tolist())


def test_seed_decides_the_draw() -> None:
    x, classes = draw(9, 1, 2, 2), list(range(9))
    assert torch.equal(mosaics(x, classes, 5, seed=3).members, mosaics(x, classes, 5, seed=3).members)
    assert not torch.equal(mosaics(x, classes, 5, seed=3).members, mosaics(x, classes, 5, seed=4).members)


def test_shrunk_mosaics_keep_flat_images_flat() -> None:
    flat = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 16, 16)
    made = mosaics(flat, range(4), 1, size=16)
    assert made.x.shape == (1, 3, 16, 16)
    for cell, member in enumerate(made.members[0].tolist()):
        i, j = divmod(cell, 2)
        inner = made.x[0, :, 8 * i + 1 : 8 * i + 7, 8 * j + 1 : 8 * j + 7]
        torch.testing.assert_close(inner, torch.full_like(inner, member))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), grid=st.sampled_from([1, 2, 3]), scale=st.floats(1e-3, 1e3))
def test_shares_of_all_cells_sum_to_one_and_ignore_scale_and_negatives(seed: int, grid: int, scale: float) -> None:
    maps = draw(1, 6, 12, seed=seed).double() - 0.5
    shares = torch.stack([pointing_share(maps, cell, grid=grid)[0] for cell in range(grid**2)])
    assert shares.sum().item() == pytest.approx(1)
    for other in (scale * maps, maps.clamp(min=0), maps[:, None]):
        again = torch.stack([pointing_share(other, cell, grid=grid)[0] for cell in range(grid**2)])
        torch.testing.assert_close(again, shares)


def test_share_in_closed_form_with_a_cell_for_each_map() -> None:
    maps = torch.zeros(3, 4, 4)
    maps[:, 0, 3], maps[:, 3, 0], maps[:, 2, 2] = 6.0, 3.0, -4.0
    torch.testing.assert_close(pointing_share(maps, [1, 2, 3]), torch.tensor([2 / 3, 1 / 3, 0.0]))


def test_a_map_without_positive_values_points_nowhere_and_a_constant_one_at_chance() -> None:
    assert pointing_share(torch.full((1, 4, 4), -1.0), 2).item() == 0
    assert pointing_share(torch.zeros(1, 4, 4), 2).item() == 0
    assert pointing_share(torch.ones(1, 4, 4), 2).item() == 0.25


def test_game_asks_for_every_cell_and_tells_the_other_classes() -> None:
    made = mosaics(draw(6, 3, 4, 4), [5, 6, 7, 8, 9, 3], 2)
    asked: list[tuple[int, tuple[int, ...]]] = []

    def knows(x: Tensor, target: int, others: tuple[int, ...]) -> Tensor:
        asked.append((target, others))
        mosaic = len(asked[:-1]) // 4
        cell = made.classes[mosaic].tolist().index(target)
        assert torch.equal(x, made.x[mosaic : mosaic + 1])
        small = torch.zeros(1, 1, 8, 8)
        small[0, 0, 4 * (cell // 2) + 1 : 4 * (cell // 2) + 3, 4 * (cell % 2) + 1 : 4 * (cell % 2) + 3] = 1
        return small

    assert torch.equal(grid_pointing_game(knows, made), torch.ones(2, 4))
    for m in range(2):
        row = made.classes[m].tolist()
        for cell in range(4):
            assert asked[4 * m + cell] == (row[cell], tuple(c for i, c in enumerate(row) if i != cell))


def test_game_enlarges_maps_bilinearly() -> None:
    made = Mosaics(torch.zeros(1, 3, 4, 4), torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 2, 3]]))
    got = grid_pointing_game(lambda x, target, others: torch.tensor([[[1.0, 0.0]]]), made)
    # A row of 2 enlarged to 4: 1, .75, .25, 0, the same in both halves of the height.
    torch.testing.assert_close(got, torch.tensor([[1.75 / 4, 0.25 / 4, 1.75 / 4, 0.25 / 4]]))


def test_confident_examples_are_right_and_sure() -> None:
    logits = torch.log(torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.02, 0.98]]))
    assert confidently_classified(logits, [0, 1, 0, 1]).tolist() == [0, 3]
    assert confidently_classified(logits, torch.tensor([0, 1, 0, 1]), 0.5).tolist() == [0, 2, 3]


def test_errors_say_what_to_do() -> None:
    x = draw(4, 3, 4, 4)
    with pytest.raises(InputError, match="`images` to be 5 images"):
        mosaics(x, range(5), 1)
    with pytest.raises(InputError, match=r"4 different ones, but got 2. Give images of more classes"):
        mosaics(x, [0, 0, 1, 1], 1)
    with pytest.raises(ArgumentError, match="`n` to be 1 or more, but got 0"):
        mosaics(x, range(4), 0)
    with pytest.raises(ArgumentError, match="`size` to be 1 or more"):
        mosaics(x, range(4), 1, size=0)
    with pytest.raises(InputError, match=r"multiples of 2, but got shape .* Enlarge maps"):
        pointing_share(torch.zeros(1, 7, 8), 0)
    with pytest.raises(InputError, match="`maps` to be finite"):
        pointing_share(torch.full((1, 4, 4), float("nan")), 0)
    with pytest.raises(ArgumentError, match=r"one index below 4, .* but got \[4\]"):
        pointing_share(torch.zeros(1, 4, 4), 4)
    with pytest.raises(ArgumentError, match="one for each of 3 maps"):
        pointing_share(torch.zeros(3, 4, 4), [0, 1])
    with pytest.raises(ModelError, match=r"one map .1, h, w., but got shape .2, 4, 4."):
        grid_pointing_game(lambda x, target, others: torch.zeros(2, 4, 4), mosaics(x, range(4), 1))
    with pytest.raises(InputError, match=r"logits .N, K. with N = 3 labels"):
        confidently_classified(torch.zeros(2, 2), [0, 1, 1])
    with pytest.raises(TargetError, match="class indices of 2 classes"):
        confidently_classified(torch.zeros(2, 2), [0, 2])
    with pytest.raises(ArgumentError, match="a probability in"):
        confidently_classified(torch.zeros(2, 2), [0, 1], 1.5)
