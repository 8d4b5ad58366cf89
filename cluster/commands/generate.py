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
    out: Annotated[Path, typer.Option(help="JSONL file to write.")] = Path("answers.jsonl"),
    samples: Annotated[int, typer.Option(min=1, help="Completions per prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Sample completions with vLLM and write them to a file.

    The file holds one JSON object per completion. It can serve as a file of prompts.

    Example: `accord generate runs/q/sft/policy prompts.jsonl --samples 4 --out answers.jsonl`
    """
    from cluster.assembly.generate import generate_to_file

    generate_to_file(
        model, prompts, out, samples=samples, max_tokens=max_tokens, temperature=temperature,
        seed=seed, reporter=reporter(quiet),
    )  # fmt: skip
    print_path(out)
