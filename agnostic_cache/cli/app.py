"""The commands of the program."""

import typer

from agnostic_cache.cli.doctor import doctor
from agnostic_cache.cli.inspect import inspect
from agnostic_cache.cli.replay import replay
from agnostic_cache.cli.serve import serve

app = typer.Typer(
    help="Never prefill the same tokens twice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, replay, inspect, doctor):
    app.command()(command)
