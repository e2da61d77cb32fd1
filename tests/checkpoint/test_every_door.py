"""Files of every kind through every door: no contradiction, no wrong result, nothing left behind.

With --matrix all files are tried (1,283 through 15 doors that write in 150 s), else every sixth.
"""

import logging

import pytest
from safetensors.torch import save_file

from support import strange
from support.every_door import complaints, doors

FILES = strange.files()
SOME = 6  # every so many without --matrix
AT_ONCE = 12  # files of one test


def pytest_generate_tests(metafunc):
    if "names" in metafunc.fixturenames:
        chosen = list(FILES)[:: 1 if metafunc.config.getoption("matrix") else SOME]
        groups = [chosen[start : start + AT_ONCE] for start in range(0, len(chosen), AT_ONCE)]
        metafunc.parametrize("names", groups, ids=[names[0] for names in groups])


@pytest.mark.slow
def test_every_door_says_the_same_and_writes_what_is_right(names, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    found = {}
    for index, name in enumerate(names):
        file = FILES[name]
        folder = tmp_path / str(index)
        folder.mkdir()
        path = folder / "in.safetensors"
        tensors = {key: tensor.contiguous().clone() for key, tensor in file.tensors.items()}
        save_file(tensors, path, file.metadata or None)
        found[name] = complaints(file, path)
    assert not {name: texts for name, texts in found.items() if texts}


def test_there_are_files_of_every_kind_and_doors_that_write():
    some = list(FILES)[::SOME]
    assert {name.partition(":")[0] for name in some} == set(strange.KINDS)
    assert len(FILES) > 1200 and len(some) > 150
    assert len(doors(None, None)) == 15


@pytest.mark.parametrize("kind", strange.KINDS)
def test_files_of_a_kind_have_names_of_their_own(kind):
    names = [name for name, _ in strange.KINDS[kind]()]
    assert len(names) == len(set(names))
