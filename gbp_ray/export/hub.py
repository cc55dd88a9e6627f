"""Files that make the folder one of transformers': `from_pretrained` loads it as it is.

    config.json, generation_config.json, and the tokenizer's files, beside model.safetensors, which
    holds a weight once that transformers ties, as an output layer to the embeddings

A network that has lost whole units has other widths than its class expects. Where all layers have
lost as many, config.json says so; otherwise only load.py can make the network, see `compacted`. The
folder is loaded by transformers and compared before anything is written.

The one door to transformers, which comes with the extra `hf` and is imported in functions only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gbp_ray.errors import ConfigError, ExportError, in_one_line
from gbp_ray.export.traced import compare_outputs
from gbp_ray.export.weights import leave_out, shared_names
from gbp_ray.workloads.call import Call
from gbp_ray.workloads.weights import tensor_state

__all__ = [
    "HUB_FILES",
    "HubFiles",
    "check_hub",
    "make_hub_files",
]

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Names of files that configurations and tokenizers are saved as."""

_TOLERANCE = 1e-4
"""Greatest difference of the outputs of the loaded folder, against the greatest output."""

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class HubFiles:
    """What transformers needs beside the weights.

    Attributes:
        files: By name, model.safetensors among them; empty where `fault` says why the folder cannot
            be one of transformers'.
        tied: Names that model.safetensors has not, as transformers ties them to others.
        class_name: That loads it.
        difference: Greatest difference of its outputs from the pruned network's.
        base_model: Name or folder that the dense network came from, or "".
        license: Of that, as its card names it, or "".
        missing: Reason why there is no tokenizer, or "".
    """

    files: dict[str, bytes] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    class_name: str = ""
    difference: float = 0.0
    base_model: str = ""
    license: str = ""
    missing: str = ""
    fault: str = ""


def check_hub(model: nn.Module) -> None:
    """Checks that a network is of transformers.

    Raises:
        ConfigError: It is not.
    """
    if not (hasattr(model, "save_pretrained") and hasattr(model, "config")):
        raise ConfigError(
            f"--to = 'hf': the network is a {type(model).__name__}, which transformers does not "
            "load; leave it out, model.safetensors and model.pt2 are plain PyTorch's"
        )


def make_hub_files(
    model: Any,
    masked: nn.Module,
    shapes: Mapping[str, Sequence[list[int]]],
    state: bytes,
    call: Call,
) -> HubFiles:
    """Makes the files, loads them with the weights by transformers, and compares the outputs.

    Args:
        model: The pruned network, of transformers.
        masked: What it is compared with.
        shapes: Of tensors that have lost units: the dense and the new one, by name.
        state: model.safetensors, with every name of each weight.

    Raises:
        ExportError: The loaded network gives other outputs.
    """
    config = deepcopy(model.config)
    if getattr(config, "auto_map", None):
        return HubFiles(fault="its class is code that came with it, which would not lie beside it")
    fault, tied = _fit(config, model, shapes)
    if fault:
        return HubFiles(fault=fault)
    state = leave_out(state, tied)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    if hasattr(config, "use_cache"):
        # Training has no use for it, and generating has.
        config.use_cache = True
    source = str(getattr(model, "name_or_path", "") or "")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        missing = _save_tokenizer(source, folder)
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        files["model.safetensors"] = state
        (folder / "model.safetensors").write_bytes(state)
        loaded, found = type(model).from_pretrained(folder, output_loading_info=True)
    lost = sorted(map(str, (*found["missing_keys"], *found["unexpected_keys"])))
    if lost:
        raise ExportError(f"config.json: '{lost[0]}' is not in both the class and the weights")
    loaded.config.use_cache = getattr(masked.config, "use_cache", None)
    comparison = compare_outputs("config.json", loaded.eval(), masked, call, _TOLERANCE)
    license_ = _find_license(source)
    name = type(model).__name__
    return HubFiles(files, tied, name, comparison.difference, source, license_, missing)


def _fit(
    config: Any, model: nn.Module, shapes: Mapping[str, Sequence[list[int]]]
) -> tuple[str, frozenset[str]]:
    """Writes new widths into a configuration.

    Returns:
        Why it cannot hold them, or "", and the names that its class ties to others, as the network
        does.
    """
    pairs = sorted(
        {
            (old, new)
            for before, after in shapes.values()
            for old, new in zip(before, after, strict=True)
            if old != new
        }
    )
    hidden, heads = (getattr(config, name, 0) or 0 for name in ("hidden_size", _HEADS[0]))
    size = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
    inner = {name: getattr(config, name, None) or 4 * hidden for name in _INNER}
    for old, new in pairs:
        for name, width in inner.items():
            if hasattr(config, name) and width == old:
                setattr(config, name, new)
        for name in _HEADS:
            number = getattr(config, name, None)
            if size and number and number * size == old and new % size == 0:
                setattr(config, name, new // size)
                if hasattr(config, "head_dim"):
                    config.head_dim = size
    try:
        with torch.device("meta"):
            fresh = type(model)(config)
    except Exception as error:  # noqa: BLE001 - configurations check what they like
        return in_one_line(error), frozenset()
    own = tensor_state(fresh)
    for name, tensor in tensor_state(model).items():
        if name not in own or own[name].shape != tensor.shape:
            there = "x".join(map(str, own[name].shape)) if name in own else "nothing"
            fault = (
                f"{name} is {'x'.join(map(str, tensor.shape))}, and a configuration of "
                f"{type(model).__name__} can only make it {there}, as it gives all layers the same "
                "widths; prune with prune.target.uniform = true for that"
            )
            return fault, frozenset()
    return "", frozenset(shared_names(fresh) & shared_names(model))


def _save_tokenizer(source: str, folder: Path) -> str:
    """Saves the tokenizer that came with the dense network; returns why there is none, or ""."""
    from transformers import AutoTokenizer

    if not source:
        return "the network was not loaded from a folder or a name on the hub"
    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - libraries raise whatever lies below them
        return in_one_line(error)[:160]
    return ""


def _find_license(source: str) -> str:
    from huggingface_hub import ModelCard

    card = Path(source) / "README.md"
    try:
        found = ModelCard.load(card if card.exists() else source).data.to_dict().get("license")
    except Exception:  # noqa: BLE001 - no card, no network, or none that can be read
        return ""
    return found if isinstance(found, str) else ""
