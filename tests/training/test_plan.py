"""--plan: what it prints and that it needs nothing; a run that does not fit ends before it allocates."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import resume_pretrain_tensor
from argonne.config.command_line import parse_command_line
from argonne.config.presets import PRESETS
from argonne.errors import DeviceError
from argonne.testing.launch import ROOT, environment
from argonne.training import fit
from argonne.training.build import flops_per_token
from argonne.training.layouts import flags_of, misfit, nearest_that_fits, run_plan
from argonne.training.plan import chosen_layout, plan_layout, subject_of
from checkpointing import verify_checkpoint
from tests import FIXTURES
from tests.verification.layouts import single_process

KEYS = [
    "parameters", "tensor_parallel_size", "data_parallel_size", "parameters_per_rank", "bytes_per_rank",
    "collectives", "flops_per_token", "steps", "tokens", "checkpoint_bytes", "device_memory", "fits",
    "host_bytes_per_node", "predicted_step_seconds",
]  # fmt: skip
PARTS = ["weights", "gradients", "optimizer", "activations", "logits", "buffers", "total"]
COUNTS = {
    "argonne-2.0": 4_918_072_800,
    "argonne-2.5": 1_273_807_360,
    "argonne-3.0": 2_882_162_688,
    "argonne-3.5": 2_882_162_688,
    "argonne-4.0": 1_038_492_672,
}


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert resume_pretrain_tensor.main(["--plan=json", *flags]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("preset", COUNTS)
def test_the_keys_and_the_published_counts(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = planned(capsys, "--model-config", preset)
    assert list(document) == KEYS
    assert list(document["bytes_per_rank"]) == PARTS
    assert document["parameters"] == COUNTS[preset]
    assert document["tensor_parallel_size"] * document["data_parallel_size"] == 8


def test_the_reference_run(capsys: pytest.CaptureFixture[str]) -> None:
    document = planned(capsys, "--total-steps", "10")
    assert document["tensor_parallel_size"] == 8
    assert document["parameters_per_rank"] == 619_641_840, "heads of 170 stored as 176"
    as_they_are = planned(capsys, "--total-steps", "10", "--pad-widths", "off")
    assert as_they_are["parameters_per_rank"] == 614_941_680
    assert as_they_are["collectives"] == document["collectives"]
    assert as_they_are["bytes_per_rank"]["total"] < document["bytes_per_rank"]["total"]
    # 4 x layers + 2 of the residual stream in bf16, and the loss's max and stacked sum in float32.
    size = 98 * 16_384 * 4080 * 2 + 3 * 16_384 * 4
    assert document["collectives"] == {"all_reduce": {"calls": 100, "bytes": size}}
    assert document["tokens"] == 10 * 4 * 4096 and document["steps"] == 10
    assert document["fits"] and document["device_memory"] == 80_000_000_000
    assert document["checkpoint_bytes"] == pytest.approx(12 * 4_918_072_800, rel=1e-3)


def test_accumulation_and_replicas_count(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tensor-parallel-size", "4", "--global-batch-size", "16", "--plan-world-size", "8"]
    document = planned(capsys, *flags)
    assert document["data_parallel_size"] == 2
    assert document["collectives"]["all_reduce"]["calls"] == 2 * 100
    assert document["collectives"]["reduce_scatter over replicas"]["calls"] == 25
    smaller = planned(capsys, *flags, "--plan-device", "20000000000")
    assert not smaller["fits"] and smaller["device_memory"] == 20_000_000_000


def test_flops_are_the_run_s_own() -> None:
    from types import SimpleNamespace

    from argonne.tp.architectures import plan_for
    from argonne.tp.plan import build_slice_map
    from argonne.training import plan
    from model import ArgonneConfig, ArgonneModel

    for tied in (True, False):
        settings = {**PRESETS["argonne-tiny"], "vocab_size": 1003, "tie_word_embeddings": tied}
        model = ArgonneModel(ArgonneConfig(**settings))
        trained: Any = SimpleNamespace(
            model=model, slice_map=build_slice_map(model, plan_for(model), 1), tied=tied
        )
        config = parse_command_line(["--plan", "--block-size", "64"])
        what = plan.subject(config, settings, world_size=1, device_memory=1)
        assert plan.flops_per_token(what) == flops_per_token(trained, 64)


def test_the_text_has_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model-config", "argonne-4.0", "--output-dir", str(tmp_path / "new")]
    assert resume_pretrain_tensor.main(["--plan", *flags]) == 0
    out = capsys.readouterr().out
    for words in (
        "1,038,492,672 parameters on 8 x H100",
        "tensor parallel 2 x data parallel 4",
        "blocks.* x 32 attn.q_norm.weight",
        "Memory of a rank",
        "Collectives of a step",
        "NVLink",
        "at 40% MFU",
        "Checkpoints:",
        "Layouts of the same global batch that fit",
    ):
        assert words in out
    assert max(map(len, out.splitlines())) <= 180
    assert not (tmp_path / "new").exists()


def test_no_file_no_group_and_no_transformers(tmp_path: Path) -> None:
    script = (
        "import sys, resume_pretrain_tensor as entry; code = entry.main(['--plan=json']);"
        "import torch.distributed as dist; assert code == 0 and not dist.is_initialized();"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={**environment(), "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan=yaml"], "--plan yaml: choose text or json"),
        (["--plan", "--plan-device", "V100"], "--plan-device V100: give A100-80GB, H100, H200, B200"),
        (["--plan", "--plan-device", "0"], "--plan-device 0: give"),
        (["--plan", "--plan-world-size", "0"], "--plan-world-size 0: must be at least 1"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        resume_pretrain_tensor.main(flags)
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--exclude-documents", "No such file or directory: give a list"),
        ("--checkpoint-path", "does not exist: name a file or a folder, or NONE"),
        ("--init-from", "does not exist: name a file or a folder"),
        ("--teacher-path", "is no folder: give the folder"),
        ("--tokenizer-path", "give a folder with tokenizer.json"),
    ],
)
def test_a_file_that_is_not_there_is_named(
    flag: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    for kind in ("--plan", "--plan=json"):
        assert resume_pretrain_tensor.main([kind, flag, missing]) in (1, 2)
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == "" and line.startswith("error: ")
        assert all(part in line for part in (flag, missing, message))


def named(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The model that the heading names."""
    assert resume_pretrain_tensor.main(["--plan", *flags]) == 0
    return capsys.readouterr().out.removeprefix("Plan: ").split(", ")[0]


def test_the_model_is_that_of_what_the_run_begins_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a named checkpoint, of weights to begin with and of the newest in the output folder; damage of the
    weights is no matter, they are not read."""
    here = "--plan-world-size", "2", "--tensor-parallel-size", "2", "--output-dir", str(tmp_path)
    told = json.loads((FIXTURES / "streaming_checkpoint_step_25.json").read_text())
    saved = torch.load(FIXTURES / "streaming_checkpoint_step_25.pth", weights_only=True)
    source = tmp_path / "streaming_checkpoint_step_25.pth"
    torch.save({**saved, "model_config": told["config"]}, source)
    reader = verify_checkpoint(source)
    parameters = sum(math.prod(reader.shape(name)) for name in reader.names)
    for flag in ("--checkpoint-path", "--init-from"):
        assert named(capsys, *here, flag, str(source)) == f"the model of {source}"
        assert planned(capsys, *here, flag, str(source))["parameters"] == parameters
    folder = FIXTURES / "family_checkpoint_step_20_hf"
    assert named(capsys, *here, "--init-from", str(folder)) == f"the model of {folder}"

    (tmp_path / "pretrained").mkdir()
    own = tmp_path / "pretrained" / source.name
    damaged = bytearray(source.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    own.write_bytes(damaged)
    assert named(capsys, *here) == f"the model of {own}"
    assert planned(capsys, *here)["parameters"] == parameters
    assert named(capsys, *here, "--checkpoint-path", "NONE") == "argonne-2.0"
    assert named(capsys, *here, "--force-from-scratch") == "argonne-2.0"
    # Another shape is planned whatever a run has left here.
    assert named(capsys, *here, "--model-config", "argonne-tiny") == "argonne-tiny"


def test_a_checkpoint_that_a_run_could_not_begin_with_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(FIXTURES / "streaming_checkpoint_step_25.pth")
    empty = tmp_path / "pretrained" / "tensor_parallel_checkpoint_step_3.pth"
    for flags, part in (
        (["--checkpoint-path", str(tmp_path)], "holds no checkpoint"),
        (
            ["--checkpoint-path", source, "--model-config", "argonne-2.0"],
            "24 query and 8 key/value heads (--model-config)",
        ),
        (["--checkpoint-path", str(empty)], str(empty)),
    ):
        assert resume_pretrain_tensor.main(["--plan", *flags]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and part in line
        empty.parent.mkdir(exist_ok=True)
        empty.touch()


def test_validation_sets_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        (tmp_path / f"{number}.parquet").touch()
    sets = [f"web={tmp_path}/*.parquet", f"code={tmp_path}/code/*.parquet", "far=s3://bucket/x.parquet"]
    assert resume_pretrain_tensor.main(["--plan", "--eval-data", *sets]) == 0
    out = capsys.readouterr().out
    found = [line.split(maxsplit=1) for line in out.partition("Validation: ")[2].splitlines()[1:4]]
    assert found == [
        ["web", f"2 of {tmp_path}/*.parquet"],
        ["code", f"none at {tmp_path}/code/*.parquet"],
        ["far", "s3://bucket/x.parquet"],
    ]


def test_an_impossible_degree_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert resume_pretrain_tensor.main(["--plan", "--tensor-parallel-size", "5"]) == 2
    assert capsys.readouterr().err.startswith("error: --tensor-parallel-size 5 does not divide")


def test_the_nearest_layout_fits_and_keeps_the_batch() -> None:
    config = parse_command_line(["--plan", "--batch-size", "8", "--plan-device", "40000000000"])
    what = subject_of(config)
    layout = chosen_layout(what)
    line = misfit(what, layout)
    assert line is not None and "a rank needs about" in line and "--ignore-plan" in line
    nearest = nearest_that_fits(what, layout)
    assert nearest is not None and flags_of(nearest.layout) in line
    # The same degree and batch: sequence parallelism alone is enough.
    assert (nearest.layout.tp_size, nearest.layout.batch_size) == (8, 8)
    assert nearest.layout.sequence_parallel and nearest.layout.recomputation == "none"
    assert plan_layout(what, nearest.layout).needed <= 40_000_000_000
    hopeless = subject_of(parse_command_line(["--plan", "--plan-device", "1000"]))
    assert "no layout" in (misfit(hopeless, chosen_layout(hopeless)) or "")


def test_long_context_by_the_plan() -> None:
    """65,536 tokens at tp 8: the figures of docs/planning.md."""
    flags = ["--plan", "--block-size", "65536", "--batch-size", "1"]
    recomputed = ["--activation-checkpointing", "full"]
    peaks = {
        name: run_plan(parse_command_line([*flags, *more]))[1].memory.total / 1e9
        for name, more in {
            "plain": [],
            "sequence": ["--sequence-parallel"],
            "both": ["--sequence-parallel", *recomputed],
        }.items()
    }
    assert {name: round(peak, 1) for name, peak in peaks.items()} == {
        "plain": 75.6, "sequence": 30.2, "both": 12.5,
    }  # fmt: skip


def test_a_run_that_does_not_fit_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_command_line(["--tokenizer-path", "x", "--model-config", "argonne-tiny"])
    settings = {**PRESETS["argonne-tiny"], "vocab_size": 1003}
    fit.require_memory(config, settings, single_process())
    monkeypatch.setattr(fit, "available_bytes", lambda: 10**8)
    with pytest.raises(DeviceError, match=r"this host has .* free for each.*--ignore-plan goes on"):
        fit.require_memory(config, settings, single_process())
    monkeypatch.setattr(fit, "available_bytes", lambda: None)
    fit.require_memory(config, settings, single_process())
    monkeypatch.setattr(fit, "available_bytes", lambda: 10**8)
    ignoring = parse_command_line(["--tokenizer-path", "x", "--ignore-plan"])
    fit.require_memory(ignoring, settings, single_process())


def test_free_memory_of_this_host(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 10 kB\nMemAvailable:    7 kB\n", encoding="ascii")
    assert fit.available_bytes(info) == 7168
    assert fit.available_bytes(tmp_path / "none") is None
