"""What all commands share."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import sloth_fx
from sloth_fx.cli.app import app

COMMANDS = {
    "inspect": ("inspect",),
    "plan": ("plan",),
    "generate": ("generate",),
    "compare": ("compare",),
    "spec show": ("spec", "show"),
    "spec validate": ("spec", "validate"),
    "spec convert": ("spec", "convert"),
    "spec list": ("spec", "list"),
    "comfyui install": ("comfyui", "install"),
    "comfyui uninstall": ("comfyui", "uninstall"),
}


def help_of(run, *command):
    """The help on one line, without frames."""
    done = run(*command, "--help")
    assert done.code == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", done.out).split())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_examples_parse(run, command):
    example = shlex.split(help_of(run, *command).partition("Example: sloth-fx ")[2])
    assert tuple(example[: len(command)]) == command
    found = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    context = found.make_context(command[-1], example[len(command) :])
    assert all(value is not None for name, value in context.params.items() if name in ("model", "pipeline", "file"))


def test_all_commands_are_tested():
    main = typer.main.get_command(app)
    names = {name: getattr(each, "commands", None) for name, each in main.commands.items()}
    assert set(COMMANDS) == {
        f"{name} {part}" if parts else name for name, parts in names.items() for part in parts or [""]
    }


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_tells_of_each_option(run, command):
    text = help_of(run, *command)
    found = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    for parameter in found.params:
        assert parameter.param_type_name == "argument" or parameter.opts[0] in text
        assert parameter.name == "help" or parameter.help, parameter.name


def test_version(run):
    done = run("--version")
    assert (done.code, done.out) == (0, f"sloth-fx {sloth_fx.__version__}\n")


def test_error_is_one_plain_line(run, tmp_path):
    done = run("inspect", tmp_path / "no\nwhere")
    assert done.code == 1
    assert done.out == ""
    assert re.fullmatch(r"error: .*no where does not exist.*\n", done.err)
    assert "\x1b" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["inspect"],
        ["plan", "x"],
        ["plan", "x", "--spec", "y", "--steps", "0"],
        ["spec", "show", "--blue"],
    ],
    ids=" ".join,
)
def test_usage_errors(run, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Usage" in done.err


def python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_the_library_imports_none_of_this():
    modules = ["typer", "rich", "matplotlib", "diffusers", "transformers", "PIL"]
    assert python(f"import sys, sloth_fx; assert not set({modules}) & set(sys.modules)").returncode == 0


def test_missing_extra_is_one_line():
    hide = "import sloth_fx.cli as c; c.find_spec = lambda name: None if name == 'typer' else True"
    done = python(f"{hide}; c.main()")
    assert done.returncode == 1
    assert done.stderr == "sloth-fx needs typer: pip install 'sloth-fx[cli]'\n"


def test_main_runs():
    done = python("import sys; sys.argv = ['sloth-fx', '--version']; from sloth_fx.cli import main; main()")
    assert (done.returncode, done.stdout.split()[0]) == (0, "sloth-fx")


def test_commands_in_the_docs_parse():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    sloth-fx (.+)$", page, re.MULTILINE)
    assert len(lines) == 8
    for line in lines:
        command, words = typer.main.get_command(app), shlex.split(line)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(line, words)
