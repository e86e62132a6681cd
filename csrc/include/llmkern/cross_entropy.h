// cross_entropy: the loss of each row of logits against its label, and its gradient.  With s = softcap · tanh(logit /
// softcap) (the logit itself without a softcap), w the class weights, W their sum, ε the label smoothing, V the words,
// y the label and lse = log Σ eˢ:
//   loss   = (1 − ε) · w[y] · (lse − s[y]) + ε/V · (W · lse − Σ w·s) + z_loss · lse²
//   dlogit = scale · slope · (((1 − ε) · w[y] + ε/V · W + 2 · z_loss · lse) · e^(s − lse) − ε/V · w − (1 − ε) · w[y] ·
//   [y])
// with the slope 1 − (s / softcap)².  A row whose label is ignore_index has the loss, lse and gradient 0; one whose
// label is no word has NaN.
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "llmkern/threads.h"

namespace llmkern {

struct CrossEntropyParams {
  const void* logits;     // [rows, vocab], dtype; row r at r * logits_stride, contiguous
  const int64_t* labels;  // [rows]
  const float* weight;    // [vocab]; null for 1
  const float* scale;     // [rows], a factor of each row's gradient; not used without dlogits
  float* loss;            // [rows]; null where it is not wanted
  float* lse;             // [rows]; written, or read where it is known; null where it is not wanted
  void* dlogits;          // [rows, vocab], dtype; row r at r * dlogits_stride; may be the logits; null for none
  int64_t rows, vocab, logits_stride, dlogits_stride;  // elements
  int64_t ignore_index;
  DType dtype;
  float label_smoothing, z_loss;
  float softcap;      // 0 for none
  bool lse_is_known;  // then there is no loss
};

void launch_cross_entropy(const CrossEntropyParams& p, const Threads& threads);

}  // namespace llmkern
