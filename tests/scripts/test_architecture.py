"""The architecture script: what it says of a model is what the split does; pictures are whole."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import visualize_architecture

from argonne.config.presets import PRESETS
from argonne.testing.launch import ROOT, environment
from argonne.tools.architecture_layout import Layout, holders, lay_out
from model import ArgonneConfig, ArgonneModel

FIXTURE = str(ROOT / "tests" / "fixtures" / "streaming_checkpoint_step_40.pth")


def layout_of(preset: str, tp_size: int, **options: Any) -> Layout:
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**{**PRESETS[preset], "vocab_size": 151_665}))
    keywords = {"dp_size": 1, "sequence_parallel": False, "batch": (4, 4096), **options}
    return lay_out(model, preset, "", tp_size=tp_size, **keywords)


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert visualize_architecture.main(flags) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "argonne-tiny", "--tp", "2"],
        ["--model", "argonne-2.0", "--tp", "8"],
        ["--model", "argonne-2.0", "--tp", "8", "--sp", "--dp", "2"],
        ["--model", "argonne-2.0", "--tp", "24"],
        ["--model", "argonne-tiny", "--tp", "8", "--sp"],
        ["--model", "argonne-medium", "--tp", "1", "--dp", "4"],
        ["--model", "gpt2", "--tp", "4"],
        ["--model", "llama", "--tp", "3", "--sp"],
        ["--model", "argonne-4.0", "--tp", "6", "--sp"],
        ["--checkpoint-path", FIXTURE, "--model", "argonne-tiny", "--tp", "4", "--sp"],
    ],
)
def test_the_text_fits_a_terminal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, *flags).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)


def test_the_reference_model_on_eight_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--model", "argonne-2.0", "--tp", "8")
    assert "4,918,072,800 parameters" in " ".join(out.split())
    assert re.search(r"embedding  18,960 of 151,665 rows each +all-reduce +identity", out)
    assert re.search(r"24 blocks .* 2 all-reduces +2 all-reduces", out)
    assert re.search(r"\[ entrance \] +forward identity, backward all-reduce", out)
    assert re.search(r"\[ exit \] +forward all-reduce, backward identity", out)
    assert "column: (510,4080) (170,4080) (170,4080) each" in out
    assert re.search(r"rank 5 +2550:3060 +850:1020 +850:1020 +2550:3060\n", out)
    assert re.search(r"rank 7 +9632:11008 +9632:11008 +9632:11008\n", out)
    assert re.search(r"tensor parallel \(here\) +614,941,680 +9\.8 GB .* 100\n", out)


def test_the_family_s_norms_show(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--model", "argonne-4.0", "--tp", "2")
    assert "1,038,492,672 parameters" in out and "logits capped at 15" in out
    flow = [line.split("|")[1].split("whole")[0].strip() for line in out.splitlines() if "  whole" in line]
    norms = ["input_norm", "q_norm  k_norm  v_norm_layer", "attn_out_norm", "post_norm", "mlp_out_norm"]
    assert [line for line in flow if line] == norms


def test_sequence_parallel_and_replicas_show(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--model", "argonne-2.0", "--tp", "8", "--sp", "--dp", "2")
    assert "argonne-2.0 over 8 tensor-parallel ranks x 2 replicas, sequence parallel" in out
    assert "(batch, seq_len / 8, 4080)" in out
    assert "forward all-gather, backward reduce-scatter" in out
    assert "2 replicas (FSDP2): each rank keeps 1/2 of its slice, 4.9 GB" in " ".join(out.split())
    assert "2 replicas" not in shown(capsys, "--model", "argonne-2.0", "--tp", "8")


def test_copied_heads_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--model", "argonne-tiny", "--tp", "8")
    assert re.search(r"rank 3 +48:64 +16:32\* +16:32\* +48:64\n", out)
    assert "* a copy of key/value heads that another rank owns" in out
    assert "* a copy" not in shown(capsys, "--model", "argonne-tiny", "--tp", "4")


@pytest.mark.parametrize(
    ("preset", "tp_size"), [("argonne-tiny", 2), ("argonne-tiny", 8), ("argonne-2.0", 24)]
)
def test_the_slices_cover_each_weight_once(preset: str, tp_size: int) -> None:
    layout = layout_of(preset, tp_size)
    weights = [weight for half in layout.halves for weight in (*half.columns, *half.rows)]
    assert [weight.short for weight in weights] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip
    for weight in weights:
        reached = 0
        ranks: list[int] = []
        for (start, stop), holding in holders(layout, weight):
            assert start == reached
            reached = stop
            ranks += holding
        assert reached == weight.shape[weight.dimension]
        assert sorted(ranks) == list(range(tp_size))
        assert weight.is_copied == (
            weight.short in ("k_proj", "v_proj") and tp_size > PRESETS[preset]["num_key_value_heads"]
        )


def test_blocks_and_ends_add_up_to_the_counted_collectives() -> None:
    for sequence_parallel in (False, True):
        layout = layout_of("argonne-2.0", 8, sequence_parallel=sequence_parallel)
        told = [sum(map(int, re.findall(r"\d+", words))) for words in layout.block_traffic]
        ours = layout.splits[1 if sequence_parallel else 0]
        ends = [layout.embedding_exit, layout.head_entrance]
        sent = [[end[way] for end in ends if end[way] != "identity"] for way in (0, 1)]
        counts = [sum(len(words.split(", ")) for words in way) for way in sent]
        in_loss, in_bucket = 2, int(sequence_parallel)
        forward = sum(count for count, _ in ours.forward.values())
        assert forward == 24 * told[0] + counts[0] + in_loss
        step = sum(count for count, _ in ours.step.values())
        assert step == forward + 24 * told[1] + counts[1] + in_bucket


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model", "nope"], 2, "--model-config nope is neither a preset nor a file"),
        (["--tp", "25"], 2, "--tensor-parallel-size 25 leaves ranks without any of the 24"),
        (["--model", "gpt2", "--tp", "2", "--sp"], 2, "--sp does not work with GPT2LMHeadModel"),
        (["--checkpoint-path", "missing.pth"], 1, "--checkpoint-path missing.pth is not a file"),
        (["--checkpoint-path", FIXTURE, "--tp", "2"], 1, "24 query and 8 key/value heads"),
        (["--checkpoint-path", FIXTURE, "--vocab-size", "9"], 2, "--vocab-size is the checkpoint's own"),
        (["--model", "llama", "--output", "/proc/no/x.svg"], 1, "--output /proc/no/x.svg cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    flags: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--output" in flags:
        pytest.importorskip("matplotlib")
    assert visualize_architecture.main(flags) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")


@pytest.mark.parametrize("flags", [["--tp", "0"], ["--dp", "x"], ["--output", "a.jpg"], ["--sequence"]])
def test_wrong_flags_are_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        visualize_architecture.main(flags)
    assert leaving.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("preset", "tp_size", "options"),
    [
        ("argonne-tiny", 2, {}),
        ("argonne-2.0", 8, {"sequence_parallel": True, "dp_size": 2}),
        ("argonne-tiny", 8, {"sequence_parallel": True}),
        ("argonne-medium", 1, {"dp_size": 4}),
        ("argonne-4.0", 2, {"sequence_parallel": True}),
    ],
)
def test_pictures_hold_their_text(preset: str, tp_size: int, options: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    import argonne.tools.architecture_picture as architecture_picture

    canvas = architecture_picture.paint(layout_of(preset, tp_size, **options))
    renderer = canvas.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = canvas.figure.get_size_inches() * canvas.figure.dpi
    boxes = [(words, words.get_window_extent(renderer)) for words in canvas.axes.texts if words.get_text()]
    assert len(boxes) > 40
    for words, box in boxes:
        assert float(words.get_fontsize()) >= 6.5, words.get_text()
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height, words.get_text()
    for index, (words, box) in enumerate(boxes):
        for other, other_box in boxes[index + 1 :]:
            assert not box.shrunk(0.96, 0.8).overlaps(other_box.shrunk(0.96, 0.8)), (
                words.get_text(),
                other.get_text(),
            )


def test_pictures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    svg, png = tmp_path / "new" / "a.svg", tmp_path / "a.png"
    shown(capsys, "--model", "argonne-tiny", "--tp", "2", "--output", str(svg), "--output", str(png))
    assert svg.read_text().lstrip().startswith("<?xml")
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name", ["verify_tensor_parallel", "visualize_architecture", "tensor_parallel_practice"]
)
def test_help_does_not_wait_for_torch(name: str) -> None:
    script = str(ROOT / "scripts" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"],
        capture_output=True, text=True, env=environment(), check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"usage: {name}.py")
    assert "argparse" in done.stderr and "torch" not in done.stderr.replace(name, "")
