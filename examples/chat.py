"""Ask a language model a question, untouched and optimized.

python examples/chat.py "Why is the sky blue?" [MODEL]
"""

import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

import llmkern

question = sys.argv[1]
name = sys.argv[2] if len(sys.argv) > 2 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name).eval()
chat = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def answer() -> tuple[str, float]:
    """The answer, and how many tokens came in a second; the first call only warms up."""
    for _ in range(2):
        start = time.perf_counter()
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        seconds = time.perf_counter() - start
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens) / seconds


text, untouched = answer()
llmkern.optimize_(model)
print(llmkern.report(model))
text, optimized = answer()
print(text)
print(f"untouched {untouched:.1f} tokens/s, optimized {optimized:.1f} tokens/s")
