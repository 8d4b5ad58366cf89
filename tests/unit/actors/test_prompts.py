"""Prompts: shapes of the field, exact order, and errors that name the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.prompts import FilePromptSource, load_prompts
from cluster.contracts.config.rollout import DataConfig
from cluster.contracts.errors import UserError


class Words:
    """A tokenizer of words: its ids are lengths; its template puts <role> before each turn."""

    chat_template: str | None = "yes"
    eos_token = "</s>"
    name_or_path = "words"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        text = "".join(f"<{m['role']}> {m['content']} " for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


class Plain(Words):
    chat_template = None


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def load(path: str, tokenizer: Any = None, seed: int = 0, **keys: Any) -> FilePromptSource:
    return load_prompts(DataConfig(prompts=path, **keys), tokenizer or Words(), seed)


def ask(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def answer(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


HH = "\n\nHuman: Why is it blue?\n\nAssistant: What?\n\nHuman: The sky\n\nAssistant: Light."


@pytest.mark.parametrize(
    ("row", "key", "messages", "metadata"),
    [
        ({"prompt": "Say hi", "label": 3}, "", [("text", "Say hi")], {"label": 3}),
        ({"prompt": [ask("Hi")]}, "", [("user", "Hi")], {}),
        (
            {"prompt": [ask("Hi")], "completion": [answer("Yo")]},
            "",
            [("user", "Hi")],
            {"completion": [answer("Yo")]},
        ),
        ({"messages": [ask("Hi"), answer("Yo")]}, "", [("user", "Hi")], {}),
        (
            {"messages": [ask("a"), answer("b"), ask("c")]},
            "",
            [("user", "a"), ("assistant", "b"), ("user", "c")],
            {},
        ),
        (
            {
                "data_source": "gsm8k",
                "prompt": [ask("2+2?")],
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"index": 7},
            },
            "",
            [("user", "2+2?")],
            {
                "data_source": "gsm8k",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"index": 7},
                "ground_truth": "4",
            },
        ),
        ({"input": "Say hi", "id": "x"}, "", [("text", "Say hi")], {"id": "x"}),
        (
            {"chosen": HH, "rejected": HH},
            "",
            [("user", "Why is it blue?"), ("assistant", "What?"), ("user", "The sky")],
            {},
        ),
        ({"chosen": [ask("Hi"), answer("Yo")], "rejected": []}, "", [("user", "Hi")], {}),
        ({"q": "Say hi", "prompt": "not this"}, "q", [("text", "Say hi")], {"prompt": "not this"}),
    ],
)
def test_shapes(
    tmp_path: Path,
    row: dict[str, Any],
    key: str,
    messages: list[tuple[str, str]],
    metadata: dict[str, Any],
) -> None:
    prompt = load(write(tmp_path, row), prompt_key=key).prompt(0)
    assert [(m["role"], m["content"]) for m in prompt.messages] == messages
    assert prompt.metadata == metadata
    if messages[0][0] == "text":
        assert prompt.token_ids == (3, 2)
    else:
        assert prompt.token_ids[-1] == len("<assistant>")


def test_parquet_is_the_same_as_jsonl(tmp_path: Path) -> None:
    rows = [{"prompt": [ask(f"{n} ?")], "extra_info": {"index": n}} for n in range(5)]
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [load(str(path)).prompt(n) for n in range(5)] == [
        load(write(tmp_path, *rows)).prompt(n) for n in range(5)
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{bad", "not JSON"),
        ("[1, 2]", "holds a list"),
        (
            '{"question": "hi"}',
            "no prompt: there is no column prompt, messages",
        ),
        ('{"prompt": null}', "no prompt"),
        ('{"prompt": 5}', "holds a number"),
        ('{"prompt": []}', "an empty list"),
        ('{"prompt": "  "}', "is empty"),
        ('{"prompt": [{"role": "robot", "content": "x"}]}', "message 1 is no message"),
        ('{"prompt": [{"role": "user", "content": ["x"]}]}', "message 1 is no message"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no question"),
        ('{"chosen": "just text"}', "HH-RLHF"),
        ('{"prompt": "a \\ud800 b"}', "surrogate"),
        ('{"prompt": "a", "label": "\\udfff"}', "'label' holds half"),
        ('{"prompt": "a b c d e f g h i"}', "9 tokens, data.max_prompt_tokens is 8"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(str(path), max_prompt_tokens=8)
    assert words in str(caught.value)
    assert f"{path}, line 3" in str(caught.value)
    assert "fix:" in str(caught.value)


def test_a_missing_column_is_named_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'question'; the row has prompt, id"):
        load(write(tmp_path, {"prompt": "hi", "id": 1}), prompt_key="question")


def test_bad_files_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    binary = tmp_path / "x.jsonl"
    binary.write_bytes(b'{"prompt": "a"}\n\xff\xfe')
    parquet = tmp_path / "x.parquet"
    parquet.write_bytes(b"PAR?")
    text = tmp_path / "x.txt"
    text.write_text("hello")
    for path, words in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "directory"),
        (empty, "holds no rows"),
        (binary, "UTF-8"),
        (parquet, "Parquet"),
        (text, "unknown kind"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            load(str(path))
        assert str(path) in str(caught.value)


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": [ask("Hi")]})
    with pytest.raises(UserError, match=r"(?s)line 1.*chat template"):
        load(path, Plain())
    assert load(write(tmp_path, {"prompt": "Hi"}), Plain()).prompt(0).token_ids == (2,)


def test_long_prompts_are_counted_when_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a b c"}, {"prompt": "a"}, {"prompt": "a b c d"})
    source = load(path, max_prompt_tokens=2, skip_long_prompts=True)
    assert (len(source), source.skipped) == (1, 2)
    with pytest.raises(UserError, match="all 2 prompts are too long"):
        load(
            write(tmp_path, {"prompt": "a b c"}, {"prompt": "a b c d"}),
            max_prompt_tokens=2,
            skip_long_prompts=True,
        )


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": f"p{n}"} for n in range(40)))
    source = load(path, seed=3)
    epochs = [[source.prompt(e * 40 + i).id for i in range(40)] for e in range(3)]
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # The position is just a number: any order of asking gives the same, in another process too.
    again = load(path, seed=3)
    assert [again.prompt(n).id for n in (119, 0, 41, 80)] == [
        epochs[2][39], epochs[0][0], epochs[1][1], epochs[2][0],
    ]  # fmt: skip
    assert [load(path, seed=4).prompt(n).id for n in range(40)] != epochs[0]


def test_the_order_does_not_change_between_releases(tmp_path: Path) -> None:
    """A resumed run relies on it."""
    path = write(tmp_path, *({"prompt": f"p{n}"} for n in range(6)))
    source = load(path, seed=0)
    order = [source.prompt(n).messages[0]["content"] for n in range(12)]
    assert order == ["p4", "p2", "p1", "p3", "p0", "p5", "p5", "p4", "p1", "p3", "p0", "p2"]


def test_without_shuffle_the_file_s_order_repeats(tmp_path: Path) -> None:
    source = load(write(tmp_path, {"prompt": "a"}, {"prompt": "b"}), shuffle=False)
    assert [source.prompt(n).messages[0]["content"] for n in range(5)] == list("ababa")
    with pytest.raises(IndexError):
        source.prompt(-1)


def test_duplicates_stay_and_have_ids_of_their_own(tmp_path: Path) -> None:
    source = load(write(tmp_path, {"prompt": "a"}, {"prompt": "a"}), shuffle=False)
    first, second = source.prompt(0), source.prompt(1)
    assert first.id != second.id
    assert first.id.split("-")[1] == second.id.split("-")[1]
    assert first == source.prompt(2)


def test_a_datasets_name_is_loaded_from_its_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b c"}\n')
    source = load(f"datasets:{folder}", shuffle=False)
    assert [source.prompt(n).token_ids for n in range(2)] == [(1,), (1, 1)]
    with pytest.raises(UserError, match="split nope"):
        load(f"datasets:{folder}", split="nope")
