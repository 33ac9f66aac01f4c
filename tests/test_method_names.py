"""No code outside ``methods/`` names a method or tests its type."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import sparsegrad_cli
from sparsegrad_cli.methods.registry import METHOD_NAMES

PACKAGE = Path(sparsegrad_cli.__file__).parent
# Modules of methods/ that all methods share; the others belong to one method.
SHARED = ("base", "implementation", "optimizer", "peft_folder", "registry", "sparse_method")
# (folder, word) where a word that names a method means something else.
OTHER_MEANINGS = {
    ("__init__.py", "peft"): "the tuner's package",
    ("records", "peft"): "a library, among the versions in a record",
    ("cli", "full"): "an answer that fills the model's positions",
    ("estimate", "full"): "the loss over the whole vocabulary",
    ("models", "full"): "the loss over the whole vocabulary",
    ("recipe", "full"): "the loss over the whole vocabulary",
    ("export", "full"): "an answer that fills the model's positions",
    ("export", "lora"): "a form of export",
    ("export", "sparsegrad"): "this package, among the versions on a model card",
    ("generate", "full"): "an answer that fills the model's positions",
    ("generate", "lora"): "a kind of folder that PEFT reads",
    ("records", "full"): "an answer that fills the model's positions",
    ("records", "lora"): "a form of export",
    ("report", "full"): "an answer that fills the model's positions",
    ("tasks", "full"): "an answer that fills the model's positions",
    ("report", "lora"): "a form of export",
    ("run", "sparsegrad"): "this package, among the versions in a manifest",
    ("records", "sparsegrad"): "this package, among the versions in a record",
}


def uses(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions that decide something by a value: a name there would be a dispatch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None)
        elif isinstance(node, ast.MatchValue):
            yield node.value
        elif isinstance(node, ast.arguments):
            yield from (default for default in (*node.defaults, *node.kw_defaults) if default)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.value
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".get", ".pop")):
            yield from node.args[:1]


def names_in(expression: ast.expr) -> Iterator[tuple[int, str]]:
    """Yield the method names among the constants of a value, and in collections of them."""
    if isinstance(expression, ast.Constant) and expression.value in METHOD_NAMES:
        yield expression.lineno, str(expression.value)
    elif isinstance(expression, ast.Tuple | ast.List | ast.Set):
        for element in expression.elts:
            yield from names_in(element)


def modules() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] != "methods":
            yield place, ast.parse(path.read_text())


def test_no_value_decides_by_a_methods_name() -> None:
    found = [
        f"{place}:{line}: {name}"
        for place, tree in modules()
        for use in uses(tree)
        for line, name in names_in(use)
        if (place.parts[0], name) not in OTHER_MEANINGS
    ]
    assert not found


def test_nothing_is_imported_from_a_methods_own_modules() -> None:
    """Without its classes, no ``isinstance`` can ask for a method's type."""
    found = []
    for place, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            package, _, module = node.module.partition(".methods.")
            if package == "sparsegrad_cli" and module and module not in SHARED:
                found.append(f"{place}:{node.lineno}: {node.module}")
    assert not found


def test_settings_import_without_torch() -> None:
    """Reading a recipe must stay fast: ``sparsegrad validate`` never waits for torch."""
    code = (
        "import sys, sparsegrad_cli.methods.registry, sparsegrad_cli.recipe.load_recipe; "
        "sys.exit(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
