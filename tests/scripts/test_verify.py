"""The verification script: it agrees where the split is right, fails where it is not, and says which."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_tensor_parallel

from argonne.testing.launch import ROOT, environment
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import measure_simulated
from model import ArgonneModel
from tests import FIXTURES
from tp_shard import TensorParallelState

SCRIPT = str(ROOT / "scripts" / "verify_tensor_parallel.py")
QUICK = ["--batch-size", "1", "--seq-len", "9"]

Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Report:
    def run(*flags: str) -> tuple[int, str, str]:
        code = verify_tensor_parallel.main([*QUICK, *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def config_file(folder: Path, **changes: Any) -> str:
    # 12 query heads over 3 key/value heads; 101 features and 997 ids divide by nothing
    settings = {
        "vocab_size": 997, "hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 12,
        "num_key_value_heads": 3, "intermediate_size": 101, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": False, **changes,
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    return str(path)


def fixture_config(folder: Path, step: int) -> tuple[str, str]:
    document = json.loads((FIXTURES / f"streaming_checkpoint_step_{step}.json").read_text())
    return str(FIXTURES / f"streaming_checkpoint_step_{step}.pth"), config_file(folder, **document["config"])


def assert_equivalent(code: int, out: str, err: str) -> float:
    assert (code, err) == (0, "")
    assert "\nModels are mathematically equivalent\n" in out
    assert out.count(": as by formula") == 2
    found = re.search(r"^Max difference: (\d\.\d\de-\d\d)$", out, re.MULTILINE)
    assert found is not None
    loss = re.search(r"^  outputs \(logits\) .* (\d\.\d\de[+-]\d\d)$", out, re.MULTILINE)
    assert loss is not None and float(loss.group(1)) < 1e-13  # relative, in fp64
    return float(found.group(1))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 8])
def test_a_preset(size: int, sequence_parallel: bool, verify: Report) -> None:
    flags = ["--sequence-parallel"] if sequence_parallel else []
    code, out, err = verify("-N", str(size), *flags)
    assert 0 < assert_equivalent(code, out, err) < 1e-4
    assert f"argonne-tiny over {size} ranks" in out
    for row in ("d embed_tokens.weight", "d blocks.*.attn.k_proj.weight", "d norm.weight", "loss"):
        assert f"\n  {row} " in out
    assert ("all-reduce of shared heads" in out) == (size == 8)
    assert out.count(" holds ") == size


def test_a_large_preset_is_made_narrow(verify: Report) -> None:
    code, out, err = verify("-N", "8", "--model", "argonne-2.0", "--max-parameters", "500000")
    assert_equivalent(code, out, err)
    assert "argonne-2.0 has " in out and "24 query and 8 key/value heads" in out
    assert "argonne-2.0 in full (151,665 ids) on 8 ranks" in out
    assert re.search(r"tensor parallel \(here\) +614,941,680 +9\.8 GB +51 +100 ", out)


@pytest.mark.parametrize("size", [3, 6])
def test_a_config_with_sizes_that_do_not_divide(size: int, verify: Report, tmp_path: Path) -> None:
    code, out, err = verify("-N", str(size), "--model", config_file(tmp_path), "--sequence-parallel")
    assert_equivalent(code, out, err)
    assert "d lm_head.weight" in out and "d blocks.*.mlp.down_proj.bias" in out
    assert tmp_path.name in out


@pytest.mark.parametrize(("step", "size"), [(25, 2), (40, 8)])
def test_a_checkpoint(step: int, size: int, verify: Report, tmp_path: Path) -> None:
    checkpoint, config = fixture_config(tmp_path, step)
    code, out, err = verify("-N", str(size), "--checkpoint-path", checkpoint, "--model", config)
    assert_equivalent(code, out, err)
    assert "weights of the checkpoint" in out
    assert ("untied" in out) == (step == 40)


@pytest.mark.parametrize("size", [2, 5, 7, 8])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_models_of_transformers(family: str, size: int, verify: Report) -> None:
    if family != "gpt2" and size in (5, 7):
        code, out, err = verify("-N", str(size), "--model", family, "--sequence-parallel")
    else:
        code, out, err = verify("-N", str(size), "--model", family)
    assert_equivalent(code, out, err)
    expected = {"gpt2": "c_attn.bias", "qwen2": "self_attn.q_proj.bias", "qwen3": "self_attn.q_norm.weight"}
    assert expected.get(family, "self_attn.o_proj.weight") in out


def forget_copied_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallelState, "sum_partial_gradients", lambda self, gradients: None)


def forget_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SimulatedTPGroup._all_reduce

    def partial(self: SimulatedTPGroup, tensor: torch.Tensor, op: str, owned: bool) -> torch.Tensor:
        return whole(self, tensor * (self.rank != 1) if op == "sum" else tensor, op, owned)

    monkeypatch.setattr(SimulatedTPGroup, "_all_reduce", partial)


def add_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    # one part in a million: within the tolerance in fp32, far beyond it in fp64
    def changed(*args: Any, **keywords: Any) -> Any:
        ranks, slice_map = measure_simulated(*args, **keywords)
        for measured in ranks:
            measured.gradients["norm.weight"].mul_(1 + 1e-6)
        return ranks, slice_map

    monkeypatch.setattr("argonne.verification.simulate.measure_simulated", changed)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (forget_copied_heads, "copies of blocks.0.attn.k_proj.weight have unequal gradients"),
        (forget_a_rank, "is off by"),
        (add_a_little, "simulated ranks, fp64: norm.weight is off by 1.00e-06 (tolerance 1e-10)"),
    ],
)
def test_a_wrong_split_fails(
    fault: Callable[[pytest.MonkeyPatch], None],
    complaint: str,
    verify: Report,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    code, out, err = verify("-N", "8")
    assert code == 1
    assert "Models are NOT equivalent" in out and "mathematically" not in out
    assert err.startswith("error: the split model is not the unsharded model: ") and err.count("\n") == 1
    assert complaint in err


def test_a_collective_too_many_fails(verify: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ArgonneModel.forward

    def talkative(self: Any, *args: Any, **keywords: Any) -> Any:
        if hasattr(self, "tensor_parallel"):
            self.tensor_parallel.group.all_reduce(torch.ones(1))
        return original(self, *args, **keywords)

    monkeypatch.setattr(ArgonneModel, "forward", talkative)
    code, out, err = verify()
    assert code == 1
    assert "the collectives counted are not those of the formula" in err
    assert "BY FORMULA 11 all-reduce" in out


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model", "nope"], 2, "--model-config nope is neither a preset nor a file"),
        (
            ["--model", "argonne-4.0", "-N", "7"],
            2,
            "--tensor-parallel-size 7 leaves ranks without any of the 6 attention heads; use 1 to 6",
        ),
        (["--model", "gpt2", "--sequence-parallel"], 2, "--sequence-parallel does not work with gpt2"),
        (["--model", "gpt2", "--seq-len", "513"], 2, "--seq-len 513: this model has 512 positions"),
        (["--checkpoint-path", "missing.pth"], 1, "--checkpoint-path missing.pth is not a file"),
        (["--checkpoint-path", str(ROOT / "README.md")], 1, "checkpoint "),
        (["--checkpoint-path", str(FIXTURES / "streaming_checkpoint_step_40.pth")], 1, "24 query and 8 key"),
        (["--checkpoint-path", "x", "--model", "llama"], 1, "--checkpoint-path x is not a file"),
        (["--checkpoint-path", "x", "--vocab-size", "9"], 2, "--vocab-size is the checkpoint's own"),
        (["--model", "argonne-2.0", "--full-size"], 1, "checking argonne-2.0 in float64 takes about 172 GB"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], code: int, message: str, verify: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.tools.model_sources.available_memory", lambda: 1 << 33)
    found, _, err = verify(*flags)
    assert found == code
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["-N", "9"], ["-N", "1"], ["-N", "x"], ["--seq-len", "1"], ["--layers", "0"], ["--bogus"]]
)
def test_wrong_flags_are_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        verify_tensor_parallel.main(flags)
    assert leaving.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["-N", "2", "--model", "gpt2"],
        ["-N", "4", "--model", "qwen3"],
        ["-N", "2", "--sequence-parallel"],
        ["-N", "8"],  # copied heads
    ],
)
def test_real_processes_agree_with_simulated_ranks(flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *QUICK, *flags, "--processes"],
        capture_output=True, text=True, env=environment(), timeout=280, check=False,
    )  # fmt: skip
    assert_equivalent(done.returncode, done.stdout, done.stderr)
    assert f"{flags[1]} processes over gloo against the unsharded model" in done.stdout
    lines = re.findall(
        r"^  fp(32|64): max diff .* relative (\S+); same collectives$", done.stdout, re.MULTILINE
    )
    assert [name for name, _ in lines] == ["32", "64"]
    assert float(lines[0][1]) < 1e-5 and float(lines[1][1]) < 1e-13


def test_a_process_that_differs_is_found(verify: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_processes(source: Any, ids: Any, size: int, seed: int, *, sequence_parallel: bool) -> Any:
        results = {}
        for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
            model = source.build(dtype, seed)
            results[name], _ = measure_simulated(model, ids, size, sequence_parallel=sequence_parallel)
        results["fp64"][1].gradients["norm.weight"][0] += 1e-3
        return results

    monkeypatch.setattr(verify_tensor_parallel, "measure_processes", as_processes)
    code, _, err = verify("--processes")
    assert code == 1
    assert "2 processes, fp64: copies of norm.weight have unequal gradients" in err
    assert "simulated ranks and processes do not agree in fp64 (rank 1 norm.weight)" in err
    assert "simulated ranks, " not in err
