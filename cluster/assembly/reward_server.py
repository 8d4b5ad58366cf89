"""`accord serve-reward`: the reward service in the foreground."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from cluster.contracts.config.base import PluginFiles, Section
from cluster.contracts.config.file import apply_overrides, check_config, read_toml
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.errors import UserError
from cluster.machine.signals import listening
from cluster.runs.console import result


class _OnlyReward(Section):
    plugins: PluginFiles = Field(default_factory=list)
    reward: RewardConfig


def serve_forever(
    path: str,
    overrides: Sequence[str],
    host: str,
    port: int,
    token_file: Path | None,
    reflection: bool = False,
) -> None:
    """Prints the address, then serves until interrupted (which is raised then). Other sections of
    the file are not read."""
    from reward_service.server import serve

    tree = apply_overrides(_OnlyReward, read_toml(path), overrides)
    read = {key: tree[key] for key in _OnlyReward.model_fields if key in tree}
    config = check_config(_OnlyReward, read, where=path)
    server = serve(config.reward, host, port, _token(token_file), with_reflection=reflection)
    # The traceback of a reward function that fails is for whoever runs it, that is, here.
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("accord.reward").setLevel(logging.DEBUG)
    stop = threading.Event()
    try:
        with listening(stop.set):
            result(server.address)
            while not stop.wait(1.0):
                pass
        raise KeyboardInterrupt
    finally:
        server.stop()


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise UserError(
            "no such token file", where=str(path), fix="make one with a long random word"
        )
    token = path.read_text(encoding="utf-8", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(
            "holds no token that can travel in a header",
            where=str(path),
            fix="write one long random word of ASCII characters into it",
        )
    return token
