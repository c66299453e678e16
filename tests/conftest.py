"""Where there is no GPU, Triton kernels run in Triton's interpreter in this process.

Triton decides between compiler and interpreter when a kernel is decorated, so the switch must be
set before its first import: here, at the import of the first file that pytest loads, before any
other conftest or test module. It is taken back at once, since processes that tests start are not to
inherit it. Other tests do not notice: PyTorch itself uses Triton on GPUs only.
"""

import importlib
import os

import torch

if not torch.cuda.is_available():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    for module in importlib.import_module("routedvit.ops.backend").KERNELS:
        importlib.import_module(module)
    if before is None:
        del os.environ["TRITON_INTERPRET"]
