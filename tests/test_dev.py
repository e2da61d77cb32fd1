"""dev.py: what it makes, where, when it makes it again, what it says when something fails. Nothing is downloaded."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = Path(sys.executable)


@pytest.fixture
def dev():
    spec = importlib.util.spec_from_file_location("fewbits_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(dev, monkeypatch):
    """Every command dev.py would run, instead of running it; a venv and a download leave what the real ones leave."""
    seen = []

    def record(command, part):
        seen.append(command)
        if "venv" in command:
            python = dev.venv_python(Path(command[-1]))
            python.parent.mkdir(parents=True)
            python.touch()
            (
                Path(command[-1])
                / ("Lib" if os.name == "nt" else "lib/python3.11")
                / "site-packages"
            ).mkdir(parents=True)

    monkeypatch.setattr(dev, "run", record)
    return seen


def layer(dev, cache, lines=("a", "b"), constraints=("torch==1",), below=()):
    return dev.make_layer(cache, "make it", BASE, list(below), lines, constraints)


def test_only_the_standard_library_is_imported_and_no_shell_is_asked():
    tree = ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"))
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "shell"
    ]


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_the_cache_is_the_platforms_own_unless_a_variable_names_one(
    dev, monkeypatch, tmp_path, system
):
    monkeypatch.setattr(dev.platform, "system", lambda: system)
    monkeypatch.setattr(dev.Path, "home", lambda: tmp_path)
    for name in ("FEWBITS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    wanted = {
        "Linux": ".cache/fewbits",
        "Darwin": "Library/Caches/fewbits",
        "Windows": "AppData/Local/fewbits/cache",
    }
    assert dev.cache_folder() == (tmp_path / wanted[system]).resolve()
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "mine"))
    assert dev.cache_folder() == (tmp_path / "mine").resolve()


def test_an_environment_is_made_once_and_again_when_its_pins_change(dev, commands, tmp_path):
    first = layer(dev, tmp_path)
    made = len(commands)
    assert made and layer(dev, tmp_path) == first and len(commands) == made
    others = {
        layer(dev, tmp_path, lines=("a", "c")),
        layer(dev, tmp_path, constraints=("torch==2",)),
        layer(dev, tmp_path, below=[tmp_path]),
    }
    assert len({first, *others}) == 4


def test_an_environment_whose_interpreter_is_gone_is_made_again(dev, commands, tmp_path):
    first = layer(dev, tmp_path)
    first.unlink()
    assert layer(dev, tmp_path) == first and first.exists()


def test_an_upper_environment_sees_the_packages_of_the_lower_one(dev, commands, tmp_path):
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "from_below.py").write_text("HERE = True\n")
    python = layer(dev, tmp_path / "cache", below=[tmp_path / "lower"])
    code = f"import site; site.addsitedir({str(dev.site_packages(python))!r}); import from_below"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "end", [KeyboardInterrupt, OSError("disk full")], ids=["interrupt", "error"]
)
def test_a_build_that_ends_early_leaves_nothing(dev, tmp_path, end):
    with (
        pytest.raises(type(end) if isinstance(end, OSError) else end),
        dev.build(tmp_path / "venv-1", "x") as part,
    ):
        (part / "result").mkdir()
        raise end
    assert list(tmp_path.iterdir()) == []


def test_of_two_builds_at_once_the_first_to_end_stays(dev, tmp_path):
    with dev.build(tmp_path / "target", "one") as one, dev.build(tmp_path / "target", "two") as two:
        for part, text in ((one, "one"), (two, "two")):
            (part / "result").mkdir()
            (part / "result" / "file").write_text(text)
    assert (tmp_path / "target" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_killed_builds_left_is_removed_after_a_while(dev, tmp_path):
    for name, age in ((".building-old", 2 * dev.STALE_SECONDS), (".building-new", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with dev.build(tmp_path / "target", "x") as part:
        (part / "result").mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {".building-new", "target"}


def test_a_failing_step_says_so_in_one_line_and_keeps_the_whole_output(dev, tmp_path):
    code = "import sys; print('much'); print('ERROR: no such package'); print('more'); sys.exit(3)"
    with (
        pytest.raises(dev.Failed) as failure,
        dev.build(tmp_path / "target", "install things") as part,
    ):
        dev.run([sys.executable, "-c", code], part)
    line = str(failure.value)
    assert line.startswith("install things: ERROR: no such package") and "\n" not in line
    assert (tmp_path / "failed.log").read_text().split() == [
        "much",
        "ERROR:",
        "no",
        "such",
        "package",
        "more",
    ]
    assert str(tmp_path / "failed.log") in line


def test_pip_keeps_its_temporary_files_in_the_build_and_caches_nothing(dev, tmp_path):
    code = "import os, tempfile; print(tempfile.gettempdir(), os.environ['PIP_NO_CACHE_DIR'])"
    dev.run([sys.executable, "-c", code], tmp_path)
    assert (tmp_path / "log.txt").read_text().split() == [str(tmp_path / "tmp"), "1"]


def test_the_slim_environment_leaves_out_what_only_the_page_needs(dev, monkeypatch, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "requirements.txt").write_text("torch\n\n# why\ncomfyui-workflow-templates==0.1\n")
    (tmp_path / "site").mkdir()
    layers = []
    monkeypatch.setattr(dev, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(dev, "fetch_tree", lambda cache, package, digest: tree)
    monkeypatch.setattr(dev, "site_packages", lambda python: tmp_path / "site")
    monkeypatch.setattr(dev, "make_layer", lambda *arguments: layers.append(arguments[4]) or BASE)
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    dev.Environment(page=False)
    dev.Environment(page=True)
    comfyui, tools, same_comfyui, page = layers
    assert comfyui == same_comfyui == ["torch", *dev.OLDER_TREES]
    assert [*tools, *dev.PAGE_TOOLS, "comfyui-workflow-templates==0.1"] == page


def status(*arguments, **variables):
    command = [sys.executable, str(ROOT / "dev.py"), *arguments]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )


def test_a_folder_without_comfyui_is_refused_in_one_line(tmp_path):
    result = status("demo", COMFYUI_DIR=str(tmp_path), FEWBITS_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 2
    assert (
        result.stderr
        == f"dev.py: COMFYUI_DIR={tmp_path}: no main.py in there; name a ComfyUI folder\n"
    )


@pytest.mark.parametrize("python", ["no-such-python", "empty"])
def test_an_interpreter_that_cannot_run_comfyui_is_refused_in_one_line(tmp_path, python):
    (tmp_path / "main.py").touch()
    if python == "empty":
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True
        )
        python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    variables = {
        "COMFYUI_DIR": str(tmp_path),
        "COMFYUI_PYTHON": str(python),
        "FEWBITS_CACHE": str(tmp_path / "cache"),
    }
    result = status("demo", **variables, PYTHONPATH="")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "COMFYUI_PYTHON" in result.stderr


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["test"], ["-m", "pytest", "-m", "not browser"]),
        (["test", "--browser"], ["-m", "pytest"]),
        (
            ["test", "-k", "name", "tests/cli"],
            ["-m", "pytest", "-m", "not browser", "-k", "name", "tests/cli"],
        ),
    ],
    ids=["all", "browser", "pytest arguments"],
)
def test_pytest_gets_its_arguments_and_page_tests_only_when_asked(
    dev, monkeypatch, arguments, wanted
):
    seen = []
    fake = type("Fake", (), {"__init__": lambda self, page: None, "fetch_older_trees": lambda self: None,
                           "python": lambda self, *a: seen.append(list(a)) or 5})  # fmt: skip
    monkeypatch.setattr(dev, "Environment", fake)
    assert dev.main(arguments) == 5
    assert seen == [wanted]


@pytest.fixture
def environment(dev):
    env = object.__new__(dev.Environment)
    env.interpreter, env.variables = Path(sys.executable), dict(os.environ)
    previous = signal.getsignal(signal.SIGTERM)
    yield env
    signal.signal(signal.SIGTERM, previous)


def test_the_childs_exit_status_is_passed_on(environment):
    assert environment.python("-c", "raise SystemExit(7)") == 7


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ending_dev_py_interrupts_the_child_which_may_tidy_up(environment, tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "try:\n    os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'tidy')!r}, 'w').close(); sys.exit(9)"
    )
    assert environment.python("-c", code) == 9
    assert (tmp_path / "tidy").exists()
