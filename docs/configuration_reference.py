"""Writes docs/configuration.md from the config models: `python docs/configuration_reference.py`.

A test compares the file with what this makes, so that the page cannot drift from the code.
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cluster.contracts.config.base import auto_rule
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.train import TrainConfig

PAGE = Path(__file__).with_name("configuration.md")
COMMANDS = {
    "accord train": TrainConfig,
    "accord sft": SftConfig,
    "accord reward-model": RewardModelConfig,
    "accord dpo": DpoConfig,
    "accord evaluate": EvaluateConfig,
}
HEAD = """# Configuration

A command takes one TOML file and any number of `section.key=value` settings after it; a setting
wins over the file, the file over the defaults. Paths need no quotes on the command line. Lists of
tables are reached by number: `reward.sources.0.weight=0.5`.

An unknown key is an error that names the nearest valid one; all problems of a config are told at
once; nothing is repaired silently and nothing changes while a run goes on. Every value in force is
printed by `accord plan CONFIG.toml`. The resolved config lies in the run directory as
`config.toml`.

This page is made from the code (`make docs`).
"""


def page() -> str:
    parts = [HEAD]
    described: dict[str, str] = {}
    for command, model in COMMANDS.items():
        sections = [name for name, field in model.model_fields.items() if _models(field.annotation)]
        plain = [name for name in model.model_fields if name not in sections]
        parts.append(f"## `{command}`\n")
        parts.append("Sections: " + ", ".join(f"`[{name}]`" for name in sections) + "\n")
        if plain:
            parts.append(_table(model, plain))
        for name in sections:
            for section in _models(model.model_fields[name].annotation):
                described.setdefault(section.__name__, _section(section))
    parts.append("## Sections\n")
    parts += described.values()
    return "\n".join(parts)


def _section(model: type[BaseModel]) -> str:
    parts = [f"### {model.__name__}\n"]
    own = [n for n, f in model.model_fields.items()]
    parts.append(_table(model, own))
    for field in model.model_fields.values():
        parts += [_section(inner) for inner in _models(field.annotation)]
    return "\n".join(parts)


def _table(model: type[BaseModel], names: list[str]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = model.model_fields[name]
        default = (
            "required" if field.default is PydanticUndefined else f"`{_default(field.default)}`"
        )
        if field.default_factory is not None:
            default = "`empty`"
        meaning, rule = field.description or "", auto_rule(field)
        if rule is not None:
            default, meaning = "`auto`", f"{meaning} auto: {rule}."
        rows.append(f"| `{name}` | {_type(field.annotation)} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    return "section" if isinstance(value, BaseModel) else str(value)


def _type(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return _type(get_args(kind)[0])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(kind))
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(kind))
    if origin is not None:
        return f"{origin.__name__} of {', '.join(_type(a) for a in get_args(kind))}"
    return "none" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _models(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for part in get_args(kind) for model in _models(part)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
