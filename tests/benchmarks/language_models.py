"""What Llama models of 1, 7 and 70 billion weights would take of each of 8 GPUs: computed, not run.

    python tests/benchmarks/language_models.py

For cluster/llm_weights.toml (SparseGPT) and cluster/llm_gradients.toml (taylor). The real layers
are laid out on the meta device, which holds nothing; sharding, rows, sums and traffic come from the
planner of `--dry-run`. Activations cannot be measured there: formulas below count them.

Times are arithmetic over an assumed pace. Constants that were measured, and those that were
assumed, are printed with the tables.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from large_models import DECISION_S_PER_SCORE, SCORING_SHARE, WithoutActivations

from gbp_ray.config.job import JobConfig
from gbp_ray.pruning.activations import find_patch_layers
from gbp_ray.runtime.memory import Phase
from gbp_ray.runtime.refit_memory import RefitMemory
from gbp_ray.training.footprint import Footprint
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.images import import_vision

JOBS = Path(__file__).resolve().parent.parent.parent / "cluster"
GPUS = 8
SHAPES: dict[str, dict[str, Any]] = {
    "1B (Llama 3.2)": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "7B (Llama 2)": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32_000,
    },
    "70B (Llama 2)": {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
    },
}
STOPPED = 3
"""Tensors of the residual stream's size that a pass holds which has stopped in front of a layer:
what came in, its normed copy, and what a norm made of it. The layer's own input comes on top."""
STORED = 16
"""Tensors of that size that a block keeps for its backward pass, the feed-forward ones apart."""


class OnMeta(WithoutActivations):
    """The planner without any pass: of a refit it knows sums and traffic only."""

    def _measure_scoring(self) -> Footprint:
        if self.num_passes:
            return super()._measure_scoring()
        # Scores in float32, and a layer as it is scored.
        largest = max(unit.parameter.numel() for unit in self._units)
        return Footprint(((4 * self.num_prunable + 24 * largest, 0),))

    def _refit(self, kept: dict[str, int]) -> Phase:
        layers = tuple(find_patch_layers(self._model).values())
        none = tuple(0 for _ in layers)
        refit = RefitMemory(layers, (), (), none, none, 2, 0, 0)
        prune = self._job.prune
        turns = self._turns(self.calibration_examples, prune.calibration_batch_size)
        sent = refit.sent_bytes(turns, self._world_size) + 6 * self._gathering
        held = kept | {"gathered": self._gathered_to_refit}
        return Phase("reconstruct", sum(held.values()), held, sent)


def build(shape: dict[str, Any]) -> nn.Module:
    import_vision("models")
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape))


def read(name: str) -> tuple[JobConfig, int]:
    """Reads a job of cluster/; returns it with its tokens an example."""
    tree = tomllib.loads((JOBS / name).read_text())
    return JobConfig.model_validate(tree), int(tree["workload"]["options"]["max_length"])


def phases_of(job: JobConfig, model: nn.Module) -> tuple[OnMeta, dict[str, Phase]]:
    number = job.prune.calibration_examples
    data = (torch.zeros(number, 1), torch.zeros(number, dtype=torch.int64))
    workload = Workload(build_model=lambda: model, train=data, test=data)
    memory = OnMeta(job, workload, model, is_blank=True)
    return memory, {phase.name: phase for phase in memory.phases()}


def of_refit(shape: dict[str, Any], examples: int, size: int, tokens: int) -> tuple[int, int]:
    """Computes what the passes of a refit hold on a rank, and what its largest layer takes.

    Args:
        examples: Of a rank, in both networks at once.
        size: Of a batch.
    """
    wide, hidden = shape["intermediate_size"], shape["hidden_size"]
    passes = 2 * examples * tokens * 4 * (STOPPED * hidden + wide)
    # Rows, outputs and their products of one batch in float32; sums, system, factor and inverse in
    # float64; weights, errors and masks of the sweep.
    rows = size * tokens * 4 * (2 * wide + hidden)
    sums = 4 * 8 * wide * (wide + hidden) + 4 * 8 * wide * hidden
    return passes, rows + sums


def of_scoring(shape: dict[str, Any], size: int, tokens: int) -> int:
    """Computes what a forward and backward pass keeps on a rank: all blocks, and the logits."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    attention = shape["num_attention_heads"] * tokens
    block = tokens * 4 * (STORED * hidden + 5 * wide + 3 * attention)
    logits = 3 * tokens * 4 * shape["vocab_size"]
    return size * (shape["num_hidden_layers"] * block + logits)


def flops_of_refit(model: nn.Module, shape: dict[str, Any], tokens: int) -> tuple[float, float]:
    """Counts float32 operations of passes and sums, and float64 ones of all solutions."""
    number = sum(p.numel() for p in model.parameters())
    single, double = 2 * 2 * number * tokens, 0.0
    for layer in find_patch_layers(model).values():
        outputs, inputs = layer.weight.shape
        single += 2 * tokens * inputs * (inputs + 2 * outputs)
        # Two factors, their inverse and triangular solves; two solutions of all outputs; the sweep.
        double += 4 * inputs**3 + 4 * outputs * inputs**2 + 2 * outputs * inputs**2
    return single, double


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link", type=float, default=100.0, help="GB/s that a GPU sends (assumed)")
    parser.add_argument("--pace", type=float, default=30.0, help="TFLOP/s in float32 (assumed)")
    parser.add_argument("--double", type=float, default=10.0, help="TFLOP/s, float64 (assumed)")
    parser.add_argument("--column", type=float, default=100.0, help="us a column (assumed)")
    options = parser.parse_args()
    print(
        f"{GPUS} GPUs; assumed: {options.link:g} GB/s that each sends, {options.pace:g} TFLOP/s in "
        f"float32, {options.double:g} in float64, {options.column:g} us for a column of "
        "SparseGPT's sweep; measured: the decision's pace, scoring against forward and backward\n"
    )
    print(
        "| model | job | weights | GB of a GPU | of these activations | most in | GB sent | "
        "passes, s | on one GPU, s | sending, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        model = build(shape)
        total = sum(p.numel() for p in model.parameters())
        for file in ("llm_weights.toml", "llm_gradients.toml"):
            job, tokens = read(file)
            memory, phases = phases_of(job, model)
            number, size = job.prune.calibration_examples, job.prune.calibration_batch_size
            held = {key: phase.num_bytes for key, phase in phases.items()}
            own: dict[str, int] = dict.fromkeys(held, 0)
            alone = 0.0
            if "reconstruct" in held:
                passes, solving = of_refit(shape, number // GPUS, size, tokens)
                own["reconstruct"] = passes
                held["reconstruct"] += passes + solving
                single, double = flops_of_refit(model, shape, number * tokens)
                shared = single / GPUS / (options.pace * 1e12)
                columns = sum(layer.weight.shape[1] for layer in find_patch_layers(model).values())
                alone = double / (options.double * 1e12) + columns * options.column * 1e-6
            else:
                own["score"] = of_scoring(shape, size, tokens)
                held["score"] += own["score"]
                flops = 6 * total * number * tokens * SCORING_SHARE
                shared = flops / GPUS / (options.pace * 1e12)
            sent = sum(phase.sent_bytes for phase in phases.values()) / 1e9
            most = max(held, key=lambda key: held[key])
            decide_s = DECISION_S_PER_SCORE * memory.num_owned
            print(
                f"| {name} | {file} | {total / 1e9:.2f}e9 | {held[most] / 1e9:.1f} | "
                f"{own[most] / 1e9:.1f} | {most} | {sent:,.0f} | {shared:,.0f} | "
                f"{alone + decide_s:,.0f} | {sent / options.link:,.0f} |"
            )
    print("\n(GB sent by each GPU in the round; s: passes of all GPUs, then what one does alone)")


if __name__ == "__main__":
    main()
