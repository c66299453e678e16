"""Which of DeepSpeed's own keys a run may give, and the reason why not.

DeepSpeed ignores an unknown top-level key without a word (a typo in `zero_optimization` trains at
stage 0), and so it does with several known ones that this trainer never reaches. Here each is an
error that names the key and the mend, before anything is built. Other keys inside the blocks are
checked by DeepSpeed itself when the engine starts (engine/native_check.py).
"""

import json
from collections.abc import Callable
from typing import Any

from routedvit.training.config.mistakes import nearest
from routedvit.training.config.run import ConfigError

# Top-level keys that DeepSpeed 0.19 reads and that may be given.
NATIVE_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "steps_per_print", "dump_state", "disable_python_gc", "disable_allgather",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "gradient_allreduce_op", "zero_optimization", "comms_logger", "tensorboard", "wandb",
    "csv_monitor", "comet", "gradient_clipping", "fp16", "bf16", "bfloat16", "torch_autocast",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "flops_profiler",
    "wall_clock_breakdown", "memory_breakdown", "checkpoint", "data_types", "aio", "log_level",
    "compile", "timers",
)  # fmt: skip

# Keys that DeepSpeed reads but that would work against this trainer, and what to use instead.
REFUSED_KEYS = {
    "optimizer": "the optimiser is configured in the section 'optim'",
    "scheduler": "the learning rate is configured in the section 'schedule'",
    "activation_checkpointing": "it does nothing by itself; set train.grad_checkpointing",
    "managed_gradient_accumulation": "the trainer relies on DeepSpeed counting the micro-batches",
    "dataloader_drop_last": "the loader is configured in the section 'data'",
    "data_efficiency": "the loader is configured in the section 'data'",
    "datastates_ckpt": "checkpoints are configured in the section 'checkpoint'",
    "autotuning": "it starts runs of its own; choose the values by hand",
    "weight_quantization": "it is for inference; this trainer does not use it",
    "hybrid_engine": "it is for text generation; this trainer does not use it",
    "pipeline": "this trainer is data-parallel only",
    "tensor_parallel": "this trainer is data-parallel only",
    "expert_parallel": "this trainer is data-parallel only",
    "use_data_before_expert_parallelism": "this trainer is data-parallel only",
    "sequence_parallel_size": "this trainer is data-parallel only",
    "seq_parallel_communication_data_type": "this trainer is data-parallel only",
    "data_parallel_size": "this trainer is data-parallel only",
    "vocabulary_size": "it is for language models",
}

# Removed from DeepSpeed by 0.19, which raises on them even when they are switched off.
REMOVED_KEYS = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity",
    "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training",
    "sparse_attention", "sparse_gradients",
)  # fmt: skip

# Blocks that are read or completed here, under which key.
BLOCKS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param",
    "bf16", "bfloat16", "fp16", "torch_autocast", "data_types", "checkpoint", "timers",
    "timers.throughput", "compile",
)  # fmt: skip


def _is_on(value: Any) -> bool:
    return value not in (False, None)


def _is_anything(value: Any) -> bool:
    return True


def _is_not_mean(value: Any) -> bool:
    return not (isinstance(value, str) and value.lower() == "mean")  # DeepSpeed reads "Mean" too


def _divides_by_nothing(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float) or value <= 0


_CHECKPOINTS = "the trainer writes checkpoints by itself, see the section 'checkpoint'"
_EXTENSION = "it needs an extension that DeepSpeed would compile, and this trainer compiles none"
_OLD_OFFLOAD = 'an older name; write zero_optimization.{} = {{"device": "cpu"}}'

# Keys inside blocks, which of their values do harm or nothing, and why.
REFUSED_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "zero_optimization.round_robin_gradients": (
        _is_on,
        "DeepSpeed 0.19 then takes one parameter's master weights for another's when they are "
        "exported",
    ),
    "zero_optimization.compute_grad_norm": (
        lambda value: value is False,
        "steps that are not finite are found by the norm, and would be applied without it",
    ),
    "zero_optimization.cpu_offload": (_is_on, _OLD_OFFLOAD.format("offload_optimizer")),
    "zero_optimization.cpu_offload_param": (_is_on, _OLD_OFFLOAD.format("offload_param")),
    "zero_optimization.zenflow": (_is_on, _EXTENSION),
    "zero_optimization.zero_quantized_weights": (_is_on, _EXTENSION),
    "zero_optimization.zero_quantized_gradients": (_is_on, _EXTENSION),
    "zero_optimization.zero_quantized_nontrainable_weights": (_is_on, _EXTENSION),
    "zero_optimization.offload_optimizer.ratio": (lambda value: value != 1, _EXTENSION),
    "bf16.check_grad_overflow": (
        lambda value: value is False,
        "steps that are not finite would be applied",
    ),
    "fp16.loss_scale": (
        lambda value: value != 0,
        "a scale that never moves would skip every step from the first overflow on; 0 lets "
        "DeepSpeed find it (see initial_scale_power)",
    ),
    "checkpoint.writer": (_is_anything, _CHECKPOINTS),
    "checkpoint.load_universal": (_is_on, _CHECKPOINTS + " and reads them on any number of ranks"),
    "checkpoint.use_node_local_storage": (_is_on, _CHECKPOINTS),
    "checkpoint.parallel_write": (_is_anything, _CHECKPOINTS),
    "compile.deepcompile": (_is_on, "it would do nothing here; set train.compile"),
    "aio": (
        _is_anything,
        "it is for offload to NVMe, which needs an extension that DeepSpeed "
        "would compile, and this trainer compiles none",
    ),
    "disable_allgather": (_is_on, "DeepSpeed 0.19 reads it and does nothing with it"),
    "zero_force_ds_cpu_optimizer": (_is_on, _EXTENSION),
    "gradient_allreduce_op": (
        _is_not_mean,
        "the update would depend on the number of ranks; gradients are averaged",
    ),
    "gradient_predivide_factor": (_divides_by_nothing, "gradients are divided by it"),
}


def check_keys(user: dict[str, Any]) -> None:
    """Refuse top-level keys that are unknown, removed or not ours to pass on, and any "auto"."""
    for key in user:
        if key in REMOVED_KEYS:
            raise ConfigError(f"deepspeed.{key} was removed from DeepSpeed 0.19; delete it")
        if key in REFUSED_KEYS:
            raise ConfigError(f"deepspeed.{key}: {REFUSED_KEYS[key]}; delete it")
        if key not in NATIVE_KEYS:
            raise ConfigError(f"unknown DeepSpeed key 'deepspeed.{key}'{nearest(key, NATIVE_KEYS)}")
    _refuse_auto(user, "deepspeed")


def check_blocks(user: dict[str, Any]) -> None:
    """Refuse a value where DeepSpeed has an object of keys, and a ZeRO stage that is none."""
    for path in BLOCKS:
        *outer, key = path.split(".")
        parent = user.get(outer[0], {}) if outer else user
        block = parent.get(key, {})
        if block is None and outer == ["zero_optimization"]:  # DeepSpeed's way to offload nothing
            continue
        if not isinstance(block, dict):
            example = "stage" if key == "zero_optimization" else "KEY"
            raise ConfigError(
                f"deepspeed.{path} = {json.dumps(block)} is no object of keys; write "
                f"deepspeed.{path}.{example} = ..., or delete it"
            )
    stage = user.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        raise ConfigError(
            f"deepspeed.zero_optimization.stage = {json.dumps(stage)} is no ZeRO stage; write 0 "
            "(nothing is sharded), 1 (optimiser state), 2 (and gradients) or 3 (and weights)"
        )


def _refuse_auto(value: Any, path: str) -> None:
    if value == "auto":
        raise ConfigError(
            f'{path} = "auto": only Hugging Face trainers resolve it; write a value or delete it'
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_auto(inner, f"{path}.{key}")


def check_values(user: dict[str, Any]) -> None:
    """Refuse the values of `REFUSED_VALUES`, and one that is wrong under stage 3 alone."""
    for path, (harms, reason) in REFUSED_VALUES.items():
        *outer, key = path.split(".")
        block: Any = user
        for name in outer:
            block = block.get(name) or {}
        if key in block and harms(block[key]):
            raise ConfigError(f"deepspeed.{path} = {json.dumps(block[key])}: {reason}; delete it")
    factor = user.get("gradient_predivide_factor", 1)
    if factor != 1 and user.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"deepspeed.gradient_predivide_factor = {json.dumps(factor)}: under ZeRO stage 3 "
            "DeepSpeed 0.19 refuses it or, without reduce_scatter and where it is the number of "
            "ranks, divides gradients by them twice; delete it"
        )
