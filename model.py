"""The Argonne decoder as a plain Hugging Face model.

Llama-like: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, tied or untied head; and, by switches
of the configuration, what the family has added since 2.0: norms on heads, sandwich norms, soft-capped
logits, local attention in odd layers, z-loss. The file is self-contained (torch and transformers only; an
export copies it for ``trust_remote_code``) and knows nothing of distribution. What tensor parallelism
replaces are modules and the small methods ``qkv``, ``gate_up`` and ``down``; everything that depends on the
sequence length is taken from ``input_ids``, because with sequence parallelism the embedding returns a slice
of the sequence.

Precision: the residual stream is in the compute dtype (the autocast dtype, cast once after the embedding);
norms, softmax, rotation and cross entropy run in float32, or in float64 in a float64 model.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# Transformers 5.24 calls the cache so too; the older name is announced to go.
_CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Keys of other decoders' config.json files that would change the computation: only these values are accepted.
# argonne/config/model_keys.py has the same two tables for a file that is read before torch is imported.
NEUTRAL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu", "swish", None),
    "hidden_dropout": (0.0, None),
    "mtp_horizon": (1, 0, None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
}
# Keys that say nothing of the computation.
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


# ----------------------------------------------------------------------------------------------------------
# Configuration


class ArgonneConfig(PretrainedConfig):
    """Shape of an Argonne model; the defaults are Argonne 2.0 (4.92 billion parameters).

    ``head_dim`` defaults to ``hidden_size // num_attention_heads``, rounded down: the query projection maps
    ``hidden_size`` to ``num_attention_heads * head_dim``, which need not be ``hidden_size``.

    ``qk_norm`` and ``v_norm`` put an RMSNorm over head_dim on queries and keys, and on values, before the
    rotation; ``sandwich_norm`` one on what attention and MLP return, before it is added to the residual
    stream. ``logit_softcap`` c > 0 makes the logits ``c * tanh(logits / c)``. With
    ``interleaved_local_attention`` position i of the odd layers (1, 3, ...) attends to i -
    ``local_attention_window`` to i only. ``z_loss_weight`` w adds w * mean(logsumexp(logits) ** 2) to the
    loss.

    Raises ValueError for head counts or sizes that cannot work, for settings that the architecture does not
    have (dropout, rotary scaling, another activation) and for any key whose meaning is not known.
    """

    model_type = "argonne2"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    # fmt: off
    def __init__(
        self, *,
        vocab_size: int = 151665, hidden_size: int = 4080, num_hidden_layers: int = 24,
        num_attention_heads: int = 24, num_key_value_heads: int | None = 8,
        head_dim: int | None = None, intermediate_size: int = 11008, rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-6, max_position_embeddings: int = 4096, attention_bias: bool = False,
        mlp_bias: bool = False, qk_norm: bool = False, v_norm: bool = False,
        sandwich_norm: bool = False, logit_softcap: float = 0.0,
        interleaved_local_attention: bool = False, local_attention_window: int | None = None,
        z_loss_weight: float = 0.0, tie_word_embeddings: bool = True, use_cache: bool = True,
        bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None, **kwargs: Any,
    ) -> None:
        # fmt: on
        rope_parameters = kwargs.pop("rope_parameters", None) or {}
        _refuse_unknown_settings(kwargs, rope_parameters)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.intermediate_size = intermediate_size
        self.rope_theta = rope_parameters.get("rope_theta", rope_theta)
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.qk_norm = qk_norm
        self.v_norm = v_norm
        self.sandwich_norm = sandwich_norm
        self.logit_softcap = logit_softcap or 0.0
        self.interleaved_local_attention = interleaved_local_attention
        self.local_attention_window = local_attention_window
        self.z_loss_weight = z_loss_weight or 0.0
        self.use_cache = use_cache
        self._refuse_impossible_shapes()
        kwargs |= {
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**kwargs)

    def _refuse_impossible_shapes(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2 != 0:
            raise ValueError(f"head_dim {self.head_dim} must be even and positive for the rotary embedding")
        if self.logit_softcap < 0 or self.z_loss_weight < 0:
            raise ValueError("logit_softcap and z_loss_weight must not be negative")
        window = self.local_attention_window
        if self.interleaved_local_attention and (window is None or window < 1):
            raise ValueError(
                f"interleaved_local_attention needs a local_attention_window of at least 1, "
                f"not {window!r}"
            )

    def local_window(self, layer_idx: int) -> int | None:
        """How many tokens back a layer attends, beside the token itself; None: to all."""
        local = self.interleaved_local_attention and layer_idx % 2 == 1
        return self.local_attention_window if local else None


def _refuse_unknown_settings(settings: dict[str, Any], rope_parameters: dict[str, Any]) -> None:
    """Drop the neutral keys of ``settings``; ValueError naming the keys that would make another model."""
    kinds = {rope_parameters.get(key, "default") for key in ("rope_type", "type")}
    if kinds != {"default"} or set(rope_parameters) - {"rope_type", "type", "rope_theta"}:
        raise ValueError(f"rope_parameters {rope_parameters!r}: only the default rotary embedding exists")
    if settings.get("use_sliding_window") is False:
        settings.pop("sliding_window", None)  # Qwen2 names a window that this switch turns off
    if set(settings.get("layer_types") or ()) <= {"full_attention"}:
        settings.pop("layer_types", None)
    for key, neutral in NEUTRAL_SETTINGS.items():
        if (given := settings.pop(key, None)) not in neutral:
            raise ValueError(
                f"{key} {given!r} is not part of the Argonne architecture, only {neutral[0]!r} is"
            )
    known = SILENT_SETTINGS | set(PretrainedConfig().to_dict())
    unknown = [key for key in settings if key not in known and not key.startswith("_")]
    unknown = [f"{key} {settings[key]!r}" for key in unknown if settings[key] not in (None, False)]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: ArgonneConfig does not know what this means for the model")


def initial_std(config: ArgonneConfig, parameter_name: str) -> float | None:
    """Standard deviation of a parameter's normal draw; None: filled with ones (norms); 0.0: zeros (biases).

    ``hidden_size ** -0.5``, which gives logits of unit variance, so that training starts at a loss of
    ln(vocab_size) + 0.5; projections back into the residual stream are further divided by
    ``sqrt(2 * num_hidden_layers)`` (Radford et al. 2019, section 2.3).
    """
    module_name, _, leaf = parameter_name.rpartition(".")
    module_name = module_name.rpartition(".")[2]
    if leaf == "bias":
        return 0.0
    if module_name.endswith("norm") or module_name == "v_norm_layer":
        return None
    std = config.hidden_size**-0.5
    if module_name in ("o_proj", "down_proj"):
        std /= (2 * config.num_hidden_layers) ** 0.5
    return std


# ----------------------------------------------------------------------------------------------------------
# Norm, activation, loss: float32 inside, little saved for the backward


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over features: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def saves_traffic(x: Tensor) -> bool:
    """Whether to take the forms that move fewer bytes and round less often: in eager code on CUDA.

    Compiled code fuses what is written plainly, and on the CPU the plain form gives Llama's numbers.
    """
    return x.device.type == "cuda" and x.dtype != torch.float64 and not torch.compiler.is_compiling()


_HAS_FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def fused_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """torch's kernel: the normed x, and rstd (one number a row)."""
    normed: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
    return normed


def fused_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """torch's kernels: the gradients of x and weight."""
    grads: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm_backward(
        grad, x, weight.shape, rstd, weight, needs
    )
    return grads


class _FusedRMSNormFunction(torch.autograd.Function):
    """As _RMSNormFunction by torch's kernels, which round once: after the weight, in x's dtype as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, rstd = fused_norm(x, weight.to(x.dtype), eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        grad_x, grad_weight = fused_norm_backward(grad.contiguous(), x, rstd, weight.to(x.dtype), needs)
        return grad_x, grad_weight.to(weight.dtype) if needs[1] else None, None


class _RMSNormFunction(torch.autograd.Function):
    """``weight * (x * rstd)``, saving x and rstd (one number a token) where autograd would keep more copies.

    The result has x's dtype also where the weight's is wider (autocast): the residual stream keeps its dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype == _compute_dtype(x.dtype):
            mean_square = x.square().mean(-1, keepdim=True)  # bit for bit as in Llama
        else:
            # One pass over x, which sums in float32; the mean of squares would write x twice, widened.
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_compute_dtype(x.dtype))
            mean_square = length.square_().div_(x.shape[-1])
        rstd = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        # Rounded to x's dtype before the weight, as in Llama.
        return (x * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        x_hat = x * rstd
        product = x_hat * grad
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            projection = product.mul_(weight).mean(-1, keepdim=True)
            weighted = (grad * weight).to(rstd.dtype)
            grad_x = weighted.addcmul_(x_hat, projection, value=-1.0).mul_(rstd).to(x.dtype)
        return grad_x, grad_weight, None


class _SwiGLUFunction(torch.autograd.Function):
    """``silu(gate) * up``, saving gate and up only: the backward recomputes the activation."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class ArgonneRMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        fused = _HAS_FUSED_NORM and saves_traffic(hidden_states)
        norm = _FusedRMSNormFunction if fused else _RMSNormFunction
        return norm.apply(hidden_states, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` (Gemma 2, section 2), or the logits themselves where ``cap`` is 0."""
    return torch.tanh(logits / cap) * cap if cap else logits


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    logit_softcap: float = 0.0,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """Cross entropy of logits (batch, seq_len, vocab) in float32, or in float64 for float64 logits.

    The logits are soft-capped here where ``logit_softcap`` is given; ``z_loss_weight`` adds the z-loss, over
    the same targets.

    ``labels`` are the input tokens, shifted here, once; ``shift_labels`` are targets already shifted and go
    before ``labels``. The mean over the targets that are not ``ignore_index``, or the sum divided by
    ``num_items_in_batch`` where that is given, as in transformers; with no target at all the mean is NaN,
    as in torch.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss needs labels or shift_labels")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits = soft_cap(logits.to(_compute_dtype(logits.dtype)).reshape(-1, vocab_size), logit_softcap)
    targets = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    if z_loss_weight:
        squares = logits.logsumexp(-1)[targets != ignore_index].square()
        total = total + z_loss_weight * (squares.mean() if num_items_in_batch is None else squares.sum())
    if num_items_in_batch is None:
        return total
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


# ----------------------------------------------------------------------------------------------------------
# Attention


def rotary_frequencies(config: ArgonneConfig) -> Tensor:
    """The inverse frequencies (head_dim / 2) in float32 on the CPU, by Llama's formula to the last bit."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    return 1.0 / (config.rope_theta**exponents)


def rotary_tables(frequencies: Tensor, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (batch or 1, seq_len, 1, head_dim) for positions (batch or 1, seq_len).

    Computed in float32 like Llama's, whatever the model's dtype, and never below it: a float64 model gets the
    same numbers widened, a bfloat16 model is rotated in float32.
    """
    if position_ids.device.type == "cuda" and not frequencies.is_cuda:
        frequencies = frequencies.pin_memory()  # from pageable memory the copy would make the host wait
    frequencies = frequencies.to(position_ids.device, non_blocking=True)
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(_compute_dtype(dtype)), angles.sin().to(_compute_dtype(dtype))


class _RotaryTables:
    """Keeps the tables of the longest sequence so far, which begin with those of every shorter one."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def of_call(
        self,
        frequencies: Tensor,
        tokens: Tensor,
        dtype: torch.dtype,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """The tables for a forward pass over ``tokens`` (batch, seq_len)."""
        seq_len = tokens.shape[1]
        if position_ids is None and past_key_values is None and not torch.compiler.is_compiling():
            return self._of_length(frequencies, seq_len, tokens.device, _compute_dtype(dtype))
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(seq_len, device=tokens.device) + seen)[None]
        return rotary_tables(frequencies, position_ids, dtype)

    def _of_length(
        self, frequencies: Tensor, seq_len: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        kept = self.kept
        wanted = (device, dtype, 2 * len(frequencies))
        if (
            kept is None
            or kept[0].shape[1] < seq_len
            or (kept[0].device, kept[0].dtype, kept[0].shape[-1]) != wanted
        ):
            kept = rotary_tables(frequencies, torch.arange(seq_len, device=device)[None], dtype)
            if type(kept[0]) is Tensor and not kept[0].is_inference():  # the backward pass takes no others
                self.kept = kept
        return kept[0][:, :seq_len], kept[1][:, :seq_len]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (batch, seq_len, num_heads, head_dim), dimension i paired with i + head_dim / 2."""
    if saves_traffic(x):
        rotated: Tensor = _RotaryFunction.apply(x, cos, sin)
        return rotated
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class _RotaryFunction(torch.autograd.Function):
    """As apply_rotary writes it, each half written once and rounded once; the backward turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Both halves have the same angles, so that the tables' first half serves for both."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]
    result = torch.empty_like(x)
    into_first, into_second = result.chunk(2, dim=-1)
    torch.addcmul(first * cos, second, sin, value=-sign, out=into_first)
    torch.addcmul(second * cos, first, sin, value=sign, out=into_second)
    return result


def _repeat_kv(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, groups: int, scaling: float
) -> Tensor:
    """Fused attention of query (batch, num_heads, seq_len, head_dim) on num_heads / groups key/value heads.

    Without a mask it is causal. The key/value heads stay unexpanded wherever a fused kernel takes them so.
    """
    seq_len = query.shape[2]
    is_causal = attention_mask is None and seq_len > 1
    if is_causal and key.shape[2] > seq_len:
        # The first tokens into a preallocated cache: what lies beyond them is empty, and the fused causal
        # kernels want as many keys as queries.
        key, value = key[:, :, :seq_len], value[:, :, :seq_len]
    enable_gqa = groups > 1 and _fused_kernel_takes_groups(query, attention_mask)
    if groups > 1 and not enable_gqa:
        key, value = _repeat_kv(key, groups), _repeat_kv(value, groups)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=enable_gqa,
    )


def local_attention(
    attend: "Attend",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    groups: int,
    scaling: float,
) -> Tensor:
    """Causal attention over the last ``window`` tokens and the token itself; shapes as in sdpa_attention.

    Queries are taken in runs of ``window`` (at least 128): a run sees itself and the window before it, so
    that memory and work are linear in the length, on every device and with every kernel.
    """
    seq_len, run = query.shape[2], max(window, 128)
    outputs = []
    masks: dict[tuple[int, int], Tensor] = {}
    for first in range(0, seq_len, run):
        rows, before = min(run, seq_len - first), min(first, window)
        if (rows, before) not in masks:
            masks[rows, before] = _window_mask(query, rows, before, window)
        keys = slice(first - before, first + rows)
        outputs.append(
            attend(
                query[:, :, first : first + rows],
                key[:, :, keys],
                value[:, :, keys],
                masks[rows, before],
                groups,
                scaling,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _window_mask(query: Tensor, rows: int, before: int, window: int) -> Tensor:
    """Added to scores of (1, 1, rows, before + rows): 0 where a row sees a column, else the least number.

    Column ``before`` is the first row's own token.
    """
    distance = (torch.arange(rows, device=query.device) + before)[:, None]
    distance = distance - torch.arange(before + rows, device=query.device)
    hidden = (distance < 0) | (distance > window)
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    return mask.masked_fill_(hidden, torch.finfo(query.dtype).min)[None, None]


def _fused_kernel_takes_groups(query: Tensor, attention_mask: Tensor | None) -> bool:
    """On CUDA only the flash kernel does: 16-bit, no mask, heads of up to 256. The CPU's always does."""
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and half and attention_mask is None and query.shape[-1] <= 256


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, groups: int, scaling: float
) -> Tensor:
    """Attention spelled out, softmax in float32 (float64 for float64); shapes as in sdpa_attention."""
    key, value = _repeat_kv(key, groups), _repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=_compute_dtype(scores.dtype)).to(query.dtype)
    return torch.matmul(weights, value)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, float], Tensor]
"""sdpa_attention or eager_attention."""


# ----------------------------------------------------------------------------------------------------------
# Attention within documents


def document_starts(document_ids: Tensor) -> Tensor:
    """Where each token's document begins in its sequence, (batch, seq_len) int64.

    A document is a run of equal ``document_ids`` (batch, seq_len).
    """
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return torch.where(begins, places, 0).cummax(dim=1).values


def document_attention(
    attend: "Attend",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | BlockMask,
    window: int | None,
    groups: int,
    scaling: float,
) -> Tensor:
    """Causal attention in which a token sees its own document only; shapes as in sdpa_attention.

    ``documents`` are ``document_starts``, or on a GPU their block mask. Nothing grows with the square of the
    length: each document is attended to alone. Compiled code, whose shapes must not depend on the documents,
    takes queries in runs as local_attention does.
    """
    if isinstance(documents, BlockMask):
        return _flex_attention(query, key, value, documents, groups, scaling)
    if torch.compiler.is_compiling():
        return _attention_in_runs(attend, query, key, value, documents, window, groups, scaling)
    sequences = []
    for row, bounds in enumerate(_document_bounds(documents)):
        parts = []
        for start, end in pairwise(bounds):
            q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
            if window is not None:
                parts.append(local_attention(attend, q, k, v, window, groups, scaling))
            else:
                length = end - start
                mask = None if attend is sdpa_attention else _window_mask(q, length, 0, length)
                parts.append(attend(q, k, v, mask, groups, scaling))
        sequences.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
    return sequences[0] if len(sequences) == 1 else torch.cat(sequences)


def _document_bounds(starts: Tensor) -> list[list[int]]:
    """For each sequence the places where its documents begin, and its length."""
    seq_len = starts.shape[1]
    bounds: list[list[int]] = [[] for _ in range(starts.shape[0])]
    for row, place in (starts == torch.arange(seq_len, device=starts.device)).nonzero().tolist():
        bounds[row].append(place)
    return [[*places, seq_len] for places in bounds]


def _attention_in_runs(
    attend: "Attend",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    window: int | None,
    groups: int,
    scaling: float,
) -> Tensor:
    """Runs of queries on all keys that they might see, with a mask for each run."""
    seq_len, run = query.shape[2], max(window or 0, 128)
    places = torch.arange(seq_len, device=query.device)
    first = starts if window is None else torch.maximum(starts, places - window)
    outputs = []
    for begin in range(0, seq_len, run):
        end = min(begin + run, seq_len)
        oldest = 0 if window is None else max(0, begin - window)
        rows, columns = places[begin:end, None], places[oldest:end]
        hidden = (columns > rows) | (columns < first[:, begin:end, None])
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(hidden, torch.finfo(query.dtype).min)[:, None]
        keys, values = key[:, :, oldest:end], value[:, :, oldest:end]
        outputs.append(attend(query[:, :, begin:end], keys, values, mask, groups, scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


_FLEX_BLOCK = 128


def document_block_mask(starts: Tensor, window: int | None = None) -> BlockMask:
    """The block mask of flex attention for ``document_starts`` (batch, seq_len).

    Made from the bounds of the blocks: create_block_mask would make a mask of seq_len x seq_len.
    """
    seq_len = starts.shape[1]
    places = torch.arange(seq_len, device=starts.device)
    first = starts if window is None else torch.maximum(starts, places - window)
    blocks = -(-seq_len // _FLEX_BLOCK)
    whole = torch.cat((first, first[:, -1:].expand(-1, blocks * _FLEX_BLOCK - seq_len)), dim=1)
    # The first key that a query sees never moves back, so a block's first and last query bound its keys.
    oldest = whole[:, ::_FLEX_BLOCK, None] // _FLEX_BLOCK
    all_see = (whole[:, _FLEX_BLOCK - 1 :: _FLEX_BLOCK, None] + _FLEX_BLOCK - 1) // _FLEX_BLOCK
    index = torch.arange(blocks, device=starts.device)
    full = (index >= all_see) & (index < index[:, None])
    partly = (index >= oldest) & (index <= index[:, None]) & ~full

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[batch, query])

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()

    lengths = (seq_len, seq_len)
    return BlockMask.from_kv_blocks(
        *listed(partly), *listed(full), BLOCK_SIZE=_FLEX_BLOCK, mask_mod=sees, seq_lengths=lengths
    )


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, groups: int, scaling: float
) -> Tensor:
    """Uncompiled it would make all scores: only the code of a compiled block, and tests, call it so."""
    plain = torch.compiler.is_compiling() or query.device.type == "cpu"
    attend: Any = flex_attention if plain else _compiled_flex_attention()
    output: Tensor = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=groups > 1)
    return output


class ArgonneAttention(nn.Module):
    """Grouped-query attention. The head counts are attributes, which a split rewrites to its local counts.

    The norms on heads have one weight of head_dim for all heads; under a split their gradients are sums over
    the local heads.
    """

    def __init__(self, config: ArgonneConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.window = config.local_window(layer_idx)
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = ArgonneRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = ArgonneRMSNorm(self.head_dim, config.rms_norm_eps)
        if config.v_norm:
            self.v_norm_layer = ArgonneRMSNorm(self.head_dim, config.rms_norm_eps)

    def qkv(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, (batch, seq_len, heads * head_dim) each: a block's one entrance."""
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)

    def _heads(self, hidden_states: Tensor) -> tuple[int, int, Tensor, Tensor, Tensor]:
        """batch, seq_len, and queries, keys and values (batch, seq_len, heads, head_dim), normed."""
        query, key, value = self.qkv(hidden_states)
        batch, seq_len = query.shape[:2]
        query = query.view(batch, seq_len, self.num_heads, self.head_dim)
        key = key.view(batch, seq_len, self.num_kv_heads, self.head_dim)
        value = value.view(batch, seq_len, self.num_kv_heads, self.head_dim)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.v_norm:
            value = self.v_norm_layer(value)
        return batch, seq_len, query, key, value

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        documents: Tensor | BlockMask | None = None,
    ) -> Tensor:
        batch, seq_len, query, key, value = self._heads(hidden_states)
        cos, sin = position_embeddings
        query = apply_rotary(query, cos, sin).transpose(1, 2)
        key = apply_rotary(key, cos, sin).transpose(1, 2)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = eager_attention if self.config._attn_implementation == "eager" else sdpa_attention
        groups = self.num_key_value_groups
        if documents is not None:
            output = document_attention(
                attend, query, key, value, documents, self.window, groups, self.scaling
            )
        elif self.window is not None and attention_mask is None:
            output = local_attention(attend, query, key, value, self.window, groups, self.scaling)
        else:
            output = attend(query, key, value, attention_mask, groups, self.scaling)
        return self.o_proj(output.transpose(1, 2).reshape(batch, seq_len, self.num_heads * self.head_dim))


# ----------------------------------------------------------------------------------------------------------
# Blocks and model


class ArgonneMLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def gate_up(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The two projections, (batch, seq_len, intermediate_size) each: a block's one entrance."""
        return self.gate_proj(hidden_states), self.up_proj(hidden_states)

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up`` through the last projection: a block's one exit."""
        return self.down_proj(_SwiGLUFunction.apply(gate, up))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(*self.gate_up(hidden_states))


class ArgonneBlock(nn.Module):
    """One layer: attention and feed-forward, each normed before (with sandwich norms also after) and added to
    the residual stream."""

    def __init__(self, config: ArgonneConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = ArgonneAttention(config, layer_idx)
        self.input_norm = ArgonneRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = ArgonneRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sandwich_norm = config.sandwich_norm
        if config.sandwich_norm:
            self.attn_out_norm = ArgonneRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp_out_norm = ArgonneRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ArgonneMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        documents: Tensor | BlockMask | None = None,
    ) -> Tensor:
        attended = self.attn(
            self.input_norm(hidden_states), position_embeddings, attention_mask, past_key_values, documents
        )
        if self.sandwich_norm:
            attended = self.attn_out_norm(attended)
        hidden_states = hidden_states + attended
        transformed = self.mlp(self.post_norm(hidden_states))
        if self.sandwich_norm:
            transformed = self.mlp_out_norm(transformed)
        return hidden_states + transformed


class ArgonneModel(PreTrainedModel, GenerationMixin):
    """Argonne for causal language modelling.

    The rotary frequencies are a plain tensor derived from the configuration, neither parameter nor buffer:
    no checkpoint, cast, meta-device build or ``to_empty`` can lose or round them.
    """

    config_class = ArgonneConfig
    config: ArgonneConfig
    _no_split_modules = ["ArgonneBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer hands num_items_in_batch over

    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(ArgonneBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = ArgonneRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary_frequencies = rotary_frequencies(config)
        self._rotary_tables = _RotaryTables()
        self.loss_function = causal_lm_loss
        self.head_loss: Callable[..., Tensor] | None = None  # head and loss in one, where a caller sets it
        self.loss_type = "ForCausalLM"  # Trainer counts the targets of models that say so
        self.gradient_checkpointing = False
        self._checkpointed_every = 1
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw one module's own parameters by ``initial_std``; ``init`` leaves alone what was loaded."""
        parameters = list(module.named_parameters(recurse=False))
        if not parameters:
            return
        module_name = next((name for name, other in self.named_modules() if other is module), "")
        for leaf, parameter in parameters:
            std = initial_std(self.config, f"{module_name}.{leaf}")
            if std is None:
                init.ones_(parameter)
            elif std == 0.0:
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> "ArgonneModel":
        """As in torch, but a tied head stays tied (torch gives each of the two names memory of its own)."""
        super().to_empty(device=device, recurse=recurse)
        self.tie_weights()
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        cache_position: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        document_ids: Tensor | None = None,
        **unknown: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, seq_len, vocab), and the loss where ``labels`` or ``shift_labels`` are given.

        ``labels`` are shifted inside, once; ``shift_labels`` are targets already shifted. ``use_cache``
        defaults to the configuration's in evaluation and to False in training. ``logits_to_keep`` n > 0
        computes the logits of the last n positions only (or of the positions in a 1-D tensor). Where
        ``head_loss`` is set, a call with ``shift_labels`` returns no logits. ``cache`` is
        another name of ``past_key_values``, which later versions of transformers use; ``cache_position``
        follows from the cache and is not needed.

        ``document_ids`` (batch, seq_len): a token sees its own document only, a document being a run of equal
        ids; positions still count within the sequence, which rotary attention within a document does not
        notice. Not with ``attention_mask`` or a cache.

        Raises TypeError for an argument that the model does not know, ValueError for a contradiction.
        """
        if unknown:
            raise TypeError(f"ArgonneModel.forward does not know the argument {', '.join(sorted(unknown))}")
        if cache is not None:
            if past_key_values is not None and past_key_values is not cache:
                raise ValueError("ArgonneModel.forward was given both cache and past_key_values")
            past_key_values = cache
        if input_ids is not None and inputs_embeds is None:
            tokens, hidden_states = input_ids, self.embed_tokens(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            tokens, hidden_states = inputs_embeds[..., 0], inputs_embeds
        else:
            raise ValueError("ArgonneModel.forward needs input_ids or inputs_embeds, and not both")
        if output_attentions:
            raise ValueError("ArgonneModel does not return attention weights (output_attentions)")
        hidden_states = _to_autocast_dtype(hidden_states)
        position_embeddings = self._rotary_tables.of_call(
            self.rotary_frequencies, tokens, hidden_states.dtype, position_ids, past_key_values
        )
        if document_ids is not None:
            _check_document_ids(document_ids, tokens, attention_mask, past_key_values, use_cache)
            use_cache = False
            masks: tuple[Tensor | None, Tensor | None] = (None, None)
        else:
            masks = self._masks(tokens, hidden_states.dtype, attention_mask, position_ids, past_key_values)
        documents = _documents_of_layers(self.config, document_ids, hidden_states)
        # Only now: transformers looks for packed sequences in position_ids only where there is no cache.
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self._checkpoints():
            use_cache = False  # the recomputation would write into it a second time
            if past_key_values is not None:
                raise ValueError("ArgonneModel cannot read a cache under gradient checkpointing in training")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        collected = [hidden_states] if output_hidden_states else None
        for index, block in enumerate(self.blocks):
            is_local = self.config.local_window(index) is not None
            run = partial(self._gradient_checkpointing_func, block) if self._checkpoints(index) else block
            hidden_states = run(
                hidden_states, position_embeddings, masks[is_local], past_key_values, documents[is_local]
            )
            if collected is not None:
                collected.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        if collected is not None:
            collected[-1] = hidden_states

        logits = loss = None
        losses = {
            "num_items_in_batch": num_items_in_batch,
            "logit_softcap": self.config.logit_softcap,
            "z_loss_weight": self.config.z_loss_weight,
        }
        if self.head_loss is not None and shift_labels is not None:
            loss = self.head_loss(hidden_states, self.lm_head.weight, shift_labels, **losses)
        else:
            logits = self.lm_head(_keep_positions(hidden_states, logits_to_keep))
            if labels is not None or shift_labels is not None:
                targets = {"labels": labels, "shift_labels": shift_labels}
                loss = self.loss_function(
                    logits=logits, vocab_size=self.config.vocab_size, **targets, **losses
                )
            logits = soft_cap(logits, self.config.logit_softcap)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=None if collected is None else tuple(collected),
        )

    def _checkpoints(self, layer_idx: int = 0) -> bool:
        """Whether transformers' gradient checkpointing covers a layer (this suite recomputes by itself)."""
        on = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return on and layer_idx % self._checkpointed_every == 0

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """What transformers' methods that switch gradient checkpointing on and off call."""
        self.gradient_checkpointing = enable
        self._gradient_checkpointing_func = gradient_checkpointing_func
        self._checkpointed_every = every_n_layers

    def _masks(
        self,
        tokens: Tensor,
        dtype: torch.dtype,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The masks of global and of local layers, (batch, 1, seq_len, key_len) or None each."""
        mask = _causal_mask(self.config, tokens, dtype, attention_mask, position_ids, past_key_values)
        window = self.config.local_window(1)
        if window is None:
            return mask, None
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        seq_len = tokens.shape[1]
        if mask is None and isinstance(seen, int) and seen == 0:
            return None, None
        key_len = seen + seq_len if mask is None else mask.shape[-1]
        distance = (torch.arange(seq_len, device=tokens.device) + seen)[:, None]
        distance = distance - torch.arange(key_len, device=tokens.device)
        visible = (distance >= 0) & (distance <= window)
        if mask is None:
            return None, visible[None, None]
        if mask.dtype == torch.bool:
            return mask, mask & visible
        return mask, mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _check_document_ids(
    document_ids: Tensor,
    tokens: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
) -> None:
    if attention_mask is not None or past_key_values is not None or use_cache:
        raise ValueError("document_ids cannot be used with attention_mask or a key/value cache")
    if document_ids.shape != tokens.shape:
        raise ValueError(
            f"document_ids {tuple(document_ids.shape)} must have the tokens' shape {tuple(tokens.shape)}"
        )


def _causal_mask(
    config: ArgonneConfig,
    tokens: Tensor,
    dtype: torch.dtype,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> Any:
    """The mask (batch, 1, seq_len, key_len), or None where causal attention needs none.

    ``position_ids`` are passed on only where the caller gave them: transformers then looks for packed
    sequences in them, which costs a synchronisation with the device.
    """
    plain = attention_mask is None and position_ids is None and past_key_values is None
    if plain and config._attn_implementation != "eager":
        return None
    named_cache: Any = {_CACHE_NAME: past_key_values}
    shape_only = torch.empty((*tokens.shape, 0), dtype=dtype, device=tokens.device)
    return create_causal_mask(
        config=config,
        inputs_embeds=shape_only,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **named_cache,
    )


def _documents_of_layers(
    config: ArgonneConfig, document_ids: Tensor | None, hidden_states: Tensor
) -> tuple[Tensor | BlockMask | None, Tensor | BlockMask | None]:
    """What attention takes as ``documents`` in global and in local layers."""
    if document_ids is None:
        return None, None
    starts = document_starts(document_ids)
    fused = (
        hidden_states.device.type == "cuda"
        and hidden_states.dtype != torch.float64
        and config._attn_implementation != "eager"
        and find_spec("triton") is not None
    )
    if not fused:
        return starts, starts
    window = config.local_window(1)
    everywhere = document_block_mask(starts)
    return everywhere, everywhere if window is None else document_block_mask(starts, window)


def _to_autocast_dtype(hidden_states: Tensor) -> Tensor:
    """Put the residual stream in the autocast dtype where autocast is on, once, at its start."""
    device_type = hidden_states.device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device_type))


def _keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        return hidden_states[:, logits_to_keep]
    return hidden_states[:, -logits_to_keep:] if logits_to_keep > 0 else hidden_states


AutoConfig.register("argonne2", ArgonneConfig, exist_ok=True)
AutoModel.register(ArgonneConfig, ArgonneModel, exist_ok=True)
AutoModelForCausalLM.register(ArgonneConfig, ArgonneModel, exist_ok=True)
