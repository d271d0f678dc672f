"""Tokens to video and back, bit for bit:

    y[b, c, t*PT + dt, h*PH + dh, w*PW + dw] = tokens[b, (t, h, w)][(dt, dh, dw, c) in any order]

A program owns Q pixels of the lines (c, dt, dh) that one row of tokens (b, t, h) covers. A token's K values lie side by
side, and so do a line's pixels: where the sizes are powers of two, a tile [Q / PW tokens, K] is read in 16-byte loads,
turned in registers and shared memory to [lines, Q], and written in 16-byte stores. Other sizes gather pixel by pixel;
the loads of neighbouring lines then meet in L1. The gradient is the same move with the ends exchanged.

Bytes: 2 * N * K * itemsize; no FLOPs.
"""

import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.patch import locate


@kernel
def unpatchify(
    TOKENS, VIDEO,
    t: tl.int32, h: tl.int32, w: tl.int32, nB: tl.int64, nN: tl.int64,
    vB: tl.int64, vC: tl.int64, vT: tl.int64, vH: tl.int64, vW: tl.int64,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64, s3: tl.int64, s4: tl.int64, s5: tl.int64, s6: tl.int64,
    s7: tl.int64,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    OC: tl.constexpr, OT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, NALIGN: tl.constexpr, MANY: tl.constexpr, BACK: tl.constexpr,
    TURN: tl.constexpr, Q: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Grid: rows of tokens * blocks of Q pixels, blocks of LINES. O*: strides inside a token. UNIT: vW is 1. ALIGN,
    NALIGN: what divides the video's strides and width, and the tokens' strides. TURN: sizes are powers of two and LINES
    is all of them. BACK: video to tokens."""
    K: tl.constexpr = C * PT * PH * PW
    tile = tl.program_id(0)
    if MANY:
        first, row0, rows, h, w = locate(
            tile, a0, a1, a2, a3, a4, a5, a6, a7, a8, s0, s1, s2, s3, s4, s5, s6, s7
        )  # fmt: skip
        tile -= first
        t = rows // (h * w)
        TOKENS += row0.to(tl.int64) * nN
        VIDEO += row0.to(tl.int64) * K
        vH = (w * PW).to(tl.int64)
        vT = vH * (h * PH)
        vC = rows.to(tl.int64) * (PT * PH * PW)
        vB = vC  # one sample: never used
    vB, vC, vT, vH = multiple(vB, ALIGN), multiple(vC, ALIGN), multiple(vT, ALIGN), multiple(vH, ALIGN)
    nB, nN = multiple(nB, NALIGN), multiple(nN, NALIGN)
    W = multiple(w * PW, ALIGN)
    blocks = (w * PW + Q - 1) // Q
    line = tile // blocks
    start = tile % blocks * Q
    b, i, j = line // (t * h), line // h % t, line % h
    q = start + tl.arange(0, Q)
    r = tl.program_id(1) * LINES + tl.arange(0, LINES)
    if TURN:  # r = (a, z): what stands before and after dw inside a token
        k = r // OW * (PW * OW) + r % OW
    else:  # r = (c, dt, dh)
        k = r // (PT * PH) * OC + r // PH % PT * OT + r % PH * OH
    c, dt, dh = k // OC % C, k // OT % PT, k // OH % PH
    lines = c.to(tl.int64) * vC + (i * PT + dt).to(tl.int64) * vT + (j * PH + dh).to(tl.int64) * vH
    pixels = q.to(tl.int64) * (1 if UNIT else vW)
    video = VIDEO + b.to(tl.int64) * vB + lines[:, None] + pixels[None, :]
    tokens = TOKENS + b.to(tl.int64) * nB + ((i * h + j) * w).to(tl.int64) * nN
    if TURN:
        BW: tl.constexpr = Q // PW
        A: tl.constexpr = K // (PW * OW)
        n = start // PW + tl.arange(0, BW)
        inner = tokens + n.to(tl.int64)[:, None] * nN + tl.arange(0, K)[None, :]
        alive = (n < w)[:, None]
        seen = (q < W)[None, :]
        if BACK:
            x = tl.reshape(tl.load(video, mask=seen, other=0.0), (A, OW, BW, PW))
            x = tl.reshape(tl.permute(x, (2, 0, 3, 1)), (BW, K))
            tl.store(inner, x, mask=alive)
        else:
            x = tl.reshape(tl.load(inner, mask=alive, other=0.0), (BW, A, PW, OW))
            x = tl.reshape(tl.permute(x, (1, 3, 0, 2)), (A * OW, Q))
            tl.store(video, x, mask=seen)
    else:
        inner = tokens + (q // PW).to(tl.int64)[None, :] * nN + k[:, None] + (q % PW * OW)[None, :]
        seen = (q < W)[None, :] & (r < C * PT * PH)[:, None]
        if BACK:
            tl.store(inner, tl.load(video, mask=seen, other=0.0), mask=seen)
        else:
            tl.store(video, tl.load(inner, mask=seen, other=0.0), mask=seen)
