"""Which tests run, in which order, and what all of them find: `fewbits` as this process does, and ComfyUI's tree.

(none)            all but those of the page; the fuzzers with a fixed seed, a short slice of the faults
--fast            none that starts a ComfyUI, none marked slow, fuzz or faults
--browser         also those of the page
--fuzz SECONDS    only those marked fuzz, each for so long, with a new seed
--faults          only those marked faults, all of their cases
--matrix          every class of ComfyUI in every format, where otherwise most run in one
"""

from __future__ import annotations

import gc
import os
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOT_FAST = {"server", "slow", "fuzz", "faults"}
SERVERS = (HERE / "e2e", HERE / "browser")  # only tests in these folders start a ComfyUI
# Files whose tests draw the same pictures: they go to one worker, which draws each once. Others go file by file.
TOGETHER = ("test_stock_loaders.py", "test_on_top.py", "test_versions.py")
# Their tests go class by class, or kind by kind.
BY_CLASS = ("nodes/test_every_class.py", "nodes/test_every_encoder_runs.py")
_paths = [str(HERE / "import_shim"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
# Whatever a test writes, here or in a server or command that it starts, is read by the reference decoder too.
os.environ["FEWBITS_VERIFY"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(_paths).split(os.pathsep)))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fewbits")
    group.addoption("--fast", action="store_true", help="no test that starts a ComfyUI or is slow")
    group.addoption("--browser", action="store_true", help="also the tests of the page")
    group.addoption("--fuzz", type=float, metavar="SECONDS", help="only the fuzzers, each so long")
    group.addoption("--counts", metavar="FILE", help="JSON that adds up what the fuzzers tried")
    group.addoption("--seed", metavar="CASE:SEED", help="one input of the fuzzers again")
    group.addoption("--faults", action="store_true", help="only the faults, all of them")
    group.addoption("--matrix", action="store_true", help="every model class in every format")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in SERVERS):
            item.add_marker("server")
    runs = {item: chosen(config, names_of_marks(item)) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not runs[item]])
    items[:] = [item for item in items if runs[item]]
    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Ten thousand tests stay: no collection of garbage needs to look at them."""
    gc.freeze()


def names_of_marks(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


def rank(item: pytest.Item) -> int:
    """The longest first: the workers of a parallel run then end together."""
    if item.path.name in TOGETHER:
        return 0
    return 1 if item.get_closest_marker("server") else 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if file.endswith(BY_CLASS):
                return file + test.partition("[")[2].partition("-")[0]
            return "together" if file.endswith(TOGETHER) else file

    return ByFile(config, log)


def chosen(config: pytest.Config, marks: set[str]) -> bool:
    """Whether a test with these markers runs under the options given."""
    options = config.option
    kinds = {name for name in ("fuzz", "faults") if getattr(options, name)}
    if kinds and not marks & kinds:
        return False
    if options.fast and marks & NOT_FAST:
        return False
    if "browser" in marks and not options.browser:
        return False
    return "gpu" not in marks or has_gpu()


@cache
def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI folder to test against."""
    tree = os.environ.get("FEWBITS_COMFYUI")
    if not tree:
        pytest.fail(
            "no ComfyUI to test against: run `python3 dev.py test`, or set FEWBITS_COMFYUI to a ComfyUI folder"
        )
    return Path(tree)


@pytest.fixture(scope="session")
def fuzz_seconds(request: pytest.FixtureRequest) -> float | None:
    """How long a fuzzer runs, from a new seed; None: a fixed seed and a few hundred cases."""
    return request.config.option.fuzz


@pytest.fixture(scope="session")
def all_faults(request: pytest.FixtureRequest) -> bool:
    """Whether a test of faults runs all of its cases instead of a short slice."""
    return request.config.option.faults
