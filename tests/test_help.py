"""--help: groups, a line for each flag, and examples that work."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest
from pages import REPOSITORY

import evaluate
import export
import protocol
import search
import train
import transfer
from dataset import __main__ as data

SCRIPTS = {
    "train.py": train,
    "transfer.py": transfer,
    "evaluate.py": evaluate,
    "search.py": search,
    "protocol.py": protocol,
    "export.py": export,
    "-m dataset": data,
}


@pytest.mark.parametrize(
    "name, command",
    [
        ("train.py", []),
        ("transfer.py", []),
        ("evaluate.py", []),
        ("search.py", ["index"]),
        ("search.py", ["query"]),
        ("search.py", ["group"]),
        ("search.py", ["serve"]),
        ("search.py", ["export"]),
        ("protocol.py", []),
        ("export.py", []),
        ("-m dataset", ["check"]),
        ("-m dataset", ["prepare"]),
    ],
)
@pytest.mark.parametrize("columns", ["60", "120"])
def test_help(name, command, columns, capsys, monkeypatch):
    """Every flag says something, defaults that say nothing are left out, and no line of it is wider than the screen."""
    monkeypatch.setenv("COLUMNS", columns)
    flags = []
    add = argparse._ActionsContainer.add_argument
    monkeypatch.setattr(
        argparse._ActionsContainer, "add_argument", lambda *args, **more: flags.append(add(*args, **more)) or flags[-1]
    )
    with pytest.raises(SystemExit) as end:
        SCRIPTS[name].parse([*command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(flag.help or flag.choices for flag in flags)
    assert not re.search(r"\(default: (None|False)?\)", text) and not re.search(r"/data\b|/logs\b", text)
    before = text.split("examples:")[0].splitlines()
    assert max(len(line) for line in before[2:]) <= max(int(columns), 80)  # the lists of choices are not broken


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("no_checkpoint_needed")
def test_examples_parse(name):
    lines = [line.strip() for line in SCRIPTS[name].EXAMPLES.splitlines()]
    examples = [line.removeprefix(f"python {name}") for line in lines if line.startswith(f"python {name} ")]
    assert len(examples) >= 2
    for example in examples:
        SCRIPTS[name].parse(shlex.split(example))


SLOW = {"torch", "torchvision", "numpy", "scipy", "matplotlib", "wandb", "timm", "faiss", "onnxruntime", "tqdm"}


COMMANDS = [*((name, "") for name in SCRIPTS), ("search.py", "index"), ("search.py", "query"), ("-m dataset", "check")]


@pytest.mark.parametrize("name, command", COMMANDS)
@pytest.mark.parametrize("argument, status", [("--help", 0), ("--unknown", 2)])
def test_help_and_usage_errors_import_no_large_library(name, command, argument, status):
    """They answer at once: each of these libraries takes from a tenth of a second to two seconds."""
    program = """
import runpy, sys
try:
    {run}
except SystemExit as end:
    print(sorted(set(sys.modules) & {slow}), end.code, file=sys.stderr)
"""
    module = name.removeprefix("-m ") if name.startswith("-m ") else None
    run = (
        f"runpy.run_module({module!r}, run_name='__main__')"
        if module
        else f"runpy.run_path({name!r}, run_name='__main__')"
    )
    arguments = [argument, *[command] * bool(command)][::-1]
    argv = [sys.executable, "-c", program.format(run=run, slow=SLOW), *arguments]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"[] {status}", done.stderr
