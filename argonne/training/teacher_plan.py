"""What a teacher adds to a plan: bytes on a rank's device, and work; of stored targets, bytes on the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from argonne.config.distillation import FLAG, TOP_K, DistillationOptions, check_folder
from checkpointing import weights_of_folder
from data_stream import TargetsFolder, TargetsForm, TargetsHeader
from tp_shard import DTYPES, Layout


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """Of one rank; zeros where there is no teacher."""

    parameters: int = 0
    """Of the whole teacher."""
    weights: int = 0
    """Bytes of what lies on the device: its share of the teacher, and its slice of the head."""
    work: int = 0
    """Bytes that it needs while it runs: hidden states and the widest product of a layer."""
    flops: float = 0.0
    """Of one micro-batch."""
    sample_bytes: int = 0
    """Of stored targets, on the disk: of one sample."""
    stored_samples: int = 0
    """Of stored targets: how many there are."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.work

    def figures(self, samples: int) -> dict[str, int]:
        """What a run of so many samples adds to the keys of ``--plan=json``."""
        return {"teacher_targets_bytes": samples * self.sample_bytes} if self.sample_bytes else {}


def teacher_cost(
    options: DistillationOptions, layout: Layout, vocab_size: int, node_size: int
) -> TeacherCost:
    """By the headers of the teacher's weights, or of its stored targets. Raises a RunError as a run would.

    A teacher that transformers places is taken to lie evenly on a node's devices; targets that are not made
    yet, to be what scripts/teacher_targets.py makes unless told otherwise.
    """
    if options.teacher_targets is not None:
        return _stored_cost(options, layout, vocab_size)
    if options.teacher_path is None:
        return TeacherCost()
    parameters, matrices, hidden, widest = _shapes(options.teacher_path)
    size = DTYPES[options.teacher_dtype].itemsize if options.teacher_dtype else layout.element_bytes
    shares = {"local": 1, "tensor-parallel": layout.tp_size, "auto": node_size}
    share = shares.get(options.teacher_device_map)
    head = math.ceil(vocab_size / layout.tp_size) * hidden
    body = 0 if share is None else math.ceil(parameters / share)
    alike = layout.tp_size if options.teacher_device_map == "tensor-parallel" else 1
    return TeacherCost(
        parameters=parameters,
        weights=size * (body + head),
        work=size * layout.tokens * (4 * hidden + (0 if share is None else 3 * math.ceil(widest / alike))),
        flops=2.0 * layout.tokens * (matrices / alike + head),
    )


def _stored_cost(options: DistillationOptions, layout: Layout, vocab_size: int) -> TeacherCost:
    form = TargetsForm(
        block_size=layout.block_size,
        vocab_size=vocab_size,
        top_k=min(TOP_K, vocab_size),
        temperature=options.distill_temperature,
        dtype="float16",
        document_attention=False,
        tokenizer="",
        teacher="",
    )
    there = _stored(str(options.teacher_targets))
    samples = 0
    if there is not None:
        form, samples = there.form, there.samples
    # As read and in wider numbers: ids of 4 and 8 bytes, log-probabilities, two copies in float32.
    of_token = form.top_k * (4 + 8 + form.log_probs_dtype.itemsize + 2 * 4)
    return TeacherCost(work=layout.tokens * of_token, sample_bytes=form.sample_bytes, stored_samples=samples)


@lru_cache(maxsize=4)
def _stored(path: str) -> TargetsHeader | None:
    folder = TargetsFolder(Path(path).expanduser())
    return folder.read_header() if folder.root.exists() else None


@lru_cache(maxsize=4)
def _shapes(path: str) -> tuple[int, int, int, int]:
    """Parameters, those of them that multiply, width of the hidden states, and widest product of a layer."""
    folder = Path(path).expanduser()
    check_folder(folder)
    found = weights_of_folder(folder, FLAG)
    outside = [tensor.shape for name, tensor in found.items() if "embed" in name or "lm_head" in name]
    inside = [tensor.shape for name, tensor in found.items() if "embed" not in name and "lm_head" not in name]
    matrices = [shape for shape in inside if len(shape) > 1]
    hidden = min((shape[1] for shape in outside if len(shape) > 1), default=0)
    return (
        sum(math.prod(tensor.shape) for tensor in found.values()),
        sum(math.prod(shape) for shape in matrices),
        hidden,
        max((shape[0] for shape in matrices), default=0),
    )
