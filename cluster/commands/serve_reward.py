"""`accord serve-reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Config, Overrides


def serve_reward(
    config: Config,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any free port.")
    ] = 0,
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds the bearer token clients must send.")
    ] = None,
    tls_cert: Annotated[
        str | None,
        typer.Option(help="PEM file of the service's certificate. Encrypts the traffic."),
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(help="PEM file of its key. Only its owner may read it.")
    ] = None,
    tls_ca: Annotated[
        str | None,
        typer.Option(help="PEM file of an authority. Only clients with its certificates get in."),
    ] = None,
    reflection: Annotated[
        bool,
        typer.Option("--reflection", help="Let clients such as grpcurl list the calls."),
    ] = False,
) -> None:
    """Serve a config's rewards over gRPC until interrupted.

    The command uses only the section [reward] of the config. The protocol is accord.reward.v1.

    Example: `accord serve-reward examples/ppo.toml --port 7070`
    """
    from cluster.assembly.reward_server import serve_forever

    serve_forever(
        str(config),
        overrides or [],
        host,
        port,
        token_file,
        (tls_cert, tls_key, tls_ca),
        reflection,
    )
