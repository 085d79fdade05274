"""The device code of ``triton_engine.py``: every rule of ``rules.py`` and both codecs, operation by operation.

Kernels are launched with ``enable_fp_fusion=False``, so that no product and sum become one operation. They divide and
take roots by instructions that round once and keep subnormal numbers, which ``tl.div_rn`` and ``tl.sqrt_rn`` flush to 0
in Triton 3.2. Under ``TRITON_INTERPRET=1`` the same code runs with numpy on a CPU.

A program works on one tile: ROWS quantisation blocks of BLOCK elements, all of one ``rows.Row``. The table names its
tensors, by the fields below. Without Triton the kernels are there in name only.
"""

# Triton reads the annotations of device code as its own, and its values have no types that mypy could know:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Python's shorter forms of a branch that is settled at compile time are not Triton:
# ruff: noqa: RET505, SIM109

from __future__ import annotations

from types import SimpleNamespace

from holdfast.optim.coefficients import FIELDS
from holdfast.optim.rules import RULES, Norms

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]  # comes with torch for CUDA only
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # importable all the same, as every module is
    triton = tl = SimpleNamespace(jit=lambda kernel: kernel, constexpr=lambda value: value)

__all__ = ["HAS_TRITON", "block_sums", "update_tiles"]

HAS_TRITON = not isinstance(triton, SimpleNamespace)

# A row of the table: addresses of tensors, then numbers. Triton reads globals only where they are constexpr.
_PARAM, _GRAD, _MOMENT, _ABSMAX = (tl.constexpr(field) for field in (0, 1, 2, 5))
_ELEMENTS, _FIRST_TILE, _FIRST, _KEY, _SUMS, _COEFFICIENTS = (tl.constexpr(field) for field in range(8, 14))
_TABLE_FIELDS, _SCALARS = tl.constexpr(14), tl.constexpr(len(FIELDS))

_FLOAT32, _BFLOAT16, _FLOAT16, _BYTE = (tl.constexpr(number) for number in range(4))

_GRAD_SCALE, _L2, _DECAY, _STEP_SIZE = map(tl.constexpr, map(FIELDS.index, ("grad_scale", "l2", "decay", "step_size")))
_BETA1, _BLEND1, _BETA2, _BLEND2 = map(tl.constexpr, map(FIELDS.index, ("beta1", "blend1", "beta2", "blend2")))
_BETA3, _BLEND3, _EPS, _ROOT_SCALE = map(tl.constexpr, map(FIELDS.index, ("beta3", "blend3", "eps", "root_scale")))
_CORRECTION, _MIX, _TRUST = map(tl.constexpr, map(FIELDS.index, ("correction", "mix", "trust")))
_WEIGHT_DECAY = tl.constexpr(FIELDS.index("weight_decay"))

_ADAM, _SGD, _NESTEROV = (tl.constexpr(RULES[name].native) for name in ("adam", "sgd", "nesterov"))
_PLAIN_SGD, _LION, _ADAGRAD = (tl.constexpr(RULES[name].native) for name in ("plain_sgd", "lion", "adagrad"))
_RMSPROP, _RMSPROP_MOMENTUM = (tl.constexpr(RULES[name].native) for name in ("rmsprop", "rmsprop_momentum"))
_CENTERED, _CENTERED_MOMENTUM = (
    tl.constexpr(RULES[name].native) for name in ("rmsprop_centered", "rmsprop_centered_momentum")
)
_LAMB, _ADEMAMIX = (tl.constexpr(RULES[name].native) for name in ("lamb", "ademamix"))
_GRADIENT, _DIRECTION = (tl.constexpr(int(kind)) for kind in (Norms.GRADIENT, Norms.PARAM_AND_LAMB_DIRECTION))

_LAMB_SIGNED = tl.constexpr(1)  # as SIGNED: its first moment is
# Of the codebooks, the unsigned one first: numbers in each, and entries before its thresholds.
_BOOK, _THRESHOLDS = tl.constexpr(512), tl.constexpr(256)
_LARGEST_GRADIENT = tl.constexpr(2.0**63)
_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _anything():
    pass


_IS_INTERPRETED = tl.constexpr(type(_anything).__name__ == "InterpretedFunction")
"""Whether Triton runs kernels with numpy, which its jit decided when it read TRITON_INTERPRET."""


@triton.jit
def update_tiles(
    table,
    coefficients,
    row_of_tile,
    books,
    RULE: tl.constexpr,
    SIGNED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    IS_8BIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    NONZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One update of every tile, in place. Bit k of SIGNED: moment k has the signed codebook.

    ALIGNED promises that every address of the table, and the number of elements, is a multiple of 16.
    """
    row, by, at, elements, inside = _tile(table, coefficients, row_of_tile, ALIGNED, BLOCK, ROWS)
    at_param = _pointers(row, at, elements, _PARAM, PARAM, ALIGNED)
    stored = tl.load(at_param, mask=inside, other=0)
    old = _widened(stored, PARAM)
    grad = _effective(_scaled_gradient(row, by, at, elements, inside, GRAD, ALIGNED), old, by)
    usable = (tl.abs(grad) <= _LARGEST_GRADIENT) & inside
    touched = _any(usable)
    a, b, s = old, old, old
    if MOMENTS > 0:
        a = _moment(row, at, elements, inside, books, 0, SIGNED, IS_8BIT, ALIGNED)
    if MOMENTS > 1:
        b = _moment(row, at, elements, inside, books, 1, SIGNED, IS_8BIT, ALIGNED)
    if MOMENTS > 2:
        s = _moment(row, at, elements, inside, books, 2, SIGNED, IS_8BIT, ALIGNED)
    new, new_a, new_b, new_s = _step(old, grad, a, b, s, by, RULE)
    narrow = _narrowed(new, row, at, elements, PARAM, STOCHASTIC)
    tl.store(at_param, tl.where(usable, narrow, stored), mask=inside)
    write = touched[:, None] & inside
    if MOMENTS > 0:
        _keep(
            tl.where(usable, new_a, a), row, at, elements, write, touched, books, 0, SIGNED, IS_8BIT, NONZERO, ALIGNED
        )
    if MOMENTS > 1:
        _keep(
            tl.where(usable, new_b, b), row, at, elements, write, touched, books, 1, SIGNED, IS_8BIT, NONZERO, ALIGNED
        )
    if MOMENTS > 2:
        _keep(
            tl.where(usable, new_s, s), row, at, elements, write, touched, books, 2, SIGNED, IS_8BIT, NONZERO, ALIGNED
        )


@triton.jit
def block_sums(
    table,
    coefficients,
    row_of_tile,
    books,
    first_sums,
    second_sums,
    KIND: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    IS_8BIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Both sums of squares of every block, in double precision. LEVELS: the logarithm of BLOCK."""
    row, by, at, elements, inside = _tile(table, coefficients, row_of_tile, ALIGNED, BLOCK, ROWS)
    param = _widened(tl.load(_pointers(row, at, elements, _PARAM, PARAM, ALIGNED), mask=inside, other=0), PARAM)
    second = _scaled_gradient(row, by, at, elements, inside, GRAD, ALIGNED)
    usable = (tl.abs(_effective(second, param, by)) <= _LARGEST_GRADIENT) & inside
    if KIND == _DIRECTION:
        a = _moment(row, at, elements, inside, books, 0, _LAMB_SIGNED, IS_8BIT, ALIGNED)
        b = _moment(row, at, elements, inside, books, 1, _LAMB_SIGNED, IS_8BIT, ALIGNED)
        second, a, b = _lamb_direction(param, second, a, b, by)
    second = tl.where(usable, second, 0.0)
    is_block = _any(inside)
    place = tl.load(row + _SUMS) + at // BLOCK + tl.arange(0, ROWS)
    if KIND == _GRADIENT:
        tl.store(first_sums + place, _sum_of_squares(second, BLOCK, ROWS, LEVELS), mask=is_block)
    else:
        tl.store(first_sums + place, _sum_of_squares(param, BLOCK, ROWS, LEVELS), mask=is_block)
        tl.store(second_sums + place, _sum_of_squares(second, BLOCK, ROWS, LEVELS), mask=is_block)


@triton.jit
def _tile(table, coefficients, row_of_tile, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """This program's row, its scalars and its first element; from that, all its elements [ROWS, BLOCK]; which exist."""
    number = tl.load(row_of_tile + tl.program_id(0)).to(tl.int64)
    row = table + number * _TABLE_FIELDS
    at = (tl.program_id(0) - tl.load(row + _FIRST_TILE)) * (ROWS * BLOCK)
    count = tl.minimum(tl.load(row + _ELEMENTS) - at, ROWS * BLOCK).to(tl.int32)
    if ALIGNED:
        count = count // 16 * 16  # changes nothing, and tells the compiler that masks are the same for 16 neighbours
    elements = (tl.arange(0, ROWS) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    return row, coefficients + tl.load(row + _COEFFICIENTS) * _SCALARS, at, elements, elements < count


@triton.jit
def _pointers(row, first, others, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Of single elements, in 64 bits only as far as all have in common."""
    address = tl.load(row + FIELD)
    if TYPE == _FLOAT32:
        pointers = address.to(tl.pointer_type(tl.float32)) + first + others
    elif TYPE == _BFLOAT16:  # as bits: conversions differ in what becomes of a NaN
        pointers = address.to(tl.pointer_type(tl.uint16)) + first + others
    elif TYPE == _FLOAT16:
        pointers = address.to(tl.pointer_type(tl.float16)) + first + others
    else:
        pointers = address.to(tl.pointer_type(tl.uint8)) + first + others
    if ALIGNED:  # said of the sum, because the compiler knows nothing of numbers that were loaded
        pointers = tl.multiple_of(pointers, (16, 16))
    return pointers


@triton.jit
def _pointers_of_blocks(row, at, elements, FIELD: tl.constexpr):
    """fp32."""
    first = tl.load(row + FIELD).to(tl.pointer_type(tl.float32)) + at // elements.shape[1]
    return first + tl.arange(0, elements.shape[0])


@triton.jit
def _any(elements):
    """By block."""
    return tl.max(elements.to(tl.int32), 1) > 0


@triton.jit
def _widened(stored, TYPE: tl.constexpr):
    if TYPE == _BFLOAT16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def _narrowed(new, row, at, elements, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    if TYPE == _FLOAT32:
        return new
    elif TYPE == _FLOAT16:
        return new.to(tl.float16)
    else:
        bits = new.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if STOCHASTIC:
            random = _random16(tl.load(row + _FIRST) + at + elements, tl.load(row + _KEY))
            raised = bits + tl.where(magnitude >= _INFINITY_BITS, tl.zeros_like(random), random)
        else:
            raised = bits + 0x7FFF + ((bits >> 16) & 1)
        return tl.where(magnitude > _INFINITY_BITS, 0x7FC0, raised >> 16).to(tl.uint16)


@triton.jit
def _random16(index, key):
    once = _mixed(index.to(tl.uint32) ^ key.to(tl.uint32))
    return _mixed(once ^ ((key >> 32).to(tl.uint32) + (index >> 32).to(tl.uint32) * 0x9E3779B9)) >> 16


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _scaled_gradient(row, by, at, elements, inside, GRAD: tl.constexpr, ALIGNED: tl.constexpr):
    stored = tl.load(_pointers(row, at, elements, _GRAD, GRAD, ALIGNED), mask=inside, other=0)
    return _widened(stored, GRAD) * tl.load(by + _GRAD_SCALE)


@triton.jit
def _effective(grad, param, by):
    l2 = tl.load(by + _L2)
    return tl.where(l2 != 0.0, grad + param * l2, grad)


@triton.jit
def _moment(
    row,
    at,
    elements,
    inside,
    books,
    NUMBER: tl.constexpr,
    SIGNED: tl.constexpr,
    IS_8BIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A moment as fp32, 0 where there is no element."""
    if IS_8BIT:
        codes = tl.load(_pointers(row, at, elements, _MOMENT + NUMBER, _BYTE, ALIGNED), mask=inside, other=0)
        blocks = _pointers_of_blocks(row, at, elements, _ABSMAX + NUMBER)
        absmax = tl.load(blocks, mask=_any(inside), other=0.0)
        values = tl.load(books + ((SIGNED >> NUMBER) & 1) * _BOOK + codes.to(tl.int32))
        return tl.where(inside, values * absmax[:, None], 0.0)
    else:
        return tl.load(_pointers(row, at, elements, _MOMENT + NUMBER, _FLOAT32, ALIGNED), mask=inside, other=0.0)


@triton.jit
def _keep(
    values,
    row,
    at,
    elements,
    write,
    touched,
    books,
    NUMBER: tl.constexpr,
    SIGNED: tl.constexpr,
    IS_8BIT: tl.constexpr,
    NONZERO: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write a moment back, in touched blocks. The absmax is found among bits, where a NaN is the largest."""
    if IS_8BIT:
        magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        absmax = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
        divisor = tl.where(absmax > 0.0, absmax, 1.0)
        ratio = _quotient(values, tl.broadcast_to(divisor[:, None], values.shape))
        if (SIGNED >> NUMBER) & 1:
            code = _magnitude_code(tl.abs(ratio), books + _BOOK, True)
            code = tl.where(ratio < 0.0, 127 - tl.minimum(code, 127), 127 + code)
        else:
            code = _magnitude_code(tl.abs(ratio), books, False)
            if NONZERO:  # asked of the value, because the ratio may have underflowed to 0
                code = tl.maximum(code, (values > 0.0).to(tl.int32))
        tl.store(_pointers(row, at, elements, _MOMENT + NUMBER, _BYTE, ALIGNED), code.to(tl.uint8), mask=write)
        blocks = _pointers_of_blocks(row, at, elements, _ABSMAX + NUMBER)
        tl.store(blocks, absmax, mask=touched)
    else:
        tl.store(_pointers(row, at, elements, _MOMENT + NUMBER, _FLOAT32, ALIGNED), values, mask=write)


@triton.jit
def _magnitude_code(magnitude, book, SIGNED: tl.constexpr):
    """How many entries after 0 the nearest one is; a tie goes to the lower. Exact.

    Over a decade the code grows along a line, and the lines of the seven decades are a concave polygon: they meet where
    decades do. So the lowest line, less 0.6, is the code or one less with 0.1 to spare, and a comparison with the
    threshold above decides. Starting from the largest code keeps infinite and NaN ratios within the table.
    """
    if SIGNED:
        code = tl.full(magnitude.shape, 128.0, tl.float32)
        for decade in tl.static_range(7):
            line = magnitude * ((1 << decade) * 10.0 ** (6 - decade) / 0.9) + ((1 << decade) * 8 / 9 - 0.6)
            code = tl.minimum(code, line)
    else:
        code = tl.full(magnitude.shape, 255.0, tl.float32)
        for decade in tl.static_range(7):
            line = magnitude * ((2 << decade) * 10.0 ** (6 - decade) / 0.9) + ((2 << decade) * 8 / 9 - 1.6)
            code = tl.minimum(code, line)
    below = code.to(tl.int32)
    return below + (magnitude > tl.load(book + _THRESHOLDS + below)).to(tl.int32)


@triton.jit
def _quotient(x, y):
    if _IS_INTERPRETED:
        return tl.div_rn(x, y)
    else:
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _root(second):
    if _IS_INTERPRETED:
        return tl.sqrt_rn(second)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.rn.f32 $0, $1;", "=f,f", [second], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _corrected_root(second, by):
    return _root(second) * tl.load(by + _ROOT_SCALE) + tl.load(by + _EPS)


@triton.jit
def _sum_of_squares(x, BLOCK: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """[ROWS, BLOCK] to [ROWS], the upper half added to the lower until one is left: the tree of ``torch_engine.py``."""
    squares = x.to(tl.float64) * x.to(tl.float64)
    for level in tl.static_range(LEVELS):
        squares = tl.sum(tl.reshape(squares, (ROWS, 2, BLOCK >> (level + 1))), 1)
    return tl.reshape(squares, (ROWS,))


@triton.jit
def _step(p, g, a, b, s, by, RULE: tl.constexpr):
    """The parameter and the three moments after an update with the effective gradient."""
    if RULE == _ADAM:
        p, a, b = _adam(p, g, a, b, by)
    elif RULE == _SGD or RULE == _NESTEROV:
        p, a = _momentum_sgd(p, g, a, by, RULE == _NESTEROV)
    elif RULE == _PLAIN_SGD:
        p = p - (g * tl.load(by + _TRUST)) * tl.load(by + _STEP_SIZE)
    elif RULE == _LION:
        p, a = _lion(p, g, a, by)
    elif RULE == _RMSPROP or RULE == _RMSPROP_MOMENTUM:
        p, a, b = _rmsprop(p, g, a, b, by, RULE == _RMSPROP_MOMENTUM)
    elif RULE == _CENTERED or RULE == _CENTERED_MOMENTUM:
        p, a, b, s = _rmsprop_centered(p, g, a, b, s, by, RULE == _CENTERED_MOMENTUM)
    elif RULE == _ADAGRAD:
        a = a + g * g
        p = p - _quotient(g * tl.load(by + _STEP_SIZE), _root(a) + tl.load(by + _EPS))
    elif RULE == _LAMB:
        direction, a, b = _lamb_direction(p, g, a, b, by)
        p = p - direction * tl.load(by + _STEP_SIZE)
    else:
        tl.static_assert(RULE == _ADEMAMIX)
        p, a, b, s = _ademamix(p, g, a, b, s, by)
    return p, a, b, s


@triton.jit
def _adam(p, g, exp_avg, exp_avg_sq, by):
    exp_avg = _blend(exp_avg, g, by, _BETA1, _BLEND1)
    exp_avg_sq = _blend_square(exp_avg_sq, g, by)
    move = _quotient(exp_avg * tl.load(by + _STEP_SIZE), _corrected_root(exp_avg_sq, by))
    return p * tl.load(by + _DECAY) - move, exp_avg, exp_avg_sq


@triton.jit
def _momentum_sgd(p, g, momentum_buffer, by, NESTEROV: tl.constexpr):
    g = g * tl.load(by + _TRUST)
    momentum_buffer = _blend(momentum_buffer, g, by, _BETA1, _BLEND1)
    move = momentum_buffer
    if NESTEROV:
        move = momentum_buffer * tl.load(by + _BETA1) + g
    return p - move * tl.load(by + _STEP_SIZE), momentum_buffer


@triton.jit
def _lion(p, g, exp_avg, by):
    u = exp_avg * tl.load(by + _BETA1) + g * tl.load(by + _BLEND1)
    way = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, 0.0))
    p = p * tl.load(by + _DECAY) - way * tl.load(by + _STEP_SIZE)
    return p, _blend(exp_avg, g, by, _BETA2, _BLEND2)


@triton.jit
def _rmsprop(p, g, square_avg, buffer, by, MOMENTUM: tl.constexpr):
    square_avg = _blend_square(square_avg, g, by)
    p, buffer = _rmsprop_move(p, g, square_avg, buffer, by, MOMENTUM)
    return p, square_avg, buffer


@triton.jit
def _rmsprop_centered(p, g, square_avg, grad_avg, buffer, by, MOMENTUM: tl.constexpr):
    square_avg = _blend_square(square_avg, g, by)
    grad_avg = _blend(grad_avg, g, by, _BETA2, _BLEND2)
    variance = tl.maximum(square_avg - grad_avg * grad_avg, 0.0)
    p, buffer = _rmsprop_move(p, g, variance, buffer, by, MOMENTUM)
    return p, square_avg, grad_avg, buffer


@triton.jit
def _rmsprop_move(p, g, second, buffer, by, MOMENTUM: tl.constexpr):
    if MOMENTUM:
        buffer = buffer * tl.load(by + _BETA1) + _quotient(g, _root(second) + tl.load(by + _EPS))
        p = p - buffer * tl.load(by + _STEP_SIZE)
    else:
        p = p - _quotient(g * tl.load(by + _STEP_SIZE), _root(second) + tl.load(by + _EPS))
    return p, buffer


@triton.jit
def _lamb_direction(p, g, exp_avg, exp_avg_sq, by):
    exp_avg = _blend(exp_avg, g, by, _BETA1, _BLEND1)
    exp_avg_sq = _blend_square(exp_avg_sq, g, by)
    ratio = _quotient(exp_avg * tl.load(by + _CORRECTION), _corrected_root(exp_avg_sq, by))
    return ratio + p * tl.load(by + _WEIGHT_DECAY), exp_avg, exp_avg_sq


@triton.jit
def _ademamix(p, g, exp_avg, exp_avg_slow, exp_avg_sq, by):
    exp_avg = _blend(exp_avg, g, by, _BETA1, _BLEND1)
    exp_avg_slow = _blend(exp_avg_slow, g, by, _BETA3, _BLEND3)
    exp_avg_sq = _blend_square(exp_avg_sq, g, by)
    mixed = exp_avg * tl.load(by + _CORRECTION) + exp_avg_slow * tl.load(by + _MIX)
    move = _quotient(mixed * tl.load(by + _STEP_SIZE), _corrected_root(exp_avg_sq, by))
    return p * tl.load(by + _DECAY) - move, exp_avg, exp_avg_slow, exp_avg_sq


@triton.jit
def _blend(moment, g, by, BETA: tl.constexpr, BLEND: tl.constexpr):
    return moment * tl.load(by + BETA) + g * tl.load(by + BLEND)


@triton.jit
def _blend_square(moment, g, by):
    return moment * tl.load(by + _BETA2) + (g * tl.load(by + _BLEND2)) * g
