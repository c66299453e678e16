"""`train.py --dry-run`: would a run start, and what would it take on each GPU? From one process.

Everything that a run builds before its first step is built here by the same functions, so that a
mistake in the config is found as a start would find it; data that are not there yet are none. The
figures come from `rehearsal.py`, which runs a step of the very engine on fake tensors; this file
asks for them and words them. `--find-batch` searches the micro-batches that divide the global batch
for the largest one that fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from routedvit.training.assembly import build_retention, build_schedules, native_config
from routedvit.training.assembly_watch import build_run_evaluators
from routedvit.training.checkpoints.bucket import Bucket
from routedvit.training.config.base import counted
from routedvit.training.config.native import split_batch, zero_stage
from routedvit.training.config.run import ConfigError, RunConfig
from routedvit.training.interfaces import EvalLoaders
from routedvit.training.memory import gib, readable
from routedvit.training.model import check_labels, check_num_classes
from routedvit.training.recipe.capacity import scheduled
from routedvit.training.rehearsal import (
    Compute,
    Memory,
    MemoryRehearsal,
    image_format,
    measure_compute,
    rehearse_memory,
)

ASSUMED_CLASSES, ASSUMED_SAMPLES = 1000, 1_281_167  # ImageNet-1k
BATCH_KEYS = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
# The CUDA context, NCCL, workspaces and fragmentation are not tensors: leave them a tenth.
USABLE = 0.9
POLICIES = {
    "false": ("none", 1),
    "heavy": ("heavy", 1),
    "block/2": ("block", 2),
    "block": ("block", 1),
}


@dataclass(frozen=True)
class Machine:
    """What the run would run on: `world_size` GPUs of `gpu_memory` GiB."""

    world_size: int
    gpu_memory: float

    @property
    def usable(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return USABLE * self.gpu_memory * 2**30

    def verdict(self, fits: bool) -> str:
        """In words."""
        return f"{'fits' if fits else 'DOES NOT FIT'} into {self.gpu_memory:.3g} GiB"


def resolve_machine(world_size: int | None, gpu_memory: float | None) -> Machine:
    """What the user says, else the GPUs of this machine, else one of 80 GiB.

    Raises:
        ConfigError: a number that is not positive.
    """
    for option, value in (("--world-size", world_size), ("--gpu-memory", gpu_memory)):
        if value is not None and value <= 0:
            raise ConfigError(f"{option} {value}: give a positive number")
    if gpu_memory is None:
        gpu_memory = 80.0
        if torch.cuda.is_available():
            gpu_memory = gib(torch.cuda.get_device_properties(0).total_memory)
    world_size = world_size or max(1, torch.cuda.device_count())
    return Machine(world_size, gpu_memory)


def rehearse(config: RunConfig, data: Any, machine: Machine, *, search: bool) -> Iterator[str]:
    """The dry run, text by text as it becomes known; with `search` the largest micro-batch too.

    `data` is a `data.preview.Preview`.

    Raises:
        ConfigError: the run would not start either. DataError: its data would not.
    """
    kwargs = config.model.kwargs
    known = kwargs.get("num_classes") if data.num_classes is None else data.num_classes
    num_classes = ASSUMED_CLASSES if known is None else known
    kwargs.setdefault("num_classes", num_classes * config.objective.classifies)
    # Of the data: what is built below goes by the model's.
    check_labels(config.objective, num_classes)
    check_num_classes(config.model, num_classes * config.objective.classifies)
    ranks = counted(machine.world_size, "rank")
    yield f"{config.name}: {config.model.name} on {ranks} (nothing is started)"
    if data.missing:
        text = f"data         cannot be read yet, so a start would be refused: {data.missing}"
        if known is None and config.objective.classifies:
            text += f"\ndata         {num_classes} classes are assumed"
            text += "; model.kwargs.num_classes says others"
        yield text
    else:
        options = {"seed": config.seed, "global_batch_size": config.train.batch_size}
        options |= {"pairs": bool(config.loss.mixup or config.loss.cutmix)} | image_format(config)
        options |= {"num_classes": kwargs["num_classes"]}
        for line in data.describe(world_size=machine.world_size, **options):
            yield f"data         {line}"
    yield describe_step(config, machine, data)
    if search:
        yield find_batch(config, machine)


def check_the_rest(config: RunConfig, rehearsal: MemoryRehearsal, data: Any) -> None:
    """Build what a run builds beside its engine, for the mistakes that are found there.

    Raises:
        ConfigError: a schedule or an evaluator that this run cannot have.
    """
    samples = data.samples_per_epoch or (
        # Shares of a run in epochs are the same with any data; in steps, short ones might do.
        ASSUMED_SAMPLES if config.train.epochs else config.train.batch_size
    )
    engine = rehearsal.engine
    build_schedules(config, engine, rehearsal.average, samples)
    unread: Any = object()  # evaluators read their images later
    loaders = EvalLoaders(unread, unread) if data.evaluates else None
    evaluators = build_run_evaluators(config, engine.objective, loaders, samples)
    build_retention(config, engine.objective, evaluators)
    if config.checkpoint.mirror is not None:
        Bucket(config.checkpoint.mirror)


def describe_step(config: RunConfig, machine: Machine, data: Any) -> str:
    """Parameters, FLOPs, and the memory of one GPU."""
    world_size = machine.world_size
    size, accumulation = split_batch(
        config.train.batch_size, config.train.micro_batch_size, world_size
    )
    native_config(config, world_size, 0)  # what is rehearsed below leaves the batch keys out
    chosen = config.train.checkpointing
    routed = dict.fromkeys([*POLICIES.values(), chosen])
    with rehearse_memory(with_micro_batch(config, size, world_size), world_size) as rehearsal:
        check_the_rest(config, rehearsal, data)
        memory = rehearsal.measure(size)
    compute = measure_compute(config, world_size, tuple(routed))
    batch = f"{counted(config.train.batch_size, 'image')} = {counted(world_size, 'rank')} x {size}"
    batch += f" x {accumulation} accumulated" if accumulation > 1 else ""
    factor = max(scheduled(config.capacity))
    recomputed = " with what is recomputed" if chosen[0] != "none" else ""
    teacher = ", with its teacher" if config.objective.name == "distill" else ""
    lines = [
        f"parameters   {compute.num_parameters:,}",
        f"compute      {_gflops(compute.forward_flops)} an image forward in training, "
        f"{_gflops(compute.training_flops)} in all{recomputed}{teacher}",
        f"batch        {batch}",
        *([f"capacity     factor {float(factor):g} of the schedule, its largest"] * (factor > 1)),
        "",
        *_table(config, compute, memory, size, machine),
        "",
        _policies(compute),
    ]
    return "\n".join(lines)


def find_batch(config: RunConfig, machine: Machine) -> str:
    """The largest micro-batch that fits and divides the global batch."""
    world_size = machine.world_size
    share, _ = split_batch(config.train.batch_size, None, world_size)
    pairs = config.loss.mixup or config.loss.cutmix  # images are mixed in pairs
    sizes = [n for n in range(1, share + 1) if share % n == 0 and not (pairs and n % 2)]
    peaks: dict[int, int] = {}
    # The whole share at once needs no accumulation, which can take less memory than the others.
    for candidates in (sizes[-1:], sizes[:-1]):
        if not candidates or any(peak <= machine.usable for peak in peaks.values()):
            continue
        rehearsed = with_micro_batch(config, candidates[0], world_size)
        with rehearse_memory(rehearsed, world_size) as rehearsal:
            while candidates:
                middle = (len(candidates) - 1) // 2
                size = candidates[middle]
                peaks[size] = rehearsal.measure(size).peak
                fits = peaks[size] <= machine.usable
                candidates = candidates[middle + 1 :] if fits else candidates[:middle]
    tried = ", ".join(f"{size}: {readable(peak)}" for size, peak in sorted(peaks.items()))
    fitting = [size for size, peak in peaks.items() if peak <= machine.usable]
    if not fitting:
        return (
            f"no micro-batch {machine.verdict(True)} ({tried}); raise "
            'deepspeed.zero_optimization.stage, set train.grad_checkpointing = "block", or offload'
        )
    return (
        f"largest micro-batch: --set train.micro_batch_size={max(fitting)} {machine.verdict(True)} "
        f"({tried}; a tenth is left for CUDA, NCCL and fragmentation)"
    )


def with_micro_batch(config: RunConfig, size: int, world_size: int) -> RunConfig:
    """The run with micro-batches of `size`; accumulating twice stands for more often."""
    share, _ = split_batch(config.train.batch_size, None, world_size)
    batch_size = size * world_size * min(2, share // size)
    changed = {"batch_size": batch_size, "micro_batch_size": size}
    native = {key: value for key, value in config.deepspeed.items() if key not in BATCH_KEYS}
    return config.model_copy(
        update={"train": config.train.model_copy(update=changed), "deepspeed": native}
    )


def _table(
    config: RunConfig, compute: Compute, memory: Memory, size: int, machine: Machine
) -> list[str]:
    """The memory of one GPU, one row per kind."""
    dtype = "fp32" if config.precision.autocast else config.precision.dtype
    fits = memory.peak <= machine.usable
    stage = zero_stage(config.deepspeed)
    share = [", this rank's share" if stage >= least else ", whole" for least in range(4)]
    rows = [
        ("weights", memory.weights, dtype + share[3]),
        ("gathered weights", memory.gathered, "of other ranks, after a forward pass"),
        ("master weights", memory.master, "fp32" + share[1]),
        ("optimiser state", memory.state, config.optim.name + share[1]),
        ("gradients", memory.gradients, "with communication buffers"),
        ("activations", compute.activations[config.train.checkpointing], f"batch of {size}"),
        ("peak", memory.peak, "everything, temporaries too: " + machine.verdict(fits)),
        ("on the host", memory.host, "offloaded, per rank"),
        ("to be saved", memory.saved * config.checkpoint.in_background, "on the host, per rank"),
    ]
    return [
        f"memory of each GPU under ZeRO-{stage}, each row where it is largest",
        *(f"  {name:<18}{readable(value):>11}   {note}" for name, value, note in rows if value),
    ]


def _policies(compute: Compute) -> str:
    """Activations under every checkpointing policy that the model knows."""
    known = {name: policy for name, policy in POLICIES.items() if policy in compute.activations}
    listed = ", ".join(f"{name} {readable(compute.activations[p])}" for name, p in known.items())
    return f"activations by train.grad_checkpointing: {listed}"


def _gflops(flops: float) -> str:
    return f"{flops / 1e9:,.3g} GFLOPs" if flops < 1e11 else f"{flops / 1e9:,.0f} GFLOPs"
