/* docs.h: the docstrings of the compiled functions. The line before `--` is the signature that help() shows. */
#ifndef FUSEDNORM_DOCS_H
#define FUSEDNORM_DOCS_H

#define DOC_ARRAYS                                                                                                     \
    "Arrays may be numpy.ndarray (bfloat16 through ml_dtypes), torch.Tensor, cupy.ndarray, jax.Array or anything\n"    \
    "with __dlpack__ or __cuda_array_interface__, all in CPU memory or all on one CUDA device; each is float32,\n"     \
    "float16 or bfloat16, independently, with any strides and alignment. A new array is C-contiguous and belongs\n"    \
    "to x's framework (residual_out: residual's); where that can make none, as for arrays with nothing but\n"          \
    "__cuda_array_interface__, give the outputs. On CUDA the work is queued, and the call does not wait.\n"

#define DOC_ERRORS                                                                                                                      \
    "Raises TypeError (not an array, an unsupported dtype), ValueError (shapes, ranges, overlapping outputs,\n"                         \
    "arrays on two devices, stream for CPU arrays), BufferError (a read-only output, as a jax.Array is) or\n"                           \
    "RuntimeError (a tensor that requires grad in grad mode, a CUDA array where CUDA is not built or not there,\n"                      \
    "a CUDA error, a wrong FUSEDNORM_CPU, FUSEDNORM_CUDA_SCHEDULE or FUSEDNORM_CUDA_PRODUCT). It names the argument, where one is at\n" \
    "fault, and nothing has been written then, unless CUDA itself failed.\n"

#define DOC_RMS_NORM                                                                                                   \
    "rms_norm($module, x, weight=None, eps=1e-06, *, weight_offset=0.0, cast_x_before_out_mul=False, "                 \
    "out=None, out_dtype=None, stream=None)\n--\n\n"                                                                   \
    "x / sqrt(mean(x**2, -1) + eps) * (weight + weight_offset), in float32, rounded once.\n\n"                         \
    "x: (..., H), H >= 1. weight: (H,), or None for no multiplication. eps >= 0.\n"                                    \
    "weight_offset: added to the weight in float32 (Gemma: 1.0).\n"                                                    \
    "cast_x_before_out_mul: round the normalised value to x's dtype before the weight (Hugging Face Llama).\n"         \
    "out: array of x's shape to write, which may be x itself. out_dtype: of a new result; x's by default.\n"           \
    "stream: for CUDA arrays alone: queue the work on this stream (a cudaStream_t as an integer, or an object with\n"  \
    "__cuda_stream__, cuda_stream or ptr); its order against the frameworks' current streams is then the caller's.\n"  \
    "None: on the current stream of the first array's framework that has one; those of others are ordered with it.\n"  \
    "Returns out.\n\n" DOC_ARRAYS "\n"                                                                                 \
    "The bits of a row depend on its values, H, the dtypes and the options alone: not on the batch, strides,\n"        \
    "alignment, threads, processor or GPU. docs/numerics.md states every rounding.\n\n" DOC_ERRORS

#define DOC_FUSED_ADD_RMSNORM                                                                                          \
    "fused_add_rmsnorm($module, x, residual, weight=None, eps=1e-06, *, post_residual_addition=None, "                 \
    "weight_offset=0.0, cast_x_before_out_mul=False, round_sum=False, out=None, residual_out=None, "                   \
    "out_dtype=None, inplace=True, stream=None)\n--\n\n"                                                               \
    "s = x + residual (+ post_residual_addition); residual_out = s; out = rms_norm(s, weight, ...).\n\n"               \
    "x, residual, post_residual_addition: (..., H). weight: (H,), or None.\n"                                          \
    "round_sum: False normalises the float32 sum (FlashInfer); True rounds it to residual_out's dtype first\n"         \
    "(transformers, vLLM); 'after_variance' takes the variance from the float32 sum and normalises the rounded.\n"     \
    "inplace: True writes x and residual where out and residual_out are not given (FlashInfer's, SGLang's and\n"       \
    "vLLM's convention); False makes new arrays for those, and is the only form for JAX.\n"                            \
    "An output may be exactly its own input (out: x, residual_out: residual) and must not overlap anything else.\n"    \
    "eps, weight_offset, cast_x_before_out_mul, out_dtype, stream: as in rms_norm.\n"                                  \
    "Returns (out, residual_out).\n\n" DOC_ARRAYS "\n" DOC_ERRORS

#define DOC_RMS_NORM_BATCH_INVARIANT                                                                                   \
    "rms_norm_batch_invariant($module, input, normalized_shape, weight=None, eps=None, *, out=None, "                  \
    "stream=None)\n--\n\n"                                                                                             \
    "rms_norm with the signature of aten::rms_norm.\n\n"                                                               \
    "input: (..., H). normalized_shape: H, (H,) or [H]; other dimensions cannot be normalised.\n"                      \
    "weight None means ones. eps None means finfo(input.dtype).eps, as PyTorch documents (some of its versions\n"      \
    "use float32's eps for float16 and bfloat16: pass eps where that matters).\n"                                      \
    "Returns out.\n\n" DOC_ARRAYS "\n" DOC_ERRORS

#define DOC_MM_DTYPE                                                                                                     \
    "mm_dtype($module, a, b, out_dtype=None, *, bias=None, out=None, stream=None)\n--\n\n"                               \
    "a @ b + bias with another dtype than a's: multiplied and added in float32, rounded once, at the end.\n\n"           \
    "a: (M, K). b: (K, N), such as weight.T, which is not copied. bias: (N,), or None. Any of M, N and K may be 0.\n"    \
    "out_dtype: of a new result; a's by default. out: array of shape (M, N) to write, which overlaps no other.\n"        \
    "stream: as in rms_norm. Returns out, new or given.\n\n"                                                             \
    "Arrays may be of every kind that rms_norm takes, with any strides and alignment, each float32, float16 or\n"        \
    "bfloat16, independently. A new array is C-contiguous and belongs to a's framework.\n\n"                             \
    "The bits of a row of the result depend on the row's values, b, the bias and the dtypes alone: not on M, strides,\n" \
    "alignment, threads or instruction set. float32 is multiplied as float32, never as TF32. A GPU's bits are others\n"  \
    "than the CPU's. docs/numerics.md states the order of the additions.\n\n" DOC_ERRORS

#define DOC_LINEAR                                                                                                     \
    "_linear($module, x, gate_weight, out_dtype=None, bias=None, /)\n--\n\n"                                           \
    "mm_dtype over x's last dimension, x: (..., K), with gate_weight (N, K) transposed. Returns (..., N)."

#define DOC_INFO                                                                                                       \
    "info($module, /)\n--\n\n"                                                                                         \
    "What was built and what this machine can run: a new dict with version, compiler, cpu (path, built,\n"             \
    "available, threading, num_threads) and cuda (built, available, reason, runtime, driver, architectures, devices)."

#define DOC_GET_NUM_THREADS                                                                                            \
    "get_num_threads($module, /)\n--\n\n"                                                                              \
    "Threads that one large call on the CPU may use. Starts at OMP_NUM_THREADS or the number of processors."

#define DOC_SET_NUM_THREADS                                                                                            \
    "set_num_threads($module, n, /)\n--\n\n"                                                                           \
    "Sets the threads, n >= 1, that one large call on the CPU may use, for the whole process. No bit depends on it."

#define DOC_WARMUP                                                                                                     \
    "warmup($module, device=None)\n--\n\n"                                                                             \
    "Loads every kernel on a CUDA device (a number, 'cuda:1', a torch.device; None: the current one), so that the\n"   \
    "first calls, and the capture of a CUDA graph, find them loaded. RuntimeError where CUDA is not built or not there."

#define DOC_GET_WEIGHTS_ARE_CONSTANT                                                                                   \
    "get_weights_are_constant($module, /)\n--\n\n"                                                                     \
    "What set_weights_are_constant set for the process."

#define DOC_SET_WEIGHTS_ARE_CONSTANT                                                                                   \
    "set_weights_are_constant($module, constant, /)\n--\n\n"                                                           \
    "The caller's promise, for the whole process where no weights_are_constant() says otherwise, that no kernel\n"     \
    "which may still be running writes a weight: a norm may then read it before the preceding kernel has finished.\n"  \
    "A captured graph keeps the promise that it was captured with."

#define DOC_PROMISE_WEIGHTS                                                                                            \
    "_promise_weights($module, constant, /)\n--\n\n"                                                                   \
    "Sets the promise of weights_are_constant() in this context and returns the token that undoes it."

#define DOC_FORCE_CUDA_SCHEDULE                                                                                        \
    "_force_cuda_schedule($module, name, /)\n--\n\n"                                                                   \
    "For tests: use the named CUDA schedule wherever it can run; None: FUSEDNORM_CUDA_SCHEDULE, or the policy."

#define DOC_FORCE_CUDA_PRODUCT                                                                                         \
    "_force_cuda_product($module, name, /)\n--\n\n"                                                                    \
    "For tests: use the named CUDA kernel for products whose K is in parts; None: FUSEDNORM_CUDA_PRODUCT, or the policy."

#define DOC_FORCE_CPU_PATH                                                                                             \
    "_force_cpu_path($module, name, /)\n--\n\n"                                                                        \
    "For tests: run the named CPU path from now on; None returns to the automatic choice."

#endif
