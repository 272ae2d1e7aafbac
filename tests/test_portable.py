"""The checkpoint layout of all engines: pieces of tensors, written by some ranks and read by others."""

import math

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from elsewhere.launch.portable import Piece, boxes, names, read, staged, write

SHAPES = [(), (7,), (5, 3), (1, 1, 6), (4, 3, 2, 2)]


@given(st.data())
def test_boxes_hold_each_number_of_a_run_once_and_in_order(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    numbers = np.arange(numel).reshape(shape)
    found = []
    for box in boxes(shape, start, stop):
        part = numbers[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))].ravel()
        assert part[0] == box.begin
        found += part.tolist()
    assert found == list(range(start, stop))


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES)}


def cut(whole, rank, ranks, round_up):
    """The piece of each tensor that rank `rank` of `ranks` holds: equal parts of the numbers, the last one shorter."""
    out = {}
    for name, tensor in whole.items():
        part = -(-tensor.numel() // ranks) if round_up else max(1, tensor.numel() // ranks)
        start = min(rank * part, tensor.numel())
        stop = tensor.numel() if rank == ranks - 1 else min(start + part, tensor.numel())
        out[name] = Piece(tensor.flatten()[start:stop].clone(), tuple(tensor.shape), start)
    return out


def test_torchs_own_loader_reads_what_was_written_in_pieces(tmp_path):
    whole = tensors()
    write(tmp_path, {name: Piece.whole(tensor) for name, tensor in whole.items()}, None)
    found = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(found, checkpoint_id=tmp_path)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("round_up", [True, False])
def test_pieces_of_any_division_are_read_from_whole_tensors(ranks, round_up, tmp_path):
    whole = tensors()
    dcp.save(dict(whole), checkpoint_id=tmp_path)
    for rank in range(ranks):
        wanted = cut(whole, rank, ranks, round_up)
        found = {name: Piece(torch.zeros_like(p.values), p.shape, p.start) for name, p in wanted.items()}
        read(tmp_path, found)
        for name, piece in wanted.items():
            assert torch.equal(found[name].values, piece.values), name


def test_a_staged_piece_no_longer_follows_its_tensor():
    tensor = torch.zeros(3)
    copy = staged({"t": Piece.whole(tensor)})
    tensor += 1
    assert not copy["t"].values.any()


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    write(tmp_path, {"here": Piece.whole(torch.zeros(2))}, None)
    assert names(tmp_path) == {"here"}
    with pytest.raises(ValueError, match="it has no there"):
        read(tmp_path, {"there": Piece.whole(torch.zeros(2))})


def test_a_tensor_of_another_shape_is_named(tmp_path):
    write(tmp_path, {"here": Piece.whole(torch.zeros(2))}, None)
    with pytest.raises(ValueError, match=r"here is \(2,\) there and \(3,\) here"):
        read(tmp_path, {"here": Piece.whole(torch.zeros(3))})
