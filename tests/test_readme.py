"""The READMEs: their commands, code, links, names and tables hold against the package."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from shell import Shell

import gbp_ray
from gbp_ray.config.job import describe_fields, expand, load_job, trial_id

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gbp_ray"
FILES = ["README.md", "jobs/README.md", "tests/benchmarks/README.md", "cluster/README.md"]
TEXTS = {name: (ROOT / name).read_text() for name in FILES}
README = TEXTS["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


IMAGES, QUADRANTS, SWEEP, WHOLE = blocks("toml")
WORKLOAD, SCRIPT, API = blocks("python")


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """Reads the rows of the tables of a text, without their headings."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    rules = [number for number, row in enumerate(rows) if set(row) <= set("|-")]
    kept = [r for n, r in enumerate(rows) if n not in rules and n + 1 not in rules]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in kept]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([a-z_0-9]+)`", cell)


def commands(text: str) -> list[list[str]]:
    """Lists the commands of gbp-ray in a text, from its shell blocks and its code spans."""
    lines = "\n".join(blocks("sh", text)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    found = []
    for line in lines:
        if match := re.search(r"gbp-ray [a-z].*", line.split("  #")[0]):
            found.append(shlex.split(match.group())[1:])
    return found


# -- what the text says ----------------------------------------------------------------------------


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])
    assert links
    for link in links:
        place, _, anchor = link.partition("#")
        target = (ROOT / name).parent / place if place else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, link


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_named_exist(name: str) -> None:
    places = (ROOT, PACKAGE, (ROOT / name).parent)
    # Made by the recipes, written by jobs, or the reader's own.
    made = {"quadrants.py", "quadrants.toml", "images.toml", "JOB.toml", "job.toml", "NAME.toml"}
    found = set(re.findall(r"[\w./-]*\w\.(?:py|toml|yaml)\b", TEXTS[name]))
    for file in sorted(found):
        if Path(file).name not in made and file != "secrets.yaml":
            assert any((place / file).exists() for place in places), file


def test_the_tree_is_that_of_the_package() -> None:
    (tree,) = [block for block in blocks("", section("Architecture")) if "gbp_ray/" in block]
    named = set(re.findall(r"^  ([\w.]+?)/?\s", tree, re.MULTILINE))
    entries = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    # Folders of bytecode may be left of packages that have moved.
    assert named == {
        e for e in entries if (PACKAGE / e).is_file() or any((PACKAGE / e).glob("*.py"))
    }


def test_the_import_direction_is_the_one_that_is_held() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert f"`{' > '.join(layers).replace('gbp_ray.', '')}`" in README


def test_each_dependency_has_its_reason() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(name for names in extras.values() for name in names)]
    wanted = {re.split(r"[\[<>=]", name)[0] for name in needed} - {"gbp-ray"}
    rows = table(section("Dependencies"))
    cells = [re.sub(r"^.*: |\[.*?\]", "", packages) for packages, _ in rows]
    named = {name for cell in cells for name in cell.split(", ")}
    assert named == wanted
    assert all(reason for _, reason in rows)


def test_the_workload_contract_is_whole() -> None:
    fields, factories = table(section("Workloads").split("\nBuilt-in")[0]), []
    listed = [name for cell, _ in fields for name in names_in(cell)]
    wanted = [field.name for field in dataclasses.fields(gbp_ray.Workload)]
    assert sorted(listed) == sorted(wanted)
    for names, _, options in table(section("Workloads").split("\nBuilt-in")[1]):
        rest = options.partition(";")[2]
        for name in names_in(names):
            known = list(inspect.signature(getattr(gbp_ray.zoo, name)).parameters)
            has_rest = name == names_in(names)[-1]
            assert known == names_in(options if has_rest else options.removesuffix(rest)), name
            factories.append(name)
    assert sorted(factories) == sorted(gbp_ray.zoo.__all__)


def test_the_api_is_there() -> None:
    text = section("Python API")
    names = names_in(text.split("```")[-1]) + re.findall(r"gbp_ray\.(\w+)", text)
    assert len(names) > 10
    for name in [*names, "GbpError"]:
        assert name in gbp_ray.__all__, name


@pytest.mark.parametrize("name", FILES)
def test_ray_stop_is_not_suggested_without_its_reach(name: str) -> None:
    for place in re.finditer(r"(?<!gbp-)\bray stop\b", TEXTS[name]):
        assert re.search(r"ends\W+every\W+Ray", TEXTS[name][place.end() :][:120], re.IGNORECASE)


def test_every_job_has_a_line() -> None:
    for path in (ROOT / "jobs").rglob("*.toml"):
        place = path.relative_to(ROOT / "jobs")
        assert f"({place})" in TEXTS["jobs/README.md"] or place.parts[0] == "byo"


# -- commands --------------------------------------------------------------------------------------


def test_the_checks_run_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- the test command -->" in script
    (command,) = re.findall(r"<!-- the test command -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert ".venv/bin/python -m pytest" in command


def test_commands_and_their_options_exist(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fields = {row[0].strip("[]") for row in describe_fields()}
    help_of: dict[str, str] = {}
    for verb, *arguments in (c for text in TEXTS.values() for c in commands(text)):
        if verb not in help_of:
            code, help_of[verb], errors = shell(verb, "--help")
            assert code == 0, errors
        for argument in arguments:
            if argument.startswith("--"):
                assert re.search(rf"{argument.partition('=')[0]}\s", help_of[verb]), (
                    verb,
                    argument,
                )
        values = [b for a, b in pairwise(arguments) if a == "--set"]
        for key in {value.partition("=")[0] for value in values} - {"KEY"}:
            assert key in fields or key.startswith("workload.options."), key
    _, shown, _ = shell("--help")
    verbs = set(re.findall(r"^│ ([a-z]+) ", shown, re.MULTILINE))
    named = {command[0] for command in commands(section("Commands"))}
    assert named == verbs


# -- recipes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the recipe with one's own Python was run, by command and from Python."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, text in {
        "images.toml": IMAGES,
        "quadrants.py": WORKLOAD,
        "quadrants.toml": QUADRANTS,
        "sweep.toml": QUADRANTS + SWEEP,
        "whole.toml": WHOLE,
    }.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        gbp_ray.prune("quadrants.toml", is_quiet=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(API, "README.md", "exec"), {})
            exec(compile(SCRIPT, "README.md", "exec"), {})
        (folder / "printed").write_text(printed.getvalue())
        yield folder


def test_the_python_runs(recipes: Path) -> None:
    first, second, third = (recipes / "printed").read_text().splitlines()
    assert re.match(r"80\.00% sparse, \d\d\.\d\d% accurate, in .*/gbp-results/sparser/", first)
    assert second.startswith("taylor_squared-s0.")
    assert third == (
        "<MaskSet 50.00% of 400 weights in 2 tensors pruned by taylor> "
        "<Pruner by taylor to 90.00% at step 20, now at step 30: 90.00% of 400 weights>"
    )
    assert len(list(recipes.rglob("trial.json"))) == 2


def test_the_jobs_validate(recipes: Path) -> None:
    image_job, whole = load_job(recipes / "images.toml"), load_job(recipes / "whole.toml")
    for job in (image_job, whole):
        factory = getattr(gbp_ray.zoo, job.workload.factory.partition(":")[2])
        inspect.signature(factory).bind(**job.workload.options)
    assert whole.name == "my-job"
    known = {row[0] for row in describe_fields()}
    assert set(re.findall(r"^([a-z_.]+) = ", WHOLE, re.MULTILINE)) - known <= {
        "workload.transfer",
        "workload.encoding",
        "finetune.adversarial",
        "finetune.distillation",
    }
    assert len(expand(load_job(recipes / "sweep.toml"))) == 3 * 5 * 2 * 3
    (recipes / "target.toml").write_text(re.sub('"prune.sparsity".*', "", QUADRANTS + SWEEP))
    (override,) = re.findall(r"`--set (sweep\.target\S+)`", README)
    assert load_job(recipes / "target.toml", [override]).sweep.target.max_drop == 0.01


def test_the_printed_trial_is_that_of_the_embedded_job(
    shell: Shell, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (printed,) = [block for block in blocks("", section("Two commands")) if "round" in block]
    job = load_job(PACKAGE / "workloads" / "digits.toml")
    assert printed.splitlines()[0] == trial_id(job)
    monkeypatch.setenv("COLUMNS", "200")
    code, shown, _ = shell("show", "gbp-results/quadrants")
    assert code == 0
    heading = next(line for line in printed.splitlines() if line.startswith(" round"))
    assert heading.split() == next(line for line in shown.splitlines() if "round " in line).split()


def test_the_reading_verbs_run(
    shell: Shell, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = blocks("sh", section("Commands"))
    given = {
        "URI": "gbp-results/quadrants",
        "DIR": "copy",
        "A": "gbp-results/quadrants",
        "B": "gbp-results/sparser",
        "MASKS": "gbp-results/quadrants",
        "CHECKPOINT": "gbp-results/sparser",
        "[SECTION]": "prune",
    }
    # Those that run jobs or need a cluster.
    done = {"prune", "sweep", "stability", "submit", "jobs", "status", "logs", "stop"}
    for verb, *arguments in commands(f"```sh\n{block}```\n") + commands(section("Commands")):
        if verb not in done:
            code, _, errors = shell(
                verb, *(given.get(argument, argument) for argument in arguments)
            )
            assert code == 0, errors
            done.add(verb)
    assert len(done) == 21
    (program,) = re.findall(r'# torch\.export\.load\("(.*)"\)$', block, re.MULTILINE)
    inputs = torch.zeros(3, 2)
    assert torch.export.load(program).module()(inputs).shape == (3, 2)
    assert (recipes / "my-report" / "index.html").exists()
