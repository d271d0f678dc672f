"""One line makes a diffusers model faster; `restore` takes it back.

python examples/accelerate_diffusers.py            DiT-XL/2 widths, four blocks, bf16
python examples/accelerate_diffusers.py --tiny     a few seconds on anything
"""

import sys

import torch
from diffusers import DiTTransformer2DModel

import fastdit

tiny = "--tiny" in sys.argv
torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_attention_heads=2 if tiny else 16, attention_head_dim=72, num_layers=4, sample_size=16 if tiny else 32
)
model = model.to(torch.bfloat16).eval()

report = fastdit.accelerate(model)
print(report)

size = model.config.sample_size
latents = torch.randn(2, 4, size, size, dtype=torch.bfloat16)
report.verify(latents, torch.tensor([500, 500]), torch.tensor([207, 1000 - 1]))

fastdit.restore(model)
