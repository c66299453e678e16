"""Colleagues may read what the umask lets them read."""

import os

import pytest
import torch

from routedvit.training.checkpoints.taken_shards import write_tensors


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_tensors_have_the_mode_of_any_other_file(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
