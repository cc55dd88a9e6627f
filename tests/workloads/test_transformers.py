"""Models of Hugging Face's, pruned and measured as by a plain loop over unpadded examples."""

from __future__ import annotations

import json
import math
import sys
from functools import partial

import pyarrow as pa
import pytest
import torch
from any_networks import job_of, outcome_of
from hub_models import WORDS, write_models
from pyarrow import csv, parquet
from rank_program import reports_of_world
from small_data import message_of
from torch.nn import functional

from gbp_ray.config.job import load_job
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.evaluation import evaluate
from gbp_ray.workloads import huggingface
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.images import import_vision
from gbp_ray.workloads.transformers import _Windows


@pytest.fixture(scope="module")
def library():
    import_vision("models")
    return pytest.importorskip("transformers", reason="needs the extra hf, which is not installed")


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
    """A tokenizer by the word and tiny models of BERT and of Llama, with data for them."""
    place = tmp_path_factory.mktemp("hub")
    write_models(place)
    for split, count in (("train", 26), ("test", 17)):
        rows = [
            {
                "words": (found := [WORDS[(i * 7 + k * k) % 20] for k in range(2 + i % 5)]),
                "text": " ".join(found),
                "label": "odd" if i % 2 else "even",
                "score": len(found) / 3,
                "several": [i % 2, int(len(found) > 3), 1],
                "tags": [int(word[1:]) % 3 for word in found],
            }
            for i in range(count)
        ]
        lines = "\n".join(map(json.dumps, rows))
        (place / "data").mkdir(exist_ok=True)
        (place / "data" / f"{split}.jsonl").write_text(lines)
        text = " ".join(" ".join(row["words"]) for row in rows * 3)
        (place / "data" / f"{split}.txt").write_text(text)
    return place


def shares_of(model, item):
    return model(input_ids=item["input_ids"][None]).logits.double().log_softmax(dim=-1)[0]


def f1_of(answers, labels):
    """The mean of the classes' own, of lists."""
    values = []
    for kind in set(answers) | set(labels):
        both = sum(a == b == kind for a, b in zip(answers, labels, strict=True))
        values.append(2 * both / (answers.count(kind) + labels.count(kind)))
    return sum(values) / len(values)


def measure_labels(model, workload, shift=0):
    losses, answers, labels = [], [], []
    for index in range(len(workload.test)):
        batch = take_batch(workload, workload.test, torch.tensor([index])).inputs
        item = {name: tensor[0] for name, tensor in batch.items()}
        shares = shares_of(model, item)
        for place, label in enumerate(item["labels"].tolist()):
            if label != -100 and place >= shift:
                losses.append(-float(shares[place - shift, label]))
                answers.append(int(shares[place - shift].argmax()))
                labels.append(label)
    mean, right = sum(losses) / len(losses), [a == b for a, b in zip(answers, labels, strict=True)]
    return {
        "perplexity": math.exp(mean),
        "accuracy": sum(right) / len(right),
        "f1": f1_of(answers, labels),
        "loss": mean,
    }


def measure_next(model, workload):
    return measure_labels(model, workload, shift=1)


def measure_classes(model, workload):
    logits = torch.cat([model(i["input_ids"][None]).logits for i in workload.test])
    labels = torch.stack([item["labels"] for item in workload.test])
    loss = float(functional.cross_entropy(logits.double(), labels))
    answers = logits.argmax(dim=1)
    right = float((answers == labels).double().mean())
    return {"accuracy": right, "f1": f1_of(answers.tolist(), labels.tolist()), "loss": loss}


def measure_numbers(model, workload):
    found = torch.cat([model(i["input_ids"][None]).logits for i in workload.test]).double()
    wanted = torch.stack([item["labels"] for item in workload.test]).double()
    loss = float((found - wanted).square().mean())
    spread = float((wanted - wanted.mean()).square().mean())
    return {"rmse": math.sqrt(loss), "r2": 1 - loss / spread, "loss": loss}


def measure_several(model, workload):
    found = torch.cat([model(i["input_ids"][None]).logits for i in workload.test]).double()
    wanted = torch.stack([item["labels"] for item in workload.test]).double()
    loss = float(functional.binary_cross_entropy(found.sigmoid(), wanted))
    both = int(((found > 0) & (wanted > 0)).sum())
    return {"f1": 2 * both / int((found > 0).sum() + wanted.sum()), "loss": loss}


CASES = {
    "causal_lm": ("llama", {"max_length": 12}, measure_next),
    "masked_lm": ("bert", {"max_length": 12}, measure_labels),
    "token_classification": ("bert", {"text": "words", "label": "tags"}, measure_labels),
    "sequence_classification": ("bert", {}, measure_classes),
    "sequence_classification of numbers": ("bert", {"label": "score"}, measure_numbers),
    "sequence_classification of several": ("bert", {"label": "several"}, measure_several),
}


def workload_of(folder, case):
    name, options, _ = CASES[case]
    options = {"max_length": 16, "data": str(folder / "data"), **options}
    return huggingface(str(folder / name), case.partition(" ")[0], **options)


@pytest.mark.filterwarnings("ignore:.*has no such weights, so they are drawn")
@pytest.mark.parametrize("case", CASES)
def test_dense_and_pruned_are_measured_as_by_a_plain_loop(folder, case):
    workload, measure = workload_of(folder, case), CASES[case][2]
    masks = set()
    for state in run_rounds(job_of(), workload, Ranks()):
        masks.add(state.masks.digest)
        with torch.no_grad():
            expected = measure(state.model.eval(), workload)
        for size in (1, 7, 100):
            found = evaluate(state.model, workload, Ranks(), size)
            assert len(found.metrics) == len(workload.metrics)
            for key, value in {**found.metrics, "loss": found.loss}.items():
                assert value == pytest.approx(expected[key], rel=1e-6), (key, size)
    assert len(masks) == 2


SPREAD = [
    (case, strategy)
    for case in ("causal_lm", "masked_lm", "token_classification")
    for strategy in ("replicated", "fsdp")
]


def program(folder, ranks):
    return {key: outcome_of(workload_of(folder, key[0]), ranks, key[1]) for key in SPREAD}


@pytest.mark.filterwarnings("ignore:.*has no such weights, so they are drawn")
def test_two_ranks_prune_to_the_same_bits(folder, tmp_path):
    alone = {case: outcome_of(workload_of(folder, case), Ranks(), "replicated") for case in CASES}
    for report in reports_of_world(2, tmp_path, partial(program, folder)):
        for (case, strategy), rounds in report.items():
            for found, expected in zip(rounds, alone[case], strict=True):
                assert found["mask"] == expected["mask"], (case, strategy)
                assert found["measured"] == expected["measured"], (case, strategy)


def test_weights_are_those_of_the_folder_and_drawn_ones_are_named(library, folder):
    options = {"data": str(folder / "data"), "max_length": 16}
    known = library.BertForMaskedLM.from_pretrained(folder / "bert").state_dict()
    model = huggingface(str(folder / "bert"), "masked_lm", **options).build_model()
    assert all(torch.equal(tensor, known[n]) for n, tensor in model.state_dict().items())
    workload = huggingface(str(folder / "bert"), "sequence_classification", **options)
    with pytest.warns(UserWarning, match=r"they are drawn: .*classifier\.weight"):
        model = workload.build_model()
    assert model.config.id2label == {0: "even", 1: "odd"}
    assert model.config.label2id == {"even": 0, "odd": 1}
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(model.state_dict()[name], known[name])
    model = huggingface(str(folder / "bert"), "masked_lm", **options, pretrained=False)
    assert not torch.equal(model.build_model().state_dict()[name], known[name])


def test_tables_come_in_many_ways(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").open()]
    rows = [{"text": row["text"], "label": row["label"]} for row in rows]
    table = pa.Table.from_pylist(rows)
    for split in ("train", "validation"):
        for name, write in (("csv", csv.write_csv), ("parquet", parquet.write_table)):
            (tmp_path / name).mkdir(exist_ok=True)
            write(table, tmp_path / name / f"{split}.{name}")
    datasets = pytest.importorskip("datasets", reason="needs the extra hf, which is not installed")
    saved = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "saved")
    for name in ("csv", "parquet", "saved"):
        workload = huggingface(
            str(folder / "bert"), "sequence_classification", str(tmp_path / name), max_length=16
        )
        assert workload.classes == ("even", "odd")
        assert workload.validation is None
        for split in (workload.train, workload.test):
            assert [int(item["labels"]) for item in split] == [i % 2 for i in range(26)]
            words = [int(word[1:]) for word in rows[3]["text"].split()]
            assert split[3]["input_ids"].tolist() == [5 + word for word in words]


def test_masks_of_words_differ_between_passes_and_not_between_evaluations(folder):
    workload = huggingface(
        str(folder / "bert"), "masked_lm", data=str(folder / "data"), max_length=32
    )
    few = torch.arange(2)
    plain, again = (take_batch(workload, workload.train, few).inputs for _ in range(2))
    drawn = take_batch(workload, workload.train, few, augment_seed=3).inputs
    assert torch.equal(plain["input_ids"], again["input_ids"])
    assert not torch.equal(plain["labels"], drawn["labels"])
    asked = plain["labels"] != -100
    whole = plain["labels"].where(asked, plain["input_ids"])
    assert set(whole[:, 0].tolist()) == {2}
    assert set(whole[:, -1].tolist()) == {3}
    assert int(whole[:, 1:-1].min()) >= 5


def test_as_many_words_are_masked_each_time():
    data = _Windows(torch.randint(5, 50, (6, 30)), (2, 3), 4, 50)
    workload = Workload(torch.nn.Identity, data, data)
    masked = [
        take_batch(workload, data, torch.arange(6), augment_seed=seed).inputs["labels"] != -100
        for seed in (None, 0, 1)
    ]
    assert not torch.equal(masked[0], masked[1])
    # 15 % of 30 words, rounded.
    assert {int(number) for found in masked for number in found.sum(dim=1)} == {4}


def test_what_cannot_be_used_is_refused_in_one_line(folder, tmp_path):
    def refused(model="bert", task="sequence_classification", **options):
        options = {"data": str(folder / "data"), "max_length": 16, **options}
        return message_of(huggingface, str(folder / model), task, **options)

    assert "did you mean 'causal_lm'?" in refused(task="causal")
    assert "max_length = 100: " in refused(max_length=100)
    assert "has 64 positions; lower it" in refused(max_length=100)
    assert "'train' has no column 'lable' with values (there: words, text" in refused(label="lable")
    assert "data: is required by" in refused(data=None)
    assert "has no token for a mask" in refused("llama", "masked_lm")
    assert "less than a window of 14" in refused("bert", "masked_lm", data=write(tmp_path, "w1 w2"))
    assert "options.pretrained = 'no': must be true or false" in refused(pretrained="no")
    rows = ['{"text": ["w1", "w2"], "label": ["a", "b"]}', '{"text": ["w1"], "label": ["a", "b"]}']
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    text = refused(task="token_classification", data=str(tmp_path))
    assert "example 1 of 'train' has 1 words and 2 labels" in text
    assert "nor one for the end" in refused("llama")
    (tmp_path / "odd").mkdir()
    assert f"options.model = '{tmp_path / 'odd'}': cannot be loaded" in message_of(
        huggingface, str(tmp_path / "odd"), "causal_lm"
    )


def write(folder, text):
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text(text)
    return str(folder)


def test_code_that_a_folder_brings_along_runs_only_if_asked_by_name(folder, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "own.py").write_text("raise RuntimeError('it ran')\n")
    config = json.loads((folder / "llama" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (odd / "config.json").write_text(json.dumps(config))
    text = message_of(huggingface, str(odd), "causal_lm")
    assert "brings code of its own (own.OwnConfig)" in text
    assert "trust_remote_code = true" in text
    assert "it ran" in message_of(huggingface, str(odd), "causal_lm", trust_remote_code=True)


REFITS = {
    "weights": {"criterion": "fisher", "reconstruct": "least_squares"},
    "2:4": {
        "criterion": "wanda",
        "granularity": "2:4",
        "sparsity": 0.5,
        "reconstruct": "sparsegpt_least_squares",
    },
    "units": {
        "criterion": "fisher",
        "granularity": "channel+head",
        "sparsity": 0.4,
        "reconstruct": "least_squares",
    },
}


def refitted(folder, strategy, ranks):
    """Prunes and refits a language model in each way, without training."""
    found = {}
    for name, prune in REFITS.items():
        job = load_job(
            job_of(strategy=strategy),
            {
                "pretrain.epochs": 0,
                "finetune.epochs": 0,
                "prune.exclude": ["model.embed_tokens.*"],
                **{f"prune.{key}": value for key, value in prune.items()},
            },
        )
        (*_, state) = run_rounds(job, workload_of(folder, "causal_lm"), ranks)
        weights = {n: gather_whole(t.detach()).clone() for n, t in state.model.named_parameters()}
        found[name] = (state.masks.digest, state.record.score, weights)
    return found


def test_sharded_language_models_are_refitted_to_the_same_bits(folder, tmp_path):
    alone = refitted(folder, "replicated", Ranks())
    for size in (2, 4):
        (place := tmp_path / str(size)).mkdir()
        for report in reports_of_world(size, place, partial(refitted, folder, "fsdp")):
            for name, (digest, score, weights) in report.items():
                assert (digest, score) == alone[name][:2], (size, name)
                for key, tensor in weights.items():
                    assert torch.equal(tensor, alone[name][2][key]), (size, name, key)


@pytest.mark.parametrize("case", ["causal_lm", "masked_lm"])
def test_training_is_the_same_where_blocks_are_computed_again(folder, library, case, monkeypatch):
    name, options, _ = CASES[case]
    layer, are_again = library.GradientCheckpointingLayer, []
    plain_call = layer.__call__

    def call(self, *given, **named):
        are_again.append(self.gradient_checkpointing and self.training)
        return plain_call(self, *given, **named)

    monkeypatch.setattr(layer, "__call__", call)
    ended = []
    for asked in (False, True):
        made = partial(huggingface, str(folder / name), case, data=str(folder / "data"), **options)
        are_again.clear()
        (*_, state) = outcome_of(made(gradient_checkpointing=asked), Ranks(), "replicated")
        assert any(are_again) == asked
        ended.append(state)
    plain, again = ended
    assert plain["measured"] == again["measured"]
    assert plain["weights"].keys() == again["weights"].keys()
    assert all(torch.equal(tensor, again["weights"][n]) for n, tensor in plain["weights"].items())


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'gbp-ray[hf]'" in message_of(huggingface, "any", "causal_lm")
