"""SparseGrad as a PEFT tuner. Importing this package makes PEFT know ``SPARSEGRAD``.

    import sparsegrad_cli as sg
    from peft import get_peft_model

    basis = sg.calibrate(model, batches)
    model = get_peft_model(model, sg.peft.SparseGradConfig(basis=basis, density=0.01))
    optimizer = sg.peft.optimizer(model, lr=1e-3)

Loading a saved adapter with ``PeftModel.from_pretrained`` needs ``import sparsegrad_cli.peft``
first, because PEFT has no other way to find a tuner that it does not ship.
"""

from sparsegrad_cli.peft.config import SparseGradConfig
from sparsegrad_cli.peft.layer import SparseGradLayer
from sparsegrad_cli.peft.memory import save_memory
from sparsegrad_cli.peft.model import SparseGradModel
from sparsegrad_cli.peft.optimizer import optimizer, parameter_groups
from sparsegrad_cli.peft.registration import register

register()

__all__ = [
    "SparseGradConfig",
    "SparseGradLayer",
    "SparseGradModel",
    "optimizer",
    "parameter_groups",
    "save_memory",
]
