"""Plugin files: Python files of the user's own that register code by `cluster.contracts.registry`.

The driver reads each file once and hands its text to the learner, the workers and the reward
service, which run the same text: they may sit on machines that do not have the file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import linecache
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.contracts import registry
from cluster.contracts.errors import AccordError, UserError

T = TypeVar("T")

VARIABLE = "ACCORD_PLUGINS"
"""Environment variable with plugin files for the command line, separated as in PATH."""


@dataclass(frozen=True, slots=True)
class PluginFile:
    """A plugin as the driver read it. path: absolute, for messages and tracebacks."""

    path: str
    text: str


_loaded: dict[str, PluginFile] = {}


def loaded() -> tuple[PluginFile, ...]:
    """The plugins of this process, in the order of loading: what another one has to `install`."""
    return tuple(_loaded.values())


def load_plugins(paths: Iterable[str]) -> list[str]:
    """Read and run plugin files; returns `paths`, for use as a validator.

    Raises UserError for a file that is missing, cannot be run, or registers a name that is taken.
    """
    paths = list(paths)
    install(tuple(_read(path) for path in paths))
    return paths


def plugins_from_environment() -> None:
    """Load those that the variable `ACCORD_PLUGINS` names. Raises UserError as `load_plugins`."""
    load_plugins(path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path)


def install(plugins: Iterable[PluginFile]) -> None:
    """Run plugins in this process; one that has been run with the same text is left as it is."""
    for plugin in plugins:
        if _loaded.get(plugin.path) == plugin:
            continue
        forget(plugin.path)  # an older text of the same file
        _run(plugin)
        _loaded[plugin.path] = plugin


def forget(path: str) -> None:
    """Undo what a plugin file has registered in this process."""
    _loaded.pop(path, None)
    for known in registry.REGISTRIES:
        known.forget(path)


def guarded(function: Callable[..., T], file: str, what: str) -> Callable[..., T]:
    """`function` of the plugin `file`, whose errors become one UserError that names its line."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        try:
            return function(*args, **kwargs)
        except AccordError:
            raise
        except Exception as error:
            raise UserError(
                f"{what} raised {type(error).__name__}: {error}",
                where=own_line(error, file) or file,
                fix="correct the plugin file",
            ) from error

    return call


def own_line(error: BaseException, file: str) -> str | None:
    """`file:line` and the code of the innermost frame of `error` that lies in `file`, or None."""
    line, frame = 0, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == file:
            line = frame.tb_lineno
        frame = frame.tb_next
    if isinstance(error, SyntaxError) and error.filename == file:
        line = error.lineno or 0
    if not line:
        return None
    return f"{file}:{line} `{linecache.getline(file, line).strip()}`"


def _read(path: str) -> PluginFile:
    file = Path(path).expanduser().absolute()
    try:
        return PluginFile(str(file), file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"cannot be read: {problem}",
            where=f"plugin file {path}",
            fix="a relative path starts from the directory the command is run in",
        ) from None


class _TextLoader(importlib.machinery.SourceFileLoader):
    """Loads the text that was shipped, whatever lies at the path on this machine, if anything."""

    def __init__(self, name: str, plugin: PluginFile) -> None:
        super().__init__(name, plugin.path)
        self._text = plugin.text

    def get_data(self, path: str) -> bytes:
        return self._text.encode()

    def path_stats(self, path: str) -> Any:
        raise OSError("compiled anew each time: no bytecode is read or written")


def _run(plugin: PluginFile) -> None:
    digest = hashlib.sha256(f"{plugin.path}\0{plugin.text}".encode()).hexdigest()[:12]
    name = f"accord_plugin_{digest}"
    # So that messages and tracebacks show the lines that ran, also where there is no such file.
    lines = plugin.text.splitlines(keepends=True)
    linecache.cache[plugin.path] = (len(plugin.text), None, lines, plugin.path)
    spec = importlib.util.spec_from_loader(name, _TextLoader(name, plugin), origin=plugin.path)
    if spec is None or spec.loader is None:
        raise UserError("Python cannot load this file", where=plugin.path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(Path(plugin.path).parent)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, so that nothing installed is shadowed
    registry.loading(plugin.path)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        forget(plugin.path)  # half a plugin would be found by its names
        if isinstance(error, UserError) or not isinstance(error, Exception | SystemExit):
            raise
        raise UserError(
            f"loading this plugin raised {type(error).__name__}: {error}",
            where=own_line(error, plugin.path) or plugin.path,
            fix=f"`python {plugin.path}` should run without an error",
        ) from error
    finally:
        registry.loading("")
