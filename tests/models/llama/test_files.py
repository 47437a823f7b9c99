"""Readers of stored tensors: safetensors, `.pth`, and hostile or damaged files of either."""

import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from models.llama.files import (
    JoinedTensor,
    StoredTensor,
    join,
    open_indexed,
    open_safetensors,
    read_json,
    write_safetensors,
)
from models.llama.pth import open_pth
from tests.models.llama import checkpoints
from tests.models.llama.checkpoints import call, name_of, pickled, rebuilt, stored, write_pth

NUMBERS = np.arange(24, dtype=np.float32)


def pth(path, value, storages=None):
    write_pth(path, value if isinstance(value, bytes) else pickled(value), storages or {"0": NUMBERS.tobytes()})
    return path


# safetensors


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors_of_the_library(tmp_path, dtype):
    values = {
        "a": NUMBERS.reshape(4, 6).astype(dtype),
        "b": NUMBERS[:5].astype(dtype),
        "empty": np.zeros((0, 3), dtype),
    }
    checkpoints.write_safetensors(tmp_path / "x.safetensors", values)
    opened = open_safetensors(tmp_path / "x.safetensors")
    assert opened.keys() == values.keys()
    for name, value in values.items():
        assert (opened[name].shape, opened[name].dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(opened[name].read(), value)
    np.testing.assert_array_equal(opened["a"].read(1, 3), values["a"][1:3])
    np.testing.assert_array_equal(opened["a"].read(3, 9), values["a"][3:])


def test_safetensors_for_the_library(tmp_path):
    from safetensors import safe_open

    values = {"b": NUMBERS[:3].astype(ml_dtypes.bfloat16), "a": NUMBERS.reshape(4, 6), "h": NUMBERS.astype(np.float16)}
    entries = {name: (value.dtype, value.shape) for name, value in values.items()}
    write_safetensors(tmp_path / "x.safetensors", entries, values.__getitem__, {"format": "pt"})
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        for name, value in values.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)
    assert all(
        tensor.offset % tensor.dtype.itemsize == 0 for tensor in open_safetensors(tmp_path / "x.safetensors").values()
    )


def test_whole_numbers_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="'a' of type int32 cannot be written"):
        write_safetensors(tmp_path / "x", {"a": (np.dtype(np.int32), (2,))}, lambda name: np.zeros(2, np.int32), {})


def test_safetensors_cut_anywhere(tmp_path):
    path = tmp_path / "cut.safetensors"
    checkpoints.write_safetensors(path, {"first": NUMBERS, "second": NUMBERS})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors: truncated") as error:
            open_safetensors(path)
        if length >= len(whole) - 4 * len(NUMBERS):
            assert "'second'" in str(error.value)


def test_safetensors_shortened_after_opening(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoints.write_safetensors(path, {"a": NUMBERS})
    opened = open_safetensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors: truncated within tensor 'a'"):
        opened["a"].read()


def raw_safetensors(path, header, data=b"\0" * 96):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[1, 2]",
        b"\xff\xfe{}",
        b"[" * 100_000,
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}},
        {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
    ],
)
def test_senseless_safetensors_headers(tmp_path, header):
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a safetensors file"):
        open_safetensors(raw_safetensors(tmp_path / "bad.safetensors", header))


def test_header_length_out_of_bounds(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}" * 100)
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a safetensors file"):
        open_safetensors(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I32", "BOOL", "F4"])
def test_other_types_are_refused_when_used(tmp_path, dtype):
    header = {"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}
    opened = open_safetensors(raw_safetensors(tmp_path / "q.safetensors", header))
    with pytest.raises(ValueError, match=rf"q\.safetensors: tensor 'w' is stored as {dtype}, .* quantised"):
        opened["w"].read()


# an index of several files


def test_index(tmp_path):
    checkpoints.write_safetensors(tmp_path / "1.safetensors", {"a": NUMBERS})
    checkpoints.write_safetensors(tmp_path / "2.safetensors", {"b": NUMBERS + 1})
    index = tmp_path / "model.safetensors.index.json"

    def opened(**weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        return open_indexed(index, open_safetensors)

    np.testing.assert_array_equal(opened(a="1.safetensors", b="2.safetensors")["b"].read(), NUMBERS + 1)
    with pytest.raises(FileNotFoundError, match=r"3\.safetensors is listed in model\.safetensors\.index\.json"):
        opened(a="1.safetensors", b="3.safetensors")
    with pytest.raises(ValueError, match=r"2\.safetensors: lacks the tensor 'a'"):
        opened(a="2.safetensors")
    with pytest.raises(ValueError, match="leads out of the folder"):
        opened(a="../1.safetensors")
    with pytest.raises(ValueError, match="no weight_map"):
        opened(a=1)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: not JSON"):
        open_indexed(index, open_safetensors)


# .pth


def test_pth_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "whole": base.reshape(4, 6),
        "tail of the same storage": base[18:],
        "transposed": base.reshape(4, 6).T,
        "every second column": base.reshape(4, 6)[:, 1::2],
        "expanded": base[:4, None].expand(4, 3),
        "parameter": torch.nn.Parameter(base.reshape(2, 12) + 1),
        "half": base.half(),
        "bfloat16": base.reshape(3, 8).bfloat16().T,
        "double": base.double(),
        "empty": base[:0],
        "single": base[7:8].reshape(1, 1),
    }
    torch.save(tensors, tmp_path / "x.pth")
    opened = open_pth(tmp_path / "x.pth")
    assert opened.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.detach().double().numpy()
        assert opened[name].shape == expected.shape
        np.testing.assert_array_equal(opened[name].read().astype(np.float64), expected, err_msg=name)
        np.testing.assert_array_equal(opened[name].read(1, 3).astype(np.float64), expected[1:3], err_msg=name)
        assert str(tensor.dtype) == f"torch.{opened[name].dtype}"


def test_pth_of_a_state_dict(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), tmp_path / "x.pth")  # an OrderedDict that has attributes
    opened = open_pth(tmp_path / "x.pth")
    np.testing.assert_array_equal(opened["weight"].read(), layer.weight.detach().numpy())
    np.testing.assert_array_equal(opened["bias"].read(), layer.bias.detach().numpy())


def test_pth_of_the_old_format_says_how_to_convert(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.zeros(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pth: .*torch\.save\(torch\.load"):
        open_pth(tmp_path / "old.pth")


def test_pth_written_by_hand(tmp_path):
    """The archives that the tests below corrupt are read when they are left alone."""
    path = pth(tmp_path / "x.pth", {"w": rebuilt(stored("FloatStorage", "0", 24), 2, (3, 4), (6, 1))})
    np.testing.assert_array_equal(open_pth(path)["w"].read(), NUMBERS[2:20].reshape(3, 6)[:, :4])


class Touch:
    """Pickled as a call of os.system; on any unpickler that obeys, the marker appears."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


def hostile_programs(marker):
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    storage = stored("FloatStorage", "0", 24)
    tensor = rebuilt(storage, 0, (24,), (1,))
    rebuild = name_of("torch._utils", "_rebuild_tensor_v2")
    return {
        "os.system": pickle.dumps(Touch(marker)),
        "os.system, newest protocol": pickle.dumps({"w": Touch(marker)}, protocol=pickle.HIGHEST_PROTOCOL),
        "posix.system": pickled({"w": call("posix", "system", shell)}),
        "subprocess": pickled({"w": call("subprocess", "check_call", ["touch", str(marker)])}),
        "eval": pickled(call("builtins", "eval", python)),
        "eval of Python 2": pickled(call("__builtin__", "eval", python)),
        "exec": pickled(call("builtins", "exec", python)),
        "getattr": pickled(call("builtins", "getattr", call("builtins", "__import__", "os"), "system")),
        "in a shape": pickled({"w": rebuilt(storage, 0, call("builtins", "eval", python), (1,))}),
        "in a name": pickled({call("builtins", "eval", python): tensor}),
        "in a storage's type": pickled(
            {"w": rebuilt(("storage", call("builtins", "eval", python), "0", "cpu", 24), 0, (24,), (1,))}
        ),
        "in a storage's key": pickled(
            {
                "w": rebuilt(
                    ("storage", name_of("torch", "FloatStorage"), call("builtins", "eval", python), "cpu", 24),
                    0,
                    (24,),
                    (1,),
                )
            }
        ),
        "torch's own loader": pickled({"w": call("torch", "load", str(marker))}),
        "numpy's reconstruction": pickled({"w": call("numpy.core.multiarray", "_reconstruct", 0)}),
        "a path through a known name": pickled(call("collections", "OrderedDict.__init__.__globals__", "x")),
        "INST": f"(S'{shell}'\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nS'{shell}'\no.".encode(),
        "an extension code": pickle.PROTO + b"\x02" + pickle.EXT1 + b"\x01.",
        "altering a known function": pickled(rebuild)[:-1] + pickled({"__call__": 1})[2:-1] + b"b.",
        "altering a known function by slots": pickled(rebuild)[:-1] + pickled((None, {"_function": 1}))[2:-1] + b"b.",
        "altering a tensor": pickled(tensor)[:-1] + pickled({"shape": (1,)})[2:-1] + b"b.",
    }


@pytest.mark.parametrize("name", hostile_programs(""))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, name):
    marker = tmp_path / "marker"
    path = pth(tmp_path / "evil.pth", hostile_programs(marker)[name])
    with pytest.raises(ValueError, match=r"evil\.pth: refused"):
        open_pth(path)
    assert not marker.exists()
    test_pth_written_by_hand(tmp_path)  # nothing that later files need was altered


def test_the_hostile_pickles_are_armed(tmp_path):
    """What is refused above would have run: the plain unpickler obeys it."""
    armed = 0
    for number, name in enumerate(hostile_programs("")):
        marker = tmp_path / f"marker{number}"
        try:
            pickle.loads(hostile_programs(marker)[name])
        except Exception:
            continue
        armed += marker.exists()
    assert armed >= 6


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "no mapping"),
        ([1], "no mapping"),
        ({"w": 7}, "entry 'w' is no tensor"),
        ({"model": {"w": rebuilt(stored("FloatStorage", "0", 24), 0, (24,), (1,))}}, "entry 'model' is no tensor"),
        ({3: rebuilt(stored("FloatStorage", "0", 24), 0, (24,), (1,))}, "entry '3' is no tensor"),
        ({"w": rebuilt("0", 0, (24,), (1,))}, "entry 'w' is no tensor"),
        ({"w": rebuilt(stored("FloatStorage", "9", 24), 0, (24,), (1,))}, "tensor 'w' are not in the file"),
        ({"w": rebuilt(stored("FloatStorage", "../version", 24), 0, (1,), (1,))}, "tensor 'w' are not in the file"),
        ({"w": rebuilt(stored("FloatStorage", "0", 24), 1, (24,), (1,))}, "tensor 'w' needs 100 bytes, there are 96"),
        ({"w": rebuilt(stored("FloatStorage", "0", 24), 0, (2, 2), (24, 1))}, "tensor 'w' needs 104 bytes"),
        ({"w": rebuilt(stored("DoubleStorage", "0", 24), 0, (24,), (1,))}, "tensor 'w' needs 192 bytes"),
        ({"w": rebuilt(stored("FloatStorage", "0", 24), -1, (4,), (1,))}, "'w' has no sensible shape"),
        ({"w": rebuilt(stored("FloatStorage", "0", 24), 4, (4,), (-1,))}, "'w' has no sensible shape"),
        ({"w": rebuilt(stored("FloatStorage", "0", 24), 0, (4.0,), (1,))}, "'w' has no sensible shape"),
        ({"w": rebuilt(stored("FloatStorage", "0", 24), 0, (2, 2), (1,))}, "'w' has no sensible shape"),
        ({"w": rebuilt(stored("FloatStorage", "0", 24), 0, 24, 1)}, "'w' has no sensible shape"),
        ({"w": rebuilt(stored("QInt8Storage", "0", 24), 0, (24,), (1,))}, "QInt8Storage"),
    ],
)
def test_senseless_pth(tmp_path, value, message):
    with pytest.raises(ValueError, match=rf"bad\.pth.*{message}"):
        open_pth(pth(tmp_path / "bad.pth", value))


def test_whole_numbers_in_pth_are_refused_when_used(tmp_path):
    opened = open_pth(pth(tmp_path / "q.pth", {"w": rebuilt(stored("CharStorage", "0", 96), 0, (96,), (1,))}))
    with pytest.raises(ValueError, match=r"q\.pth: tensor 'w' is stored as I8"):
        opened["w"].read()


def test_pth_cut_anywhere(tmp_path):
    path = pth(tmp_path / "cut.pth", {"w": rebuilt(stored("FloatStorage", "0", 24), 0, (24,), (1,))})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth: truncated"):
            open_pth(path)


def test_pth_with_a_broken_pickle(tmp_path):
    program = pickled({"w": rebuilt(stored("FloatStorage", "0", 24), 0, (24,), (1,))})
    for length in range(len(program)):
        with pytest.raises(ValueError, match=r"cut\.pth"):
            open_pth(pth(tmp_path / "cut.pth", program[:length]))


def test_pickles_that_ask_for_much_memory_are_refused(tmp_path, monkeypatch):
    for program in (b"\x80\x02}r\xff\xff\xff\x3f.", b"}p1073741823\n."):
        with pytest.raises(ValueError, match=r"x\.pth: refused: .* memo index 1073741823"):
            open_pth(pth(tmp_path / "x.pth", program))
    monkeypatch.setattr("models.llama.pth._MAX_PICKLE_BYTES", 9)
    with pytest.raises(ValueError, match=r"x\.pth: refused: record archive/data\.pkl has 10 bytes, more than 9"):
        open_pth(pth(tmp_path / "x.pth", b"\x80\x02}q\x00000\x00."))


def test_compressed_and_big_endian_archives_are_refused(tmp_path):
    program = pickled({"w": rebuilt(stored("FloatStorage", "0", 24), 0, (24,), (1,))})
    for name in ("data.pkl", "data/0"):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            for record, data in (("data.pkl", program), ("data/0", NUMBERS.tobytes())):
                method = zipfile.ZIP_DEFLATED if record == name else zipfile.ZIP_STORED
                archive.writestr(f"archive/{record}", data, method)
        with pytest.raises(ValueError, match=rf"x\.pth: .*{name} is compressed"):
            open_pth(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"big")
    with pytest.raises(ValueError, match=r"y\.pth: .*big-endian"):
        open_pth(tmp_path / "y.pth")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "[1]", "\xff", "{"])
def test_json_that_holds_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_json(tmp_path / "config.json")


# joined parts


def parts_of(tmp_path, pieces):
    for number, piece in enumerate(pieces):
        checkpoints.write_safetensors(tmp_path / f"{number}.safetensors", {"w": piece})
    return tuple(open_safetensors(tmp_path / f"{number}.safetensors")["w"] for number in range(len(pieces)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_are_joined_by_shape(tmp_path, axis, count):
    whole = NUMBERS[:16].reshape(4, 4)
    joined = join(parts_of(tmp_path, np.split(whole, count, axis)), (4, 4))
    assert joined.shape == (4, 4)
    assert isinstance(joined, JoinedTensor if count > 1 else StoredTensor)
    np.testing.assert_array_equal(joined.read(), whole)
    for start in range(4):
        for stop in range(start + 1, 5):
            np.testing.assert_array_equal(joined.read(start, stop), whole[start:stop])


def test_copies_are_not_joined(tmp_path):
    np.testing.assert_array_equal(join(parts_of(tmp_path, [NUMBERS, NUMBERS]), (24,)).read(), NUMBERS)


def test_parts_that_do_not_fit(tmp_path):
    parts = parts_of(tmp_path, [NUMBERS.reshape(4, 6), NUMBERS[:12].reshape(4, 3)])
    np.testing.assert_array_equal(join(parts, (4, 9)).read()[:, 6:], NUMBERS[:12].reshape(4, 3))
    for shape in ((8, 6), (4, 12), (9, 4), (36,)):
        with pytest.raises(ValueError, match=r"0\.safetensors: tensor 'w' has shape \(4, 6\) and \(4, 3\)"):
            join(parts, shape)
