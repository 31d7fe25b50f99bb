"""All commands together, and what they share: the version, and errors in one line."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import sloth_fx
from sloth_fx.cli import comfyui, compare, generate, inspect, plan, spec
from sloth_fx.cli.console import complain
from sloth_fx.errors import SlothError


class _Commands(TyperGroup):
    """Prints a :class:`SlothError` as one line on stderr, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SlothError as error:
            complain(str(error))
            raise typer.Exit(1) from error


app = typer.Typer(
    name="sloth-fx",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sloth-fx {sloth_fx.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: sloth-fx inspect stable-diffusion-v1-5")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Rewrite the attention of diffusion denoisers, so that queries look at fewer keys."""


app.command(epilog=inspect.EXAMPLE)(inspect.inspect)
app.command(epilog=plan.EXAMPLE)(plan.plan)
app.add_typer(spec.app, name="spec")
app.command(epilog=generate.EXAMPLE)(generate.generate)
app.command(epilog=compare.EXAMPLE)(compare.compare)
app.add_typer(comfyui.app, name="comfyui")
