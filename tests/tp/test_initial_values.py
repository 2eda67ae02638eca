"""Initial values: every layout draws the same model, whatever a rank's slice of it is."""

import math

import pytest
import torch
from torch import Tensor

from argonne.tp import initial_values
from argonne.tp.initial_values import initialise_parameters
from argonne.tp.slices import Cut, SliceMap, even_cut

SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (24, 10),
    "tall": (7, 5),
    "bias": (24,),
    "norm": (10,),
    "zeros": (6,),
}
DEVIATIONS: dict[str, float | None] = {"wide": 0.5, "tall": 2.0, "bias": 1.0, "norm": None, "zeros": 0.0}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of ``wide`` in a chunk, so that slices begin within one."""
    monkeypatch.setattr(initial_values, "_CHUNK_ELEMENTS", 30)


def slice_map(tp_size: int) -> SliceMap:
    cuts: dict[str, Cut | None] = {
        "wide": even_cut(24, tp_size, 0),
        "tall": even_cut(5, tp_size, 1),  # padded where tp_size does not divide
        "bias": even_cut(24, tp_size, 0),
        "norm": None,
        "zeros": even_cut(6, tp_size, 0),
    }
    return SliceMap({name: (SHAPES[name], cuts[name]) for name in SHAPES}, tp_size=tp_size)


def drawn(slices: SliceMap, rank: int, seed: int = 3, fill: float = math.nan) -> dict[str, Tensor]:
    parameters = {name: torch.full(slices.local_shape(name, rank), fill) for name in SHAPES}
    initialise_parameters(parameters, slices, rank, DEVIATIONS.__getitem__, seed)
    return parameters


def assembled(slices: SliceMap) -> dict[str, Tensor]:
    """The whole parameters from all ranks' slices."""
    whole = {name: torch.full(shape, math.nan) for name, shape in SHAPES.items()}
    for rank in range(slices.world_size):
        for name, local in drawn(slices, rank).items():
            for box in slices.rectangles(name, rank):
                whole[name][box.unsharded_index] = local[box.local_index]
    return whole


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_slices_are_those_of_the_whole(tp_size: int) -> None:
    whole = drawn(slice_map(1), 0)
    for name, tensor in assembled(slice_map(tp_size)).items():
        assert tensor.equal(whole[name]), name


def test_replicas_that_shard_rows_draw_the_same() -> None:
    whole = drawn(slice_map(1), 0)
    for name, tensor in assembled(slice_map(2).with_data_parallel(3, sharded=True)).items():
        assert tensor.equal(whole[name]), name


def test_padding_is_zero_whatever_was_there() -> None:
    slices = slice_map(4)  # 5 columns over 4 ranks of 2: the last one holds padding alone, rank 2 one column
    assert not drawn(slices, 3, fill=9.0)["tall"].any()
    last = drawn(slices, 2, fill=9.0)["tall"]
    assert last[:, 0].all() and not last[:, 1].any()


def test_ones_zeros_and_the_deviation() -> None:
    parameters = drawn(slice_map(1), 0)
    assert parameters["norm"].eq(1.0).all() and parameters["zeros"].eq(0.0).all()
    big = {"big": torch.empty(200, 100)}
    slices = SliceMap({"big": ((200, 100), None)}, tp_size=1)
    initialise_parameters(big, slices, 0, lambda _: 0.02, 1)
    assert abs(big["big"].std().item() / 0.02 - 1) < 0.03 and abs(big["big"].mean().item()) < 0.001


def test_names_chunks_and_seeds_draw_apart() -> None:
    parameters = drawn(slice_map(1), 0)
    wide = parameters["wide"]
    assert len({tuple(row) for row in wide.tolist()}) == 24
    assert not (wide[:, 0] / 0.5).equal(parameters["bias"])
    assert not drawn(slice_map(1), 0, seed=4)["wide"].equal(wide)
    assert drawn(slice_map(1), 0)["wide"].equal(wide)
