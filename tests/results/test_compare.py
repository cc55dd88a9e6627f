"""Two trials compared: overlaps against the masks' own, differences against the jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_results import sample_job, write_trial

from gbp_ray.errors import StoreError
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.results.compare import compare_trials
from gbp_ray.results.store import Store
from gbp_ray.results.tensors import digest_masks, read_mask_file


def masks_of(store: Store, trial: str) -> MaskSet:
    record = store.read_rounds(trial)[-1]
    return MaskSet.from_bytes(store.read_file(trial, record, "masks.safetensors"))


def test_overlaps_are_those_of_the_masks(tmp_path: Path) -> None:
    store = Store(tmp_path, "try")
    one = write_trial(store, sample_job())
    other = write_trial(store, sample_job(sparsity=0.75, criterion="fisher"))
    a, b = masks_of(store, one), masks_of(store, other)
    found = compare_trials(store.trial_uri(one), store.trial_uri(other))
    assert found["overlap"] == pytest.approx(a.overlap(b))
    for layer in found["masks"]:
        name = layer["name"]
        expected = MaskSet({name: a[name]}).overlap(MaskSet({name: b[name]}))
        assert layer["overlap"] == pytest.approx(expected)
        assert layer["num_kept"] == [int(a[name].sum()), int(b[name].sum())]
    assert found["config"] == {
        "prune.criterion": ["taylor", "fisher"],
        "prune.sparsity": [0.5, 0.75],
    }
    assert found["metrics"]["sparsity"] == [a.sparsity, b.sparsity]
    assert found["trials"] == [store.trial_uri(one), store.trial_uri(other)]
    for trial, masks in ((one, a), (other, b)):
        record = store.read_rounds(trial)[-1]
        data = store.read_file(trial, record, "masks.safetensors")
        assert digest_masks(read_mask_file(data, "here").masks) == masks.digest


def test_a_trial_overlaps_itself_whole(tmp_path: Path) -> None:
    store = Store(tmp_path, "try")
    write_trial(store, sample_job())
    found = compare_trials(tmp_path, store.uri)
    assert found["overlap"] == 1.0
    assert found["config"] == {}


def test_what_is_not_one_trial_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, "try")
    names = [write_trial(store, sample_job(seed=seed)) for seed in range(2)]
    with pytest.raises(StoreError, match="holds 2 trials; name one of") as caught:
        compare_trials(tmp_path, store.trial_uri(names[0]))
    assert store.trial_uri(names[1]) in str(caught.value)


def test_an_unfinished_trial_is_compared_by_its_last_round(tmp_path: Path) -> None:
    store = Store(tmp_path, "try")
    one = write_trial(store, sample_job())
    other = write_trial(store, sample_job(seed=1), num_rounds=2)
    found = compare_trials(store.trial_uri(one), store.trial_uri(other))
    assert found["config"] is None
    assert found["metrics"]["round"] == [2, 1]
