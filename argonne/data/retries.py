"""Requests to a remote store: asked again where the error may pass, and given up with its cause."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from argonne.errors import one_line

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the attempts at one request: five attempts in all."""
LIBRARY_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("huggingface_hub.errors", "HfHubHTTPError"),
    ("requests", "RequestException"),
)
"""Errors of network libraries that are no OSError."""

T = TypeVar("T")


class RemoteError(OSError):
    """A request that failed for good; the message is the cause, without the shard's URL."""

    def __init__(self, cause: str) -> None:
        super().__init__(errno.EIO, cause)

    def __str__(self) -> str:
        return str(self.strerror)


def _passing_errors() -> tuple[type[BaseException], ...]:
    """What may go away by itself: errors of the network, of whichever libraries are in use."""
    found: list[type[BaseException]] = [OSError, EOFError]
    for module, name in LIBRARY_ERRORS:
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def with_retries(request: Callable[[], T]) -> T:
    """The request's answer, asked for again after errors that may pass; RemoteError where it stays away."""
    for pause in (*PAUSES, None):
        try:
            return request()
        except RemoteError:
            raise
        except FileNotFoundError as error:
            raise RemoteError("it is not there") from error
        except (PermissionError, IsADirectoryError) as error:
            raise RemoteError(one_line(error)) from error
        except _passing_errors() as error:
            if pause is None:
                raise RemoteError(f"{one_line(error)} ({len(PAUSES) + 1} attempts)") from error
        time.sleep(pause)
    raise AssertionError("unreachable")
