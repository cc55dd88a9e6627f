"""Networks of six kinds with data of their own shapes, and plain loops that measure them.

Each function that makes a workload is all that a user writes for such a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from small_networks import draw, job_config
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.evaluation import evaluate
from gbp_ray.workloads import digits_regression, digits_segmentation, text_lm
from gbp_ray.workloads.contract import Workload

NUM_TRAIN, NUM_TEST = 26, 17
NUM_WORDS, WIDTH = 13, 8


@dataclass
class Output:
    """What networks of transformers give."""

    logits: Tensor
    loss: Tensor | None = None


def sentences(number: int, seed: int) -> list[Tensor]:
    """Draws sequences of 2 to 9 words; 0 is no word."""
    lengths = draw(number, seed=seed).abs().mul(9).long().remainder(8) + 2
    words = draw(number, 9, seed=seed + 1).mul(50).long().abs().remainder(NUM_WORDS - 1) + 1
    return [row[:length] for row, length in zip(words, lengths.tolist(), strict=True)]


# -- a classifier of padded sentences, whose outputs carry their loss ------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Output:
        seen = self.layer(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        logits = self.head((seen * attention_mask.unsqueeze(2)).sum(dim=1))
        return Output(logits, None if labels is None else functional.cross_entropy(logits, labels))


def classifier() -> Workload:
    def items(number: int, seed: int) -> list[dict[str, Any]]:
        return [{"input_ids": s, "labels": int(s.sum()) % 3} for s in sentences(number, seed)]

    def pad(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        words = pad_sequence([item["input_ids"] for item in some], batch_first=True)
        labels = torch.tensor([item["labels"] for item in some])
        return {"input_ids": words, "attention_mask": (words != 0).long(), "labels": labels}

    return Workload(Encoder, items(NUM_TRAIN, 1), items(NUM_TEST, 3), collate=pad)


def measure_classifier(model: nn.Module, workload: Workload) -> dict[str, float]:
    logits = [
        model(s["input_ids"][None], torch.ones(1, len(s["input_ids"]))).logits[0]
        for s in workload.test
    ]
    labels = [item["labels"] for item in workload.test]
    losses = [
        float(functional.cross_entropy(o, torch.tensor(y)))
        for o, y in zip(logits, labels, strict=True)
    ]
    right = [int(o.argmax()) == y for o, y in zip(logits, labels, strict=True)]
    return {"accuracy": sum(right) / NUM_TEST, "loss": sum(losses) / NUM_TEST}


# -- a language model, whose loss is a mean over words that follow another -------------------------


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, WIDTH)
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, NUM_WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(self.cell(self.words(input_ids))[0])
        if labels is None:
            return Output(logits)
        shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return Output(logits, functional.cross_entropy(*shifted))


def language_model() -> Workload:
    def pad(some: list[Tensor]) -> dict[str, Tensor]:
        words = pad_sequence(some, batch_first=True)
        return {"input_ids": words, "labels": words.where(words != 0, -100)}

    return Workload(
        Reader,
        sentences(NUM_TRAIN, 5),
        sentences(NUM_TEST, 7),
        collate=pad,
        count=lambda batch: (batch["labels"][:, 1:] != -100).sum(),
        metrics=["perplexity"],
    )


def measure_language_model(model: nn.Module, workload: Workload) -> dict[str, float]:
    surprises = []
    for sentence in workload.test:
        shares = model(sentence[None]).logits[0].double().log_softmax(dim=1)
        surprises += [-float(shares[t, word]) for t, word in enumerate(sentence[1:].tolist())]
    mean = sum(surprises) / len(surprises)
    return {"perplexity": math.exp(mean), "loss": mean}


# -- segmentation with ignored pixels --------------------------------------------------------------


def segmentation() -> Workload:
    def split(number: int, seed: int) -> tuple[Tensor, Tensor]:
        images = draw(number, 2, 6, 6, seed=seed)
        labels = (images.sum(dim=1) > 0).long() + (images[:, 0] > 1).long()
        labels[:, 0] = 255
        labels[::5] = 255
        return images, labels

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )

    loss = partial(functional.cross_entropy, ignore_index=255)
    return Workload(
        build, split(NUM_TRAIN, 11), split(NUM_TEST, 12), loss, metrics=["mIoU", "accuracy"]
    )


def measure_segmentation(model: nn.Module, workload: Workload) -> dict[str, float]:
    images, labels = prepared_test(workload)
    answers, losses, pairs = model(images).argmax(dim=1), [], []
    shares = model(images).double().log_softmax(dim=1)
    for place in (labels != 255).nonzero().tolist():
        example, row, column = place
        label = int(labels[example, row, column])
        pairs.append((int(answers[example, row, column]), label))
        losses.append(-float(shares[example, label, row, column]))
    overlaps = []
    for kind in range(shares.shape[1]):
        union = [pair for pair in pairs if kind in pair]
        if union:
            overlaps.append(sum(pair == (kind, kind) for pair in union) / len(union))
    return {
        "mIoU": sum(overlaps) / len(overlaps),
        "accuracy": sum(answer == label for answer, label in pairs) / len(pairs),
        "loss": sum(losses) / len(losses),
    }


# -- regression, several labels --------------------------------------------------------------------


def build_layers(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, outputs))


def regression() -> Workload:
    def split(number: int, seed: int) -> tuple[Tensor, Tensor]:
        inputs = draw(number, 5, seed=seed)
        return inputs, torch.stack([inputs.sum(dim=1), 3 + inputs[:, 0].square()], dim=1)

    data = split(NUM_TRAIN, 21), split(NUM_TEST, 22)
    return Workload(build_layers(2), *data, functional.mse_loss, metrics=["rmse", "r2", "mae"])


def measure_regression(model: nn.Module, workload: Workload) -> dict[str, float]:
    inputs, targets = prepared_test(workload)
    found, wanted = model(inputs).double(), targets.double()
    loss = float((found - wanted).square().mean())
    unexplained = [
        float(
            ((found - wanted)[:, c] ** 2).sum() / ((wanted[:, c] - wanted[:, c].mean()) ** 2).sum()
        )
        for c in range(wanted.shape[1])
    ]
    measured = {
        "rmse": math.sqrt(loss),
        "r2": 1 - sum(unexplained) / len(unexplained),
        "mae": float((found - wanted).abs().mean()),
    }
    return {"loss": loss, **{name: measured[name] for name in workload.metrics}}


def many_labels() -> Workload:
    def split(number: int, seed: int) -> tuple[Tensor, Tensor]:
        inputs = draw(number, 5, seed=seed)
        return inputs, (inputs[:, :3] > 0.3).float()

    data = split(NUM_TRAIN, 31), split(NUM_TEST, 32)
    loss = functional.binary_cross_entropy_with_logits
    return Workload(build_layers(3), *data, loss, metrics=["f1"])


def measure_many_labels(model: nn.Module, workload: Workload) -> dict[str, float]:
    inputs, targets = workload.test
    shares = model(inputs).double().sigmoid()
    both = found = wanted = 0
    loss = 0.0
    for share, label in zip(shares.flatten().tolist(), targets.flatten().tolist(), strict=True):
        both += share > 0.5 and label == 1
        found += share > 0.5
        wanted += label == 1
        loss -= math.log(share if label else 1 - share)
    return {"f1": 2 * both / (found + wanted), "loss": loss / targets.numel()}


# -- a tagger that packs sequences of different lengths --------------------------------------------


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, WIDTH)
        self.cell = nn.LSTM(WIDTH, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.words(words), lengths, batch_first=True, enforce_sorted=False
        )
        outputs, _ = pad_packed_sequence(self.cell(packed)[0], batch_first=True)
        return self.head(outputs).movedim(2, 1)


def tagger() -> Workload:
    def pad(some: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        words = pad_sequence(some, batch_first=True)
        lengths = torch.tensor([len(sentence) for sentence in some])
        return {"words": words, "lengths": lengths}, (words % 3).where(words != 0, -100)

    return Workload(
        Tagger,
        sentences(NUM_TRAIN, 41),
        sentences(NUM_TEST, 43),
        collate=pad,
        forward=lambda model, batch: model(**batch[0]),
    )


def measure_tagger(model: nn.Module, workload: Workload) -> dict[str, float]:
    right, losses = [], []
    for sentence in workload.test:
        shares = model(sentence[None], torch.tensor([len(sentence)]))[0].double().log_softmax(dim=0)
        for place, word in enumerate(sentence.tolist()):
            right.append(int(shares[:, place].argmax()) == word % 3)
            losses.append(-float(shares[word % 3, place]))
    return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


# -- what is built in ------------------------------------------------------------------------------


def few(workload: Workload) -> Workload:
    """Keeps the first examples of each split."""

    def first(split: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, Tensor]:
        return split[0][:number], split[1][:number]

    given = workload.validation
    return replace(
        workload,
        train=first(workload.train, NUM_TRAIN),
        test=first(workload.test, NUM_TEST),
        validation=None if given is None else first(given, NUM_TEST),
    )


def prepared_test(workload: Workload) -> tuple[Tensor, Tensor]:
    inputs, targets = workload.test
    return inputs if workload.prepare is None else workload.prepare(inputs), targets


def bytes_of_text() -> Workload:
    return few(text_lm(width=16, layers=1, heads=2, context=12))


def measure_bytes(model: nn.Module, workload: Workload) -> dict[str, float]:
    losses, right = [], []
    for window, following in zip(*workload.test, strict=True):
        shares = model(window[None])[0].double().log_softmax(dim=0)
        for place, value in enumerate(following.tolist()):
            losses.append(-float(shares[value, place]))
            right.append(int(shares[:, place].argmax()) == value)
    mean = sum(losses) / len(losses)
    return {"perplexity": math.exp(mean), "accuracy": sum(right) / len(right), "loss": mean}


KINDS: dict[
    str, tuple[Callable[[], Workload], Callable[[nn.Module, Workload], dict[str, float]]]
] = {
    "classifier": (classifier, measure_classifier),
    "language model": (language_model, measure_language_model),
    "segmentation": (segmentation, measure_segmentation),
    "regression": (regression, measure_regression),
    "many labels": (many_labels, measure_many_labels),
    "tagger": (tagger, measure_tagger),
    "text_lm": (bytes_of_text, measure_bytes),
    "digits_segmentation": (
        lambda: few(digits_segmentation(examples=NUM_TRAIN, width=4)),
        measure_segmentation,
    ),
    "digits_regression": (
        lambda: few(digits_regression(examples=4 * NUM_TRAIN, width=4)),
        measure_regression,
    ),
}


def job_of(**cluster: Any) -> JobConfig:
    training = {"epochs": 1, "batch_size": 10, "optimizer": "adam", "learning_rate": 0.01}
    return job_config(
        pretrain={**training, "microbatches": 3},
        finetune={**training, "microbatches": 2},
        prune={
            "sparsity": 0.6,
            "rounds": 1,
            "calibration_examples": 18,
            "calibration_batch_size": 5,
            "batchnorm_examples": 20,
        },
        workload={"eval_batch_size": 7},
        cluster=cluster,
    )


def outcome(name: str, ranks: Ranks, strategy: str = "replicated") -> list[dict[str, Any]]:
    """Prunes a network of some kind; see `outcome_of`."""
    return outcome_of(KINDS[name][0](), ranks, strategy)


def outcome_of(workload: Workload, ranks: Ranks, strategy: str) -> list[dict[str, Any]]:
    """Prunes a network; returns each round's figures, mask and weights."""
    job = job_of(strategy=strategy)
    found = []
    for state in run_rounds(job, workload, ranks):
        measured = evaluate(state.model, workload, ranks, 7)
        weights = {n: gather_whole(t.detach()).clone() for n, t in state.model.named_parameters()}
        found.append(
            {
                "measured": {**measured.metrics, "loss": measured.loss},
                "record": state.record.model_dump(exclude={"seconds"}),
                "mask": state.masks.digest,
                "weights": weights,
                "state": {
                    n: gather_whole(t.detach()).clone() for n, t in state.model.state_dict().items()
                },
            }
        )
    return found


def any_program(ranks: Ranks) -> dict[tuple[str, str], Any]:
    """Runs every kind in one piece and in shards."""
    return {
        (name, strategy): outcome(name, ranks, strategy)
        for name in KINDS
        for strategy in ("replicated", "fsdp")
    }
