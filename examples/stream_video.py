"""Decode a long video a few frames at a time: memory does not depend on its length.

python examples/stream_video.py
"""

import torch

from fastdit.models import CausalVAE

torch.manual_seed(0)
vae = CausalVAE(base_dim=16).eval()  # base_dim=96 is Wan 2.1: vae.load_state_dict(autoencoder_kl_wan.state_dict())
latents = torch.randn(1, 16, 6, 8, 8)  # (B, z, 1 + t, H/8, W/8)

with torch.inference_mode():
    written = 0
    for frames in vae.decode_chunks(latents):  # (B, 3, 1, H, W), then (B, 3, 4, H, W) each
        written += frames.shape[2]  # hand them to a video writer here
    whole = vae.decode(latents)
print(f"{written} frames of {tuple(whole.shape[3:])}, as many as in one piece: {whole.shape[2]}")
