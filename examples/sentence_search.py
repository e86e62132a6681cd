"""Find the sentence that is nearest in meaning to a query with a BERT encoder, untouched and optimized.

python examples/sentence_search.py "pets asleep" [MODEL]
"""

import sys
import time

import torch
from transformers import AutoModel, AutoTokenizer

import llmkern

query = sys.argv[1]
name = sys.argv[2] if len(sys.argv) > 2 else "sentence-transformers/all-MiniLM-L6-v2"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModel.from_pretrained(name).eval()
sentences = ["A kitten rests by the window.", "The central bank raised its rates.", "It will rain tomorrow."]


@torch.no_grad()
def nearest() -> tuple[str, float]:
    """The nearest sentence, and how many sentences were embedded in a second; the first call only warms up."""
    batch = tokenizer([query, *sentences], padding=True, return_tensors="pt")
    for _ in range(2):
        start = time.perf_counter()
        hidden = model(**batch).last_hidden_state
        seconds = time.perf_counter() - start
    kept = batch["attention_mask"].unsqueeze(-1)
    embedded = torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)
    return sentences[int((embedded[1:] @ embedded[0]).argmax())], len(embedded) / seconds


found, untouched = nearest()
llmkern.optimize_(model)
print(llmkern.report(model))
found, optimized = nearest()
print(found)
print(f"untouched {untouched:.1f} sentences/s, optimized {optimized:.1f} sentences/s")
