#!/usr/bin/env python3
"""Prints what the structure of a checkout is like: `python benchmarks/structure.py [CHECKOUT]`.

Per folder: files, lines, median, 90th percentile and largest file, and the longest chain of imports
(modules that import each other in a circle count as one). For the whole: functions over 60 lines,
the longest one, and comment lines per hundred lines of code. Tests, generated and empty files are
left out.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

PACKAGES = ("actors", "learner", "reward_service", "cluster")
TOP = ("launch.py", "accord.py", "bootstrap.py")
LONG_FUNCTION = 60


def sources(root: Path) -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    found += [root / name for name in TOP if (root / name).exists()]
    return [path for path in found if "_pb2" not in path.name and path.stat().st_size]


def count_comments(text: str) -> tuple[int, int]:
    """(lines of code, comment lines): a comment after code counts, docstrings and blanks do not."""
    code: set[int] = set()
    comments: set[int] = set()
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in skipped:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code), len(comments)


def functions(root: Path, paths: list[Path]) -> list[tuple[int, str]]:
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append((size, f"{path.relative_to(root)}:{node.name}"))
    return sorted(found, reverse=True)


def imports(root: Path, paths: list[Path]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, inside functions too."""
    names = {module_name(root, path) for path in paths}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for path in paths:
        own = module_name(root, path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            graph[own].update(name for name in wanted if name in names and name != own)
    return graph


def module_name(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            found.append(group)

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def floors(graph: dict[str, set[str]], inside: str) -> int:
    """Longest chain of imports among the modules of one package."""
    own = {name: {t for t in targets if within(t, inside)} for name, targets in graph.items()}
    own = {name: targets for name, targets in own.items() if within(name, inside)}
    group_of = {name: tuple(group) for group in circles(own) for name in group}
    depth: dict[tuple[str, ...], int] = {}

    def below(group: tuple[str, ...]) -> int:
        if group not in depth:
            targets = {group_of[t] for name in group for t in own[name]} - {group}
            depth[group] = 1 + max((below(target) for target in targets), default=0)
        return depth[group]

    return max((below(group) for group in group_of.values()), default=0)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def rooms(root: Path) -> list[str]:
    """Packages, and the folders in them that hold modules."""
    folders = {path.parent for path in sources(root) if path.parent != root}
    return sorted(".".join(folder.relative_to(root).parts) for folder in folders)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    paths = sources(root)
    graph = imports(root, paths)
    print(f"{'folder':34} files  lines  p50  p90  max  import floors")
    for room in [*PACKAGES, *(room for room in rooms(root) if room not in PACKAGES)]:
        own = [path for path in paths if within(module_name(root, path), room)]
        direct = (
            own
            if room in PACKAGES
            else [p for p in own if p.parent == root.joinpath(*room.split("."))]
        )
        sizes = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in direct)
        if sizes:
            print(
                f"{room:34} {len(sizes):5} {sum(sizes):6} {statistics.median(sizes):4.0f} "
                f"{sizes[int(0.9 * (len(sizes) - 1))]:4} {sizes[-1]:4}  {floors(graph, room):3}"
            )
    sizes = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    print(
        f"{'all':34} {len(sizes):5} {sum(sizes):6} {statistics.median(sizes):4.0f} "
        f"{sizes[int(0.9 * (len(sizes) - 1))]:4} {sizes[-1]:4}"
    )
    found = functions(root, paths)
    long = [size for size, _ in found if size > LONG_FUNCTION]
    print(f"functions: {len(found)}, over {LONG_FUNCTION} lines: {len(long)}, longest: {found[0]}")
    for name in ["", *rooms(root)]:
        own = [p for p in paths if not name or within(module_name(root, p), name)]
        code, comments = map(
            sum, zip(*(count_comments(p.read_text("utf-8")) for p in own), strict=True)
        )
        share = 100 * comments / max(code, 1)
        print(f"comment lines per 100 lines of code, {name or 'all'}: {share:.1f}")
    print("circles:", [sorted(group) for group in circles(graph) if len(group) > 1] or "none")


if __name__ == "__main__":
    main()
