"""Any language model of transformers, by folder or name, with a tokenizer and text or tables.

Batches are the dicts that these models take, so their own loss and forward are used; what differs
between tasks is how examples are made and how many items the loss is a mean over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyarrow import csv, json, parquet
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gbp_ray.errors import WorkloadError, in_one_line, name_some
from gbp_ray.workloads.batch import logits_of
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.images import import_vision, take_examples
from gbp_ray.workloads.metrics import Metric
from gbp_ray.workloads.options import check_choice, check_count, check_flag, import_extra
from gbp_ray.workloads.text import cut_windows, read_texts

__all__ = ["huggingface"]

_AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}
_IGNORED = -100
_MODEL, _DATA = "workload.options.model", "workload.options.data"
_READERS: dict[str, Callable[[Any], Any]] = {
    "jsonl": json.read_json,
    "csv": csv.read_csv,
    "parquet": parquet.read_table,
}


def huggingface(
    model: str,
    task: str,
    data: str | None = None,
    text: str = "text",
    label: str = "label",
    max_length: int = 128,
    pretrained: bool = True,
    train_examples: int | None = None,
    test_examples: int | None = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
) -> Workload:
    """Makes a workload of a model of Hugging Face's, float32, and its tokenizer.

    Metrics are perplexity and accuracy of language models (of the next token, or of the 15 % of
    tokens that are masked as in Devlin et al. 2018), accuracy and f1 of classes, f1 of several
    labels at once, rmse and r2 of numbers.

    Args:
        model: A folder, or a name on the hub, from where it is downloaded once.
        task: "causal_lm", "masked_lm", "sequence_classification" or "token_classification". Labels
            of sequences are names or whole numbers (one class), lists of 0 and 1 (several at once)
            or fractions (a number); those of tokens are lists, as long as the list of words.
        data: A folder with `train` and `test` (and `validation`, by which rounds are judged then)
            as .jsonl, .csv or .parquet; a folder that `datasets` saved, or a name on the hub. For
            language models also a text or a folder of texts, see `text.read_texts`, and by default
            the topics of Python's documentation.
        text: The column of texts, or of lists of words.
        label: The column of labels.
        max_length: Tokens of an example. Longer ones lose their end; language models get windows
            of this length that do not overlap.
        pretrained: Without it only the configuration is taken, and weights are drawn.
        train_examples: Takes fewer training examples, an even spread.
        test_examples: Takes fewer test and validation examples likewise.
        trust_remote_code: Runs code that the folder or the hub brings along.
        gradient_checkpointing: Training keeps the inputs of blocks only, and computes each block
            again on the way back: less memory, about a third more time.

    Raises:
        WorkloadError: transformers is not installed, model or data cannot be loaded, or an option
            does not suit them.
    """
    check_choice("task", task, tuple(_AUTO_CLASSES))
    check_count("max_length", max_length, "the default is 128", least=4)
    check_flag("pretrained", pretrained)
    check_flag("trust_remote_code", trust_remote_code)
    check_flag("gradient_checkpointing", gradient_checkpointing)
    import_vision("models")  # transformers imports torchvision, which needs this to come in
    library = import_extra("transformers", "hf")
    source = _Source(library, model, task, pretrained, trust_remote_code, gradient_checkpointing)
    config, tokenizer = source.load("AutoConfig"), source.load("AutoTokenizer")
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and max_length > most:
        raise WorkloadError(
            f"workload.options.max_length = {max_length}: {model} has {most} positions; lower it"
        )
    if task.endswith("_lm"):
        workload = _make_language(source, config, tokenizer, data, text, max_length)
    else:
        workload = _make_classifier(source, config, tokenizer, data, (text, label), max_length)
    splits = {
        "train": take_examples(workload.train, train_examples, "train_examples"),
        "test": take_examples(workload.test, test_examples, "test_examples"),
    }
    if workload.validation is not None and test_examples is not None:
        count = min(test_examples, len(workload.validation))
        splits["validation"] = take_examples(workload.validation, count, "test_examples")
    return replace(workload, **splits)


@dataclass(frozen=True)
class _Source:
    """Where a model comes from, and what of it is loaded."""

    library: Any
    model: str
    task: str
    pretrained: bool
    trusted: bool
    is_checkpointed: bool

    def load(self, auto: str, **options: Any) -> Any:
        """Calls an Auto class; refuses code that the folder brings along unless it is trusted."""
        with _quiet(self.library), _blaming(_MODEL, self.model, "a folder or a name on the hub"):
            if not self.trusted:
                brought, _ = self.library.PretrainedConfig.get_config_dict(self.model)
                if "auto_map" in brought:
                    raise WorkloadError(
                        f"{_MODEL} = '{self.model}': brings code of its own ("
                        f"{name_some(sorted(map(str, brought['auto_map'].values())))}), which runs "
                        "only with workload.options.trust_remote_code = true"
                    )
            return getattr(self.library, auto).from_pretrained(
                self.model, trust_remote_code=self.trusted, **options
            )

    def build(self, config: Any) -> nn.Module:
        """Makes the model, as training wants it."""
        model = self._make(config)
        if self.is_checkpointed:
            # transformers 5 gives gradient_checkpointing_enable this name.
            enable = getattr(model, "activation_checkpointing_enable", None)
            try:
                (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            except ValueError as error:
                raise WorkloadError(
                    f"workload.options.gradient_checkpointing: {in_one_line(error)}; leave it out"
                ) from error
        return model

    def _make(self, config: Any) -> Any:
        """Makes the model; weights that are not in the folder are drawn, and named in a warning."""
        auto = _AUTO_CLASSES[self.task]
        if not self.pretrained:
            return getattr(self.library, auto).from_config(
                config, dtype=torch.float32, trust_remote_code=self.trusted
            )
        model, found = self.load(
            auto,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            # A head for other classes is drawn anew.
            ignore_mismatched_sizes=True,
        )
        drawn = [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])]
        if drawn:
            warnings.warn(
                f"{_MODEL} = '{self.model}': has no such weights, so they are drawn: "
                f"{name_some(sorted(drawn))}",
                stacklevel=2,
            )
        return model


def _make_language(
    source: _Source, config: Any, tokenizer: Any, data: str | None, text: str, length: int
) -> Workload:
    is_causal = source.task == "causal_lm"
    # Nothing reads the keys and values of earlier tokens again.
    config.use_cache = False
    mask = None if is_causal else tokenizer.mask_token_id
    if not is_causal and mask is None:
        raise WorkloadError(
            f"workload.options.task = 'masked_lm': the tokenizer of {source.model} has no token "
            "for a mask; take 'causal_lm'"
        )
    ends = [] if is_causal else [tokenizer.cls_token_id, tokenizer.sep_token_id]
    ends = ends if None not in ends else []
    splits = {}
    for split, whole in _read_language(data, text).items():
        found = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        windows = cut_windows(torch.tensor(found), length - len(ends), split)
        splits[split] = _Windows(windows, ends, mask, len(tokenizer))
    return Workload(
        build_model=partial(source.build, config),
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        count=_count_next if is_causal else None,
        metrics=("perplexity", _NEXT_TOKEN if is_causal else "accuracy"),
    )


@dataclass(frozen=True, eq=False)
class _Windows:
    """Windows of tokens, of which a few may be masked: another draw each time one is trained on.

    Attributes:
        windows: (N, L) tokens.
        ends: Tokens before and after each window, or none.
        mask: The token that stands for a masked one; None masks nothing.
        num_tokens: Tokens that there are.
    """

    windows: Tensor
    ends: Sequence[int]
    mask: int | None
    num_tokens: int

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index]
        labels = window
        if self.mask is not None:
            draws, kinds = torch.rand(2, len(window))
            # As many in each draw, since losses are weighted by the number of labels.
            chosen = draws.argsort().argsort() < max(1, round(0.15 * len(window)))
            labels = window.where(chosen, _IGNORED)
            others = torch.randint(self.num_tokens, window.shape).where(kinds < 0.9, window)
            window = torch.where(kinds < 0.8, self.mask, others).where(chosen, window)
        if self.ends:
            first, last = (torch.tensor([token]) for token in self.ends)
            ignored = torch.tensor([_IGNORED])
            window = torch.cat([first, window, last])
            labels = torch.cat([ignored, labels, ignored])
        return {"input_ids": window, "labels": labels}


def _make_classifier(
    source: _Source,
    config: Any,
    tokenizer: Any,
    data: str | None,
    columns: tuple[str, str],
    length: int,
) -> Workload:
    if data is None:
        raise WorkloadError(f"{_DATA}: is required by workload.options.task = '{source.task}'")
    tables = _read_tables(data, columns)
    of_tokens = source.task == "token_classification"
    every = [label for _, labels in tables.values() for label in labels]
    flat = [tag for labels in every for tag in labels] if of_tokens else every
    metrics: tuple[str, ...] = ("accuracy", "f1")
    classes: tuple[str, ...] = ()
    if not of_tokens and all(isinstance(label, list) for label in flat):
        config.problem_type, config.num_labels = "multi_label_classification", len(flat[0])
        metrics = ("f1",)
        to_label: Callable[[Any], Any] = partial(torch.tensor, dtype=torch.float32)
    elif all(isinstance(label, float) for label in flat):
        config.problem_type, config.num_labels, metrics = "regression", 1, ("rmse", "r2")
        to_label = _to_number
    else:
        classes = _name_classes(data, columns[1], flat)
        config.problem_type = None if of_tokens else "single_label_classification"
        config.num_labels = len(classes)
        known = {name: number for number, name in enumerate(classes)}
        config.id2label, config.label2id = dict(enumerate(classes)), known
        to_label = (
            (lambda tags: [known[str(tag)] for tag in tags])
            if of_tokens
            else (lambda label: torch.tensor(known[str(label)]))
        )
    # Models of text that goes on know by it which token is an example's last.
    config.pad_token_id = pad = _padding_of(source, tokenizer)
    splits = {}
    for split, (texts, labels) in tables.items():
        is_split = of_tokens or isinstance(texts[0], list)
        found = tokenizer(
            texts, truncation=True, max_length=length, is_split_into_words=is_split, verbose=False
        )
        items = []
        for row, (ids, label) in enumerate(zip(found["input_ids"], labels, strict=True)):
            made = to_label(label)
            if of_tokens:
                if len(made) != len(texts[row]):
                    raise WorkloadError(
                        f"{_DATA} = '{data}': example {row} of '{split}' has {len(texts[row])} "
                        f"words and {len(made)} labels; give each word one"
                    )
                made = _spread(made, found.word_ids(row))
            items.append({"input_ids": torch.tensor(ids), "labels": made})
        splits[split] = items
    return Workload(
        build_model=partial(source.build, config),
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        collate=partial(_pad, pad),
        classes=classes,
        metrics=metrics,
    )


def _padding_of(source: _Source, tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise WorkloadError(
        f"{_MODEL} = '{source.model}': its tokenizer has neither a token for padding nor one for "
        "the end, and examples differ in length; name one in tokenizer_config.json"
    )


def _to_number(label: float) -> Tensor:
    return torch.tensor([label], dtype=torch.float32)


def _name_classes(data: str, column: str, labels: Sequence[Any]) -> tuple[str, ...]:
    """Names classes by their number, or in the order of the alphabet."""
    are_numbers = all(isinstance(label, int) for label in labels)
    if are_numbers and min(labels) >= 0:
        names = tuple(str(number) for number in range(max(labels) + 1))
    elif all(isinstance(label, str) for label in labels):
        names = tuple(sorted(set(labels)))
    else:
        raise WorkloadError(
            f"{_DATA} = '{data}': the column '{column}' must hold names, numbers from 0, fractions "
            "or lists, one kind throughout; leave out examples that have no label"
        )
    if len(names) < 2:
        raise WorkloadError(f"{_DATA} = '{data}': the column '{column}' holds one class; give two")
    return names


def _spread(tags: Sequence[int], words: Sequence[int | None]) -> Tensor:
    """Gives each word's label to its first token; the others' are ignored."""
    before = [None, *words[:-1]]
    pairs = zip(words, before, strict=True)
    return torch.tensor([_IGNORED if w is None or w == b else tags[w] for w, b in pairs])


def _pad(pad_token: int, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = [item["input_ids"] for item in items]
    labels = [item["labels"] for item in items]
    is_there = [torch.ones_like(row) for row in ids]
    # Labels of tokens are as many as these.
    are_tokens = labels[0].ndim == 1 and not labels[0].is_floating_point()
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token),
        "attention_mask": pad_sequence(is_there, batch_first=True),
        "labels": pad_sequence(labels, True, _IGNORED) if are_tokens else torch.stack(labels),
    }


def _count_next(batch: Mapping[str, Tensor]) -> Tensor:
    """Counts the tokens that are predicted: no token comes before the first."""
    return (batch["labels"][:, 1:] != _IGNORED).sum()


def _mark_next(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch["labels"][:, 1:]
    is_right = (logits_of(outputs)[:, :-1].argmax(dim=-1) == labels) & (labels != _IGNORED)
    return torch.stack([is_right.sum(), (labels != _IGNORED).sum()]).double()


_NEXT_TOKEN = Metric("accuracy", _mark_next, lambda sums: float(sums[0] / sums[1]), unit="%")


def _read_language(data: str | None, column: str) -> dict[str, str]:
    folder = Path(data or "")
    if data is None or folder.is_file() or (folder / "train.txt").exists():
        return read_texts(data)
    tables = _read_tables(data, (column,))
    return {split: "\n\n".join(texts) for split, (texts,) in tables.items()}


def _read_tables(data: str, columns: tuple[str, ...]) -> dict[str, tuple[list[Any], ...]]:
    """Reads columns of each split; the validation split tests where there is no other."""
    folder = Path(data)
    tables: dict[str, Any] = {}
    with _blaming(_DATA, data, "a folder with train and test as .jsonl, .csv or .parquet"):
        for split in ("train", "validation", "test"):
            for ending, read in _READERS.items():
                if (file := folder / f"{split}.{ending}").exists():
                    tables[split] = read(file).to_pydict()
        if not tables:
            library = import_extra("datasets", "hf")
            is_saved = (folder / "dataset_dict.json").exists()
            tables = dict((library.load_from_disk if is_saved else library.load_dataset)(data))
    if "test" not in tables and "validation" in tables:
        tables["test"] = tables.pop("validation")
    found = {}
    for split in ("train", "test", *(["validation"] if "validation" in tables else [])):
        table: Any = tables.get(split, {})
        there = list(getattr(table, "column_names", table))
        for column in columns:
            if column not in there or not len(table[column]):
                raise WorkloadError(
                    f"{_DATA} = '{data}': '{split}' has no column '{column}' with values (there: "
                    f"{', '.join(there) or 'nothing'}); name the columns by workload.options.text "
                    "and workload.options.label"
                )
        found[split] = tuple(list(table[column]) for column in columns)
    return found


@contextmanager
def _blaming(key: str, value: str, wanted: str) -> Iterator[None]:
    """Turns whatever a library raises into an error that names the option."""
    try:
        yield
    except WorkloadError:
        raise
    except Exception as error:  # libraries raise whatever lies below them
        raise WorkloadError(
            f"{key} = {value!r}: cannot be loaded ({in_one_line(error)}); give {wanted}"
        ) from error


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Leaves out progress bars and tables of weights, which warnings name."""
    logging = library.utils.logging
    before, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bars:
            logging.enable_progress_bar()
