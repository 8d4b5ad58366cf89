from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.reward import FunctionSource, RewardConfig, RulesSource
from cluster.contracts.errors import BadReward, RewardFailure, UserError
from reward_service.composition import Composition, build
from reward_service.source import Part, ScoreItem
from reward_service.sources.function import FunctionScorer
from reward_service.sources.rules import RulesScorer, repeated_share


def chat(name: str, response: str, **metadata: Any) -> ScoreItem:
    messages = ({"role": "user", "content": f"ask {name}"},)
    return ScoreItem(id=name, messages=messages, response=response, metadata=metadata)


def plain(name: str, response: str, **metadata: Any) -> ScoreItem:
    messages = ({"role": "text", "content": f"ask {name}"},)
    return ScoreItem(id=name, messages=messages, response=response, metadata=metadata)


def function(tmp_path: Path, body: str, name: str = "reward") -> FunctionScorer:
    file = tmp_path / "rewards.py"
    file.write_text(body)
    return FunctionScorer(FunctionSource(path=f"{file}:{name}"))


def test_repeated_share_by_hand() -> None:
    assert repeated_share("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repeated_share("A b C a B c") == pytest.approx(1 / 4)
    assert repeated_share("a b") == 0


def test_rules_by_hand() -> None:
    rules = RulesScorer(
        RulesSource(
            min_words=2, max_words=4, required=["^Hi"], forbidden=["sorry"], repetition=True
        )
    )
    values = rules.score([chat("1", "Hi there"), chat("2", "so sorry"), chat("3", "x x x x x")])
    assert values[0] == Part(0.0)
    assert values[1].value == -2
    assert values[1].vetoes == ("rules: required '^Hi'", "rules: forbidden 'sorry'")
    assert values[2].value == pytest.approx(-2 - 2 / 3)


def test_rules_content_changes_with_a_rule_not_with_the_weight() -> None:
    def content(**keys: Any) -> str:
        return RulesScorer(RulesSource(**keys)).content

    assert content(min_words=2) == content(min_words=2, weight=3.0)
    assert content(min_words=2) != content(min_words=3)


def test_a_bad_pattern_names_source_and_key() -> None:
    with pytest.raises(UserError, match=r"'rules', key 'forbidden': '\('"):
        RulesScorer(RulesSource(forbidden=["("]))


def test_function_gets_lists_as_in_trl(tmp_path: Path) -> None:
    scorer = function(
        tmp_path,
        "def reward(prompts, completions, answer, **columns):\n"
        "    assert columns['extra'] == [None, 5]\n"
        "    assert prompts[0] == [{'role': 'user', 'content': 'ask 1'}]\n"
        "    assert completions[1] == [{'role': 'assistant', 'content': 'no'}]\n"
        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]\n",
    )
    parts = scorer.score([chat("1", "yes", answer="yes"), chat("2", "no", answer="yes", extra=5)])
    assert [part.value for part in parts] == [1.0, 0.0]


def test_function_gets_strings_for_plain_prompts_and_keeps_the_order(tmp_path: Path) -> None:
    scorer = function(
        tmp_path,
        "def reward(completions):\n"
        "    return [len(c) if isinstance(c, str) else -len(c[0]['content'])"
        " for c in completions]\n",
    )
    parts = scorer.score([plain("1", "ab", unused=1), chat("2", "abc"), plain("3", "a")])
    assert [part.value for part in parts] == [2, -3, 1]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [1.0]", r"returned 1 rewards for 2 completions .*'p1'"),
        ("return [1.0, float('nan')]", r"returned nan for item 'p2'"),
        ("return [1.0, float('inf')]", r"returned inf for item 'p2'"),
        ("return [1.0, None]", r"returned None for item 'p2'"),
        ("return [1.0, '2']", r"returned '2' for item 'p2'"),
        ("return 1.0", r"returned a float, not a list"),
        (
            "return [1 / len(c[0]['content']) for c in completions]",
            r"raised ZeroDivisionError: .*, at rewards.py:2 `return \[1 / .*item 'p2'",
        ),
        ("raise SystemExit(3)", r"raised SystemExit: 3, at rewards.py:2"),
        (
            "assert len(completions) == 1; return [1.0]",
            "a batch of 2 items, first item 'p1'; none of them fails alone",
        ),
    ],
)
def test_function_errors_name_function_row_and_line(tmp_path: Path, body: str, says: str) -> None:
    scorer = function(tmp_path, f"def reward(prompts, completions):\n    {body}\n")
    with pytest.raises(BadReward, match=says) as caught:
        scorer.score([chat("p1", "a"), chat("p2", "")])
    assert "rewards.py:reward" in str(caught.value)


def test_a_missing_column_is_named_with_what_there_is(tmp_path: Path) -> None:
    scorer = function(tmp_path, "def reward(prompts, completions, answer):\n    return []\n")
    with pytest.raises(
        BadReward, match=r"takes 'answer', but the row of item 'p2' .* it has other"
    ):
        scorer.score([chat("p1", "a", answer=1), chat("p2", "b", other=1)])


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("rewards.py", "", "not of the form"),
        ("absent.py:f", "", "there is no file"),
        ("rewards.py:g", "def f(): pass", "no function 'g'\n  fix: it has: f"),
        ("rewards.py:f", "import absent_module", "ModuleNotFoundError"),
        ("rewards.py:f", "async def f(): pass", "async"),
    ],
)
def test_functions_that_cannot_be_loaded(tmp_path: Path, path: str, body: str, says: str) -> None:
    (tmp_path / "rewards.py").write_text(body)
    with pytest.raises(UserError) as caught:
        FunctionScorer(FunctionSource(path=str(tmp_path / path)))
    assert says in f"{caught.value}\n"


def test_function_content_changes_with_its_text(tmp_path: Path) -> None:
    first = function(tmp_path, "def reward(completions): return [1.0]\n").content
    assert function(tmp_path, "def reward(completions): return [1.0]\n").content == first
    assert function(tmp_path, "def reward(completions): return [2.0]\n").content != first


class Fixed:
    type = "fixed"
    tokenizer = ""

    def __init__(self, name: str, values: Sequence[float] | Exception) -> None:
        self.name = name
        self.content = name
        self._values = values

    def score(self, items: Sequence[ScoreItem]) -> list[Part]:
        if isinstance(self._values, Exception):
            raise self._values
        return [Part(value, (self.name,)) for value in self._values]

    def close(self) -> None: ...


TWO = [chat("p1", "a"), chat("p2", "b")]


def test_weighted_sum_and_clip_by_hand() -> None:
    sources = [Fixed("x", [1.0, 4.0]), Fixed("y", [3.0, -1.0])]
    scores = Composition(sources, [2.0, 0.5], clip=5.0).score(TWO)
    assert [score.value for score in scores] == [3.5, 5.0]  # the second is 7.5 before the clip
    assert scores[1].parts == {"x": 4.0, "y": -1.0}
    assert scores[0].vetoes == ("x", "y")


def test_the_version_covers_content_weights_and_clip() -> None:
    def version(name: str = "x", weight: float = 1.0, clip: float | None = None) -> str:
        return Composition([Fixed(name, [])], [weight], clip).version

    assert version() == version()
    assert len({version(), version("y"), version(weight=2.0), version(clip=1.0)}) == 4


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ([1.0], BadReward, "'y' gave 1 scores for 2 items"),
        ([1.0, math.nan], BadReward, "'y' scored item 'p2' as nan"),
        (ValueError("broken"), BadReward, "'y' failed on 2 items .*ValueError: broken"),
        (RewardFailure("later"), RewardFailure, "later"),
    ],
)
def test_a_failing_source_is_an_error_never_zero(values: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        Composition([Fixed("x", [1.0, 1.0]), Fixed("y", values)], [1.0, 0.0]).score(TWO)


def test_an_overflowing_sum_is_refused_before_the_clip() -> None:
    sources = [Fixed("x", [1e308, 0.0]), Fixed("y", [1e308, 0.0])]
    with pytest.raises(BadReward, match="the rewards of item 'p1' together are inf"):
        Composition(sources, [1.0, 1.0], clip=1.0).score(TWO)


def test_build_makes_what_the_config_says() -> None:
    sources = [RulesSource(min_words=1), RulesSource(max_words=1, name="short", weight=0.5)]
    composition = build(RewardConfig(sources=sources))
    assert [(s.name, s.type, s.weight) for s in composition.sources] == [
        ("rules", "rules", 1.0),
        ("short", "rules", 0.5),
    ]
    with pytest.raises(UserError, match="same name"):
        build(RewardConfig(sources=[RulesSource(), RulesSource()]))
