"""The commands of the program."""

import typer

from agnostic_cache.cli.serve import serve

app = typer.Typer(
    help="Never prefill the same tokens twice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)


@app.callback()
def _commands() -> None:
    """Make each command a word of its own, though there be one."""
