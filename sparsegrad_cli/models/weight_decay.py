"""Which parameters decay: the rule of ``transformers.Trainer.get_decay_parameter_names``."""

from __future__ import annotations

from torch import nn

# Names of parameters that do not decay, as transformers has them; matched in lower case.
_UNDECAYED = ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def decaying_names(model: nn.Module) -> set[str]:
    """Return the names of all parameters except biases and the parameters of norms."""
    from transformers.trainer_pt_utils import get_parameter_names

    return set(get_parameter_names(model, [nn.LayerNorm], _UNDECAYED))
