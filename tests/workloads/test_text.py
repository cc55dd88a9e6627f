"""The text by the byte: parts that lie apart, windows without copies, a network that is causal."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

import pytest
import torch
from small_data import message_of

from gbp_ray.workloads import text_lm
from gbp_ray.workloads.data import seeded
from gbp_ray.workloads.text import read_texts


def test_the_documentation_is_cut_by_position_and_each_paragraph_stands_once():
    texts = read_texts(None)
    assert list(texts) == ["train", "validation", "test"]
    whole = "".join(texts.values())
    lengths = [len(text) / len(whole) for text in texts.values()]
    assert lengths == pytest.approx([0.8, 0.1, 0.1], abs=1e-4)
    paragraphs = re.split(r"\n\s*\n", whole)
    assert len(paragraphs) == len(set(paragraphs)) > 1000
    for topic in topics.values():
        for paragraph in topic.strip().split("\n\n"):
            assert paragraph.strip() in whole


def test_windows_are_views_of_the_text_and_targets_the_bytes_that_follow():
    text = read_texts(None)["train"].encode()
    inputs, targets = text_lm(context=50).train
    assert inputs.shape == targets.shape == ((len(text) - 1) // 50, 50)
    assert inputs.untyped_storage().nbytes() == 8 * len(text)
    assert bytes(inputs.flatten().tolist()) == text[: inputs.numel()]
    assert bytes(targets.flatten().tolist()) == text[1 : inputs.numel() + 1]


def test_a_position_sees_no_later_byte_and_all_earlier_ones():
    with seeded(0):
        model = text_lm(width=16, layers=2, heads=2, context=12).build_model().double()
    values = torch.arange(60, 72)[None]
    outputs = model(values)
    assert outputs.shape == (1, 256, 12)
    for place in (0, 5, 11):
        changed = values.clone()
        changed[0, place] = 7
        differs = (model(changed) - outputs).abs().amax(dim=1)[0] > 1e-12
        assert differs.tolist() == [later >= place for later in range(12)]


def test_own_text_comes_as_a_file_or_by_split(tmp_path):
    (tmp_path / "own.txt").write_text("é" * 100)
    workload = text_lm(str(tmp_path / "own.txt"), context=4)
    assert [len(split[0]) for split in (workload.train, workload.validation, workload.test)] == [
        (2 * count - 1) // 4 for count in (80, 10, 10)
    ]
    (tmp_path / "train.txt").write_text("to train on, all of it")
    assert "test.txt' cannot be read" in message_of(text_lm, str(tmp_path))
    (tmp_path / "test.txt").write_text("to test with")
    workload = text_lm(str(tmp_path), context=4)
    assert workload.validation is None
    assert bytes(workload.test[0].flatten().tolist()) == b"to test "
    (tmp_path / "test.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in message_of(text_lm, str(tmp_path))
