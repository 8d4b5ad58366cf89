"""A reward function of a session, scored in another process, with the user's own line in errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.contracts.config.reward import FunctionSource
from cluster.contracts.errors import BadReward, UserError
from reward_service.source import ScoreItem
from reward_service.sources.function import FunctionScorer

# What a notebook does: code without a file, its lines known to linecache alone.
SESSION = '''
import linecache, sys
from pathlib import Path
from cluster.assembly.user_objects import Inputs

CELL = """
scale = 2.0

def longer(completions, level, **_):
    return [scale * len(c) + n for c, n in zip(completions, level)]

class Judge:
    def __init__(self, bonus):
        self.bonus = bonus
    def __call__(self, completions):
        return [self.bonus / (len(c) - 3) for c in completions]

async def later(completions):
    return [0.0]
"""
linecache.cache["<cell 7>"] = (len(CELL), None, CELL.splitlines(True), "<cell 7>")
exec(compile(CELL, "<cell 7>", "exec"), globals())
inputs = Inputs(Path(sys.argv[1]))
for name, given in {"longer": longer, "judge": Judge(6.0), "later": later,
                    "closure": (lambda k: lambda completions: [k] * len(completions))(5.0)}.items():
    inputs.function(given, name)
'''


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    subprocess.run([sys.executable, "-c", SESSION, str(folder)], check=True, timeout=120)
    return folder


def scorer(session: Path, name: str) -> FunctionScorer:
    return FunctionScorer(FunctionSource(path=str(session / f"{name}.function.json"), name=name))


def item(text: str, **metadata: object) -> ScoreItem:
    messages = ({"role": "user", "content": "q"},)
    return ScoreItem(id=f"i-{text}", messages=messages, response=text, metadata=metadata)


def test_a_function_a_closure_and_an_object_score(session: Path) -> None:
    # Chat completions: a list of messages, of length 1.
    assert [p.value for p in scorer(session, "longer").score([item("abc", level=4)])] == [6.0]
    assert [p.value for p in scorer(session, "closure").score([item("a"), item("b")])] == [5, 5]
    assert [p.value for p in scorer(session, "judge").score([item("x")])] == [-3.0]
    assert len({scorer(session, name).content for name in ("longer", "closure", "judge")}) == 3


def test_an_error_shows_the_line_of_the_cell(session: Path) -> None:
    judge = scorer(session, "judge")
    judge._function.bonus = "none"
    with pytest.raises(BadReward) as problem:
        judge.score([item("x")])
    assert "at <cell 7>:11 `return [self.bonus / (len(c) - 3) for c in completions]`" in str(
        problem.value
    )
    assert "the reward function Judge raised TypeError" in str(problem.value)


def test_what_cannot_be_used_is_said_at_the_start(session: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="async function cannot be a reward"):
        scorer(session, "later")
    with pytest.raises(UserError, match="no such file"):
        scorer(tmp_path, "gone")
    (tmp_path / "other.function.json").write_text("something else")
    with pytest.raises(UserError, match="is no reward function written by"):
        scorer(tmp_path, "other")
