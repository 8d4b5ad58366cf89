"""Digests of everything that decides what a run learns and that its config only names: prompts,
rewards, models, plugins. The manifest keeps them from the start; a resume compares."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cluster.assembly.prepare import Prepared
from cluster.contracts.config.reward import FunctionSource, RewardConfig, RewardModelSource
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.contracts.plugins import loaded
from cluster.contracts.records import Prompt
from cluster.runs.artefacts import artefact_hash

KEY = "learnt_from"  # of the run's manifest


def learnt_from(prepared: Prepared) -> dict[str, str]:
    """What is learnt from -> hex SHA-256 of its content, not of its path: files may be moved."""
    config = prepared.config
    found = {"prompts": prompts_digest(prepared.prompts.all())}
    found |= {"model": _model_digest(config.model.path, config.model.revision)}
    if config.learner.reference_path is not None:
        revision = config.learner.reference_revision
        found["reference model"] = _model_digest(config.learner.reference_path, revision)
    found |= rewards_digests(config.reward)
    if prepared.held_out:  # scores of one run are to be comparable
        found["evaluation prompts"] = prompts_digest(prepared.held_out)
    if config.evaluation.judge is not None:
        judge = rewards_digests(config.evaluation.judge)
        found |= {what.replace("reward", "judge", 1): digest for what, digest in judge.items()}
    for plugin in loaded():
        found[f"plugin {Path(plugin.path).name}"] = _text_digest(plugin.text)
    return found


def refuse_other_origins(
    before: Mapping[str, str] | None, now: Mapping[str, str], config: TrainConfig, run: Path
) -> None:
    """Raise UserError where the run would go on with other prompts, rewards or models than it
    began with. ``before``: as the manifest has it; None in a run of an older Accord."""
    if before is None:
        return
    other = sorted(what for what in before.keys() | now.keys() if before.get(what) != now.get(what))
    if other:
        places = {
            "prompts": config.data.prompts,
            "evaluation prompts": config.evaluation.prompts,
            "model": config.model.path,
            "reference model": str(config.learner.reference_path),
        }
        named = ", ".join(f"{what} ({places[what]})" if what in places else what for what in other)
        raise UserError(
            f"not what the run began with: {named}; the content has changed since",
            where=str(run),
            fix="put it back as it was, or start a new run from the policy of this one",
        )


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Over what is sampled from and what rewards see, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        row = [[dict(message) for message in prompt.messages], prompt.token_ids, prompt.metadata]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def rewards_digests(config: RewardConfig) -> dict[str, str]:
    """Of the files behind `reward.sources`. What the others are made of stands in the config, or is
    known to the service that scores."""
    if config.address is not None:
        return {"reward service": "elsewhere"}
    found = {}
    for source in config.sources:
        if isinstance(source, RewardModelSource):
            found[f"reward {source.name}"] = artefact_hash(Path(source.path))
        elif isinstance(source, FunctionSource):
            file = Path(source.path.rpartition(":")[0] or source.path).expanduser()
            if not file.suffix:  # a pickled function has no name behind a colon
                file = Path(source.path).expanduser()
            found[f"reward {source.name}"] = _code_digest(file.absolute())
    return found


def _model_digest(path: str, revision: str | None) -> str:
    folder = Path(path).expanduser()
    return artefact_hash(folder) if folder.is_dir() else f"{path}@{revision or 'newest'}"


def _code_digest(file: Path) -> str:
    """Of a Python file and the modules beside it that it imports, also through each other."""
    if file.suffix != ".py":
        return artefact_hash(file)
    folder, found, waiting = file.parent, dict[str, str](), [file]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(folder).as_posix()
        if name not in found:
            text = path.read_text(encoding="utf-8")
            found[name] = text
            waiting += _beside(folder, _imported(text))
    return _text_digest(json.dumps(sorted(found.items())))


def _imported(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _beside(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            place = folder.joinpath(*parts[:depth])
            candidates = (place.with_suffix(".py"), place / "__init__.py")
            yield from (path for path in candidates if path.is_file())


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
