"""lib/core/gpu.py: which GPUs a program sees, and what it does without one."""

import os
import sys
from types import SimpleNamespace

import pytest

from lib.core.gpu import torch_device, use_gpus
from lib.core.stage import UserError


@pytest.mark.parametrize(
    ("shown", "count", "left"),
    [(None, 1, "0"), (None, 2, "0,1"), ("3,5", 1, "3"), ("3,5", 2, "3,5"), ("7", 2, "7"), ("", 1, "")],
)
def test_a_program_sees_as_many_gpus_as_it_uses(monkeypatch, shown, count, left):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    else:  # so that it is taken back afterwards
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        del os.environ["CUDA_VISIBLE_DEVICES"]
    use_gpus(count)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


@pytest.mark.parametrize(("cuda", "seen"), [("13.0", True), (None, False)])
def test_torch_takes_the_gpu_or_has_no_build_for_one(monkeypatch, cuda, seen):
    monkeypatch.setitem(sys.modules, "torch", torch(cuda, seen))
    assert torch_device() == ("cuda" if seen else "cpu")


def test_a_cuda_build_without_a_gpu_stops_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch("13.0", False))
    with pytest.raises(UserError, match="for CUDA 13.0 sees no GPU; look at nvidia-smi"):
        torch_device()


def torch(cuda, seen):
    return SimpleNamespace(
        __version__="2.9.0", version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(is_available=lambda: seen)
    )
