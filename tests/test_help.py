"""--help: groups, a line for each flag, and examples that work."""

import argparse
import re
import shlex

import pytest

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
