"""DeepSpeed's own keys: what we own is filled in, and every contradiction names both sides."""

import pytest

from routedvit.training.config.native import resolve_native_config, split_batch
from routedvit.training.config.native_keys import REFUSED_VALUES
from routedvit.training.config.run import ConfigError


def resolve(user, **changes):
    owned = {
        "batch_size": 64, "micro_batch_size": 8, "world_size": 4, "grad_clip": 1.0,
        "dtype": "fp32", "num_parameters": 80_000_000,
    }  # fmt: skip
    return resolve_native_config(user, **(owned | changes))


def test_owned_values_are_filled_in():
    native = resolve({"zero_optimization": {"stage": 2}})
    assert native["train_batch_size"] == 64
    assert native["train_micro_batch_size_per_gpu"] == 8
    assert native["gradient_accumulation_steps"] == 2
    assert native["gradient_clipping"] == 1.0
    assert "bf16" not in native


def test_no_clipping_is_written_out_because_deepspeed_clips_by_default():
    assert resolve({}, grad_clip=None)["gradient_clipping"] == 0.0


def test_the_users_dict_is_left_alone():
    user = {"zero_optimization": {"stage": 1}}
    resolve(user, dtype="bf16")
    assert user == {"zero_optimization": {"stage": 1}}


def test_native_keys_pass_verbatim_and_win_over_our_defaults():
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 7}
    native = resolve({"zero_optimization": zero, "wall_clock_breakdown": True})
    assert native["zero_optimization"].items() >= zero.items()
    assert native["wall_clock_breakdown"] is True


def test_buckets_follow_the_size_of_the_model():
    assert (
        resolve({"zero_optimization": {"stage": 1}})["zero_optimization"]["reduce_bucket_size"]
        == 10_000_000
    )


def test_buckets_are_even_as_deepspeed_demands():
    zero = resolve({"zero_optimization": {"stage": 1}}, num_parameters=80_000_009)
    assert zero["zero_optimization"]["allgather_bucket_size"] % 2 == 0


def test_autocast_keeps_weights_and_communication_in_fp32():
    native = resolve({}, dtype="bf16", autocast=True)
    assert "bf16" not in native
    assert native["torch_autocast"]["enabled"] is True
    assert native["torch_autocast"]["lower_precision_safe_modules"] == []


def test_offload_takes_torchs_optimiser():
    native = resolve({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert native["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("block", ["bf16", "fp16"])
def test_precision_switches_its_block_on(block):
    native = resolve({"zero_optimization": {"stage": 1}}, dtype=block)
    assert native[block]["enabled"] is True
    assert native["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("user", "changes", "names"),
    [
        ({"train_batch_size": 32}, {}, ("deepspeed.train_batch_size", "train.batch_size")),
        (
            {"train_micro_batch_size_per_gpu": 4},
            {},
            ("deepspeed.train_micro_batch_size_per_gpu", "train.micro_batch_size"),
        ),
        ({"gradient_clipping": 0.5}, {}, ("deepspeed.gradient_clipping", "train.grad_clip")),
        ({"bf16": {"enabled": True}}, {}, ("deepspeed.bf16.enabled", "precision.dtype")),
        ({"bfloat16": {"enabled": True}}, {}, ("deepspeed.bf16.enabled", "precision.dtype")),
        (
            {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}},
            {"dtype": "bf16"},
            ("deepspeed.bf16.enabled", "precision.dtype"),
        ),
        (
            {"zero_optimization": {"stage": 0}},
            {"dtype": "bf16"},
            ("precision.dtype", "deepspeed.zero_optimization.stage"),
        ),
        (
            {"torch_autocast": {"enabled": True}},
            {},
            ("deepspeed.torch_autocast.enabled", "precision.autocast"),
        ),
        (
            {"torch_autocast": {"dtype": "float16"}},
            {"dtype": "bf16", "autocast": True},
            ("deepspeed.torch_autocast.dtype", "precision.dtype"),
        ),
        ({"optimizer": {"type": "AdamW"}}, {}, ("deepspeed.optimizer", "'optim'")),
        ({"scheduler": {}}, {}, ("deepspeed.scheduler", "'schedule'")),
        ({"zero_optimisation": {}}, {}, ("deepspeed.zero_optimisation", "'zero_optimization'")),
        ({"elasticity": {"enabled": False}}, {}, ("deepspeed.elasticity", "removed")),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            {},
            ("deepspeed.zero_optimization.reduce_bucket_size", "auto"),
        ),
    ],
)
def test_a_contradiction_names_both_keys(user, changes, names):
    with pytest.raises(ConfigError) as caught:
        resolve(user, **changes)
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["two", "2", 4, 5, -1, 2.0, True, None, [2], {"is": 2}])
def test_a_stage_that_is_none_is_refused_with_those_there_are(stage):
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage = .* write 0 .* or 3"):
        resolve({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize(
    ("path", "user"),
    [
        ("zero_optimization", {"zero_optimization": 2}),
        ("zero_optimization", {"zero_optimization": None}),
        (
            "zero_optimization.offload_optimizer",
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
        ),
        ("bf16", {"bf16": True}),
        ("torch_autocast", {"torch_autocast": False}),
        ("timers", {"timers": 1}),
        ("timers.throughput", {"timers": {"throughput": True}}),
    ],
)
def test_a_value_in_place_of_a_block_is_refused(path, user):
    with pytest.raises(ConfigError, match=rf"deepspeed\.{path} = .* no object .* or delete it"):
        resolve(user)


def test_an_offload_of_nothing_may_be_null():
    zero = {"stage": 2, "offload_optimizer": None}
    native = resolve({"zero_optimization": zero})
    assert native["zero_optimization"]["offload_optimizer"] is None


def test_repeating_an_owned_value_is_fine():
    assert resolve({"train_batch_size": 64})["train_batch_size"] == 64


def test_a_batch_is_split_into_micro_batches_and_accumulation():
    assert split_batch(64, 8, 4) == (8, 2)
    assert split_batch(64, None, 4) == (16, 1)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "mend"),
    [(64, None, 3, "63 or 66"), (64, 6, 2, "use 4"), (2, None, 4, "use 4")],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch, micro, world, mend):
    with pytest.raises(ConfigError, match=mend):
        split_batch(batch, micro, world)


@pytest.mark.parametrize("path", REFUSED_VALUES)
def test_what_would_do_harm_or_nothing_is_refused_with_the_reason(path):
    harmful = {
        "zero_optimization.compute_grad_norm": False,
        "bf16.check_grad_overflow": False,
        "fp16.loss_scale": 4096,
        "zero_optimization.offload_optimizer.ratio": 0.5,
        "gradient_allreduce_op": "sum",
        "gradient_predivide_factor": 0,
    }
    user = harmful.get(path, True)
    for name in reversed(path.split(".")):
        user = {name: user}
    user.setdefault("zero_optimization", {})["stage"] = 3
    with pytest.raises(ConfigError, match=rf"deepspeed\.{path} = .*: .*; delete it"):
        resolve(user)


@pytest.mark.parametrize(
    "user",
    [
        {"zero_optimization": {"stage": 2, "compute_grad_norm": True, "cpu_offload": False}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}},
        {"compile": {"deepcompile": False}, "zero_optimization": {"offload_optimizer": None}},
        {"fp16": {"loss_scale": 0}, "checkpoint": {"tag_validation": "Fail"}},
        {"gradient_allreduce_op": "mean", "prescale_gradients": True},
        {"zero_optimization": {"stage": 1}, "gradient_predivide_factor": 4},
        {"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 1.0},
    ],
)
def test_values_that_do_no_harm_pass(user):
    assert resolve(user)


def test_stage_3_takes_no_factor_that_gradients_would_be_divided_by_twice():
    zero = {"stage": 3, "reduce_scatter": False}
    with pytest.raises(ConfigError, match=r"deepspeed\.gradient_predivide_factor = 4: under ZeRO"):
        resolve({"zero_optimization": zero, "gradient_predivide_factor": 4})


@pytest.mark.parametrize("op", ["sum", "SUM", None])
def test_gradients_are_averaged_so_that_the_update_knows_no_number_of_ranks(op):
    with pytest.raises(ConfigError, match=r"deepspeed\.gradient_allreduce_op = .* delete it"):
        resolve({"gradient_allreduce_op": op})
