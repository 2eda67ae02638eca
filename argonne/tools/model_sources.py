"""The models that the verification and architecture scripts take, by name, configuration or checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from argonne.checkpoint.parts import open_any
from argonne.checkpoint.shape import infer_model_config
from argonne.config.presets import REFERENCE, check_stored_config, load_model_settings
from argonne.errors import CheckpointError, ConfigError
from argonne.tp.architectures import plan_for
from argonne.tp.plan import HeadCounts, check_degree
from model import ArgonneConfig, ArgonneModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Tiny random models of transformers."""
DEFAULT_VOCAB_SIZE = 1003
"""For a preset, which has none: no degree from 2 to 8 divides it."""
REFERENCE_VOCAB_SIZE = 151_665


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from. Pickled to other processes, each of which builds the same weights."""

    label: str
    family: str
    """"argonne", or one of `FAMILIES`."""
    settings: dict[str, Any]
    """Keyword arguments of the configuration."""
    checkpoint: str | None = None
    """File whose weights are taken; None: drawn at random."""

    def build(self, dtype: torch.dtype, seed: int) -> nn.Module:
        """The whole model in ``dtype``, in training mode, with weights that depend on the source and seed."""
        torch.manual_seed(seed)
        if self.checkpoint is not None:
            model = self.build_empty()
            _read_weights(model, Path(self.checkpoint))
            return model.to(dtype).train()
        model = self._new().to(dtype).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return _widen(model) if dtype is torch.float64 and self.family in FAMILIES else model

    def build_empty(self) -> nn.Module:
        """On the meta device: shapes only."""
        with torch.device("meta"):
            return self._new()

    def _new(self) -> nn.Module:
        if self.family == "argonne":
            return ArgonneModel(ArgonneConfig(**self.settings))
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.family, **self.settings)
        return AutoModelForCausalLM.from_config(config)

    def describe(self) -> str:
        """Shape in one line."""
        config: Any = self._config()
        heads = config.num_attention_heads
        key_value = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        tied = "tied" if config.tie_word_embeddings else "untied"
        return (
            f"{config.num_hidden_layers} layers of width {config.hidden_size}, {heads} query and {key_value} "
            f"key/value heads of {head_dim}, MLP {inner}, vocabulary {config.vocab_size:,}, {tied} head"
            + "".join(_switches(config))
        )

    def _config(self) -> Any:
        return self.build_empty().config


def _switches(config: Any) -> Iterator[str]:
    """What an Argonne model has beside that of 2.0."""
    if cap := getattr(config, "logit_softcap", 0.0):
        yield f", logits capped at {cap:g}"
    if weight := getattr(config, "z_loss_weight", 0.0):
        yield f", z-loss {weight:g}"
    if getattr(config, "interleaved_local_attention", False):
        yield f", odd layers attend {config.local_attention_window} tokens back"


class _WideNorm(nn.Module):
    """torch's RMSNorm with another's weight."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def _widen(model: nn.Module) -> nn.Module:
    """Norms in float64 too: transformers' own round to float32, which would hide what is to be measured."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _WideNorm(module.weight, module.variance_epsilon))
    return model


def tiny_settings(family: str, tp_size: int, *, vocab_size: int, layers: int) -> dict[str, Any]:
    """A small shape of transformers' ``family`` whose heads ``tp_size`` can divide; little else divides."""
    heads = tp_size * -(-8 // tp_size)
    if family == "gpt2":
        return {
            "vocab_size": vocab_size,
            "n_embd": 6 * heads,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    key_value = next(
        n for n in (heads // 2, tp_size, heads) if heads % n == 0 and (n % tp_size == 0 or tp_size % n == 0)
    )
    return {
        "vocab_size": vocab_size,
        "hidden_size": 6 * heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value,
        "head_dim": 6,
        "intermediate_size": 90,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def choose_source(
    name: str | None, checkpoint: str | None, *, tp_size: int, layers: int | None, vocab_size: int | None
) -> ModelSource:
    """The model the command line asks for.

    ``layers`` keeps the first so many layers. Raises ConfigError or CheckpointError.
    """
    if checkpoint is not None:
        if vocab_size is not None:
            raise ConfigError("--vocab-size is the checkpoint's own: leave it out with --checkpoint-path")
        return _checkpoint_source(name, checkpoint, layers)
    if name in FAMILIES:
        settings = tiny_settings(name, tp_size, vocab_size=vocab_size or 131, layers=layers or 2)
        return ModelSource(label=f"tiny random {name} of transformers", family=name, settings=settings)
    settings = load_model_settings(name or "argonne-tiny")
    if vocab_size is not None or "vocab_size" not in settings:
        settings["vocab_size"] = vocab_size or DEFAULT_VOCAB_SIZE
    if layers is not None:
        settings["num_hidden_layers"] = min(layers, settings["num_hidden_layers"])
    path = Path(name or "argonne-tiny")
    label = path.resolve().parent.name if path.name == "config.json" else path.name
    return ModelSource(label=label, family="argonne", settings=settings)


def _checkpoint_source(name: str | None, checkpoint: str, layers: int | None) -> ModelSource:
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise CheckpointError(f"--checkpoint-path {path} is not a file: give one checkpoint (.pth)")
    if name in FAMILIES:
        raise ConfigError(f"--model {name} has no checkpoints here: leave it out, or --checkpoint-path")
    reader = open_any(path)
    assumed = load_model_settings(name or REFERENCE)
    stored = check_stored_config(reader.metadata, path)
    try:
        settings = {**infer_model_config(reader, assumed), **stored}
    except CheckpointError as error:
        if name is not None:
            raise
        raise CheckpointError(
            f"{error}: give --model, a preset or config.json with its head counts"
        ) from error
    if layers is not None:
        settings["num_hidden_layers"] = min(layers, settings["num_hidden_layers"])
    return ModelSource(label=path.name, family="argonne", settings=settings, checkpoint=str(path))


def _read_weights(model: nn.Module, path: Path) -> None:
    reader = open_any(path)
    parameters = dict(model.named_parameters())
    weights = {
        name: reader.read(name, (0,) * parameter.dim(), tuple(parameter.shape))
        for name, parameter in parameters.items()
    }
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()  # type: ignore[operator]


def parameter_count(source: ModelSource) -> int:
    """Parameters of the whole model; a tied head counts once."""
    return sum(parameter.numel() for parameter in source.build_empty().parameters())


def check_heads(source: ModelSource, tp_size: int) -> None:
    """Raise ConfigError, naming the degrees that work, where ``tp_size`` does not fit the heads."""
    heads = HeadCounts.from_config(source.build_empty().config)
    check_degree(heads.query_heads, tp_size)


def check_sequence(source: ModelSource, seq_len: int, *, sequence_parallel: bool) -> None:
    """Raise ConfigError where the model cannot take so many tokens, or slices of a sequence."""
    if sequence_parallel and not plan_for(source.build_empty()).sequence_parallel:
        raise ConfigError(f"--sequence-parallel does not work with {source.family}; leave it out")
    if source.family == "gpt2" and seq_len > source.settings["n_positions"]:
        most = source.settings["n_positions"]
        raise ConfigError(f"--seq-len {seq_len}: this model has {most} positions; give at most {most}")


def narrowed(source: ModelSource, limit: int) -> ModelSource:
    """The same head layout at a width that stays below ``limit`` parameters: two layers, thinner heads.

    Only for random Argonne models; the head counts, biases and tied head are kept.
    """
    settings = dict(source.settings)
    heads = settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    settings["num_hidden_layers"] = min(2, settings["num_hidden_layers"])
    settings["vocab_size"] = min(DEFAULT_VOCAB_SIZE, settings["vocab_size"])
    factor = 1
    while True:
        narrow = {
            **settings,
            "hidden_size": max(8, source.settings["hidden_size"] // factor),
            "intermediate_size": max(8, source.settings["intermediate_size"] // factor),
            "head_dim": max(2, head_dim // factor // 2 * 2),
        }
        candidate = replace(source, label=f"{source.label} made narrow", settings=narrow)
        if parameter_count(candidate) <= limit or factor >= 1024:
            return candidate
        factor *= 2


def available_memory() -> int | None:
    """Bytes of memory that are free or can be freed; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
