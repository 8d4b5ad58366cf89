"""`accord generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Quiet, print_path, reporter

Out = Annotated[Path, typer.Option(metavar="FILE", help="JSONL file to write.")]
Samples = Annotated[int, typer.Option(min=1, metavar="N", help="Completions per prompt.")]
MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest completion in tokens.")]
MinTokens = Annotated[
    int,
    typer.Option(min=0, metavar="N", show_default=False, help="Shortest, in tokens. Default: 0."),
]
Temperature = Annotated[
    float,
    typer.Option(metavar="T", help="Above 0. 0.01: nearly greedy."),
]
TopK = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        show_default=False,
        help="The N most probable tokens only.",
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="P",
        show_default=False,
        help="Only the most probable tokens that sum to P. Default: all.",
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        metavar="P",
        show_default=False,
        help="Only tokens at least P times as probable as the top one. Default: all.",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Ends a completion. Can be given often."),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A policy of MODEL's run, by its name.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of sampling.")]


def generate(
    model: Annotated[
        str,
        typer.Argument(help="Model directory, hub id, or LoRA folder.", metavar="MODEL"),
    ],
    prompts: Annotated[
        str,
        typer.Argument(
            help="JSONL, JSON, CSV, TSV or Parquet, or datasets:NAME.", metavar="PROMPTS"
        ),
    ],
    out: Out = Path("answers.jsonl"),
    samples: Samples = 1,
    max_tokens: MaxTokens = 64,
    min_tokens: MinTokens = 0,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    quiet: Quiet = False,
) -> None:
    """Sample completions with vLLM and write them to a file.

    The file holds one JSON object per completion, and can be used as a file of prompts.

    Example: `accord generate runs/q/sft/policy prompts.jsonl --samples 4 --out answers.jsonl`
    """
    from cluster.assembly.forked_roles import forked_roles
    from cluster.contracts.config.base import ClusterConfig
    from cluster.machine.imports import quick_imports
    from cluster.runs.policies import adapter_directory

    if adapter is not None:
        model = adapter_directory(model, adapter)
    limits = {
        "top_k": top_k, "top_p": top_p, "min_p": min_p, "min_tokens": min_tokens,
        "stop": stop or [],
    }  # fmt: skip
    with forked_roles(ClusterConfig(), "sampling"):
        with quick_imports():
            from cluster.assembly.generate import generate_to_file
        generate_to_file(
            model, prompts, out, samples=samples, max_tokens=max_tokens, temperature=temperature,
            seed=seed, reporter=reporter(quiet), limits=limits,
        )  # fmt: skip
    print_path(out)
