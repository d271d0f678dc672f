"""The control block of diffusers' WanVACETransformer3DModel: Wan's block on the control tokens, a projection before
the first one and one after each."""

from __future__ import annotations

from torch import Tensor

from fastdit.integrations.diffusers_wan import register_block, run_block


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor | None, Tensor]:
    control = control_hidden_states
    if self.proj_in is not None:
        control = self.proj_in(control) + hidden_states
    control = run_block(self, control, encoder_hidden_states, temb, rotary_emb)
    return None if self.proj_out is None else self.proj_out(control), control


block_forward.__name__ = "forward"

register_block(
    "Wan VACE block",
    block_forward,
    ("hidden_states", "encoder_hidden_states", "control_hidden_states", "temb", "rotary_emb"),
    "proj_in",
    "proj_out",
)
