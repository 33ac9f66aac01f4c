"""Measure the structure of the package: size, import layers and cycles, and patterns that we avoid.

    python -m benchmarks.codebase            a table
    python -m benchmarks.codebase --json     the same for a program
    python -m benchmarks.codebase --list private_attributes     the places of the findings

tests/test_architecture.py checks these figures.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "sparsegrad_cli"
ROOT = Path(__file__).resolve().parent.parent

# Parts of the package from top to bottom. A module may import its own part and those of later rows.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__", "cli"),
    ("study",),
    ("export", "generate", "judge", "estimate", "predict", "starter"),
    ("training",),
    ("restore",),
    ("calibration",),
    ("tasks",),
    ("run",),
    ("methods",),
    ("peft",),
    ("models", "data", "memory"),
    ("numerics",),
    ("report",),
    ("recipe",),
    ("records",),
    ("io",),
    ("distributed", "interruption", "progress", "error_mapping"),
    ("errors",),
)
# A recipe is built from the settings of the methods, and these compute sizes. They import no torch,
# so they belong to its layer.
GROUND = {
    "numerics.sizing": "recipe",
} | {
    f"methods.{name}": "recipe"
    for name in (
        "registry",
        "settings",
        "base",
        "sized_settings",
        "sparse_settings",
        "change_settings",
        "adaptive_settings",
        "factor_settings",
        "gradient_settings",
        "tuner_facts",
    )
}
METHODS = ("sparsegrad", "lora", "meprop", "full")
# Places where a method's name has another meaning: (file, name) -> reason.
OTHER_WORDS = {
    "export": "lora is a file format there",
    "cli/export.py": "lora is a file format there",
    "tasks/answerer.py": "full: the positions of the model are used up",
    "generate/answer_questions.py": "full: the positions of the model are used up",
    "cli/chat.py": "full: the positions of the model are used up",
    "report": "lora is a file format of exports, full a reason to stop",
}


@dataclass(frozen=True)
class Finding:
    """One place in the package."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


@dataclass(frozen=True)
class Import:
    """An import of one module of the package by another."""

    source: str
    target: str
    line: int
    only_types: bool


class Codebase:
    """The syntax trees of the package, with the counts that they give.

    Args:
        root: the folder that holds the package.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root / PACKAGE
        self.trees = {
            path.relative_to(self.root): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(self.root.rglob("*.py"))
        }
        self.modules = {self._module(path): path for path in self.trees}

    @staticmethod
    def _module(path: Path) -> str:
        parts = path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def files(self) -> int:
        """Return the number of Python files."""
        return len(self.trees)

    @cached_property
    def lines(self) -> int:
        """Return the number of lines of all Python files."""
        return sum(
            len((self.root / path).read_text(encoding="utf-8").splitlines()) for path in self.trees
        )

    @cached_property
    def functions(self) -> list[Finding]:
        """Return all functions, the longest first."""
        found = [
            (node.end_lineno - node.lineno + 1, Finding(str(path), node.lineno, node.name))
            for path, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
        ]
        found.sort(key=lambda pair: -pair[0])
        return [Finding(f.file, f.line, f"{f.what}, {size} lines") for size, f in found]

    @cached_property
    def imports(self) -> list[Import]:
        """Return every import of one module of the package by another."""
        found = []
        for module, path in self.modules.items():
            typed = set(_type_checking_nodes(self.trees[path]))
            for node in ast.walk(self.trees[path]):
                for target in dict.fromkeys(self._imported(node)):
                    if target != module and not _is_door(module, target):
                        found.append(Import(module, target, node.lineno, node in typed))  # type: ignore[attr-defined]
        return found

    def _imported(self, node: ast.AST) -> Iterator[str]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name == PACKAGE or not name.startswith(PACKAGE):
                continue
            inner = name.removeprefix(PACKAGE + ".")
            while inner and inner not in self.modules:
                inner = inner.rpartition(".")[0]
            if inner:
                yield inner

    @cached_property
    def cycles(self) -> list[list[str]]:
        """Return the groups of modules that import each other in a cycle, also by late imports."""
        graph: dict[str, set[str]] = {module: set() for module in self.modules}
        for edge in self.imports:
            if not edge.only_types:
                graph[edge.source].add(edge.target)
        return [sorted(group) for group in _components(graph) if len(group) > 1]

    @cached_property
    def upward(self) -> list[Finding]:
        """Return the imports from a lower layer to a higher one, except those for type checking."""
        return [
            Finding(str(self.modules[edge.source]), edge.line, f"imports {edge.target}")
            for edge in self.imports
            if layer_of(edge.target) < layer_of(edge.source) and not edge.only_types
        ]

    @cached_property
    def method_names(self) -> list[Finding]:
        """Return the places outside of methods/ that test which method is used."""
        found = []
        for path, tree in self.trees.items():
            if path.parts[0] == "methods" or _is_other_word(path):
                continue
            for node in ast.walk(tree):
                for what in _method_tests(node):
                    found.append(Finding(str(path), getattr(node, "lineno", 0), what))
        return found

    @cached_property
    def private_attributes(self) -> list[Finding]:
        """Return the uses of private attributes that this package does not define itself."""
        ours: set[str] = set()
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    ours.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                        ours.add(node.attr)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    ours.add(node.id)
        return [
            Finding(str(path), node.lineno, ast.unparse(node))
            for path, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and node.attr not in ours
        ]

    @cached_property
    def string_reads(self) -> list[Finding]:
        """Return the reads of a mapping by a literal key: ``data["key"]``, ``data.get("key")``."""
        helpers = {"dig", "block", "items", "mappings", "number", "numbers", "text", "points"}
        found = []
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                    named = _is_text(node.slice)
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    named = node.func.attr == "get" and bool(node.args) and _is_text(node.args[0])
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    named = node.func.id in helpers and any(map(_is_text, node.args))
                else:
                    continue
                if named:
                    found.append(Finding(str(path), node.lineno, ast.unparse(node)[:80]))
        return found

    def calls(self, *names: str) -> list[Finding]:
        """Return the calls of functions with these names, with or without a module prefix."""
        found = []
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                    if name in names:
                        found.append(Finding(str(path), node.lineno, ast.unparse(node)[:80]))
        return found

    @property
    def lock_calls(self) -> list[Finding]:
        """Return the calls that take a lock on a file."""
        return self.calls("lockf", "flock", "FileLock", "UnixFileLock", "SoftFileLock")

    @property
    def atomic_writers(self) -> list[Finding]:
        """Return the calls that sync a file to the disk, which every atomic write needs."""
        return self.calls("fsync")


def layer_of(module: str) -> int:
    """Return the row of ``LAYERS`` of a module; the package itself is above all rows."""
    parts = module.split(".")
    ground = f"{parts[0]}.{parts[-1]}" if len(parts) > 1 else ""
    part = GROUND.get(ground, parts[0])
    return next((row for row, names in enumerate(LAYERS) if part in names), -1)


def _is_door(source: str, target: str) -> bool:
    """Return whether a method's settings import its implementation, which they do on demand."""
    folder, _, name = source.rpartition(".")
    return name == "settings" and folder.startswith("methods.") and target.startswith(folder)


def _components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of a graph (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in graph[node]:
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(set(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def _type_checking_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in node.body:
                yield from ast.walk(inner)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_other_word(path: Path) -> bool:
    return str(path) in OTHER_WORDS or path.parts[0] in OTHER_WORDS


def _method_tests(node: ast.AST) -> Iterator[str]:
    """Yield the tests in a node for a method's name or for the type of its settings."""
    classes = tuple(f"{name.capitalize()}Method" for name in METHODS)
    if isinstance(node, ast.Compare):
        for side in (node.left, *node.comparators):
            inner = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
            if any(isinstance(e, ast.Constant) and e.value in METHODS for e in inner):
                yield ast.unparse(node)
                return
    elif isinstance(node, ast.Dict):
        if any(isinstance(key, ast.Constant) and key.value in METHODS for key in node.keys):
            yield "a dict with a method's name for a key"
    elif isinstance(node, ast.MatchValue):
        if isinstance(node.value, ast.Constant) and node.value.value in METHODS:
            yield f"case {node.value.value!r}"
    elif isinstance(node, ast.MatchClass):
        if ast.unparse(node.cls).endswith(classes):
            yield f"case {ast.unparse(node.cls)}()"
    elif isinstance(node, ast.Call):
        asks = getattr(node.func, "id", "") in ("isinstance", "issubclass")
        if asks and any(name in ast.unparse(node.args[1]) for name in classes):
            yield ast.unparse(node)


def measure(code: Codebase) -> dict[str, int | str]:
    """Return the figures of the table."""
    return {
        "files": code.files,
        "lines": code.lines,
        "longest_function": str(code.functions[0]),
        "functions_over_60_lines": sum(
            int(f.what.split(", ")[1].split()[0]) > 60 for f in code.functions
        ),
        "files_over_330_lines": sum(
            len((code.root / path).read_text(encoding="utf-8").splitlines()) > 330
            for path in code.trees
        ),
        "import_cycles": len(code.cycles),
        "upward_imports": len(code.upward),
        "method_names": len(code.method_names),
        "private_attributes": len(code.private_attributes),
        "string_reads": len(code.string_reads),
        "lock_calls": len(code.lock_calls),
        "atomic_writers": len(code.atomic_writers),
    }


def main() -> None:
    """Print all figures, or the places that one of them counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds the package")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", metavar="FIGURE", help="print each place of one figure")
    options = parser.parse_args()
    code = Codebase(options.root)
    if options.list:
        for place in getattr(code, options.list.removeprefix("import_")):
            print(place)
        return
    figures = measure(code)
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):26} {value}")


if __name__ == "__main__":
    main()
