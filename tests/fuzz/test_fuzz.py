"""Hostile inputs end well or in an error of ours, in time and memory: a fixed slice of them, or with `--fuzz SECONDS`
new ones for so long each.

A failure names case and seed: `python3 dev.py test tests/fuzz --seed CASE:SEED` runs that one again.
"""

import random
import time
from pathlib import Path

import pytest
import torch
from fuzz import cases, watch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.quant_ops.checkpoint.header import parse_header
from fewbits.quant_ops.checkpoint.metadata import header_markers, read_marker
from fewbits.quant_ops.errors import QuantError
from support import hostile

pytestmark = pytest.mark.fuzz
SLICE = {case: 12 * share for case, share in cases.CASES.items()}


@pytest.fixture(autouse=True, scope="module")
def warmed_up():
    """What every case needs is in memory before anything is measured; one thread, as workers have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hostile.layers()
    for case in cases.CASES:
        for seed in range(3):
            case(random.Random(seed))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
def test_hostile_inputs_are_read_or_refused_in_time_and_memory(case, request, capsys):
    """The slice is the same every time; new inputs are counted on the terminal, and in --counts."""
    seconds, counts = (request.config.getoption(name) for name in ("--fuzz", "--counts"))
    if seconds:
        dice = random.Random(time.time_ns())
        with capsys.disabled(), watch.not_stuck(seconds):
            hunted = watch.hunt(case, iter(lambda: dice.getrandbits(48), None), seconds)
            print(f"\n{case.__name__}: {hunted}")
        if counts:
            watch.add_up(Path(counts), case.__name__, hunted)
    else:
        hunted = watch.hunt(case, range(SLICE[case]))
    assert hunted.inputs and not hunted.found, "\n".join(hunted.found[:20])


def test_a_named_input_is_handled(request):
    named = request.config.getoption("--seed")
    if not named:
        pytest.skip("one input only with --seed CASE:SEED")
    name, _, seed = named.partition(":")
    watch.run(getattr(cases, name), int(seed))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 5) | st.integers(), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 90) | st.integers(), max_size=3) | JSON,
    },
)


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4), st.integers(0, 90))
def test_any_json_as_a_header_is_read_or_refused(entries, size):
    import json
    from pathlib import Path

    try:
        header = parse_header(json.dumps(entries).encode(), Path("x"), 0, size)
    except QuantError as error:
        assert str(error).isprintable()
        return
    assert sum(spec.nbytes for spec in header.tensors.values()) == size


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(JSON | st.binary())
def test_any_json_as_a_marker_is_read_or_refused(value):
    import json

    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    try:
        assert isinstance(read_marker(data), dict)
    except ValueError as error:
        assert str(error)
    try:
        header_markers({"_quantization_metadata": data.decode("utf-8", "replace")})
    except QuantError as error:
        assert str(error)
