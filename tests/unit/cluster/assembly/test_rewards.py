"""A reward function is tried before anything starts, on the first prompt and the columns of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.assembly.rewards import check_rewards
from cluster.contracts.config.reward import FunctionSource, RewardConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Prompt

HEAD = "def reward(prompts, completions, **columns):\n    "


def prompts(*rows: dict[str, object]) -> list[Prompt]:
    return [
        Prompt(
            id=f"{n}",
            messages=({"role": "user", "content": "How long?"},),
            token_ids=(1,),
            metadata=row,
            where=f"p.jsonl, line {n}",
        )
        for n, row in enumerate(rows, start=1)
    ]


def check(folder: Path, code: str, *rows: dict[str, object]) -> None:
    file = folder / "rewards.py"
    file.write_text(code)
    source = FunctionSource(path=f"{file}:reward")
    check_rewards(RewardConfig(sources=[source]), prompts(*(rows or ({},))))


def test_a_good_function_is_called_once_and_its_output_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = tmp_path / "calls"
    note = f"    open({str(calls)!r}, 'a').write(repr([c[0]['content'] for c in completions]))\n"
    body = "print('seen')\n    return [1.0 for _ in completions]\n"
    check(tmp_path, HEAD.rstrip(" ") + note + f"    {body}")
    assert json.loads(calls.read_text().replace("'", '"')) == ["A trial completion.", ""]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "seen\n")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [1.0]", "returned 1 rewards for 2 completions"),
        ("return [1.0, None]", "returned None for p.jsonl, line 1, trial completion ''"),
        ("return [float('nan')] * 2", "returned nan for p.jsonl, line 1, trial completion 'A tri"),
        ("return [len(c[0]['content']) / len(c[0]['content'].split()) for c in completions]",
         r"raised ZeroDivisionError: .* at rewards.py:2 `return .*p.jsonl, line 1, trial compl"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
        ("return None", "returned a NoneType, not a list"),
    ],
)  # fmt: skip
def test_a_function_that_fails_is_told_by_file_and_line(
    tmp_path: Path, body: str, says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check(tmp_path, f"{HEAD}{body}\n")
    assert caught.value.where == "reward source 'function'"
    assert "an empty one too" in caught.value.fix


def test_a_column_that_one_row_lacks_is_told_with_that_row(tmp_path: Path) -> None:
    code = "def reward(completions, label):\n    return [0.0 for _ in completions]\n"
    check(tmp_path, code, {"label": 1}, {"label": None})
    with pytest.raises(UserError, match=r"'label', but the row of p.jsonl, line 2 .* it has other"):
        check(tmp_path, code, {"label": 1}, {"other": 2})
