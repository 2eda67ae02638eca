"""Keys of a model's config.json: which the model has, and which of the others change nothing.

Standard library only. model.py, which an export copies and which therefore imports none of ours, has the
same two tables; a test holds them together.
"""

from typing import Any

NEUTRAL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu", "swish", None),
    "hidden_dropout": (0.0, None),
    "mtp_horizon": (1, 0, None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
}
"""Keys that would change the computation, and the values at which they do not."""

SILENT_SETTINGS = frozenset(
    """
    add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
    block_size bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_range is_decoder label2id length_penalty max_length
    max_window_layers min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tie_encoder_decoder tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache use_flash_attention
    """.split()
)
"""Keys that say nothing of the computation."""


def foreign_keys(document: dict[str, Any], known: frozenset[str]) -> list[str]:
    """``key value`` of each key of a config.json that is neither known nor neutral: another model."""
    settings = dict(document)
    if settings.get("use_sliding_window") is False:
        settings.pop("sliding_window", None)  # Qwen2 names a window that this switch turns off
    if set(settings.get("layer_types") or ()) <= {"full_attention"}:
        settings.pop("layer_types", None)
    settings = {key: value for key, value in settings.items() if key not in known | SILENT_SETTINGS}
    return [
        f"{key} {value!r}"
        for key, value in settings.items()
        if not key.startswith("_") and value not in NEUTRAL_SETTINGS.get(key, (None, False))
    ]
