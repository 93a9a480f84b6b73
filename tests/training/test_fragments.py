"""State is written in stretches by whoever owns them, and read in stretches by anybody."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raylign.config import UserError
from raylign.run import hash_file
from raylign.training.fragments import (
    MASTER,
    MOMENTS,
    Fragment,
    Place,
    Shard,
    Shelf,
    StoredState,
    fill_shards,
    list_whole,
    read_shards,
    write_part,
)

SHAPES = {"embedding": (12, 8), "norm": (8,), "scalar": (), "cube": (2, 6, 4)}


def draw_state() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        name: {kind: torch.randn(shape) for kind in (MASTER, *MOMENTS)}
        for name, shape in SHAPES.items()
    }


def cut(
    values: dict[str, torch.Tensor], name: str, place: Place, start: int, stop: int
) -> Fragment:
    tensors = {kind: place.cut(t).reshape(-1)[start:stop].clone() for kind, t in values.items()}
    return Fragment(name, place, start, 5, tensors)


def deal_out(state: dict[str, dict[str, torch.Tensor]], ranks: int, dim: int | None) -> list[list]:
    """Fragments a rank: flat stretches of equal length, of tensors cut in two along `dim`."""
    parts: list[list[Fragment]] = [[] for _ in range(ranks)]
    for name, values in state.items():
        shape = SHAPES[name]
        places = [Place(shape)]
        if dim is not None and dim < len(shape):
            half = shape[dim] // 2
            places = [Place(shape, dim, 0, half), Place(shape, dim, half, shape[dim])]
        for place in places:
            size = math.prod(place.local)
            each = -(-size // ranks)
            for rank in range(ranks):
                start, stop = min(size, rank * each), min(size, (rank + 1) * each)
                if start < stop:
                    parts[rank].append(cut(values, name, place, start, stop))
    return parts


def write_all(parts: list[list[Fragment]], directory: Path) -> StoredState:
    directory.mkdir()
    for rank, fragments in enumerate(parts):
        write_part(fragments, directory / f"rank-{rank}.safetensors")
    return StoredState(directory)


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_stretch_is_read_from_any_cutting(tmp_path: Path, ranks: int, dim: int | None) -> None:
    state = draw_state()
    stored = write_all(deal_out(state, ranks, dim), tmp_path / "state")
    rng = np.random.default_rng(ranks)
    for name, values in state.items():
        assert stored.step(name) == 5
        for kind, whole in values.items():
            assert torch.equal(stored.whole(name, kind), whole)
            for other in (None, 0, 1):
                shape = SHAPES[name]
                place = Place(shape)
                if other is not None and other < len(shape):
                    low, high = sorted(rng.choice(shape[other] + 1, 2, replace=False).tolist())
                    place = Place(shape, other, low, high)
                flat = place.cut(whole).reshape(-1)
                start = int(rng.integers(0, len(flat)))
                numel = int(rng.integers(0, len(flat) - start + 1))
                found = stored.read(name, kind, place, start, numel)
                assert torch.equal(found, flat[start : start + numel])


def test_the_file_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    state = draw_state()
    [fragments] = deal_out(state, 1, None)
    written = write_part(fragments, tmp_path / "a.safetensors")
    file = tmp_path / "a.safetensors"
    assert written == {"size": file.stat().st_size, "sha256": hash_file(file)}
    loaded = load_file(file)
    assert torch.equal(loaded["0.exp_avg"], state["embedding"]["exp_avg"].flatten())
    assert write_part(fragments, tmp_path / "b.safetensors") == written


def test_what_replicas_wrote_twice_is_read_once(tmp_path: Path) -> None:
    [fragments] = deal_out(draw_state(), 1, None)
    stored = write_all([fragments, fragments], tmp_path / "state")
    assert torch.equal(stored.whole("norm"), draw_state()["norm"][MASTER])


def test_what_is_missing_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    parts = deal_out(draw_state(), 3, None)
    stored = write_all(parts[:2], tmp_path / "state")
    with pytest.raises(UserError, match="holds only a part of embedding"):
        stored.whole("embedding")
    with pytest.raises(UserError, match="holds only a part of norm"):
        stored.read("norm", MASTER, Place((8,)), 0, 8)
    with pytest.raises(UserError, match="does not hold head: it is of another model"):
        stored.whole("head")
    with pytest.raises(UserError, match=r"holds norm as \[8\], and the model as \[9\]"):
        stored.read("norm", MASTER, Place((9,)), 0, 9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no training state"):
        StoredState(tmp_path / "empty")


def train(steps: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(1)
    parameters = {name: torch.nn.Parameter(torch.randn(3, 4)) for name in ("a", "b")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    go_on(parameters, optimizer, range(steps))
    return parameters, optimizer


def go_on(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, steps: range
) -> None:
    for step in steps:
        for index, p in enumerate(parameters.values()):
            stream = torch.Generator().manual_seed(10 * step + index)
            p.grad = torch.randn(3, 4, generator=stream)
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 3])
def test_adam_goes_on_exactly(tmp_path: Path, steps: int) -> None:
    parameters, optimizer = train(steps)
    stored = write_all([read_shards(list_whole(parameters), optimizer.state)], tmp_path / "state")
    go_on(parameters, optimizer, range(steps, 6))
    others, fresh = train(1)
    fill_shards(list_whole(others), fresh, stored)
    go_on(others, fresh, range(steps, 6))
    assert all(torch.equal(others[name], parameters[name]) for name in parameters)


def test_a_flat_master_of_many_parameters_goes_on_too(tmp_path: Path) -> None:
    """What ZeRO keeps: one flat tensor, of which a parameter is a stretch."""
    parameters, optimizer = train(3)
    stored = write_all([read_shards(list_whole(parameters), optimizer.state)], tmp_path / "state")
    go_on(parameters, optimizer, range(3, 6))
    flat = torch.nn.Parameter(torch.zeros(30))  # six of padding
    fresh = torch.optim.AdamW([flat], lr=0.1, fused=True)
    place = Place((3, 4))
    shards = [
        Shard("b", place, 4, 8, flat, 0),
        Shard("a", place, 0, 12, flat, 8),
        Shard("b", place, 0, 4, flat, 20),
    ]
    fill_shards(shards, fresh, stored)
    for step in range(3, 6):
        gradients = [
            torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + i)).flatten()
            for i in (0, 1)
        ]
        flat.grad = torch.cat([gradients[1][4:], gradients[0], gradients[1][:4], torch.zeros(6)])
        fresh.step()
    assert torch.equal(flat[8:20].view(3, 4), parameters["a"])
    assert torch.equal(torch.cat([flat[20:24], flat[:8]]).view(3, 4), parameters["b"])


def test_a_copy_does_not_change_with_what_was_copied() -> None:
    [fragments] = deal_out(draw_state(), 1, None)
    shelf = Shelf()
    kept = shelf.copy(fragments)
    before = fragments[0].tensors[MASTER].clone()
    fragments[0].tensors[MASTER].zero_()
    assert torch.equal(kept[0].tensors[MASTER], before)
    buffers = dict(shelf.buffers)
    shelf.copy(fragments)
    assert all(shelf.buffers[key] is buffers[key] for key in buffers), "memory is used again"
