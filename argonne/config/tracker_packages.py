"""What ``--tracker`` takes, and the package that each tracker needs."""

import importlib.util
from collections.abc import Sequence

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Each is the name of its package too."""


def tracker_problems(names: Sequence[str]) -> list[str]:
    """The packages that are not installed here, in one line."""
    missing = [name for name in dict.fromkeys(names) if importlib.util.find_spec(name) is None]
    if not missing:
        return []
    return [
        f"--tracker {' '.join(names)} needs {' and '.join(missing)}, not installed here: "
        f"pip install {' '.join(missing)}, or leave the flag out"
    ]
