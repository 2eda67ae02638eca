"""Errors that end a run with one line and an exit code.

Each is raised with a single-line message of the form ``what (flag or file): remedy``, without the
leading ``error: ``, which the entry adds when it prints it. Standard library only.
"""

from collections.abc import Iterable

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75


class RunError(Exception):
    """A fault the user can act on: data, checkpoint, device or peer trouble (exit code 1)."""

    exit_code: int = EXIT_FAILURE


class ConfigError(RunError):
    """A wrong flag or combination of flags (exit code 2)."""

    exit_code = EXIT_USAGE


class DataError(RunError):
    """Training data, tokenizer or data position trouble."""


class CheckpointError(RunError):
    """A checkpoint that cannot be written, verified, read or matched to this run."""


class DeviceError(RunError):
    """Device, process-group or file-system trouble of this machine."""


class PeerError(RunError):
    """Another rank died, stalled or disagrees."""


class NonFiniteError(RunError):
    """Loss, gradients or weights are NaN or infinite and training cannot go on."""


class AuditError(RunError):
    """A rank did not compute what the model computes, and the run was asked to end for that."""


def one_line(error: BaseException) -> str:
    """A library's message on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of a library's message (torch's go on with a C++ stack); its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def rank_list(ranks: Iterable[int]) -> str:
    """Ranks as a message names them: ``rank 3`` or ``ranks 1, 2``."""
    ordered = sorted(ranks)
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(str(rank) for rank in ordered)}"
