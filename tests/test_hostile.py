"""Arrays that lie, raise or return junk: reported exactly, with nothing written, and released exactly once."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Iterator
from typing import Any

import array_makers as make
import numpy as np
import pytest
from array_makers import f32, stub
from wrong_calls import SLOTS, B, F, R

import fusednorm

KINDS = {  # the ways of DLPack into the library
    "borrowed": ("Stub", {}),
    "managed": ("StubWithoutBorrow", {}),
    "capsule": ("Capsule", {}),
    "legacy capsule": ("Capsule", {"legacy": True}),
    "old capsule": ("Capsule", {"legacy": True, "refuses_max_version": True}),
}
SLOT_IDS = ["-".join(slot) for slot in SLOTS]


@pytest.fixture(autouse=True)
def producer() -> Iterator[Any]:
    """The stub module with its counters at 0; afterwards everything that it lent must be back, once."""
    module = make.stub_module()
    module.reset()
    yield module
    module.set_failures(0, 0)
    if module.counters()["outstanding"] or module.counters()["capsules"]:
        gc.collect()
    counters = module.counters()
    assert counters["outstanding"] == 0, counters
    assert counters["deleted_twice"] == 0, counters
    assert counters["capsules"] == counters["capsules_used"] + counters["capsules_unused"], counters
    assert counters["allocated"] == counters["freed"], counters


def make_stub(kind: str, *shape: int, **attributes: Any) -> Any:
    type_name, given = KINDS[kind]
    return stub(type_name, *shape, **{"buffer": f32(*shape), **given, **attributes})


def arguments_of(function: str, slot: str, value: Any) -> dict[str, Any]:
    """A right call but for `value` in its slot."""
    first = "input" if function == B else "x"
    values: dict[str, Any] = {first: f32(4, 8), "weight": f32(8), "out": f32(4, 8)}
    if function == F:
        values |= {"residual": f32(4, 8), "post_residual_addition": f32(4, 8), "residual_out": f32(4, 8)}
    if function == B:
        values["normalized_shape"] = [8]
    return values | {slot: value}


def shape_of(slot: str) -> tuple[int, ...]:
    return (8,) if slot == "weight" else (4, 8)


def expect(exception: type[BaseException], call: Callable[[], Any], *words: str) -> BaseException:
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    for word in words:
        assert word in str(caught.value), f"no {word!r} in: {caught.value}"
    return caught.value


# ---- lies ----

MANY = 2**31 - 1
# Where there is CUDA, the other arrays are still on the CPU.
NOT_THERE = (ValueError, "on cuda:0") if fusednorm.info()["cuda"]["available"] else (RuntimeError, "CUDA")
LIES: list[tuple[str, dict[str, Any], type[BaseException], str]] = [
    ("ndim -1", {"ndim": -1}, BufferError, "dimensions"),
    ("ndim 65", {"ndim": 65}, BufferError, "dimensions"),
    ("ndim 2^31-1", {"ndim": MANY}, BufferError, "dimensions"),
    ("ndim -2^31", {"ndim": -MANY - 1}, BufferError, "dimensions"),
    ("ndim 0", {"ndim": 0}, ValueError, ""),
    ("no shape", {"null_shape": True}, BufferError, "shape"),
    ("no memory", {"null_data": True}, TypeError, "memory"),
    ("no bits", {"bits": 0}, TypeError, "float32"),
    ("33 bits", {"bits": 33}, TypeError, "float32"),
    ("no lanes", {"lanes": 0}, TypeError, "float32"),
    ("4 lanes", {"lanes": 4}, TypeError, "float32"),
    ("code 200", {"code": 200}, TypeError, "float32"),
    ("cuda", {"device_type": 2}, *NOT_THERE),
    ("managed cuda", {"device_type": 13}, *NOT_THERE),
    ("metal", {"device_type": 8}, ValueError, "device"),
    ("device 0", {"device_type": 0}, ValueError, "device"),
    ("device -1", {"device_type": -1}, ValueError, "device"),
]


@pytest.mark.parametrize("slot", ["x", "weight", "out"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie[0])
def test_a_lie_is_found(lie: Any, kind: str, slot: str) -> None:
    _, attributes, exception, word = lie
    values = arguments_of(R, slot, make_stub(kind, *shape_of(slot), **attributes))
    honest = [value for value in values.values() if isinstance(value, np.ndarray)]
    before = [value.tobytes() for value in honest]
    expect(exception, lambda: fusednorm.rms_norm(**values), "rms_norm: ", slot, word)
    assert [value.tobytes() for value in honest] == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((-4, 8), None), ((4, -8), None), ((2**40, 2**40), (0, 0)), ((1, 2**62), (0, 0)), ((4, 8), (2**62, 1))],
    ids=str,
)
def test_impossible_sizes(kind: str, shape: tuple[int, ...], strides: tuple[int, ...] | None, producer: Any) -> None:
    type_name, attributes = KINDS[kind]
    x = getattr(producer, type_name)(bytearray(128), "float32", shape, strides)
    for name, value in attributes.items():
        setattr(x, name, value)
    with pytest.raises((BufferError, ValueError), match=r"^rms_norm: "):
        fusednorm.rms_norm(x, out=x)
    with pytest.raises((BufferError, ValueError), match=r"^rms_norm: "):
        fusednorm.rms_norm(f32(4, 8), out=x)


@pytest.mark.parametrize("major", [0, 2, 2**32 - 1])
@pytest.mark.parametrize("kind", ["managed", "capsule"])
def test_another_major_version_is_released_unread(kind: str, major: int, producer: Any) -> None:
    x = make_stub(kind, 4, 8, major=major)
    expect(BufferError, lambda: fusednorm.rms_norm(x, out=f32(4, 8)), "rms_norm: x ", str(major))
    assert producer.counters()["deleted"] == 1


# ---- what works ----


def right_bits(x: Any, **options: Any) -> bytes:
    return fusednorm.rms_norm(x, f32(8), out=np.empty_like(x), **options).tobytes()


@pytest.mark.parametrize(
    "attributes", [{}, {"null_strides": True}, {"shared_shape": True}, {"flags": 1}, {"flags": 2}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_honest_input(kind: str, attributes: dict[str, Any], producer: Any) -> None:
    x, weight = make_stub(kind, 4, 8, **attributes), make_stub(kind, 8, **attributes)
    out = fusednorm.rms_norm(x, weight, out=f32(4, 8))
    assert out.tobytes() == right_bits(f32(4, 8))
    counters = producer.counters()
    assert counters["borrowed"] == (2 if kind == "borrowed" else 0)
    assert counters["exported"] == counters["deleted"]


@pytest.mark.parametrize("kind", KINDS)
def test_honest_output(kind: str) -> None:
    memory = f32(5, 8)
    out = stub(KINDS[kind][0], 4, 8, buffer=memory, **KINDS[kind][1], byte_offset=32)
    assert fusednorm.rms_norm(f32(4, 8), f32(8), out=out) is out
    assert memory[1:].tobytes() == right_bits(f32(4, 8))
    assert memory[0].tobytes() == f32(8).tobytes(), "the byte offset was not added"


@pytest.mark.parametrize("flags", [1, 2])
def test_an_output_that_cannot_be_written(flags: int) -> None:
    """Read-only, or a copy that the producer made: what is written to it never reaches the array."""
    out = make_stub("capsule", 4, 8, flags=flags)
    expect(BufferError, lambda: fusednorm.rms_norm(f32(4, 8), out=out), "rms_norm: out ")


def test_a_capsule_is_renamed_once_and_released_once(producer: Any) -> None:
    for legacy, name in ((False, "used_dltensor_versioned"), (True, "used_dltensor")):
        x = make_stub("capsule", 4, 8, legacy=legacy)
        kept = [x.capsule()]
        x.hook = lambda array, keywords, kept=kept: kept[0]
        fusednorm.rms_norm(x, out=f32(4, 8))
        assert producer.capsule_name(kept[0]) == name
        expect(BufferError, lambda x=x: fusednorm.rms_norm(x, out=f32(4, 8)), "rms_norm: x", name)
    assert producer.counters()["deleted"] == 2


def test_one_capsule_for_two_arguments() -> None:
    x, residual = make_stub("capsule", 4, 8), make_stub("capsule", 4, 8)
    kept = [x.capsule()]
    x.hook = residual.hook = lambda array, keywords: kept[0]
    out = f32(4, 8)
    expect(BufferError, lambda: fusednorm.fused_add_rmsnorm(x, residual, out=out, residual_out=f32(4, 8)), "residual")


def test_a_null_deleter_is_not_called(producer: Any) -> None:
    for legacy in (False, True):
        x = make_stub("capsule", 4, 8, null_deleter=True, legacy=legacy)
        fusednorm.rms_norm(x, out=f32(4, 8))
    assert producer.counters()["null_deleters"] == 2


def test_max_version_is_offered() -> None:
    seen: list[Any] = []
    x = make_stub("capsule", 4, 8, hook=lambda array, keywords: seen.append(keywords))
    fusednorm.rms_norm(x, out=f32(4, 8))
    assert [keywords["max_version"][0] for keywords in seen] == [1]
    assert seen[0].get("stream") is None


# ---- what raises ----


class ForeignError(Exception):
    pass


def raising(error: BaseException) -> Callable[..., Any]:
    def hook(*_: Any) -> Any:
        raise error

    return hook


@pytest.mark.parametrize(("function", "slot"), SLOTS, ids=SLOT_IDS)
def test_a_foreign_exception_travels_unchanged(function: str, slot: str) -> None:
    error = ForeignError("mine")
    values = arguments_of(function, slot, make_stub("capsule", *shape_of(slot), hook=raising(error)))
    before = {name: value.tobytes() for name, value in values.items() if hasattr(value, "tobytes")}
    assert expect(ForeignError, lambda: getattr(fusednorm, function)(**values)) is error
    assert {name: value.tobytes() for name, value in values.items() if hasattr(value, "tobytes")} == before


RAISED = [TypeError, AttributeError, StopIteration, MemoryError, KeyboardInterrupt, SystemExit]
RAISING = [(method, type_) for method in ("__dlpack__", "__dlpack_device__") for type_ in RAISED]
RAISING.remove(("__dlpack_device__", AttributeError))  # as if the method were absent, which is allowed


@pytest.mark.parametrize(("method", "type_"), RAISING)
def test_any_exception_travels_unchanged(method: str, type_: type[BaseException]) -> None:
    error = type_("mine")
    device = raising(error) if method == "__dlpack_device__" else lambda self: (1, 0)
    capsule = (
        raising(error) if method == "__dlpack__" else lambda self, **keywords: make_stub("capsule", 4, 8).capsule()
    )
    x = type("X", (), {"__dlpack__": capsule, "__dlpack_device__": device})()
    assert expect(type_, lambda: fusednorm.rms_norm(x, out=f32(4, 8))) is error


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise LookupError("no text")

    __repr__ = __str__


@pytest.mark.parametrize("kind", ["borrowed", "managed"])
def test_a_failing_exchange_api(kind: str) -> None:
    """With a reason: it is quoted. Without one, against the standard: an exception all the same, no SystemError."""

    def call(**attributes: Any) -> Callable[[], Any]:
        return lambda: fusednorm.rms_norm(make_stub(kind, 4, 8, **attributes), out=f32(4, 8))

    error = expect(TypeError, call(fail=1), "rms_norm: x ", "fails on demand")
    assert isinstance(error.__cause__, LookupError)
    expect(BufferError, call(fail=2), "rms_norm: x ")
    with pytest.raises((TypeError, LookupError)):
        call(hook=raising(UnprintableError()))()
    for passed_on in (KeyboardInterrupt(), MemoryError()):
        assert expect(type(passed_on), call(hook=raising(passed_on))) is passed_on


@pytest.mark.parametrize("kind", ["managed", "capsule", "legacy capsule"])
def test_a_deleter_that_runs_python_code_while_an_error_travels(kind: str, producer: Any) -> None:
    deleted: list[int] = []
    x = make_stub(kind, 4, 8, on_delete=lambda: deleted.append(1) or fusednorm.rms_norm(f32(4, 8), out=f32(4, 8)))
    expect(ValueError, lambda: fusednorm.rms_norm(x, f32(9), out=f32(4, 8)), "weight", "(9,)")
    assert len(deleted) == producer.counters()["exported"] == 1


def test_junk_instead_of_a_capsule() -> None:
    for junk in (None, 1, "dltensor", object(), [], type, f32(4, 8), make_stub("capsule", 4, 8)):
        x = type(
            "X", (), {"__dlpack__": lambda self, junk=junk, **keywords: junk, "__dlpack_device__": lambda self: (1, 0)}
        )()
        expect(TypeError, lambda x=x: fusednorm.rms_norm(x, out=f32(4, 8)), "rms_norm: x", "capsule")
    for name in ("", "dltensor2", "DLTENSOR", "dltensor_versioned ", "\N{SNOWMAN}"):
        x = make_stub("capsule", 4, 8, capsule_name=name)
        expect(BufferError, lambda x=x: fusednorm.rms_norm(x, out=f32(4, 8)), "rms_norm: x", f'"{name}"')


@pytest.mark.parametrize("device", [None, (1,), (1, 0, 0), [1, 0], "10", ("1", 0), (2**70, 0), (1.0, 0), ()], ids=str)
def test_junk_instead_of_a_device(device: Any) -> None:
    x = type("X", (), {"__dlpack__": make_stub("capsule", 4, 8).capsule, "__dlpack_device__": lambda self: device})()
    with pytest.raises((TypeError, ValueError)):
        fusednorm.rms_norm(x, out=f32(4, 8))


class RaisingMeta(type):
    def __getattribute__(cls, name: str) -> Any:
        if "dlpack" in name:
            raise ForeignError(name)
        return super().__getattribute__(name)


class RaisingGetattr:
    def __getattr__(self, name: str) -> Any:
        raise ForeignError(name)


def test_odd_types() -> None:
    capsule = make_stub("capsule", 4, 8)
    instance = type("OnTheInstance", (), {})()
    instance.__dlpack__ = capsule.capsule
    expect(TypeError, lambda: fusednorm.rms_norm(instance, out=f32(4, 8)), "rms_norm: x ", "OnTheInstance")
    expect(TypeError, lambda: fusednorm.rms_norm(RaisingGetattr(), out=f32(4, 8)), "rms_norm: x ", "RaisingGetattr")
    expect(ForeignError, lambda: fusednorm.rms_norm(RaisingMeta("X", (), {})(), out=f32(4, 8)), "dlpack")
    with pytest.raises(TypeError):
        fusednorm.rms_norm(type("X", (), {"__dlpack__": None})(), out=f32(4, 8))
    for table in (None, 5, datetime.datetime_CAPI, object()):  # not a table: such a type may still have __dlpack__
        x = type("X", (type(capsule),), {"__dlpack_c_exchange_api__": table})(f32(4, 8), "float32", (4, 8))
        assert fusednorm.rms_norm(x, f32(8), out=f32(4, 8)).tobytes() == right_bits(f32(4, 8))


def test_tables_of_other_versions() -> None:
    assert fusednorm.rms_norm(
        stub("StubChained", 4, 8, buffer=f32(4, 8)), f32(8), out=f32(4, 8)
    ).tobytes() == right_bits(f32(4, 8))
    for name in ("StubFuture", "StubMisnamed"):  # no table that is understood, and no __dlpack__
        expect(TypeError, lambda name=name: fusednorm.rms_norm(stub(name, 4, 8), out=f32(4, 8)), "rms_norm: x ", name)


# ---- results in the producer's own type ----


@pytest.mark.parametrize("kind", ["borrowed", "managed"])
def test_results_are_allocated_by_the_producer(kind: str, producer: Any) -> None:
    x = make_stub(kind, 4, 8)
    out = fusednorm.rms_norm(x, f32(8))
    assert isinstance(out, producer.Stub)
    assert (out.shape, out.tobytes()) == ((4, 8), right_bits(f32(4, 8)))
    results = fusednorm.fused_add_rmsnorm(x, make_stub(kind, 4, 8), inplace=False, out_dtype="float16")
    assert [(result.shape, result.bits) for result in results] == [((4, 8), 16), ((4, 8), 32)]
    assert np.frombuffer(results[1].tobytes(), np.float32).tobytes() == (2 * f32(4, 8)).tobytes()


@pytest.mark.parametrize(
    ("allocator", "adopter", "exception", "word"),
    [
        (1, 0, RuntimeError, "fails on demand"),
        (2, 0, RuntimeError, "x"),
        (0, 1, LookupError, ""),
        (0, 2, RuntimeError, "x"),
    ],
)
def test_an_allocation_that_fails(allocator: int, adopter: int, exception: Any, word: str, producer: Any) -> None:
    x, residual = make_stub("borrowed", 4, 8), make_stub("managed", 4, 8)
    producer.set_failures(allocator, adopter)
    expect(exception, lambda: fusednorm.rms_norm(x, f32(8)), word)
    expect(exception, lambda: fusednorm.fused_add_rmsnorm(x, residual, inplace=False), word)
