"""`accord serve-reward`: the reward service in the foreground."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from cluster.assembly.auto.resolve import resolve_service
from cluster.contracts.config.base import PluginFiles, Section
from cluster.contracts.config.file import apply_overrides, check_config, read_toml
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.private_files import read_token
from cluster.machine.hardware import this_machine
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
    tls: tuple[str | None, str | None, str | None] = (None, None, None),
    reflection: bool = False,
) -> None:
    """Prints the address, then serves until interrupted (which is raised then). Other sections of
    the file are not read. ``tls``: PEM files (certificate, its key, authority of the clients')."""
    from reward_service.access import Access, read_tls
    from reward_service.server import serve

    tree = apply_overrides(_OnlyReward, read_toml(path), overrides)
    read = {key: tree[key] for key in _OnlyReward.model_fields if key in tree}
    config = check_config(_OnlyReward, read, where=path)
    cert, key, ca = tls
    access = Access(
        token=read_token(token_file) if token_file else None, tls=read_tls(ca, cert, key)
    )
    reward = resolve_service(config.reward, this_machine())
    server = serve(reward, host, port, access, with_reflection=reflection)
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
