"""Two domain adapters from one `accord train` run, with rewards that contradict each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = [pytest.mark.slow, pytest.mark.long]

EXACT = 1e-4  # nats
DOMAINS = {"early": "abcdefghijklm", "late": "nopqrstuvwxyz"}


def python(root: Path, *words: str) -> None:
    result = subprocess.run(
        [sys.executable, str(root / "tests" / "integration" / "two_policies.py"), *words],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def share(text: str, letters: str) -> float:
    return sum(letter in letters for letter in text.lower()) / max(1, len(text))


def run(accord: Any, *words: str) -> str:
    command = accord.start(*words)
    assert command.wait(280) == 0, command.stderr
    return str(command.stdout)


@pytest.fixture(scope="module")
def folder(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("two")
    python(repo_root, "make", str(made))
    return made


def test_two_adapters_learn_contradicting_rewards_and_are_loaded_elsewhere(
    folder: Path, repo_root: Path, accord: Any
) -> None:
    run(accord, "train", str(folder / "c.toml"))
    finished = folder / "runs" / "r"
    _engine_and_learner_agree(rows(finished / "metrics.jsonl"))
    assert not (finished / "policy").exists()
    for own, other in (("early", "late"), ("late", "early")):
        adapter = finished / "adapters" / own
        mean = _generated(accord, folder, finished, own)
        # Each on both domains' prompts: better by its own reward, on its own domain and elsewhere.
        assert mean[own][own] > mean[own][other] + 0.2, mean
        _loaded_by_peft_and_plain_vllm(folder, repo_root, adapter)
    _resumed(accord, finished)


def _engine_and_learner_agree(measured: list[dict[str, Any]]) -> None:
    """Synchronous: every token is of the version the learner has when it looks at it."""
    assert [row["step"] for row in measured] == list(range(1, 41))
    for name in DOMAINS:
        key = f"policies/{name}/sampling/logp_diff_max"
        assert max(row[key] for row in measured) <= EXACT
        scores = [row[f"policies/{name}/objective/scores"] for row in measured]
        assert sum(scores[-5:]) / 5 > scores[0] + 0.2
    assert max(row.get("weight_sync/canary_logp_diff", 0.0) for row in measured) <= EXACT


def _generated(accord: Any, folder: Path, finished: Path, name: str) -> dict[str, dict[str, float]]:
    """Mean score by either reward of the adapter's completions, by the domain of the prompts."""
    mean: dict[str, dict[str, float]] = {}
    for domain in DOMAINS:
        out = folder / f"{name}-{domain}.jsonl"
        run(
            accord, "generate", str(finished), str(folder / f"{domain}.jsonl"),
            "--adapter", name, "--samples", "4", "--max-tokens", "12", "--out", str(out),
        )  # fmt: skip
        texts = [row["completion"][-1]["content"] for row in rows(out)]
        assert len(texts) == 64
        mean[domain] = {
            reward: sum(share(text, letters) for text in texts) / len(texts)
            for reward, letters in DOMAINS.items()
        }
    return mean


def _loaded_by_peft_and_plain_vllm(folder: Path, root: Path, adapter: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = [[5 + (7 * row + 3 * at) % 200 for at in range(24)] for row in range(4)]
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    out = folder / "logprobs.json"
    python(
        root, "logprobs", str(folder / "model"), str(adapter), str(folder / "ids.json"), str(out)
    )
    with torch.no_grad():
        every = model(torch.tensor(ids)).logits[:, :-1].log_softmax(-1)
        with model.disable_adapter():
            plain = model(torch.tensor(ids)).logits[:, :-1].log_softmax(-1)
    wanted = every.gather(2, torch.tensor(ids)[:, 1:, None])[..., 0]
    found = torch.tensor(json.loads(out.read_text("utf-8")))
    assert float((found - wanted).abs().max()) <= EXACT
    assert float((every - plain).abs().max()) > 0.1  # else the adapter would change nothing


def _resumed(accord: Any, finished: Path) -> None:
    run(accord, "train", "--resume", str(finished), "batch.steps=42")
    assert rows(finished / "metrics.jsonl")[-1]["step"] == 42
