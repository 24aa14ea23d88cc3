"""Start the program."""

import sys


def main() -> None:
    """Run the command that the arguments name; without the extra ``cli``, say so and end with exit code 2."""
    try:
        import typer  # noqa: F401, PLC0415 - here, to say which extra is missing
    except ModuleNotFoundError:
        sys.stderr.write("agnostic-cache: the commands need an extra: pip install 'agnostic-cache[cli]'\n")
        sys.exit(2)
    from agnostic_cache.cli.app import app  # noqa: PLC0415

    app(prog_name="agnostic-cache")


if __name__ == "__main__":
    main()
