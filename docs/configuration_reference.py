"""Writes docs/configuration.md from the config models: `python docs/configuration_reference.py`.

A test compares the file with what this makes, so that the page cannot drift from the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.contracts.config.ai_label import AiLabelConfig
from cluster.contracts.config.base import AUTO, auto_rule
from cluster.contracts.config.best_of_n import BestOfNConfig
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.commented import FIRST_KEYS, commented_toml, sections_of
from cluster.contracts.config.constitution import ConstitutionConfig
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.file import read_toml, toml_value
from cluster.contracts.config.label import LabelConfig
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.config.preferences import PreferencesConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.registry import REWARD_KINDS, Registry

PAGE = Path(__file__).with_name("configuration.md")
EXAMPLE = Path(__file__).parents[1] / "examples" / "ppo.toml"
COMMANDS: dict[str, type[BaseModel]] = {
    "accord train": TrainConfig,
    "accord sft": SftConfig,
    "accord reward-model": RewardModelConfig,
    "accord dpo": DpoConfig,
    "accord best-of-n": BestOfNConfig,
    "accord ai-label": AiLabelConfig,
    "accord constitution": ConstitutionConfig,
    "accord evaluate": EvaluateConfig,
    "accord label": LabelConfig,
    "accord preferences choose": ChoiceConfig,
    "accord preferences snapshot": PreferencesConfig,
    "accord pipeline": PipelineConfig,
}
HEAD = """# Configuration

Every command that trains or evaluates reads one TOML file. This page lists all keys: first the
fifteen that people change first, then every section, then one full config. The script
`docs/configuration_reference.py` makes the page from the code.

`accord init` writes a first config for your model and data.

**How to read the tables.** A value followed by a colon says what this value does: `0: off`.
`none: …` and `empty: …` say what happens if the key is not set.

**On the command line** you can set any key after the file: `accord train my.toml batch.steps=50`.
Such a setting replaces the file's. Paths need no quotes. `KEY=none` removes the value of a key
whose type includes `none`. A number selects an entry of a list: `reward.sources.0.weight=0.5`.

**Mistakes.** The command reports all mistakes at once, before it starts anything. For an unknown
key, the message names the nearest valid one.

**Keys with the default `auto`.** Accord chooses a value that fits your machine and your model. It
never changes a key that you set. `KEY=auto` on the command line undoes what the file sets.
`accord plan my.toml` prints every value in force and, for `auto`, the reason:

```
max_running = 64  # auto: a CPU decodes no faster with more than 64
```

The run stores the values in force in its `config.toml`. When you resume or replay the run, it takes
them from there, so they stay the same on another machine.
"""
FIRST = """## The fifteen keys people change first

These are keys of `accord train`:
"""
ALL = """## All keys, by section

The line under each heading names the commands that have the section.
"""
FULL = """## A full config

This is `examples/ppo.toml` with every other key at its default. A line such as `# value_lr =` is a
key that is not set.
"""


def page() -> str:
    """The text of docs/configuration.md."""
    example = commented_toml(TrainConfig, read_toml(str(EXAMPLE)), every_key=True)
    parts = [HEAD, FIRST, _first_keys(), ALL, *_sections(), FULL, f"```toml\n{example}```\n"]
    return "\n".join(parts)


def _first_keys() -> str:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key in FIRST_KEYS:
        *path, name = key.split(".")
        model: Any = TrainConfig
        for part in path:
            model = model.model_fields[part].annotation
        default, meaning = _default_and_meaning(model.model_fields[name])
        rows.append(f"| `{key}` | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _sections() -> Iterator[str]:
    """Each kind of section once, with every name that it has and the commands that have it."""
    uses: dict[type[BaseModel], dict[str, list[str]]] = {}
    for command, model in COMMANDS.items():
        if any(not sections_of(field.annotation) for field in model.model_fields.values()):
            uses.setdefault(model, {}).setdefault("", []).append(command)
        for name, section in _nested(model, ""):
            uses.setdefault(section, {}).setdefault(name, []).append(command)
    for section, names in uses.items():
        kind = section.model_fields.get("type")
        brackets = "`[{}]`" if kind is None else "`[[{}]]`"
        title = brackets.format(next(iter(names)))
        if kind is not None:
            title += (
                f', `type = "{kind.default}"`'
                if kind.default in REWARD_KINDS
                else ", `type` of a plugin"
            )
        if "" in names:
            title = f"Above the first section of `{names[''][0]}`"
        where = "; ".join(
            (f"{brackets.format(name)} of " if len(names) > 1 else "")
            + ", ".join(f"`{command}`" for command in commands)
            for name, commands in names.items()
        )
        yield f"### {title}\n\n{where}\n\n{_table(section)}"


def _nested(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for section in sections_of(field.annotation):
            yield f"{prefix}{name}", section
            yield from _nested(section, f"{prefix}{name}.")


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if sections_of(field.annotation) and get_origin(field.annotation) is not list:
            continue
        default, meaning = _default_and_meaning(field)
        kind = _words(field) or _type(field.annotation)
        rows.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default_and_meaning(field: FieldInfo) -> tuple[str, str]:
    meaning, rule = field.description or "", auto_rule(field)
    if rule is not None:
        return f"`{AUTO}`", f"{meaning} `{AUTO}`: {rule}."
    if field.is_required():
        return "required", meaning
    value = field.get_default(call_default_factory=True)
    return "`none`" if value is None else f"`{toml_value(value)}`", meaning


def _words(field: FieldInfo) -> str:
    """The built-in words of a key that names code, or nothing."""
    for rule in field.metadata:
        known = getattr(getattr(rule, "func", None), "__self__", None)
        if isinstance(known, Registry):
            return " \\| ".join(f"`{word}`" for word in known) + " or a plugin's"
    return ""


def _type(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return _type(get_args(kind)[0])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(kind))
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(kind))
    if origin is list and sections_of(kind):
        return "list of tables"
    if origin is tuple:
        parts = get_args(kind)
        if parts[-1] is Ellipsis:
            return f"list of {_type(parts[0])}"
        return f"list of {len(parts)} {_type(parts[0])}"
    if kind == dict[str, Any]:
        return "sections"
    if origin is not None:
        return f"{origin.__name__} of {', '.join(_type(a) for a in get_args(kind))}"
    return "none" if kind is type(None) else getattr(kind, "__name__", str(kind))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
