"""`accord chat`: answers of one policy, or of two side by side, in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def chat(
    model: Annotated[str, typer.Argument(help="Run directory, model directory or hub id.")],
    before: Annotated[
        str | None, typer.Option(help="A second model whose answer is shown beside it.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the most likely answer.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
) -> None:
    """Talk to a policy (in this process, with transformers; Ctrl-D ends).

    Example: `accord chat runs/quickstart --before runs/quickstart/sft/policy`
    """
    chat_loop(model, before, max_tokens=max_tokens, temperature=temperature, seed=seed)


def policy_directory(path: str) -> str:
    """A run directory stands for the policy it produced; anything else is taken as it is."""
    inside = Path(path) / "policy"
    return str(inside) if inside.is_dir() else path


def chat_loop(
    model: str, before: str | None, *, max_tokens: int, temperature: float, seed: int
) -> None:
    """Reads a question a line from stdin; writes each model's answer."""
    import torch

    from cluster.machine.torch_state import prepare_torch
    from cluster.runs.console import result

    prepare_torch()
    names = [("after", model)] if before is None else [("before", before), ("after", model)]
    voices = [(name, *_load(policy_directory(path))) for name, path in names]
    torch.manual_seed(seed)
    interactive = sys.stdin.isatty()
    if interactive:
        result("Ask something; Ctrl-D ends.")
    while True:
        if interactive:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        for name, policy, tokenizer in voices:
            answer = _answer(policy, tokenizer, line.strip(), max_tokens, temperature)
            result(f"{name}: {answer}" if before else answer)


def _load(path: str) -> tuple[Any, Any]:
    from cluster.contracts.config.base import ModelConfig
    from learner.models.load import load_policy, load_tokenizer

    config = ModelConfig(path=path)
    return load_policy(config).eval(), load_tokenizer(config)


def _answer(policy: Any, tokenizer: Any, text: str, max_tokens: int, temperature: float) -> str:
    import torch

    from cluster.contracts.chat import render_prompt, require_template, text_prompt

    if getattr(tokenizer, "chat_template", None):
        require_template(tokenizer, "chat")
        ids = render_prompt(tokenizer, [{"role": "user", "content": text}])
    else:
        ids = render_prompt(tokenizer, text_prompt(text))
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        out = policy.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_tokens, **sampling
        )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
