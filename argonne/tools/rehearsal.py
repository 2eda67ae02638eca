"""A rehearsal (``--rehearse``): the whole of a recipe in minutes, from training to text, and a table of it.

Started by resume_pretrain_tensor.py with its own command line, and run beside it as

    python -m argonne.tools.rehearsal --config FILE [flags of resume_pretrain_tensor.py]
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argonne.config.command_line import parse_recipe
from argonne.config.recipe import Recipe
from argonne.config.recipe_file import recipe_toml
from argonne.errors import RunError
from argonne.files import OutputFolder, read_json
from argonne.tools.rehearsal_scale import Scaled, names, scale, stop_after, total_steps
from argonne.tools.rehearsal_targets import make_small_targets
from argonne.tools.script import run_script

PATIENCE_SECONDS = 900.0
"""For one start of the training script."""
NEW_TOKENS = 24


@dataclass(kw_only=True)
class Rehearsal:
    """The folder, the command, and what was seen so far."""

    folder: Path
    command: list[str]
    recipe: Recipe
    rows: list[tuple[str, str, bool]] = field(default_factory=list)

    @property
    def output(self) -> OutputFolder:
        return OutputFolder(self.folder / "run")

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """The JSON lines of a metrics file."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def row(self, what: str, check: Callable[[], str]) -> None:
        """Do one part; what it raises is what it shows, and then the rehearsal has not held."""
        print(f"{what} ...", flush=True)
        try:
            self.rows.append((what, check(), True))
        except (RunError, OSError, ValueError, RuntimeError) as error:
            self.rows.append((what, " ".join(str(error).split()) or type(error).__name__, False))

    @property
    def held(self) -> bool:
        return all(held for _, _, held in self.rows)

    # ---------------------------------------------------------------- the parts

    def start(self, log: str, until: int | None = None) -> dict[str, Any]:
        """Run the training script, asking it to stop after ``until`` steps; the status that it left."""
        with (self.folder / log).open("w") as said:
            process = subprocess.Popen(
                self.command,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
            try:
                self._watch(process, until)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        status = read_json(self.output.status) or {}
        if status.get("state") not in ("finished", "stopped"):
            text = (self.folder / log).read_text(encoding="utf-8", errors="replace")
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            raise RunError(errors[0].removeprefix("error: ") if errors else f"it ended early: see {log}")
        return status

    def _watch(self, process: subprocess.Popen[bytes], until: int | None) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise RunError(f"it did not end within {PATIENCE_SECONDS:.0f} s")
            if until is not None and len(self.lines(self.output.metrics)) >= until:
                process.send_signal(signal.SIGTERM)
                until = None
            time.sleep(0.05)

    def train_and_stop(self) -> str:
        """Train into the recipe and stop as a scheduler does."""
        status = self.start("first.log", until=stop_after(self.recipe))
        if status["state"] != "stopped":
            raise RunError(f"it {status['state']} before the signal reached it")
        steps = self.lines(self.output.metrics)
        losses = [line["loss"] for line in steps]
        if not all(isinstance(loss, float) for loss in losses):
            raise RunError("a loss was not finite")
        stage = f" of stage {steps[-1]['stage']}" if "stage" in steps[-1] else ""
        loss = f"{losses[0]:.2f} -> {losses[-1]:.2f}"
        return f"SIGTERM after step {len(steps)}{stage}: saved and stopped; loss {loss}"

    def resume(self) -> str:
        """The same command again, to the end."""
        status = self.start("second.log")
        if status["state"] != "finished":
            raise RunError(f"it {status['state']}")
        steps = self.lines(self.output.metrics)
        if [line["step"] for line in steps] != list(range(1, total_steps(self.recipe) + 1)):
            raise RunError(
                f"its metrics hold {len(steps)} of {total_steps(self.recipe)} steps, or not in order"
            )
        stages = list(dict.fromkeys(line.get("stage", "") for line in steps))
        if stages != [stage.name for stage in self.recipe.stages]:
            raise RunError(f"its stages were {stages}")
        tokens = [line["tokens_processed"] for line in steps]
        if any(later <= earlier for earlier, later in itertools.pairwise(tokens)):
            raise RunError("its tokens were counted anew")
        return f"went on to step {len(steps)}, each once; stages: {names(self.recipe.stages)}"

    def validate(self) -> str:
        """Every set at the end of every stage."""
        lines = self.lines(self.output.eval_metrics)
        done, shown = 0, []
        for stage in self.recipe.stages:
            done += stage.config.training.total_steps
            for name, _ in stage.config.evaluation.eval_data:
                found = [line for line in lines if (line["step"], line["name"]) == (done, name)]
                if len(found) != 1 or not math.isfinite(found[0]["loss"] or math.nan):
                    raise RunError(f"no loss of {name} at step {done}")
                if stage is self.recipe.stages[-1]:
                    shown.append(f"{name} {found[0]['loss']:.2f}")
        return f"{len(lines)} lines, at the end of every stage too; last: {', '.join(shown)}"

    def save(self) -> str:
        """The stages' last checkpoints are there, and the newest verifies and loads."""
        import torch

        from checkpointing import verify_checkpoint

        ends, done = [], 0
        for stage in self.recipe.stages:
            done += stage.config.training.total_steps
            ends.append(done)
            if not self.output.checkpoint(done).exists():
                raise RunError(f"the checkpoint of step {done} is gone")
        reader = verify_checkpoint(self.output.checkpoint(done))
        content = torch.load(self.output.checkpoint(done), weights_only=True, mmap=True)
        if content["global_step"] != done or reader.step != done:
            raise RunError(f"the checkpoint of step {done} says {content['global_step']}")
        size = self.output.checkpoint(done).stat().st_size
        return f"steps {', '.join(map(str, ends))} kept; the last verifies ({size / 1e6:.1f} MB)"

    def export(self) -> str:
        """The exported folder opens without the suite and has the checkpoint's weights."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder / "model", trust_remote_code=True)
        saved = torch.load(self.output.checkpoint(total_steps(self.recipe)), weights_only=True, mmap=True)[
            "model_state_dict"
        ]
        state = model.state_dict()
        for name, tensor in saved.items():
            if not torch.equal(state[name], tensor.to(state[name].dtype)):
                raise RunError(f"{name} differs from the checkpoint's")
        return f"{self.folder / 'model'} opens in transformers: {len(saved)} tensors, {model.dtype}"

    def generate(self) -> str:
        """Text from the exported model."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self.folder / "model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        ids = torch.tensor([tokenizer("Long long time ago, ", add_special_tokens=False)["input_ids"]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        if output.shape[1] <= ids.shape[1]:
            raise RunError("nothing was generated")
        text = tokenizer.decode(output[0].tolist(), skip_special_tokens=True)
        return f"{output.shape[1] - ids.shape[1]} tokens: {json.dumps(text, ensure_ascii=False)[:70]}"


def _environment() -> dict[str, str]:
    """Of a run of its own, whatever started the rehearsal."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith(("TORCHELASTIC", "MASTER_", "SLURM_"))
    }
    return {
        **kept,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def choose_processes() -> tuple[int, bool]:
    """(processes, whether on GPUs): the launcher's, else one for each GPU, else two on a CPU."""
    import torch

    gpus = torch.cuda.device_count()
    asked = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE")
    if asked is not None:
        return int(asked), gpus >= int(asked)
    if gpus:
        return gpus, True
    return min(2, os.cpu_count() or 1), False


def table(rows: Sequence[tuple[str, str, bool]]) -> str:
    """What was done, whether it held, what it shows."""
    width = max(len(what) for what, _, _ in rows)
    return "\n".join(f"{what:<{width}}  {'ok  ' if held else 'FAIL'}  {shows}" for what, shows, held in rows)


def rehearse(recipe: Recipe, folder: Path) -> Rehearsal:
    """Do all parts; those after one that did not hold are left out."""
    processes, on_gpus = choose_processes()
    scaled: Scaled = scale(recipe, folder, processes=processes, on_gpus=on_gpus)
    file = folder / "recipe.toml"
    file.write_text(recipe_toml(scaled.recipe), encoding="utf-8")
    script = importlib.util.find_spec("resume_pretrain_tensor")
    assert script is not None and script.origin is not None
    command = [sys.executable, script.origin, "--config", str(file)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command[1:1] = [*torchrun, f"--log-dir={folder / 'torchrun'}"]  # its default stays in TMPDIR for good
    rehearsal = Rehearsal(folder=folder, command=command, recipe=scaled.recipe)
    blocks = [str(stage.config.training.block_size) for stage in scaled.recipe.stages]
    where = "GPUs" if on_gpus else "the CPU"
    rehearsal.row(
        "scale",
        lambda: (
            f"{processes} processes on {where}, tensor parallel "
            f"{scaled.recipe.config.parallel.tensor_parallel_size}; blocks of {', '.join(blocks)} tokens"
        ),
    )
    for note in scaled.notes:
        rehearsal.row("  instead", lambda note=note: note)  # type: ignore[misc]
    if scaled.recipe.config.distillation.teacher_targets is not None:
        rehearsal.row("targets", lambda: make_small_targets(recipe, scaled.recipe, processes))
    for what, part in (
        ("train and stop", rehearsal.train_and_stop),
        ("resume", rehearsal.resume),
        ("validate", rehearsal.validate),
        ("save", rehearsal.save),
        ("export", rehearsal.export),
        ("generate", rehearsal.generate),
    ):
        if rehearsal.held:
            rehearsal.row(what, part)
    return rehearsal


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    recipe = parse_recipe(arguments)
    if os.environ.get("RANK", "0") != "0":
        return 0  # the rehearsal starts ranks of its own

    def work() -> str | None:
        started = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="argonne-rehearsal-"))
        held = True
        try:
            rehearsal = rehearse(recipe, folder)
            held = rehearsal.held
            print(f"\n{table(rehearsal.rows)}\n")
        finally:
            if held:
                shutil.rmtree(folder, ignore_errors=True)
        if not held:
            return f"the rehearsal did not hold: its files and logs are in {folder}"
        print(f"The rehearsal held, in {time.monotonic() - started:.0f} s")
        return None

    return run_script(work, debug=recipe.config.debug)


if __name__ == "__main__":
    sys.exit(main())
