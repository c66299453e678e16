"""The wheel holds routedvit alone and works with nothing but the dependencies it declares.

A clean environment would cost 6 GB and minutes of download for torch. Instead the new environment
gets links to exactly the installed distributions in the closure of the wheel's own requirements:
what the wheel forgets to declare is absent, and so is every training package.
"""

import email
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import importlib.util, pathlib, torch, timm, routedvit
for name in ('deepspeed', 'webdataset', 'tensorboard', 'data', 'train'):
    assert importlib.util.find_spec(name) is None, name
assert 'site-packages' in pathlib.Path(routedvit.__file__).parts, routedvit.__file__
with torch.device('meta'):
    model = timm.create_model('colt5_vit_b')
print(type(model).__name__, model.num_features)
"""


def closure(requirements: list[str]) -> set[str]:
    """Names of all installed distributions that `requirements` need, without extras."""
    found: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    environment = {**default_environment(), "extra": ""}
    while todo:
        requirement = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate(environment)):
            continue
        found.add(name)
        extras = [{**environment, "extra": extra} for extra in requirement.extras]
        for inner in map(Requirement, metadata.requires(name) or []):
            if not inner.marker or any(inner.marker.evaluate(e) for e in [environment, *extras]):
                todo.append(Requirement(str(inner).split(";")[0]))
    return found


def link_distribution(name: str, site_packages: Path) -> None:
    """Links every top-level file or folder of an installed distribution."""
    files = metadata.files(name)
    assert files, f"{name} has no file list"
    for top in {Path(file).parts[0] for file in files} - {"..", "__pycache__"}:
        target = site_packages / top
        if not target.exists():
            target.symlink_to(str(metadata.distribution(name).locate_file(top)))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = (
        folder / "source"
    )  # setuptools writes build/ beside the sources: keep the checkout clean
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "routedvit", "data", "train.py"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "-o",
            str(folder),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_wheel_holds_only_the_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"routedvit"}


def test_wheel_gives_timm_the_model_with_declared_dependencies_only(
    wheel: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    site_packages = next((environment / "lib").glob("python*/site-packages"))
    metadata_file = next(site_packages.glob("routedvit-*.dist-info/METADATA"))
    declared = email.message_from_string(metadata_file.read_text()).get_all("Requires-Dist", [])
    for name in closure([text for text in declared if "extra ==" not in text]):
        link_distribution(name, site_packages)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", PROBE], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "768"
