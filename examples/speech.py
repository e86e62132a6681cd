"""Transcribe speech with Whisper, untouched and optimized.

python examples/speech.py speech.wav [MODEL]    (mono, 16 bits, 16 kHz)
"""

import sys
import time
import wave

import numpy as np
from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

import llmkern

name = sys.argv[2] if len(sys.argv) > 2 else "openai/whisper-tiny.en"
extractor, tokenizer = AutoFeatureExtractor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
model = WhisperForConditionalGeneration.from_pretrained(name).eval()
with wave.open(sys.argv[1]) as file:
    sound = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768
features = extractor(sound, sampling_rate=16000, return_tensors="pt").input_features


def transcribe() -> tuple[str, float]:
    """The text, and how many seconds of speech were transcribed in a second; the first call only warms up."""
    for _ in range(2):
        start = time.perf_counter()
        tokens = model.generate(features, max_new_tokens=48)
        seconds = time.perf_counter() - start
    return tokenizer.decode(tokens[0], skip_special_tokens=True), len(sound) / 16000 / seconds


text, untouched = transcribe()
llmkern.optimize_(model, on_unsupported="ignore")
print(llmkern.report(model))
text, optimized = transcribe()
print(text)
print(f"untouched {untouched:.1f}x real time, optimized {optimized:.1f}x real time")
