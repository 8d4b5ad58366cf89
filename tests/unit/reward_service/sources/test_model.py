"""A tiny reward model is served as the very function it is; torch, no service."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

from cluster.contracts.config.reward import RewardConfig, RewardModelSource
from cluster.contracts.errors import BadReward, UserError
from cluster.machine import torch_state
from learner.models.heads import reward_scores
from learner.models.load import load_tokenizer
from learner.models.reward_artifact import (
    BFLOAT16_TOLERANCE,
    Golden,
    RewardArtifact,
    template_hash,
    tokenizer_fingerprint,
    write_artifact,
)
from reward_service.composition import build
from reward_service.source import ScoreItem, SourceContext
from reward_service.sources.model import (
    ModelScorer,
    make,
    microbatches,
    shorten_trunk,
)

# One character a token, by bytes: transformers picks the tokenizer's class by the model's, and that
# of Qwen2 splits so, whatever the files were made with (and adds a token of its own).
WORDS = ["<pad>", "<end>", "U", "B", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% else %}"
    "B{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}B{% endif %}"
)


def make_tokenizer(template: str = TEMPLATE) -> Any:
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=24,
        num_labels=1,
        pad_token_id=0,
    )
    model = Qwen2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight, std=2.0)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    tokenizer = load_tokenizer(path)
    ids = [2, 4, 3, 5, 1]
    golden = Golden(token_ids=tuple(ids), score=raw(model, ids))
    write_artifact(
        path,
        RewardArtifact(
            tokenizer=tokenizer_fingerprint(tokenizer),
            template=template_hash(tokenizer),
            centre_mean=0.5,
            centre_std=2.0,
            centred_on="chosen",
            max_tokens=16,
            golden=(golden,),
        ),
    )
    return path, model


def raw(model: Any, ids: list[int]) -> float:
    with torch.no_grad():
        return float(reward_scores(model, torch.tensor([ids]), torch.ones(1, len(ids)).long())[0])


def item(answer: str, **keys: Any) -> ScoreItem:
    return ScoreItem(
        id="p#0", messages=({"role": "user", "content": "ab"},), response=answer, **keys
    )


def scorer(path: Path, **keys: Any) -> ModelScorer:
    return ModelScorer(RewardModelSource(path=str(path), **keys))


def test_text_is_rendered_with_the_models_own_template(made: tuple[Path, Any]) -> None:
    path, model = made
    value = scorer(path, normalise=False).score([item("cd")])[0].value
    assert value == pytest.approx(raw(model, [2, 4, 5, 3, 6, 7, 1]), abs=1e-5)
    cut = scorer(path, normalise=False).score([item("cd", finish_reason="length")])[0].value
    assert cut == pytest.approx(raw(model, [2, 4, 5, 3, 6, 7]), abs=1e-5)
    assert abs(cut - value) > 1e-3


def test_ids_count_only_under_the_same_tokenizer(made: tuple[Path, Any]) -> None:
    path, model = made
    served = scorer(path, normalise=False)
    ids = {"prompt_ids": (2, 9, 3), "response_ids": (10, 1)}
    same, foreign = served.score(
        [item("cd", tokenizer=served.tokenizer, **ids), item("cd", tokenizer="other", **ids)]
    )
    assert same.value == pytest.approx(raw(model, [2, 9, 3, 10, 1]), abs=1e-5)
    assert foreign.value == pytest.approx(raw(model, [2, 4, 5, 3, 6, 7, 1]), abs=1e-5)


def test_a_score_does_not_depend_on_its_batch(made: tuple[Path, Any]) -> None:
    served = scorer(made[0])
    items = [item("abcdefgh"[: n % 8 + 1]) for n in range(20)]
    together = [part.value for part in served.score(items)]
    alone = [served.score([one])[0].value for one in items]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 4) for value in together}) == 8


def test_in_bfloat16_the_head_stays_exact_and_golden_scores_are_checked(
    made: tuple[Path, Any],
) -> None:
    served = scorer(made[0])
    items = [item("abcdefgh"[: n % 8 + 1]) for n in range(8)]
    exact = [part.value for part in served.score(items)]
    model, artifact = served._members[0]
    shorten_trunk(model)
    assert model.score.weight.dtype == torch.float32
    kinds = {p.dtype for p in model.base_model.parameters()}
    assert kinds == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in model.base_model.buffers())
    rounded = [part.value for part in served.score(items)]
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=BFLOAT16_TOLERANCE)
    served._check_golden(model, artifact)
    with torch.no_grad():
        model.score.weight.mul_(1.5)
    with pytest.raises(UserError, match=r"in bfloat16 where it scored"):
        served._check_golden(model, artifact)


def test_the_number_type_that_the_service_is_given(made: tuple[Path, Any]) -> None:
    """A scorer in another type is another scorer: its content says so."""
    source = RewardModelSource(path=str(made[0]))
    plain, exact = ModelScorer(source), ModelScorer(source, dtype="float32")
    short = make(source, SourceContext(dtype="bfloat16"))
    kinds = [next(one._members[0][0].base_model.parameters()).dtype for one in (exact, short)]
    assert kinds == [torch.float32, torch.bfloat16]
    assert exact.content != short.content
    if not torch.cuda.is_available():
        assert plain.content == exact.content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(made: tuple[Path, Any]) -> None:
    with pytest.raises(UserError, match=r"reward\.device: no GPU"):
        ModelScorer(RewardModelSource(path=str(made[0])), 1, "cuda")


def test_normalised_as_stored(made: tuple[Path, Any]) -> None:
    plain = scorer(made[0], normalise=False).score([item("c")])[0].value
    assert scorer(made[0]).score([item("c")])[0].value == pytest.approx((plain - 0.5) / 2.0)


def test_too_long_is_an_error_naming_the_row(made: tuple[Path, Any]) -> None:
    with pytest.raises(BadReward, match=r"'p#0' has 30 tokens, but .* for 24"):
        scorer(made[0]).score([item("a" * 25)])


def test_a_changed_template_or_weight_is_refused(made: tuple[Path, Any], tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(made[0], copied)
    make_tokenizer(TEMPLATE.replace("B", "U")).save_pretrained(copied)
    with pytest.raises(UserError, match="not the one the reward model was trained with"):
        scorer(copied)
    with pytest.raises(UserError, match="no such reward-model directory"):
        scorer(tmp_path / "absent")


def test_the_version_follows_the_weights_and_the_scale(
    made: tuple[Path, Any], tmp_path: Path
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(made[0], copied)
    first = scorer(made[0])
    assert scorer(copied).content == first.content
    assert scorer(copied, normalise=False).content != first.content
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-20] ^= 1  # a low mantissa bit
    weights.write_bytes(bytes(data))
    assert scorer(copied).content != first.content


def test_it_composes_and_tells_its_tokenizer(made: tuple[Path, Any]) -> None:
    source = RewardModelSource(path=str(made[0]), weight=3.0)
    composition = build(RewardConfig(sources=[source]))
    score = composition.score([item("c")])[0]
    assert score.value == pytest.approx(3 * score.parts["model"])
    assert composition.info(8).tokenizer == tokenizer_fingerprint(load_tokenizer(made[0]))


def test_microbatches_keep_to_the_budget() -> None:
    lengths = [5, 1, 9, 30, 2, 2]
    plan = microbatches(lengths, 10)
    assert sorted(i for batch in plan for i in batch) == list(range(6))
    for batch in plan:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10
    assert plan == [[3], [2], [0, 4], [5, 1]]


def test_text_prompts_need_no_template(made: tuple[Path, Any]) -> None:
    path, model = made
    plain = dataclasses.replace(item("c"), messages=({"role": "text", "content": "a"},))
    value = scorer(path, normalise=False).score([plain])[0].value
    assert value == pytest.approx(raw(model, [4, 6, 1]), abs=1e-5)


def test_scores_are_exact_on_a_processor_that_would_round(
    made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AMX "medium" rounds to bfloat16: scores would be off by 2e-3, silently."""
    monkeypatch.setattr(torch_state, "product_error", lambda: 2e-3)
    before = torch.get_float32_matmul_precision()
    try:
        scorer(made[0])
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
