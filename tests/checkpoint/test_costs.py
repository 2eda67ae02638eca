"""Memory of loading and saving a checkpoint of a few GB; costs.py prints figures, and times."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.costs import largest_tensor, make, make_weights, measure, one_rank_from_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a checkpoint of 2.7 GB, removed at the end."""
    folder = tmp_path_factory.mktemp("large")
    assert make(folder) > 2_600_000_000
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_rank_takes_its_slices_and_saving_two_tensors_more(folder: Path, tp_size: int) -> None:
    costs = measure(tp_size, folder)
    for rank, cost in enumerate(costs):
        print(f"rank {rank} of {tp_size}: {cost}")
        assert cost.loaded <= 1.1 * cost.slices, (rank, cost)
        assert cost.saving <= 2 * largest_tensor(), (rank, cost)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_of_a_folder_of_weights_a_rank_takes_its_slices(tmp_path: Path, tp_size: int) -> None:
    assert make_weights(tmp_path) > 440_000_000
    for rank, cost in enumerate(measure(tp_size, tmp_path, one_rank_from_weights)):
        print(f"rank {rank} of {tp_size}: {cost}")
        assert cost.loaded <= 1.1 * cost.slices, (rank, cost)
    for path in tmp_path.iterdir():
        path.unlink()
