"""Importing torchvision beside a torch that its extension was not built for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from gbp_ray.workloads import images

NEEDED = """
import sys, torch, gbp_ray.zoo as zoo
from gbp_ray.workloads.data import take_batch
w = zoo.digits_convnet()
take_batch(w, w.train, torch.arange(4), augment_seed=1)
assert not [m for m in sys.modules if m.startswith('torchvision')]
try:
    import torchvision
except RuntimeError:
    pass
from gbp_ray.workloads.images import import_vision
models = import_vision('models')
assert 'resnet18' in models.list_models(module=models)
import torchvision.transforms.v2
"""


def test_torchvision_is_imported_only_when_needed_and_after_somebody_elses_import_failed():
    done = subprocess.run([sys.executable, "-c", NEEDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operators_are_declared_only_without_the_extension(monkeypatch):
    images.import_vision("models")
    before, loaded = images._declared, []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert images._load_extension()
    assert "_C" in Path(loaded[0]).name

    def fail(path):
        raise OSError("libtorch_cuda.so: cannot open shared object file")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    assert not images._load_extension()
    images._declare_operators()
    assert images._declared is before, "what exists must not be declared again"
