"""Copies in host memory: used again, with the last values."""

import torch

from argonne.checkpoint.host_copy import HostCopy
from argonne.testing.checkpoint_samples import empty_slices, filled_slices, sample_map


def test_copies_are_used_again_and_hold_the_last_values() -> None:
    slice_map = sample_map(2)
    copy = HostCopy(slice_map, 1, torch.device("cpu"))
    places = {name: value.data_ptr() for name, value in copy.parameters.items()}
    copy.take(empty_slices(slice_map, 1)[0], {})
    assert copy.adam == {} and not any(value.any() for value in copy.parameters.values())
    parameters, adam = filled_slices(slice_map, 1)
    copy.take(parameters, adam)
    for name, value in copy.parameters.items():
        assert value.data_ptr() == places[name]
        if value.numel():
            assert torch.equal(value, parameters[name])
            assert all(torch.equal(copy.adam[name][key], adam[name][key]) for key in adam[name])
    for state in adam.values():
        state["step"].add_(1)
    assert all(float(state["step"]) == 7 for state in copy.adam.values())
