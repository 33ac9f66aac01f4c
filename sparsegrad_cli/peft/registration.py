"""Register the tuner with PEFT. All uses of PEFT's private API at import are in this module.

``peft.utils.register_peft_method`` accepts only names that are members of the enumeration
``PeftType``, to which a third party cannot add a member through public API. A plain string in its
place breaks ``load_adapter`` of transformers. So this module adds the member, as the enumeration's
class body would. It was checked with the versions of PEFT in :data:`CHECKED`.
"""

from __future__ import annotations

from typing import Any

import peft
from packaging.version import Version
from peft.utils import PeftType, register_peft_method

from sparsegrad_cli.peft.config import NAME, SparseGradConfig
from sparsegrad_cli.peft.model import SparseGradModel

CHECKED = ("0.21.2", "0.22")
"""First version that was checked, and first one that was not."""


def check_version(version: str = peft.__version__) -> None:
    """Check that this PEFT is one that the registration was tested with.

    Raises:
        ImportError: Says which versions work.
    """
    first, end = CHECKED
    if not Version(first) <= Version(Version(version).base_version) < Version(end):
        raise ImportError(
            f"sparsegrad_cli.peft was tested with peft >= {first}, < {end}; installed is "
            f"{version}: pip install 'peft>={first},<{end}'"
        )


def register() -> None:
    """Make PEFT know the tuner; does nothing if it knows it already.

    Raises:
        ImportError: See :func:`check_version`.
    """
    check_version()
    if peft_type() is None:
        _add_member(NAME)
        register_peft_method(
            name=NAME.lower(), config_cls=SparseGradConfig, model_cls=SparseGradModel
        )


def peft_type() -> PeftType | None:
    """Return PEFT's name for the tuner; None before registration."""
    return PeftType.__members__.get(NAME)


def _add_member(name: str) -> None:
    """Add a member to PeftType, an enumeration of strings whose values are their names."""
    enumeration: Any = PeftType
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    enumeration._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
