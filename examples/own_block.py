"""Write your own DiT block on the ops: adaLN with a norm, rotary attention and a gated residual, fused where it pays.

python examples/own_block.py
"""

import torch
from torch import nn

from fastdit import ops

B, GRID, HEADS, HEAD_DIM = 2, (4, 8, 8), 4, 64
C, N = HEADS * HEAD_DIM, 4 * 8 * 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(C, 6 * C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(HEAD_DIM)), nn.Parameter(torch.ones(HEAD_DIM))
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C))

    def forward(self, x, temb, cos, sin):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(temb).chunk(6, dim=-1)
        h = ops.norm_modulate(x, shift=shift1, scale=scale1)
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        q, k = ops.qk_norm_rope(q, k, q_weight=self.q_norm, k_weight=self.k_norm, norm="rms", cos=cos, sin=sin)
        attended = self.proj(ops.attention(q, k, v).flatten(2))
        x, h = ops.gate_residual_norm_modulate(x, attended, gate1, shift=shift2, scale=scale2)
        return ops.gate_residual(x, self.mlp(h), gate2)


torch.manual_seed(0)
block, x, temb = Block(), torch.randn(B, N, C), torch.randn(B, C)
cos, sin = ops.rope_table(GRID, (16, 24, 24))  # channels of the head for time, height and width
y = block(x, temb, cos, sin)
y.square().mean().backward()
print("output", tuple(y.shape), "gradient of q_norm", tuple(block.q_norm.grad.shape))
compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
print("compiled without a graph break:", torch.equal(compiled(x, temb, cos, sin), y))
