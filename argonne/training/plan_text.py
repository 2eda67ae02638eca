"""``--plan`` for people and programs: tables of layers, memory, collectives, time, disk and layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from argonne.config.devices import PEAK_FLOPS
from argonne.config.options import RunConfig
from argonne.errors import DataError
from argonne.training.plan import (
    NETWORK,
    NVLINK,
    LayoutPlan,
    Subject,
    best_layouts,
    document,
    flags_of,
    flops_per_token,
    misfit,
    run_plan,
    steps_of,
    tokens_per_step,
)
from argonne.training.replica_plan import sending_ranks
from tp_shard import OUTSIDE_BYTES, build_slice_map, head_imbalance, sent_share

MFU_SHOWN = (0.2, 0.3, 0.4)
LAYOUTS_SHOWN = 6
TEXT_BYTES_PER_TOKEN = 4.5
"""Of English text with a vocabulary of 150,000; a guess until the text is tokenized."""
_FOOTERS_READ = 32


def plan_text(config: RunConfig) -> str:
    """What ``--plan`` prints: JSON, or text of at most 100 columns."""
    what, chosen = run_plan(config, _tokenizer_length(config))
    figures = document(what, chosen)
    if config.planning.plan == "json":
        return json.dumps(figures, indent=2)
    parts = (
        _heading(what, chosen),
        _layers(what, chosen),
        _memory(what, chosen),
        _collectives(what, chosen),
        _time(what, chosen),
        _disk(what, figures["checkpoint_bytes"]),
        _layouts(what, chosen),
    )
    return "\n\n".join("\n".join(part) for part in parts)


def _tokenizer_length(config: RunConfig) -> int | None:
    if not config.data.tokenizer_path or (config.model.settings or {}).get("vocab_size") is not None:
        return None
    from data_stream import load_tokenizer

    return len(load_tokenizer(config.data.tokenizer_path, trust_remote_code=config.data.trust_remote_code))


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def _heading(what: Subject, chosen: LayoutPlan) -> Iterator[str]:
    layout = chosen.layout
    name = what.config.model.model_config or "argonne-2.0"
    samples = layout.batch_size * layout.accumulation * layout.dp_size
    yield (
        f"Plan: {name}, {what.outline.parameters:,} parameters on {what.world_size} x "
        f"{what.config.planning.plan_device}: tensor parallel {layout.tp_size} x data parallel "
        f"{layout.dp_size}"
    )
    yield (
        f"A step: {samples} sequences of {layout.block_size:,} = {samples * layout.block_size:,} tokens; "
        f"{layout.accumulation} x {layout.batch_size} a replica"
    )
    if layout.is_cut:
        among = (
            f"{layout.shards} of a node share weights, each node has a copy; " if layout.copies > 1 else ""
        )
        stay = "stay until the backward pass" if layout.keeps_gathered else "are gathered twice"
        yield f"Replicas: {among}weights of a block {stay}"
    heads = what.settings["num_attention_heads"]
    fewest = heads // layout.tp_size
    if heads % layout.tp_size:
        yield (
            f"Heads: {fewest} or {fewest + 1} of {heads} query heads a rank, the most "
            f"{head_imbalance(heads, layout.tp_size):.2f} x the mean; in all the slowest rank multiplies "
            f"{chosen.imbalance:.2f} x"
        )
    if teacher := chosen.teacher.parameters:
        yield (
            f"Teacher: {teacher:,} parameters, {what.config.distillation.teacher_device_map}; "
            f"{_gigabytes(chosen.teacher.total)} on each device, among the buffers"
        )


def _layers(what: Subject, chosen: LayoutPlan) -> Iterator[str]:
    outline, tp_size = what.outline, chosen.layout.tp_size
    slice_map = build_slice_map(what.model, outline.plan, tp_size)
    prefix = outline.plan.first_block.rpartition(".")[0]
    yield f"{'parameter':44}{'shape':>18}{'on a rank':>18}{'elements a rank':>18}"
    for name in slice_map.names:
        in_blocks = name.startswith(f"{prefix}.")
        if in_blocks and not name.startswith(f"{outline.plan.first_block}."):
            continue
        shape = slice_map.shape(name)
        local = max(slice_map.tp_local_shape(name, rank) for rank in range(tp_size))
        count = outline.num_layers if in_blocks else 1
        shown = name.replace(f"{outline.plan.first_block}.", f"{prefix}.* x {count} ") if in_blocks else name
        total = count
        for extent in local:
            total *= extent
        sizes = (" x ".join(map(str, extents)) for extents in (shape, local))
        yield f"{shown:44}" + "".join(f"{size:>18}" for size in sizes) + f"{total:>18,}"
    if f"{outline.plan.head}.weight" not in slice_map.names:
        yield f"{outline.plan.head}.weight is {outline.plan.embedding}.weight (tied)"


def _memory(what: Subject, chosen: LayoutPlan) -> Iterator[str]:
    memory = chosen.memory
    yield f"Memory of a rank ({flags_of(chosen.layout)})"
    rows = (
        ("weights", memory.weights, "float32"),
        ("gradients", memory.gradients, "float32"),
        ("optimizer", memory.optimizer, "two Adam moments, float32"),
        ("activations", memory.activations, f"kept, recomputation {chosen.layout.recomputation}"),
        ("logits", memory.logits, "with their gradient, a chunk at a time unless --loss-chunk-tokens 0"),
        ("buffers", memory.buffers, "copies of weights, gathered tensors, work of an operation"),
        ("peak", memory.total, "not the sum: gradients come while activations go"),
        ("outside", OUTSIDE_BYTES, "CUDA context, NCCL, cuBLAS (2 to 3 GB)"),
        ("device", what.device_memory, f"{chosen.needed / what.device_memory:.0%} of it needed"),
    )
    for name, size, remark in rows:
        yield f"  {name:12}{_gigabytes(size):>12}  {remark}"
    yield f"  {misfit(what, chosen.layout) or 'It fits.'}"


def _collectives(what: Subject, chosen: LayoutPlan) -> Iterator[str]:
    layout = chosen.layout
    yield "Collectives of a step, each rank (seconds if nothing overlaps)"
    if not chosen.traffic:
        yield "  none"
    for kind, (count, size) in chosen.traffic.items():
        sent = size * sent_share(kind, sending_ranks(kind, layout))
        shares = "  ".join(
            f"{name} {sent / rate:7.3f} s ({sent / rate / (chosen.seconds + sent / rate):4.0%})"
            for name, rate in (("NVLink", NVLINK), ("network", NETWORK))
        )
        yield f"  {kind:32}{count:>7,} calls{_gigabytes(size):>13}  {shares}"
    yield f"  at {NVLINK / 1e9:.0f} GB/s and {NETWORK / 1e9:.0f} GB/s, beside the rest of the step"


def _time(what: Subject, chosen: LayoutPlan) -> Iterator[str]:
    steps = steps_of(what, chosen.layout)
    tokens = steps * tokens_per_step(chosen.layout)
    peak = PEAK_FLOPS.get(what.config.planning.plan_device.upper())
    flops = flops_per_token(what)
    yield f"Time: {steps:,} steps, {tokens:,} tokens, {flops / 1e9:.2f} GFLOP a token"
    if peak is not None:
        hours = {mfu: flops * tokens / (peak * what.world_size * mfu) / 3600 for mfu in MFU_SHOWN}
        yield "  " + "; ".join(f"at {mfu:.0%} MFU {time:,.1f} hours" for mfu, time in hours.items())
    globs = what.config.data.data_glob
    there = _text_bytes(globs, what.config.data.text_column)
    if there is None:
        yield f"  data: none at {' and '.join(globs)}"
        return
    shards, size = there
    held = size / TEXT_BYTES_PER_TOKEN
    yield (
        f"  data: {shards:,} shards of {' and '.join(globs)}, {_gigabytes(size)} of text, about "
        f"{held:,.3g} tokens: {tokens / held:,.3g} epochs"
    )


def _text_bytes(globs: Sequence[str], column: str) -> tuple[int, int] | None:
    """(shards, bytes of their text, uncompressed) by the footers of some; None where there are none."""
    import pyarrow
    import pyarrow.parquet

    from data_stream import find_shards

    try:
        paths = [found.path for found in find_shards(globs) if found.path.suffix == ".parquet"]
    except DataError:
        paths = []
    if not paths:
        return None
    read, size = 0, 0
    for path in paths[:: max(1, len(paths) // _FOOTERS_READ)]:
        try:
            footer = pyarrow.parquet.ParquetFile(path).metadata
        except (OSError, pyarrow.ArrowException):
            continue  # the run says which shard is broken
        read += 1
        for group in range(footer.num_row_groups):
            columns = [footer.row_group(group).column(index) for index in range(footer.num_columns)]
            size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)
    return (len(paths), round(size * len(paths) / read)) if size else None


def _free_disk(folder: Path) -> int:
    """Bytes free where the output folder is or will be."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _disk(what: Subject, size: int) -> Iterator[str]:
    folder = Path(what.config.output.output_dir)
    count = what.config.checkpoint.keep_checkpoints + 1
    free = _free_disk(folder)
    yield (
        f"Checkpoints: {_gigabytes(size)} each, {count} at a time (those kept and one more): "
        f"{_gigabytes(count * size)}"
    )
    yield f"  {_gigabytes(free)} free in {folder}"
    if free < count * size:
        yield "  TOO LITTLE: lower --keep-checkpoints or give another --output-dir"


def _layouts(what: Subject, chosen: LayoutPlan) -> Iterator[str]:
    best = best_layouts(what, chosen.layout)
    yield "Layouts of the same global batch that fit, fastest first (estimated; nothing was timed)"
    if not best:
        yield "  none"
    for plan in best[:LAYOUTS_SHOWN]:
        factor = chosen.seconds / plan.seconds
        yield f"  {plan.needed / 1e9:6.1f} GB  {factor:5.2f} x as fast  {flags_of(plan.layout)}"
