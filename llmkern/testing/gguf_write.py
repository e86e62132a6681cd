"""Write a Llama into a GGUF file, as llama.cpp's converter does: for comparisons on one file, and for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["llama_tensors", "write_like"]


def llama_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the model's tensors by their names in GGUF files, fp32; a head that is tied is not among them.

    Rows of the query and key projections are in the order of llama.cpp, whose rotation takes neighbours in pairs.
    """
    import gguf

    config = model.config
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        target, value = f"{named.get_name(stem)}.{suffix}", tensor.float().numpy()
        for part, count in heads.items():
            if part in target:
                value = value.reshape(count, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        yield target, np.ascontiguousarray(value)


def write_like(path: Path, model: LlamaForCausalLM, source: Path) -> None:
    """Write the model in fp32, with everything that `source`, a file of the same architecture, says but the weights.

    The file appears when it is complete.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    scratch = path.with_suffix(f".{os.getpid()}")
    writer = gguf.GGUFWriter(scratch, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # the writer's own
        kind = field.types[0]
        value = int(gguf.LlamaFileType.ALL_F32) if field.name == gguf.Keys.General.FILE_TYPE else field.contents()
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=inner)
    for name, tensor in llama_tensors(model):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scratch.replace(path)
