"""The job schema: what is refused and how it is said, and what a trial is called."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.job import JobConfig, describe_fields, load_job, trial_id
from gbp_ray.config.schema import find_idle_options, nearest_glob, nearest_name
from gbp_ray.config.training import Recipe
from gbp_ray.errors import ConfigError

JOB = """
name = "try"
[workload]
factory = "my_module:make"
[prune]
criterion = "taylor"
sparsity = 0.5
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def refusal(source: Any, overrides: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_job(source, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


# -- the file --------------------------------------------------------------------------------------


def test_minimal_job_loads_with_the_documented_defaults(job_file: Path) -> None:
    job = load_job(job_file)
    assert (job.name, job.prune.sparsity, job.prune.rounds) == ("try", 0.5, 1)
    assert job.finetune.learning_rate != Recipe().learning_rate, "finetune has its own default"
    assert load_job(str(job_file)) == job


def test_embedded_job_is_used_without_a_file() -> None:
    assert load_job().name == "digits"
    assert load_job(None, {"name": "other"}).name == "other"


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.toml' does not exist" in refusal(tmp_path / "nowhere.toml")


def test_directory_is_no_job_file(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"name = ",
        b"{}",
        b"name = 'a'\nname = 'b'",
        b"\xff\xfe\x00",
        "name = 'a'".encode("utf-16"),
        b"\x00",
        b"a = " + b"[" * 20000,
    ],
    ids=["cut", "json", "twice", "bytes", "utf-16", "nul", "deep"],
)
def test_file_that_is_not_toml_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    text = refusal(path)
    assert "job.toml" in text
    assert "is not TOML" in text or "nested too deeply" in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (JOB.encode("utf-16"), "it is UTF-16 (at line 1); save it as UTF-8"),
        (JOB.replace("try", "tr\xfc").encode("latin-1"), "byte 0xfc is no UTF-8 (at line 2)"),
        (JOB.replace("try", "t\0y").encode(), "(at line 2, column 10)"),
    ],
    ids=["utf-16", "latin-1", "nul"],
)
def test_other_text_than_utf8_is_named_with_its_line(
    tmp_path: Path, content: bytes, part: str
) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    assert part in refusal(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_and_any_line_ends_are_read(
    tmp_path: Path, job_file: Path, mark: str, newline: str
) -> None:
    path = tmp_path / "other.toml"
    path.write_bytes((mark + JOB.replace("\n", newline)).encode())
    assert load_job(path) == load_job(job_file)


@pytest.mark.parametrize("key", ["workload.options.x", "sweep.space", "name", "storage"])
def test_deep_nesting_is_refused_wherever_it_comes_from(job_file: Path, key: str) -> None:
    lists: Any = []
    tables: Any = {}
    for _ in range(100_000):
        lists, tables = [lists], {"a": tables}
    for value in (lists, tables):
        refusal(job_file, {key: value})
    refusal(job_file, [f"{key}.{'a.' * 50_000}b=1"])
    # What is no TOML is text.
    load_job(job_file, ["storage=" + "[" * 20_000])


def test_a_number_too_long_to_be_written_is_refused(job_file: Path) -> None:
    for text in ("9" * 5000, f"0x{'f' * 5000}"):
        assert "seed = " in refusal(job_file, [f"seed={text}"])
        assert "prune.sparsity = " in refusal(job_file, [f"prune.sparsity={text}"])
        job_file.write_text(f"seed = {text}\n{JOB}")
        refusal(job_file)
        job_file.write_text(JOB)


def test_a_glob_with_brackets_is_suggested_as_it_must_be_written() -> None:
    names = ["parts.a[0].bias", "parts.a[0].weight", "parts.b.weight"]
    meant = {
        "parts.a[0].weight": ("parts.a[[]0].weight", names[1:2]),
        "parts.a[0].*": ("parts.a[[]0].*", names[:2]),
        "part.a[0].weight": ("parts.a[[]0].weight", names[1:2]),
    }
    for pattern, (suggested, matched) in meant.items():
        text = nearest_glob(pattern, names)
        assert text == f", did you mean '{suggested}' ([[] stands for a bracket in a name)?"
        assert fnmatch.filter(names, suggested) == matched
    assert nearest_glob("parts.c.weight", names[2:]) == ", did you mean 'parts.b.weight'?"


def test_minus_zero_is_zero(job_file: Path) -> None:
    job = load_job(job_file, {"prune.sparsity": -0.0, "pretrain.weight_decay": -0.0})
    assert trial_id(job) == trial_id(
        load_job(job_file, {"prune.sparsity": 0.0, "pretrain.weight_decay": 0.0})
    )


def test_a_folder_may_be_the_working_folder(job_file: Path) -> None:
    assert load_job(job_file, {"storage": "."}).storage == "."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x07\x9b", "a\\x1b[31mb\\x07\\x9b"),
        ("a \r\n  b\x0bc", "a b c"),
        ("a\tb\u202ec\u2066d\u200e", "a\\tb\\u202ec\\u2066d\\u200e"),
        ("\udcff", "\\udcff"),
        ("größe [red]✓[/]", "größe [red]✓[/]"),
        ("'s3://a:b@c' https://x:y/z@h/i", "'s3://***@c' https://***@h/i"),
        ("accuracy@sparsity>=0.9 s3://a/b@c", "accuracy@sparsity>=0.9 s3://a/b@c"),
    ],
)
def test_an_error_is_one_printable_line_without_secrets(text: str, shown: str) -> None:
    assert str(ConfigError(text)) == shown
    assert str(ConfigError(shown)) == shown


def test_a_long_error_keeps_its_start_and_its_end(job_file: Path) -> None:
    long = refusal(job_file, {"storage": f"gs://{'x' * 10**6}", "nam": 1})
    assert len(long) <= 1500
    assert long.startswith("storage = 'gs://xxx")
    assert re.search(r"\[\.\.\. [\d,]+ more\]: must be a folder", long)
    whole = str(ConfigError("a" * 5000 + "z"))
    assert re.fullmatch(r"a+ \[\.\.\. 3,\d+ characters left out \.\.\.\] a+z", whole)
    assert len(whole) <= 1500
    many = refusal(job_file, {f"key{number}": 1 for number in range(5000)})
    assert "and 4,950 more faults" in many


def test_file_name_with_a_newline_still_makes_one_line(tmp_path: Path) -> None:
    assert "a\\nb.toml" in refusal(tmp_path / "a\nb.toml")


def test_empty_file_misses_every_required_field_at_once(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_bytes(b"")
    text = refusal(path)
    for key in ("name", "workload", "prune"):
        assert f"{key}: is required" in text


def test_loading_does_not_change_the_job_it_starts_from(job_file: Path) -> None:
    first = load_job(job_file)
    before = first.model_dump()
    second = load_job(first, {"prune.sparsity": 0.75, "workload.options.depth": 3})
    assert first.model_dump() == before
    assert (second.prune.sparsity, second.workload.options) == (0.75, {"depth": 3})
    assert second.prune.criterion == first.prune.criterion


# -- faults ----------------------------------------------------------------------------------------

FAULTS = [
    ("nam", 1, "nam: no such key, did you mean 'name'?"),
    ("prune.sparsty", 0.5, "prune.sparsty: no such key, did you mean 'sparsity'?"),
    ("workload.factori", "a:b", "workload.factori: no such key, did you mean 'factory'?"),
    ("pretrain.epoch", 1, "pretrain.epoch: no such key, did you mean 'epochs'?"),
    ("finetune.optimiser", "sgd", "finetune.optimiser: no such key, did you mean 'optimizer'?"),
    ("cluster.workers", 2, "cluster.workers: no such key, did you mean 'num_workers'?"),
    ("finetunes.epochs", 2, "finetunes: no such key, did you mean 'finetune'?"),
    ("name", "../up", "name = '../up'"),
    ("name", "a/b", "name = 'a/b'"),
    ("name", "a\n", "name = 'a\\n'"),
    ("name", ".hidden", "name = '.hidden'"),
    ("name", "", "name = ''"),
    ("name", 7, "name = 7"),
    ("storage", "gs://bucket/x", "storage = 'gs://bucket/x': must be a folder or s3://"),
    ("storage", "s3://b", "storage = 's3://b': must read s3://bucket/prefix"),
    ("storage", "s3://bucket/x?endpont=y", "?endpont: no such option (allowed: endpoint_over"),
    ("storage", "a\0b", "storage = 'a\\x00b'"),
    ("storage", "", "storage = '': is empty; give a folder"),
    ("storage", " \t", "storage = ' \\t': is empty"),
    ("storage", "file://", "storage = 'file://': is empty"),
    ("storage", "s3://KEY:sec/ret@bucket/x", "storage = 's3://***@bucket/x': holds credentials"),
    ("storage", "https://me:secret@host/x", "storage = 'https://***@host/x': must be a folder"),
    ("storage", "s3://b-u/x?secret_key=secret", "?secret_key=***': holds credentials"),
    ("storage", "\udcff", "storage = '\\udcff': holds what is no UTF-8 text"),
    ("prune.exclude", ["\udcff"], "holds what is no UTF-8 text"),
    ("prune.layer_max_sparsity", {"\udcff": 1.0}, "holds what is no UTF-8 text"),
    ("seed", -1, "seed = -1"),
    ("seed", 10**100, "seed = 1000"),
    ("seed", 2**32, "seed = 4294967296"),
    ("seed", 1.5, "seed = 1.5"),
    ("workload", 3, "workload = 3"),
    ("workload.factory", "just_a_name", 'must read "module:attr"'),
    ("workload.factory", "a:b.c", 'must read "module:attr"'),
    ("workload.options", [1], "workload.options = [1]"),
    ("workload.options.x", "\udcff", "'x' must be text"),
    ("workload.options.x", math.nan, "'x' must be text, a finite number"),
    ("workload.options.x", {1, 2}, "'x' must be text"),
    ("workload.options.x", b"\xff", "'x' must be text"),
    ("workload.options.x", Ellipsis, "'x' must be text"),
    ("workload.eval_batch_size", 0, "workload.eval_batch_size = 0"),
    ("workload.eval_batch_size", 10**12, "less than or equal to 1000000000"),
    ("workload.train_sample", 10**12, "less than or equal to"),
    ("workload.encoding.mean", [1e40], "workload.encoding.mean.0 = 1e+40"),
    ("workload.encoding.deviation", [1e-40], "deviation: must be above 0 in each channel"),
    ("pretrain.epochs", -1, "pretrain.epochs = -1"),
    ("pretrain.epochs", 1e308, "pretrain.epochs = 1e+308"),
    ("pretrain.optimizer", "adm", "pretrain.optimizer = 'adm': not allowed, did you mean 'adam'?"),
    ("pretrain.learning_rate", 0, "pretrain.learning_rate = 0"),
    ("pretrain.learning_rate", math.inf, "pretrain.learning_rate = inf"),
    ("pretrain.learning_rate", 1e300, "should be less than or equal to 1"),
    ("pretrain.batch_size", 10**12, "less than or equal to 1000000000"),
    ("finetune.microbatches", 10**9, "less than or equal to 100000"),
    ("finetune.patience", 10**9, "less than or equal to 1000000"),
    ("finetune.validate_every", 1e9, "less than or equal to 1000000"),
    ("finetune.distillation.temperature", 1e300, "less than or equal to 1000000"),
    ("pretrain.momentum", 1, "pretrain.momentum = 1"),
    ("pretrain.lr_schedule", "cosin", "did you mean 'cosine'?"),
    ("pretrain.lr_milestones", [0.5, 2], "pretrain.lr_milestones.1 = 2"),
    ("pretrain.batch_size", 0, "pretrain.batch_size = 0"),
    ("pretrain.microbatches", 999, "pretrain.microbatches = 999 exceeds batch_size"),
    ("finetune.microbatches", 999, "finetune.microbatches = 999 exceeds batch_size"),
    ("prune.criterion", "tayler", "prune.criterion = 'tayler': is not a criterion, did you mean"),
    ("prune.sparsity", 1, "prune.sparsity = 1:"),
    ("prune.sparsity", 1.5, "prune.sparsity = 1.5:"),
    ("prune.sparsity", -0.1, "prune.sparsity = -0.1:"),
    ("prune.sparsity", math.nan, "prune.sparsity = nan:"),
    ("prune.sparsity", math.inf, "prune.sparsity = inf:"),
    ("prune.sparsity", -math.inf, "prune.sparsity = -inf:"),
    ("prune.sparsity", "high", "prune.sparsity = 'high':"),
    ("prune.sparsity", None, "prune.sparsity = None:"),
    ("prune.sparsity", [0.5], "prune.sparsity = [0.5]:"),
    ("prune.rounds", 0, "prune.rounds = 0"),
    ("prune.rounds", 10**8, "prune.rounds = 100000000"),
    ("prune.ramp_rounds", 10**9, "less than or equal to 999"),
    ("prune.hutchinson_probes", 10**9, "less than or equal to 10000"),
    ("prune.calibration_examples", 10**12, "less than or equal to 1000000000"),
    ("prune.batchnorm_examples", 10**12, "less than or equal to 1000000000"),
    ("prune.granularity", f"1:{10**9}", 'must be "weight" or "n:m"'),
    ("attack.examples", 10**12, "less than or equal to 1000000000"),
    ("prune.schedule", "liner", "did you mean 'linear'?"),
    ("prune.scope", "layers", "did you mean 'layer'?"),
    ("prune.rewind", "weight", "did you mean 'weights'?"),
    ("prune.exclude", "conv1.*", "prune.exclude = 'conv1.*'"),
    ("prune.layer_min_sparsity", 2.0, "prune.layer_min_sparsity = 2.0"),
    ("prune.layer_min_sparsity", math.nan, "prune.layer_min_sparsity"),
    ("prune.layer_min_sparsity", "low", "prune.layer_min_sparsity: must be a number, or a table"),
    ("prune.layer_max_sparsity", {"a.*": 2}, "prune.layer_max_sparsity = {'a.*': 2}"),
    ("prune.layer_max_sparsity", {"a.*": "x"}, "prune.layer_max_sparsity: must be a number"),
    ("prune.layer_min_sparsity", 0.9, "prune.layer_min_sparsity = 0.9 exceeds sparsity = 0.5"),
    ("prune.layer_max_sparsity", 0.1, "prune.layer_max_sparsity = 0.1 is below sparsity = 0.5"),
    ("prune.granularity", "channels", '"channel", "head" or "channel+head"'),
    ("prune.granularity", "4:4", "0 < n < m"),
    ("prune.granularity", "0:4", "0 < n < m"),
    ("prune.granularity", "2:4 ", 'must be "weight" or "n:m"'),
    ("prune.granularity", "1:4", "means sparsity = 0.75, not 0.5; set prune.sparsity=0.75"),
    ("cluster.num_workers", -1, "cluster.num_workers = -1"),
    ("cluster.num_workers", 1.5, "cluster.num_workers = 1.5: must be a whole number from 0, or"),
    ("cluster.num_workers", [1], "cluster.num_workers = [1]: must be a whole number from 0, or"),
    ("cluster.num_workers", [0, 2], "or [min, max] with 1 <= min <= max"),
    ("cluster.num_workers", [4, 1], "or [min, max] with 1 <= min <= max"),
    ("cluster.num_workers", [1, 2, 3], "or [min, max] with 1 <= min <= max"),
    ("cluster.num_workers", 10**9, "cluster.num_workers = 1000000000: must be at most 10,000"),
    ("cluster.num_workers", [1, 10**9], "must be at most 10,000"),
    ("cluster.launcher", "locl", "'locl': not allowed, did you mean 'local'? (allowed: auto, ray,"),
    ("cluster", {"launcher": "local", "autoscale": True}, "launcher = local: autoscale = true is"),
    ("cluster", {"launcher": "local", "num_workers": [1, 2]}, "num_workers = [1, 2] is for Ray"),
    ("cluster", {"launcher": "local", "address": "auto"}, "address = auto is for Ray only; unset"),
    ("cluster.threads_per_worker", 1500, "cluster.threads_per_worker = 1500: should be less than"),
    ("cluster.cpus_per_worker", 1e300, "less than or equal to 10000"),
    ("cluster.max_failures", 10**9, "less than or equal to 10000"),
    ("cluster.room_timeout_s", 1e12, "less than or equal to 31622400"),
    ("cluster.hang_timeout_s", 1e12, "less than or equal to 31622400"),
    ("sweep.max_concurrent", 10**9, "less than or equal to 100000"),
    ("sweep.grace_rounds", 10**9, "less than or equal to 10000"),
    ("sweep.reduction_factor", 1e300, "less than or equal to 1000000"),
    ("sweep.space.seed", {"linear": [0, 10**400], "num": 3}, "must lie within +-1e+18"),
    ("sweep.space.x", {"log": [1e-300, 1], "num": 3}, "low must be above 0"),
    ("cluster.hang_timeout_s", -1, "cluster.hang_timeout_s = -1"),
    ("cluster.use_gpu", "perhaps", "cluster.use_gpu = 'perhaps'"),
    ("sub\nkey", 1, '"sub\\nkey": no such key'),
]


@pytest.mark.parametrize(("key", "value", "part"), FAULTS, ids=[f"{k}={v!r}" for k, v, _ in FAULTS])
def test_each_fault_is_one_line_with_its_dotted_key(
    job_file: Path, key: str, value: Any, part: str
) -> None:
    text = refusal(job_file, {key: value})
    assert part in text
    assert len(re.findall(r"(?:^|; )(?!allowed)[\w.\"\\]+(?:: | = )", text)) == 1, (
        "one fault is said once"
    )


def test_all_faults_come_at_once(job_file: Path) -> None:
    wrong = {
        "nme": 1,
        "seed": -1,
        "workload.factory": "x",
        "pretrain.optimizer": "sdg",
        "prune.sparsity": 2,
        "prune.criterion": "tylor",
        "finetune.microbatches": 1000,
        "cluster.adress": "auto",
    }
    text = refusal(job_file, wrong)
    for key in (*wrong, "did you mean 'taylor'", "did you mean 'sgd'", "did you mean 'address'"):
        assert key in text


def test_all_disagreements_inside_a_section_come_at_once(job_file: Path) -> None:
    wrong = {
        "prune.granularity": "1:4",
        "prune.layer_min_sparsity": 0.9,
        "prune.layer_max_sparsity": 0.1,
    }
    text = refusal(job_file, wrong)
    for key in wrong:
        assert f"{key} = " in text


def test_a_range_of_workers_is_read_and_changes_no_trial_id(job_file: Path) -> None:
    job = load_job(job_file, ["cluster.num_workers=[1, 4]"])
    assert (job.cluster.num_workers, job.cluster.min_workers, job.cluster.max_workers) == (
        (1, 4),
        1,
        4,
    )
    assert JobConfig.model_validate(job.model_dump(mode="json")) == job
    assert trial_id(job) == trial_id(load_job(job_file))
    fixed = load_job(job_file, {"cluster.num_workers": 3}).cluster
    assert (fixed.min_workers, fixed.max_workers) == (3, 3)


def test_a_range_of_workers_must_be_occupied_at_its_largest(job_file: Path) -> None:
    text = refusal(job_file, {"cluster.num_workers": [1, 8], "pretrain.epochs": 1})
    assert "pretrain.microbatches = 4 cannot occupy cluster.num_workers = [1, 8]" in text


def test_all_disagreements_between_sections_come_at_once(job_file: Path) -> None:
    wrong = {
        "cluster.num_workers": 8,
        "pretrain.epochs": 1,
        "prune.criterion": "movement",
        "finetune.epochs": 0,
    }
    text = refusal(job_file, wrong)
    assert "pretrain.microbatches = 4 cannot occupy cluster.num_workers = 8" in text
    assert "set finetune.epochs above 0" in text
    both = refusal(job_file, wrong | {"finetune.epochs": 1})
    assert "pretrain.microbatches" in both
    assert "finetune.microbatches" in both


def test_an_error_survives_pickling(job_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(job_file, {"prune.sparsity": 2})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (ConfigError, str(caught.value))


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.5, 0.999999, "0.25"])
def test_sparsity_in_range_is_taken(job_file: Path, sparsity: Any) -> None:
    assert load_job(job_file, {"prune.sparsity": sparsity}).prune.sparsity == float(sparsity)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:3", 2 / 3), ("4:16", 0.75)])
def test_granularity_n_of_m_keeps_n(job_file: Path, pattern: str, sparsity: float) -> None:
    job = load_job(job_file, {"prune.granularity": pattern, "prune.sparsity": sparsity})
    n, m = (int(part) for part in pattern.split(":"))
    assert job.prune.pattern == (n, m)


def test_granularity_weight_has_no_pattern(job_file: Path) -> None:
    assert load_job(job_file).prune.pattern is None


def test_layer_bounds_by_glob_are_not_compared_with_the_sparsity(job_file: Path) -> None:
    bounds = {"prune.layer_min_sparsity": {"a.*": 0.9}, "prune.layer_max_sparsity": {"b.*": 0.1}}
    job = load_job(job_file, bounds)
    assert job.prune.layer_min_sparsity == {"a.*": 0.9}
    assert job.prune.layer_max_sparsity == {"b.*": 0.1}


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_and_a_plug_in_are_allowed(job_file: Path, name: str) -> None:
    for value in (name, f"my_module:{name}"):
        job = load_job(job_file, {"prune.criterion": value, "finetune.epochs": 1})
        assert job.prune.criterion == value


def test_options_become_what_json_makes_of_them(job_file: Path) -> None:
    options = {"a": (1, 2), "b": {"c": [True, None, 1.5, "x"]}}
    assert load_job(job_file, {"workload.options": options}).workload.options == {
        "a": [1, 2],
        "b": {"c": [True, None, 1.5, "x"]},
    }


# -- overrides -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("0.25", 0.25),
        ("1e-3", 0.001),
        ("true", True),
        ('"quoted"', "quoted"),
        ("bare", "bare"),
        ("a/b c", "a/b c"),
        ("", ""),
        ("a=b", "a=b"),
        ("[1, 2]", [1, 2]),
        ('["x.*"]', ["x.*"]),
        ('{ "layer3.*" = 0.5, b = [1] }', {"layer3.*": 0.5, "b": [1]}),
        ("1\nother = 2", "1\nother = 2"),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_set_reads_values_as_toml_and_else_as_text(job_file: Path, text: str, value: Any) -> None:
    job = load_job(job_file, [f"workload.options.x={text}"])
    assert job.workload.options["x"] == value
    assert type(job.workload.options["x"]) is type(value)


def test_set_ignores_spaces_around_the_key_and_the_last_one_wins(job_file: Path) -> None:
    assert load_job(job_file, ["prune.rounds = 3", " prune.rounds =7"]).prune.rounds == 7


def test_set_makes_sections_that_the_file_lacks(job_file: Path) -> None:
    assert load_job(job_file, ["finetune.epochs=2"]).finetune.epochs == 2


def test_overrides_as_text_and_as_mapping_agree(job_file: Path) -> None:
    by_text = load_job(job_file, ["prune.sparsity=0.75", 'prune.exclude=["a.*"]'])
    by_mapping = load_job(job_file, {"prune.sparsity": 0.75, "prune.exclude": ["a.*"]})
    assert by_text == by_mapping


@pytest.mark.parametrize("text", ["prune.sparsity", "", "=1", "  =1", "--help", "two\nlines"])
def test_set_without_key_or_equals_says_how_to_write_it(job_file: Path, text: str) -> None:
    assert "must read dotted.key=value" in refusal(job_file, [text])


@pytest.mark.parametrize("key", ["prune.sparsity.deep", "name.x.y", "prune.criterion.a"])
def test_a_dotted_key_into_a_value_is_refused(job_file: Path, key: str) -> None:
    assert "is a value, not a section" in refusal(job_file, {key: 1})


@pytest.mark.parametrize("key", ["", ".", "..", "prune.", ".prune", "prune..rounds"])
def test_a_key_with_an_empty_part_is_refused(job_file: Path, key: str) -> None:
    assert refusal(job_file, {key: 1})


# -- idle options ----------------------------------------------------------------------------------

IDLE = [
    ({"finetune.learning_rate": 0.5}, {"finetune.learning_rate"}),
    ({"pretrain.batch_size": 7, "pretrain.momentum": 0.5}, "pretrain.batch_size pretrain.momentum"),
    ({"finetune.epochs": 1, "finetune.optimizer": "adam", "finetune.momentum": 0.1}, "momentum"),
    ({"finetune.epochs": 1, "finetune.lr_gamma": 0.5}, "finetune.lr_gamma"),
    ({"finetune.epochs": 1, "finetune.lr_schedule": "step", "finetune.lr_gamma": 0.5}, ""),
    ({"prune.criterion": "magnitude", "prune.calibration_examples": 9}, "calibration_examples"),
    ({"prune.hutchinson_probes": 9}, "prune.hutchinson_probes"),
    ({"prune.unit_score": "sum"}, "prune.unit_score"),
    ({"prune.criterion": "obd", "prune.hutchinson_probes": 9}, ""),
    ({"prune.schedule": "linear"}, "prune.schedule"),
    ({"prune.schedule": "linear", "prune.rounds": 2}, ""),
    (
        {
            "prune.rewind": "learning_rate",
        },
        "prune.rewind",
    ),
    ({"prune.rewind": "learning_rate", "finetune.epochs": 1}, ""),
    ({"prune.rewind": "weights"}, ""),
    ({"prune.reconstruct_damping": 0.1}, "prune.reconstruct_damping"),
    ({"prune.reconstruct_damping": 0.1, "prune.reconstruct": "least_squares"}, ""),
    ({"prune.reconstruct_damping": 0.1, "prune.criterion": "obs"}, ""),
    ({"prune.reconstruct_positions": 9, "prune.criterion": "wanda"}, "prune.reconstruct_positions"),
    ({"prune.reconstruct_relu_steps": 5, "prune.criterion": "obs"}, "prune.reconstruct_relu_steps"),
    (
        {"prune.reconstruct_relu_steps": 5, "prune.reconstruct": "sparsegpt"},
        "prune.reconstruct_relu_steps",
    ),
    ({"prune.criterion": "magnitude", "prune.calibration_examples": 9}, "calibration_examples"),
    (
        {
            "prune.criterion": "magnitude",
            "prune.calibration_examples": 9,
            "prune.reconstruct": "least_squares",
        },
        "",
    ),
    (
        {
            "finetune.epochs": 1,
            "finetune.batch_size": 8,
            "finetune.microbatches": 8,
            "finetune.mixup": 0.2,
        },
        "finetune.mixup",
    ),
    ({"pretrain.mixup": 0.2, "finetune.ema_decay": 0.9}, "pretrain.mixup finetune.ema_decay"),
    ({"finetune.epochs": 1, "finetune.after": "last"}, "finetune.after"),
    ({"finetune.epochs": 1, "finetune.after": "last", "prune.rounds": 2}, ""),
    (
        {
            "finetune.epochs": 1,
            "finetune.label_smoothing": 0.1,
            "finetune.distillation": {"weight": 1.0},
        },
        "finetune.label_smoothing",
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), IDLE)
def test_options_without_effect_are_found(job_file: Path, overrides: Any, expected: Any) -> None:
    wanted = set(expected.split() if isinstance(expected, str) else expected)
    found = find_idle_options(load_job(job_file, overrides))
    assert len(found) == len(wanted)
    assert all(any(key.endswith(name) for name in wanted) for key, _ in found)
    for key, reason in found:
        assert key in overrides
        assert reason


def test_a_job_read_back_from_a_record_sets_nothing_idle(job_file: Path) -> None:
    job = load_job(job_file)
    again = JobConfig.model_validate(job.model_dump(mode="json"))
    assert again.prune.model_fields_set != job.prune.model_fields_set
    assert find_idle_options(again) == []


# -- names of trials -------------------------------------------------------------------------------


def test_trial_id_reads_as_words_and_a_hash(job_file: Path) -> None:
    job = load_job(job_file, {"prune.sparsity": 0.95, "prune.rounds": 3})
    words, _, digest = trial_id(job).rpartition("-")
    assert words == "taylor-s0.95-r3"
    assert len(digest) == 8
    int(digest, 16)
    assert trial_id(load_job(job, {"prune.sparsity": 0.975})).startswith("taylor-s0.975-r3-")
    own = load_job(job, {"prune.criterion": "my.module:rule"})
    assert trial_id(own).startswith("rule-s0.95-r3-")


def test_trial_id_never_changes(job_file: Path) -> None:
    # Results on disk are found by these names: a change here orphans every one of them. What is
    # hashed is spelled out, so that this does not ask the code what it should be.
    text = (
        '{"prune":{"criterion":"taylor","sparsity":0.5},"schema_version":1,'
        '"workload":{"factory":"my_module:make"}}'
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert trial_id(load_job(job_file)) == f"taylor-s0.50-r1-{digest[:8]}"
    rich = load_job(
        job_file,
        {
            "seed": 3,
            "workload.options": {"b": [1, 2.5], "a": "x"},
            "pretrain.epochs": 2,
            "prune.layer_min_sparsity": {"conv.*": 0.25},
            "prune.exclude": ["head.*"],
            "prune.rounds": 4,
            "finetune.optimizer": "adamw",
        },
    )
    text = (
        '{"finetune":{"optimizer":"adamw"},"pretrain":{"epochs":2.0},"prune":{"criterion":"taylor",'
        '"exclude":["head.*"],"layer_min_sparsity":{"conv.*":0.25},"rounds":4,"sparsity":0.5},'
        '"schema_version":1,"seed":3,'
        '"workload":{"factory":"my_module:make","options":{"a":"x","b":[1,2.5]}}}'
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert trial_id(rich) == f"taylor-s0.50-r4-{digest[:8]}"


def test_trial_id_ignores_where_and_under_what_name(job_file: Path) -> None:
    plain = trial_id(load_job(job_file))
    elsewhere = {
        "name": "another",
        "storage": "/elsewhere",
        "cluster.num_workers": 3,
        "cluster.threads_per_worker": 2,
        "cluster.max_failures": 0,
        "cluster.address": "auto",
    }
    assert trial_id(load_job(job_file, elsewhere)) == plain
    for launcher in ("ray", "local"):
        assert trial_id(load_job(job_file, {"cluster.launcher": launcher})) == plain


def test_trial_id_changes_with_every_field_that_decides_the_result(job_file: Path) -> None:
    changes = {
        "seed": 1,
        "workload.factory": "other:make",
        "workload.options.x": 1,
        "workload.tie": [["a", "b"]],
        "workload.eval_batch_size": 7,
        "workload.validation": 0.1,
        "workload.train_sample": 7,
        "workload.eval_precision": "bfloat16",
        "workload.channels_last": True,
        "prune.initial_masks": "a.safetensors",
        "prune.initial_masks_digest": "a1b2",
        "workload.transfer.checkpoint_digest": "a1b2",
        "finetune.distillation.teacher_digest": "a1b2",
        "prune.criterion": "snip",
        "prune.sparsity": 0.25,
        "prune.rounds": 2,
        "prune.schedule": "cubic",
        "prune.ramp_rounds": 1,
        "prune.scope": "layer",
        "prune.granularity": "2:4",
        "prune.round_to": 8,
        "prune.min_width": 2,
        "prune.compact": False,
        "prune.calibration_examples": 7,
        "prune.calibration_batch_size": 7,
        "prune.calibration_augment": False,
        "prune.calibration_precision": "bfloat16",
        "prune.unit_score": "sum",
        "prune.hutchinson_probes": 7,
        "prune.batchnorm_examples": 7,
        "prune.reconstruct": "least_squares",
        "prune.reconstruct_damping": 0.5,
        "prune.reconstruct_positions": 9,
        "prune.reconstruct_relu_steps": 5,
        "prune.rewind": "weights",
        "prune.include": ["a"],
        "prune.exclude": ["a"],
        "prune.layer_min_sparsity": 0.1,
        "prune.layer_max_sparsity": 0.9,
    }
    for section in ("pretrain", "finetune"):
        changes |= {
            f"{section}.epochs": 1.5,
            f"{section}.optimizer": "adam",
            f"{section}.learning_rate": 0.3,
            f"{section}.momentum": 0.3,
            f"{section}.weight_decay": 0.3,
            f"{section}.lr_schedule": "step",
            f"{section}.lr_milestones": [0.3],
            f"{section}.lr_gamma": 0.3,
            f"{section}.warmup_epochs": 0.3,
            f"{section}.batch_size": 7,
            f"{section}.microbatches": 2,
            f"{section}.freeze": ["a"],
            f"{section}.adversarial.kind": "fgsm",
            f"{section}.adversarial.epsilon": 0.3,
            f"{section}.adversarial.steps": 3,
            f"{section}.adversarial.step_size": 0.3,
            f"{section}.adversarial.weight": 0.3,
            f"{section}.label_smoothing": 0.1,
            f"{section}.mixup": 0.2,
            f"{section}.cutmix": 1.0,
            f"{section}.max_gradient_norm": 1.0,
            f"{section}.precision": "bfloat16",
            f"{section}.ema_decay": 0.9,
        }
    changes |= {
        "finetune.after": "last",
        "finetune.patience": 3,
        "finetune.validate_every": 0.5,
        "finetune.distillation.weight": 0.5,
        "finetune.distillation.temperature": 2.0,
        "finetune.distillation.teacher": "a",
        "finetune.distillation.features": ["a"],
        "finetune.distillation.features_weight": 2.0,
        "workload.transfer.checkpoint": "a",
        "workload.transfer.new_head": ["a"],
        "workload.encoding.kind": "one_hot",
        "workload.encoding.levels": 4,
        "workload.encoding.mean": [0.3],
        "workload.encoding.deviation": [0.3],
        "attack.kind": "fgsm",
        "attack.epsilon": 0.3,
        "attack.steps": 3,
        "attack.step_size": 0.3,
        "attack.restarts": 3,
        "attack.examples": 3,
    }
    of_units: dict[str, object] = {
        f"prune.target.{cost}": 0.25 for cost in ("parameters", "macs", "bytes")
    }
    of_units["prune.target.uniform"] = True
    fields = {row[0] for row in describe_fields() if not row[0].startswith("[")}
    fields.remove("prune.target.sparsity")  # Another way to write prune.sparsity.
    outside = {
        f for f in fields if f.startswith(("cluster.", "sweep.")) or f in ("name", "storage")
    }
    named = {key if key in fields else key.rpartition(".")[0] for key in [*changes, *of_units]}
    assert named == fields - outside, "a new field belongs in this test, on one side or the other"
    ids = [trial_id(load_job(job_file, {key: value})) for key, value in changes.items()]
    channel = {"prune.granularity": "channel"}
    ids += [trial_id(load_job(job_file, channel | {key: of_units[key]})) for key in of_units]
    ids.append(trial_id(load_job(job_file, channel)))
    assert len({*ids, trial_id(load_job(job_file))}) == len(ids) + 1


def test_trial_id_does_not_see_a_default_that_is_written_out(job_file: Path) -> None:
    job = load_job(job_file)
    whole = job.model_dump(mode="json")
    assert trial_id(JobConfig.model_validate(whole)) == trial_id(job)
    whole["prune"]["layer_min_sparsity"] = 0
    whole["pretrain"]["epochs"] = 0
    assert trial_id(JobConfig.model_validate(whole)) == trial_id(job)


def test_trial_id_does_not_see_the_order_of_keys(job_file: Path) -> None:
    one = load_job(job_file, {"workload.options": {"a": 1, "b": 2}, "seed": 4})
    two = load_job(job_file, {"seed": 4, "workload.options": {"b": 2, "a": 1}})
    assert trial_id(one) == trial_id(two)


# -- documentation ---------------------------------------------------------------------------------


def test_every_field_is_described_with_its_default() -> None:
    rows = describe_fields()
    for field, default, text in rows:
        assert text, f"{field} has no description"
        assert "\n" not in text
        assert default or field.startswith("["), f"{field} shows no default"
    listed = {field for field, _, _ in rows if not field.startswith("[")}
    schema = JobConfig.model_json_schema()

    def names(tree: dict[str, Any], prefix: str) -> set[str]:
        found: set[str] = set()
        for name, node in tree["properties"].items():
            reference = node.get("$ref", "")
            inner = schema["$defs"].get(reference.rpartition("/")[2])
            found |= names(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}"}
        return found

    assert listed == names(schema, "")


def test_described_defaults_are_the_defaults(job_file: Path) -> None:
    job = load_job(job_file).model_dump(mode="json")
    for field, default, _ in describe_fields():
        if field.startswith("[") or default in ("required", "unset"):
            continue
        value: Any = job
        for part in field.split("."):
            value = value[part]
        if field not in ("name", "prune.criterion", "prune.sparsity"):
            assert json.loads(default) == value, field


def test_nearest_name_suggests_only_what_is_near() -> None:
    assert nearest_name("fischer", CRITERIA) == ", did you mean 'fisher'?"
    assert nearest_name("zzz", CRITERIA) == ""
    assert nearest_name("x", []) == ""


# -- anything at all -------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=3),
    st.sampled_from(["taylor", "2:4", "a:b", "weights", "sgd", "geometric"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
KNOWN = [row[0].strip("[]") for row in describe_fields()]
KEYS = st.one_of(
    st.sampled_from(KNOWN),
    st.text(max_size=10),
    st.builds("{}.{}".format, st.sampled_from(KNOWN), st.text(max_size=5)),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, ANYTHING, max_size=5))
def test_garbage_is_a_job_or_a_config_error(overrides: dict[str, Any]) -> None:
    try:
        job = load_job(None, overrides)
    except ConfigError as error:
        assert not set("\n\r") & set(str(error))  # noqa: PT017 - either outcome is right
    else:
        name = trial_id(job)
        assert "/" not in name
        assert trial_id(JobConfig.model_validate_json(job.model_dump_json())) == name
        assert (Path("/x") / job.name).parent == Path("/x")
        find_idle_options(job)


@settings(max_examples=100)
@given(st.lists(st.text(max_size=20) | st.builds("{}={}".format, KEYS, st.text(max_size=8))))
def test_garbage_overrides_are_a_job_or_a_config_error(texts: list[str]) -> None:
    try:
        load_job(None, texts)
    except ConfigError as error:
        assert not set("\n\r") & set(str(error))  # noqa: PT017 - either outcome is right
