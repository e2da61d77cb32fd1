"""Reading single files, sharded indexes and folders by byte range."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.checkpoint import reader
from fewbits.quant_ops.checkpoint.reader import LOCKED, READERS, FileSource
from fewbits.quant_ops.errors import CheckpointError
from support.helpers import random_tensors, tiny_checkpoint

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip


def test_every_dtype_reads_the_same_bytes_as_the_safetensors_library(tmp_path):
    tensors = {f"t{i}": torch.arange(12).reshape(3, 4).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 5), torch.tensor(2.5)
    save_file(tensors, tmp_path / "all.safetensors")
    with FileSource(tmp_path / "all.safetensors") as source:
        for name, tensor in tensors.items():
            got = source.read(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert (
                got.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
                if tensor.dim()
                else got == tensor
            )


def shards(folder, tensors):
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for i, (file, keys) in enumerate(halves.items()):
        save_file(
            {key: tensors[key] for key in keys},
            folder / file,
            metadata={"format": "pt", "part": str(i)},
        )
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {key: file for file, keys in halves.items() for key in keys}})
    )
    return index


def test_an_index_and_its_folder_read_like_one_file(tmp_path):
    tensors = random_tensors({"a.weight": (32, 32), "b.weight": (16, 8), "c.bias": (3,)})
    index = shards(tmp_path, tensors)
    for path in (index, tmp_path):
        with FileSource(path) as source:
            assert set(source.header.tensors) == set(tensors)
            assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())
            assert source.header.metadata["part"] == "0"
            assert "metadata 'part' differs" in source.header.warnings[0]


def test_a_missing_shard_is_named(tmp_path):
    index = shards(tmp_path, random_tensors({"a.weight": (32, 32), "b.weight": (16, 8)}))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="shard 'model-00002-of-00002.safetensors' is missing"
    ):
        FileSource(index)


def test_a_shard_alone_is_refused_as_a_part(tmp_path):
    """It was planned as another family, and half a model was called a result."""
    shards(tmp_path, random_tensors({"a.weight": (32, 32), "b.weight": (16, 8)}))
    with pytest.raises(CheckpointError, match="part 2 of 2 of a model; name its folder, or its"):
        FileSource(tmp_path / "model-00002-of-00002.safetensors")


def test_a_folder_that_lacks_a_shard_is_refused(tmp_path):
    shards(tmp_path, random_tensors({"a.weight": (32, 32), "b.weight": (16, 8)})).unlink()
    with FileSource(tmp_path) as source:
        assert len(source.header.tensors) == 2
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="1 .safetensors files, and one of them says that it is one of 2"
    ):
        FileSource(tmp_path)


def test_one_of_one_is_a_whole_model(tmp_path):
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file(random_tensors({"a.weight": (32, 32)}), path)
    with FileSource(path) as source:
        assert list(source.header.tensors) == ["a.weight"]


def test_a_tensor_that_the_index_names_and_no_shard_holds_is_named(tmp_path):
    index = shards(tmp_path, random_tensors({"a.weight": (32, 32), "b.weight": (16, 8)}))
    table = json.loads(index.read_text())
    table["weight_map"]["lost.weight"] = next(iter(table["weight_map"].values()))
    index.write_text(json.dumps(table))
    with pytest.raises(
        CheckpointError, match=r"no shard holds tensor 'lost.weight'.*1 of 3 not found"
    ):
        FileSource(index)


def test_the_index_of_a_variant_may_say_so_last(tmp_path):
    tensors = random_tensors({"a.weight": (32, 32), "b.weight": (16, 8)})
    index = shards(tmp_path, tensors).rename(tmp_path / "model.safetensors.index.fp16.json")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    for path in (index, tmp_path):
        with FileSource(path) as source:
            assert set(source.header.tensors) == set(tensors)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="plain file names"):
        FileSource(index)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match="tensor 'a' is in one.safetensors and in two.safetensors"
    ):
        FileSource(tmp_path)


def test_a_file_cut_after_its_header_was_read_names_the_tensor(tmp_path):
    path = tiny_checkpoint(tmp_path / "m.safetensors")
    with FileSource(path) as source:
        last = max(source.header.ranges, key=lambda name: source.header.ranges[name][2])
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 10)
        with pytest.raises(CheckpointError, match=f"truncated while reading tensor '{last}'"):
            source.read(last)


def test_a_large_tensor_cut_short_says_how_many_bytes_its_readers_found(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"t": torch.zeros(LOCKED[0], dtype=torch.uint8)}, path)
    with FileSource(path, short_lived=True, for_gpu=True) as source:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - LOCKED[0] // 2)
        with pytest.raises(
            CheckpointError, match=f"reading tensor 't': {LOCKED[0] // 2} of {LOCKED[0]} bytes"
        ):
            source.read("t")


def test_a_slow_disk_is_read_by_one_thread(tmp_path, monkeypatch):
    path, calls = tmp_path / "m.safetensors", []
    tensors = {name: torch.arange(LOCKED[0]).byte() for name in "abc"}
    save_file(tensors, path)
    fill = FileSource._fill
    monkeypatch.setattr(FileSource, "_fill", lambda *args: calls.append(args[2]) or fill(*args))
    with FileSource(path, short_lived=True, for_gpu=True) as source:
        for name, speed, lanes in (
            ("a", float("inf"), READERS),
            ("b", 0.0, 1),
            ("c", 0.0, READERS),
        ):
            monkeypatch.setattr(reader, "FAST", speed)  # of the last tensor: decides about the next
            calls.clear()
            assert torch.equal(source.read(name), tensors[name])
            assert sorted(calls) == list(range(lanes))


def test_no_such_file_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        FileSource(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="no .safetensors files"):
        FileSource(tmp_path)


def test_reading_leaves_the_file_as_it_was(tmp_path):
    path = tiny_checkpoint(tmp_path / "m.safetensors")
    before = path.read_bytes()
    with FileSource(path) as source:
        source.read("img_in.weight").zero_()
    assert path.read_bytes() == before
    assert load_file(path)["img_in.weight"].abs().sum() > 0


def test_memory_of_short_lived_tensors_is_used_again_only_when_they_are_gone(tmp_path):
    tensors = {f"t{i}": torch.full((1 << 19,), float(i)) for i in range(6)}  # 2 MB each
    save_file(tensors, tmp_path / "model.safetensors")
    with FileSource(tmp_path / "model.safetensors", short_lived=True) as source:
        first, second = source.read("t0"), source.read("t1")
        part = second[5:]
        places = {first.data_ptr(), second.data_ptr()}
        del first, second  # `part` still needs the second one
        third = source.read("t2")
        fourth = source.read("t3")
        assert third.data_ptr() in places and fourth.data_ptr() not in places
        assert float(part.min()) == float(part.max()) == 1.0
        assert float(third.min()) == float(third.max()) == 2.0
        assert float(fourth.min()) == float(fourth.max()) == 3.0
    assert float(part.sum()) == part.numel()  # also after the source is closed


def test_what_is_read_for_a_gpu_is_the_same_with_and_without_locked_memory(tmp_path, caplog):
    sizes = (12, 1, 8, 12)  # MB
    tensors = {f"t{i}": torch.arange(size << 18).float() + i for i, size in enumerate(sizes)}
    tensors["odd"] = torch.arange((9 << 20) + 3).byte()
    save_file(tensors, tmp_path / "model.safetensors")
    with FileSource(tmp_path / "model.safetensors", short_lived=True, for_gpu=True) as source:
        places = set()
        for name, expected in tensors.items():
            tensor = source.read(name)
            assert torch.equal(tensor, expected)
            if tensor.nbytes in LOCKED:
                places.add(tensor.data_ptr())
                assert not torch.cuda.is_available() or tensor.is_pinned()
            del tensor
        assert len(places) == 1
    assert len(caplog.records) == (0 if torch.cuda.is_available() else 1)
