"""Hostile pickles are refused by name and run nothing; harmless ones give what they say."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import functools
import io
import operator
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron.core.enums
import megatron.core.transformer.enums
import numpy as np
import pytest
import torch

from checkpoint.archive.pickles import load_pickle
from checkpoint.archive.rebuild import storage_of
from checkpoint.archive.standins import Namespace, Opaque
from checkpoint.archive.torch_file import open_torch_file


class Reduces:
    """Whatever it is given to be unpickled as."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def touching(marker: Path) -> dict[str, tuple[Any, str]]:
    """What would make the file `marker` if it was executed, and the name it must be refused by."""
    shell = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w').close()"
    nested = pickle.dumps(Reduces(os.system, (shell,)))
    return {
        "os.system": (Reduces(os.system, (shell,)), "posix.system"),
        "eval": (Reduces(eval, (python,)), "builtins.eval"),
        "exec": (Reduces(exec, (python,)), "builtins.exec"),
        "import": (Reduces(builtins.__import__, ("os",)), "builtins.__import__"),
        "open": (Reduces(open, (str(marker), "w")), "io.open"),
        "partial": (Reduces(functools.partial(os.system, shell), ()), "functools.partial"),
        "subprocess": (Reduces(subprocess.Popen, (["touch", str(marker)],)), "subprocess.Popen"),
        "getattr": (Reduces(getattr, (collections.OrderedDict, "fromkeys")), "builtins.getattr"),
        "attrgetter": (Reduces(operator.attrgetter("system"), (1,)), "operator.attrgetter"),
        "methodcaller": (Reduces(operator.methodcaller("popen", shell), (1,)), "operator.methodcaller"),
        "map": (Reduces(map, (os.system, [shell])), "builtins.map"),
        "nested": (Reduces(pickle.loads, (nested,)), "pickle.loads"),
        "torch.load": (Reduces(torch.load, (str(marker),)), "torch.serialization.load"),
        "as state": (Reduces(argparse.Namespace, (), {"x": Reduces(os.system, (shell,))}), "posix.system"),
        "as a key": ({Reduces(os.system, (shell,)): 1}, "posix.system"),
        "list subclass": (Reduces(collections.UserList, ([1],)), "collections.UserList"),
        "numpy": (Reduces(np.load, (str(marker),)), "numpy.load"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", touching(Path()))
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, name: str, protocol: int
) -> None:
    marker = tmp_path / "executed"
    value, refused = touching(marker)[name]
    with pytest.raises(ValueError, match="nothing of it was executed") as caught:
        load_pickle(pickle.dumps(value, protocol), "some.pt")
    assert refused in str(caught.value)
    assert "some.pt" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_torch_file_is_refused(tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "executed"
    value = {"weight": torch.ones(2), "extra": Reduces(os.system, (f"touch {marker}",))}
    file = tmp_path / "model.pt"
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"model\.pt.*posix\.system"):
        open_torch_file(file)
    assert not marker.exists()


def test_all_refused_names_are_given_at_once() -> None:
    hostile = [Reduces(os.system, ("true",)), Reduces(eval, ("1",)), {"x": Reduces(os.getpid, ())}]
    with pytest.raises(ValueError, match=r"builtins\.eval, posix\.getpid, posix\.system"):
        load_pickle(pickle.dumps(hostile), "x")


OPCODES = {
    "os by another name": b"cnt\nsystem\n(S'true'\ntR.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "instance opcode": b"(S'true'\nios\nsystem\n.",
    "object opcode": b"(cos\nsystem\nS'true'\no.",
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R.",
    "dtype that is a module": b"ctorch\nos\n.",
    "getattr of a module": b"c__builtin__\ngetattr\n(cos\nS'system'\ntR.",
    "extension": b"\x82\x01.",
    "state on a class": b"ccollections\nOrderedDict\n(N}S'get'\nccollections\nOrderedDict\nstb.",
    "state on an opaque class": b"cmegatron.x\nY\n(N}S'__setstate__'\nI1\nstb.",
    "state on a function": b"ctorch\nSize\n(N}S'__call__'\nI1\nstb.",
    "dict on a function": b"ctorch\nSize\n}S'_call'\nI1\nsb.",
    "new object of a function": b"ctorch\nSize\n)\x81.",
    "member of what is no enum": b"c__builtin__\ngetattr\n(ccollections\nOrderedDict\nS'update'\ntR.",
    "persistent id": b"Pos.system\n.",
    "codec": b"c_codecs\nencode\n(S'true'\nS'rot13'\ntR.",
    "a numpy array of objects": pickle.dumps(np.array([{}], dtype=object)),
}


@pytest.mark.parametrize("name", OPCODES)
def test_hand_written_opcodes_change_nothing(name: str) -> None:
    before = (collections.OrderedDict.get, Opaque.__setstate__, len(vars(Opaque)))
    with pytest.raises(ValueError, match=r"^x: "):
        load_pickle(OPCODES[name], "x")
    assert before == (collections.OrderedDict.get, Opaque.__setstate__, len(vars(Opaque)))


BOMBS = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "text": b"X\xff\xff\xff\x7fx.",
    "number": b"\x8b\xff\xff\xff\x7f1.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
    "memo": b"Nr\xff\xff\xff\xff.",
    "memo as text": b"Np4294967295\n.",
    "size of a bytearray": b"c__builtin__\nbytearray\n(I1099511627776\ntR.",
    "size of a bytearray from numpy": pickle.dumps(Reduces(bytearray, (np.int64(1 << 40),))),
    "shape of an array": pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_sizes_that_the_bytes_do_not_account_for_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^x: ") as caught:
        load_pickle(BOMBS[name], "x")
    assert "MemoryError" not in str(caught.value)


@pytest.mark.parametrize("name", ["persistent id", "argument"])
def test_an_error_does_not_spell_out_billions_of_references(name: str) -> None:
    """Forty lists, each of which holds the one before it twice."""
    nested = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40))
    user = {"persistent id": b"h(Q.", "argument": b"c_codecs\nencode\n(S'x'\nh(tR."}[name]
    with pytest.raises(ValueError, match=r"^x: ") as caught:
        load_pickle(b"\x80\x02" + nested + user, "x", lambda saved_id: storage_of(saved_id))
    assert len(str(caught.value)) < 1000


def test_random_damage_is_a_value_error_or_harmless() -> None:
    value = {
        "a": [1, 2.5, "x" * 300],
        "n": argparse.Namespace(m=megatron.core.enums.ModelType(1)),
        "r": np.arange(3),
    }
    good = pickle.dumps(value, 2)
    chance = random.Random(0)
    survived = 0
    for _ in range(2000):
        damaged = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        with contextlib.suppress(ValueError):
            load_pickle(bytes(damaged), "x")
            survived += 1
    assert 0 < survived < 2000


@pytest.mark.parametrize("length", [0, 1, 2, 50, 100])
def test_a_pickle_that_is_cut_off_is_named(length: int) -> None:
    with pytest.raises(ValueError, match=r"^x: its pickle is cut off|announces"):
        load_pickle(pickle.dumps({"key": "v" * 300})[:length], "x")


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_plain_values_come_out_as_themselves(protocol: int) -> None:
    value = {
        "numbers": [1, -5, 2**70, 2.5, True, None, 1 + 2j],
        "texts": ("ü", b"\x00\xff", bytearray(b"xyz"), ""),
        "sets": [{1, 2}, frozenset({3})],
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, x=[1]),
        "random": random.getstate(),
        "path": Path("/a/b"),
    }
    read = load_pickle(pickle.dumps(value, protocol), "x")
    assert read == value | {"path": "/a/b"}
    assert list(read["ordered"]) == ["b", "a"]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([1.5], ">f4"),
        np.zeros((0, 2)),
        np.array(["ab", "c"]),
    ],
)
def test_numpy_arrays_come_out_as_themselves(protocol: int, array: np.ndarray[Any, Any]) -> None:
    pickled = pickle.dumps((array, np.float32(1.5)), protocol)
    read, scalar = load_pickle(pickled, "x")
    assert read.dtype == pickle.loads(pickled)[0].dtype
    np.testing.assert_array_equal(read, array)
    assert scalar == np.float32(1.5)


def test_the_state_of_numpys_generator_can_be_restored() -> None:
    state = np.random.RandomState(3).get_state()
    read = load_pickle(pickle.dumps(state, 2), "x")
    generator = np.random.RandomState()
    generator.set_state(read)
    assert generator.randint(1 << 30) == np.random.RandomState(3).randint(1 << 30)


def test_classes_of_trainers_keep_name_arguments_and_state() -> None:
    kept = argparse.Namespace(
        backend=megatron.core.transformer.enums.AttnBackend.flash,
        dtype=torch.bfloat16,
    )
    read = load_pickle(pickle.dumps(kept, 2), "x")
    assert isinstance(read, Namespace)
    assert read["backend"].name == "megatron.core.transformer.enums.AttnBackend"
    assert read["backend"].args == (kept.backend.value,)
    assert read["dtype"] == "bfloat16"


def test_a_class_that_is_not_installed_keeps_its_state() -> None:
    text = b"cdeepspeed.utils.tensor_fragment\nfragment_address\n)\x81}(S'numel'\nI12\nS'start'\nI5\nub."
    read = load_pickle(text, "x")
    assert read.name == "deepspeed.utils.tensor_fragment.fragment_address"
    assert read.state == {"numel": 12, "start": 5}


def test_opaque_objects_take_every_way_of_making_them() -> None:
    """By calling, without calling, with state, appended items and items by key."""
    text = b"cmegatron.a\nB\n(I1\ntR(I2\nI3\ne(S'k'\nI4\nuS'state'\nb."
    made = load_pickle(text, "x")
    assert (made.name, made.args, made.items, made.mapping, made.state) == (
        "megatron.a.B",
        (1,),
        [2, 3],
        {"k": 4},
        "state",
    )
    referred = load_pickle(b"\x80\x04\x8c\x08megatron\x8c\x03C.d\x93.", "x")
    assert referred.name == "megatron.C.d"


def test_thousands_of_opaque_keys_are_quick() -> None:
    """Indices of DCP are keys of a dict by the ten thousand: they must not all have one hash."""
    entries = {megatron_key(number): number for number in range(20000)}
    read = load_pickle(pickle.dumps(entries, 2), "x")
    assert len(read) == 20000
    assert len({hash(key) for key in read}) > 19000


def megatron_key(number: int) -> Any:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    return MetadataIndex(f"layer.{number}", torch.Size([number]))


def test_it_imports_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(
        {"weight": torch.ones(2), "args": argparse.Namespace(m=megatron.core.enums.ModelType(1))}, file
    )
    program = (
        "import sys\nfrom checkpoint.archive.torch_file import open_torch_file\n"
        f"open_torch_file({str(file)!r})\n"
        "assert not {'torch', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_pickle_of_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pickle.dump(Local(), buffer)
    with pytest.raises(ValueError, match=r"test_pickles\.Local"):
        load_pickle(buffer.getvalue(), "x")


class Local:
    """A class of the user's own program."""
