#!/usr/bin/env python3
"""torchrun, but a node that never comes is said in one line within ``join_timeout``.

scripts/launch_multi_node.sh runs it with torchrun's own arguments. Alone torchrun gives the first machine's
endpoint a minute or two whatever ``join_timeout`` says, and prints pages of frames instead of a reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from argonne.errors import first_line
from argonne.ranks.meeting import await_endpoint

DEFAULT_PORT = 29400
DEFAULT_TIMEOUT = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    """torchrun's ``main``, with 1 for nodes that did not meet."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = torchrun.parse_args(arguments)
    settings = dict(item.split("=", 1) for item in options.rdzv_conf.split(",") if "=" in item)
    host, port = parse_rendezvous_endpoint(options.rdzv_endpoint, DEFAULT_PORT)
    seconds = float(settings.get("join_timeout", DEFAULT_TIMEOUT))
    endpoint = f"{host}:{port}"
    if settings.get("is_host") == "false" and not await_endpoint(host, port, seconds):
        return fail(
            f"nothing answers at {endpoint} (--master) within {seconds:.0f} s (--join-timeout): start the "
            "launcher there too, or look whether this node reaches it"
        )
    try:
        torchrun.main(arguments)
    except RendezvousTimeoutError:
        return fail(
            f"fewer than --nnodes {options.nnodes} nodes met at {endpoint} (--master) within {seconds:.0f} s "
            "(--join-timeout): look whether the launcher runs on every node with the same --run-id"
        )
    except RendezvousConnectionError as error:
        reason = first_line(error.__cause__ or error)
        return fail(
            f"the nodes lost {endpoint} (--master), where they meet ({reason}): look whether the launcher "
            "still runs there"
        )
    return 0


def fail(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
