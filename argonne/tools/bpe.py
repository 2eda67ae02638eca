"""Train a small byte-level BPE tokenizer and save it as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

EOS = "<|endoftext|>"


def train_bpe(
    texts: Sequence[str], folder: Path, *, vocab_size: int, pattern: str, normalize: bool = False
) -> None:
    """Learn ``vocab_size`` tokens from texts cut by the regular expression ``pattern``.

    ``normalize`` composes characters first (NFC), as Qwen's tokenizers do. Equal texts give equal bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if normalize:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS).save_pretrained(
        str(folder)
    )
