"""``sloth-fx spec``: look at spec files, check them, convert them, and list what there is."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sloth_fx.checks import unknown
from sloth_fx.cli.console import add_row, out, say, say_json, table
from sloth_fx.cli.spec_files import as_data, read_specs
from sloth_fx.errors import SlothError
from sloth_fx.schedule import SCHEDULES
from sloth_fx.serialize import SPECS
from sloth_fx.spec import Reduction, Spec

app = typer.Typer(no_args_is_help=True, help="Look at spec files, check and convert them, and list what there is.")
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A spec (JSON), a PNG that sloth-fx wrote, or a ComfyUI workflow.")
]

_WHERE = "a selector of sites (docs/specs.md), or None for all"


@app.command(epilog="Example: sloth-fx spec show spec.json")
def show(file: File) -> None:
    """Print the specs in a file, with every field."""
    for number, spec in enumerate(read_specs(file)):
        say(("\n" if number else "") + type(spec).__name__)
        rows = table("field", "value", "")
        for name, value, changed in _values(spec):
            add_row(rows, f"  {name}", value, "" if changed else "(default)")
        rows.show_header = False
        out().print(rows)


@app.command(epilog="Example: sloth-fx spec validate spec.json")
def validate(file: File) -> None:
    """Check a file: exit with 0 if it holds specs, and with 1 and the reason if it does not."""
    specs = read_specs(file)
    say(f"{file}: {', '.join(type(spec).__name__ for spec in specs)}")


@app.command(epilog="Example: sloth-fx spec convert workflow.json -o spec.json")
def convert(
    file: File,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write it; default: stdout.")] = None,
) -> None:
    """Write the specs in a file as spec JSON, with every field."""
    data = as_data(read_specs(file))
    if output is None:
        say_json(data)
        return
    try:
        output.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SlothError(f"cannot write {output}: {error.strerror}") from None


@app.command("list", epilog="Example: sloth-fx spec list SlothfulAttention")
def list_(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="Only this spec, such as HyperTile.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the specs there are, with the default of each field and what it takes."""
    kinds: dict[str, type[Any]] = {**SPECS, "Reduction": Reduction, **SCHEDULES}
    if kind is not None:
        kinds = {_known(kind, kinds): kinds[_known(kind, kinds)]}
    if as_json:
        say_json({name: {each.name: _described(each) for each in fields(cls)} for name, cls in kinds.items()})
        return
    for number, (name, cls) in enumerate(kinds.items()):
        say(("\n" if number else "") + f"{name}: {_summary(cls)}")
        rows = table("  field", "default", "takes")
        for each in fields(cls):
            described = _described(each)
            add_row(rows, f"  {each.name}", described["default"], described["takes"])
        if fields(cls):
            out().print(rows)


def _known(name: str, kinds: dict[str, type[Any]]) -> str:
    if name not in kinds:
        raise SlothError(f"spec {unknown(name, kinds)}")
    return name


def _summary(cls: type[Any]) -> str:
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".")


def _described(each: Field[Any]) -> dict[str, str]:
    accepts = each.metadata.get("accepts")
    default = "(none)" if each.default is MISSING else _shown(each.default)
    return {"default": default, "takes": accepts.words if accepts is not None else _WHERE}


def _values(spec: Spec) -> list[tuple[str, str, bool]]:
    """(field, value, whether that is not the default) of a spec, those of its parts with a dot."""
    found = []
    for each in fields(spec):
        value, usual = getattr(spec, each.name), each.default
        if isinstance(value, Reduction):
            for part in fields(value):
                inner = getattr(value, part.name)
                found.append((f"{each.name}.{part.name}", _shown(inner), inner != getattr(usual, part.name)))
        else:
            found.append((each.name, _shown(value), value != usual))
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
