"""Units of the input: which pixels an assignment sets, and how unit values become maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ce_plugin.designs import OneAtATime
from ce_plugin.sites import InputSite, MaskUnits, WindowUnits, patch_grid


@given(height=st.integers(1, 60), width=st.integers(1, 60), cells=st.integers(1, 20))
@settings(deadline=None)
def test_patch_grid(height: int, width: int, cells: int) -> None:
    grid = patch_grid(height, width, cells)[0, 0]
    rows, columns = min(height, cells), min(width, cells)
    assert grid.shape == (height, width)
    # Every unit is there, is a rectangle, and is as large as the others up to one row and column.
    row_sizes, column_sizes = set(), set()
    for unit in range(rows * columns):
        where = (grid == unit).nonzero()
        high, wide = (where[:, axis].max() - where[:, axis].min() + 1 for axis in (0, 1))
        assert len(where) == high * wide
        row_sizes.add(int(high))
        column_sizes.add(int(wide))
    assert max(row_sizes) - min(row_sizes) <= 1
    assert max(column_sizes) - min(column_sizes) <= 1
    assert int(grid.max()) == rows * columns - 1


def test_the_default_grid_is_row_by_row() -> None:
    units = InputSite(cells=2).units_of((torch.zeros(1, 3, 4, 6),))
    assert units.grid == (2, 2)
    (mask,) = units.masks(torch.tensor([[False, True, False, False]]), torch.tensor([0]))
    assert mask.expand(1, 3, 4, 6)[0, :, :2, 3:].all()
    assert int(mask.expand(1, 3, 4, 6).sum()) == 3 * 2 * 3


def test_default_units_of_a_tuple_are_not_joint() -> None:
    units = InputSite().units_of((torch.zeros(2, 1, 3, 3), torch.zeros(2, 4), torch.zeros(2, 2, 2)))
    assert units.n_units.tolist() == [17, 17]
    assert units.grid is None
    masks = units.masks(OneAtATime().assignments(17), torch.zeros(17, dtype=torch.long))
    sizes = torch.stack([mask.flatten(1).sum(1) for mask in masks], 1)
    assert (sizes.sum(1) == 1).all()
    assert sizes.sum(0).tolist() == [9, 4, 4]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_masks_and_maps_of_feature_masks(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3))
    shapes = data.draw(st.lists(st.sampled_from([(4,), (2, 3), (1, 3, 3)]), min_size=1, max_size=2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    inputs = tuple(torch.zeros(n, *shape) for shape in shapes)
    rows = [data.draw(st.sampled_from([1, n])) for _ in shapes]
    masks = tuple(
        torch.randint(-2, 4, (row, *shape), generator=generator) * 5 for row, shape in zip(rows, shapes, strict=True)
    )
    units = MaskUnits(inputs, masks)
    full = tuple(mask.expand(n, *mask.shape[1:]) for mask in masks)
    ids = [sorted(set(torch.cat([m[i].flatten() for m in full]).tolist())) for i in range(n)]
    assert units.n_units.tolist() == [len(own) for own in ids]
    assert units.width == max(map(len, ids))
    assignments = torch.rand(6, units.width, generator=generator) < 0.5
    examples = torch.randint(0, n, (6,), generator=generator)
    values = torch.rand(n, units.width, generator=generator)
    maps = units.spread(values)
    for k, mask in enumerate(full):
        found = units.masks(assignments, examples)[k].expand(6, *shapes[k])
        for b, i in enumerate(examples.tolist()):
            wanted = torch.tensor([bool(assignments[b, ids[i].index(v)]) for v in mask[i].flatten().tolist()])
            assert torch.equal(found[b].flatten(), wanted)
        assert maps[k].shape == inputs[k].shape
        for i in range(n):
            wanted = torch.stack([values[i, ids[i].index(v)] for v in mask[i].flatten().tolist()])
            assert torch.equal(maps[k][i].flatten(), wanted)


def test_labels_are_the_masks_own_ids() -> None:
    x = torch.zeros(2, 3)
    assert MaskUnits((x,), (torch.tensor([[7, 7, 2]]),)).labels == ["2", "7"]
    assert MaskUnits((x,), (torch.tensor([[7, 7, 2], [1, 2, 3]]),)).labels == [["2", "7"], ["1", "2", "3"]]
    assert MaskUnits((x,), (torch.tensor([[7, 7, 2], [2, 2, 7]]),)).labels == ["2", "7"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.int32])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    units = MaskUnits((torch.zeros(1, 4),), (torch.tensor([[0, 1, 1, 0]]).to(dtype),))
    assert units.n_units.tolist() == [2]
    assert units.masks(torch.tensor([[False, True]]), torch.tensor([0]))[0].tolist() == [[False, True, True, False]]


def test_masks_broadcast_over_channels_and_leading_dimensions() -> None:
    x = torch.zeros(2, 3, 2, 2)
    for mask in (torch.arange(4).reshape(2, 2), torch.arange(4).reshape(1, 2, 2), torch.arange(4).reshape(1, 1, 2, 2)):
        (found,) = InputSite(mask).units_of((x,)).masks(torch.eye(4) > 0, torch.zeros(4, dtype=torch.long))
        assert found.expand(4, 3, 2, 2).flatten(1).sum(1).tolist() == [3] * 4


def brute_windows(size: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]) -> list[Tensor]:
    """All windows as masks, each axis stepped until the window reaches the end."""
    axes = []
    for s, w, step in zip(size, window, stride, strict=True):
        starts = [0]
        while starts[-1] + w < s:
            starts.append(starts[-1] + step)
        axes.append(starts)
    out = []
    for start in torch.cartesian_prod(*map(torch.tensor, axes)).reshape(-1, len(size)).tolist():
        mask = torch.zeros(size, dtype=torch.bool)
        mask[tuple(slice(a, a + w) for a, w in zip(start, window, strict=True))] = True
        out.append(mask)
    return out


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_windows_cover_everything_and_are_cut_at_the_edges(data: st.DataObject) -> None:
    size = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    window = tuple(data.draw(st.integers(1, s)) for s in size)
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    n = data.draw(st.integers(1, 2))
    units = WindowUnits((torch.zeros(n, *size),), (window,), (stride,))
    wanted = brute_windows(size, window, stride)
    assert units.n_units.tolist() == [len(wanted)] * n
    (masks,) = units.masks(torch.eye(len(wanted)) > 0, torch.zeros(len(wanted), dtype=torch.long))
    assert torch.equal(masks.expand(-1, *size), torch.stack(wanted))
    assert torch.stack(wanted).any(0).all()
    values = torch.rand(n, len(wanted), dtype=torch.float64)
    (found,) = units.spread(values)
    weights = torch.stack(wanted).double()
    mean = torch.einsum("nu,u...->n...", values, weights) / weights.sum(0)
    assert torch.allclose(found, mean, atol=1e-12)


def test_joint_windows_are_a_union() -> None:
    units = WindowUnits((torch.zeros(1, 5),), ((2,),), ((1,),))
    (mask,) = units.masks(torch.tensor([[True, False, True, False]]), torch.tensor([0]))
    assert mask.tolist() == [[True, True, True, True, False]]


def test_windows_of_a_tuple_of_inputs() -> None:
    inputs = (torch.zeros(2, 4), torch.zeros(2, 1, 3, 3))
    site = InputSite(sliding_window_shapes=((2,), (1, 2, 2)), strides=(2, (1, 1, 1)))
    units = site.units_of(inputs)
    assert units.n_units.tolist() == [6, 6]
    assert units.labels == ["0:0", "0:2", "1:0,0,0", "1:0,0,1", "1:0,1,0", "1:0,1,1"]
    first, second = units.masks(torch.eye(6) > 0, torch.zeros(6, dtype=torch.long))
    assert first.expand(6, 4).sum(1).tolist() == [2, 2, 0, 0, 0, 0]
    assert second.expand(6, 1, 3, 3).flatten(1).sum(1).tolist() == [0, 0, 4, 4, 4, 4]


def test_strides_in_all_of_captums_forms() -> None:
    x = torch.zeros(1, 1, 4, 4)
    wanted = InputSite(sliding_window_shapes=(1, 2, 2), strides=(1, 2, 2)).units_of((x,)).labels
    for strides in (2, (1, 2, 2), ((1, 2, 2),)):
        if strides == 2:  # one number steps through every dimension, the channels too
            windows = InputSite(sliding_window_shapes=((1, 2, 2),), strides=((1, 2, 2),))
        else:
            windows = InputSite(sliding_window_shapes=((1, 2, 2),), strides=strides)
        assert windows.units_of((x,)).labels == wanted
    assert len(InputSite(sliding_window_shapes=(1, 2, 2)).units_of((x,)).labels) == 9
    assert len(InputSite(sliding_window_shapes=(1, 3, 3), strides=1).units_of((x,)).labels) == 4


@pytest.mark.parametrize("rows", [1, 3])
def test_maps_can_be_written_to(rows: int) -> None:
    x = torch.zeros(3, 1, 2, 2)
    for units in (InputSite().units_of((x,)), InputSite(sliding_window_shapes=(1, 1, 1)).units_of((x,))):
        (found,) = units.spread(torch.rand(rows, 4))
        assert found.shape == (rows, 1, 2, 2)
        found += 1
        assert (found > 1).all()
