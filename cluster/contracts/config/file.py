"""TOML file + ``section.key=value`` words -> a checked config, or one message with all problems."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cluster.contracts.errors import UserError

C = TypeVar("C", bound=BaseModel)


def load_config(model: type[C], path: str | None, overrides: Sequence[str] = ()) -> C:
    """Defaults < one TOML file < overrides. Raises UserError with all problems; never repairs."""
    tree = apply_overrides(model, read_toml(path) if path else {}, overrides)
    return check_config(model, tree, where=path or "command line")


NO_CONFIG = {  # ending -> what such a file is
    ".jsonl": "a file of rows (JSON Lines)",
    ".json": "a JSON file",
    ".csv": "a file of rows (CSV)",
    ".tsv": "a file of rows (TSV)",
    ".parquet": "a file of rows (Parquet)",
    ".db": "a preference store",
    ".sqlite": "a preference store",
}


def read_toml(path: str) -> dict[str, Any]:
    if (kind := NO_CONFIG.get(Path(path).suffix)) and Path(path).is_file():
        raise UserError(
            f"is {kind}, but a config is a TOML file",
            where=path,
            fix="give a TOML file, and name this file in it or as KEY=VALUE; `--help` shows how",
        )
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "no such config file",
            where=path,
            fix="give the path of a TOML file; examples/ has some",
        ) from None
    except IsADirectoryError:
        raise UserError("is a directory", where=path, fix="give the path of a TOML file") from None
    except OSError as problem:
        raise UserError(
            f"cannot be read: {problem.strerror}", where=path, fix="give the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"not valid TOML: {problem}", where=path, fix="correct that line") from None


def tree_of(given: str | Path | Mapping[str, Any] | BaseModel | None) -> dict[str, Any]:
    """A config given in Python: a TOML file, a tree (its keys may be dotted), a config object."""
    if given is None:
        return {}
    if isinstance(given, str | Path):
        return read_toml(str(given))
    if isinstance(given, BaseModel):
        return given.model_dump()
    tree: dict[str, Any] = {}
    for key, value in given.items():
        put(tree, key, value)
    return tree


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` in a tree; a mapping is merged into what is there."""
    *path, leaf = key.split(".")
    node = tree
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"{key!r} goes below a plain value", where="config")
    if isinstance(value, Mapping):
        below = node.setdefault(leaf, {})
        for name, entry in value.items():
            put(below, str(name), entry)
    else:
        node[leaf] = value


def check_config(model: type[C], tree: Mapping[str, Any], *, where: str) -> C:
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as problem:
        raise UserError(
            f"{problem.object[max(0, problem.start - 20) : problem.end]!r} holds a byte that is "
            "not UTF-8, so the run could not keep it",
            where=where,
            fix="write it in UTF-8",
        ) from None
    try:
        return model.model_validate(tree)
    except ValidationError as problem:
        lines = _lines(model, problem)
        raise UserError(
            "; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines),
            where=where,
            fix="correct the keys named above; `accord plan CONFIG` prints every value in force",
        ) from None


def problems_of(model: type[BaseModel], tree: Mapping[str, Any], *, prefix: str) -> list[str]:
    """What ``check_config`` would say of a tree that is a section of another config, each line with
    its keys behind ``prefix``; nothing where it is valid."""
    try:
        model.model_validate(tree)
    except ValidationError as problem:
        return _lines(model, problem, prefix)
    return []


def _lines(model: type[BaseModel], problem: ValidationError, prefix: str = "") -> list[str]:
    return [_explain(model, error, prefix) for error in problem.errors()]


def apply_overrides(
    model: type[BaseModel], tree: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """The tree with ``section.key=value`` words put in, in order."""
    for override in overrides:
        _apply(model, tree, override)
    return tree


def _apply(model: type[BaseModel], tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(
            f"{override!r} is not of the form section.key=value",
            where="command line",
            fix="for example batch.steps=10",
        )
    *path, leaf = key.strip().split(".")
    node: Any = tree
    for part in path:
        node = (
            node.setdefault(part, {}) if isinstance(node, dict) else node[_index(node, part, key)]
        )
    if isinstance(node, list):
        node[_index(node, leaf, key)] = _value(text)
    elif isinstance(node, dict):
        field = _fields_at(model, path).get(leaf)
        node[leaf] = _value(text) if field is None else _value_for(field.annotation, text)
    else:
        raise UserError(
            f"{key!r} goes below a plain value",
            where="command line",
            fix="`accord plan CONFIG` prints every key",
        )


def override_word(key: str, value: Any) -> str:
    """``section.key=value`` of a value given in Python."""
    return f"{key}={'none' if value is None else toml_value(value)}"


def _index(node: Any, part: str, key: str) -> int:
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return int(part)
    raise UserError(
        f"{part!r} in {key!r} does not name an entry",
        where="command line",
        fix="entries of a list are numbered from 0, in the order of the file",
    )


def _value_for(annotation: Any, text: str) -> Any:
    """The value a key takes from the command line: `run.name=42` is the text "42"."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    if text == "none":  # no value for a key that may have none, and a word for all others
        return None if NoneType in kinds else text
    value = _value(text)
    return value if isinstance(value, str) or set(kinds) - {str, NoneType} else text


def _value(text: str) -> Any:
    """TOML value if it reads as one, else the text itself, so that paths need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text == "none" else text


def _explain(model: type[BaseModel], error: Any, prefix: str = "") -> str:
    place = [
        part for part in error["loc"] if isinstance(part, int) or not part.startswith("function-")
    ]
    key = prefix + ".".join(str(part) for part in place)
    if error["type"] == "extra_forbidden":
        names = list(_fields_at(model, place[:-1]))
        near = difflib.get_close_matches(str(place[-1]), names, n=1, cutoff=0.5)
        parent = key.rpartition(".")[0]
        hint = (
            f"did you mean {parent + '.' if parent else ''}{near[0]}?"
            if near
            else f"valid: {', '.join(names)}"
        )
        return f"unknown key {key}: {hint}"
    if error["type"] == "missing":
        return f"missing key {key}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], Mapping | BaseModel):  # between keys of a section
        return f"{key}: {message}" if place else f"{prefix}{message}"
    return f"{key} = {error['input']!r}: {message}" if place else f"{prefix}{message}"


def _fields_at(model: Any, place: Sequence[int | str]) -> Mapping[str, Any]:
    """Field names of the section at ``place`` (through lists and tagged unions)."""
    current: list[Any] = [model]
    for part in place:
        nxt: list[Any] = []
        for kind in current:
            for option in _options(kind):
                if isinstance(option, type) and issubclass(option, BaseModel):
                    if isinstance(part, str) and part in option.model_fields:
                        nxt.append(option.model_fields[part].annotation)
                    elif isinstance(part, str) and _tag(option) == part:
                        nxt.append(option)
                elif get_origin(option) is list and isinstance(part, int):
                    nxt.append(get_args(option)[0])
        current = nxt
    found: dict[str, Any] = {}
    for kind in current:
        for option in _options(kind):
            if isinstance(option, type) and issubclass(option, BaseModel):
                found.update(option.model_fields)
    return found


def _tag(model: type[BaseModel]) -> str | None:
    return getattr(model.model_fields.get("type"), "default", None)


def _options(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [option for part in get_args(kind) for option in _options(part)]
    return [kind]


def dump_toml(config: BaseModel, comments: Mapping[str, str] | None = None) -> str:
    """The resolved config as TOML (None left out: TOML has no null, and None is the default).

    comments: what is written behind a value, by ``section.key``.
    """
    lines: list[str] = []
    _dump(config.model_dump(mode="json", exclude_none=True), "", lines, comments or {})
    return "\n".join(lines).lstrip("\n") + "\n"


def _dump(
    node: Mapping[str, Any], prefix: str, lines: list[str], comments: Mapping[str, str]
) -> None:
    tables = {k: v for k, v in node.items() if isinstance(v, dict) and v}
    arrays = {k: v for k, v in node.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for key, value in node.items():
        if key not in tables and key not in arrays and value != {}:
            comment = comments.get(f"{prefix}{key}")
            text = f"{_key(key)} = {toml_value(value)}"
            lines.append(text + (f"  # {comment}" if comment else ""))
    for key, items in arrays.items():
        for item in items:
            lines.append(f"\n[[{prefix}{_key(key)}]]")
            _dump(item, f"{prefix}{_key(key)}.", lines, comments)
    for key, table in tables.items():
        lines.append(f"\n[{prefix}{_key(key)}]")
        _dump(table, f"{prefix}{_key(key)}.", lines, comments)


def _key(key: str) -> str:
    """Quoted where TOML asks for it: names of labels and of runs hold dots and slashes."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
