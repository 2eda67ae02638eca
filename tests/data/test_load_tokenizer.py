"""Tokenizers without an unknown token, and paths that are mistyped or name a file."""

import random
from pathlib import Path
from typing import Any

import pytest

from argonne.data.encoder_pool import EncoderPool
from argonne.data.load_tokenizer import load_tokenizer
from argonne.data.tokenizer import EncoderRecipe, FastEncoder, UnencodableError, tokenizer_fingerprint
from argonne.errors import DataError
from argonne.testing.corpus import build_tokenizer
from data_stream import open_stream
from tests.data.shard_samples import options_for, resume, write_column


@pytest.fixture(scope="module", params=["words", "unigram"])
def letters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of DNA letters, which has no ids for anything else."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*"ACGT", "<eos>"]
    if request.param == "words":
        backend = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(vocabulary)}))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    else:
        backend = Tokenizer(models.Unigram([(letter, -1.0) for letter in vocabulary]))
    backend.add_special_tokens(["<eos>"])
    folder = tmp_path_factory.mktemp("letters")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_its_own_texts_are_encoded(letters: Any) -> None:
    recipe = EncoderRecipe(tokenizer=letters)
    assert isinstance(recipe.build(), FastEncoder) and len(tokenizer_fingerprint(letters)) == 32
    assert recipe.build().encode(["GATTACA"], [True])[0].tolist() == [2, 0, 3, 3, 0, 1, 0, 4]


@pytest.mark.parametrize("processes", [False, True])
def test_others_are_told_apart_from_their_batch(letters: Any, processes: bool) -> None:
    pool = EncoderPool(EncoderRecipe(tokenizer=letters), 1, processes=processes)
    with pytest.raises(UnencodableError) as caught:
        pool.submit(["AC", "xyz", "G"], [True] * 3).result()
    pool.close()
    assert caught.value.ids.tolist() == [0, 1, 4, 2, 4] and caught.value.lengths.tolist() == [3, 0, 2]
    assert list(caught.value.reasons) == [1]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_document_without_ids_names_file_and_row_or_is_skipped(
    letters: Any, tmp_path: Path, streaming: bool
) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("ACGT", k=12)) for _ in range(12)]
    write_column(tmp_path / "a.parquet", [*texts[:5], "not DNA", *texts[5:]])
    options: dict[str, Any] = {"streaming": streaming, "cache_dir": tmp_path / "cache"}
    strict = open_stream(options_for(tmp_path, **options), letters).source
    with pytest.raises(DataError, match=r"a\.parquet, row 5: .*--skip-bad-shards"):
        strict.next_step()
    strict.close()
    options |= {"skip_bad_shards": True}
    skipping = options_for(tmp_path, **options)
    source = open_stream(skipping, letters)
    steps = [source.source.next_step() for _ in range(14)]
    source.source.close()
    for step in steps if streaming else []:
        at_end = (step.progress.position.epoch, step.progress.position.row)
        assert len(step.progress.skipped) == at_end[0] + (at_end[1] > 5)
    assert steps[-1].progress.skipped[0]["row"] == 5 and steps[-1].progress.skipped[0]["rows"] == 1
    if streaming:
        clean = tmp_path / "clean"
        clean.mkdir()
        write_column(clean / "a.parquet", texts)
        same = open_stream(options_for(clean), letters).source
        assert all((same.next_step().tokens == step.tokens).all() for step in steps)
        same.close()
    again = resume(source, steps[5].progress, skipping, letters)
    for step in steps[6:]:
        after = again.source.next_step()
        assert (after.tokens == step.tokens).all() and after.progress == step.progress
    again.source.close()


def test_a_file_of_the_folder_means_the_folder(tmp_path: Path) -> None:
    folder = build_tokenizer(tmp_path / "tok")
    whole = tokenizer_fingerprint(load_tokenizer(str(folder)))
    assert tokenizer_fingerprint(load_tokenizer(str(folder / "tokenizer.json"))) == whole
    (tmp_path / "x.json").touch()
    with pytest.raises(DataError, match="is a file"):
        load_tokenizer(str(tmp_path / "x.json"))


def test_a_mistyped_path_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizers").mkdir()
    for path in ("tokenizers/qwen", "no/tokenizer/here", "nobody/nothing"):
        with pytest.raises(DataError, match="no tokenizer at"):
            load_tokenizer(path)


def test_a_sentencepiece_model_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05\x0a\x01a")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}'
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"argonne-tensor-parallel\[sentencepiece\]"):
        load_tokenizer(str(tmp_path))
