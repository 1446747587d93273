"""A Numba type of 16 float32 lanes (LLVM `<16 x float>`), and its arithmetic: portable SIMD without a C compiler.

Numba leaves the loop over states scalar; with an explicit type LLVM lowers every operation to the widest registers of
the target: one AVX-512 register, two of AVX, four of SSE or NEON. Memory is addressed as (address, element index), the
address a plain int64, so that strided views need no flattening and a call from Python costs no array unboxing.
"""
# ruff: noqa: ARG001, ARG005 - Numba reads the arity of an intrinsic from its signature

import operator
import struct
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from vim_kernels.constants import LOG2E

LANES = 16
_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I16 = ir.IntType(16)
_FLOATS = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(_I16, LANES)


def _intrinsic(typed: Callable) -> Callable[..., Any]:
    """Numba's decorator with a type: what it returns takes all arguments but the context."""
    return intrinsic(typed)


class Vector(types.Type):
    """Sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="Vector16f")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, frontend_type) -> None:
        super().__init__(manager, frontend_type, _FLOATS)


def _round32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _bits(value: float) -> int:
    return struct.unpack("i", struct.pack("f", value))[0]


def _const(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [_round32(value)] * LANES)


def _int_const(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Type]):
    declared = builder.module.globals.get(name)
    return declared or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


class Target:
    """What the compiled-for CPU can do, from the features that Numba hands to LLVM (and keys its cache with)."""

    def __init__(self, context) -> None:
        triple, _, features = context.codegen().magic_tuple()
        enabled = set(features.split(","))
        self.is_x86 = triple.startswith(("x86", "i386", "i686"))
        self.avx512 = {"+avx512f", "+avx512dq"} <= enabled
        self.avx2 = {"+avx2", "+fma"} <= enabled
        self.avx = "+avx" in enabled
        self.fma = "+fma" in enabled or not self.is_x86


def instruction_set() -> str:
    """The vector instructions that the kernels are compiled for."""
    target = Target(cpu_target.target_context)
    if not target.is_x86:
        return "NEON"
    return "AVX-512" if target.avx512 else "AVX2" if target.avx2 else "AVX" if target.avx else "SSE2"


def _fma(builder, target: Target, x, y, z):
    if not target.fma:  # llvm.fma would become sixteen calls of the C library
        return builder.fadd(builder.fmul(x, y), z)
    return builder.call(_declare(builder, "llvm.fma.v16f32", _FLOATS, [_FLOATS] * 3), [x, y, z])


def _floor_at(builder, x, low: float):
    """Max(x, low) that keeps NaN."""
    return builder.select(builder.fcmp_ordered("<", x, _const(low)), _const(low), x)


def _polynomial(builder, target: Target, x, coefficients: tuple[float, ...]):
    """Horner's rule, highest coefficient first."""
    value = _const(coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(builder, target, value, x, _const(coefficient))
    return value


def _exp2_product(builder, target: Target, x, y):
    """2 ** (x y) for x y in [-1e7, 127]; exactly 1 at 0, because slow decays multiply any bias near 1 many times."""
    if target.avx512:
        return _exp2_product_avx512(builder, target, x, y)
    return (_exp2_product_avx2 if target.avx2 else _exp2_product_generic)(builder, target, x, y)


def _exp2_product_avx512(builder, target: Target, x, y):
    """2 ** (k + j / 32) from a table in two registers and vscalef, times a quadratic in the rest, |rest| <= 1 / 64."""
    magic = _const(1.5 * 2**23 / 32)  # adding it leaves k + j / 32 in the low bits of the mantissa
    shifted = _fma(builder, target, x, y, magic)
    rounded = builder.fsub(shifted, magic)
    rest = _fma(builder, target, x, y, builder.fneg(rounded))
    table = [_round32(2 ** (j / 32)) for j in range(32)]
    permute = _declare(builder, "llvm.x86.avx512.vpermi2var.ps.512", _FLOATS, [_FLOATS, _INTS, _FLOATS])
    power = builder.call(
        permute,
        [ir.Constant(_FLOATS, table[:16]), builder.bitcast(shifted, _INTS), ir.Constant(_FLOATS, table[16:])],
    )
    slope = builder.fmul(_polynomial(builder, target, rest, (0.2402265070, 0.6931471806)), rest)
    power = _fma(builder, target, power, slope, power)
    scale = _declare(builder, "llvm.x86.avx512.mask.scalef.ps.512", _FLOATS, [_FLOATS] * 3 + [_I16, _I32])
    return builder.call(scale, [power, rounded, power, ir.Constant(_I16, -1), ir.Constant(_I32, 4)])


def _exp2_product_avx2(builder, target: Target, x, y):
    """2 ** (k + j / 8) from a table in one register, times a cubic in the rest, |rest| <= 1 / 16; error 3e-8."""
    unit = 1.5 * 2**23 / 8
    magic = _const(unit + 127)  # adding it leaves 8 (k + 127) + j in the low bits of the mantissa
    shifted = _fma(builder, target, x, y, magic)
    rest = _fma(builder, target, x, y, builder.fsub(magic, shifted))
    bits = builder.bitcast(shifted, _INTS)  # as integers they have the order of the floats
    lowest, highest = _int_const(_bits(unit)), _int_const(_bits(unit) + 8 * 254)  # of the power: 0 and 2 ** 127
    bits = builder.select(builder.icmp_signed("<", bits, lowest), lowest, bits)
    bits = builder.select(builder.icmp_signed(">", bits, highest), highest, bits)
    table = [_bits(2 ** (j / 8)) - _bits(1.0) - (j << 20) for j in range(8)]  # less what the shift brings along
    power = builder.add(_pick_of_eight(builder, table, bits), builder.shl(bits, _int_const(20)))
    power = builder.bitcast(power, _FLOATS)
    slope = builder.fmul(_polynomial(builder, target, rest, (0.05549622, 0.24025764, 0.69314724)), rest)
    return _fma(builder, target, power, slope, power)


def _pick_of_eight(builder, table: Sequence[int], index):
    """Table[index % 8] for each lane, by AVX2's permutation of eight."""
    eight = ir.VectorType(_I32, 8)
    permute = _declare(builder, "llvm.x86.avx2.permd", eight, [eight, eight])
    halves = []
    for first in range(0, LANES, 8):
        half = builder.shuffle_vector(index, index, ir.Constant(eight, list(range(first, first + 8))))
        halves.append(builder.call(permute, [ir.Constant(eight, table), half]))
    return builder.shuffle_vector(*halves, ir.Constant(_INTS, list(range(LANES))))


def _exp2_product_generic(builder, target: Target, x, y):
    """Integer part into the exponent bits, a degree-5 polynomial (relative error 1e-7) for |rest| <= 1 / 2."""
    product = _floor_at(builder, builder.fmul(x, y), -126.0)
    product = builder.select(builder.fcmp_ordered(">", product, _const(127.0)), _const(127.0), product)
    magic = _const(1.5 * 2**23)
    shifted = builder.fadd(product, magic)
    rest = builder.fsub(product, builder.fsub(shifted, magic))
    coefficients = (1.32765e-3, 9.67554e-3, 5.550713e-2, 2.402212e-1, 6.9314697e-1, 1.0)
    power = _polynomial(builder, target, rest, coefficients)
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _int_const(23))
    return builder.bitcast(builder.add(builder.bitcast(power, _INTS), exponent), _FLOATS)


def _exp(builder, target: Target, x):
    x = _floor_at(builder, x, -150.0)
    x = builder.select(builder.fcmp_ordered(">", x, _const(88.0)), _const(88.0), x)
    return _exp2_product(builder, target, x, _const(LOG2E))


def _sigmoid(builder, target: Target, x):
    return builder.fdiv(_const(1.0), builder.fadd(_const(1.0), _exp(builder, target, builder.fneg(x))))


def _silu(builder, target: Target, x):
    return builder.fdiv(x, builder.fadd(_const(1.0), _exp(builder, target, builder.fneg(x))))


def _softplus(builder, target: Target, x):
    """Max(x, 0) + log(1 + e), e = exp(-|x|), by log(1 + e) = 2 atanh(e / (e + 2)): odd series, no cancellation."""
    magnitude = builder.bitcast(builder.and_(builder.bitcast(x, _INTS), _int_const(0x7FFFFFFF)), _FLOATS)
    e = _exp(builder, target, builder.fneg(magnitude))
    s = builder.fdiv(e, builder.fadd(e, _const(2.0)))
    series = (0.14089168, 0.13980301, 0.20012455, 0.33333157, 1.0)
    tail = _polynomial(builder, target, builder.fmul(s, s), series)
    return _fma(builder, target, tail, builder.fadd(s, s), _floor_at(builder, x, 0.0))


def _vector_function(arity: int, emit: Callable) -> Callable[..., Any]:
    """An intrinsic of `arity` vectors with a vector result; Numba wants the arity in the signature."""

    def generate(context, builder, _signature, arguments):
        return emit(builder, Target(context), *arguments)

    if arity == 1:
        return intrinsic(lambda _context, x: (vector(vector), generate))
    if arity == 2:
        return intrinsic(lambda _context, x, y: (vector(vector, vector), generate))
    return intrinsic(lambda _context, x, y, z: (vector(vector, vector, vector), generate))


fma = _vector_function(3, _fma)
exp2_product = _vector_function(2, _exp2_product)
sigmoid = _vector_function(1, _sigmoid)
silu = _vector_function(1, _silu)
softplus = _vector_function(1, _softplus)


def _operator(python_operator: Callable, instruction: str) -> None:
    @type_callable(python_operator)
    def _(_context):
        return lambda x, y: vector if x is vector and y is vector else None

    @lower_builtin(python_operator, Vector, Vector)
    def _(_context, builder, _signature, arguments):
        return getattr(builder, instruction)(*arguments)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")


def _splat(builder, value):
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _int_const(0))


@_intrinsic
def splat(_context, value):
    """All lanes equal to a float32."""
    return vector(types.float32), lambda _ctx, builder, _sig, arguments: _splat(builder, arguments[0])


def _pointer(builder, arguments, element: ir.Type, access: ir.Type):
    base = builder.inttoptr(arguments[0], element.as_pointer())
    return builder.bitcast(builder.gep(base, [arguments[1]]), access.as_pointer())


@_intrinsic
def scalar_at(_context, address, index):
    """The float32 at an element index."""

    def generate(_ctx, builder, _sig, arguments):
        return builder.load(_pointer(builder, arguments, _F32, _F32))

    return types.float32(types.int64, types.int64), generate


@_intrinsic
def set_scalar(_context, address, index, value):
    """Store a float32 at an element index."""

    def generate(ctx, builder, _sig, arguments):
        builder.store(arguments[2], _pointer(builder, arguments, _F32, _F32))
        return ctx.get_dummy_value()

    return types.none(types.int64, types.int64, types.float32), generate


@_intrinsic
def splat_at(_context, address, index):
    """All lanes equal to the float32 at an element index."""

    def generate(_ctx, builder, _sig, arguments):
        return _splat(builder, builder.load(_pointer(builder, arguments, _F32, _F32)))

    return vector(types.int64, types.int64), generate


@_intrinsic
def load(_context, address, index):
    """Sixteen float32 from an element index on."""

    def generate(_ctx, builder, _sig, arguments):
        return builder.load(_pointer(builder, arguments, _F32, _FLOATS), align=4)

    return vector(types.int64, types.int64), generate


@_intrinsic
def store(_context, address, index, value):
    """Sixteen float32 to an element index on."""

    def generate(ctx, builder, _sig, arguments):
        builder.store(arguments[2], _pointer(builder, arguments, _F32, _FLOATS), align=4)
        return ctx.get_dummy_value()

    return types.none(types.int64, types.int64, vector), generate


@_intrinsic
def prefetch(_context, address):
    """Bring the cache line of an address near; it need not be one that may be read."""

    def generate(ctx, builder, _sig, arguments):
        byte = ir.IntType(8).as_pointer()
        hint = _declare(builder, "llvm.prefetch.p0i8", ir.VoidType(), [byte, _I32, _I32, _I32])
        to_read, keep, data = ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)
        builder.call(hint, [builder.inttoptr(arguments[0], byte), to_read, keep, data])
        return ctx.get_dummy_value()

    return types.none(types.int64), generate


@_intrinsic
def _load_bf16(_context, address, index):
    def generate(_ctx, builder, _sig, arguments):
        short = builder.load(_pointer(builder, arguments, _I16, _SHORTS), align=2)
        return builder.bitcast(builder.shl(builder.zext(short, _INTS), _int_const(16)), _FLOATS)

    return vector(types.int64, types.int64), generate


@_intrinsic
def _store_bf16(_context, address, index, value):
    def generate(ctx, builder, _sig, arguments):
        bits = builder.bitcast(arguments[2], _INTS)
        odd = builder.and_(builder.lshr(bits, _int_const(16)), _int_const(1))
        nearest_even = builder.add(bits, builder.add(odd, _int_const(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", arguments[2], arguments[2])
        bits = builder.select(is_nan, _int_const(0x7FC00000), nearest_even)
        short = builder.trunc(builder.lshr(bits, _int_const(16)), _SHORTS)
        builder.store(short, _pointer(builder, arguments, _I16, _SHORTS), align=2)
        return ctx.get_dummy_value()

    return types.none(types.int64, types.int64, vector), generate


@_intrinsic
def lane_sum(_context, value):
    """Sum of the lanes, by halves: a fixed order."""

    def generate(_ctx, builder, _sig, arguments):
        total, width = arguments[0], LANES
        while width > 1:
            width //= 2
            order = ir.Constant(_INTS, [i + width if i < width else 0 for i in range(LANES)])
            total = builder.fadd(total, builder.shuffle_vector(total, ir.Constant(_FLOATS, ir.Undefined), order))
        return builder.extract_element(total, ir.Constant(_I32, 0))

    return types.float32(vector), generate


@njit(inline="always")
def load_as(address, index, bf16):
    """Sixteen float32, or sixteen bfloat16 widened."""
    if bf16:
        return _load_bf16(address, index)
    return load(address, index)


@njit(inline="always")
def store_as(address, index, value, bf16):
    """Sixteen float32, or sixteen bfloat16 rounded to nearest even."""
    if bf16:
        _store_bf16(address, index, value)
    else:
        store(address, index, value)
