"""Counter-based standard normals: Philox4x32-10 (Salmon et al., SC11) and Box-Muller over polynomials.

:mod:`dsa_rt.reference.step` is the definition, and the order of operations here is the one there. A kernel that calls
this is launched with ``enable_fp_fusion=False``: a fused multiply-add would change bits.
"""

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_LN2 = tl.constexpr(0.6931471824645996)
_QUARTER_TURN = tl.constexpr(3.65729529994141e-10)  # π / 2^33: radians of a signed 32-bit fraction of it
_SIGN = tl.constexpr(0x80000000)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words of each counter; all arguments uint32 of one shape."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, _MULTIPLIER_0), c0 * _MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, _MULTIPLIER_1), c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL_0, k1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _radius(word):
    """sqrt(-2·log(u)), u = (word | 1)·2^-32, the logarithm taken of u·2^32 = (1 + z)·2^exponent."""
    bits = (word | 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    z = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = z * 0.08979375660419464 - 0.1442677527666092
    p = p * z + 0.1488369256258011
    p = p * z - 0.16551804542541504
    p = p * z + 0.19963477551937103
    p = p * z - 0.25002583861351013
    p = p * z + 0.3333393335342407
    p = p * z - 0.4999998211860657
    log_mantissa = z + z * z * p
    log_u = (exponent - 32).to(tl.float32) * _LN2 + log_mantissa
    return tl.sqrt_rn(log_u * -2.0)


@triton.jit
def _sin_cos(word):
    """The top two bits choose the quadrant, the others (as a signed fraction) the angle within ±π/4."""
    angle = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * _QUARTER_TURN
    square = angle * angle
    s = square * -0.00019520237401593477 + 0.0083322050049901
    s = s * square - 0.16666655242443085
    c = square * 2.4461030989186838e-05 - 0.0013887593522667885
    c = c * square + 0.041666653007268906
    sine = (angle + angle * square * s).to(tl.uint32, bitcast=True)
    cosine = ((1.0 - square * 0.5) + square * square * c).to(tl.uint32, bitcast=True)
    odd = ((word >> 30) & 1) != 0
    sin_bits = tl.where(odd, cosine, sine) ^ (word & _SIGN)  # quadrants 2 and 3
    cos_bits = tl.where(odd, sine, cosine) ^ ((word ^ (word << 1)) & _SIGN)  # quadrants 1 and 2
    return sin_bits.to(tl.float32, bitcast=True), cos_bits.to(tl.float32, bitcast=True)


@triton.jit
def philox_normals(seed, tokens, draw, first_block, BLOCKS: tl.constexpr):
    """Elements 4·first_block … of the tokens' rows of normals: fp32 [ROWS, 4·BLOCKS].

    seed: int64; tokens [ROWS] int64; draw: an integer below 2^32; first_block: int32.
    """
    shape: tl.constexpr = [tokens.shape[0], BLOCKS]
    block = (first_block + tl.arange(0, BLOCKS)).to(tl.uint32)[None, :]
    low, high = tokens.to(tl.uint32)[:, None], (tokens >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = philox(
        tl.broadcast_to(block, shape),
        tl.full(shape, 0, tl.uint32) + draw.to(tl.uint32),
        tl.broadcast_to(low, shape),
        tl.broadcast_to(high, shape),
        tl.full(shape, 0, tl.uint32) + seed.to(tl.uint32),
        tl.full(shape, 0, tl.uint32) + (seed >> 32).to(tl.uint32),
    )
    radius0, radius1 = _radius(w0), _radius(w2)
    sin0, cos0 = _sin_cos(w1)
    sin1, cos1 = _sin_cos(w3)
    # 0 2 0 2 … and 1 3 1 3 …, then 0 1 2 3 …
    even = tl.interleave(radius0 * cos0, radius1 * cos1)
    odd = tl.interleave(radius0 * sin0, radius1 * sin1)
    return tl.interleave(even, odd)
