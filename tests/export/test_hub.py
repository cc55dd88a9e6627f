"""Exported folders of language models, loaded by plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import WORDS, write_models
from safetensors.torch import load_file
from small_digits import prune_digits

import gbp_ray
from gbp_ray.config.job import JobConfig
from gbp_ray.errors import ConfigError
from gbp_ray.export.program import Export, export_round

library = pytest.importorskip("transformers", reason="needs the extra hf, which is not installed")

GENERATE = """
import sys, torch
from gbp_ray.workloads.images import import_vision
import_vision("models")  # transformers imports torchvision, which may need this to come in
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("w1 w2 w3", return_tensors="pt")["input_ids"]
example = load_file(sys.argv[1] + "/example.safetensors")
with torch.no_grad():
    found = model(example["inputs.input_ids"]).logits
    print(float((found - example["outputs"]).abs().max() / example["outputs"].abs().max()))
known = model.generate(tokens, max_new_tokens=8, do_sample=False)
print(known.tolist() == model.generate(
    tokens, max_new_tokens=8, do_sample=False, use_cache=False
).tolist(), known.shape[1])
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    write_models(place, layers=2, heads=4, key_value_heads=2)
    (place / "llama" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    text = " ".join(WORDS[(3 * i * i + i) % 20] for i in range(600))
    (place / "text.txt").write_text(text)
    return place


def export(hub: Path, name: str, to: list[str] | None = None, **prune: Any) -> tuple[Path, Export]:
    fields = {
        "name": name,
        "storage": str(hub / "results"),
        "workload": {
            "factory": "gbp_ray.zoo:huggingface",
            "options": {
                "model": str(hub / "llama"),
                "task": "causal_lm",
                "data": str(hub / "text.txt"),
                "max_length": 12,
            },
        },
        "prune": {"criterion": "magnitude", "exclude": ["model.embed_tokens.*"], **prune},
        "finetune": {"epochs": 0},
        "cluster": {"num_workers": 0},
    }
    result = gbp_ray.prune(JobConfig(**fields), is_quiet=True)
    return hub / name, export_round(result.uri, hub / name, to=to or ["hf"])


@pytest.mark.parametrize(
    ("name", "prune", "widths"),
    [
        ("weights", {"sparsity": 0.5}, {}),
        (
            "units",
            {"granularity": "channel+head", "sparsity": 0.5, "scope": "layer"},
            {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        ),
        (
            "uniform",
            {
                "granularity": "channel",
                "target": {"parameters": 0.8, "uniform": True},
                "exclude": ["model.embed_tokens.*", "*norm*", "*.self_attn.*"],
            },
            {"intermediate_size": 21, "num_attention_heads": 4},
        ),
    ],
)
def test_plain_transformers_loads_the_folder_and_generates_text(
    hub: Path, name: str, prune: dict[str, Any], widths: dict[str, int]
) -> None:
    folder, found = export(hub, name, **prune)
    assert found.hub_fault == ""
    assert found.hub_difference is not None
    assert found.hub_difference < 1e-5
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == 4
    assert {key: config[key] for key in widths} == widths
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(folder)], capture_output=True, text=True, check=True
    )
    difference, is_same, length = done.stdout.split()
    assert float(difference) < 1e-4
    assert (is_same, length) == ("True", "11")
    card = (folder / "README.md").read_text()
    assert "library_name: transformers\nlicense: apache-2.0\n" in card
    assert 'LlamaForCausalLM.from_pretrained(".")' in card
    assert str(hub) not in card.split("```toml")[0]
    weights = load_file(folder / "model.safetensors")
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights
    gate = weights["model.layers.0.mlp.gate_proj.weight"]
    assert len(gate) == widths.get("intermediate_size", 32)
    if name == "weights":
        assert torch.count_nonzero(gate) < 0.9 * gate.numel()


def test_layers_of_other_widths_are_named(hub: Path) -> None:
    folder, found = export(hub, "uneven", granularity="channel", sparsity=0.3)
    assert found.hub_difference is None
    assert "prune with prune.target.uniform = true for that" in found.hub_fault
    assert "gate_proj.weight is " in found.hub_fault
    assert not (folder / "config.json").exists()
    assert (folder / "load.py").exists()
    assert found.hub_fault in (folder / "README.md").read_text()


def test_other_networks_are_refused_by_name(tmp_path: Path) -> None:
    result = prune_digits(tmp_path)
    with pytest.raises(ConfigError, match=r"--to = 'hf': the network is a \w+, which transformers"):
        export_round(result.uri, tmp_path / "net", to=["hf"])
    assert not (tmp_path / "net").exists()
