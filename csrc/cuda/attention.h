// Attention's entry points on the card.
#pragma once

#include "fastdit/attention.h"
#include "stream.h"

namespace fastdit::cuda {

// A brick of tokens: powers of two along t, h and w. Without a window 1 x 1 x n: n neighbours of a line.
struct Brick {
  int t, h, w;
};

// Packed rows as tiles of `own` tokens, the segments that meet the most keys first (attention_plan.cu).
//   plan[0, r]  first tile of the segment of rank r; plan[0, S + 1]: all tiles        plan[1, r]  which segment it is
// Segment S are the rows behind the last one; they come last.
struct PlanParams {
  int32_t* plan;            // (2, S + 2)
  const int32_t* cu;        // (S + 1,) of the rows that are cut into tiles
  const int32_t* cu_other;  // of the rows that they meet
  const int32_t* grids;     // (S, 3) with a window, else null
  int64_t segments, rows;   // rows: the tail's included
  int64_t window[3];
  Brick own;
};
void attention_plan(const PlanParams& p, Stream stream, const char* op);

// How the rows of a call are cut: what a block owns, and in what it walks those that they meet.
struct Cut {
  const int32_t* plan;  // of the tiles that are owned, when packed; else null
  int64_t programs;     // of a head: packed, a bound on its tiles (a program takes several where there are more)
  Brick own, met;
};
constexpr int kAttentionQueries = 128, kAttentionKeys = 64;  // own and met of the forward
void attention_forward(const AttentionParams& p, const Cut& cut, Stream stream, const char* op);
// For sm_90 (attention_hopper.cu): own kAttentionQueries, met kHopperKeys, both at least eight tokens along w.
constexpr int kHopperKeys = 128;
void attention_forward_hopper(const AttentionParams& p, const Cut& cut, Stream stream, const char* op);

// The backward: rows first, then keys (dk, dv) and queries (dq) in any order. p.o, p.lse: the forward's.
constexpr int kAttentionGradTile = 64;  // own and met
// rows: (2, planes, N) fp32: lse in base 2, +inf for a query without keys; sum(do * o) - dlse, there 0.
void attention_backward_rows(const AttentionGradParams& p, float* rows, Stream stream, const char* op);
void attention_backward_keys(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream,
                             const char* op);
void attention_backward_queries(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream,
                                const char* op);
// For sm_90 (attention_backward_hopper.cu), after attention_backward_rows; bricks of at least eight tokens along w.
constexpr int kHopperGradOwn = 128, kHopperGradMet = 64;
void attention_backward_keys_hopper(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream,
                                    const char* op);
void attention_backward_queries_hopper(const AttentionGradParams& p, const float* rows, const Cut& cut, Stream stream,
                                       const char* op);

// The same in one pass, for lines (attention_backward_one_pass_hopper.cu): dq too is summed tile by tile of keys.
struct OnePass {
  // fp32 sums of a brick of 64 queries of one head, in the order of the matrix unit's registers: 64 D values, D as run
  float* sums;        // (planes, slots, 64 D)
  int32_t* counters;  // 0 before the call: the blocks that have begun, then (planes, slots) key tiles that were added
  int64_t slots;      // of a plane: dense q_len / 64, rounded up; packed q_len / 64 + segments + 1
  int64_t together;   // heads of keys whose tiles are handed out in turn
};
void attention_backward_one_pass_hopper(const AttentionGradParams& p, const float* rows, const Cut& cut,
                                        const OnePass& one, Stream stream, const char* op);

void merge_attention_forward(const MergeAttentionParams& p, Stream stream, const char* op);
void merge_attention_backward(const MergeAttentionGradParams& p, Stream stream, const char* op);

}  // namespace fastdit::cuda
