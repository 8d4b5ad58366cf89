"""From arguments of a Python call to the checked config that the command line would have read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from cluster.assembly.user_objects import Inputs, inputs_of_run
from cluster.contracts.config.base import RunConfig
from cluster.contracts.config.file import check_config, put, tree_of
from cluster.contracts.config.presets import algorithm_settings

C = TypeVar("C", bound=BaseModel)
AnyConfig = str | Path | Mapping[str, Any] | BaseModel | None


@dataclass(frozen=True, slots=True)
class Draft:
    """The config of a run to be, as a tree; ``inputs`` writes objects into that run's directory."""

    command: str
    tree: dict[str, Any]
    inputs: Inputs

    def put(self, key: str, value: Any) -> None:
        """Set ``section.key``; None leaves it to the config."""
        if value is not None:
            put(self.tree, key, value)

    def put_model(self, key: str, given: Any, tokenizer: Any = None) -> None:
        self.put(f"{key}.path", None if given is None else self.inputs.model(given, tokenizer, key))

    def put_rows(self, key: str, given: Any, name: str, column: str) -> None:
        self.put(key, None if given is None else self.inputs.rows(given, name, column))

    def checked(self, kind: type[C]) -> C:
        """Raises UserError with all problems of the config."""
        return check_config(kind, self.tree, where=f"accord.{self.command.replace('-', '_')}")


@contextmanager
def draft(
    command: str,
    config: AnyConfig,
    *,
    name: str | None,
    runs_dir: str | Path | None,
    seed: int | None,
) -> Iterator[Draft]:
    """``config``: a TOML file, a tree whose keys may be dotted, or a config object; the other
    arguments go over it."""
    tree = tree_of(config)
    for key, value in (
        ("run.name", name),
        ("run.dir", None if runs_dir is None else str(runs_dir)),
        ("run.seed", seed),
    ):
        if value is not None:
            put(tree, key, value)
    where = f"accord.{command.replace('-', '_')}"
    run = check_config(RunConfig, tree.get("run", {}), where=f"{where}, section run")
    with inputs_of_run(run.dir, run.name, command) as made:
        label, inputs = made
        put(tree, "run.name", label)
        yield Draft(command, tree, inputs)


def put_algorithm(tree: dict[str, Any], name: str | None) -> None:
    """What the name says of advantage and loss goes over the config; all else goes under."""
    if name is None:
        return
    settings = algorithm_settings(name)
    own = tree.setdefault("algorithm", {})
    kl = {**settings.pop("kl", {}), **own.get("kl", {})}
    fixed = {key: settings[key] for key in ("advantage", "loss") if key in settings}
    tree["algorithm"] = {**settings, **own, **fixed} | ({"kl": kl} if kl else {})
