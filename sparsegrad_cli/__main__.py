"""``python -m sparsegrad_cli`` is ``sparsegrad``."""

from sparsegrad_cli.cli.app import main

if __name__ == "__main__":
    main()
