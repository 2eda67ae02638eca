"""A teacher beside the model that is trained: its word on a micro-batch, of which each rank takes its slice.

Whatever the placement, a rank is given what the teacher's head is given, and multiplies it by the rows of
that head which are its own slice of the student's vocabulary. So logits of the whole vocabulary are on no
rank, and where a teacher speaks for a whole node its hidden states travel, not its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from argonne.config.distillation import FLAG, DistillationOptions, check_folder
from argonne.errors import ConfigError
from argonne.ranks.agree import on_all, on_rank_0
from argonne.ranks.world import Parallel
from argonne.training.teacher_weights import head_rows, split_model, whole_model
from data_stream import StepBatch, load_tokenizer
from model import ArgonneModel
from tp_shard import DTYPES, DistillationRule, TeacherLogits, vocabulary_slice

_PROBE_TOKENS = 8


class _HeadInput(nn.Module):
    """Takes the place of a head: keeps what it is given, and gives next to nothing."""

    seen: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.seen = hidden_states
        return hidden_states[..., :1]


class Teacher:
    """The teacher as one rank has it.

    ``body`` is None on a rank that is told by another; ``matrix`` and ``bias`` are the head's rows of this
    rank's slice of the student's vocabulary.
    """

    def __init__(
        self,
        body: nn.Module | None,
        head: tuple[Tensor, Tensor | None],
        shape: tuple[float, float],
        rule: DistillationRule,
        parallel: Parallel,
        *,
        dtype: torch.dtype,
        hidden_size: int,
        node: dist.ProcessGroup | None = None,
    ) -> None:
        self._body, (self._matrix, self._bias) = body, head
        self._scale, self._cap = shape
        self._rule, self._parallel, self._node = rule, parallel, node
        self._dtype, self._hidden_size = dtype, hidden_size
        self.text = ""
        """One line for the header."""
        self.stored = None
        """It is asked, not read."""
        self._input = _HeadInput()
        if body is not None:
            body.eval().requires_grad_(False)
            _replace_head(body, self._input)

    def targets(self, batch: StepBatch, micro_step: int, place: Mapping[str, Any]) -> TeacherLogits:
        """Its word on this replica's micro-batch; collective over a node where one process speaks for it."""
        if self._node is None:
            hidden = self._hidden(batch, micro_step, place)
        else:
            hidden = self._told(batch, micro_step, place, self._node)
        return TeacherLogits(
            rule=self._rule,
            hidden=hidden,
            matrix=self._matrix,
            bias=self._bias,
            scale=self._scale,
            cap=self._cap,
        )

    @torch.no_grad()
    def _hidden(self, batch: StepBatch, micro_step: int, place: Mapping[str, Any]) -> Tensor:
        """(tokens, hidden_size), what the head is given, on this rank's device."""
        assert self._body is not None
        inputs, _ = batch.micro_batch(micro_step, **place)
        documents = batch.micro_documents(micro_step, **place)
        within = {} if documents is None else {"document_ids": documents}
        where = _input_device(self._body)
        arguments = {name: tensor.to(where) for name, tensor in {"input_ids": inputs, **within}.items()}
        with torch.autocast(self._parallel.device.type, enabled=False):
            self._body(**arguments, use_cache=False)
        hidden = self._input.seen
        del self._input.seen
        return hidden.reshape(-1, hidden.shape[-1]).to(self._parallel.device, self._dtype)

    def _told(
        self, batch: StepBatch, micro_step: int, place: Mapping[str, Any], node: dist.ProcessGroup
    ) -> Tensor:
        """As `_hidden`, of this rank's replica out of all of the node's, which the first rank computes."""
        parallel, mine = self._parallel, None
        first = parallel.rank - parallel.local_rank
        replicas = sorted({(first + rank) // parallel.tp_size for rank in range(parallel.local_world_size)})
        for replica in replicas:
            of_it = {**place, "dp_rank": replica}
            tokens = batch.micro_batch(micro_step, **of_it)[0].numel()
            if self._body is not None:
                hidden = self._hidden(batch, micro_step, of_it).contiguous()
            else:
                hidden = torch.empty((tokens, self._hidden_size), dtype=self._dtype, device=parallel.device)
            dist.broadcast(hidden, src=first, group=node)
            if replica == parallel.dp_rank:
                mine = hidden
        assert mine is not None
        return mine


def open_teacher(
    options: DistillationOptions,
    student: ArgonneModel,
    parallel: Parallel,
    *,
    compute_dtype: torch.dtype,
    tokenizer: Any,
    tokenizer_path: str,
    documents: bool,
    trust: bool,
) -> Teacher | None:
    """The teacher that the flags name, or None; collective.

    ``tokenizer`` is rank 0's. Raises the same RunError on all ranks where it cannot teach this student.
    """
    if options.teacher_path is None:
        return None
    folder = Path(options.teacher_path).expanduser()
    on_all(lambda: check_folder(folder), parallel)
    on_rank_0(lambda: check_tokenizer(folder, tokenizer, tokenizer_path, trust), parallel)
    dtype = DTYPES[options.teacher_dtype] if options.teacher_dtype else compute_dtype
    rows = vocabulary_slice(student)
    node = _node_group(parallel) if options.teacher_device_map == "auto" else None
    teacher = on_all(
        lambda: _open(options, folder, rows, dtype, parallel, student, trust=trust, node=node), parallel
    )
    if documents and (refusal := _refuses_documents(folder, teacher)) is not None:
        raise ConfigError(refusal)
    return teacher


def _open(
    options: DistillationOptions,
    folder: Path,
    rows: range,
    dtype: torch.dtype,
    parallel: Parallel,
    student: ArgonneModel,
    *,
    trust: bool,
    node: dist.ProcessGroup | None,
) -> Teacher:
    placed = options.teacher_device_map
    device = torch.device("cpu") if placed == "cpu" else parallel.device
    body: nn.Module | None = None
    if node is not None and parallel.local_rank != 0:
        head = head_rows(folder, rows, dtype, parallel.device)
    elif placed == "tensor-parallel":
        state: Any = student.tensor_parallel
        body = split_model(folder, dtype, device, state.group, state.pad_to)
        head = head_rows(folder, rows, dtype, parallel.device)
    else:
        device_map = "auto" if placed == "auto" else None
        body = whole_model(folder, dtype, device, device_map=device_map, trust=trust)
        check_head(body, folder)
        head = _own_head_rows(body, rows, dtype, parallel.device)
    matrix, bias, total = head
    vocab_size = student.config.vocab_size
    if total < vocab_size:
        raise ConfigError(
            f"{FLAG} {folder} has a vocabulary of {total}, the student {vocab_size}: a teacher must know all "
            "of the student's tokens"
        )
    config = _config_of(folder, body, trust)
    teacher = Teacher(
        body,
        (matrix, bias),
        _logit_form(config),
        distillation_rule(options),
        parallel,
        dtype=dtype,
        hidden_size=matrix.shape[1],
        node=node,
    )
    teacher.text = _text(options, folder, config, dtype)
    return teacher


def _own_head_rows(
    body: nn.Module, rows: range, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None, int]:
    """As `head_rows`, of a whole model."""
    head: Any = body.get_output_embeddings()  # type: ignore[operator]
    parts = [
        None if part is None else part.detach()[rows.start : rows.stop].to(device, dtype, copy=True)
        for part in (head.weight, getattr(head, "bias", None))
    ]
    assert parts[0] is not None
    return parts[0], parts[1], head.weight.shape[0]


def distillation_rule(options: DistillationOptions) -> DistillationRule:
    """How a teacher's word is weighed, by the flags."""
    return DistillationRule(
        alpha=options.distill_alpha,
        temperature=options.distill_temperature,
        reverse=options.distill_divergence == "reverse",
    )


def _text(options: DistillationOptions, folder: Path, config: Any, dtype: torch.dtype) -> str:
    """What the header says."""
    kind, placed = getattr(config, "model_type", "?"), options.teacher_device_map
    return f"{folder} ({kind}, {str(dtype).removeprefix('torch.')}, {placed}), {weighing(options)}"


def weighing(options: DistillationOptions) -> str:
    """The loss in words."""
    return (
        f"{options.distill_alpha:g} x cross entropy + {1 - options.distill_alpha:g} x "
        f"{options.distill_divergence} divergence at temperature {options.distill_temperature:g}"
    )


def _node_group(parallel: Parallel) -> dist.ProcessGroup | None:
    """The ranks of this rank's node, over the devices' own backend; collective."""
    mine = None
    size = parallel.local_world_size
    if parallel.world_size == 1 or size == 1:
        return None
    for first in range(0, parallel.world_size, size):
        group = dist.new_group(list(range(first, first + size)))
        if first == parallel.rank - parallel.local_rank:
            mine = group
    return mine


def check_tokenizer(folder: Path, tokenizer: Any, tokenizer_path: str, trust: bool) -> None:
    """ConfigError at the first id that means another token to the teacher, where it brings a tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return
    theirs = load_tokenizer(str(folder), trust).get_vocab()
    ours = tokenizer.get_vocab()
    if theirs == ours:
        return
    by_id = {index: token for token, index in theirs.items()}
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if by_id.get(index, token) != token:
            raise ConfigError(
                f"{FLAG} {folder} has another tokenizer: id {index} is {by_id[index]!r} to it and {token!r} "
                f"to --tokenizer-path {tokenizer_path}"
            )


def _refuses_documents(folder: Path, teacher: Teacher) -> str | None:
    if teacher._body is None or isinstance(teacher._body, ArgonneModel):
        return None
    return (
        f"{FLAG} {folder} is no Argonne model, and would see beyond the documents of --document-attention: "
        "leave that out, or take an Argonne teacher"
    )


def _config_of(folder: Path, body: nn.Module | None, trust: bool) -> Any:
    if body is not None:
        return body.config
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust)


def _logit_form(config: Any) -> tuple[float, float]:
    """(scale, cap) that a model applies to its head's product, by the names that architectures give them."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_softcap", None)
    return scale, float(cap or 0.0)


def _input_device(body: nn.Module) -> torch.device:
    embedding: Any = body.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = embedding.weight.device
    return device


def _replace_head(body: nn.Module, head: nn.Module) -> None:
    body.set_output_embeddings(head)  # type: ignore[operator]


@torch.no_grad()
def check_head(body: nn.Module, folder: Path) -> None:
    """ConfigError where a model's logits are not its head's product, scaled and capped as its config says."""
    head: Any = body.get_output_embeddings()  # type: ignore[operator]
    if head is None or not hasattr(head, "weight"):
        raise ConfigError(f"{FLAG} {folder} has no head over its vocabulary: give a causal language model")
    given: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    ids = torch.arange(_PROBE_TOKENS, device=_input_device(body))[None] % head.weight.shape[0]
    logits = body.eval()(input_ids=ids, use_cache=False).logits.float()
    hook.remove()
    scale, cap = _logit_form(body.config)
    expected = F.linear(given[0], head.weight, getattr(head, "bias", None)).float() * scale
    if cap:
        expected = torch.tanh(expected / cap) * cap
    error = (logits - expected.to(logits.device)).norm() / logits.norm().clamp_min(1e-9)
    if not float(error) < 0.02:
        raise ConfigError(
            f"{FLAG} {folder}: the logits of a {type(body).__name__} are not its head's product in a way "
            "that is known here; take a teacher of another architecture"
        )
