"""What a recipe offers, in one table: trials that end alike among ranks, in shards and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from small_networks import (
    BlockNet,
    DrawnItems,
    GroupedNet,
    Remembering,
    draw,
    images,
    job_config,
    regression,
)
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole
from gbp_ray.pruning.checkpoint import SHARDS, Checkpoint
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.loading import hold_out, in_channels_last
from gbp_ray.workloads.networks import RecurrentConvNet
from gbp_ray.workloads.tying import tie_weights

DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {"epochs": 1, "batch_size": 15, "microbatches": 4},
    "finetune": {"epochs": 1, "batch_size": 15, "microbatches": 4},
    "prune": {
        "rounds": 2,
        "calibration_examples": 30,
        "calibration_batch_size": 7,
        "batchnorm_examples": 20,
    },
    "workload": {"eval_batch_size": 5},
}
EVERYTHING = {
    "label_smoothing": 0.1,
    "mixup": 0.4,
    "cutmix": 1.0,
    "max_gradient_norm": 0.5,
    "ema_decay": 0.8,
}
TAUGHT = {"optimizer": "adamw", "distillation": {"weight": 0.3}}
PGD = {"kind": "pgd", "epsilon": 0.02, "steps": 2}

World = tuple[int, str]
"""A number of ranks and a strategy."""
EVERYWHERE: tuple[World, ...] = (
    *((2, "replicated"), (3, "replicated"), (4, "replicated")),
    (4, "fsdp"),
)
WORLDS = (*EVERYWHERE, (2, "fsdp"))
FEWER: tuple[World, ...] = ((2, "replicated"), (3, "replicated"), (4, "fsdp"))
"""Where whole trials are run: even and uneven numbers of ranks, and shards."""


def ranged_images() -> Workload:
    return dataclasses.replace(images(), input_range=(-6.0, 6.0))


def plain_images() -> Workload:
    """Makes images that are not augmented, so that a teacher is asked once."""
    return dataclasses.replace(images(), augment=None)


def held_out_images() -> Workload:
    """Makes images of which every fourth for training is there to judge by."""
    return hold_out(images(num_train=60), 0.25, seed=2)


def images_for(build: Callable[[], nn.Module]) -> Callable[[], Workload]:
    return lambda: images(build)


def blank_net() -> nn.Module:
    """Builds the network in blocks without weights."""
    with torch.device("meta"):
        return BlockNet(is_tied=False)


def recurrent() -> nn.Module:
    """Uses each kernel twice; one of them, 12 x 12 x 9, is gathered twice in a pass."""
    return RecurrentConvNet(2, 3, 6, 2, True)


def tied_blank(*, is_tied: bool = True) -> nn.Module:
    """Ties kernels on the meta device."""
    with torch.device("meta"):
        model = RecurrentConvNet(2, 3, 6, 2, False)
    if is_tied:
        tie_weights(model, [["layer1.kernels.*"], ["layer2.kernels.*"]])
    return model


def noisy(inputs: Tensor) -> Tensor:
    return inputs + 0.01 * float(np.random.normal())


def remembering() -> Workload:
    """A network that writes buffers, on items that are drawn with each reading."""
    items = DrawnItems()
    return dataclasses.replace(
        regression(Remembering, *draw(2, 2, 3)), train=items, test=items, prepare=noisy
    )


@dataclasses.dataclass(frozen=True)
class Technique:
    """Sections of a job over `DEFAULTS`, its workload, and where else than alone it is tried."""

    sections: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    workload: Callable[[], Workload] = ranged_images
    worlds: tuple[World, ...] = ()


def _remembered(parts: int) -> Technique:
    recipe = {"batch_size": 7, "microbatches": parts}
    sections = {
        "pretrain": recipe,
        "finetune": recipe,
        "prune": {"rounds": 1, "calibration_examples": 9, "calibration_batch_size": 4},
        "workload": {"train_sample": 4},
    }
    return Technique(sections, remembering, EVERYWHERE)


def _everything(precision: str, worlds: tuple[World, ...], **prune: Any) -> Technique:
    recipe = {**EVERYTHING, "precision": precision}
    taught = {**recipe, **TAUGHT, "learning_rate": 0.003}
    return Technique({"pretrain": recipe, "finetune": taught, "prune": prune}, images, worlds)


TECHNIQUES: dict[str, Technique] = {
    "plain": Technique(worlds=FEWER),
    "movement, adam": Technique(
        {
            "prune": {"criterion": "movement", "rounds": 3},
            "finetune": {"optimizer": "adam", "learning_rate": 0.003, "epochs": 0.7},
        }
    ),
    "reconstructed": Technique(
        {"prune": {"reconstruct": "least_squares"}}, images_for(BlockNet), FEWER
    ),
    "chosen by sparsegpt": Technique(
        {"prune": {"reconstruct": "sparsegpt_least_squares", "reconstruct_positions": 5}},
        images_for(GroupedNet),
        FEWER,
    ),
    "chosen by sparsegpt, 2:4, rewound": Technique(
        {
            "prune": {
                "reconstruct": "sparsegpt",
                "granularity": "2:4",
                "sparsity": 0.5,
                "exclude": ["conv1.weight"],
                "rewind": "weights",
            }
        },
        images,
        ((3, "replicated"), (2, "fsdp")),
    ),
    "weights rewound": Technique({"prune": {"rewind": "weights"}}),
    "learning rate rewound": Technique(
        {"prune": {"rewind": "learning_rate", "schedule": "cubic", "rounds": 3}}
    ),
    "fine-tuned at the end": Technique(
        {"prune": {"rounds": 3, "reconstruct": "least_squares"}, "finetune": {"after": "last"}},
        images_for(BlockNet),
        ((2, "replicated"),),
    ),
    "channels last, narrow passes": Technique(
        {
            "workload": {"eval_precision": "bfloat16"},
            "prune": {"criterion": "taylor_squared", "calibration_precision": "bfloat16"},
        },
        lambda: in_channels_last(images()),
        FEWER,
    ),
    "one shot": Technique({"prune": {"schedule": "one_shot", "rounds": 3}}),
    "sparse early": Technique({"prune": {"ramp_rounds": 2, "rounds": 3}}),
    "taught by each pass": Technique({"finetune": {"distillation": {"weight": 0.8}}}),
    "taught once": Technique({"finetune": {"distillation": {"weight": 0.7}}}, plain_images, FEWER),
    "stopped early": Technique(
        {
            "finetune": {"epochs": 3.0, "patience": 1, "validate_every": 0.5},
            "workload": {"validation": 0.25, "train_sample": 20},
        },
        held_out_images,
    ),
    "attacked, frozen, matched": Technique(
        {
            "pretrain": {
                "freeze": ["conv1.*", "norm1.*"],
                "adversarial": {"kind": "fgsm", "epsilon": 0.02, "weight": 0.5},
            },
            "finetune": {
                "adversarial": PGD,
                "freeze": ["conv2.*"],
                "distillation": {"weight": 0.3, "features": ["norm1", "conv2"]},
            },
            "attack": {**PGD, "steps": 3, "examples": 18},
        },
        worlds=FEWER,
    ),
    "remembered": _remembered(parts=1),
    "remembered in parts": _remembered(parts=3),
    "everything": _everything("float32", ((2, "replicated"), (4, "fsdp"))),
    "everything in bfloat16": _everything(
        "bfloat16", ((4, "replicated"), (2, "fsdp")), rewind="weights"
    ),
    "in blocks": Technique({"finetune": TAUGHT}, images_for(BlockNet)),
    "in blocks, blank": Technique({"finetune": TAUGHT}, images_for(blank_net), ((2, "fsdp"),)),
    "in blocks, fisher, rewound": Technique(
        {"finetune": TAUGHT, "prune": {"criterion": "fisher", "rewind": "weights"}},
        images_for(BlockNet),
        ((2, "fsdp"),),
    ),
    "in blocks, movement": Technique(
        {
            "finetune": TAUGHT,
            "prune": {"criterion": "movement", "exclude": ("blocks.4.second.weight",)},
        },
        images_for(BlockNet),
        ((2, "fsdp"),),
    ),
    "tied": Technique(
        {"finetune": TAUGHT, "prune": {"criterion": "fisher"}},
        images_for(recurrent),
        ((2, "replicated"), (2, "fsdp")),
    ),
    "tied, blank": Technique({"finetune": TAUGHT}, images_for(tied_blank), ((2, "fsdp"),)),
}


def case_of(
    name: str, strategy: str = "replicated", **more: Mapping[str, Any]
) -> tuple[JobConfig, Workload]:
    """Makes the job of a technique, with sections of its own over it, and its workload."""
    technique = TECHNIQUES[name]
    layers = (DEFAULTS, technique.sections, more, {"cluster": {"strategy": strategy}})
    sections: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, fields in layer.items():
            sections[section] = {**sections.get(section, {}), **fields}
    return job_config(**sections), technique.workload()


def rounds_of(
    name: str,
    ranks: Ranks,
    strategy: str = "replicated",
    resume: Checkpoint | None = None,
    build: Callable[[], nn.Module] | None = None,
    *,
    with_files: bool = True,
) -> list[dict[str, Any]]:
    """Runs a technique; reports of each round its figures, mask, weights and all ranks' files."""
    job, workload = case_of(name, strategy)
    if build is not None:
        workload = dataclasses.replace(workload, build_model=build)
    found = []
    for state in run_rounds(job, workload, ranks, resume=resume):
        report = {
            "record": state.record.model_dump(exclude={"seconds"}),
            "mask": state.masks.digest,
            "weights": digest(state.model.state_dict()),
        }
        if with_files:
            parts = ranks.all_gather_objects({n: bytes(d) for n, d in state.to_files().items()})
            report["files"] = {n: d for part in reversed(parts) for n, d in part.items()}
        found.append(report)
    return found


def without_files(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in report.items() if k != "files"} for report in rounds]


def checkpoint_of(rounds: list[dict[str, Any]], number: int) -> Checkpoint:
    """Takes a round's files as a trial that goes on finds them."""
    files = rounds[number]["files"]
    return Checkpoint(
        round=number,
        masks=files["masks.safetensors"],
        weights=files["weights.safetensors"],
        state=files.get("state.pt", b""),
        shards={n.removeprefix(SHARDS): d for n, d in files.items() if n.startswith(SHARDS)},
        dense_weights=rounds[0]["files"]["weights.safetensors"],
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hashes names and bytes, of shards the whole: equal digests mean equal bits."""
    hashed = hashlib.sha256()
    for name, tensor in tensors.items():
        whole = gather_whole(tensor.detach()).contiguous()
        hashed.update(name.encode() + whole.numpy().tobytes())
    return hashed.hexdigest()
