"""A recipe of stages: a document of the second one's data is found, listed, and left out by a branch."""

from pathlib import Path

import branch_run
import find_document
import pytest

from argonne.files import OutputFolder
from argonne.testing.corpus import short_texts, small_corpus, write_shards
from argonne.testing.launch import SHAPE, launch, metrics
from tests.scripts.past_runs import replayed

pytestmark = pytest.mark.slow
RECIPE = """
tokenizer-path = "{tokenizer}"
checkpoint-interval = 2
keep-checkpoints = 9
warmup-steps = 1
[[stage]]
name = "one"
data-glob = "{one}"
total-steps = 4
[[stage]]
name = "two"
data-glob = "{two}/*.parquet"
total-steps = 4
"""


def test_a_document_of_a_later_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, tokenizer, _ = small_corpus(tmp_path / "corpus")
    for path in write_shards(tmp_path / "two", short_texts(30, 200, skip=300), shards=2):
        path.rename(path.with_name(f"b{path.name}"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(tokenizer=tokenizer, one=one, two=tmp_path / "two"))
    run, new, listed = tmp_path / "run", tmp_path / "new", tmp_path / "list"
    done = launch(1, "--config", recipe, "--output-dir", run, *SHAPE)
    assert done.code == 0, done.stderr
    document = "b000_00000.parquet:3"
    assert find_document.main([str(run), "--document", document, "--exclude-list", str(listed)]) == 0
    said = capsys.readouterr().out
    assert f"{document}: seen in steps " in said and "kept checkpoints without it: 2, 4" in said
    assert branch_run.main([str(run), str(new), "--exclude-documents", str(listed)]) == 0
    assert f"{new}: a branch of {run} at step 4" in capsys.readouterr().out
    done = launch(1, "--config", OutputFolder(new).run_config)
    assert done.code == 0 and "Excluded: 1 document " in done.stdout, done.stderr
    assert [line["step"] for line in metrics(new) if "excluded_list" in line] == [5, 6, 7, 8]
    assert "bit for bit" in replayed(new, 7, tmp_path / "page.html")
    assert find_document.main([str(new), "--document", document]) == 0
    assert f"{document}: no step saw it" in capsys.readouterr().out
    listed.write_text("nowhere.parquet:3\n")
    flags = [*SHAPE, "--output-dir", tmp_path / "other", "--exclude-documents", listed]
    done = launch(1, "--config", recipe, *flags)
    assert done.code == 1 and "line 1: 'nowhere.parquet' is no shard of the data" in done.errors()[0]
