"""What a compiled block moves on an H100, counted without one in the schedule that Inductor makes.

    python -m benchmarks.traffic [--batch 256] [--launches]

One block of `colt5_vit_b` at 224 px in bf16, with the plain indexing that Inductor fuses
(`ops/fused_tokens.py`) and with the kernels in its place, beside the block of the dense twin. Each
is traced on fake tensors, forward and backward, as torch.compile does it; Inductor schedules the
graphs for a GPU that is pretended, and tells what every launch reads and writes. Nothing is
compiled or run, and nothing here is a time.

A pass is the bytes of the tokens once. Matrix products and attention stand apart: they are what the
FLOPs are. An operator of ours that reads at indices is counted by Inductor as if it read all.

It reaches into Inductor (torch 2.15), which promises nothing there. Left out: the optimiser, and
CUDA's own attention, in whose place that of the CPU stands.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import routedvit  # noqa: F401  (registers the models)
from routedvit.ops import backend as backends

ROUTED, DENSE = "colt5_vit_b", "vit_base_patch16_224"
SIZE, PATCH, WIDTH = 224, 16, 768
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, total_memory=80 << 30,
    max_threads_per_block=1024, shared_memory_per_block=49152, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip
COUNTS = 0.05  # passes; what moves less is no launch worth counting
CHOOSERS = ("tokens", "router_logits", "gather_norm", "fused_tokens")  # that ask `fuses`


class Launch(NamedTuple):
    """One kernel of the schedule."""

    name: str
    bytes: int

    @property
    def kind(self) -> str:
        """What it counts as."""
        if ".settle." in self.name:
            return "nothing"  # an operator that does nothing
        if "scaled_dot_product" in self.name or "window_attention" in self.name:
            return "attention"
        return "products" if self.name.endswith("mm") else "rest"


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inductor finds an H100, and nothing asks a driver."""
    cuda = "torch._dynamo.device_interface.CudaInterface"
    found: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_properties": lambda *_: H100,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        f"{cuda}.get_compute_capability": staticmethod(lambda *_: 90),
        f"{cuda}.is_triton_capable": staticmethod(lambda *_: True),
        f"{cuda}.raise_if_triton_unavailable": staticmethod(lambda *_: None),
        f"{cuda}.get_device_properties": staticmethod(lambda *_: H100),
        f"{cuda}.Worker.get_device_properties": staticmethod(lambda *_: H100),
        f"{cuda}.Worker.current_device": staticmethod(lambda: 0),
        "torch.utils._triton.has_triton": lambda *_: True,
        "torch.utils._triton.triton_hash_with_backend": lambda *_: "",
        # Patterns are traced on the device; ours call fused attention already.
        "torch._inductor.fx_passes.fuse_attention._sfdp_init": lambda *_, **__: None,
        "torch._inductor.fx_passes.pad_mm._pad_mm_init": lambda *_, **__: None,
        "torch._inductor.fx_passes.misc_patterns._misc_patterns_init": lambda *_, **__: None,
        # it would write into the pretended tensor
        "torch._inductor.fx_passes.reinplace._inplace_generalized_scatter": _copied,
        "torch._functorch.aot_autograd.preserve_rng_state": nullcontext,
        "torch._inductor.config.shape_padding": False,
    }
    with ExitStack() as stack:
        for name, value in found.items():
            stack.enter_context(patch(name, value))
        yield


def _copied(into: Tensor, *_: object) -> Tensor:
    with torch.no_grad():
        return into.clone()


@contextmanager
def triton_backend(fused: bool) -> Iterator[None]:
    """Fake tensors on the CPU are computed as tensors on a GPU would be in compiled code."""
    backends.set_backend("torch")
    for module in backends.KERNELS:
        importlib.import_module(module)
    with ExitStack() as stack:
        stack.enter_context(patch.object(backends, "_resolved", "triton"))
        stack.enter_context(patch.object(backends, "_interpreted", lambda: True))
        stack.enter_context(patch.object(backends, "FakeTensor", type(None)))
        stack.enter_context(patch.object(torch.compiler, "_is_compiling_flag", True))
        for name in CHOOSERS:
            asks = sys.modules[f"routedvit.ops.{name}"]
            stack.enter_context(patch.object(asks, "fuses", lambda _: fused))
        yield


def schedule(graph: torch.fx.GraphModule, inputs: list[Any], is_backward: bool) -> list[Launch]:
    """The launches of a traced graph on the pretended GPU."""
    graph = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    mode = detect_fake_mode(inputs)
    assert mode is not None
    with V.set_fake_mode(mode), mode:
        inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, Tensor)
            else x
            for x in inputs
        ]
        for node in graph.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        post_grad_passes(graph, is_inference=False)
    lowering = GraphLowering(
        graph, example_inputs=inputs, shape_env=mode.shape_env, is_backward=is_backward
    )
    debug = V.set_debug_handler(DebugContext())
    with V.set_fake_mode(mode), V.set_graph_handler(lowering), debug:
        lowering.run(*inputs)
        lowering.codegen()
        return [_launch(node) for node in lowering.scheduler.nodes]


def _launch(node: Any) -> Launch:
    inside = getattr(node, "node", None)
    operator = getattr(inside, "python_kernel_name", None) or getattr(inside, "op_overload", None)
    return Launch(str(operator or node.get_name()), node.get_read_write_buffers_sizes())


class _Block(nn.Module):
    """A block with its grid, if it is routed; AOTAutograd wants a tuple back."""

    def __init__(self, name: str) -> None:
        super().__init__()
        model: Any = timm.create_model(name, depth=1, img_size=SIZE)
        self.block: Any = model.blocks[0].bfloat16()
        self.grid = [(SIZE // PATCH,) * 2] if name == ROUTED else []
        self.num_tokens: int = model.num_prefix_tokens + (SIZE // PATCH) ** 2

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.block(x, *self.grid),)


def launches_of(name: str, batch: int) -> tuple[list[list[Launch]], int]:
    """Of a block, forward and backward; and the bytes of its tokens."""
    block = _Block(name)
    traced: Any = block  # AOTAutograd takes any module, and is annotated otherwise
    found: list[list[Launch]] = []

    def compiler(is_backward: bool) -> Any:
        def compile_nothing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            found.append(schedule(graph, inputs, is_backward))
            return make_boxed_func(graph.forward)

        return compile_nothing

    def partition(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **options)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in block.modules():
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = nn.Parameter(mode.from_tensor(value.detach()))
        x = torch.empty(batch, block.num_tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        compiled = aot_module_simplified(
            traced,
            [x],
            fw_compiler=compiler(False),
            bw_compiler=compiler(True),
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        compiled(x)[0].sum().backward()
    return found, x.numel() * x.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--launches", action="store_true", help="print each of them")
    arguments = parser.parse_args()
    cases = {DENSE: False, f"{ROUTED}, kernels": False, f"{ROUTED}, fused": True}
    for case, fused in cases.items():
        with triton_backend(fused), pretended_gpu():
            both, size = launches_of(case.split(",")[0], arguments.batch)
        for way, launches in zip(("forward", "backward"), both, strict=True):
            moved = dict.fromkeys(("products", "attention", "rest"), 0.0)
            for launch in launches:
                moved[launch.kind] = moved.get(launch.kind, 0) + launch.bytes / size
                if arguments.launches and launch.bytes > COUNTS * size:
                    print(f"  {launch.bytes / size:6.2f} {launch.kind:<10}{launch.name}")
            counted = [one for one in launches if one.bytes > COUNTS * size]
            number = sum(one.kind != "nothing" for one in counted)
            print(
                f"{case:<24}{way:<10}{moved['rest']:6.1f} passes beside products"
                f" ({moved['products']:.1f}) and attention ({moved['attention']:.1f}),"
                f" {number} launches",
                flush=True,
            )


if __name__ == "__main__":
    main()
