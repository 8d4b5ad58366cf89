"""The mistakes of test_bad_input.py: a command line, the files it needs, what the message says."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Words = Callable[[Any, Path], list[Any]]

GOOD_FUNCTION = "def good(completions, **columns):\n    return [1.0] * len(completions)\n"
HEAD = "def f(prompts, completions, **columns):\n    "
GOOD_ROW = json.dumps({"prompt": [{"role": "user", "content": "how long"}]})
LONG = json.dumps({"prompt": "battery " * 900})


@dataclass(frozen=True)
class Case:
    """`words(world, folder)`: the command line. `says`: all must be in the message. `keeps`: the
    run directories that lie there afterwards, by name. `usage`: typer's own message is shown."""

    words: Words
    says: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    usage: bool = False


def train(
    world: Any, folder: Path, *overrides: str, reward: str = "", **sections: str
) -> list[Any]:
    (folder / "good.py").write_text(GOOD_FUNCTION)
    source = reward or 'type = "function"\npath = "good.py:good"'
    return ["train", world.train_toml(folder / "c.toml", source, **sections), *overrides]


# -- configs ---------------------------------------------------------------------------------------


def setting(*overrides: str, says: tuple[str, ...], **sections: str) -> Case:
    return Case(lambda w, d: train(w, d, *overrides, **sections), says)


def config_file(content: bytes, *says: str, command: str = "train") -> Case:
    def words(world: Any, folder: Path) -> list[Any]:
        (folder / "c.toml").write_bytes(content)
        return [command, folder / "c.toml"]

    return Case(words, ("c.toml", *says))


CONFIGS = {
    "no config": Case(lambda w, d: ["train"], ("accord train", "no config given")),
    "no config file": Case(lambda w, d: ["train", d / "no.toml"], ("no.toml", "no such config")),
    "config that is a directory": Case(lambda w, d: ["train", d], ("is a directory",)),
    "empty config": config_file(b"", "missing key model", "missing key data"),
    "broken TOML": config_file(b"[model\n", "not valid TOML", "line 1"),
    "TOML that is not UTF-8": config_file(b'[model]\npath = "\xff"\n', "not valid TOML"),
    "another command's config": config_file(
        b'[model]\npath = "m"\n[data]\npath = "p"\n', "unknown key data.path", command="train"
    ),
    "misspelt key in the file": setting(
        rollout="max_token = 3",
        says=("c.toml", "unknown key rollout.max_token", "did you mean rollout.max_tokens?"),
    ),
    "misspelt key on the command line": setting(
        "algoritm.gamma=0.9", says=("unknown key algoritm", "did you mean algorithm?")
    ),
    "word that is no override": setting("batch.steps", says=("'batch.steps'", "section.key=value")),
    "key below a value": setting("batch.steps.more=1", says=("batch.steps.more",)),
    "reward source that is not there": setting(
        "reward.sources.3.weight=1", says=("'3'", "does not name an entry")
    ),
    "text for a number": setting("batch.steps=many", says=("batch.steps = 'many'", "integer")),
    "number for a switch": setting("data.shuffle=7", says=("data.shuffle = 7", "boolean")),
    "fraction for a whole number": setting("batch.steps=1.5", says=("batch.steps = 1.5",)),
    "zero steps": setting("batch.steps=0", says=("batch.steps = 0", "greater than or equal to 1")),
    "negative learning rate": setting("learner.lr=-1", says=("learner.lr = -1", "greater than 0")),
    "infinite learning rate": setting("learner.lr=1e999", says=("learner.lr = inf", "finite")),
    "KL coefficient that is no number": setting(
        "algorithm.kl.coef=nan", says=("algorithm.kl.coef = nan", "finite")
    ),
    "infinite weight of a reward": setting(
        "reward.sources.0.weight=inf", says=("reward.sources.0", "weight = inf", "finite")
    ),
    "unknown choice": setting("algorithm.loss=pppo", says=("algorithm.loss = 'pppo'", "ppo")),
    "groups of one": setting(
        "algorithm.advantage=grpo",
        "batch.samples_per_prompt=1",
        says=("c.toml", "batch.samples_per_prompt"),
    ),
    "shortest completion over the longest": setting(
        "rollout.min_tokens=99", says=("min_tokens = 99 is over max_tokens = 6",)
    ),
    "sharding of one process": setting("learner.sharding=fsdp2", says=("learner.processes",)),
    "run name that is a path": setting("run.name=../evil", says=("run.name = '../evil'", "folder")),
    "run name that is too long": setting("run.name=" + "x" * 300, says=("run.name", "200 bytes")),
    "no room for a prompt": setting(
        "rollout.max_tokens=512", says=("rollout.max_tokens = 512", "no room for a prompt")
    ),
    "address without a port": setting(
        "reward.address=localhost", says=("reward.address = 'localhost'", "host:port")
    ),
    "address with an impossible port": setting(
        "reward.address=localhost:99999", says=("reward.address", "from 1 to 65535")
    ),
}


# -- models ----------------------------------------------------------------------------------------


def broken_model(change: Callable[[Path], object], *says: str) -> Case:
    """A copy of the policy that was changed."""

    def words(world: Any, folder: Path) -> list[Any]:
        copy = folder / "broken"
        shutil.copytree(world.policy, copy)
        change(copy)
        return train(world, folder, f"model.path={copy}")

    return Case(words, says if "prompts.jsonl, line 1" in says else ("broken", *says))


def tokenizer_model(change: Callable[[Path], object], *says: str) -> Case:
    """A model whose mistake shows when the first row is tokenised."""
    return broken_model(change, "prompts.jsonl, line 1", *says)


def edit_json(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        file = directory / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


def remove(*names: str) -> Callable[[Path], object]:
    return lambda directory: [(directory / name).unlink(missing_ok=True) for name in names]


def cut_weights(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_tensor(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)


def new_vocabulary(directory: Path) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


def empty_directory(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


REFUSING = "{{ raise_exception('roles must alternate') }}"

MODELS = {
    "no model directory": Case(
        lambda w, d: train(w, d, f"model.path={d}/gone/m"),
        ("gone/m", "no such model directory", "model.path"),
    ),
    "directory without a model": Case(
        lambda w, d: train(w, d, f"model.path={empty_directory(d)}"),
        ("empty", "holds no model", "config.json"),
    ),
    "file as a model": Case(
        lambda w, d: train(w, d, f"model.path={w.prompts}"), ("is a file, not a model directory",)
    ),
    "unknown architecture": broken_model(edit_json("config.json", model_type="alien"), "alien"),
    "damaged config.json": broken_model(write("config.json", "{"), "cannot load the"),
    "weights cut off": broken_model(cut_weights, "model.safetensors", "is cut off", "bytes"),
    "no weights": broken_model(remove("model.safetensors"), "holds no weights"),
    "weights of another shape": broken_model(
        edit_json("config.json", intermediate_size=96), "do not fit config.json", "has shape"
    ),
    "weights that lack a tensor": broken_model(lose_a_tensor, "lack 1 tensors", "up_proj"),
    "no tokenizer": broken_model(
        remove("tokenizer.json", "tokenizer_config.json"), "tokenizer", "broken"
    ),
    "damaged tokenizer": broken_model(write("tokenizer.json", "{"), "cannot load the tokenizer"),
    "no chat template": tokenizer_model(remove("chat_template.jinja"), "has no chat template"),
    "template that is no Jinja": tokenizer_model(
        write("chat_template.jinja", "{% for %}"), "the chat template refuses", "Expected an expr"
    ),
    "template that refuses": tokenizer_model(
        write("chat_template.jinja", REFUSING), "roles must alternate"
    ),
    "chat template that is not there": Case(
        lambda w, d: train(w, d, f"model.chat_template={d}/no.jinja"),
        ("no.jinja", "cannot read the chat template"),
    ),
    "reference that is not there": Case(
        lambda w, d: train(w, d, f"learner.reference_path={d}/gone/m"),
        ("gone/m", "no such model directory"),
    ),
    "value model that is a policy": Case(
        lambda w, d: train(w, d, f"learner.value_path={w.policy}"),
        ("accord_reward.json", "not a reward model made by Accord"),
    ),
    "value model with another tokenizer": Case(
        lambda w, d: other_value_model(w, d),
        ("another tokenizer or chat template", "learner.value_path=none"),
    ),
    "sft without a model": Case(
        lambda w, d: [*offline(w, d, "sft", w.demonstrations), f"model.path={d}/gone/m"],
        ("gone/m", "no such model directory"),
    ),
    "sft of a broken model": Case(
        lambda w, d: [*offline(w, d, "sft", w.demonstrations), f"model.path={copied_cut(w, d)}"],
        ("model.safetensors", "is cut off"),
    ),
}


def copied_cut(world: Any, folder: Path) -> Path:
    copy = Path(shutil.copytree(world.policy, folder / "broken"))
    cut_weights(copy)
    return copy


def offline(world: Any, folder: Path, command: str, data: Path) -> list[Any]:
    return [command, world.offline_toml(folder / "s.toml", data), "--quiet"]


def other_value_model(world: Any, folder: Path) -> list[Any]:
    """The policy got another vocabulary, so the reward model is no longer made for it."""
    copy = Path(shutil.copytree(world.policy, folder / "broken"))
    new_vocabulary(copy)
    return train(world, folder, f"model.path={copy}", f"learner.value_path={world.reward_model}")


# -- prompts ---------------------------------------------------------------------------------------


def prompts(name: str, content: str | bytes, *says: str, overrides: tuple[str, ...] = ()) -> Case:
    def words(world: Any, folder: Path) -> list[Any]:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
        return train(world, folder, f"data.prompts={folder / name}", *overrides)

    return Case(words, (name, *says))


def second_row(row: str | bytes, *says: str, overrides: tuple[str, ...] = ()) -> Case:
    raw = row if isinstance(row, bytes) else row.encode()
    content = GOOD_ROW.encode() + b"\n" + raw + b"\n"
    return prompts("p.jsonl", content, "line 2", *says, overrides=overrides)


PROMPTS = {
    "no prompts file": Case(
        lambda w, d: train(w, d, f"data.prompts={d}/no.jsonl"), ("no.jsonl", "no such file")
    ),
    "prompts that are a directory": Case(
        lambda w, d: train(w, d, f"data.prompts={d}"), ("is a directory",)
    ),
    "unknown kind of file": prompts("p.docx", "x", "unknown kind of file '.docx'", ".jsonl"),
    "name without a kind": prompts("prompts", "x", "does not say its kind"),
    "preference store as prompts": prompts("p.db", "x", "accord preferences export"),
    "empty prompts file": prompts("p.jsonl", "", "holds no rows"),
    "blank prompts file": prompts("p.jsonl", "\n\r\n  \n", "holds no rows"),
    "byte order mark alone": prompts("p.jsonl", b"\xef\xbb\xbf", "holds no rows"),
    "header alone": prompts("p.csv", "prompt,label\n", "holds no rows"),
    "UTF-16": prompts("p.jsonl", GOOD_ROW.encode("utf-16"), "UTF-16", "save the file as UTF-8"),
    "row that is not UTF-8": second_row(b'{"prompt": "\xff"}', "is not valid UTF-8"),
    "row that is not JSON": second_row("{broken", "is not JSON", "column 2"),
    "row in single quotes": second_row("{'prompt': 'a'}", "is not JSON"),
    "row that is a list": second_row("[1, 2]", "holds a list, not an object"),
    "row nested too deeply": second_row('{"a": ' + "[" * 99_999, "nested too deeply"),
    "number with too many digits": second_row('{"prompt": ' + "1" * 5000 + "}", "too many digits"),
    "half of a character": second_row('{"prompt": "a \\ud800"}', "surrogate"),
    "row without a prompt": second_row(
        '{"question": "x"}', "no prompt", "the row has question", "data.prompt_key"
    ),
    "prompt that is null": second_row('{"prompt": null}', "no prompt"),
    "prompt that is a number": second_row('{"prompt": 5}', "holds a number"),
    "prompt that is empty": second_row('{"prompt": "  "}', "is empty"),
    "empty list of messages": second_row('{"prompt": []}', "holds an empty list"),
    "unknown role": second_row(
        '{"prompt": [{"role": "robot", "content": "x"}]}', "message 1 is no message", "user"
    ),
    "message without text": second_row(
        '{"prompt": [{"role": "user", "content": ["x"]}]}', "message 1 is no message"
    ),
    "answer without a question": second_row(
        '{"messages": [{"role": "assistant", "content": "x"}]}', "no question"
    ),
    "prompt too long": second_row(LONG, "data.max_prompt_tokens is 8", overrides=(
        "data.max_prompt_tokens=8",
    )),
    "prompt over the context": second_row(
        LONG, "the model's context leaves 506", overrides=("data.max_prompt_tokens=4000",)
    ),
    "column that was named": prompts(
        "p.jsonl",
        GOOD_ROW,
        "line 1",
        "there is no column 'ask'; the row has prompt",
        overrides=("data.prompt_key=ask",),
    ),
    "all prompts too long": prompts(
        "p.jsonl", LONG, "all 1 prompts are too long",
        overrides=("data.max_prompt_tokens=8", "data.skip_long_prompts=true"),
    ),
    "no usable row": prompts(
        "p.jsonl", "1\n2\n", "none of its rows is usable", "left out 2 bad rows", "line 1",
        overrides=("data.skip_bad_rows=true",),
    ),
    "table with a cell too many": prompts("p.csv", "prompt,n\na,b,c\n", "line 2", "has 3 cells"),
    "table with an open quote": prompts("p.csv", 'prompt\n"a\n', "not a readable table"),
    "broken array": prompts("p.json", '[{"prompt": "a"},', "is not JSON"),
    "damaged Parquet": prompts("p.parquet", b"PAR1 no PAR1", "not a readable Parquet file"),
    "damaged archive": prompts("p.jsonl.gz", gzip.compress(b"{}" * 999)[:-9], "cannot be read"),
    "data set that is not there": Case(
        lambda w, d: train(w, d, f"data.prompts=datasets:{d}/none"),
        ("cannot load the data set", "data.split"),
    ),
}  # fmt: skip


# -- rewards ---------------------------------------------------------------------------------------


def function(code: str, *says: str, name: str = "f") -> Case:
    def words(world: Any, folder: Path) -> list[Any]:
        (folder / "reward.py").write_text(code)
        return train(world, folder, reward=f'type = "function"\npath = "reward.py:{name}"')

    return Case(words, says)


def source(text: str, *says: str) -> Case:
    return Case(lambda w, d: train(w, d, reward=text.format(world=w, folder=d)), says)


def tampered(change: Callable[[Path], object], *says: str) -> Case:
    """A reward model whose directory was changed after training."""

    def words(world: Any, folder: Path) -> list[Any]:
        copy = Path(shutil.copytree(world.reward_model, folder / "rm"))
        change(copy)
        return train(world, folder, reward=f'type = "model"\npath = "{copy}"')

    return Case(words, ("/rm", *says))


def new_template(directory: Path) -> None:
    file = directory / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


FUNCTION = 'type = "function"\npath = '

REWARDS = {
    "no reward file": source(FUNCTION + '"absent.py:f"', "absent.py", "there is no file"),
    "no reward function": function(GOOD_FUNCTION, "reward.py:f", "no function 'f'", "it has: good"),
    "path without a function": source(FUNCTION + '"good.py"', "file.py:function"),
    "reward file with a syntax error": function("def f(:\n", "SyntaxError", "line 1"),
    "reward file that raises": function("import nothing_here\n", "reward.py:f", "nothing_here"),
    "reward file that exits": function("raise SystemExit(3)\n", "reward.py:f", "SystemExit"),
    "reward that is async": function("async def f(**columns):\n    return []\n", "async function"),
    "reward that is no function": function("f = 3\n", "no function 'f'"),
    "reward that raises": function(
        HEAD + "return [{}['x'] for _ in completions]\n",
        "reward.py:f raised KeyError: 'x'", "reward.py:2 `return [{}['x']", "line 1, trial",
    ),
    "reward that exits": function(HEAD + "raise SystemExit(1)\n", "raised SystemExit: 1"),
    "reward that is not a number": function(HEAD + "return [float('nan')] * 2\n", "returned nan"),
    "reward that is infinite": function(HEAD + "return [float('inf')] * 2\n", "returned inf"),
    "reward that is None": function(HEAD + "return [None] * 2\n", "returned None", "line 1"),
    "reward that is text": function(HEAD + "return ['1', '2']\n", "returned '1'", "finite number"),
    "too few rewards": function(HEAD + "return [1.0]\n", "returned 1 rewards for 2 completions"),
    "rewards that are no list": function(HEAD + "return 1.0\n", "returned a float, not a list"),
    "reward that cannot stand an empty completion": function(
        HEAD + "return [1 / len(c[0]['content']) for c in completions]\n",
        "ZeroDivisionError", "trial completion ''",
    ),
    "column that a row lacks": function(
        "def f(completions, label):\n    return [0.0 for _ in completions]\n",
        "takes 'label'", "prompts.jsonl, line 1", "no columns beside the prompt",
    ),
    "unknown kind of reward": source('type = "magic"', "reward.sources.0", "magic"),
    "rule that is no expression": source(
        'type = "rules"\nrequired = ["("]', "'('", "is not a regular expression", "required"
    ),
    "two rewards of one name": source(
        'type = "rules"\n[[reward.sources]]\ntype = "rules"', "the same name twice", "rules"
    ),
    "no reward model": source('type = "model"\npath = "gone/rm"', "gone/rm", "no such"),
    "policy as a reward model": source(
        'type = "model"\npath = "{world.policy}"', "accord_reward.json", "not a reward model"
    ),
    "template of the reward model": tampered(new_template, "or chat template", "trained with"),
    "tokenizer of the reward model": tampered(new_vocabulary, "or chat template", "trained with"),
    "reward model cut off": tampered(cut_weights, "model.safetensors", "is cut off"),
    "damaged record of the reward model": tampered(write("accord_reward.json", "{"), "damaged"),
    "nobody at the reward address": Case(
        lambda w, d: train(w, d, f"reward.address=127.0.0.1:{free_port()}"),
        ("nobody listens at 127.0.0.1:", "accord serve-reward"),
    ),
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- demonstrations and preferences ----------------------------------------------------------------


def rows(command: str, row: str, *says: str, overrides: tuple[str, ...] = ()) -> Case:
    def words(world: Any, folder: Path) -> list[Any]:
        (folder / "d.jsonl").write_text(row + "\n")
        return [*offline(world, folder, command, folder / "d.jsonl"), *overrides]

    return Case(words, says if "s.toml" in says else ("d.jsonl", *says))


def imported(row: str, *says: str) -> Case:
    def words(world: Any, folder: Path) -> list[Any]:
        (folder / "d.jsonl").write_text(row + "\n")
        return ["preferences", "import", folder / "d.jsonl", folder / "new.db"]

    return Case(words, ("d.jsonl, line 1", *says))


def corrupt_store(folder: Path) -> Path:
    (folder / "p.db").write_bytes(b"no database at all" * 99)
    return folder / "p.db"


PAIR = '{"prompt": "q", "chosen": "x", "rejected": "y"}'

DATA = {
    "demonstration of no known shape": rows("sft", '{"a": 1}', "of no known shape", "rename"),
    "demonstration without an answer": rows(
        "sft", '{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"
    ),
    "demonstrations that are all too long": Case(
        lambda w, d: [*offline(w, d, "sft", w.demonstrations), "fit.max_tokens=2"],
        ("no rows are left to train on", "fit.max_tokens"),
    ),
    "comparison without rejected": rows(
        "dpo", '{"prompt": "q", "chosen": "x"}', "line 1", "lacks rejected beside chosen and prompt"
    ),
    "comparison of unlike texts": rows(
        "dpo", '{"chosen": "a", "rejected": "b"}', "begin with the same text", "three columns"
    ),
    "IPO with label smoothing": rows(
        "dpo", PAIR, "s.toml", "label_smoothing", overrides=("loss=ipo", "label_smoothing=0.1")
    ),
    "margin that is missing": rows(
        "reward-model", PAIR, "line 1", "has no margin", overrides=("use_margin=true",)
    ),
    "margin that is text": rows(
        "reward-model", PAIR[:-1] + ', "margin": "much"}', "'margin' must be a finite number"
    ),
    "store of comparisons that is not there": Case(
        lambda w, d: [*offline(w, d, "dpo", d / "no.db")], ("no.db", "no such preference store")
    ),
    "no preference store": Case(
        lambda w, d: ["preferences", "stats", d / "none.db"],
        ("none.db", "no such preference store"),
    ),
    "corrupt preference store": Case(
        lambda w, d: ["preferences", "stats", corrupt_store(d)], ("p.db",)
    ),
    "import of no file": Case(
        lambda w, d: ["preferences", "import", d / "no.jsonl", d / "new.db"],
        ("no.jsonl", "no such file"),
    ),
    "import of other columns": imported('{"a": 1}', "of no known shape", "--skip-bad-rows"),
    "import of equal answers": imported(PAIR.replace("y", "x"), "the same completion"),
    "half-written snapshot": Case(
        lambda w, d: offline(w, d, "reward-model", half_written(d)),
        ("labels-1", "is no whole snapshot", "snapshot.json is missing"),
    ),
    "snapshot of an empty store": Case(
        lambda w, d: ["preferences", "snapshot", made_store(w, d), d / "labels-1"],
        ("made.db", "no judgement is left for a snapshot"),
    ),
    "forgetting somebody unknown": Case(
        lambda w, d: ["preferences", "forget", made_store(w, d), "--annotator", "nobody"],
        ("made.db", "there is no annotator 'nobody'"),
    ),
    "export to an unknown kind": Case(
        lambda w, d: ["preferences", "export", made_store(w, d), d / "x.docx"],
        ("x.docx", "no export to '.docx'"),
    ),
}


def half_written(folder: Path) -> Path:
    (folder / "labels-1").mkdir()
    (folder / "labels-1" / "train.parquet").write_bytes(b"PAR1")
    return folder / "labels-1"


def made_store(world: Any, folder: Path) -> Path:
    from reward_service.preferences.store import PreferenceStore

    PreferenceStore(folder / "made.db")
    return folder / "made.db"


# -- resume ----------------------------------------------------------------------------------------


def made_run(
    world: Any, folder: Path, *, status: str = "interrupted", step: int = 1, total: int = 16
) -> Path:
    """A training run as its command leaves it, with a checkpoint after `step` steps."""
    from cluster.contracts.config.file import load_config
    from cluster.contracts.config.train import TrainConfig
    from cluster.contracts.records import RunState
    from cluster.runs.run import Run
    from tests.checkpoint_files import write_checkpoint

    config = load_config(TrainConfig, str(train(world, folder)[1]))
    run = Run.create(str(folder / "runs"), "r", "train", config)
    state = RunState(
        step=step, version=step, next_group=2 * step, prompts_total=total, dropped=(),
        elapsed_s=1.0,
    )  # fmt: skip
    staging = run.checkpoints.begin(step)
    run.checkpoints.commit(staging, write_checkpoint(staging), state, 2)
    run.update_manifest(status=status)
    return run.path


def resume(*overrides: str, says: tuple[str, ...], change: Any = None, **made: Any) -> Case:
    def words(world: Any, folder: Path) -> list[Any]:
        run = made_run(world, folder, **made)
        if change is not None:
            change(run)
        return ["train", "--resume", run, *overrides]

    return Case(words, says, keeps=("r",))


def existing_run(world: Any, folder: Path) -> list[Any]:
    (folder / "runs" / "r").mkdir(parents=True)
    return train(world, folder)


RESUMES = {
    "run directory exists": Case(
        existing_run, ("runs/r", "the run directory exists", "run.name"), keeps=("r",)
    ),
    "resume of no run": Case(
        lambda w, d: ["train", "--resume", d], ("is not a run directory", "manifest.json")
    ),
    "resume of another command's run": Case(
        lambda w, d: ["sft", "--resume", made_run(w, d)],
        ("runs/r", "is a run of `accord train`, not of `accord sft`"),
        keeps=("r",),
    ),
    "resume of a finished run": resume(
        says=("runs/r", "has done its 3 steps", "batch.steps=6"), status="finished", step=3
    ),
    "resume with changed settings": resume(
        "algorithm.gamma=0.5",
        "batch.steps=9",
        says=("runs/r", "cannot change on resume: algorithm.gamma\n", "start a new run"),
    ),
    "resume with a damaged checkpoint": resume(
        change=write("checkpoints/step-000001/run_state.json", "{"), says=("no usable checkpoint",)
    ),
    "resume with a damaged record of a checkpoint": resume(
        change=write("checkpoints/step-000001/manifest.json", "{"), says=("no usable checkpoint",)
    ),
    "resume with a damaged manifest": resume(
        change=write("manifest.json", "{"), says=("manifest.json", "is damaged")
    ),
    "resume with a damaged config": resume(
        change=write("config.toml", "[model"), says=("config.toml", "not valid TOML")
    ),
    "resume with other prompts": resume(
        says=("prompts.jsonl", "had 99 prompts when the run began, now 16"), total=99
    ),
}


# -- the other commands ----------------------------------------------------------------------------


def evaluate(world: Any, folder: Path, policy: str, judge: str) -> list[Any]:
    (folder / "good.py").write_text(GOOD_FUNCTION)
    (folder / "e.toml").write_text(
        f'[policy]\npath = "{policy}"\n[baseline]\npath = "{world.policy}"\n'
        f'[data]\nprompts = "{world.prompts}"\n'
        f'[[judge.sources]]\ntype = "function"\npath = "{judge}"\n'
    )
    return ["evaluate", folder / "e.toml"]


def generate(world: Any, folder: Path, *options: object) -> list[Any]:
    return ["generate", world.policy, world.prompts, *options]


TAKEN = socket.socket()


def taken_port() -> int:
    if TAKEN.getsockname()[1] == 0:
        TAKEN.bind(("127.0.0.1", 0))
        TAKEN.listen(1)
    return int(TAKEN.getsockname()[1])


def serve(world: Any, folder: Path, *options: Any) -> list[Any]:
    return ["serve-reward", train(world, folder)[1], *options]


def usage(words: Words, *says: str) -> Case:
    return Case(words, says, usage=True)


OTHERS = {
    "negative number of samples": usage(
        lambda w, d: generate(w, d, "--samples", "-2"), "--samples", "greater than or equal to 1"
    ),
    "no tokens to generate": usage(
        lambda w, d: generate(w, d, "--max-tokens", "0"), "--max-tokens", "equal to 1"
    ),
    "temperature of zero": Case(
        lambda w, d: generate(w, d, "--temperature", "0", "--out", d / "a.jsonl"),
        ("temperature = 0", "greater than 0"),
    ),
    "temperature that is no number": Case(
        lambda w, d: generate(w, d, "--temperature", "nan", "--out", d / "a.jsonl"),
        ("temperature = nan", "finite"),
    ),
    "output in no directory": Case(
        lambda w, d: generate(w, d, "--out", d / "none" / "a.jsonl"),
        ("a.jsonl", "there is no directory", "none"),
    ),
    "output that is a directory": Case(
        lambda w, d: generate(w, d, "--out", d), ("is a directory",)
    ),
    "generate without a model": Case(
        lambda w, d: ["generate", d / "gone" / "m", w.prompts, "--out", d / "a.jsonl"],
        ("gone/m", "no such model directory"),
    ),
    "generate without prompts": Case(
        lambda w, d: ["generate", w.policy, d / "no.jsonl", "--out", d / "a.jsonl"],
        ("no.jsonl", "no such file"),
    ),
    "evaluate without a policy": Case(
        lambda w, d: evaluate(w, d, f"{d}/gone/policy", "good.py:good"),
        ("gone/policy", "no such model directory"),
    ),
    "evaluate without a judge": Case(
        lambda w, d: evaluate(w, d, str(w.policy), "no.py:good"), ("no.py", "there is no file")
    ),
    "port in use": Case(
        lambda w, d: serve(w, d, "--port", taken_port()),
        ("127.0.0.1:", "port is in use", "choose another port"),
    ),
    "impossible port": usage(lambda w, d: serve(w, d, "--port", "99999"), "--port", "65535"),
    "open to the network without a token": Case(
        lambda w, d: serve(w, d, "--host", "0.0.0.0"), ("0.0.0.0", "token")
    ),
    "no token file": Case(
        lambda w, d: serve(w, d, "--token-file", d / "no"), ("/no", "No such file")
    ),
    "chat without a model": Case(
        lambda w, d: ["chat", d / "gone" / "m"], ("gone/m", "no such model directory")
    ),
    "status of no run": Case(lambda w, d: ["status", d], ("is not a run directory",)),
    "report of no run": Case(lambda w, d: ["report", d], ("is not a run directory",)),
    "replay of no run": Case(lambda w, d: ["replay", d], ("is not a run directory",)),
    "scale of no run": Case(lambda w, d: ["scale", d, "2"], ("is not a run directory",)),
    "scale to no number": usage(lambda w, d: ["scale", d, "few"], "is no number of workers"),
    "pages of no folder": Case(lambda w, d: ["ui", d / "gone"], ("gone", "no such folder")),
    "pages at a port in use": Case(
        lambda w, d: ["ui", d, "--port", taken_port()], ("cannot listen", "choose another port")
    ),
    "unknown benchmark": Case(lambda w, d: ["bench", "speed"], ("speed",)),
    "unknown key of a simulation": Case(lambda w, d: ["simulate", "wrkers=3"], ("wrkers",)),
    "plan without prompts": Case(
        lambda w, d: ["plan", train(w, d)[1], f"data.prompts={d}/no.jsonl"],
        ("no.jsonl", "no such file"),
    ),
    "plan without a model": Case(
        lambda w, d: ["plan", train(w, d)[1], f"model.path={d}/gone/m"],
        ("gone/m", "no such model directory"),
    ),
    "plan without a reward": Case(
        lambda w, d: ["plan", train(w, d, reward=FUNCTION + '"absent.py:f"')[1]],
        ("absent.py", "there is no file"),
    ),
    "unknown command": usage(lambda w, d: ["trian"], "trian", "No such command"),
    "unknown option": usage(lambda w, d: ["train", "--stpes", "3"], "--stpes", "No such option"),
    "word too many": usage(lambda w, d: ["report", d, "more"], "more"),
}

CASES = {**CONFIGS, **MODELS, **PROMPTS, **REWARDS, **DATA, **RESUMES, **OTHERS}
