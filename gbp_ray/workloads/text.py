"""Text by the byte: a small causal transformer over the documentation that Python brings along.

`pydoc_data.topics` of the standard library holds what `help()` says of the language, in English.
Nothing is downloaded. Each version of Python has another text, so figures compare only within one;
a trial notes a fingerprint of its data and refuses to go on with other ones.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import WorkloadError, in_one_line
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.options import check_count

__all__ = ["TextTransformer", "cut_windows", "read_texts", "text_lm"]

_KEY = "workload.options.data"
_PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
_NUM_BYTES = 256


def text_lm(
    data: str | None = None, width: int = 96, layers: int = 2, heads: int = 4, context: int = 64
) -> Workload:
    """Makes a small GPT-like network that predicts the next byte of a text.

    Inputs are windows (B, context) of bytes that do not overlap, targets the bytes after each.
    279,168 parameters at the defaults, of which 245,760 are weights of linear layers.

    Args:
        data: See `read_texts`; the topics of Python's documentation by default.
        width: Size of the vector that stands for a byte; `heads` must divide it.
        layers: Blocks of attention and multilayer perceptron.
        heads: Parts of the vector that attend separately.
        context: Bytes in a window.

    Raises:
        WorkloadError: An option is out of range, or the text cannot be read or is too short.
    """
    check_count("width", width, "the default is 96")
    check_count("layers", layers, "the default is 2")
    check_count("heads", heads, "the default is 4")
    check_count("context", context, "the default is 64")
    if width % heads:
        raise WorkloadError(
            f"workload.options.heads = {heads}: must divide workload.options.width = {width}"
        )
    splits = {}
    for split, text in read_texts(data).items():
        values = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        inputs = cut_windows(values[:-1], context, split)
        splits[split] = (inputs, cut_windows(values[1:], context, split))
    return Workload(
        build_model=partial(TextTransformer, width, layers, heads, context),
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        metrics=("perplexity", "accuracy"),
    )


def read_texts(data: str | None) -> dict[str, str]:
    """Reads the text of each split.

    Args:
        data: A text file in UTF-8, of which the first 80 % are for training, the next 10 % for
            validation and the rest for testing; or a folder with `train.txt`, `test.txt` and, if
            rounds are to be judged by it, `validation.txt`. None takes the topics of Python's
            documentation, each paragraph once, since the topics quote each other at length.

    Raises:
        WorkloadError: A file is missing or is no text.
    """
    if data is None:
        from pydoc_data.topics import topics

        paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics.values()))
        return _cut_text("\n\n".join(dict.fromkeys(paragraphs)))
    folder = Path(data)
    if not folder.is_dir():
        return _cut_text(_read(folder, data))
    files = {split: folder / f"{split}.txt" for split in _PARTS}
    return {
        split: _read(file, data)
        for split, file in files.items()
        if split != "validation" or file.exists()
    }


def _read(file: Path, data: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise WorkloadError(
            f"{_KEY} = '{data}': '{file}' cannot be read as text in UTF-8 ({in_one_line(error)}); "
            "give a text file, or a folder with train.txt and test.txt"
        ) from error


def _cut_text(text: str) -> dict[str, str]:
    ends = {split: [round(end * len(text)) for end in ends] for split, ends in _PARTS.items()}
    return {split: text[start:stop] for split, (start, stop) in ends.items()}


def cut_windows(values: Tensor, size: int, split: str) -> Tensor:
    """Cuts (n,) tokens into (n // size, size) windows that share the memory of the tokens.

    Raises:
        WorkloadError: There are too few tokens for one window.
    """
    if len(values) < size:
        raise WorkloadError(
            f"{_KEY}: the text of workload.{split} has {len(values):,} tokens, less than a window "
            f"of {size}; give a longer text, or make windows shorter"
        )
    return values.unfold(0, size, size)


class TextTransformer(nn.Module):
    """Blocks of causal attention and a multilayer perceptron, each behind a LayerNorm.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
    """

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_NUM_BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _NUM_BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, values: Tensor) -> Tensor:
        """Computes logits (B, 256, L) of bytes (B, L): of each position's next byte."""
        hidden = self.embedding(values) + self.position.weight[: values.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden)).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self._heads = heads

    def forward(self, hidden: Tensor) -> Tensor:
        # (B, L, 3W) -> three of (B, heads, L, W / heads)
        parts = self.qkv(self.norm1(hidden)).unflatten(-1, (3, self._heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(self.norm2(hidden))))
