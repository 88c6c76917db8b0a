// The library's CUDA norms for bfloat16, with its own launcher. With -DFREE_ORDER the sum over a row is taken in the order
// that needs no agreement, as other kernels do it: a warp by shuffles, one sum a warp through shared memory, one sum a
// block to the others of a cluster. What a thread adds of its own, and all else, stays.
//
// nvcc -shared, the flags of tools/build_cuda.py, and csrc/cuda/*.c and csrc/status.c with it: see cuda_price.py
extern "C" {
#include "../csrc/norm_plan.h"
}
#include "../csrc/cuda/launch.h"
#include "../csrc/cuda/vector.cuh"

#ifdef FREE_ORDER
template <int THREADS, int BLOCKS, int ROWS, bool PAIRED>
FN_DEVICE void fold_freely(float v[ROWS], uint32_t rank, float (*sums)[THREADS], float *received, uint64_t *arrived);
#define FN_FOLD_ROWS fold_freely
#endif
#include "../csrc/cuda/rms_norm_bf16.cu"

#ifdef FREE_ORDER
// N is a power of two.
template <int N> FN_DEVICE float sum_of(const float *numbers) {
    float v[N];
    if constexpr (N < 4) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = numbers[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 four = *(const float4 *)(numbers + i);
            v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
    }
#pragma unroll
    for (int half = N / 2; half >= 1; half /= 2)
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            if (i < half) v[i] = fn_add(v[i], v[i + half]);
    return v[0];
}

#if __CUDA_ARCH__ >= 900
// numbers[rank] = v in every block of the cluster; by the first BLOCKS threads.
FN_DEVICE void send_one_to_cluster(float *numbers, uint64_t *arrived, uint32_t rank, uint32_t block, float v) {
    uint32_t there, barrier_there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(there)
                 : "r"(shared_address(numbers + rank)), "r"(block));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(barrier_there)
                 : "r"(shared_address(arrived)), "r"(block));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
                 "r"(__float_as_uint(v)), "r"(barrier_there)
                 : "memory");
}
#endif

// The shared memory that it is given, of the contract's fold, is left alone: its own is smaller and read by 16 bytes.
template <int THREADS, int BLOCKS, int ROWS, bool PAIRED>
FN_DEVICE void fold_freely(float v[ROWS], uint32_t rank, float (*)[THREADS], float *, uint64_t *arrived) {
    constexpr int WARPS = THREADS / FN_WARP, LANES = WARPS ? FN_WARP : THREADS;
#pragma unroll
    for (int i = 0; i < ROWS; i++) v[i] = fold_lanes<LANES, PAIRED>(v[i]);
    if constexpr (WARPS > 1) {
        __shared__ __align__(16) float of_warp[ROWS][WARPS < 4 ? 4 : WARPS];
        if (threadIdx.x % FN_WARP == 0)
#pragma unroll
            for (int i = 0; i < ROWS; i++) of_warp[i][threadIdx.x / FN_WARP] = v[i];
        if constexpr (BLOCKS == 1) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < ROWS; i++) v[i] = sum_of<WARPS>(of_warp[i]);
        } else {
#if __CUDA_ARCH__ >= 900
            __shared__ __align__(16) float of_block[BLOCKS];
            if (threadIdx.x == FN_WARP) // the barrier expects the contract's 8 numbers from each block
                asm volatile(
                    "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(arrived)),
                    "r"(BLOCKS * 7 * (int)sizeof(float))
                    : "memory");
            __syncthreads();
            if (threadIdx.x < BLOCKS)
                send_one_to_cluster(of_block, arrived, rank, threadIdx.x, sum_of<WARPS>(of_warp[0]));
            wait_for_cluster(arrived);
            v[0] = sum_of<BLOCKS>(of_block);
#endif
        }
    }
}
#endif

// What the library has for other dtypes and layouts is not timed here.
const fn_norm_kernels fn_norm_kernels_f32 = {}, fn_norm_kernels_f16 = {}, fn_norm_kernels_bf16_f32 = {},
                      fn_norm_kernels_any = {};
// The launcher asks it for what it was compiled for.
__global__ void never_launched(void) {}
const void *const fn_norm_strided_kernel = (const void *)never_launched;
#define DTYPE_ROW(symbol, name, bytes, code, eps) {name, bytes, code, eps},
extern const fn_dtype_info fn_dtypes[FN_DTYPE_COUNT] = {FN_FOR_EACH_DTYPE(DTYPE_ROW)};

// The launcher warms up products too, which are not here.
extern "C" fn_status fn_mm_warmup(const void *) { return FN_OK; }

// Queues a norm of contiguous rows; with a residual, which becomes the sum, the fused one. NULL, or why not.
extern "C" __attribute__((visibility("default"))) const char *price_norm(char *x, char *residual, char *weight,
                                                                         char *out, int64_t rows, int64_t columns,
                                                                         float eps, int device, void *stream) {
    fn_norm_plan plan = {};
    char *const data[FN_OPERANDS] = {x, residual, nullptr, out, residual, weight};
    for (int i = 0; i < FN_OPERANDS; i++) plan.operand[i] = {data[i], 2, FN_BFLOAT16};
    for (int i = 0; i < FN_ROW_OPERANDS; i++) plan.leading_stride[i][0] = 2 * columns;
    plan.rows = plan.leading_shape[0] = rows;
    plan.columns = columns;
    plan.contiguous = true;
    plan.eps = eps;
    plan.device_id = device;
    plan.stream = stream;
    plan.leading_ndim = 1;
    return fn_norm_run_cuda(&plan) == FN_OK ? nullptr : fn_error_text();
}
