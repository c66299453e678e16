"""The routed vision transformer: what it promises about images, tokens and its arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_model_args, group_parameters, save_for_hf
from timm.models._features_fx import create_feature_extractor, get_graph_node_names
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor

import routedvit

OPTIONS = {
    "defaults": {},
    "no prefix": {"class_token": False, "reg_tokens": 0},
    "class token pool": {"global_pool": "token"},
    "map pool": {"global_pool": "map"},
    "rope, sincos": {"rope": True, "pos_embed": "sincos"},
    "rope alone": {"rope": True, "pos_embed": "none", "no_embed_class": True},
    "two kv routes": {"kv_routes": 2},
    "straight-through": {"router_kwargs": {"straight_through": True}},
    "coordinate descent": {"router_kwargs": {"solver": "coordinate_descent", "eps": 0.5}},
    "null token and key": {"null_token": True, "null_kv": True, "kv_gate": "values"},
    "separate norms, raw routers": {"separate_norms": True, "route_raw": True},
    "separate norms, dense first block": {"separate_norms": True, "dense_blocks": 1},
    "raw routers without light path": {
        "separate_norms": True,
        "route_raw": True,
        "light_heads": 0,
        "light_mlp_ratio": 0,
    },
    "RMSNorm, SwiGLU": {"norm_layer": "rmsnorm", "mlp_layer": "swiglu", "init_values": None},
    "dense first blocks": {"dense_blocks": 2},
    "no light path": {"light_heads": 0, "light_mlp_ratio": 0},
    "efficient drop-path": {"drop_path_rate": 0.5, "efficient_drop_path": True, "init_values": 0.1},
    "drop-path, dropout": {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    "capacity per block": {"q_capacity": [0.1, 0.5, "2/3"], "ffn_capacity": 1.0},
    "window attention only": {
        "class_token": False,
        "reg_tokens": 0,
        "heavy_window": True,
        "light_window": 2,
    },
    "random": {"router": "random"},
    "static": {"router": "static"},
    "all heavy": {"router": "all_heavy"},
    "all light": {"router": "all_light"},
    "all light, no prefix": {"router": "all_light", "class_token": False, "reg_tokens": 0},
    "dynamic": {"dynamic_img_size": True},
}


def create(name: str = "colt5_vit_test", **kwargs: object) -> routedvit.RoutedVisionTransformer:
    torch.manual_seed(0)
    defaults = {"img_size": (24, 32), "patch_size": 4, "num_classes": 5, "depth": 3}
    return timm.create_model(name, **{**defaults, **kwargs})


TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def images(batch: int = 3, height: int = 24, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains_every_parameter(kwargs, autocast):
    model = create(**kwargs).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images())
    logits.float().square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)
def test_every_option_treats_images_one_by_one(kwargs):
    model = create(**kwargs).eval()
    out = model(images())
    assert out.shape == (3, 5)
    torch.testing.assert_close(out, torch.cat([model(image[None]) for image in images()]))
    torch.testing.assert_close(model(images().flip(0)), out.flip(0))


def test_one_pixel_changes_the_whole_feature_map():
    """Heavy attention is global: that of colt5-attention never leaves its window."""
    model = create(class_token=False, reg_tokens=0).eval()
    x = images(1)
    y = x.clone()
    y[0, :, 0, 0] += 1
    moved = (model.forward_features(x) != model.forward_features(y)).any(-1)
    assert moved.float().mean() > 0.9


def test_duplicate_patches_do_not_confuse_the_routers():
    model = create(pos_embed="none")
    out = model(torch.zeros(2, 3, 24, 32))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [(4, 4), (4, 20), (8, 4)])
def test_grids_down_to_a_single_patch_work(size):
    model = create("colt5_vit_ti", img_size=size)
    out = model(images(2, *size))
    out.sum().backward()
    assert out.isfinite().all()


def test_capacity_one_without_light_path_is_timms_vision_transformer():
    ours = create(router="all_heavy", light_heads=0, light_mlp_ratio=0, init_values=None).eval()
    dense = VisionTransformer(
        img_size=(24, 32),
        patch_size=4,
        num_classes=5,
        embed_dim=64,
        depth=3,
        num_heads=4,
        qk_norm=True,
        reg_tokens=1,
        global_pool="avg",
    ).eval()
    state = ours.state_dict()
    for name in list(dense.state_dict()):
        renamed = name.replace("norm1", "attn.norm").replace("norm2", "mlp.norm")
        renamed = renamed.replace("mlp.fc", "mlp.heavy.fc")
        for part in ("proj", "q_norm", "k_norm"):
            renamed = renamed.replace(f"attn.{part}.", f"attn.heavy.{part}.")
        if "attn.qkv" not in name:
            dense.state_dict()[name].copy_(state[renamed])
            continue
        kind = name.rsplit(".", 1)[1]
        prefix = name.split("attn")[0] + "attn.heavy."
        k, v = state[f"{prefix}kv.{kind}"].unflatten(0, (4, 2, 16)).unbind(1)  # ordered by head
        parts = [state[f"{prefix}q.{kind}"], k.flatten(0, 1), v.flatten(0, 1)]
        dense.state_dict()[name].copy_(torch.cat(parts))
    torch.testing.assert_close(ours(images()), dense(images()), rtol=1e-5, atol=1e-5)


# --- routing ---------------------------------------------------------------------------------


def test_routing_tells_what_forward_did_and_changes_nothing():
    model = create(kv_routes=2).eval()
    before = model(images())
    routing = model.routing(images())
    assert list(routing)[:4] == ["blocks.0.q", "blocks.0.kv0", "blocks.0.kv1", "blocks.0.ffn"]
    assert len(routing) == 12
    for name, (indices, gates, logits, grid) in routing.items():
        k = 24 if ".kv" in name else 12
        assert grid == (6, 8)
        assert indices.shape == gates.shape == (3, k)
        assert logits.shape == (3, 48)
        assert indices.dtype == torch.int64
        assert gates.dtype == logits.dtype == torch.float32
        assert torch.equal(indices, logits.topk(k).indices.sort().values)
    assert torch.equal(model(images()), before)


def test_prefix_tokens_are_heavy_and_not_counted():
    model = create(reg_tokens=8, depth=1)
    indices = model.routing(images())["blocks.0.q"].indices
    assert indices.min() >= 0
    assert indices.max() < 48
    assert indices.shape[1] == 12


def test_default_window_follows_the_grid():
    model = create("colt5_vit_ti")  # 6 x 8 patches
    assert {block.attn.light.window for block in model.blocks} == {6}
    model.set_input_size((40, 64))
    assert {block.attn.light.window for block in model.blocks} == {7}
    assert model(images(2, 40, 64)).shape == (2, 5)


def test_routing_inside_windows_is_told_in_patches_of_the_image():
    model = create(class_token=False, reg_tokens=0, heavy_window=True, light_window=2)
    indices, gates, logits, grid = model.routing(images())["blocks.1.q"]
    assert grid == (6, 8)
    assert indices.shape == gates.shape == (3, 12)  # one of the four tokens of each window
    row, column = indices // 8, indices % 8
    assert ((row // 2 * 4 + column // 2).sort(1).values == torch.arange(12)).all()
    windows = logits.view(3, 3, 2, 4, 2).amax((2, 4)).flatten(1)
    chosen = torch.full_like(logits, -torch.inf).scatter(1, indices, logits.gather(1, indices))
    assert torch.equal(chosen.view(3, 3, 2, 4, 2).amax((2, 4)).flatten(1), windows)
    assert (indices.diff(dim=1) > 0).all()


def test_intermediate_layers_are_those_of_forward_intermediates():
    model = create().eval()
    final, maps = model.forward_intermediates(images(), indices=[0, 2])
    assert torch.equal(final, model.forward_features(images()))
    assert [m.shape for m in maps] == [(3, 64, 6, 8)] * 2
    (last,) = model.get_intermediate_layers(images(), n=1, reshape=True)
    assert torch.equal(last, maps[1])
    ((tokens, prefix),) = model.get_intermediate_layers(images(), n=1, return_prefix_tokens=True)
    assert tokens.shape == (3, 48, 64)
    assert prefix.shape == (3, 2, 64)
    out = model.forward_intermediates(images(), output_dict=True, return_prefix_tokens=True)
    assert set(out) == {"image_features", "image_intermediates", "image_intermediates_prefix"}


def test_set_capacity_changes_routing_and_flops_and_is_exported():
    model = create()
    before = model.flops().heavy
    model.set_capacity("1/12", kv=[0.1, 0.2, 0.3])
    routing = model.routing(images())
    assert [routing[f"blocks.{i}.kv0"].indices.shape[1] for i in range(3)] == [5, 10, 15]
    assert routing["blocks.2.ffn"].indices.shape[1] == 4
    assert model.flops().heavy < before
    arguments = json.loads(json.dumps(get_model_args(model)))
    again = timm.create_model("colt5_vit_test", **arguments)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(images()), model.eval()(images()))


# --- timm's contract, beyond timm's own suite ------------------------------------------------


def test_resolution_changes_without_new_weights():
    model = create(dynamic_img_size=True, rope=True).eval()
    assert model(images(2, 40, 20)).shape == (2, 5)
    assert model.routing(images(2, 40, 20))["blocks.0.q"].grid == (10, 5)
    fixed = create(rope=True).eval()
    fixed.set_input_size((40, 20))
    assert fixed(images(2, 40, 20)).shape == (2, 5)


def test_parameters_without_decay_exist_and_all_router_vectors_are_among_them():
    model = create(null_token=True, null_kv=True, kv_routes=2)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names
    assert all(name.endswith("weight") and "router" not in name for name in names)
    own = [name for name, _ in model.named_parameters() if "router" in name or "null" in name]
    assert len(own) == 3 * 5


def test_layer_decay_groups_put_routers_into_their_block():
    groups = group_parameters(create(), create().group_matcher(), reverse=True)
    assert groups["blocks.2.mlp.router.weight"] == groups["blocks.2.mlp.heavy.fc1.weight"]
    assert groups["blocks.0.mlp.router.weight"] != groups["blocks.2.mlp.router.weight"]


@pytest.mark.parametrize("kwargs", [{}, {"rope": True, "null_token": True, "null_kv": True}])
def test_meta_model_becomes_real_with_init_weights(kwargs):
    with torch.device("meta"):
        model = create(**kwargs)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    model.init_weights()
    assert all(t.isfinite().all() for t in (*model.parameters(), *model.buffers()))
    assert model(images()).isfinite().all()


def test_bfloat16_model_and_autocast_agree_with_float32():
    model = create().eval()
    exact = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images())
    low = model.bfloat16()(images().bfloat16())
    assert low.dtype == torch.bfloat16
    assert (mixed.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert (low.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_norm_that_nobody_reads_at_full_capacity_still_has_a_gradient():
    """Under ZeRO-3 a parameter without one would be given that of an earlier step."""
    model = create(separate_norms=True, light_heads=0, light_mlp_ratio=0).train()
    model.set_capacity(1)
    model(images()).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_fix_init_scales_what_deep_blocks_add():
    model = create(fix_init=True)
    first, last = (model.blocks[i].mlp.heavy.fc2.weight.std() for i in (0, 2))
    assert last < 0.7 * first


@pytest.mark.parametrize("policy", ["none", "heavy", "block"])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_policies_do_not_change_gradients(policy, every):
    model = create(drop_path_rate=0.2).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable, policy=policy, every=every)
        model.zero_grad()
        torch.manual_seed(3)
        model(images()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_long_names_are_the_same_models():
    for short, long in (("ti", "tiny"), ("s", "small"), ("b", "base"), ("l", "large")):
        with torch.device("meta"):
            a = timm.create_model(f"colt5_vit_{short}")
            b = timm.create_model(f"colt5_vit_{long}_patch16_224")
        assert {n: p.shape for n, p in a.named_parameters()} == {
            n: p.shape for n, p in b.named_parameters()
        }


BAD = [
    ({"q_capacity": 0}, "q_capacity=0"),
    ({"kv_capacity": 1.5}, "kv_capacity=1.5"),
    ({"ffn_capacity": [0.5, 0.5]}, "ffn_capacity has 2 entries for 3 blocks"),
    ({"kv_routes": 3}, "kv_routes=3"),
    ({"kv_routes": 0}, "kv_routes=0 must be at least 1"),
    ({"reg_tokens": -1}, "reg_tokens=-1 must be at least 0"),
    ({"pos_embed": "sincos", "embed_dim": 66, "num_heads": 2}, "embed_dim=66 to be a multiple"),
    ({"light_mlp_ratio": 1e-3}, "light_mlp_ratio=0.001 leaves the light FFN no hidden units"),
    ({"num_heads": 5}, "num_heads=5"),
    ({"num_heads": 0}, "num_heads=0 must be at least 1"),
    ({"light_window": 7}, "light_window=7"),
    ({"img_size": 3}, "img_size=3"),
    ({"patch_size": 0}, "patch_size=0 must be at least 1"),
    ({"patch_size": (4, 0)}, "patch_size=0 must be at least 1"),
    ({"pos_embed": "magic"}, "pos_embed='magic'"),
    ({"global_pool": "best"}, "global_pool='best'"),
    ({"global_pool": "token", "class_token": False}, "class_token"),
    ({"router": "oracle"}, "router='oracle'"),
    ({"router_kwargs": {"temperature": 2}}, "Router has no argument 'temperature'; it has scale"),
    ({"router_kwargs": {"fetch_ration": 2}}, "'fetch_ration'; did you mean 'fetch_ratio'"),
    ({"router_kwargs": {"capacity": 0.5}}, "Router has no argument 'capacity'"),
    ({"router_kwargs": 5}, r"router_kwargs=5 must be a dict, such as \{'eps': 2.0\}"),
    ({"router": "static", "router_kwargs": {"eps": 2}}, "'static' would ignore it; leave it out"),
    ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must lie in \[0, 1\)"),
    ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1"),
    ({"drop_path_rate": float("nan")}, "drop_path_rate=nan"),
    ({"mlp_ratio": 0}, "mlp_ratio=0 leaves the heavy FFN no hidden units"),
    ({"mlp_ratio": -1}, "mlp_ratio=-1"),
    ({"head_dim": 0}, "head_dim=0 must be at least 1"),
    ({"light_head_dim": 0}, "light_head_dim=0 must be at least 1"),
    ({"embed_dim": 0}, "embed_dim=0 must be at least 1"),
    ({"mlp_layer": "conv"}, "mlp_layer='conv'"),
    ({"patch_drop_rate": 0.1}, "patch_drop_rate"),
    ({"heavy_window": True}, "heavy_window"),
    ({"capacity": 0.5}, "capacity"),
    ({"rope": True, "light_head_dim": 8}, "light_head_dim=8"),
]


@pytest.mark.parametrize(("kwargs", "named"), BAD)
def test_impossible_arguments_are_named(kwargs, named):
    with pytest.raises((ValueError, TypeError), match=named):
        create(**kwargs)


def test_impossible_changes_are_named():
    model = create()
    with pytest.raises(ValueError, match="ffn_capacity=2"):
        model.set_capacity(ffn=2)
    with pytest.raises(TypeError, match="q, kv, ffn"):
        model.set_capacity()
    with pytest.raises(ValueError, match="policy='all'"):
        model.set_grad_checkpointing(policy="all")
    with pytest.raises(ValueError, match="every=0"):
        model.set_grad_checkpointing(every=0)
    with pytest.raises(ValueError, match="light_window=4 must lie between 1 and 2"):
        model.set_input_size((8, 8))
    model = timm.create_model("colt5_vit_ti", img_size=32, depth=1)  # takes windows as they come
    with pytest.raises(ValueError, match=r"img_size=\(8, 8\) is smaller than patch_size"):
        model.set_input_size((8, 8))
    assert model.patch_embed.grid_size == (2, 2)
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_a_misspelled_argument_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"no argument 'q_capacty'; did you mean 'q_capacity'"):
        timm.create_model("colt5_vit_test", q_capacty=0.5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"rope": True, "pos_embed": "none", "head_dim": 16, "light_head_dim": 16},
        {"class_token": True, "global_pool": "token", "light_heads": 0, "pos_embed": "sincos"},
        {"img_size": (20, 28)},  # windows that need padding
    ],
)
def test_visible_patches_are_encoded_as_if_there_were_no_others(kwargs) -> None:
    """All visible is the ordinary forward; hidden ones have no influence.

    Light attention is checked against itself: with every patch visible its windows come from the
    mask in place of the reshape.
    """
    model = create(**{"img_size": (24, 32), "init_values": 1.0, **kwargs}).eval()
    x = images(2, *model.patch_embed.img_size)
    grid = model.patch_embed.grid_size
    everything = torch.arange(grid[0] * grid[1]).expand(2, -1)
    expected = model.fc_norm(model.forward_features(x))
    assert_close(model.encode_visible(x, everything), expected)

    visible = torch.stack([torch.randperm(everything.shape[1])[:10].sort().values for _ in x])
    few = model.encode_visible(x, visible)
    assert few.shape == (2, model.num_prefix_tokens + 10, model.embed_dim)
    kept = torch.zeros(2, everything.shape[1]).scatter_(1, visible, 1).view(2, 1, *grid)
    patch = model.patch_embed.patch_size
    kept = kept.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    assert_close(model.encode_visible(x * kept, visible), few)
    assert_close(model.encode_visible(x[1:], visible[1:]), few[1:])


def test_hidden_patches_do_not_count_for_capacity_and_visible_ones_train_every_parameter() -> None:
    model = create(num_classes=0, ffn_capacity=0.5)
    seen = []
    model.blocks[0].mlp.router.decision.register_forward_hook(
        lambda *args: seen.append(args[-1][0].shape)
    )
    model.encode_visible(images(2), torch.arange(0, 48, 4).expand(2, -1)).mean().backward()
    assert seen == [(2, 1, 6)]
    assert all(p.grad is not None for p in model.parameters())


def test_a_patch_sees_others_of_its_window_only_in_light_attention() -> None:
    """Rotary table and window of a patch are those of its place, not of its rank."""
    model = create(rope=True, head_dim=16, light_head_dim=16, router="all_light").eval()
    x, visible = images(1), torch.tensor([[0, 3, 20, 47]])
    alone = [model.encode_visible(x, visible[:, i : i + 1])[:, -1] for i in range(4)]
    together = model.encode_visible(x, visible)[0, -4:]
    window = model.blocks[0].attn.light_window
    assert window == 4
    assert not torch.allclose(together[1], alone[1][0], atol=1e-4)  # 0 and 3 share the first window
    for i in (2, 3):
        assert_close(together[i], alone[i][0])


FIXED_SIZE = {name: kwargs for name, kwargs in OPTIONS.items() if name != "dynamic"}


@pytest.mark.parametrize("kwargs", FIXED_SIZE.values(), ids=FIXED_SIZE)
def test_torch_fx_sees_every_block_for_timms_feature_extractors(kwargs) -> None:
    """What looks at values must be a leaf of the tracer, which timm's own test suite asks for."""
    model = create(**kwargs).eval()
    seen = []
    model.blocks[1].register_forward_hook(lambda block, given, out: seen.append(out))
    logits = model(images())
    model.blocks[1]._forward_hooks.clear()
    names = [name for name in get_graph_node_names(model)[1] if name.startswith("blocks.1.")]
    found = create_feature_extractor(model, [names[-1], "head"])(images())
    assert_close(found["head"], logits)
    assert_close(found[names[-1]], seen[0])


def test_a_refused_input_size_changes_nothing() -> None:
    model = timm.create_model("colt5_vit_test", img_size=160, light_window=7)
    with pytest.raises(ValueError, match="light_window=7"):
        model.set_input_size((64, 64))
    assert model.patch_embed.img_size == (160, 160)
    assert model(torch.randn(1, 3, 160, 160)).shape == (1, 1000)


@pytest.mark.parametrize(("name", "size"), [("colt5_vit_test", 32), ("colt5_vit_h", 98)])
def test_a_variants_own_window_fits_any_image(name: str, size: int) -> None:
    model = timm.create_model(name, img_size=size, depth=1)
    assert model.light_window == min(model.patch_embed.grid_size)


def test_a_resized_model_is_exported_with_the_windows_it_has(tmp_path: Path) -> None:
    """Built at the new size the variant would choose larger ones."""
    model = timm.create_model("colt5_vit_test", img_size=32, depth=1, init_values=1.0).eval()
    model.set_input_size((96, 96))
    save_for_hf(model, str(tmp_path), model_args=get_model_args(model), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(1, 96, 96)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("dynamic", ["dynamic_img_size", "dynamic_img_pad"])
def test_a_model_for_any_size_can_be_traced_for_one(dynamic: str) -> None:
    options = {"dynamic_img_size": True, dynamic: True}
    model = timm.create_model("colt5_vit_test", img_size=96, depth=1, **options).eval()
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_weights_of_a_misfit_raise_what_torch_raises_too() -> None:
    model = timm.create_model("colt5_vit_test", depth=1)
    with pytest.raises(RuntimeError, match="they lack"):
        model.load_state_dict({})


def test_what_torch_renames_while_it_loads_is_left_to_it() -> None:
    """Weights saved with the older weight_norm: weight_g and weight_v."""
    model, other = (timm.create_model("colt5_vit_test", depth=1) for _ in range(2))
    torch.nn.utils.parametrizations.weight_norm(model.head)
    state = other.state_dict()
    weight = state.pop("head.weight")
    norm = weight.norm(dim=1, keepdim=True)
    model.load_state_dict({**state, "head.weight_g": norm, "head.weight_v": weight})
    torch.testing.assert_close(model.head.weight, weight)


@pytest.mark.parametrize(
    "mistake", [{"dense_blocks": -1}, {"dense_blocks": 99}, {"light_heads": -1},
                {"light_mlp_ratio": -1}]
)  # fmt: skip
def test_numbers_that_cannot_be_are_named(mistake: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(mistake))):
        timm.create_model("colt5_vit_test", **mistake)


def test_no_images_give_no_logits_also_where_images_are_dropped() -> None:
    options = {"drop_path_rate": 0.5, "efficient_drop_path": True}
    model = timm.create_model("colt5_vit_test", img_size=96, depth=2, **options).train()
    assert model(torch.randn(0, 3, 96, 96)).shape == (0, 1000)


@pytest.mark.parametrize("options", [{}, {"router_kwargs": {"solver": "coordinate_descent"}}])
def test_a_scripted_model_can_be_saved(options: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model("colt5_vit_test", img_size=96, depth=1, **options).eval()
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(x), model(x))
