"""Reads PTX, nvcc's output before registers are assigned, and finds what is not one IEEE-754 operation.

Every rounded operation of PTX says so (`.rn`), and ptxas may neither fuse nor reorder such operations; what it may fuse
is a `mul.f32` or `add.f32` without a rounding. So the PTX shows which operations a kernel performs, whatever the GPU.

One thing is made of fused operations and approximations on purpose: __frsqrt_rn, 1/sqrt rounded correctly. It has no
instruction; nvcc makes it of this, where v is the operand, times 2^24 if it was subnormal:

    x = v with its exponent replaced so that x is in [0.5, 2): 1/sqrt(v) is then 1/sqrt(x) times a power of two
    a = rsqrt.approx.ftz(x)          within 2 ulp; nothing to flush, since x is normal
    b = a * a                        rounded
    c = fma(a, a, -b)                the rounding error of b, exactly
    d = fma(b, -x, 1)
    h = fma(c, -x, d)                1 - x * a * a, as if a * a had not been rounded
    a + a * h * (1/2 + 3/8 * h)      the next terms of the series, in fma(fma(3/8, h, 1/2), a * h, a)

If v is 0, negative, Inf or NaN, the answer is rsqrt.approx.ftz(v) itself: Inf, NaN, 0, NaN. That all of it is 1/sqrt
rounded to nearest is NVIDIA's promise, and tests on a GPU compare it with the CPU's for every non-negative float. Here,
each fma and each rsqrt.approx has to be one of these, operand by operand.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"


class Kernel:
    """The instructions of a function, and which of them define a register."""

    def __init__(self, body: str) -> None:
        self.instructions: list[Instruction] = []
        self.definitions: dict[str, list[Instruction]] = defaultdict(list)
        for statement in re.split(r"[;{}]", re.sub(r"^\s*[$\w]+:", "", body, flags=re.MULTILINE)):
            match = re.fullmatch(r"(?:@!?%?\w+\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement.strip(), re.DOTALL)
            if match and not statement.strip().startswith("."):
                operands = tuple(" ".join(word.split()) for word in re.split(r",(?![^\[(]*[\])])", match[2] or ""))
                self._add(Instruction(match[1], operands))

    def _add(self, instruction: Instruction) -> None:
        self.instructions.append(instruction)
        if instruction.words[0] not in ("st", "bra", "setp", "red", "bar", "call"):
            self.definitions[instruction.operands[0]].append(instruction)

    def count(self, opcode: str) -> int:
        return sum(re.fullmatch(opcode, instruction.opcode) is not None for instruction in self.instructions)

    def value(self, operand: str) -> str:
        """The constant that a register holds for certain, else the register; copies are followed."""
        made_by = self.definitions.get(operand, [])
        if len(made_by) == 1 and made_by[0].opcode in ("mov.f32", "mov.b32", "mov.u32", "mov.s32"):
            return self.value(made_by[0].operands[1])
        return operand

    def made_by(self, operand: str, opcode: str) -> tuple[str, ...] | None:
        """The inputs of the one instruction that makes this value, if it has that opcode."""
        made_by = self.definitions.get(self.value(operand), [])
        if len(made_by) != 1 or made_by[0].opcode != opcode:
            return None
        return tuple(map(self.value, made_by[0].operands[1:]))


def kernels(text: str) -> dict[str, Kernel]:
    """Each kernel and each function that was not inlined, by its name."""
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    pattern = r"^(?:\.\w+\s+)*\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*\(.*?\)[^;{]*^\{(.*?)^\}"
    return {name: Kernel(body) for name, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL)}


# ---- __frsqrt_rn ---------------------------------------------------------------------------------------------------

ONE, HALF, THREE_EIGHTHS = "0f3F800000", "0f3F000000", "0f3EC00000"
FMA, MUL, RSQRT = "fma.rn.f32", "mul.rn.f32", "rsqrt.approx.ftz.f32"


def _factors(operands: tuple[str, ...] | None, one: str) -> tuple[str, ...] | None:
    """What remains of the inputs of a product, or of an fma, when the factor `one` is taken away."""
    if operands is None or one not in operands[:2]:
        return None
    other = operands[1] if operands[0] == one else operands[0]
    return (other, *operands[2:])


def _expansion(kernel: Kernel, result: Instruction) -> list[str] | None:
    """The registers that __frsqrt_rn makes on its way if `result`, an fma, is its last operation."""
    left, right, a = map(kernel.value, result.operands[1:])
    seed = kernel.made_by(a, RSQRT)
    if seed is None or not _is_in_half_to_two(kernel, seed[0]):
        return None
    for series, correction in ((left, right), (right, left)):
        h = _factors(kernel.made_by(correction, MUL), a)
        if h is None or _factors(kernel.made_by(series, FMA), h[0]) != (THREE_EIGHTHS, HALF):
            continue
        for minus_x in kernel.made_by(h[0], FMA) or ():
            if kernel.made_by(minus_x, "neg.f32") != seed:
                continue
            c, d = _factors(kernel.made_by(h[0], FMA), minus_x) or ("", "")
            b, one = _factors(kernel.made_by(d, FMA), minus_x) or ("", "")
            a_a_minus_b = kernel.made_by(c, FMA) or ("", "", "")
            if (
                one == ONE
                and kernel.made_by(b, MUL) == (a, a)
                and a_a_minus_b[:2] == (a, a)
                and kernel.made_by(a_a_minus_b[2], "neg.f32") == (b,)
            ):
                return [result.operands[0], a, series, h[0], c, d]
    return None


def _is_in_half_to_two(kernel: Kernel, x: str) -> bool:
    """(bits & 0x00ffffff) | 0x3f000000: exponents 126 and 127, the sign bit clear."""
    bits = kernel.made_by(x, "mov.b32") or (x,)
    masked, exponent = kernel.made_by(bits[0], "or.b32") or ("", "")
    return exponent == "1056964608" and (kernel.made_by(masked, "and.b32") or ("", ""))[1] == "16777215"


def _is_special_case(kernel: Kernel, instruction: Instruction) -> bool:
    """Whether this rsqrt.approx takes what an expansion's range test, bits - 0x00800000 < 0x7f000000, keeps out."""
    for test in kernel.instructions:
        if (test.opcode, *test.operands[2:]) in (("setp.lt.u32", "2130706432"), ("setp.gt.u32", "2130706431")):
            bits, less = kernel.made_by(test.operands[1], "add.s32") or ("", "")
            operand = (kernel.made_by(bits, "mov.b32") or (bits,))[0]
            if less == "-8388608" and operand == kernel.value(instruction.operands[1]):
                return True
    return False


def expansions(kernel: Kernel) -> list[list[str]]:
    found = [_expansion(kernel, instruction) for instruction in kernel.instructions if instruction.opcode == FMA]
    return [registers for registers in found if registers]


# ---- the verdict ---------------------------------------------------------------------------------------------------

FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"}
NARROW = {"f16", "f16x2", "bf16", "bf16x2"}
ARITHMETIC = {"add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt", "rsqrt", "tanh", "ex2", "lg2", "sin", "cos"}


def _is_single_operation(instruction: Instruction) -> bool:
    base, *words = instruction.words
    if {"ftz", "approx", "full", "sat"} & set(words):
        return False
    if not FLOATS & set(words):
        return True
    if base in ("fma", "mad", "red", "atom", "mma", "wgmma"):
        return False
    if base in ARITHMETIC:
        return "rn" in words and not NARROW & set(words)
    # Widening is exact; narrowing rounds to nearest even.
    return base != "cvt" or not {"rz", "rm", "rp", "rs", "rna"} & set(words)


def violations(kernel: Kernel, products: str = "") -> list[str]:
    """The instructions that are neither one operation rounded to nearest even nor a part of __frsqrt_rn.

    `products` is a pattern of the opcodes with which a kernel of products multiplies and adds."""
    whole = expansions(kernel)
    allowed = {register for registers in whole for register in registers}
    found, special = [], 0
    for instruction in kernel.instructions:
        if _is_single_operation(instruction) or re.fullmatch(products, instruction.opcode):
            continue
        if instruction.opcode in (FMA, RSQRT) and instruction.operands[0] in allowed:
            continue
        if instruction.opcode == RSQRT and _is_special_case(kernel, instruction):
            special += 1
            continue
        found.append(str(instruction))
    if special > len(whole):
        found.append(f"{special} times rsqrt.approx of what the range test of {len(whole)} __frsqrt_rn kept out")
    return found
