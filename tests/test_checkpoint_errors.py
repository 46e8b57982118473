"""Checkpoint files that are foreign, hostile or damaged: one typed error, and nothing changes."""

import argparse
import functools
import io
import os
import pickle
import re
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from checkpoint_files import MICRO, assert_same, micro, micro_state, refused, write_pth
from public_layout import public_state_dict, public_weights, write_pdparams
from safetensors.torch import save_file

import dsnet
from dsnet.checkpoint import read_checkpoint, save_checkpoint

# Files that hold something else


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"format_version": "2"}, "expected format_version 1, got 2"),
        ({"global_reduction": "[8, 4, 2]"}, "global_reduction: expected 4 numbers"),
        ({"global_reduction": "[8, 4, 2, 0]"}, "expected whole numbers of at least 1"),
        ({"global_reduction": "[8, 4, 2, true]"}, "expected whole numbers of at least 1"),
        ({"num_heads": "8 4 2 1"}, "metadata: "),
        ({"num_heads": "[" * 100_000}, "metadata: "),
    ],
)
def test_bad_metadata(tmp_path, metadata, match):
    save_file(micro().state_dict(), tmp_path / "a", metadata)
    refused(tmp_path / "a", match)


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none", "cannot be opened: No such file or directory")
    refused(tmp_path, "expected a file")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), r"expected a PyTorch, Paddle or safetensors checkpoint"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYP'"),
        (b"\x80", "expected a PyTorch, Paddle or safetensors checkpoint"),
        (b"PK\x03\x04" + bytes(99), "cannot be read as a PyTorch checkpoint"),
        (pickle.dumps({"a": 1.5}), "a: expected a tensor, got float"),
        (pickle.dumps(3), "expected a dict of tensors, got int"),
        (pickle.dumps({}), "expected the public names"),
        (pickle.dumps({"model": None}), "by name under 'model'"),
        (pickle.dumps({"a": np.ones(2, np.float32)}), "expected the public names"),
    ],
)
def test_foreign_content(tmp_path, content, match):
    (tmp_path / "a.pth").write_bytes(content)
    refused(tmp_path / "a.pth", match)


def test_another_network(tmp_path):
    path = write_pth(tmp_path / "a", {"conv1.weight": torch.ones(2), "fc.bias": torch.ones(2)})
    refused(path, r"expected a DS-Net, got other tensors: 2 \(conv1.weight, fc.bias\)")
    refused(write_pth(tmp_path / "b", [1, 2]), "expected a dict of tensors, got list")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("norm.bias", torch.full((64,), float("nan")), "expected finite numbers"),
        ("norm.bias", torch.ones(64, dtype=torch.int32), "expected floating-point numbers"),
        ("norm.bias", torch.ones(64, dtype=torch.complex64), "expected floating-point numbers"),
        ("norm.bias", torch.ones(64).to(torch.float8_e5m2), "expected floating-point numbers"),
        ("norm.num_batches_tracked", torch.tensor(1j), "expected a number"),
        ("norm.running_var", -torch.ones(64), "expected variances, got a negative number"),
        ("norm.bias", torch.ones(64).to_sparse(), "expected a dense tensor"),
        ("norm.bias", torch.ones(1).expand(64), "expected a dense tensor"),
        ("norm.bias", torch.ones(64, device="meta"), "expected a dense tensor"),
        ("head.weight", torch.ones(1).expand(10**9, 10**9), "expected a dense tensor"),
        ("head.weight", torch.ones(10**15, 0), "expected a dense tensor"),
        ("norm.bias", 3, "expected a tensor, got int"),
    ],
)
def test_tensors_that_no_network_can_hold(tmp_path, name, value, match):
    refused(write_pth(tmp_path / "a", micro_state() | {name: value}), f"{name}: {match}")


def test_values_beyond_the_models_dtype(tmp_path):
    path = write_pth(tmp_path / "a", micro_state() | {"norm.bias": torch.full((64,), 1e6)})
    model = micro().half()
    before = model.head.weight.clone()
    with pytest.raises(dsnet.CheckpointError, match=r"overflows torch.float16 in 1 \(norm.bias\)"):
        dsnet.load_checkpoint(model, path)
    assert torch.equal(model.head.weight, before)


def test_two_names_for_one_tensor(tmp_path):
    state = micro_state() | {"stages.0.embed.bias": torch.ones(8)}
    refused(write_pth(tmp_path / "a", state), "it holds stages.0.embed.bias twice")


def test_a_claimed_size_is_not_allocated(tmp_path):
    # 100 classes more would be harmless; these would need terabytes of classifier.
    state = public_state_dict() | {"head.weight": torch.ones(10**6)}
    path = write_pth(tmp_path / "a", state)
    with pytest.raises(dsnet.CheckpointError, match=r"head.weight \(expected \(1000000, 512\)"):
        dsnet.load_checkpoint("dsnet_tiny", path)


def test_compressed_and_overlapping_archives(tmp_path):
    source = write_pth(tmp_path / "a", micro_state())
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "b", "w", 8) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    refused(tmp_path / "b", "it is compressed")
    # A second directory entry for each file makes the archive claim twice its size.
    data = source.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    count, length, start = struct.unpack("<HII", data[end + 10 : end + 20])
    directory = data[start : start + length]
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3 * count, 3 * count, 3 * length, start, 0)
    (tmp_path / "c").write_bytes(data[:start] + directory * 3 + tail)
    refused(tmp_path / "c", "its entries overlap")


def test_every_missing_unexpected_and_misshapen_tensor_is_an_attribute(tmp_path):
    state = {name: value for name, value in micro_state().items() if "blocks4" not in name}
    state |= {f"extra{i}": torch.ones(1) for i in range(20)} | {"norm.bias": torch.ones(65)}
    path = write_pth(tmp_path / "a", state)
    with pytest.raises(dsnet.CheckpointError) as info:
        dsnet.load_checkpoint(micro(), path)
    for error in (info.value, pickle.loads(pickle.dumps(info.value))):
        expected = [name for name in micro().state_dict() if name.startswith("stages.3.blocks.")]
        assert len(expected) > 5
        assert sorted(error.missing) == sorted(expected)
        assert error.unexpected == tuple(f"extra{i}" for i in range(20))
        assert error.misshapen == ("norm.bias (expected (64,), got (65,))",)
        assert f"missing: {len(expected)} (" in str(error)
        assert f"and {len(expected) - 5} more)" in str(error)
        assert "and 15 more)" in str(error)
    read_error = dsnet.CheckpointError(path, "is empty")
    assert (read_error.missing, read_error.unexpected, read_error.misshapen) == ((), (), ())


def test_a_network_that_is_not_finite_is_not_saved(tmp_path):
    model = micro()
    with torch.no_grad():
        model.norm.bias[3] = float("nan")
        model.head.weight[0, 0] = float("inf")
    expected = r"model: expected finite numbers, got others in 2 \(norm.bias, head.weight\)"
    with pytest.raises(ValueError, match=expected):
        save_checkpoint(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


# Globals that torch.load allows


@pytest.mark.parametrize("registered", [[], [argparse.Namespace], [argparse.Namespace, io.BytesIO]])
def test_loading_keeps_the_globals_that_a_user_registered(tmp_path, registered):
    content = {"model": micro_state(), "args": argparse.Namespace(lr=0.1)}
    path = write_pth(tmp_path / "a", content)
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals(registered):
        dsnet.load_checkpoint(micro(), path)
        (tmp_path / "b").write_bytes(path.read_bytes()[:-999])
        refused(tmp_path / "b", "cannot be read as a PyTorch checkpoint")
        assert set(torch.serialization.get_safe_globals()) == before | set(registered)
    assert set(torch.serialization.get_safe_globals()) == before


def test_threads_load_at_the_same_time(tmp_path):
    content = {"model": micro_state(), "args": argparse.Namespace(lr=0.1)}
    path = write_pth(tmp_path / "a", content)
    before = set(torch.serialization.get_safe_globals())
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(read_checkpoint, [path] * 80))
    assert len(files) == 80
    assert set(torch.serialization.get_safe_globals()) == before


# Files that try to run something


class Call:
    """Pickles as the call ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def attacks(sentinel):
    """Objects whose unpickling makes the file ``sentinel``, by name."""
    python = f"open({str(sentinel)!r}, 'w').close()"
    command = Call(os.system, f"touch '{sentinel}'")
    hidden = np.empty(1, object)
    hidden[0] = command
    return {
        "os.system": command,
        "builtins.exec": Call(exec, python),
        "builtins.eval": Call(eval, python),
        "numpy object array": hidden,
        "torch.load": Call(torch.storage._load_from_bytes, _torch_bytes(command)),
        "functools.partial": Call(functools.partial(os.system, f"touch '{sentinel}'")),
    }


def _torch_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("attack", attacks("sentinel"))
@pytest.mark.parametrize("kind", ["Paddle 2", "Paddle 4", "Paddle 5", "PyTorch", "legacy PyTorch"])
def test_nothing_in_a_file_runs(tmp_path, kind, attack):
    sentinel, path = tmp_path / "sentinel", tmp_path / "a"
    payload = attacks(sentinel)[attack]
    pickle.loads(pickle.dumps(payload))
    assert sentinel.exists(), "the attack works on an unsafe reader"
    sentinel.unlink()

    if kind.startswith("Paddle"):
        content = public_weights(MICRO, 3) | {"norm.bias": payload}
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        legacy = kind.startswith("legacy")
        content = {"model": micro_state(), "optimizer": payload}
        write_pth(path, content, _use_new_zipfile_serialization=not legacy)
    message = refused(path, "it refers to|it holds an array of dtype|cannot be read")
    assert not sentinel.exists()
    assert "weights_only" not in message


def test_no_process_wide_permission_is_left_behind(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    dsnet.load_checkpoint(micro(), write_pth(tmp_path / "a", micro_state()))
    assert set(torch.serialization.get_safe_globals()) == before


DTYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR"
NEW_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (b"cos\nsystem\n(X\x04\x00\x00\x00truetR", "it refers to os.system"),
        (b"cnumpy\nload\n", "it refers to numpy.load"),
        (b"(ios\nsystem\n", "it has the instruction INST"),
        (b"cnumpy\nndarray\n)\x81", "it has the instruction NEWOBJ"),
        (b"\x82\x01", "it has the instruction EXT1"),
        (b"K\x01Q", "it has the instruction BINPERSID"),
        (b"cnumpy\ndtype\n}b", "it sets the state of something"),
        (b"cnumpy\nndarray\n)R", "it calls something"),
        (b"}K\x01K\x02s", "expected dicts with text as keys"),
        (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR", "array of dtype 'O8'"),
        (DTYPE + b"(K\x03X\x01\x00\x00\x00>NNNtb", "big-endian"),
        (
            NEW_ARRAY + b"(K\x01(K\x02t" + DTYPE + b"\x89C\x04abcdtb",
            "4 bytes for an array",
        ),
        (NEW_ARRAY + b"(K\x01(K\x02t" + DTYPE + b"\x89]tb", "it has the instruction EMPTY_LIST"),
        (NEW_ARRAY + b"(K\x01(Nt" + DTYPE + b"\x89C\x04abcdtb", "without a proper shape"),
        (
            NEW_ARRAY + b"(K\x01(K\x01t" + DTYPE + b"\x89X\x04\x00\x00\x00abcdtb",
            "not made of num",
        ),
        (b"\x8e" + struct.pack("<Q", 2**60) + b"abc", "cannot be read as a Paddle checkpoint"),
        (b"Kar\xff\xff\xff\xff", "expected a dict of tensors, got int"),
        (b"N" * 1_100_000, "more than 1000000 instructions"),
        (b"t", "cannot be read as a Paddle checkpoint"),
    ],
)
def test_paddle_interpreter_refuses(tmp_path, program, match):
    (tmp_path / "a").write_bytes(b"\x80\x02" + program + b".")
    refused(tmp_path / "a", re.escape(match))


# Damage

FLIPS = 48


@pytest.fixture(scope="module", params=["pth", "legacy", "pdparams", "safetensors"])
def micro_file(request, tmp_path_factory):
    """A file of the micro network with a second path to damage it at."""
    path = tmp_path_factory.mktemp(request.param) / "whole"
    if request.param == "pdparams":
        write_pdparams(path, public_weights(MICRO, 3))
    elif request.param == "safetensors":
        save_checkpoint(micro(), path)
    else:
        legacy = request.param == "legacy"
        write_pth(path, {"model": micro_state()}, _use_new_zipfile_serialization=not legacy)
    return path, path.with_name("damaged")


def test_truncated_files_are_refused(micro_file):
    whole, damaged = micro_file
    data, model = whole.read_bytes(), micro()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for length in {*range(40), *np.linspace(40, len(data) - 1, 30, dtype=int).tolist()}:
        damaged.write_bytes(data[:length])
        with pytest.raises(dsnet.CheckpointError, match=re.escape(f"{damaged}: ")):
            dsnet.load_checkpoint(model, damaged)
    assert_same(model, before)


def test_flipped_bytes_are_refused_or_loaded_whole(micro_file):
    whole, damaged = micro_file
    data, model, rng = whole.read_bytes(), micro(), np.random.default_rng(0)
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    messages = []
    for i in range(FLIPS):
        changed = bytearray(data)
        # Names and shapes stand at either end; most of what is between are weights.
        at = rng.integers(len(data)) if i % 4 == 0 else rng.integers(-8000, 8000)
        changed[at] ^= 1 << rng.integers(8)
        damaged.write_bytes(changed)
        model.load_state_dict(untouched)
        try:
            dsnet.load_checkpoint(model, damaged)
        except dsnet.CheckpointError as error:
            messages.append(str(error))
            assert_same(model, untouched)
        else:
            tensors = read_checkpoint(damaged).tensors
            assert_same(model, {name: tensors[name] for name in untouched})
            assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert all(message.startswith(f"{damaged}: ") for message in messages)
    assert 0 < len(messages) < FLIPS
