"""How many entries a method asks for in its targets, and how many it will train: from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.supports import entries_for, shared_out
from sparsegrad_cli.recipe.method_section import MepropMethod, SparsegradMethod


def asked_entries(
    settings: MepropMethod | SparsegradMethod, targets: Sequence[Target]
) -> Mapping[str, int]:
    """Target name -> entries that the density, or ``entries`` of all together, asks for there.

    Raises:
        UsageError: the targets do not have so many, or there are more targets than entries.
    """
    if settings.entries is None:
        assert settings.density is not None  # the recipe was checked
        shapes = ((t.out_features, t.in_features) for t in targets)
        counts = [entries_for(settings.density, *shape) for shape in shapes]
    else:
        try:
            counts = shared_out(settings.entries, [t.size for t in targets])
        except ValueError:
            raise UsageError(
                f"method.entries is {settings.entries:,}: the {len(targets)} targets have "
                f"{sum(t.size for t in targets):,}, and each needs at least one",
                where="method.entries",
            ) from None
    return {target.name: count for target, count in zip(targets, counts, strict=True)}


def asked_rows(settings: MepropMethod, targets: Sequence[Target]) -> Mapping[str, int]:
    """Target name -> outputs through which MeProp by rows back-propagates."""
    if settings.density is not None:
        return {t.name: max(1, round(settings.density * t.out_features)) for t in targets}
    asked = asked_entries(settings, targets)
    return {t.name: max(1, round(asked[t.name] / t.in_features)) for t in targets}
