"""Counted FLOPs are those of torch's counter."""

import pytest
import timm
import torch
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import routedvit  # noqa: F401

CASES = [
    {},
    {"img_size": (96, 160), "rope": True, "kv_routes": 2, "mlp_layer": "swiglu"},
    {"img_size": 112, "global_pool": "map", "dense_blocks": 2},
    {"class_token": False, "reg_tokens": 0, "heavy_window": True, "light_window": 5},
    {"null_kv": True, "global_pool": "prr", "num_classes": 0},
    {"light_heads": 0, "light_mlp_ratio": 0, "q_capacity": 0.1, "ffn_capacity": 1.0},
    {"router": "all_light"},
    {"img_size": 64, "global_pool": "", "num_classes": 500},  # a head on every token
]


counts_attention = pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="this torch does not count attention on a CPU",
)


@counts_attention
@pytest.mark.parametrize("kwargs", CASES)
def test_count_agrees_with_torchs_counter(kwargs):
    model = timm.create_model("colt5_vit_test", **kwargs).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *model.patch_embed.img_size))
    assert model.flops().total == counter.get_total_flops()


def test_parts_add_up_and_other_sizes_can_be_asked_for():
    model = timm.create_model("colt5_vit_test", dynamic_img_size=True)
    flops = model.flops()
    assert flops.total == sum(block.total for block in flops.blocks) + flops.other
    bare = timm.create_model("colt5_vit_test", light_heads=0, light_mlp_ratio=0).flops()
    assert (bare.light, bare.heavy, bare.router) == (0, flops.heavy, flops.router)
    assert flops.light > 0 < flops.router
    larger = timm.create_model("colt5_vit_test", img_size=320)
    assert model.flops(320) == larger.flops()


@counts_attention
def test_training_counts_what_efficient_drop_path_computes():
    rate = {"drop_path_rate": 0.5, "efficient_drop_path": True}
    model = timm.create_model("colt5_vit_test", depth=3, dense_blocks=1, **rate).train()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, 3, *model.patch_embed.img_size))  # keeps 4, 3 and 2 images
    training = model.flops(training=True).total
    assert training == counter.get_total_flops() / 4
    assert model.flops().total > 1.1 * training
    plain = timm.create_model("colt5_vit_test", depth=3, dense_blocks=1, drop_path_rate=0.5)
    assert plain.flops(training=True) == plain.flops() == model.flops()


def test_scores_of_routers_that_take_all_are_not_counted():
    """They are not computed either."""
    model = timm.create_model("colt5_vit_test")
    share = model.flops().router
    model.set_capacity(ffn=1)
    assert model.flops().router == pytest.approx(share * 2 / 3)
    model.set_capacity(1)
    assert model.flops().router == 0


def test_weights_under_another_name_are_counted_too():
    """torch's pruning and parametrisations keep them elsewhere."""
    model = timm.create_model("colt5_vit_test", depth=1)
    flops = model.flops()
    prune.l1_unstructured(model.blocks[0].attn.heavy.kv, "weight", 0.5)
    parametrizations.weight_norm(model.blocks[0].mlp.light.fc1)
    prune.l1_unstructured(model.patch_embed.proj, "weight", 0.5)
    assert model.flops() == flops


def test_dense_twin_costs_what_timms_model_costs():
    with torch.device("meta"):
        twin = timm.create_model("colt5_vit_ti", dense_blocks=12, reg_tokens=0, class_token=True)
        dense = timm.create_model("vit_tiny_patch16_224", global_pool="avg")
        with FlopCounterMode(display=False) as counter:
            dense(torch.zeros(1, 3, 224, 224))
    assert twin.flops().total == counter.get_total_flops()


def test_base_model_spends_about_half_of_its_dense_twin():
    with torch.device("meta"):
        routed = timm.create_model("colt5_vit_b")
        twin = timm.create_model("colt5_vit_b", dense_blocks=12)
    assert 0.4 < routed.flops().total / twin.flops().total < 0.5
