"""The `deepspeed` section: native keys as the user wrote them, completed with what the run owns.

DeepSpeed lets batch sizes and precision be given twice. Here every contradiction is an error that
names both keys and the mend, before anything is built; which keys may be given at all stands in
native_keys.py. Nothing here imports deepspeed.
"""

import copy
from typing import Any

from routedvit.training.config.base import ConfigError, counted
from routedvit.training.config.native_keys import check_blocks, check_keys, check_values

PRECISIONS = {"fp32": None, "bf16": "bf16", "fp16": "fp16"}
MAX_BUCKET = 500_000_000  # elements: DeepSpeed's own default, larger than most ViTs


def split_batch(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """(micro-batch, gradient accumulation steps) that make the global batch over `world_size`.

    Raises:
        ConfigError: the batch does not divide; names both fields and the nearest ones that do.
    """
    ranks = counted(world_size, "rank")
    if batch_size % world_size:
        lower = batch_size // world_size * world_size
        near = " or ".join(str(size) for size in (lower, lower + world_size) if size)
        raise ConfigError(
            f"train.batch_size = {batch_size} does not divide over {ranks}; use {near}, or a "
            "number of ranks that divides it and data.streams"
        )
    share = batch_size // world_size
    micro = micro_batch_size or share
    if share % micro:
        divisors = [size for size in range(1, share + 1) if share % size == 0]
        closest = min(divisors, key=lambda size: abs(size - micro))
        raise ConfigError(
            f"train.micro_batch_size = {micro} does not divide the {share} images that "
            f"train.batch_size = {batch_size} gives each of {ranks}; use {closest}"
        )
    return micro, share // micro


def resolve_native_config(
    user: dict[str, Any],
    *,
    batch_size: int,
    micro_batch_size: int,
    world_size: int,
    grad_clip: float | None,
    dtype: str,
    num_parameters: int,
    autocast: bool = False,
) -> dict[str, Any]:
    """The complete dict for `deepspeed.initialize`; `user` is not changed.

    `batch_size`, `micro_batch_size` and `grad_clip` come from the section `train`, `dtype` ('fp32',
    'bf16', 'fp16') and `autocast` from `precision`; `num_parameters` sizes the communication
    buckets.

    Raises:
        ConfigError: an unknown, removed or refused key, "auto", a block that is no object, a stage
            that is none, or a contradiction.
    """
    check_keys(user)
    check_blocks(user)
    check_values(user)
    native = copy.deepcopy(user)
    accumulation = batch_size // (micro_batch_size * world_size)
    _own(native, "train_batch_size", batch_size, "train.batch_size")
    _own(native, "train_micro_batch_size_per_gpu", micro_batch_size, "train.micro_batch_size")
    _own(native, "gradient_accumulation_steps", accumulation, "train.batch_size")
    _own(native, "gradient_clipping", grad_clip or 0.0, "train.grad_clip")
    _own_autocast(native, autocast)
    _own_precision(native, "fp32" if autocast else dtype)
    _fill_defaults(native, num_parameters)
    _check_offload(native)
    return native


def zero_stage(native: dict[str, Any]) -> int:
    """The ZeRO stage that a native dict asks for; DeepSpeed's default is 0."""
    stage: int = native.get("zero_optimization", {}).get("stage", 0)
    return stage


def _own(native: dict[str, Any], key: str, value: Any, owner: str) -> None:
    """Fill in a value that `owner` decides; the user may repeat it but not contradict it."""
    given = native.setdefault(key, value)
    if given != value:
        raise ConfigError(
            f"deepspeed.{key} = {given} contradicts {owner}, which makes it {value}; "
            "delete the first"
        )


def _own_autocast(native: dict[str, Any], autocast: bool) -> None:
    """Switch on DeepSpeed's block for autocast to bf16.

    By default DeepSpeed would then also communicate the gradients of linear layers and convolutions
    in bf16; an empty list of modules keeps the sums over ranks in fp32.
    """
    given = native.get("torch_autocast", {}).get("enabled")
    if given is not None and given != autocast:
        raise ConfigError(
            f"deepspeed.torch_autocast.enabled = {str(given).lower()} contradicts "
            f"precision.autocast = {str(autocast).lower()}; delete the first"
        )
    if not autocast:
        return
    block = native.setdefault("torch_autocast", {})
    block["enabled"] = True
    dtype = block.setdefault("dtype", "bfloat16")
    if dtype not in ("bfloat16", "bf16"):
        raise ConfigError(
            f"deepspeed.torch_autocast.dtype = {dtype} contradicts precision.dtype = bf16; delete "
            "the first"
        )
    block.setdefault("lower_precision_safe_modules", [])


def _own_precision(native: dict[str, Any], dtype: str) -> None:
    """Switch on the block of `dtype` and refuse the other's."""
    wanted = PRECISIONS[dtype]
    if "bfloat16" in native:  # DeepSpeed's older name of the same block
        native["bf16"] = native.pop("bfloat16")
    for block in ("bf16", "fp16"):
        given = native.get(block, {}).get("enabled")
        if given is not None and given != (block == wanted):
            raise ConfigError(
                f"deepspeed.{block}.enabled = {str(given).lower()} contradicts precision.dtype = "
                f"{dtype}; delete the first"
            )
        if block == wanted:
            native.setdefault(block, {})["enabled"] = True
    if wanted and zero_stage(native) == 0:
        raise ConfigError(
            f"precision.dtype = {dtype} with deepspeed.zero_optimization.stage = 0 accumulates "
            f"gradients in {dtype}; use stage 1, 2 or 3 (on one rank too)"
            + (", or precision.autocast = true" if dtype == "bf16" else "")
        )


def _fill_defaults(native: dict[str, Any], num_parameters: int) -> None:
    """Explicit values where DeepSpeed's defaults are slow, noisy or change between versions."""
    native.setdefault("steps_per_print", 10**9)
    # It synchronises the device twice per micro-batch; the trainer measures by itself.
    native.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    # Accumulating in bf16 loses small gradients, and would be DeepSpeed's default.
    native.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if native.get("bf16", {}).get("enabled"):
        # Likewise the sums over ranks, whose rounding would grow with their number.
        native.setdefault("communication_data_type", "fp32")
    native.setdefault("checkpoint", {}).setdefault("tag_validation", "Ignore")  # our tag is fixed
    native.setdefault("zero_allow_untested_optimizer", True)  # optim.py refuses wrong ones
    zero = native.get("zero_optimization")
    if not zero:
        return
    stage = zero_stage(native)
    if stage <= 2:
        zero.setdefault("overlap_comm", False)  # with torch.compile it has produced NaNs (#8061)
    # The default of 5e8 elements is allocated whole and, larger than the model, overlaps nothing.
    bucket = min(MAX_BUCKET, max(1_000_000, num_parameters // 16 * 2))  # it must be even
    zero.setdefault("reduce_bucket_size", bucket)
    if stage <= 2:
        zero.setdefault("allgather_bucket_size", bucket)
    if _offloads(zero, "offload_optimizer"):
        native.setdefault("zero_force_ds_cpu_optimizer", False)  # theirs would be compiled


def _offloads(zero: dict[str, Any], block: str) -> bool:
    return (zero.get(block) or {}).get("device", "none") != "none"


def _check_offload(native: dict[str, Any]) -> None:
    """Refuse what DeepSpeed would ignore, or could only do with an extension it has to compile."""
    zero, stage = native.get("zero_optimization", {}), zero_stage(native)
    for block, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        where = f"deepspeed.zero_optimization.{block}"
        if not _offloads(zero, block):
            continue
        if stage < lowest:
            raise ConfigError(f"{where} needs zero_optimization.stage = {lowest} or more: {stage}")
        for key, value in (("device", "nvme"), ("super_offload", True)):
            if zero[block].get(key) == value:
                raise ConfigError(
                    f"{where}.{key} = {str(value).lower()} needs an extension that DeepSpeed would "
                    'compile, and this trainer compiles none; use "device": "cpu" alone'
                )
