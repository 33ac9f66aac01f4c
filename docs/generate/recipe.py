"""Write the reference of the recipe keys from the schema."""

from __future__ import annotations

from sparsegrad_cli.recipe.explain_key import Key, all_keys, methods

_INTRODUCTION = """# Recipe keys

What a recipe and a study may say. `sparsegrad explain KEY` shows the same in the terminal. This
page is generated from `sparsegrad_cli/recipe/` and the settings of the methods; do not edit it
(`make reference` writes it again).

A key is written in YAML, or on the command line as `train.learning_rate=1e-4`:

```yaml
model: builtin:minilm
train: {learning_rate: 1e-4, num_train_epochs: 3}
```

[Settings and their effect](settings.md) says which keys work together, and
[the keys of train](train.md) where `train` differs from TrainingArguments.
"""


def page() -> str:
    """Return the page as Markdown."""
    keys = [key for key in all_keys() if not key.path.startswith("method.")]
    recipe = [key for key in keys if key.owner != "study"]
    study = [key for key in keys if key.owner == "study"]
    parts = [_INTRODUCTION, "## A recipe\n", *_tables(recipe, "##"), _method_part()]
    return "\n".join([*parts, "## A study\n", *_tables(study, "##")])


def _tables(keys: list[Key], level: str) -> list[str]:
    """Return a table of the keys without a section, then a part for each section."""
    inside = {f"{section.path}.{name}" for section in keys for name in section.inner}
    plain = [key for key in keys if key.path not in inside]
    parts = [_table(plain)]
    for section in keys:
        held = [key for key in keys if key.path in {f"{section.path}.{n}" for n in section.inner}]
        if held:
            parts += [f"{level}# {section.path}\n", f"{_sentence(section.meaning)}\n", _table(held)]
    return parts


def _method_part() -> str:
    own = [key for key in all_keys() if key.path.startswith("method.")]
    rows = ["| key | value | default | meaning | methods |", "| --- | --- | --- | --- | --- |"]
    for key in sorted(own, key=lambda key: key.path):
        names = key.owner.split(", ")
        many = f"{len(names)} methods" if len(names) > 6 else ", ".join(f"`{n}`" for n in names)
        rows.append(f"{_row(key)} {many} |")
    listed = [f"- `{key.path.removeprefix('method.name: ')}`: {key.meaning}" for key in methods()]
    words = "`method: NAME`, or a mapping with `name` and settings of that method:\n"
    return "\n".join(["### method\n", words, *listed, "", *rows, ""])


def _table(keys: list[Key]) -> str:
    head = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *map(_row, keys), ""])


def _row(key: Key) -> str:
    value = "a section, below" if key.inner else key.type
    default = f"`{key.default}`" if key.default else ""
    cells = (f"`{key.path}`", value, default, key.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
