"""The Argonne family, read independently: plain tensor functions on a dictionary of weights, dense masks."""

from typing import Any

import torch
from torch import Tensor

SWITCHES: dict[str, Any] = {
    "qk_norm": True,
    "v_norm": True,
    "sandwich_norm": True,
    "logit_softcap": 2.0,
    "interleaved_local_attention": True,
    "local_attention_window": 3,
    "z_loss_weight": 0.1,
}
"""Every switch on; the cap and the weight are such that both show in loss and gradients."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """x (batch, heads, seq_len, head_dim); the angles in float32, as every published model has them."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float32), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attention(x: Tensor, w: dict[str, Tensor], at: str, config: Any, layer: int) -> Tensor:
    batch, seq_len, _ = x.shape
    heads, shared = config.num_attention_heads, config.num_key_value_heads

    def project(name: str, count: int) -> Tensor:
        out = x @ w[f"{at}.{name}_proj.weight"].T
        if config.attention_bias:
            out = out + w[f"{at}.{name}_proj.bias"]
        return out.view(batch, seq_len, count, config.head_dim).transpose(1, 2)

    q, k, v = project("q", heads), project("k", shared), project("v", shared)
    if config.qk_norm:
        q = rms_norm(q, w[f"{at}.q_norm.weight"], config.rms_norm_eps)
        k = rms_norm(k, w[f"{at}.k_norm.weight"], config.rms_norm_eps)
    if config.v_norm:
        v = rms_norm(v, w[f"{at}.v_norm_layer.weight"], config.rms_norm_eps)
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    k, v = (t.repeat_interleave(heads // shared, 1) for t in (k, v))
    i, j = torch.arange(seq_len)[:, None], torch.arange(seq_len)
    seen = j <= i
    if config.interleaved_local_attention and layer % 2 == 1:
        seen &= j >= i - config.local_attention_window
    scores = (q @ k.transpose(-1, -2) * config.head_dim**-0.5).masked_fill(~seen, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq_len, -1)
    out = out @ w[f"{at}.o_proj.weight"].T
    return out + w[f"{at}.o_proj.bias"] if config.attention_bias else out


def logits_of(w: dict[str, Tensor], config: Any, ids: Tensor) -> Tensor:
    """Capped logits (batch, seq_len, vocab_size)."""
    x = w["embed_tokens.weight"][ids]
    eps = config.rms_norm_eps
    for layer in range(config.num_hidden_layers):
        at = f"blocks.{layer}"
        a = attention(rms_norm(x, w[f"{at}.input_norm.weight"], eps), w, f"{at}.attn", config, layer)
        if config.sandwich_norm:
            a = rms_norm(a, w[f"{at}.attn_out_norm.weight"], eps)
        x = x + a
        h = rms_norm(x, w[f"{at}.post_norm.weight"], eps)
        gate, up = (h @ w[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        m = (gate * gate.sigmoid() * up) @ w[f"{at}.mlp.down_proj.weight"].T
        if config.sandwich_norm:
            m = rms_norm(m, w[f"{at}.mlp_out_norm.weight"], eps)
        x = x + m
    head = w["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = rms_norm(x, w["norm.weight"], eps) @ head.T
    cap = config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


def loss_and_gradients(model: Any, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss of the training step on (batch, seq_len + 1) tokens, and the gradient of every parameter."""
    config = model.config
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = logits_of(w, config, tokens[:, :-1])
    normalizer = logits.logsumexp(-1)
    picked = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    loss = (normalizer - picked).mean() + config.z_loss_weight * normalizer.pow(2).mean()
    gradients = torch.autograd.grad(loss, list(w.values()))
    return loss.item(), dict(zip(w, gradients, strict=True))
