"""Calls and strings that have no place here: code from data, a shell, one machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("actors", "learner", "reward_service", "cluster")
PICKLES = {"pickle", "_pickle", "cloudpickle", "ray.cloudpickle", "dill", "marshal", "joblib"}
# The user's own reward function, on its way to the reward service's process.
PICKLE_ALLOWED = {"reward_service/sources/pickled.py"}
# The first writes its drawing through ElementTree, which escapes what it is given; the second
# inserts our own style sheet; the third inserts what the sanitizer has let through.
MARKUP_ALLOWED = {
    "learner/evaluation/charts.py",
    "learner/evaluation/page.py",
    "cluster/pages/labelling/text.py",
}
TEMPLATES = ("*.html", "*.j2", "*.jinja", "*.jinja2")
# Put together from parts, as this file is searched as well.
FOLDERS = "|".join(["work", "root", "tmp"])
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:" + FOLDERS + r")(?=/|['\"\s]|$)")
REGISTRY_HOSTS = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "download.pytorch" + ".org",
    "wheels.vllm" + ".ai",
]


def committed_or_new(*patterns: str) -> list[Path]:
    """Files git tracks or would add; in an unpacked archive without git, all of them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode == 0:
        found = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        hidden = re.compile(r"/(\.|runs/|build/|dist/)")
        found = [path for pattern in patterns for path in ROOT.rglob(pattern)]
        found = [path for path in found if not hidden.search(f"/{path.relative_to(ROOT)}")]
    return sorted(path for path in found if path.is_file())


def python_files() -> list[Path]:
    return [path for path in committed_or_new("*.py") if "_pb2" not in path.name]


def full_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it was imported as: {"load": "torch.load", "pkl": "pickle"}."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({a.asname: a.name for a in node.names if a.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return found


def is_true(call: ast.Call, keyword: str) -> bool:
    given = [k.value for k in call.keywords if k.arg == keyword]
    return bool(given) and isinstance(given[0], ast.Constant) and given[0].value is True


def banned_call(call: ast.Call, imported_as: dict[str, str]) -> str | None:
    """Why a call is banned, or None."""
    head, _, rest = ast.unparse(call.func).partition(".")
    name = imported_as.get(head, head) + ("." + rest if rest else "")
    module, _, function = name.rpartition(".")
    if function in ("load", "loads", "Unpickler") and module in PICKLES:
        return f"{name} runs code from data"
    if name == "torch.load" and not is_true(call, "weights_only"):
        return "torch.load without weights_only=True runs code from data"
    if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
        return f"{name} runs code from data"
    if any(k.arg == "shell" for k in call.keywords) and not is_false(call, "shell"):
        return "shell=True"
    if is_true(call, "allow_pickle"):
        return "allow_pickle=True"
    if is_true(call, "trust_remote_code"):
        return "trust_remote_code=True is the user's to set, in the config"
    return None


def is_false(call: ast.Call, keyword: str) -> bool:
    given = [k.value for k in call.keywords if k.arg == keyword]
    return bool(given) and isinstance(given[0], ast.Constant) and given[0].value is False


def banned_in(code: str) -> list[tuple[int, str]]:
    tree = ast.parse(code)
    imported_as = full_names(tree)
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    found = ((call.lineno, banned_call(call, imported_as)) for call in calls)
    return [(line, reason) for line, reason in found if reason]


def test_no_merge_conflict_is_left() -> None:
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in committed_or_new("*.py", "*.md", "*.toml", "*.html", "*.txt", "Makefile")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.startswith(marks)
    ]
    assert found == []


def test_no_banned_call() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {reason}"
        for path in python_files()
        for line, reason in banned_in(path.read_text(encoding="utf-8"))
        if not (path.relative_to(ROOT).as_posix() in PICKLE_ALLOWED and "pickle" in reason)
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads as read\nread(b)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_a_banned_call_is_seen(code: str) -> None:
    assert banned_in(code)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import json\njson.loads(t)",
        "model.eval()",
        "import subprocess\nsubprocess.run(c, shell=False)",
    ],
)
def test_an_allowed_call_is_not(code: str) -> None:
    assert banned_in(code) == []


def test_templates_escape_everything() -> None:
    """`|safe`, Markup and an autoescape block turned off would let a response write our pages."""
    unsafe = re.compile(r"\|\s*safe\b|autoescape\s+false")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in committed_or_new(*TEMPLATES)
        for match in unsafe.finditer(path.read_text(encoding="utf-8"))
    ]
    markup = re.compile(r"\bMarkup\(|\|\s*safe\s*[}%]|autoescape\s*=\s*False")
    found += [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in PACKAGES
        and path.relative_to(ROOT).as_posix() not in MARKUP_ALLOWED
        for match in markup.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_no_path_of_one_machine_and_no_registry_host() -> None:
    found = []
    for path in python_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            hosts = [host for host in REGISTRY_HOSTS if host in line]
            if MACHINE_PATH.search(line) or hosts:
                found.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
    assert found == []


@pytest.mark.parametrize("folder", ["work", "root", "tmp"])
def test_a_path_of_one_machine_is_seen(folder: str) -> None:
    assert MACHINE_PATH.search(f'open("/{folder}/x")')
    assert not MACHINE_PATH.search(f'run_dir / "{folder}" / "a/{folder}/b"')


# One function sets how torch computes; a second place would undo it for a part of the process.
TORCH_STATE_HOME = "cluster/machine/torch_state.py"
TORCH_STATE = {
    "set_float32_matmul_precision",
    "set_num_threads",
    "set_num_interop_threads",
    "use_deterministic_algorithms",
    "set_default_dtype",
    "set_default_device",
    "set_flush_denormal",
}


def torch_state_set_in(code: str) -> list[int]:
    """Lines that call a setter of torch's global state, or assign to one of `torch.backends`."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute | ast.alias):
            name = node.attr if isinstance(node, ast.Attribute) else node.name
            if name in TORCH_STATE:
                lines.append(node.lineno)
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(".backends." in f".{ast.unparse(target)}" for target in targets):
            lines.append(node.lineno)
    return lines


def test_torch_state_is_set_in_one_place() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in PACKAGES
        and path.relative_to(ROOT).as_posix() != TORCH_STATE_HOME
        for line in torch_state_set_in(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.set_float32_matmul_precision('medium')",
        "from torch import set_num_threads",
        "import torch\nset_threads = torch.set_num_threads",
        "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True",
    ],
)
def test_a_second_place_is_seen(code: str) -> None:
    assert torch_state_set_in(code)
