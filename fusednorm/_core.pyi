from contextvars import Token
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar, overload

class _DLPackArray(Protocol):
    def __dlpack__(self, *args: Any, **keywords: Any) -> Any: ...

class _CudaInterfaceArray(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

_Array: TypeAlias = _DLPackArray | _CudaInterfaceArray
# None, a cudaStream_t, or an object with __cuda_stream__, cuda_stream or ptr.
_Stream: TypeAlias = int | object | None

_X = TypeVar("_X", bound=_Array)
_Residual = TypeVar("_Residual", bound=_Array)
_Out = TypeVar("_Out", bound=_Array)
_ResidualOut = TypeVar("_ResidualOut", bound=_Array)

class _CpuInfo(TypedDict):
    path: str
    built: list[str]
    available: list[str]
    threading: Literal["openmp", "none"]
    num_threads: int

class _CudaDevice(TypedDict):
    name: str
    compute_capability: str
    multiprocessors: int

class _CudaInfo(TypedDict):
    built: bool
    available: bool
    reason: str
    runtime: str
    driver: str
    architectures: list[str]
    devices: list[_CudaDevice]

class _Info(TypedDict):
    version: str
    compiler: str
    cpu: _CpuInfo
    cuda: _CudaInfo

# out_dtype is any spelling of float32, float16 or bfloat16: a name, a NumPy, ml_dtypes, torch or JAX dtype.
@overload
def rms_norm(
    x: _X,
    weight: _Array | None = None,
    eps: float = 1e-06,
    *,
    weight_offset: float = 0.0,
    cast_x_before_out_mul: bool = False,
    out: None = None,
    out_dtype: Any = None,
    stream: _Stream = None,
) -> _X: ...
@overload
def rms_norm(
    x: _Array,
    weight: _Array | None = None,
    eps: float = 1e-06,
    *,
    weight_offset: float = 0.0,
    cast_x_before_out_mul: bool = False,
    out: _Out,
    out_dtype: Any = None,
    stream: _Stream = None,
) -> _Out: ...
@overload
def fused_add_rmsnorm(
    x: _X,
    residual: _Residual,
    weight: _Array | None = None,
    eps: float = 1e-06,
    *,
    post_residual_addition: _Array | None = None,
    weight_offset: float = 0.0,
    cast_x_before_out_mul: bool = False,
    round_sum: bool | Literal["after_variance"] = False,
    out: None = None,
    residual_out: None = None,
    out_dtype: Any = None,
    inplace: bool = True,
    stream: _Stream = None,
) -> tuple[_X, _Residual]: ...
@overload
def fused_add_rmsnorm(
    x: _Array,
    residual: _Residual,
    weight: _Array | None = None,
    eps: float = 1e-06,
    *,
    post_residual_addition: _Array | None = None,
    weight_offset: float = 0.0,
    cast_x_before_out_mul: bool = False,
    round_sum: bool | Literal["after_variance"] = False,
    out: _Out,
    residual_out: None = None,
    out_dtype: Any = None,
    inplace: bool = True,
    stream: _Stream = None,
) -> tuple[_Out, _Residual]: ...
@overload
def fused_add_rmsnorm(
    x: _X,
    residual: _Array,
    weight: _Array | None = None,
    eps: float = 1e-06,
    *,
    post_residual_addition: _Array | None = None,
    weight_offset: float = 0.0,
    cast_x_before_out_mul: bool = False,
    round_sum: bool | Literal["after_variance"] = False,
    out: None = None,
    residual_out: _ResidualOut,
    out_dtype: Any = None,
    inplace: bool = True,
    stream: _Stream = None,
) -> tuple[_X, _ResidualOut]: ...
@overload
def fused_add_rmsnorm(
    x: _Array,
    residual: _Array,
    weight: _Array | None = None,
    eps: float = 1e-06,
    *,
    post_residual_addition: _Array | None = None,
    weight_offset: float = 0.0,
    cast_x_before_out_mul: bool = False,
    round_sum: bool | Literal["after_variance"] = False,
    out: _Out,
    residual_out: _ResidualOut,
    out_dtype: Any = None,
    inplace: bool = True,
    stream: _Stream = None,
) -> tuple[_Out, _ResidualOut]: ...
@overload
def rms_norm_batch_invariant(
    input: _X,
    normalized_shape: int | list[int] | tuple[int, ...],
    weight: _Array | None = None,
    eps: float | None = None,
    *,
    out: None = None,
    stream: _Stream = None,
) -> _X: ...
@overload
def rms_norm_batch_invariant(
    input: _Array,
    normalized_shape: int | list[int] | tuple[int, ...],
    weight: _Array | None = None,
    eps: float | None = None,
    *,
    out: _Out,
    stream: _Stream = None,
) -> _Out: ...
@overload
def mm_dtype(
    a: _X,
    b: _Array,
    out_dtype: Any = None,
    *,
    bias: _Array | None = None,
    out: None = None,
    stream: _Stream = None,
) -> _X: ...
@overload
def mm_dtype(
    a: _Array,
    b: _Array,
    out_dtype: Any = None,
    *,
    bias: _Array | None = None,
    out: _Out,
    stream: _Stream = None,
) -> _Out: ...
def _linear(x: _X, gate_weight: _Array, out_dtype: Any = None, bias: _Array | None = None, /) -> _X: ...
def info() -> _Info: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def warmup(device: Any = None) -> None: ...
def get_weights_are_constant() -> bool: ...
def set_weights_are_constant(constant: bool, /) -> None: ...
def _promise_weights(constant: bool, /) -> Token[bool]: ...
def _force_cpu_path(name: str | None, /) -> None: ...
def _force_cuda_schedule(name: str | None, /) -> None: ...
def _force_cuda_product(name: str | None, /) -> None: ...
