"""Which part of a checkpoint a file name names."""

from argonne.checkpoint.parts import part_name


def test_part_names() -> None:
    for name, whole, kind, index, count in (
        ("streaming_checkpoint_step_5_stage_1_of_4.pth", "streaming_checkpoint_step_5.pth", "stage", 1, 4),
        ("streaming_checkpoint_stage2_step_5.pth", "streaming_checkpoint_step_5.pth", "stage", 2, None),
        ("x_step_5_tp_rank_0_of_8.pth", "x_step_5.pth", "rank", 0, 8),
        ("x_step_5-rank-3.pth", "x_step_5.pth", "rank", 3, None),
    ):
        part = part_name(name)
        assert part is not None
        assert (part.whole, part.kind, part.index, part.count) == (whole, kind, index, count)
    assert part_name("streaming_checkpoint_step_5.pth") is None
    assert part_name("tensor_parallel_checkpoint_step_5.pth") is None
