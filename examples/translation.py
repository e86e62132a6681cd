"""Translate sentences with a Marian model, untouched and optimized.

python examples/translation.py "The weather is fine." [MODEL]
"""

import sys
import time

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import llmkern

sentence = sys.argv[1]
name = sys.argv[2] if len(sys.argv) > 2 else "Helsinki-NLP/opus-mt-en-de"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSeq2SeqLM.from_pretrained(name).eval()
batch = tokenizer([sentence] * 8, return_tensors="pt", padding=True)


def translate() -> tuple[str, float]:
    """The translation, and how many sentences were translated in a second; the first call only warms up."""
    for _ in range(2):
        start = time.perf_counter()
        tokens = model.generate(**batch, max_new_tokens=64, num_beams=4)
        seconds = time.perf_counter() - start
    return tokenizer.decode(tokens[0], skip_special_tokens=True), len(tokens) / seconds


text, untouched = translate()
llmkern.optimize_(model, on_unsupported="ignore")
print(llmkern.report(model))
text, optimized = translate()
print(text)
print(f"untouched {untouched:.1f} sentences/s, optimized {optimized:.1f} sentences/s")
