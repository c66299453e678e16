"""Who may import whom (CONTRIBUTING.md, the house), read from the syntax trees of every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STDLIB = set(sys.stdlib_module_names)

# folder -> everything outside the standard library that its files may import
ALLOWED = {
    "routedvit/ops": {"torch", "routedvit.ops"},
    "routedvit/layers": {"torch", "timm.layers", "routedvit.ops", "routedvit.layers"},
    "routedvit/models": {
        "torch", "einops", "timm", "safetensors",
        "routedvit.ops", "routedvit.layers", "routedvit.models",
    },
    "routedvit/training": {
        "torch", "numpy", "timm", "tqdm", "pydantic", "safetensors",
        "routedvit.training", "routedvit.drawing",
    },
    "data": {"torch", "torchvision", "numpy", "PIL", "timm.data", "webdataset", "fsspec",
             "aiohttp", "simplejpeg", "pyarrow",
             "pydantic", "tqdm", "mlxtend", "data"},
}  # fmt: skip
# single files that may import one thing more than their folder
EXCEPTIONS = {
    "routedvit/ops/sorted_routing.py": {"numpy"},
    "routedvit/training/checkpoints/bucket.py": {"fsspec"},
    "routedvit/training/engine/engine.py": {"deepspeed"},
    "routedvit/training/engine/native_check.py": {"deepspeed"},
    "routedvit/training/engine/pretended.py": {"deepspeed"},
    "routedvit/training/engine/processes.py": {"deepspeed"},
    "routedvit/training/engine/state.py": {"deepspeed"},
    "routedvit/training/watch/metrics.py": {"tensorboard"},
    "routedvit/training/watch/wandb_writer.py": {"wandb"},
}


def imports_of(file: Path) -> Iterator[str]:
    """Dotted names of everything `file` imports, lazily or not."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write the full name"
            yield node.module or ""


def breaches(file: Path, allowed: set[str]) -> list[str]:
    """Imports of `file` that are neither standard library nor below an allowed name."""
    return [
        name
        for name in imports_of(file)
        if name.split(".")[0] not in STDLIB
        and not any(name == ok or name.startswith(f"{ok}.") for ok in allowed)
    ]


@pytest.mark.parametrize("folder", ALLOWED)
def test_folder_imports_only_what_the_design_allows(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python files: mend the table"
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        allowed = ALLOWED[folder] | EXCEPTIONS.get(name, set())
        if name.endswith("_triton.py"):
            allowed = allowed | {"triton"}
        assert not breaches(file, allowed), f"{name} may not import this"


def test_breach_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import os\nimport torch.nn\ndef f():\n    from routedvit.training import x\n")
    assert breaches(file, {"torch"}) == ["routedvit.training"]


def test_nobody_imports_the_composition_root() -> None:
    for folder in ("routedvit", "data"):
        for file in (ROOT / folder).rglob("*.py"):
            roots = {name.split(".")[0] for name in imports_of(file)}
            assert not roots & {"train", "benchmarks", "tests", "launch"}, file


def test_import_routedvit_needs_none_of_the_training_packages() -> None:
    blocked = ("deepspeed", "webdataset", "tensorboard", "triton", "pydantic", "tqdm", "data")
    code = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None  # makes any import of it fail
import routedvit, timm
assert timm.is_model('colt5_vit_b')
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
