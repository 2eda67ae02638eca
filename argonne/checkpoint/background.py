"""One save in a thread, and how its end reaches the loop.

Nothing that happens in the thread is lost: its result or its error comes out of `wait`, once. An error that
no one expected leaves its traceback on stderr, as it would of any thread, and `wait` says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from argonne.checkpoint.save import SaveReport
from argonne.errors import RunError


class BackgroundSave:
    """Runs one save at a time; all methods are the loop's.

    The order of use: ``begin``, then ``done`` and ``failed`` between steps, and ``wait`` once.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._ended = False
        self._report: SaveReport | None = None
        self._problem: RunError | RuntimeError | OSError | None = None

    @property
    def in_flight(self) -> bool:
        """A save was begun whose end has not been waited for."""
        return self._thread is not None

    @property
    def done(self) -> bool:
        """It has ended: `wait` will not wait."""
        return self._thread is not None and not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """It has ended with an error, which `wait` raises."""
        return self.done and (self._problem is not None or not self._ended)

    def begin(self, save: Callable[[], SaveReport | None]) -> None:
        """Call ``save`` in a thread. The save before must have been waited for."""
        if self._thread is not None:
            raise ValueError("the save before has not been waited for")
        self._ended, self._report, self._problem = False, None, None
        # A daemon: a run that ends with an error does not wait for it, its temporary file is cleaned later.
        self._thread = threading.Thread(target=self._run, args=(save,), name="save-checkpoint", daemon=True)
        self._thread.start()

    def _run(self, save: Callable[[], SaveReport | None]) -> None:
        try:
            self._report = save()
        except (RunError, RuntimeError, OSError) as error:
            self._problem = error
        self._ended = True

    def wait(self) -> SaveReport | None:
        """Wait for the end of the save: its report (rank 0), or its error raised."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        if self._problem is not None:
            raise self._problem
        if not self._ended:
            raise RuntimeError("the save in the background ended with an error that no one expected")
        return self._report
