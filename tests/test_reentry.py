"""Python code that runs in the middle of a call: it calls back, changes the other arguments, or frees their memory.

What could end the process runs in a child process, whose exit status is checked.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import array_makers as make
import numpy as np
import pytest
from array_makers import f32, stub

import fusednorm

ROWS, COLUMNS = 4, 8


@pytest.fixture(autouse=True)
def producer() -> Iterator[Any]:
    module = make.stub_module()
    module.reset()
    yield module
    module.set_failures(0, 0)
    gc.collect()
    counters = module.counters()
    assert counters["outstanding"] == 0, counters
    assert counters["deleted_twice"] == 0, counters


def run_python(code: str, *arguments: str, seconds: int = 120) -> str:
    """Runs `code` in a child process with the folder of the tests on its path; gives what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def expected(x: Any, weight: Any) -> bytes:
    return fusednorm.rms_norm(x, weight, out=np.empty_like(x)).tobytes()


# ---- calling back ----


@pytest.mark.parametrize("type_name", ["Stub", "StubWithoutBorrow", "Capsule"])
def test_a_call_inside_a_call(type_name: str) -> None:
    """The inner call uses other shapes, other errors and the outer call's own arrays; both results stay right."""
    x = stub(type_name, ROWS, COLUMNS, buffer=f32(ROWS, COLUMNS))
    weight, out, inner = f32(COLUMNS), f32(ROWS, COLUMNS), []

    def hook(array: Any, _: Any) -> None:
        array.hook = None
        with pytest.raises(ValueError, match=r"\(3,\)"):
            fusednorm.rms_norm(f32(2, 5), f32(3))
        inner.append(fusednorm.rms_norm(f32(7, 16), f32(16)).tobytes())
        inner.append(fusednorm.rms_norm(array, weight, out=f32(ROWS, COLUMNS)).tobytes())
        with pytest.raises(TypeError, match="fused_add_rmsnorm: x"):
            fusednorm.fused_add_rmsnorm("x", array)

    x.hook = hook
    assert fusednorm.rms_norm(x, weight, out=out) is out
    right = expected(f32(ROWS, COLUMNS), weight)
    assert out.tobytes() == right
    assert inner == [expected(f32(7, 16), f32(16)), right]


def test_an_error_inside_does_not_change_the_outer_error() -> None:
    def hook(*_: Any) -> None:
        with pytest.raises(ValueError, match="rms_norm: weight"):
            fusednorm.rms_norm(f32(2, 5), f32(3))

    x = stub("Capsule", ROWS, COLUMNS, hook=hook)
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(9,\).*\(8,\)"):
        fusednorm.rms_norm(x, f32(9), out=f32(ROWS, COLUMNS))


@pytest.mark.parametrize("type_name", ["Stub", "Capsule"])
def test_endless_recursion_is_an_exception(type_name: str) -> None:
    code = """if True:
        import sys, numpy, array_makers, fusednorm
        x = array_makers.stub(sys.argv[1], 4, 8)
        out = numpy.zeros((4, 8), "f4")
        def hook(array, keywords):
            fusednorm.rms_norm(x, out=out)
        x.hook = hook
        try:
            fusednorm.rms_norm(x, out=out)
        except (RecursionError, TypeError) as error:
            assert "recursion" in str(error), str(error)[-200:]
            print("survived")
        counters = array_makers.stub_module().counters()
        assert counters["outstanding"] == 0, counters
    """
    assert run_python(code, type_name) == "survived\n"


# ---- scalars and names that run code ----


class Number:
    """A number whose conversion runs `action` first."""

    def __init__(self, action: Callable[[], Any], value: Any = 1e-6) -> None:
        self.action, self.value = action, value

    def __float__(self) -> Any:
        self.action()
        return self.value

    def __index__(self) -> Any:
        self.action()
        return self.value


def fail(error: BaseException) -> Callable[[], Any]:
    def action() -> None:
        raise error

    return action


def test_numbers_that_run_code() -> None:
    x, out = f32(ROWS, COLUMNS), f32(ROWS, COLUMNS)
    error = LookupError("mine")
    for name in ("eps", "weight_offset"):
        with pytest.raises(LookupError) as caught:
            fusednorm.rms_norm(x, f32(COLUMNS), out=out, **{name: Number(fail(error))})
        assert caught.value is error
        with pytest.raises(TypeError, match=f"rms_norm: {name}"):
            fusednorm.rms_norm(x, f32(COLUMNS), out=out, **{name: Number(int, "1")})
        fusednorm.rms_norm(x, f32(COLUMNS), out=out, **{name: Number(lambda: fusednorm.rms_norm(x, out=out), 0.0)})
    assert out.tobytes() == fusednorm.rms_norm(x, f32(COLUMNS)).tobytes()
    with pytest.raises(LookupError):
        fusednorm.set_num_threads(Number(fail(error)))


def test_a_normalized_shape_that_changes_while_it_is_read() -> None:
    shape: list[Any] = []
    shape.append(Number(shape.clear, COLUMNS))
    x = f32(ROWS, COLUMNS)
    try:
        result = fusednorm.rms_norm_batch_invariant(x, shape)
    except (ValueError, TypeError, RuntimeError):
        return
    assert result.tobytes() == fusednorm.rms_norm_batch_invariant(x, [COLUMNS]).tobytes()


def test_an_endless_normalized_shape_is_refused() -> None:
    code = """if True:
        import itertools, resource, numpy, fusednorm
        resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))  # what would read on for ever runs out of memory
        try:
            fusednorm.rms_norm_batch_invariant(numpy.ones((4, 8), "f4"), itertools.repeat(8))
        except TypeError as error:
            print(error)
    """
    assert "normalized_shape" in run_python(code)


class DtypeLike:
    def __init__(self, name: Any) -> None:
        self._name = name

    @property
    def name(self) -> Any:
        if isinstance(self._name, BaseException):
            raise self._name
        return self._name

    def __eq__(self, other: object) -> bool:
        raise LookupError("compared")

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        raise LookupError("printed")

    __repr__ = __str__


@pytest.mark.parametrize("name", [None, 5, "junk", "float32\0", "\ud800", LookupError("mine")], ids=ascii)
def test_an_out_dtype_that_runs_code(name: Any) -> None:
    with pytest.raises((TypeError, LookupError)):
        fusednorm.rms_norm(f32(ROWS, COLUMNS), out_dtype=DtypeLike(name))


def test_keyword_names_of_a_subclass_of_str() -> None:
    class Name(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            raise LookupError("compared")

        __hash__ = str.__hash__

    x = f32(ROWS, COLUMNS)
    assert fusednorm.rms_norm(x, **{Name("eps"): 0.5}).tobytes() == fusednorm.rms_norm(x, eps=0.5).tobytes()
    with pytest.raises(TypeError, match="epsilon"):
        fusednorm.rms_norm(x, **{Name("epsilon"): 0.5})


# ---- memory that goes away ----

FREEING = """if True:
    import sys, numpy, array_makers, fusednorm
    N = 1 << 20  # 4 MiB: a mapping of its own (see below), which is gone when it is freed, so that a late reader dies

    class Number:
        def __float__(self):
            action()
            return 0.5
        def __index__(self):
            action()
            return N
    class Dtype:
        @property
        def name(self):
            action()
            return "float32"
    class OldProducer:
        def __dlpack_device__(self):
            action()
            return (1, 0)
        def __dlpack__(self, **keywords):
            return capsule((1, N)).capsule()

    def capsule(shape, hook=None):  # of N elements in the memory of one
        array = array_makers.stub_module().Capsule(bytearray(4), "float32", shape, [0] * len(shape))
        array.hook = hook
        return array

    def hook(array, keywords):
        action()

    agents = {
        "eps": lambda: ("rms_norm", dict(eps=Number())),
        "weight_offset": lambda: ("rms_norm", dict(weight_offset=Number())),
        "weight": lambda: ("rms_norm", dict(weight=capsule((N,), hook))),
        "out_dtype": lambda: ("rms_norm", dict(out_dtype=Dtype())),
        "input": lambda: ("rms_norm_batch_invariant", dict(normalized_shape=[Number()])),
        "residual": lambda: ("fused_add_rmsnorm", dict(residual=capsule((1, N), hook))),
        "device": lambda: ("fused_add_rmsnorm", dict(residual=OldProducer())),
        "post": lambda: ("fused_add_rmsnorm", dict(post_residual_addition=capsule((1, N), hook))),
    }
    for victim in ("x", "weight", "out", "residual", "residual_out"):
        for agent, make in agents.items():
            function, options = make()
            if victim in options or (victim.startswith("residual") and function != "fused_add_rmsnorm"):
                continue
            arrays = {name: new(N if name == "weight" else (1, N)) for name in ("x", "weight", "out")}
            if function == "fused_add_rmsnorm":
                arrays |= {name: new((1, N)) for name in ("residual", "residual_out")}
            arguments = {**arrays, **options}
            if function == "rms_norm_batch_invariant":
                arguments["input"] = arguments.pop("x")
            def action():
                free(arrays[victim])
            print(agent, "frees", victim, end=": ", flush=True)
            try:
                getattr(fusednorm, function)(**arguments)
                print("the call was done first, or with what was left", flush=True)
            except (ValueError, TypeError, BufferError, RuntimeError) as error:
                print(type(error).__name__, error, flush=True)
"""


def test_a_freed_ndarray_is_not_read() -> None:
    makers = """if True:
        import numpy
        def new(shape):
            return numpy.zeros(shape, "f4")
        def free(array):
            array.resize(0, refcheck=False)
    """
    printed = run_python(f"{makers}\nexec({FREEING!r})")
    assert len(printed.splitlines()) >= 20, printed


def test_a_freed_tensor_is_not_read() -> None:
    make.torch()
    makers = """if True:
        import torch
        def new(shape):
            return torch.zeros(shape)
        def free(tensor):
            tensor.set_(torch.zeros(0))
    """
    printed = run_python(f"{makers}\nexec({FREEING!r})")
    assert len(printed.splitlines()) >= 20, printed


@pytest.mark.parametrize("change", [(2, 16), (1, 32), (32,), (8, 4)])
def test_a_shape_that_changes_in_the_middle(change: tuple[int, ...]) -> None:
    """Either the old shape or the new one, and never a mixture: the new one does not fit the residual."""
    x, out = f32(ROWS, COLUMNS), f32(ROWS, COLUMNS)

    def hook(*_: Any) -> None:
        x.resize(change, refcheck=False)

    residual = stub("Capsule", ROWS, COLUMNS, buffer=f32(ROWS, COLUMNS), hook=hook)
    before = out.tobytes()
    try:
        fusednorm.fused_add_rmsnorm(x, residual, out=out, residual_out=f32(ROWS, COLUMNS))
    except ValueError:
        assert out.tobytes() == before
    else:
        assert out.tobytes() == fusednorm.fused_add_rmsnorm(f32(4, 8), f32(4, 8))[0].tobytes()


def test_an_array_made_read_only_in_the_middle() -> None:
    out = f32(ROWS, COLUMNS)
    x = stub("Capsule", ROWS, COLUMNS, hook=lambda *_: setattr(out.flags, "writeable", False))
    with pytest.raises(BufferError, match="rms_norm: out is read-only"):
        fusednorm.rms_norm(x, out=out)


# ---- types and threads ----


def test_the_death_of_a_type_in_the_middle() -> None:
    """A type that the cache of types lets go calls back from a weak reference, with arrays of new types."""
    code = """if True:
        import gc, weakref, numpy, array_makers, fusednorm
        module = array_makers.stub_module()
        expected = fusednorm.rms_norm(numpy.ones((4, 8), "f4")).tobytes()
        calls, fresh = 0, []
        def use(type_):
            x = type_(numpy.ones((4, 8), "f4"), "float32", (4, 8))
            assert fusednorm.rms_norm(x, out=numpy.zeros((4, 8), "f4")).tobytes() == expected
        def died(_):
            global calls
            calls += 1
            for type_ in fresh:
                use(type_)
        references = []
        for i in range(600):
            new = type(f"T{i}", (module.Capsule if i % 2 else module.Stub,), {})
            fresh = [*fresh[-3:], new]
            references.append(weakref.ref(new, died))
            use(new)
            del new
            if i % 10 == 0:
                gc.collect()
        print(calls > 100)
    """
    assert run_python(code) == "True\n"


def test_many_threads(producer: Any) -> None:
    import time

    weight = f32(COLUMNS)
    right = expected(f32(ROWS, COLUMNS), weight)
    wrong: list[Any] = []

    def work(kind: str) -> None:
        hook = (lambda *_: time.sleep(0)) if kind == "Capsule" else None  # lets another thread in
        for _ in range(200):
            x = stub(kind, ROWS, COLUMNS, buffer=f32(ROWS, COLUMNS), hook=hook)
            if fusednorm.rms_norm(x, weight, out=f32(ROWS, COLUMNS)).tobytes() != right:
                wrong.append(kind)
            try:
                fusednorm.rms_norm(x, f32(9), out=f32(ROWS, COLUMNS))
                wrong.append("no error")
            except ValueError as error:
                if "weight has shape (9,)" not in str(error):
                    wrong.append(error)

    threads = [
        threading.Thread(target=work, args=(kind,)) for kind in ("Stub", "StubWithoutBorrow", "Capsule", "Capsule")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
