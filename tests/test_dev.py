"""dev.py and the environment that it makes: where, when again, what it says when something fails. Nothing is downloaded."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import environment

ROOT = Path(__file__).resolve().parents[1]
BASE = Path(sys.executable)


@pytest.fixture
def dev(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("fewbits_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(monkeypatch):
    """Every command dev.py would run, instead of running it; a venv and a download leave what the real ones leave."""
    seen = []

    def record(command, part):
        seen.append(command)
        if "venv" in command:
            python = environment.venv_python(Path(command[-1]))
            python.parent.mkdir(parents=True)
            python.touch()
            (
                Path(command[-1])
                / ("Lib" if os.name == "nt" else "lib/python3.11")
                / "site-packages"
            ).mkdir(parents=True)

    monkeypatch.setattr(environment, "run", record)
    return seen


def layer(cache, lines=("a", "b"), constraints=("torch==1",), below=()):
    return environment.make_layer(cache, "make it", BASE, list(below), lines, constraints)


@pytest.mark.parametrize(
    "path", [ROOT / "dev.py", Path(environment.__file__)], ids=lambda p: p.name
)
def test_only_the_standard_library_is_imported_and_no_shell_is_asked(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imports = [node for node in nodes if isinstance(node, ast.Import)]
    names = {alias.name for node in imports for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names.discard("support.environment")
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
    assert not [node for node in nodes if isinstance(node, ast.keyword) and node.arg == "shell"]


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_the_cache_is_the_platforms_own_unless_a_variable_names_one(monkeypatch, tmp_path, system):
    monkeypatch.setattr(environment.platform, "system", lambda: system)
    monkeypatch.setattr(environment.Path, "home", lambda: tmp_path)
    for name in ("FEWBITS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    wanted = {
        "Linux": ".cache/fewbits",
        "Darwin": "Library/Caches/fewbits",
        "Windows": "AppData/Local/fewbits/cache",
    }
    assert environment.cache_folder() == (tmp_path / wanted[system]).resolve()
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "mine"))
    assert environment.cache_folder() == (tmp_path / "mine").resolve()


def test_an_environment_is_made_once_and_again_when_its_pins_change(commands, tmp_path):
    first = layer(tmp_path)
    made = len(commands)
    assert made and layer(tmp_path) == first and len(commands) == made
    others = {
        layer(tmp_path, lines=("a", "c")),
        layer(tmp_path, constraints=("torch==2",)),
        layer(tmp_path, below=[tmp_path]),
    }
    assert len({first, *others}) == 4


def test_an_environment_whose_interpreter_is_gone_is_made_again(commands, tmp_path):
    first = layer(tmp_path)
    first.unlink()
    assert layer(tmp_path) == first and first.exists()


def test_an_upper_environment_sees_the_packages_of_the_lower_one(commands, tmp_path):
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "from_below.py").write_text("HERE = True\n")
    python = layer(tmp_path / "cache", below=[tmp_path / "lower"])
    code = f"import site; site.addsitedir({str(environment.site_packages(python))!r}); import from_below"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "end", [KeyboardInterrupt, OSError("disk full")], ids=["interrupt", "error"]
)
def test_a_build_that_ends_early_leaves_nothing(tmp_path, end):
    with (
        pytest.raises(type(end) if isinstance(end, OSError) else end),
        environment.build(tmp_path / "venv-1", "x") as part,
    ):
        (part / "result").mkdir()
        raise end
    assert list(tmp_path.iterdir()) == []


def test_of_two_builds_at_once_the_first_to_end_stays(tmp_path):
    with (
        environment.build(tmp_path / "target", "one") as one,
        environment.build(tmp_path / "target", "two") as two,
    ):
        for part, text in ((one, "one"), (two, "two")):
            (part / "result").mkdir()
            (part / "result" / "file").write_text(text)
    assert (tmp_path / "target" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_killed_builds_left_is_removed_after_a_while(tmp_path):
    for name, age in ((".building-old", 2 * environment.STALE_SECONDS), (".building-new", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with environment.build(tmp_path / "target", "x") as part:
        (part / "result").mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {".building-new", "target"}


def test_a_failing_step_says_so_in_one_line_and_keeps_the_whole_output(tmp_path):
    code = "import sys; print('much'); print('ERROR: no such package'); print('more'); sys.exit(3)"
    with (
        pytest.raises(environment.Failed) as failure,
        environment.build(tmp_path / "target", "install things") as part,
    ):
        environment.run([sys.executable, "-c", code], part)
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


def test_pip_keeps_its_temporary_files_in_the_build_and_caches_nothing(tmp_path):
    code = "import os, tempfile; print(tempfile.gettempdir(), os.environ['PIP_NO_CACHE_DIR'])"
    environment.run([sys.executable, "-c", code], tmp_path)
    assert (tmp_path / "log.txt").read_text().split() == [str(tmp_path / "tmp"), "1"]


def test_the_slim_environment_leaves_out_what_only_the_page_needs(monkeypatch, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "requirements.txt").write_text("torch\n\n# why\ncomfyui-workflow-templates==0.1\n")
    (tmp_path / "site").mkdir()
    layers = []
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(environment, "fetch_tree", lambda cache, package, digest: tree)
    monkeypatch.setattr(environment, "site_packages", lambda python: tmp_path / "site")
    monkeypatch.setattr(
        environment, "make_layer", lambda *arguments: layers.append(arguments[4]) or BASE
    )
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    environment.Environment(page=False)
    environment.Environment(page=True)
    comfyui, tools, same_comfyui, page = layers
    assert comfyui == same_comfyui == ["torch", *environment.OLDER_TREES]
    assert [*tools, "comfyui-workflow-templates==0.1"] == page


def test_the_page_of_a_version_is_fetched_once_and_named_to_the_tests(monkeypatch, tmp_path):
    fetched = []

    def fetch(command, part):
        fetched.append(command[-1])
        (part / "result" / "comfyui_frontend_package" / "static").mkdir(parents=True)

    monkeypatch.setattr(environment, "run", fetch)
    env = object.__new__(environment.Environment)
    env.cache, env.variables = tmp_path, {}
    env.use_frontend("1.58.1")
    env.use_frontend("1.58.1")
    assert fetched == ["comfyui-frontend-package==1.58.1"]
    assert Path(env.variables["FEWBITS_FRONTEND"]).is_dir()


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
    ("stated", "constraint"),
    [("2.11.0+cu130", "torch==2.11.0"), ("2.9.1", "torch==2.9.1")],
    ids=["with a local part", "plain"],
)
def test_a_comfyui_of_ones_own_keeps_its_torch(monkeypatch, tmp_path, stated, constraint):
    answer = subprocess.CompletedProcess([], 0, f"{stated}\n{tmp_path}\n", "")
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setenv("COMFYUI_PYTHON", str(BASE))
    assert environment.own_interpreter(tmp_path) == (BASE, [tmp_path], [constraint])


PARALLEL = ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]


@pytest.fixture
def pytest_calls(dev, monkeypatch):
    """Arguments of every `python` call of dev.py's commands, which end with status 5."""

    class Fake:
        calls = []

        def __init__(self, page):
            self.variables = {}

        def fetch_older_trees(self):
            pass

        def use_frontend(self, version):
            self.calls.append(version)

        def python(self, *arguments):
            self.calls.append(list(arguments))
            return 5

    monkeypatch.setattr(dev, "Environment", Fake)
    monkeypatch.setattr(dev, "worker_count", lambda: 3)
    return Fake.calls


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], PARALLEL),
        (["--browser"], ["--browser", *PARALLEL]),
        (["--fast", "-x"], ["--fast", *PARALLEL, "-x"]),
        (["--matrix"], ["--matrix", *PARALLEL]),
        (["--fuzz", "60", "--faults"], ["--faults", "--fuzz=60", *PARALLEL]),
        (["-k", "name", "tests/cli"], ["-k", "name", "tests/cli"]),
        (["tests/test_dev.py::test_x"], ["tests/test_dev.py::test_x"]),
        (["-n", "2"], ["-n", "2"]),
        (["--numprocesses=2"], ["--numprocesses=2"]),
    ],
    ids=" ".join,
)
def test_pytest_gets_its_arguments_and_workers_unless_tests_are_chosen(
    dev, pytest_calls, arguments, wanted
):
    assert dev.main(["test", *arguments]) == 5
    assert pytest_calls == [["-m", "pytest", *wanted]]


def test_a_version_of_the_page_is_made_ready_before_its_tests(dev, pytest_calls):
    assert dev.main(["test", "--browser", "--frontend", "1.58.1", "tests/browser"]) == 5
    assert pytest_calls == ["1.58.1", ["-m", "pytest", "--browser", "tests/browser"]]


def test_a_benchmark_runs_by_its_name_and_without_one_they_are_listed(dev, pytest_calls, capsys):
    assert dev.main(["bench", "soak", "--jobs", "3"]) == 5
    assert pytest_calls == [["tests/benchmarks/soak.py", "--jobs", "3"]]
    assert dev.main(["bench"]) == 0
    listed = capsys.readouterr().out
    assert {line.split()[0] for line in listed.splitlines()} == {
        path.stem for path in (ROOT / "tests/benchmarks").glob("*.py")
    }
    assert dev.main(["bench", "--jobs", "3"]) == 2 and "bench --jobs" in capsys.readouterr().err
    assert len(pytest_calls) == 1


@pytest.mark.parametrize(
    ("cores", "memory", "workers"), [(2, 24, 2), (16, 256, 4), (8, 12, 2), (1, 64, 1), (8, 2, 1)]
)
def test_there_are_as_many_workers_as_cores_and_memory_allow(
    dev, monkeypatch, cores, memory, workers
):
    monkeypatch.setattr(dev, "core_count", lambda: cores)
    monkeypatch.setattr(dev, "memory_gb", lambda: memory)
    assert dev.worker_count() == workers


@pytest.fixture
def running():
    """An environment of this interpreter; SIGTERM and SIGINT are as before afterwards."""
    env = object.__new__(environment.Environment)
    env.interpreter, env.variables = Path(sys.executable), dict(os.environ)
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    yield env
    for name, handler in before.items():
        signal.signal(name, handler)


def test_the_childs_exit_status_is_passed_on(running):
    assert running.python("-c", "raise SystemExit(7)") == 7


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    "inherited",
    [signal.default_int_handler, signal.SIG_IGN],
    ids=["in a terminal", "in the background of a script"],
)
def test_ending_dev_py_interrupts_the_child_which_may_tidy_up(running, tmp_path, inherited):
    signal.signal(signal.SIGINT, inherited)
    code = (
        "import os, signal, sys, time\n"
        "try:\n    os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'tidy')!r}, 'w').close(); sys.exit(9)"
    )
    assert running.python("-c", code) == 9
    assert (tmp_path / "tidy").exists()
