"""The safety layer: rules, a tiny random classifier, the audit log, as a reward."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.safety import SafetyConfig
from cluster.contracts.errors import UserError
from learner.models.tiny import train_tokenizer
from reward_service.composition import build
from reward_service.safety.classifier import HarmClassifier
from reward_service.safety.layer import SafetyLayer
from reward_service.source import ScoreItem

PROMPT = ({"role": "user", "content": "q"},)


def config(folder: Path, *rules: dict[str, Any], **settings: Any) -> SafetyConfig:
    tree = {"rules": list(rules), "audit": str(folder / "audit.jsonl"), **settings}
    return SafetyConfig.model_validate(tree)


WORDS = {"name": "bad words", "words": ["damn", "go to hell"], "action": "rewrite"}
PHONE = {"name": "phone", "pattern": r"\d{3}-\d{4}", "action": "penalty", "penalty": 0.5}
BOMB = {"name": "weapons", "pattern": "(?i)bomb", "action": "veto"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two labels whose positions are few."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = train_tokenizer(["a b c"], 300, folder)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)
    shape = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        id2label={0: "safe", 1: "harmful"},
        label2id={"safe": 0, "harmful": 1},
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(shape).save_pretrained(folder)
    return folder


def rule_of(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"path": str(folder), "label": "harmful", **settings}


def audit(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_rules_veto_penalise_and_rewrite(tmp_path: Path) -> None:
    layer = SafetyLayer(config(tmp_path, WORDS, PHONE, BOMB), "chat")
    texts = ["DAMN, go  to hell, damned", "call 555-1234 or 555-0000", "A Bomb.", "fine"]
    found = layer.check([(PROMPT, text) for text in texts])
    assert [finding.text for finding in found] == [
        "[removed], [removed], damned",
        *texts[1:],
    ]
    assert [finding.penalty for finding in found] == [2.0, 1.0, 1.0, 0.0]
    assert [finding.vetoed for finding in found] == [False, False, True, False]
    rows = audit(tmp_path)
    assert [(row["rule"], row["action"], row["count"]) for row in rows] == [
        ("bad words", "rewrite", 2),
        ("phone", "penalty", 2),
        ("weapons", "veto", 1),
    ]
    assert rows[2]["completion_sha256"] == hashlib.sha256(b"A Bomb.").hexdigest()
    assert rows[0]["place"] == "chat"
    assert "Bomb" not in (tmp_path / "audit.jsonl").read_text()


def test_the_audit_log_shows_the_text_where_that_is_wanted(tmp_path: Path) -> None:
    for _ in range(2):  # a second layer adds to the file
        SafetyLayer(config(tmp_path, BOMB, audit_text=True), "train").check([(PROMPT, "bomb")])
    assert [row["completion"] for row in audit(tmp_path)] == ["bomb", "bomb"]


def test_a_replacement_is_text_and_no_pattern(tmp_path: Path) -> None:
    rule = {**WORDS, "replacement": r"\1 \g<0>"}
    [found] = SafetyLayer(config(tmp_path, rule), "chat").check([(PROMPT, "damn it")])
    assert found.text == r"\1 \g<0> it"


def test_a_word_file(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\nc++\n  x.y \n", encoding="utf-8")
    rule = {"name": "w", "words_file": str(words)}
    layer = SafetyLayer(config(tmp_path, rule), "chat")
    found = layer.check([(PROMPT, text) for text in ("use C++ now", "xzy", "X.Y")])
    assert [bool(one.hits) for one in found] == [True, False, True]


def test_a_classifier_reads_long_texts_in_pieces(classifier: Path, tmp_path: Path) -> None:
    rule = config(tmp_path, classifier=rule_of(classifier)).classifier
    assert rule is not None
    harm = HarmClassifier(rule)
    pieces = ["abcdefgh abcdefg", "zyxwvuts zyxwvut"]
    each = harm.probabilities(pieces)
    together = harm.probabilities(["".join(pieces), "", *pieces])
    assert together[0] == pytest.approx(max(each), abs=1e-6)
    assert together[2:] == pytest.approx(each, abs=1e-6)
    assert all(0 <= value <= 1 for value in together)
    assert each[0] != pytest.approx(each[1], abs=1e-4)


def test_a_classifier_vetoes_from_its_threshold_on(classifier: Path, tmp_path: Path) -> None:
    always = config(tmp_path, classifier=rule_of(classifier, threshold=1e-9))
    [found] = SafetyLayer(always, "chat").check([(PROMPT, "x")])
    assert found.vetoed
    assert audit(tmp_path)[0]["rule"] == "classifier"
    assert audit(tmp_path)[0]["probability"] == found.harm
    never = config(tmp_path, classifier=rule_of(classifier, threshold=1.0))
    assert not SafetyLayer(never, "chat").check([(PROMPT, "x")])[0].hits


def test_what_is_no_classifier_is_refused(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no label 'evil'; its labels: safe, harmful"):
        SafetyLayer(config(tmp_path, classifier=rule_of(classifier, label="evil")), "chat")
    with pytest.raises(UserError, match="cannot be loaded"):
        SafetyLayer(config(tmp_path, classifier=rule_of(tmp_path)), "chat")


def test_a_classifier_without_its_head_is_refused(classifier: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path)
    BertModel.from_pretrained(classifier).save_pretrained(tmp_path)
    labels = json.loads((classifier / "config.json").read_text())
    headless = json.loads((tmp_path / "config.json").read_text())
    headless["id2label"], headless["label2id"] = labels["id2label"], labels["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(headless))
    with pytest.raises(UserError, match="lacks the weights classifier"):
        SafetyLayer(config(tmp_path, classifier=rule_of(tmp_path)), "chat")


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"name": "r"}, "needs a pattern"),
        ({"name": "r", "pattern": "x", "words": ["y"]}, "needs a pattern"),
        ({"name": "r", "words": [""]}, "empty word"),
    ],
)
def test_a_rule_that_is_none(tmp_path: Path, rule: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        config(tmp_path, rule)
    with pytest.raises(UserError, match="not a regular expression"):
        SafetyLayer(config(tmp_path, {"name": "r", "pattern": "("}), "chat")


def test_an_audit_log_that_cannot_be_written_is_found_out_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="audit log"):
        SafetyLayer(config(tmp_path, BOMB, audit=str(tmp_path)), "train")


def test_as_a_reward_a_veto_has_a_score_of_its_own(tmp_path: Path) -> None:
    source = config(tmp_path, WORDS, PHONE, BOMB, veto_score=-5.0).model_dump()
    scorer = build(RewardConfig.model_validate({"sources": [{**source, "type": "safety"}]}))
    texts = ("fine", "damn 555-1234", "bomb, damn")
    items = [ScoreItem(id=str(n), messages=PROMPT, response=t) for n, t in enumerate(texts)]
    scores = scorer.score(items)
    scorer.close()
    assert [score.value for score in scores] == [0.0, -1.5, -5.0]
    assert scores[2].vetoes == ("safety: bad words", "safety: weapons")
    assert len(audit(tmp_path)) == 4
