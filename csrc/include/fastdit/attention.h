// Parameters of the attention family. Sizes and strides in elements; the channel dim is contiguous everywhere.
#pragma once

#include <cstdint>

#include "fastdit/isa.h"

namespace fastdit {

struct AttentionParams {
  const void *q, *k, *v;  // (B, N, H, D), (B, M, Hkv, D); packed: (N, H, D), (M, Hkv, D)
  void* o;                // as q
  void* lse;              // (B, H, N) or (H, N), float (double for f64), or null
  int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];  // batch (0 when packed), token, head
  int64_t lse_stride[2];                                       // batch, head
  int64_t batch;                                               // B, or the number of segments
  int64_t q_len, k_len;                                        // N, M; packed: all rows
  int64_t heads, kv_heads, head_dim;
  const int32_t *cu_q, *cu_k;      // packed: (batch + 1,) row bounds, else null
  const int32_t* kv_len;           // dense: (batch,) or null
  const int32_t* frame_tokens_of;  // (batch,), or null: frame_tokens for all
  int64_t frame_tokens;            // 0: every key is visible
  const int32_t* grids;            // (batch, 3) with a window, else null
  int64_t window[3], window_stride[3];
  double scale;
  int dtype, threads;
};

// dq, dk, dv of the forward whose o and lse stand in AttentionParams.
struct AttentionGradParams : AttentionParams {
  const void* d_o;                                                  // as q
  const void* d_lse;                                                // (B, H, N) or (H, N), dtype of lse, or null
  void *dq, *dk, *dv;                                               // as q, k, v; null where not asked for
  int64_t d_o_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];  // batch, token, head
  int64_t d_lse_stride[3];                                          // batch, head, token
};

struct MergeAttentionParams {
  const void *o1, *o2;  // (B, N, H, D)
  void* o;
  const void *lse1, *lse2;  // (B, H, N)
  void* lse;
  int64_t o1_stride[3], o2_stride[3], o_stride[3];        // batch, token, head
  int64_t lse1_stride[3], lse2_stride[3], lse_stride[3];  // batch, head, token
  int64_t batch, tokens, heads, head_dim;
  int dtype, threads;
};

struct MergeAttentionGradParams : MergeAttentionParams {  // o and lse are not read
  const void *d_o, *d_lse;                                // d_lse or null
  void *d_o1, *d_o2, *d_lse1, *d_lse2;                    // null where not asked for
  int64_t d_o_stride[3], d_o1_stride[3], d_o2_stride[3];
  int64_t d_lse_stride[3], d_lse1_stride[3], d_lse2_stride[3];
};

namespace cpu {
FASTDIT_ENTRY(attention_forward, AttentionParams)
FASTDIT_ENTRY(attention_backward, AttentionGradParams)
FASTDIT_ENTRY(merge_attention_forward, MergeAttentionParams)
FASTDIT_ENTRY(merge_attention_backward, MergeAttentionGradParams)
}  // namespace cpu

}  // namespace fastdit
