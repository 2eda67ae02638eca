"""Set-up of all tests: suite, tests and scripts on the path, offline, markers off, and one tokenizer."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from argonne.ranks.gpu_environment import set_gpu_environment
from tests import ROOT

for entry in (str(ROOT / "scripts"), str(ROOT)):
    if entry not in sys.path:
        sys.path.insert(0, entry)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As in a script's background job; what the tests start would ignore Ctrl-C, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu"):  # torch is not imported yet
        set_gpu_environment(os.environ, one_queue=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--gpu", action="store_true", help="also run the tests marked gpu")


LIBRARY_TESTS = frozenset(
    f"tests/{name}.py"
    for name in (
        "checkpoint/test_export_hf", "checkpoint/test_load", "data/test_formats", "data/test_tokenizer",
        "model/test_family", "model/test_generation", "model/test_model", "scripts/test_generate",
        "scripts/test_plot_training", "test_end_to_end", "tp/test_architectures",
    )
)  # fmt: skip
"""Training, saving, resuming, export, generation, tokenizers, parquet: marked ``libraries`` as a whole."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(ROOT).as_posix() in LIBRARY_TESTS:
            item.add_marker(pytest.mark.libraries)
    for marker in ("slow", "gpu"):
        if not config.getoption(f"--{marker}"):
            skip = pytest.mark.skip(reason=f"needs --{marker}")
            for item in items:
                if item.get_closest_marker(marker) is not None:  # a folder of that name is a keyword, too
                    item.add_marker(skip)


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """What a test does to this process's signals ends with it: processes started later would inherit it."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small corpus' tokenizer, loaded as a run loads it."""
    from argonne.data.tokenizer import load_tokenizer
    from argonne.testing.corpus import build_tokenizer

    return load_tokenizer(str(build_tokenizer(tmp_path_factory.mktemp("tokenizer"))))
