"""Overlaps and layers: against the masks themselves, and within their bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sample_sweep import SHAPES, write_sweep

from gbp_ray.pruning.masks import MaskSet
from gbp_ray.report.curves import WorkloadCurves, gather_curves
from gbp_ray.report.details import look_closely
from gbp_ray.results.query import open_results
from gbp_ray.results.store import Store


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_sweep(
        tmp_path_factory.mktemp("sweep"),
        criteria=("taylor", "random"),
        sparsities=(0.5, 0.9),
        seeds=(0, 1, 2),
        rounds=1,
    )


@pytest.fixture
def curves(sweep: Store) -> WorkloadCurves:
    (found,) = gather_curves(open_results(sweep.uri))
    return found


def masks_at(sweep: Store, target: float) -> dict[tuple[str, int], MaskSet]:
    found = {}
    for name in sweep.objects.list_folders("trials/"):
        record = sweep.read_trial(name)
        assert record is not None
        if record.job.prune.sparsity == target:
            data = sweep.read_file(name, record.final, "masks.safetensors")
            found[record.job.prune.criterion, record.job.seed] = MaskSet.from_bytes(data)
    return found


def test_overlaps_are_those_of_the_masks(sweep: Store, curves: WorkloadCurves) -> None:
    close_ups, left_out = look_closely(curves, {sweep.name: sweep})
    assert left_out == []
    assert [close_up.target for close_up in close_ups] == [0.5, 0.9]
    for close_up in close_ups:
        masks = masks_at(sweep, close_up.target)
        assert close_up.num_masks == 6
        found = {tuple(sorted((o.one, o.other))): o for o in close_up.overlaps}
        pairs = {
            ("taylor", "taylor"): [(("taylor", a), ("taylor", b)) for a, b in SEEDS],
            ("random", "random"): [(("random", a), ("random", b)) for a, b in SEEDS],
            ("random", "taylor"): [(("random", s), ("taylor", s)) for s in range(3)],
        }
        assert set(found) == set(pairs)
        for names, compared in pairs.items():
            expected = [masks[one].overlap(masks[other]) for one, other in compared]
            assert found[names].overlap.mean == pytest.approx(np.mean(expected))
            assert found[names].overlap.num == 3
        # Random masks overlap by chance, and others by more.
        chance = found["random", "random"].chance
        assert found["random", "random"].overlap.mean == pytest.approx(chance, rel=0.15)


SEEDS = [(0, 1), (0, 2), (1, 2)]


def test_layers_are_those_of_the_records(sweep: Store, curves: WorkloadCurves) -> None:
    close_ups, _ = look_closely(curves, {sweep.name: sweep})
    for close_up in close_ups:
        assert list(close_up.layers) == list(SHAPES)
        for name, spreads in close_up.layers.items():
            for label, spread in spreads.items():
                values = []
                for (criterion, _), masks in masks_at(sweep, close_up.target).items():
                    if criterion == label:
                        values.append(1 - float(masks[name].float().mean()))
                assert spread.mean == pytest.approx(np.mean(values))


def test_masks_that_do_not_fit_are_left_out_and_said(sweep: Store, curves: WorkloadCurves) -> None:
    record = curves.trials[0]
    size = sweep.read_round(record.trial_id, record.final.round).files  # type: ignore[union-attr]
    num_bytes = 4 * size["masks.safetensors"].num_bytes
    close_ups, left_out = look_closely(curves, {sweep.name: sweep}, mask_bytes=num_bytes)
    assert all(close_up.num_masks <= 3 for close_up in close_ups)
    assert any("do not fit" in text for text in left_out)
    assert all(close_up.layers for close_up in close_ups)


def test_a_damaged_mask_is_named_and_not_used(tmp_path: Path) -> None:
    store = write_sweep(tmp_path, criteria=("taylor",), sparsities=(0.5,), rounds=1)
    (found,) = gather_curves(open_results(store.uri))
    trial = found.trials[0].trial_id
    key = f"trials/{trial}/round_001/masks.safetensors"
    data = store.objects.get(key)
    assert data is not None
    store.objects.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    ((close_up,), left_out) = look_closely(found, {store.name: store})
    assert close_up.num_masks == 2
    assert any(trial in text and "does not match its checksum" in text for text in left_out)
