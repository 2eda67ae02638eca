"""The launchers: what they run, and that they fail early with a reason. Nothing is launched here."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

SCRIPTS = ROOT / "scripts"
ENOUGH = ["--", "--tokenizer-path", "a tokenizer"]
SHELL_FILES = [
    ROOT / ".ci/run",
    *(SCRIPTS / name for name in ("install.sh", "run_tests.sh", "launch_common.sh", "launch_slurm.sbatch")),
    *(SCRIPTS / name for name in ("launch_single_node.sh", "launch_multi_node.sh", "quickstart.sh")),
    SCRIPTS / "two_nodes_on_one_machine.sh",
]


def launch(
    script: str, *arguments: str, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if key != "RANK" and not key.startswith(("TORCH", "SLURM"))
    }
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        env={**clean, "ARGONNE_PYTHON": sys.executable, **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def refused(script: str, *arguments: str, **environ: str) -> str:
    done = launch(script, *arguments, cwd=None, **environ)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    return done.stderr


def shown_command(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def test_one_node_shows_what_it_would_run(tmp_path: Path) -> None:
    done = launch(
        "launch_single_node.sh",
        "--nproc-per-node",
        "2",
        "--dry-run",
        *ENOUGH,
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="",
    )
    command = shown_command(done)
    assert command[:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert command[-3:] == [str(ROOT / "resume_pretrain_tensor.py"), "--tokenizer-path", "a tokenizer"]
    assert command[command.index("--shutdown-timeout") + 1] == "600"
    assert "SIGUSR1" in command[command.index("--signals-to-handle") + 1].split(",")
    assert "OMP_NUM_THREADS=" in done.stdout
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        assert name not in done.stdout  # the script's own, the same however it is started
    assert "run on the CPU" in done.stderr


def test_what_the_user_set_stays() -> None:
    done = launch(
        "launch_single_node.sh",
        "--dry-run",
        *ENOUGH,
        OMP_NUM_THREADS="3",
        NCCL_SOCKET_IFNAME="eth7",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "OMP_NUM_THREADS=3" in done.stdout and "GLOO_SOCKET_IFNAME=eth7" in done.stdout


def test_several_nodes_show_what_they_would_run() -> None:
    done = launch(
        "launch_multi_node.sh",
        *"--nnodes 2 --master 127.0.0.1:29400 --nproc-per-node 3 --run-id seven --dry-run".split(),
        *ENOUGH,
        CUDA_VISIBLE_DEVICES="0,1,2,3",
    )
    command = shown_command(done)
    for flag, value in (
        ("--nnodes", "2"),
        ("--nproc-per-node", "3"),
        ("--rdzv-backend", "c10d"),
        ("--rdzv-endpoint", "127.0.0.1:29400"),
        ("--rdzv-id", "seven"),
    ):
        assert command[command.index(flag) + 1] == value


def test_reasons_to_fail_early_on_one_node() -> None:
    one = "launch_single_node.sh"
    assert "only 2 GPUs are visible" in refused(
        one, "--nproc-per-node", "4", *ENOUGH, CUDA_VISIBLE_DEVICES="0,1"
    )
    assert "whole number" in refused(one, "--nproc-per-node", "many", *ENOUGH)
    assert "needs a value" in refused(one, "--nproc-per-node")
    assert "no arguments for the training script" in refused(one)
    assert "come after --" in refused(one, "--tokenizer-path", "t")
    assert "--shutdown-timeout 0" in refused(one, "--shutdown-timeout", "0", *ENOUGH)
    assert "no torch" in refused(one, *ENOUGH, ARGONNE_PYTHON="/bin/false")
    assert "--batch-size 0" in refused(one, *ENOUGH, "--batch-size", "0")


def test_reasons_to_fail_early_on_several_nodes() -> None:
    several = "launch_multi_node.sh"
    assert "--nnodes is missing" in refused(several, *ENOUGH)
    assert "--master is missing" in refused(several, "--nnodes", "2", *ENOUGH)
    assert "HOST:PORT" in refused(several, "--nnodes", "2", "--master", "host", *ENOUGH)
    assert "has no address" in refused(
        several, "--nnodes", "2", "--master", "no.such.host.invalid:29400", *ENOUGH
    )


def test_a_busy_port_is_named() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; chooses this host's own address
        except OSError:
            pytest.skip("this host has no address but loopback, where the port may be the first agent's")
        address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} is in use" in refused(
            "launch_multi_node.sh", "--nnodes", "2", "--master", f"{address}:{port}", *ENOUGH
        )


def fake_slurm(folder: Path) -> str:
    """A path with an srun, a scontrol and a scancel that write down how they were called."""
    folder.mkdir()
    for name, body in (
        ("scontrol", 'echo "$@" >>"$CALLS"; [ "$1" = requeue ] || echo node7'),
        ("scancel", 'echo "scancel $*" >>"$CALLS"; kill -USR1 "$(cat "$CALLS.pid")"'),
        (
            "srun",
            'echo $$ >"$CALLS.pid"; trap "exit 1" USR1; echo ready >>"$CALLS"; while :; do sleep 0.05; done',
        ),
    ):
        script = folder / name
        script.write_text(f"#!/usr/bin/env bash\n{body}\n")
        script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_slurm_passes_its_warning_on_and_goes_back_in_the_queue(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    environ = {
        **os.environ,
        "PATH": fake_slurm(tmp_path / "bin"),
        "CALLS": str(calls),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "ARGONNE_ROOT": str(ROOT),
    }
    command = ["bash", str(SCRIPTS / "launch_slurm.sbatch"), "--tokenizer-path", "t"]
    shown = subprocess.run(command, env={**environ, "ARGONNE_DRY_RUN": "yes"}, capture_output=True, text=True)
    assert (
        "--nnodes 2 --master node7:24242 --run-id 4242" in shown.stdout
        and "-- --tokenizer-path t" in shown.stdout
    )
    job = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    while "ready" not in (calls.read_text() if calls.exists() else ""):
        assert job.poll() is None
    job.send_signal(10)
    out, _ = job.communicate(timeout=20)
    assert job.returncode == 0 and "save and stop" in out
    assert "scancel --signal=USR1 4242.0" in calls.read_text() and "requeue 4242" in calls.read_text()


@pytest.mark.parametrize(
    ("state", "step", "restarts", "again", "code"),
    [
        ("finished", 9, "1", False, 0),
        ("stopped", 9, "1", True, 0),  # by --max-run-time, without a signal
        ("stopped", 5, "1", False, 1),  # no step since it was put back
        ("stopped", 5, "0", True, 0),
        ("failed", 9, "1", False, 1),
    ],
)
def test_slurm_goes_back_in_the_queue_until_the_recipe_is_finished(
    tmp_path: Path, state: str, step: int, restarts: str, again: bool, code: int
) -> None:
    output, calls = tmp_path / "run", tmp_path / "calls"
    (output / "stats").mkdir(parents=True)
    status = output / "stats" / "run_status.json"
    status.write_text('{"state": "stopped", "step": 5}')
    path = fake_slurm(tmp_path / "bin")
    ended = f'{{"state": "{state}", "step": {step}}}'
    exit_code = 0 if state == "finished" else 1
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\necho '{ended}' >{status}\nexit {exit_code}\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'tokenizer-path = "t"\noutput-dir = "{output}"\n')
    job = subprocess.run(
        ["bash", str(SCRIPTS / "launch_slurm.sbatch"), "--config", str(recipe)],
        env={
            **{key: value for key, value in os.environ.items() if key != "RANK"},
            "PATH": path, "CALLS": str(calls), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node7",
            "SLURM_RESTART_COUNT": restarts, "ARGONNE_ROOT": str(ROOT), "ARGONNE_PYTHON": sys.executable,
        },
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert job.returncode == code, job.stderr
    assert ("requeue 7" in calls.read_text()) is again
    assert ("no step was made" in job.stderr) is (state == "stopped" and not again)


def test_slurm_warns_as_long_before_the_end_as_a_save_may_take() -> None:
    lead = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", (SCRIPTS / "launch_slurm.sbatch").read_text(), re.M)
    grace = re.search(r"shutdown_timeout=(\d+)", (SCRIPTS / "launch_multi_node.sh").read_text())
    assert lead is not None and grace is not None and lead[1] == grace[1] == "600"


def test_slurm_outside_a_job() -> None:
    assert "no Slurm job" in refused("launch_slurm.sbatch", "--tokenizer-path", "t", ARGONNE_ROOT=str(ROOT))


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-x", str(path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_an_old_python_is_refused_with_a_reason(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = launch("install.sh", ARGONNE_PYTHON=str(old), ARGONNE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1 and "no Python 3.11 or newer" in done.stderr
