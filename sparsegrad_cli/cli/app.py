"""The program ``sparsegrad``: its commands, the environment they run in, and the exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated

import typer

from sparsegrad_cli import distributed
from sparsegrad_cli.cli import compare as compare_command
from sparsegrad_cli.cli import estimate as estimate_command
from sparsegrad_cli.cli import evaluate as evaluate_command
from sparsegrad_cli.cli import explain as explain_commands
from sparsegrad_cli.cli import export as export_command
from sparsegrad_cli.cli import generate as generate_command
from sparsegrad_cli.cli import init as init_command
from sparsegrad_cli.cli import judge as judge_command
from sparsegrad_cli.cli import predict as predict_command
from sparsegrad_cli.cli import recipes as recipe_commands
from sparsegrad_cli.cli import report as report_command
from sparsegrad_cli.cli import runs as run_commands
from sparsegrad_cli.cli.output import run_guarded
from sparsegrad_cli.errors import UsageError

app = typer.Typer(
    name="sparsegrad",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune transformers by training about 1 % of the MLP weights, and compare methods.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong command line, recipe or data, 3 out of memory, "
    "130 interrupted.",
)
app.command("init")(init_command.init)
app.command("train")(run_commands.train)
app.command("calibrate")(run_commands.calibrate)
app.command("compare")(compare_command.compare)
app.command("estimate")(estimate_command.estimate)
app.command("validate")(recipe_commands.validate)
app.command("report")(report_command.report)
app.command("predict")(predict_command.predict)
app.command("evaluate")(evaluate_command.evaluate)
app.command("export")(export_command.export)
app.command("generate")(generate_command.generate)
app.command("judge")(judge_command.judge)
app.command("explain")(explain_commands.explain)
app.command("env")(explain_commands.env)
app.add_typer(recipe_commands.configs_app, name="configs")


def _version(value: bool) -> None:
    if value:
        from sparsegrad_cli import __version__

        typer.echo(f"sparsegrad {__version__}")
        raise typer.Exit


_DISTRIBUTED = ("train", "calibrate")  # the commands that several processes can run together


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Refuse a command that was started in several processes but runs in one."""
    command = context.invoked_subcommand
    if distributed.world_size() > 1 and command not in _DISTRIBUTED and "--help" not in sys.argv:
        with distributed.errors_on_rank_zero():
            raise UsageError(
                f"sparsegrad {command} was started in {distributed.world_size()} processes, "
                "but runs in one",
                where="WORLD_SIZE in the environment, which torchrun and accelerate launch set",
                fix=f"run sparsegrad {command} without the launcher"
                + ("; --jobs trains several runs at a time" if command == "compare" else ""),
            )


def main() -> None:
    """Run the command line and exit with its code; show a traceback only with ``--debug``."""
    # These must be set before a library is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Job systems send SIGTERM. Commands handle it like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal cannot show becomes "?" instead of an error.
            stream.reconfigure(errors="replace")
    sys.exit(run_guarded(app))


if __name__ == "__main__":
    main()
