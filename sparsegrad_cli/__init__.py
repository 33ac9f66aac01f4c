"""sparsegrad: fine-tune transformers by touching about 1 % of the MLP weights.

The command line is ``sparsegrad`` (:mod:`sparsegrad_cli.cli`). Data flows one way:
recipe -> model + data -> method -> training -> run records -> report.
"""

__version__ = "0.1.0"
