"""What models of 10^8 to 10^11 weights would take of each GPU: by the planner, without such GPUs.

    python tests/benchmarks/large_models.py

A stack of residual linear blocks is laid out on the meta device, which holds nothing, and goes
through the very planner of `--dry-run`, with activations left out, since they depend on the
examples. FSDP2, taylor, 32 calibration batches, AdamW, a part of
each batch for each GPU. Of the GPUs as many as
keep the peak within the given share of their memory, a power of two.

Times are made of three numbers: the measured pace of a decision (README.md, "Decision"), and
an assumed link and an assumed pace of arithmetic, both named in the output; the cost of scoring
against forward and backward is the measured one (README.md, "Scoring").
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sharded_memory import INPUTS, BlockNet

from gbp_ray.config.job import JobConfig
from gbp_ray.runtime.memory import Memory, Phase
from gbp_ray.training.footprint import Footprint
from gbp_ray.workloads.contract import Workload

MODELS = ((10**8, 12), (10**9, 24), (10**10, 40), (10**11, 80))
"""Weights, and blocks that FSDP2 gathers one at a time, as language models of that size have."""
BATCH, NUM_BATCHES, TOKENS = 64, 32, 1024
DECISION_S_PER_SCORE = 0.3 / 1e8
"""Measured on two x86-64 cores, the slow end: 0.1 to 0.3 s for 10^8 scores."""
SCORING_SHARE = 0.91
"""Measured: taylor against a forward and a backward pass."""


class WithoutActivations(Memory):
    """The sizes of a network too large to run here; its passes are left out."""

    def _run_forward(self, size: int) -> None:
        """Run nothing."""

    def _measure(self, run: object) -> Footprint:
        return Footprint(((0, 0),))

    def _measure_scoring(self) -> Footprint:
        # The sum and the scores of all weights, and what finishing one layer takes.
        largest = max(unit.parameter.numel() for unit in self._units)
        return Footprint(((12 * self.num_prunable + 24 * largest, 0),))


def plan(blocks: int, width: int, num_gpus: int) -> tuple[Memory, dict[str, Phase]]:
    with torch.device("meta"):
        model = BlockNet(blocks, width)
    examples, batch = BATCH * NUM_BATCHES, max(BATCH, num_gpus)
    data = (torch.zeros(examples, INPUTS), torch.zeros(examples, dtype=torch.int64))
    workload = Workload(build_model=lambda: model, train=data, test=data)
    job = JobConfig.model_validate(
        {
            "name": "large",
            "workload": {"factory": "large_models:nothing"},
            "prune": {
                "criterion": "taylor",
                "sparsity": 0.5,
                "calibration_examples": examples,
                "calibration_batch_size": BATCH,
            },
            # One step, of which each GPU takes one part.
            "finetune": {
                "epochs": batch / examples,
                "optimizer": "adamw",
                "batch_size": batch,
                "microbatches": num_gpus,
            },
            "cluster": {"num_workers": num_gpus, "strategy": "fsdp"},
        }
    )
    memory = WithoutActivations(job, workload, model, is_blank=True)
    return memory, {phase.name: phase for phase in memory.phases()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=80.0, help="of a GPU, GB")
    parser.add_argument("--share", type=float, default=0.6, help="of it for all but activations")
    parser.add_argument("--link", type=float, default=25.0, help="GB/s that a GPU sends (assumed)")
    parser.add_argument("--pace", type=float, default=100.0, help="TFLOP/s of a GPU (assumed)")
    options = parser.parse_args()
    print(
        f"{options.memory:g} GB a GPU, {options.share:.0%} of it for all but activations; assumed "
        f"{options.link:g} GB/s sent and {options.pace:g} TFLOP/s a GPU; a round scores "
        f"{NUM_BATCHES} batches of {BATCH} sequences of {TOKENS} tokens\n"
    )
    print("| weights | GPUs | score | decide | finetune | write | stored a round |")
    print("|---|---|---|---|---|---|---|")
    lines = []
    for number, blocks in MODELS:
        width = round((number / blocks / 4) ** 0.5)
        num_gpus = 1
        while True:
            num_gpus *= 2
            memory, phases = plan(blocks, width, num_gpus)
            if max(phase.num_bytes for phase in phases.values()) <= (
                options.memory * options.share * 1e9
            ):
                break
        total = memory.num_prunable
        held = " | ".join(
            f"{phases[name].num_bytes / 1e9:.1f}"
            for name in ("score", "decide", "finetune", "write")
        )
        stored = memory.stored_bytes(has_optimizer=True) / 1e9
        print(f"| {total:.1e} | {num_gpus} | {held} | {stored:,.1f} |")
        flops = 6 * total * NUM_BATCHES * BATCH * TOKENS * SCORING_SHARE
        score_s = flops / (options.pace * 1e12) / num_gpus
        decide_s = DECISION_S_PER_SCORE * memory.num_owned
        sent = [phases[name].sent_bytes / 1e9 for name in ("score", "decide", "finetune")]
        gathered = (num_gpus - 1) * 4 * memory.num_owned / 1e9
        lines.append(
            f"| {total:.1e} | {sent[0]:,.1f} | {sent[1]:.3f} | {gathered:,.1f} | {sent[2]:,.1f} | "
            f"{score_s:,.1f} | {sent[0] / options.link:,.1f} | "
            f"{decide_s + sent[1] / options.link:.2f} | {sent[2] / options.link:,.1f} |"
        )
    print("\n(GB of memory of each GPU; stored: GB over all)\n")
    print(
        "| weights | score sends | decide sends | gathering the scores would | a step sends | "
        "scoring, s | its sending, s | deciding, s | a step's sending, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    print("\n(GB sent by each GPU in a round, and in a training step)")


if __name__ == "__main__":
    main()
