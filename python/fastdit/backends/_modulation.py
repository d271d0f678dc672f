"""modulation's three ops are one, forward and backward: the seam, with what an op does not have left out."""

from __future__ import annotations

from collections.abc import Callable


def forwards(seam: Callable) -> tuple[Callable, Callable]:
    """norm_modulate and gate_residual of gate_residual_norm_modulate."""

    def norm_modulate(x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision):
        return seam(
            None, x, None, shift, scale, weight, bias, None, None, row_index,
            norm, eps, weight_offset, None, None, 0.0, precision,
        )[1]  # fmt: skip

    def gate_residual(residual, y, gate, post_norm_weight, row_index, gate_act, post_norm, post_norm_eps, precision):
        return seam(
            residual, y, gate, None, None, None, None, post_norm_weight, row_index, None,
            None, 0.0, 0.0, gate_act, post_norm, post_norm_eps, precision,
        )[0]  # fmt: skip

    return norm_modulate, gate_residual


def backwards(gradients: Callable) -> tuple[Callable, Callable, Callable]:
    """The backward of norm_modulate, gate_residual and gate_residual_norm_modulate.

    gradients: (grad_r, grad_h, residual, y, tables, indices, options, needs) -> those of residual, y and the tables;
        tables: gate, shift, scale, weight, bias, post_norm_weight; indices: gate_row_index, row_index; options: the
        seam's, norm first; needs: for residual, y and each table.
    """

    def norm_modulate_backward(
        grad_h, x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision, needs
    ):
        need_x, need_shift, need_scale, need_weight, need_bias = needs
        _, d_x, _, *tables, _ = gradients(
            None, grad_h, None, x, (None, shift, scale, weight, bias, None), (None, row_index),
            (norm, eps, weight_offset, None, None, 0.0, precision),
            (False, need_x, False, need_shift, need_scale, need_weight, need_bias, False),
        )  # fmt: skip
        return (d_x, *tables)

    def gate_residual_backward(
        grad_r, residual, y, gate, post_weight, row_index, gate_act, post_norm, post_eps, precision, needs
    ):
        need_residual, need_y, need_gate, need_weight = needs
        d_residual, d_y, d_gate, *_, d_weight = gradients(
            grad_r, None, residual, y, (gate, None, None, None, None, post_weight), (row_index, None),
            (None, 0.0, 0.0, gate_act, post_norm, post_eps, precision),
            (need_residual, need_y, need_gate, False, False, False, False, need_weight),
        )  # fmt: skip
        return d_residual, d_y, d_gate, d_weight

    def gate_residual_norm_modulate_backward(
        grad_r, grad_h, residual, y, gate, shift, scale, weight, bias, post_weight, gate_row_index, row_index, *rest
    ):
        *options, needs = rest
        tables = (gate, shift, scale, weight, bias, post_weight)
        return gradients(grad_r, grad_h, residual, y, tables, (gate_row_index, row_index), options, needs)

    return norm_modulate_backward, gate_residual_backward, gate_residual_norm_modulate_backward
