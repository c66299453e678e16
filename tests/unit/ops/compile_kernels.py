"""Compiles every Triton kernel for GPUs that need not be there, and prints what each uses.

    python tests/unit/ops/compile_kernels.py            one JSON object per kernel, case and chip

Runs in a process of its own, since the interpreter must be off. The launchers are called on CPU
tensors with the launch itself replaced by a recorder, so what is compiled is what they would launch
on a GPU: types, block sizes, warps, alignment. Needs the `cuobjdump` that Triton ships.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from routedvit.ops import (
    coordinate_descent_triton,
    gather_norm_triton,
    router_logits_triton,
    routing_triton,
    soft_topk_triton,
    tokens_triton,
    window_attention_triton,
)

MODULES = (
    coordinate_descent_triton, gather_norm_triton, router_logits_triton, routing_triton,
    soft_topk_triton, tokens_triton, window_attention_triton,
)  # fmt: skip
CHIPS = (80, 90)
ROW_LENGTHS = (196, 1024, 4096, 65536)  # one warp, few warps, the largest block, several blocks
OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


def launch_everything() -> Iterator[str]:
    """Calls each launcher; yields the name of the case before its launches."""
    ops = torch.ops.routedvit
    for n in ROW_LENGTHS:
        yield f"n={n}"
        logits = torch.zeros(2, 2, n)
        counts = [n // 4, n // 2]
        routing_triton.route(logits, counts, 1.125, 1.0)
        picked = torch.zeros(2, sum(counts))
        routing_triton.route_backward(picked.long(), logits, picked, counts, 1.0)
    n = ROW_LENGTHS[-2]  # all in registers, and more of them than anywhere else: what may spill
    yield f"n={n}"
    mask, k = torch.ones(2, 2, n, dtype=torch.bool), torch.ones(2, 2, 1)
    logits = torch.zeros(2, 2, n)
    routing_triton.select(logits, 40)
    ops.soft_topk(logits, k, 1.0, mask)
    ops.soft_topk_backward(logits, logits, 1.0)
    schedule = (0.03, 4.0, 0.7, 20)
    gates, sums = coordinate_descent_triton.coordinate_descent(logits, k, mask, *schedule)
    coordinate_descent_triton.coordinate_descent_backward(
        logits, k, mask, gates, sums, gates, *schedule
    )
    for dim, dtype in ((384, torch.float32), (768, torch.bfloat16)):
        yield f"D={dim} {dtype}"
        launch_tokens(torch.zeros(2, 197, dim, dtype=dtype))
    for dim, rms in ((768, False), (1280, True), (8192, False)):
        yield f"D={dim} rms={rms}"
        x, index = torch.zeros(2, 197, dim).bfloat16(), torch.zeros(2, 2, 50, dtype=torch.int64)
        weight = torch.zeros(dim)
        rows = ops.gather_norm(x, index, weight, None if rms else weight, 1e-6, rms)
        ops.gather_norm_backward(x, index, weight, rows, 1e-6, rms)
    for dim, routes in ((384, 1), (768, 2), (1280, 4), (8192, 1)):
        yield f"D={dim} R={routes}"
        x, weight = torch.zeros(2, 200, dim).bfloat16(), torch.zeros(routes, dim).bfloat16()
        logits = ops.router_logits(x, weight, 0.5, 4)
        ops.router_logits_backward(x, weight, logits, 0.5, 4)
    for side, head_dim, dtype in (
        (7, 64, torch.bfloat16), (8, 128, torch.bfloat16), (7, 32, torch.float16),
    ):  # fmt: skip
        yield f"window={side} head_dim={head_dim} {dtype}"
        qkv = torch.zeros(2, 200, 9 * head_dim, dtype=dtype)
        out = ops.window_attention(qkv, 14, 14, side, 3, 4)
        ops.window_attention_backward(qkv, out, 14, 14, side, 3, 4)


def launch_tokens(x: Tensor) -> None:
    """Gather and scatter, forward and backward, of tokens x [2, N, D]."""
    index = torch.zeros(2, 2, 50, dtype=torch.int64)
    rows = tokens_triton.gather(x, index)
    tokens_triton.gather_backward(index, rows, x.shape[1])
    tokens_triton.token_rows(index, x.shape[1])
    tokens_triton.add_rows(x, index[:, 0], rows[:, 0])
    one, rows, gate = index[:, 0], rows[:, 0], torch.zeros(2, 50)
    tokens_triton.scatter_add(x, one, rows, gate, x.float())
    tokens_triton.scatter_add_backward(one, rows, gate, x)


def source_of(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """What the launch would compile, specialised as Triton does: ones are constants, multiples of
    16 are known to be."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread; a spill goes to the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        name.lower(): int(re.search(rf"\b{name}:(\d+)", usage)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    }


def store_widths(ptx: str) -> list[int]:
    """Bits that each store instruction to global memory writes at once, widest first."""
    stores = re.findall(r"\bst\.global(?:\.\w+)*?\.(?:v(\d)\.)?b(\d+)", ptx)
    return sorted((int(vector or 1) * int(bits) for vector, bits in stores), reverse=True)


def main() -> None:
    launches: list[tuple[str, JITFunction, dict[str, Any], dict[str, Any]]] = []
    case = ""

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = [parameter.name for parameter in self.params]
        launches.append((case, self, dict(zip(names, args, strict=False)) | kwargs, options))

    JITFunction.run = record
    for case in launch_everything():  # noqa: B007 -- `record` reads it
        pass
    for case, kernel, arguments, options in launches:
        for chip in CHIPS:
            source = source_of(kernel, arguments)
            compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
            row = {"kernel": kernel.__name__, "case": case, "chip": chip}
            row |= {"shared": compiled.metadata.shared, **options}
            row["stores"] = store_widths(compiled.asm["ptx"])
            print(json.dumps(row | resources(compiled.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main()
