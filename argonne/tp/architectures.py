"""The architectures that have a plan. A new one is added here."""

from __future__ import annotations

from torch import nn

from argonne.errors import ConfigError
from argonne.tp.plan import Rule, Seam, Style, TensorParallelPlan, Unit

_GATED_MLP = (
    Rule(pattern="*.gate_proj", style=Style.COLUMN),
    Rule(pattern="*.up_proj", style=Style.COLUMN),
    Rule(pattern="*.down_proj", style=Style.ROW),
)

_SEPARATE_HEADS = (
    Rule(pattern="*.q_proj", style=Style.COLUMN, unit=Unit.QUERY_HEADS),
    Rule(pattern="*.k_proj", style=Style.COLUMN, unit=Unit.KEY_VALUE_HEADS),
    Rule(pattern="*.v_proj", style=Style.COLUMN, unit=Unit.KEY_VALUE_HEADS),
    Rule(pattern="*.o_proj", style=Style.ROW, unit=Unit.QUERY_HEADS),
)

_HEAD = Rule(pattern="lm_head", style=Style.VOCABULARY)

ARGONNE_PLAN = TensorParallelPlan(
    rules=(
        Rule(pattern="embed_tokens", style=Style.VOCABULARY),
        *_SEPARATE_HEADS,
        Rule(pattern="*.attn.[qk]_norm", style=Style.SUMMED),
        Rule(pattern="*.attn.v_norm_layer", style=Style.SUMMED),
        *_GATED_MLP,
        Rule(pattern="*norm", style=Style.RESIDUAL),
        _HEAD,
    ),
    attention="blocks.*.attn",
    mlp="blocks.*.mlp",
    first_block="blocks.0",
    final_norm="norm",
    embedding="embed_tokens",
    head="lm_head",
    seams=(
        Seam(pattern="blocks.*.attn", method="qkv", members=("q_proj", "k_proj", "v_proj")),
        Seam(pattern="blocks.*.mlp", method="gate_up", members=("gate_proj", "up_proj")),
    ),
    gated_exit=Seam(pattern="blocks.*.mlp", method="down", members=("down_proj",)),
    head_attributes=(
        ("num_heads", "query_heads"),
        ("num_kv_heads", "key_value_heads"),
        ("num_key_value_groups", "groups"),
        ("head_dim", "head_dim"),
    ),
    embedding_splits_sequence=True,
    padded_heads=True,
)

LLAMA_PLAN = TensorParallelPlan(
    rules=(
        Rule(pattern="model.embed_tokens", style=Style.VOCABULARY),
        *_SEPARATE_HEADS,
        Rule(pattern="*.self_attn.q_norm", style=Style.SUMMED),
        Rule(pattern="*.self_attn.k_norm", style=Style.SUMMED),
        *_GATED_MLP,
        Rule(pattern="*norm", style=Style.RESIDUAL),
        _HEAD,
    ),
    attention="model.layers.*.self_attn",
    mlp="model.layers.*.mlp",
    first_block="model.layers.0",
    final_norm="model.norm",
    embedding="model.embed_tokens",
    head="lm_head",
    head_attributes=(("num_key_value_groups", "groups"),),
)

GPT2_PLAN = TensorParallelPlan(
    rules=(
        Rule(pattern="transformer.wte", style=Style.VOCABULARY),
        Rule(pattern="transformer.wpe", style=Style.REPLICATED),
        Rule(pattern="*.attn.c_attn", style=Style.COLUMN, unit=Unit.FUSED_HEADS),
        Rule(pattern="*.attn.c_proj", style=Style.ROW, unit=Unit.QUERY_HEADS),
        Rule(pattern="*.mlp.c_fc", style=Style.COLUMN),
        Rule(pattern="*.mlp.c_proj", style=Style.ROW),
        Rule(pattern="*.ln_*", style=Style.RESIDUAL),
        _HEAD,
    ),
    attention="transformer.h.*.attn",
    mlp="transformer.h.*.mlp",
    first_block="transformer.h.0",
    final_norm="transformer.ln_f",
    embedding="transformer.wte",
    head="lm_head",
    head_attributes=(
        ("num_heads", "query_heads"),
        ("split_size", "query_width"),
        ("embed_dim", "query_width"),
    ),
    sequence_parallel=False,  # it reshapes what its last norm returns by the length of the whole sequence
)

PLANS: dict[str, TensorParallelPlan] = {
    "argonne2": ARGONNE_PLAN,
    "llama": LLAMA_PLAN,
    "mistral": LLAMA_PLAN,
    "qwen2": LLAMA_PLAN,
    "qwen3": LLAMA_PLAN,
    "gpt2": GPT2_PLAN,
}


def has_plan(model_type: str) -> bool:
    """Whether models of a type can be split."""
    return model_type in PLANS


def plan_for(model: nn.Module) -> TensorParallelPlan:
    """The plan of the model's ``config.model_type``. Raises ConfigError for an architecture without one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in PLANS:
        raise ConfigError(
            f"no tensor-parallel plan for model type {model_type!r}: known are {', '.join(PLANS)}"
        )
    return PLANS[model_type]
