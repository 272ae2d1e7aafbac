"""`elsewhere consolidate`: a portable checkpoint's weights in one file, or one sentence."""

import json
import os
import re
import resource
import subprocess
import sys
import zlib

import pytest
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from elsewhere.launch import checkpoint, safetensors_file
from elsewhere.launch.build import build_method
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config


@pytest.fixture
def consolidate(capsys):
    """Run `elsewhere consolidate …`; returns exit status, stdout and stderr."""

    def run(*arguments):
        status = main(["consolidate", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def save(folder, tensors, config, step=7):
    """A portable checkpoint, written by torch itself and described by hand."""
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    files = {path.name: {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
             for path in folder.iterdir()}  # fmt: skip
    about = {"step": step, "format": checkpoint.FORMAT, "config": config.to_dict(), "files": files}
    (folder / "about.json").write_text(json.dumps(about))


def with_moments(method):
    """The tensors of a checkpoint: the method's, and moments that must not be taken for them."""
    tensors = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
    moments = {f"{kind}.{name}": torch.rand_like(p) for name, p in method.named_parameters() if p.requires_grad
               for kind in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    return tensors | moments


@pytest.fixture
def jepa(tiny, tmp_path):
    """An I-JEPA whose teacher differs from its student, and a run with a checkpoint of it."""
    config = load_config("demo", tiny)
    method = build_method(config)
    for p in method.parameters():
        p.data.add_(torch.rand_like(p))
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    save(folder, with_moments(method), config)
    return method, tmp_path / "run"


@pytest.fixture
def mae(tiny_mae, tmp_path):
    config = load_config("demo_adpe", tiny_mae)
    method = build_method(config)
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    save(folder, with_moments(method) | {"adversary.table": torch.rand(3)}, config)
    return method, tmp_path / "run"


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("flags", "module"),
    [
        ([], "teacher"),
        (["--part", "teacher"], "teacher"),
        (["--part", "student"], "encoder"),
        (["--part", "predictor"], "predictor"),
    ],
)
def test_a_part_has_the_names_of_its_module(consolidate, jepa, tmp_path, flags, module):
    method, run = jepa
    status, printed, _ = consolidate(run, "-o", tmp_path / "weights.safetensors", *flags)
    assert status == 0 and "step-00000007" in printed
    same(load_file(tmp_path / "weights.safetensors"), getattr(method, module).state_dict())


def test_all_is_the_methods_state(consolidate, jepa, tmp_path):
    method, run = jepa
    assert consolidate(run, "-o", tmp_path / "weights.safetensors", "--part", "all")[0] == 0
    same(load_file(tmp_path / "weights.safetensors"), method.state_dict())


@pytest.mark.parametrize(("flags", "module"), [([], "encoder"), (["--part", "decoder"], "decoder")])
def test_a_masked_autoencoder_has_its_encoder_by_default(consolidate, mae, tmp_path, flags, module):
    method, run = mae
    assert consolidate(run / "checkpoints" / "step-00000007", "-o", tmp_path / "w.safetensors", *flags)[0] == 0
    same(load_file(tmp_path / "w.safetensors"), getattr(method, module).state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_are_rounded_once(consolidate, jepa, tmp_path, dtype):
    method, run = jepa
    assert consolidate(run, "-o", tmp_path / "w.safetensors", "--dtype", dtype)[0] == 0
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in method.teacher.state_dict().items()}
    same(load_file(tmp_path / "w.safetensors"), expected)


def test_the_file_says_what_it_is(consolidate, jepa, tmp_path):
    consolidate(jepa[1], "-o", tmp_path / "w.safetensors")
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["elsewhere.part"], metadata["elsewhere.step"]) == ("teacher", "7")
    assert json.loads(metadata["elsewhere.config"])["model"]["width"] == 24


def test_the_data_of_the_file_are_aligned(tmp_path):
    """Types of all widths, and a header of any length."""
    tensors = {"flag": torch.tensor([True]), "half": torch.rand(3).half(), "wide": torch.rand(5).double(),
               "one": torch.rand(()), "none": torch.rand(0, 2), "count": torch.arange(3)}  # fmt: skip
    described = {name: safetensors_file.Described(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    path = tmp_path / "w.safetensors"
    size = safetensors_file.write_tensors(path, described, tensors.__getitem__, {"note": "ä" * 3})
    same(load_file(path), tensors)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and size == len(content)
    for entry in json.loads(content[8 : 8 + length]).values():
        if "dtype" in entry and entry["dtype"] != "BOOL":
            assert entry["data_offsets"][0] % (int(entry["dtype"][1:]) // 8) == 0


def test_a_wrapped_method_loses_the_wrappers_prefix(consolidate, tiny, tmp_path):
    config = load_config("demo", tiny)
    method = build_method(config)
    (tmp_path / "one").mkdir()
    save(tmp_path / "one", {f"method.module.{name}": t for name, t in method.state_dict().items()}, config)
    assert consolidate(tmp_path / "one", "-o", tmp_path / "w.safetensors")[0] == 0
    same(load_file(tmp_path / "w.safetensors"), method.teacher.state_dict())


def refused(result, text):
    status, _, complaint = result
    assert status == 2 and re.fullmatch(r"elsewhere: [^\n]+\n", complaint), complaint
    assert re.search(text, complaint), complaint


def test_a_part_that_is_not_there_is_told_with_those_that_are(consolidate, mae, tmp_path):
    result = consolidate(mae[1], "-o", tmp_path / "w.safetensors", "--part", "teacher")
    refused(result, "has no teacher; choose --part student, decoder or all")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("taken", ["w.safetensors", "w.safetensors.part"])
def test_nothing_is_overwritten(consolidate, jepa, tmp_path, taken):
    (tmp_path / taken).write_text("precious")
    refused(consolidate(jepa[1], "-o", tmp_path / "w.safetensors"), f"{taken} exists already")
    assert (tmp_path / taken).read_text() == "precious"


def test_a_file_that_comes_into_being_meanwhile_is_not_overwritten(consolidate, jepa, tmp_path, monkeypatch):
    path, read_back = tmp_path / "w.safetensors", safetensors_file._read_back
    monkeypatch.setattr(safetensors_file, "_read_back", lambda part: (path.write_text("precious"), read_back(part))[1])
    refused(consolidate(jepa[1], "-o", path), "has come into being meanwhile")
    assert path.read_text() == "precious" and not (tmp_path / "w.safetensors.part").exists()


def test_a_folder_that_is_not_there_is_told(consolidate, jepa, tmp_path):
    refused(consolidate(jepa[1], "-o", tmp_path / "no" / "w.safetensors"), "no is not a folder; make it")


def test_an_unwritable_folder_is_told(consolidate, jepa, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    refused(consolidate(jepa[1], "-o", tmp_path / "w.safetensors"), "is not writable; choose another folder")


@pytest.mark.parametrize("limit", [10, 20_000])
def test_a_disk_that_is_full_leaves_nothing(consolidate, jepa, tmp_path, limit):
    """A limit on the size of files stands for it: the kernel refuses the bytes beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = consolidate(jepa[1], "-o", tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, r"could not be written \(File too large\); make room")
    assert not list(tmp_path.glob("w.*"))


def test_too_little_room_is_told_before_anything_is_written(consolidate, jepa, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    refused(consolidate(jepa[1], "-o", tmp_path / "w.safetensors"), r"takes [\d,]+ bytes and the disk has 1,000")


def test_a_disk_that_changes_bytes_is_found(consolidate, jepa, tmp_path, monkeypatch):
    write = safetensors_file._write
    calls = []

    def other_bytes(file, content, crc=0):
        calls.append(content)
        if len(calls) == 5:  # what arrives differs in one bit from what was meant
            arrived = bytearray(content)
            arrived[0] ^= 1
            write(file, bytes(arrived), crc)
            return zlib.crc32(content, crc)
        return write(file, content, crc)

    monkeypatch.setattr(safetensors_file, "_write", other_bytes)
    refused(consolidate(jepa[1], "-o", tmp_path / "w.safetensors"), "came back from the disk with other bytes")
    assert not list(tmp_path.glob("w.*"))


def test_an_interruption_leaves_nothing(consolidate, jepa, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_file, "_read_back", interrupt)
    assert consolidate(jepa[1], "-o", tmp_path / "w.safetensors")[0] == 130
    assert not list(tmp_path.glob("w.*"))


def test_numbers_beyond_float16_are_told(consolidate, tiny, tmp_path):
    config = load_config("demo", tiny)
    method = build_method(config)
    method.teacher.norm.bias.data[3] = 1e5
    (tmp_path / "one").mkdir()
    save(tmp_path / "one", with_moments(method), config)
    result = consolidate(tmp_path / "one", "-o", tmp_path / "w.safetensors", "--dtype", "float16")
    refused(result, r"norm\.bias holds numbers beyond 65504.*choose --dtype bfloat16")
    assert not list(tmp_path.glob("w.*"))


@pytest.mark.parametrize("name", ["weights.pt", "weights"])
def test_the_name_must_say_the_format(consolidate, jepa, tmp_path, name):
    refused(consolidate(jepa[1], "-o", tmp_path / name), r"must end in \.safetensors")


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder", "a run without a checkpoint"])
def test_what_is_no_checkpoint_is_told(consolidate, tmp_path, what):
    source = tmp_path / "source"
    if what == "a file":
        source.write_text("")
    elif what != "nothing":
        (source / ("checkpoints" if "run" in what else "")).mkdir(parents=True)
    refused(
        consolidate(source, "-o", tmp_path / "w.safetensors"),
        "does not exist; give|is a file; give|holds no checkpoint; give|has no checkpoint yet",
    )


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(consolidate, jepa, tmp_path):
    method, run = jepa
    newer = run / "checkpoints" / "step-00000009"
    newer.mkdir()
    save(newer, with_moments(method), load_config("demo"), step=9)
    (newer / "__0_0.distcp").write_bytes(b"")
    assert "step-00000007" in consolidate(run, "-o", tmp_path / "w.safetensors")[1]
    refused(consolidate(newer, "-o", tmp_path / "v.safetensors"), r"is damaged: __0_0\.distcp has 0 bytes instead of")


MEASURE = """
import sys, threading, time
from elsewhere.launch.cli import main
import elsewhere.launch.weights

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not over.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

before, peak, over = anonymous(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
status = main(["consolidate", sys.argv[1], "-o", sys.argv[2], "--part", "all", *sys.argv[3:]])
over.set()
thread.join()
print(peak[0] - before)
sys.exit(status)
"""


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_holds_two_tensors_and_not_the_model(tmp_path, dtype):
    """64 tensors of 8 MB, 512 MB in all."""
    tensors = {f"method.encoder.{i}": torch.full((2048, 1024), float(i)) for i in range(64)}
    (tmp_path / "one").mkdir()
    save(tmp_path / "one", tensors, load_config("demo"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "one"), str(tmp_path / "w.safetensors"), "--dtype", dtype],
        check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(done.stdout.splitlines()[-1]) <= 2 * 8 * 2**20 + 64 * 2**20
