"""``--plan`` for people and programs: tables of layers, memory, collectives, time, disk and layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from argonne.config.devices import PEAK_FLOPS
from argonne.config.options import AUTO, RunConfig
from argonne.config.recipe import Recipe
from argonne.training.layouts import fastest_of_kinds, flags_of, misfit
from argonne.training.model_config import planned_model
from argonne.training.plan import (
    LayoutPlan,
    Subject,
    document,
    flops_per_token,
    sending_ranks,
    tokens_per_step,
)
from argonne.training.plan_data import TEXT_BYTES_PER_TOKEN, readings, require_files, validation_sets
from argonne.training.plan_stages import (
    StagePlan,
    common_layouts,
    largest,
    stage_plans,
    stages_document,
    targets_figures,
)
from checkpointing import estimate_checkpoint_bytes
from tp_shard import OUTSIDE_BYTES, SliceMap, build_slice_map, head_imbalance, padding_text, sent_share

MFU_SHOWN = (0.2, 0.3, 0.4)
LAYOUTS_SHOWN = 6


def plan_text(recipe: Recipe) -> str:
    """What ``--plan`` prints: JSON, or text of at most 100 columns."""
    require_files([stage.config for stage in recipe.stages])
    settings, name = planned_model(recipe.config)
    recipe = recipe.with_model(settings)
    config = recipe.config
    plans = stage_plans(recipe, _tokenizer_length(config))
    if config.planning.plan == "json":
        return json.dumps(stages_document(plans), indent=2)
    most = largest(plans)
    what, chosen = most.what, most.plan
    parts = (
        _heading(name, what, chosen, most.name),
        _stages(plans),
        _layers(what, chosen),
        _memory(what, chosen, most.name),
        _host(document(what, chosen)["host_bytes_per_node"]),
        _collectives(what, chosen, most.name),
        _step_time(what, chosen, most.name),
        _time(plans),
        _data(plans),
        _disk(plans),
        _layouts(plans),
    )
    return "\n\n".join(text for text in map("\n".join, parts) if text)


def _tokenizer_length(config: RunConfig) -> int | None:
    if not config.data.tokenizer_path or (config.model.settings or {}).get("vocab_size") is not None:
        return None
    from data_stream import load_tokenizer

    return len(load_tokenizer(config.data.tokenizer_path, trust_remote_code=config.data.trust_remote_code))


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def _slice_map(what: Subject, chosen: LayoutPlan) -> SliceMap:
    return build_slice_map(what.model, what.outline.plan, chosen.layout.tp_size, what.outline.heads.pad_to)


def _in_stage(name: str) -> str:
    return f" in stage {name}, which needs the most memory" if name else ""


def _heading(name: str, what: Subject, chosen: LayoutPlan, stage: str) -> Iterator[str]:
    layout = chosen.layout
    samples = layout.batch_size * layout.accumulation * layout.dp_size
    yield (
        f"Plan: {name}, {what.outline.parameters:,} parameters on {what.world_size} x "
        f"{what.config.planning.plan_device}: tensor parallel {layout.tp_size} x data parallel "
        f"{layout.dp_size}"
    )
    yield (
        f"A step: {samples} sequences of {layout.block_size:,} = {samples * layout.block_size:,} tokens; "
        f"{layout.accumulation} x {layout.batch_size} a replica{_in_stage(stage)}"
    )
    if what.config.parallel.tensor_parallel_size == AUTO:
        count = len(fastest_of_kinds(what))
        per_gpu = "" if what.config.training.global_batch_size else " (--batch-size counts per GPU)"
        yield (
            f"Chosen by --tensor-parallel-size auto{per_gpu}: {flags_of(layout)}, the fastest by "
            f"prediction of {count} kinds that fit"
        )
    heads = what.settings["num_attention_heads"]
    fewest = heads // layout.tp_size
    if heads % layout.tp_size:
        yield (
            f"Heads: {fewest} or {fewest + 1} of {heads} query heads a rank, the most "
            f"{head_imbalance(heads, layout.tp_size):.2f} x the mean; in all the slowest rank multiplies "
            f"{chosen.imbalance:.2f} x"
        )
    if padding := padding_text(_slice_map(what, chosen), what.outline.heads):
        yield f"Widths: padded {padding} (--pad-widths)"
    if teacher := chosen.teacher.parameters:
        yield (
            f"Teacher: {teacher:,} parameters, {what.config.distillation.teacher_device_map}; "
            f"{_gigabytes(chosen.teacher.total)} on each device, among the buffers"
        )


def _stages(plans: Sequence[StagePlan]) -> Iterator[str]:
    """A line for each stage of a recipe."""
    if not plans[0].name:
        return
    yield f"{'stage':16}{'steps':>12}{'tokens':>18}{'a step':>18}{'GB a rank':>11}{'GFLOP a token':>15}  fits"
    for stage in plans:
        layout = stage.plan.layout
        samples = layout.batch_size * layout.accumulation * layout.dp_size
        yield (
            f"{stage.name:16}{stage.steps:>12,}{stage.tokens:>18,}{f'{samples} x {layout.block_size:,}':>18}"
            f"{stage.plan.needed / 1e9:>11.1f}{flops_per_token(stage.what) / 1e9:>15.2f}  "
            f"{'yes' if stage.plan.fits else 'NO'}"
        )


def _layers(what: Subject, chosen: LayoutPlan) -> Iterator[str]:
    outline, tp_size = what.outline, chosen.layout.tp_size
    slice_map = _slice_map(what, chosen)
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


def _memory(what: Subject, chosen: LayoutPlan, stage: str) -> Iterator[str]:
    memory = chosen.memory
    yield f"Memory of a rank{_in_stage(stage)}"
    yield f"  {flags_of(chosen.layout)}"
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


def _collectives(what: Subject, chosen: LayoutPlan, stage: str) -> Iterator[str]:
    layout, rates = chosen.layout, what.rates
    of_stage = f" of stage {stage}" if stage else ""
    yield f"Collectives of a step{of_stage}, each rank (seconds if nothing overlaps)"
    if not chosen.traffic:
        yield "  none"
    for kind, (count, size) in chosen.traffic.items():
        sent = size * sent_share(kind, sending_ranks(kind, layout))
        shares = "  ".join(
            f"{name} {sent / rate:7.3f} s ({sent / rate / (chosen.seconds + sent / rate):4.0%})"
            for name, rate in (("NVLink", rates.link), ("network", rates.network))
        )
        yield f"  {kind:32}{count:>7,} calls{_gigabytes(size):>13}  {shares}"
    speeds = f"{rates.link / 1e9:.0f} GB/s and {rates.network / 1e9:.0f} GB/s"
    yield f"  at {speeds} (assumed), beside the rest of the step"


def _host(figures: Mapping[str, int]) -> Iterator[str]:
    yield "Memory of a host, beside its ranks' own"
    copies, data = figures["checkpoint_copies"], figures["data"]
    yield f"  {'copies':12}{_gigabytes(copies):>12}  for saves in the background, pinned"
    yield f"  {'data':12}{_gigabytes(data):>12}  tokenizing processes, on rank 0's node only"


_PARTS = {
    "products": "matrix products",
    "misaligned": "slower ones, of local widths that are no multiple of 8",
    "attention": "fused attention",
    "elementwise": "elementwise ops, copies and reductions, by their bytes",
    "tensor_parallel": "tensor-parallel collectives that nothing hides",
    "replicas": "collectives over replicas that nothing hides",
    "optimizer": "norm, clipping and AdamW",
    "teacher": "the teacher's forward pass",
    "waiting": "waiting for the host",
}


def _step_time(what: Subject, chosen: LayoutPlan, stage: str) -> Iterator[str]:
    total = chosen.seconds
    tokens = tokens_per_step(chosen.layout)
    of_stage = f" of stage {stage}" if stage else ""
    yield f"Time of a step{of_stage}: a prediction at assumed rates (docs/planning.md); nothing was timed"
    for part, seconds in chosen.time.parts().items():
        if seconds:
            yield f"  {part:16}{1e3 * seconds:>10,.1f} ms  {seconds / total:4.0%}  {_PARTS[part]}"
    yield f"  {'total':16}{1e3 * total:>10,.1f} ms  {tokens / total:,.0f} tokens a second"


def _time(plans: Sequence[StagePlan]) -> Iterator[str]:
    what = plans[0].what
    steps, tokens = (sum(getattr(stage, key) for stage in plans) for key in ("steps", "tokens"))
    flops = sum(stage.flops for stage in plans)
    peak = PEAK_FLOPS.get(what.config.planning.plan_device.upper())
    yield f"Time: {steps:,} steps, {tokens:,} tokens, {flops / tokens / 1e9:.2f} GFLOP a token"
    if peak is not None:
        hours = {mfu: flops / (peak * what.world_size * mfu) / 3600 for mfu in MFU_SHOWN}
        yield "  " + "; ".join(f"at {mfu:.0%} MFU {time:,.1f} hours" for mfu, time in hours.items())


def _data(plans: Sequence[StagePlan]) -> Iterator[str]:
    found = readings((stage.what.config.data, stage.tokens) for stage in plans)
    yield f"Data: {'source':18}{'tokens read':>18}{'there (about)':>16}{'epochs':>9}  shards"
    for source in found:
        globs = " and ".join(source.globs)
        there, epochs, shards = "?", "?", f"none at {globs}"
        if any("://" in glob for glob in source.globs):
            shards = globs
        if source.held is not None:
            there, shards = f"{source.held.tokens:,.3g}", f"{source.held.shards:,} of {globs}"
            epochs = f"{source.epochs:,.3g}"
        yield f"      {source.name or 'the only one':18}{source.tokens:>18,}{there:>16}{epochs:>9}  {shards}"
    if any(source.held is not None and source.held.guessed for source in found):
        yield f"  texts at {TEXT_BYTES_PER_TOKEN} bytes a token; scripts/inspect_data.py measures them"
    sets = list(validation_sets([stage.what.config for stage in plans]))
    if sets:
        yield f"Validation: {'set':56}  shards"
    for name, shards in sets:
        yield f"      {name:62}  {shards}"


def _free_disk(folder: Path) -> int:
    """Bytes free where the output folder is or will be."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _disk(plans: Sequence[StagePlan]) -> Iterator[str]:
    what, stages = plans[0].what, len(plans)
    size = estimate_checkpoint_bytes(what.outline.slice_map)
    folder = Path(what.config.output.output_dir)
    count = what.config.checkpoint.keep_checkpoints + stages
    free = _free_disk(folder)
    yield (
        f"Checkpoints: {_gigabytes(size)} each, {count} at a time (those kept, one more"
        f"{', the last of each stage' if stages > 1 else ''}): "
        f"{_gigabytes(count * size)}"
    )
    yield f"  {_gigabytes(free)} free in {folder}"
    if free < count * size:
        yield "  TOO LITTLE: lower --keep-checkpoints or give another --output-dir"
    teacher = plans[0].plan.teacher
    if teacher.sample_bytes:
        needed = targets_figures(plans[0])["teacher_targets_bytes"]
        yield (
            f"Teacher's targets: {_gigabytes(needed)} for all steps, "
            f"{teacher.sample_bytes:,} bytes a sample; {teacher.stored_samples:,} samples are there"
        )


def _layouts(plans: Sequence[StagePlan]) -> Iterator[str]:
    in_all = " in every stage" if len(plans) > 1 else ""
    yield f"Layouts of the same global batch that fit{in_all}, fastest first (predicted; nothing was timed)"
    best = common_layouts(plans)
    if not best:
        yield "  none"
    for layout in best[:LAYOUTS_SHOWN]:
        yield f"  {layout.needed / 1e9:6.1f} GB  {layout.factor:5.2f} x as fast  {layout.flags}"
