"""`accord generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Quiet, print_path, reporter


def generate(
    model: Annotated[str, typer.Argument(help="A model directory or a hub id.", metavar="MODEL")],
    prompts: Annotated[
        str,
        typer.Argument(
            help="JSONL, JSON, CSV or Parquet file, or datasets:NAME.", metavar="PROMPTS"
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSONL file to write.")] = Path(
        "answers.jsonl"
    ),
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Completions per prompt.")] = 1,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest completion in tokens.")
    ] = 64,
    min_tokens: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", show_default=False, help="Shortest completion. Default: 0."
        ),
    ] = 0,
    temperature: Annotated[
        float,
        typer.Option(metavar="T", help="Above 0. 0.01: nearly greedy."),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            show_default=False,
            help="Only the N most probable tokens. Default: all.",
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P", show_default=False, help="Only the top tokens that sum to P. Default: all."
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            show_default=False,
            help="Only tokens at least P times as probable as the top one. Default: all.",
        ),
    ] = 0.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text that ends a completion. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of sampling.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Sample completions with vLLM and write them to a file.

    The file holds one JSON object per completion. It can serve as a file of prompts.

    Example: `accord generate runs/q/sft/policy prompts.jsonl --samples 4 --out answers.jsonl`
    """
    from cluster.assembly.generate import generate_to_file

    limits = {
        "top_k": top_k, "top_p": top_p, "min_p": min_p, "min_tokens": min_tokens,
        "stop": stop or [],
    }  # fmt: skip
    generate_to_file(
        model, prompts, out, samples=samples, max_tokens=max_tokens, temperature=temperature,
        seed=seed, reporter=reporter(quiet), limits=limits,
    )  # fmt: skip
    print_path(out)
