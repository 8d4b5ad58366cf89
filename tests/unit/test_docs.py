"""What README and docs/ say is so: commands, targets, files, links, settings, metric names."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import typer

import launch
from cluster.contracts.config.file import apply_overrides, check_config, load_config, read_toml
from cluster.contracts.errors import UserError
from cluster.contracts.plugins import forget
from tests.pages import blocks, commands, shown_files

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
PACKAGES = ("actors", "cluster", "learner", "reward_service")
METRIC_GROUPS = (
    "objective|policy|value|rewards|completions|async|sampling|workers|weight_sync|time|perf|"
    "rollout|run|train|eval|evaluation|rm"
)
OTHER_SYSTEMS = {"TRL", "verl", "OpenRLHF"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "configuration_reference", ROOT / "docs" / "configuration_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.M))


MODELS: dict[str, Any] = reference().COMMANDS
MODELS |= dict.fromkeys(("accord plan", "accord serve-reward"), MODELS["accord train"])


def problem_of(words: list[str], shown: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """Why a command line of ours would be refused, or None. Nothing is run.

    shown: the files that the page tells its reader to write.
    """
    if Path(words[0]).name == "accord":
        return problem_of_accord(words[1:], shown)
    if words[:2] == ["python", "launch.py"]:
        return problem_of_accord(words[2:], shown)
    if words[0] == "make":
        goals = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
        unknown = [goal for goal in goals if goal not in make_targets()]
        return f"no make target {unknown}" if unknown else None
    return None


def problem_of_accord(words: list[str], shown: Mapping[str, str]) -> str | None:
    command: Any = typer.main.get_command(launch.app)
    path = ["accord"]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
        path.append(name)
    if {"--help", "-h"} & set(words):
        return None
    if hasattr(command, "commands"):
        return f"{' '.join(path)} needs a command"
    try:
        given = command.make_context(" ".join(path), list(words)).params
    except Exception as problem:  # click's, under whichever name typer brings it
        return f"{type(problem).__name__}: {problem}"
    return problem_of_settings(" ".join(path), given, shown)


def problem_of_settings(
    command: str, given: dict[str, Any], shown: Mapping[str, str]
) -> str | None:
    """Whether the settings after a config of examples/, or after --resume, make a valid config."""
    config, overrides = given.get("config"), [str(w) for w in given.get("overrides") or []]
    if given.get("resume") is not None:
        overrides = [str(config), *overrides] if config else overrides
        config = EXAMPLES_BY_COMMAND[command]
    if config is None:
        return None
    if command == "accord label" and str(config).endswith(".db"):  # a store is config enough
        overrides, config = [f"store={config}", *overrides], EXAMPLES_BY_COMMAND[command]
    if str(config) not in shown and not (ROOT / config).is_file():
        return f"no file {config}"
    try:
        if str(config) in shown:
            tree = apply_overrides(MODELS[command], tomllib.loads(shown[str(config)]), overrides)
            check_config(MODELS[command], tree, where=str(config))
        else:
            load_config(MODELS[command], str(ROOT / config), overrides)
    except UserError as problem:
        return str(problem)
    return None


def command_of(example: Path) -> str:
    """The command that the first line of an example names."""
    first = example.read_text("utf-8").splitlines()[0]
    arguments = r"(?: [a-z/]+[.-]\S+)*(?: --config)?"
    found = re.search(
        rf"(accord [a-z-]+(?: [a-z]+)?){arguments} {re.escape(named(example))}$", first
    )
    assert found, f"{named(example)}: the first line does not end with its command"
    return found[1]


EXAMPLES_BY_COMMAND = {command_of(example): example for example in reversed(EXAMPLES)}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_would_be_accepted(page: Path) -> None:
    lines = [words for block in blocks(page, "sh") for words in commands(block)]
    shown = shown_files(page)
    wrong = [(shlex.join(words), why) for words in lines if (why := problem_of(words, shown))]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "accord trian examples/ppo.toml",
        "accord quickstart --sede 1",
        "accord report",
        "accord scale runs/q many",
        "accord preferences",
        "accord train examples/no-such.toml",
        "accord train examples/ppo.toml batch.setps=3",
        "accord train --resume runs/q batch.setps=3",
        "accord sft --resume runs/q --from 3",
        "accord sft examples/sft.toml fit.epochs=none-of-these",
        "accord reward-model examples/reward_model.toml usemargin=true",
        "cd x && OMP_NUM_THREADS=1 .venv/bin/accord bnech",
        "python launch.py nothing",
        "make no-such-target",
    ],
)
def test_the_check_sees_a_wrong_command(line: str) -> None:
    assert any(problem_of(words) for words in commands(line))


def test_the_readme_is_short() -> None:
    """Words outside code blocks and tables."""
    text = re.sub(r"^```.*?^```$", "", PAGES[0].read_text("utf-8"), flags=re.S | re.M)
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) <= 800


def test_the_readme_shows_commands() -> None:
    found = [words[0] for block in blocks(PAGES[0], "sh") for words in commands(block)]
    assert {"accord", "make", "git"} <= set(found)


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_examples_are_valid_configs(example: Path) -> None:
    load_config(MODELS[command_of(example)], str(example))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_toml_blocks_are_valid_over_an_example(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plugin file that a page shows is made of its Python blocks.
    plugin = tmp_path / "my_plugin.py"
    plugin.write_text("\n\n".join(blocks(page, "python")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    try:
        for shown in map(tomllib.loads, blocks(page, "toml")):
            command = "accord dpo" if "loss" in shown else "accord train"
            base = read_toml(str(EXAMPLES_BY_COMMAND[command]))
            tree = apply_overrides(MODELS[command], {**base, **shown}, [])
            check_config(MODELS[command], tree, where=named(page))
    finally:
        forget(str(plugin))


def without_other_systems(text: str) -> str:
    """The text without the table columns that are headed TRL, verl or OpenRLHF."""
    lines, dropped = [], set[int]()
    for line in text.splitlines():
        cells = line.split("|")
        if not line.startswith("|"):
            dropped = set()
        elif not dropped:
            dropped = {i for i, cell in enumerate(cells) if cell.strip() in OTHER_SYSTEMS}
        lines.append("|".join(cell for i, cell in enumerate(cells) if i not in dropped))
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_settings_named_in_the_text_exist(page: Path) -> None:
    """`section.key` and `section.key=value` between backticks."""
    model = MODELS["accord train"]
    sections = {name: field.annotation for name, field in model.model_fields.items()}
    sections["fit"] = MODELS["accord sft"].model_fields["fit"].annotation
    if page.stem == "labelling":
        sections = {n: f.annotation for n, f in MODELS["accord label"].model_fields.items()}
    if page.stem == "preferences":
        for command in ("accord preferences snapshot", "accord reward-model"):
            sections |= {n: f.annotation for n, f in MODELS[command].model_fields.items()}
    text = without_other_systems(page.read_text("utf-8"))
    text = re.sub(r"\w+\.(?:json|jsonl|toml|db|py)\b", "", text)
    unknown = []
    for section, rest in re.findall(r"[` ]([a-z]+)\.([a-z_.]+)\b(?=[^`\n]*`)", text):
        kind: Any = sections.get(section)
        for key in rest.strip(".").split(".") if hasattr(kind, "model_fields") else []:
            field = getattr(kind, "model_fields", {}).get(key)
            if field is None:
                unknown.append(f"{section}.{rest}")
                break
            kind = field.annotation
    assert unknown == []


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text)]
    gone = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    folders = "|".join((*PACKAGES, "docs", "tests", "examples", "requirements"))
    files = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.-]*\w\.\w+)", text)
    assert gone + [file for file in files if not (ROOT / file).exists()] == []


def anchors(page: Path) -> set[str]:
    """What a link can point at: headings in lower case, without punctuation, with hyphens."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_links_point_at_headings_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([\w./-]*)#([^)\s]+)\)", page.read_text("utf-8"))
    files = [(page.parent / target if target else page, anchor) for target, anchor in links]
    assert [anchor for file, anchor in files if anchor not in anchors(file)] == []


def test_the_configuration_page_is_what_the_code_says() -> None:
    module = reference()
    assert module.PAGE.read_text("utf-8") == module.page(), (
        "make it anew: python docs/configuration_reference.py"
    )


def sources() -> str:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return "\n".join(file.read_text("utf-8") for file in files if "_pb2" not in file.name)


def metric_exists(name: str, code: str) -> bool:
    """Written out, or put together from a prefix ("policy/") and a name ("clipfrac")."""
    group, _, last = name.partition("/")
    put_together = f'"{group}/"' in code or f'f"{group}/' in code or f'"{group}"' in code
    ending = re.escape(last.split("/")[-1])
    whole = re.search(rf'"{re.escape(name)}"', code)
    return bool(whole) or (put_together and bool(re.search(rf'["/]{ending}"', code)))


def test_documented_metrics_are_measured() -> None:
    text, code = (ROOT / "docs" / "operate.md").read_text("utf-8"), sources()
    names = re.findall(rf"`((?:{METRIC_GROUPS})/[A-Za-z0-9_/]+)`", text)
    assert len(names) > 60
    assert [name for name in names if not metric_exists(name, code)] == []
    assert not metric_exists("async/no_such_number", code)


def test_metrics_written_by_the_controller_and_the_learner_are_documented() -> None:
    text = (ROOT / "docs" / "operate.md").read_text("utf-8")
    files = (
        "cluster/loop/loop_metrics.py",
        "cluster/loop/bookkeeping.py",
        "cluster/loop/evaluations.py",
        "learner/rl/metrics.py",
        "learner/rl/update.py",
        "learner/rl/objective.py",
        "learner/rl/learner.py",
    )
    code = "\n".join((ROOT / file).read_text("utf-8") for file in files)
    names = set(re.findall(rf'"((?:{METRIC_GROUPS})/[a-z0-9_]+)"', code)) - {"policy/ratio"}
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def texts_in_code() -> str:
    """Every string of the packages; an f-string is cut where a value is put in."""
    found = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(file.read_text("utf-8")))
            found += [n.value for n in nodes if isinstance(n, ast.Constant)]
    return "\n".join(text for text in found if isinstance(text, str))


def test_messages_quoted_for_troubleshooting_are_those_of_the_code() -> None:
    """What stands between the numbers of a quoted message; `accord: error` is built from parts."""
    page, code = ROOT / "docs" / "troubleshooting.md", texts_in_code()
    lines = [line for block in blocks(page, "text") for line in block.splitlines()]
    quoted = [line for line in lines if not line.startswith(("accord: error", "  fix:"))]
    parts = [part for line in quoted for part in re.split(r"\d[\d.]*%?|…", line)]
    assert len(quoted) > 5
    assert [part for part in parts if len(part) > 12 and part.strip() not in code] == []


def test_documented_events_are_those_that_are_written() -> None:
    page = (ROOT / "docs" / "operate.md").read_text("utf-8")
    section = page[page.index("## events.jsonl") : page.index("## metrics.jsonl")]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    code = sources()
    assert documented == set(re.findall(r'event\(\s*"(\w+)"', code))


def test_functions_named_beside_formulas_exist() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text("utf-8")
    missing = []
    for folder in ("learner/algorithms", "learner/rl", "learner/compute"):
        for file in sorted((ROOT / folder).glob("*.py")):
            if file.stem in {"__init__", *MODELS["accord train"].model_fields}:
                continue  # `learner.lr` is a setting, not a function
            code = file.read_text("utf-8")
            for name in re.findall(rf"(?<![\w/.]){file.stem}\.([A-Za-z]\w+)", text):
                if name != "py" and not re.search(rf"^(?:def|class) {name}\b", code, re.M):
                    missing.append(f"{file.stem}.{name}")
    assert missing == []
    assert "advantages.gae" in text
