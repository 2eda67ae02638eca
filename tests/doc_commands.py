"""The commands of the docs: those of the fenced bash blocks of README.md, CONTRIBUTING.md and docs/."""

import re
import shlex
from collections.abc import Iterator, Sequence

from tests import ROOT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
TRAINING = "resume_pretrain_tensor.py"
RUN_SCRIPTS = (TRAINING, "scripts/preflight.py", "scripts/check_flags.py")
"""They take the flags of a run."""
ASKING = "scripts/teacher_targets.py"
"""It takes those, and some of its own."""
FOR_AN_EXERCISE = "--adam-epsilon"
"""The flag that docs/howto_flag.md adds; tests/test_docs.py runs its commands in a changed copy."""


def commands(page: str) -> Iterator[list[str]]:
    """The words of each command of a page, comments taken off."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def all_commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command that is not for an exercise; the same words once."""
    found = {tuple(words): page for page in PAGES for words in commands(page) if FOR_AN_EXERCISE not in words}
    return [(page, list(words)) for words, page in found.items()]


def script_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """(our Python script, its arguments) of a command; ("", []) where it starts none."""
    for index, word in enumerate(words):
        if word == TRAINING or re.fullmatch(r"scripts/\w+\.py", word):
            return word, list(words[index + 1 :])
    return "", []


def without(arguments: Sequence[str], *flags: str) -> list[str]:
    """The arguments less some flags and their values."""
    kept, dropping = [], False
    for word in arguments:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept
