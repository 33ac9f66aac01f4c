"""Arbitrary YAML as recipes and studies is valid or refused with a location; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from support.hostile_cases import check_harmless, folder_content, property_test, scratch_folder
from support.hostile_yaml import damaged_bytes, damaged_recipes, random_bytes, scalars, trees

from sparsegrad_cli.recipe.load_recipe import digest, load_recipe, to_plain, to_yaml
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study import load_study
from sparsegrad_cli.recipe.study_section import Study


def read(content: bytes, *overrides: str, study: bool = False) -> None:
    """Load a recipe or study from an otherwise empty folder, and write it again."""
    with scratch_folder() as folder:
        path = folder / "r.yaml"
        path.write_bytes(content)
        before = folder_content(folder.parent)
        try:
            if study:
                load_study(path, overrides)
            else:
                again(path, overrides)
        finally:
            assert folder_content(folder.parent) == before


def again(path: Path, overrides: tuple[str, ...]) -> None:
    """Check that an accepted recipe is the same after it is written and read again."""
    recipe = load_recipe(path, overrides).recipe
    assert len(digest(recipe)) == 64
    resolved = path.with_name("resolved.yaml")
    check_harmless(to_yaml(recipe))
    resolved.write_text(to_yaml(recipe), encoding="utf-8")
    try:
        back = load_recipe(resolved).recipe
    finally:
        resolved.unlink()
    assert settled(back) == settled(recipe)


def settled(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with absolute paths; relative ones are resolved beside the recipe."""
    plain = to_plain(recipe)
    for section, key in ((plain["task"], "path"), (plain["calibration"], "basis")):
        section[key] = section[key] and str(Path(section[key]).resolve())
    return plain


@property_test("a recipe of any tree", many=500, content=trees())
def test_recipes_of_arbitrary_trees(content: str) -> None:
    read(content.encode("utf-8", "surrogatepass"))


@property_test("a study of any tree", many=500, content=trees(Study, "methods: [lora]\n"))
def test_studies_of_arbitrary_trees(content: str) -> None:
    read(content.encode("utf-8", "surrogatepass"), study=True)


@property_test("a shipped recipe or study with mistakes", many=500, case=damaged_recipes())
def test_shipped_files_with_mistakes(case: tuple[str, bytes]) -> None:
    read(case[1], study=case[0] == "recipes")


@property_test("a shipped recipe with damaged bytes", many=500, content=damaged_bytes())
def test_shipped_files_with_damaged_bytes(content: bytes) -> None:
    read(content)


@property_test("any bytes for a recipe", many=500, content=random_bytes())
def test_recipes_of_arbitrary_bytes(content: bytes) -> None:
    read(content)


@property_test(
    "any override",
    many=500,
    key=st.one_of(
        st.sampled_from(("seed", "task.path", "output_dir", "method", "a.b", "")), st.text()
    ),
    value=st.one_of(scalars(), st.text()),
)
def test_arbitrary_overrides(key: str, value: str) -> None:
    read(b"", f"{key}={value}")
