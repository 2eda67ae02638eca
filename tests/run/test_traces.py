"""What a stalled run leaves to be looked at."""

from pathlib import Path

from argonne.run.traces import dump_stacks, enable_flight_recorder


def test_flight_recorder_keeps_what_the_user_set(tmp_path: Path) -> None:
    environ = {"TORCH_FR_BUFFER_SIZE": "7"}
    enable_flight_recorder(tmp_path, environ)
    assert environ["TORCH_FR_BUFFER_SIZE"] == "7" and environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environ["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))


def test_stacks_name_the_functions_of_every_thread(tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    dump_stacks(tmp_path, 3)
    text = (tmp_path / "stats" / "stack_rank_3.txt").read_text()
    assert "test_stacks_name_the_functions_of_every_thread" in text
    dump_stacks(tmp_path / "nowhere", 3)  # a disk that refuses costs the file only
