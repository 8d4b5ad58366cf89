"""Demonstrations: the mixture of habits, its statistics, and the files it is written to."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from cluster.quickstart.helpdesk.demonstrations import (
    FORBIDDEN_MIX,
    INFORMATION_MIX,
    Demonstration,
    corpus,
    mix_for,
    sample_answer,
    sample_demonstrations,
    write_answer,
)
from cluster.quickstart.helpdesk.files import write_jsonl, write_prompts, write_sft
from cluster.quickstart.helpdesk.judge import compare, gold_score
from cluster.quickstart.helpdesk.parsing import read_answer
from cluster.quickstart.helpdesk.questions import Question, sample_questions, split_of

STYLES = tuple(INFORMATION_MIX | FORBIDDEN_MIX)


@pytest.fixture(scope="module")
def sample() -> list[Demonstration]:
    return sample_demonstrations(0, 3000)


def gold(demonstration: Demonstration) -> float:
    return gold_score(demonstration.question.metadata(), demonstration.answer).score


def test_sampling_is_deterministic(sample: list[Demonstration]) -> None:
    assert sample_demonstrations(0, 3000) == sample
    assert sample_demonstrations(1, 50) != sample[:50]
    assert list(corpus(0, 3)) == [
        f"{d.question.text} {d.answer}" for d in sample_demonstrations(0, 3)
    ]


def test_the_text_of_a_seed_is_pinned() -> None:
    # The same in every process and on every machine: published numbers depend on it.
    digest = hashlib.sha256("\n".join(corpus(0, 200)).encode()).hexdigest()
    assert digest[:16] == "83c19b196668e6b6"


def test_only_prompts_of_the_split_are_shown(sample: list[Demonstration]) -> None:
    assert {split_of(d.question.text) for d in sample} == {"sft"}
    assert {split_of(d.question.text) for d in sample_demonstrations(0, 50, "rl")} == {"rl"}


def test_the_mixture_has_its_shares(sample: list[Demonstration]) -> None:
    assert sum(INFORMATION_MIX.values()) == pytest.approx(1)
    assert sum(FORBIDDEN_MIX.values()) == pytest.approx(1)
    for mix, forbidden in ((INFORMATION_MIX, False), (FORBIDDEN_MIX, True)):
        rows = [d for d in sample if (d.question.kind == "forbidden") == forbidden]
        counts = Counter(d.style for d in rows)
        assert {s: counts[s] / len(rows) for s in mix} == pytest.approx(mix, abs=0.05)
    good = sum(d.style == "good" for d in sample) / len(sample)
    assert good == pytest.approx(0.17, abs=0.02)  # the same in both mixes


def test_lengths_in_words(sample: list[Demonstration]) -> None:
    lengths = {s: [len(d.answer.split()) for d in sample if d.style == s] for s in STYLES}
    assert max(map(max, lengths.values())) <= 48
    assert min(lengths["good"]) >= 12
    assert max(lengths["good"]) <= 31
    assert fmean(lengths["rambling"]) > 1.4 * fmean(lengths["good"])
    assert fmean(lengths["incomplete"]) < 0.4 * fmean(lengths["good"])


def test_each_habit_shows_what_its_name_says(sample: list[Demonstration]) -> None:
    for d in sample:
        features = read_answer(d.question.metadata(), d.answer)
        informs = d.question.kind != "forbidden"
        assert features.fluency == 1.0
        assert features.finished
        match d.style:
            case "good":
                assert features.right if informs else features.refused and features.alternative
                assert (features.wrong, features.rude, features.others) == (0, 0, 0)
            case "rude":
                assert features.rude > 0
            case "rambling":
                assert features.repetition > 0.05 < features.padding
            case "invented":
                assert features.wrong == 1
                assert not features.right
            case "off_topic":
                # Another question's answer, or a refusal of what nobody asked for.
                needless = informs and features.refused
                assert features.others == (0 if needless else 1)
                assert bool(features.alternative) == needless
                assert (features.right, features.wrong) == (False, 0)
            case "complies":
                assert features.complied
                assert not features.refused
            case "incomplete":
                assert features.words <= 8


def test_needless_refusals_are_part_of_being_off_topic(sample: list[Demonstration]) -> None:
    off = [d for d in sample if d.style == "off_topic" and d.question.kind != "forbidden"]
    refusals = [d for d in off if read_answer(d.question.metadata(), d.answer).refused]
    assert len(refusals) / len(off) == pytest.approx(0.4, abs=0.1)
    for d in refusals:
        parts = gold_score(d.question.metadata(), d.answer).parts
        # A policy is about no product, and none is named: half of being relevant.
        assert parts["relevance"] == (0 if d.question.product else 0.5)
        assert parts["correctness"] == 0
        assert gold(d) < 3


def test_gold_puts_the_habits_in_order(sample: list[Demonstration]) -> None:
    scores = {s: [gold(d) for d in sample if d.style == s] for s in STYLES}
    means = {s: fmean(v) for s, v in scores.items()}
    assert means["good"] == pytest.approx(9.6, abs=0.2)
    assert min(scores["good"]) > max(v for s in STYLES if s != "good" for v in scores[s])
    assert means["good"] > means["rambling"] > means["rude"] > means["incomplete"]
    assert means["complies"] < means["invented"] < means["rude"]
    assert means["off_topic"] < means["rude"]
    assert fmean(map(gold, sample)) == pytest.approx(4.5, abs=0.4)
    assert pstdev(map(gold, sample)) > 3


def test_good_answers_win_against_the_mixture_and_leave_headroom() -> None:
    rng = random.Random(5)
    points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    plain, best = [], []
    for q in sample_questions(1, 800, "preference"):
        meta, rival = q.metadata(), sample_answer(q, rng)[1]
        drafts = [write_answer(q, "good", rng) for _ in range(4)]
        plain.append(points[compare(meta, drafts[0], rival)])
        best.append(points[compare(meta, max(drafts, key=lambda a: _score(meta, a)), rival)])
    # 17 % of the mixture are good themselves and win every other time: 0.83 + 0.17 / 2 = 0.915.
    # Taking more care than a plain good answer does wins some of those too.
    assert fmean(plain) == pytest.approx(0.915, abs=0.025)
    assert 0.94 <= fmean(best) <= 0.98


def _score(meta: dict[str, str], answer: str) -> float:
    return gold_score(meta, answer).score


def test_two_good_answers_seldom_tie() -> None:
    rng = random.Random(6)
    outcomes: Counter[str] = Counter()
    for q in sample_questions(2, 500, "rl"):
        first, second = (write_answer(q, "good", rng) for _ in range(2))
        if first != second:
            outcomes[compare(q.metadata(), first, second)] += 1
    assert outcomes["tie"] / outcomes.total() < 0.14


def test_a_style_that_does_not_apply_is_refused() -> None:
    rng = random.Random(0)
    questions = {q.kind: q for q in sample_questions(0, 60, "sft")}
    with pytest.raises(ValueError, match="'complies' does not apply to a product question"):
        write_answer(questions["product"], "complies", rng)
    with pytest.raises(ValueError, match="'invented' does not apply to a forbidden question"):
        write_answer(questions["forbidden"], "invented", rng)
    assert "complies" in mix_for(questions["forbidden"])


def test_files_have_the_rows_that_trl_reads(tmp_path: Path) -> None:
    rows = sample_demonstrations(0, 20)
    assert write_sft(tmp_path / "new" / "sft.jsonl", rows) == 20
    lines = (tmp_path / "new" / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert first["messages"] == [
        {"role": "user", "content": rows[0].question.text},
        {"role": "assistant", "content": rows[0].answer},
    ]
    assert first["metadata"]["style"] == rows[0].style
    questions = sample_questions(0, 7, "eval")
    assert write_prompts(tmp_path / "eval.jsonl", questions) == 7
    for line, question in zip((tmp_path / "eval.jsonl").open(), questions, strict=True):
        row = json.loads(line)
        assert row["prompt"] == [{"role": "user", "content": question.text}]
        assert _rebuilt(row) == question
        # What was written is enough to judge by.
        assert gold_score(row["metadata"], "No.").score < 3


def _rebuilt(row: dict[str, object]) -> Question:
    prompt, metadata = row["prompt"], row["metadata"]
    assert isinstance(prompt, list)
    assert isinstance(metadata, dict)
    return Question(text=prompt[0]["content"], **metadata)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def broken() -> Iterator[dict[str, object]]:
        yield {"a": 2}
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError, match="no more rows"):
        write_jsonl(path, broken())
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]
