"""Run ``sparsegrad`` with ``python -m sparsegrad_cli``."""

from sparsegrad_cli.cli.app import main

if __name__ == "__main__":
    main()
