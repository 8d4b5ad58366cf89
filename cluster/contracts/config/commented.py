"""A config as TOML with what every key means written above it; and the keys people change first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.contracts.config.base import AUTO, auto_rule
from cluster.contracts.config.file import toml_value

WIDTH = 96

FIRST_KEYS = (
    "model.path",
    "data.prompts",
    "data.max_prompt_tokens",
    "reward.sources",
    "run.name",
    "batch.steps",
    "batch.prompts_per_step",
    "batch.samples_per_prompt",
    "rollout.max_tokens",
    "rollout.temperature",
    "rollout.workers",
    "staleness.bound",
    "algorithm.advantage",
    "algorithm.kl.coef",
    "learner.lr",
)
"""Of `accord train`, in the order in which a first config is written."""


def commented_toml(
    config: type[BaseModel], values: Mapping[str, Any], *, every_key: bool = False
) -> str:
    """``values`` (nested as the config is) in the config's order. Not checked here.

    every_key: the other keys as well, with their defaults. A key without a value, which TOML cannot
    write, is a comment.
    """
    return "\n".join(_section(config, values, "", every_key)).lstrip("\n") + "\n"


def sections_of(kind: Any) -> list[type[BaseModel]]:
    """The config sections that a field may hold: itself, the entries of a list, a union's."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [section for part in get_args(kind) for section in sections_of(part)]


def _section(
    model: type[BaseModel], values: Mapping[str, Any], prefix: str, every_key: bool
) -> Iterator[str]:
    """Plain keys first: in TOML, a key after the head of a table belongs to that table."""
    nested = {name: sections_of(f.annotation) for name, f in model.model_fields.items()}
    for name, field in model.model_fields.items():
        if not nested[name] and (name in values or every_key):
            yield from _key(name, field, values)
    for name, kinds in nested.items():
        given = values.get(name, {})
        if kinds and isinstance(given, list):
            for entry in given:
                yield f"\n[[{prefix}{name}]]"
                yield from _section(_kind_of(entry, kinds), entry, f"{prefix}{name}.", every_key)
        elif kinds and not given and every_key and _is_left_out(model.model_fields[name]):
            yield ""
            yield from _comment(model.model_fields[name].description or "")
            table = f"{prefix}{name}"
            yield f"# [[{table}]]" if _default(model.model_fields[name]) == [] else f"# [{table}]"
        elif kinds and (given or every_key):
            body = list(_section(kinds[0], given, f"{prefix}{name}.", every_key))
            yield from ([f"\n[{prefix}{name}]"] if _has_keys(body) else [])
            yield from body


def _has_keys(body: list[str]) -> bool:
    """Whether a section has keys of its own, and not only sections."""
    return bool(body) and not body[0].startswith("\n")


def _kind_of(entry: Mapping[str, Any], kinds: list[type[BaseModel]]) -> type[BaseModel]:
    """Which kind of section an entry of a list is, by its `type`."""
    for kind in kinds:
        if "type" in kind.model_fields and kind.model_fields["type"].default == entry.get("type"):
            return kind
    return kinds[0]


def _key(name: str, field: FieldInfo, values: Mapping[str, Any]) -> Iterator[str]:
    rule = auto_rule(field)
    meaning = field.description or ""
    if rule and values.get(name, AUTO) == AUTO:
        meaning += f" auto: {rule}."
    yield from _comment(meaning)
    value = values[name] if name in values else _default(field)
    if value is None:  # no value, or one that the user has to give
        yield f"# {name} ="
    else:
        yield f"{name} = {toml_value(value)}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")


def _is_left_out(field: FieldInfo) -> bool:
    """Whether a section that is not given is none at all: one with defaults would turn it on."""
    return not field.is_required() and _default(field) in (None, [])


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return None
    return AUTO if auto_rule(field) else field.get_default(call_default_factory=True)
