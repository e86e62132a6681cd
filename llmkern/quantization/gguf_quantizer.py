"""Load GGUF files as transformers models whose linear layers and embeddings keep the file's blocks.

transformers has the names and, by architecture, what is done to a tensor on its way into a model
(`modeling_gguf_pytorch_utils`).  A matrix stays packed where that only puts its rows in another order, which a probe
decides; whatever else is done to it is done to the values, and the layer is floating point.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import modeling_gguf_pytorch_utils as names
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from llmkern.nn import PackedEmbedding, PackedLinear
from llmkern.nn.quantized_linear import is_conv1d, weight_out_in
from llmkern.packed import PackedWeight
from llmkern.quantization.formats._awaiting import Awaiting, awaiting_embedding, awaiting_linear
from llmkern.quantization.formats.gguf import GGUF_TYPES
from llmkern.quantization.gguf_file import GgufFile, check_scales
from llmkern.quantization.layers import places_of, put
from llmkern.quantization.transformers_quantizer import PackedConfig, finish_loading

__all__ = ["PackedGgufQuantizer", "load_gguf"]

ROPE_FACTORS = "rope_freqs.weight"
"""What each frequency of the rotation is divided by; no parameter of a transformers model."""


class PackedGgufQuantizer(GgufHfQuantizer):
    """Loads a GGUF file into packed modules; takes itself away afterwards."""

    file: GgufFile

    def read_header(self, gguf_file: str) -> None:
        """Read the file's names and places, once `from_pretrained` knows where it is."""
        self.file = GgufFile(gguf_file)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not hasattr(self, "file"):  # no gguf_file was named
            raise ValueError(
                "from_pretrained: PackedConfig keeps the codes of a quantized checkpoint, and this one is in floating "
                "point; llmkern.QuantConfig quantizes it"
            )
        path = str(self.file.path)
        architecture = str(self.file.metadata.get("general.architecture"))
        config = names.load_gguf_checkpoint(path)["config"]
        self.processor = names.TENSOR_PROCESSORS.get(architecture, names.TensorProcessor)(config=config)
        self.mapping = names.get_gguf_hf_weights_map(model, self.processor)
        self.orders: dict[str, Tensor | None] = {}
        places = places_of(model)
        for name, module_path, module in self._matrices(model):
            order = self._row_order(name, module)
            if order is not False:
                self.orders[name] = None if order is True else order
                put(places[module], self._awaiting(name, module_path, module))

    def _matrices(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        """Return the file's packed matrices, with the plain modules whose weights they are."""
        modules = dict(model.named_modules())
        for name, tensor in self.file.tensors.items():
            path, _, kind = self.mapping.get(name, "").rpartition(".")
            module = modules.get(path)
            plain = type(module) in (nn.Linear, nn.Embedding) or (module is not None and is_conv1d(module))
            if kind == "weight" and plain and module is not None and tensor.type in GGUF_TYPES:
                yield name, path, module

    def _row_order(self, name: str, module: nn.Module) -> Any:
        """True where the file's matrix is the weight, [out, in], an order of its rows where they are in another, and
        False where more is done to it."""
        rows, columns = self.file.tensors[name].shape
        probe = np.arange(2.0 * rows).reshape(rows, 2)
        try:
            result = self.processor.process(weights=probe, name=name, tensor_key_mapping={}, parsed_parameters={})
        except Exception:  # of whatever kind: it looks at more than rows
            return False
        found = result.weights
        if result.name != name:
            return False
        if is_conv1d(module):
            return bool(found.shape == (2, rows) and (probe == found.T).all())
        if found.shape != probe.shape:
            return False
        order = found[:, 0] / 2
        if not ((found[:, 1] == found[:, 0] + 1).all() and (np.sort(order) == np.arange(rows)).all()):
            return False
        return True if (order == np.arange(rows)).all() else torch.from_numpy(order.astype(np.int64))

    def _awaiting(self, name: str, path: str, module: nn.Module) -> Awaiting:
        tensor = self.file.tensors[name]
        weight = module.weight if isinstance(module, nn.Embedding) else weight_out_in(module)
        if tensor.shape != tuple(weight.shape):
            raise ValueError(
                f"{self.file.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(weight.shape)}"
            )
        form = GGUF_TYPES[tensor.type]
        tensors = {"weight": ((tensor.shape[0], tensor.shape[1] // form.columns, form.nbytes), torch.uint8)}

        def read(given: dict[str, Tensor]) -> tuple[PackedWeight, None]:
            packed = form.read(given["weight"])
            check_scales(packed, f"{self.file.path}: tensor {name}")
            return packed, None

        make = awaiting_embedding if isinstance(module, nn.Embedding) else awaiting_linear
        return make(path, module, tensors, read, kind=tensor.type)  # type: ignore[arg-type]

    def get_state_dict(self, checkpoint_file: str, model: nn.Module) -> dict[str, Tensor]:
        """Return the file's tensors by the model's names: blocks for matrices that stay packed, values for the rest."""
        found: dict[str, Any] = {"tensors": {}}
        self.rope_factors = None
        for name in self.file.tensors:
            if name in self.orders:
                blocks, order = self.file.blocks(name), self.orders[name]
                found["tensors"][self.mapping[name]] = blocks if order is None else blocks[order]
            elif name == ROPE_FACTORS:
                self.rope_factors = self.file.values(name)
            else:
                result = self.processor.process(
                    weights=self.file.values(name).numpy(),
                    name=name,
                    tensor_key_mapping=self.mapping,
                    parsed_parameters=found,
                )
                if result.name is None:
                    continue
                if result.name not in self.mapping:
                    raise ValueError(
                        f"{self.file.path}: tensor {name} has no place in a {type(model).__name__} of transformers"
                    )
                found["tensors"][self.mapping[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights))
        tensors: dict[str, Tensor] = found["tensors"]
        return tensors

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.rope_factors is not None:
            self._divide_frequencies(model, self.rope_factors)
        raw = {id(module.weight): module for module in model.modules() if isinstance(module, Awaiting)}
        tied = [
            (module, raw[id(weight)])
            for module in model.modules()
            if isinstance(module, nn.Linear) and id(weight := module._parameters.get("weight")) in raw
        ]
        made = finish_loading(self, model)
        places = places_of(model)
        for head, source in tied:
            table = made[source]
            assert isinstance(table, PackedEmbedding)
            packed = PackedWeight(table.code, table.packed.n, table.codes, **_groups(table))
            linear = PackedLinear(packed, head.bias, table.dtype, kind=table.kind)
            put(places[head], linear.train(head.training))
        return model

    def _divide_frequencies(self, model: nn.Module, factors: Tensor) -> None:
        for module in model.modules():
            for name in ("inv_freq", "original_inv_freq"):
                frequencies = getattr(module, name, None)
                if isinstance(frequencies, Tensor):
                    if frequencies.shape != factors.shape:
                        raise ValueError(
                            f"{self.file.path}: tensor {ROPE_FACTORS} has shape {list(factors.shape)}, expected "
                            f"{list(frequencies.shape)}"
                        )
                    frequencies.div_(factors.to(frequencies))


def _groups(table: PackedEmbedding) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in table.packed.tensors.items() if name != "codes"}


def load_gguf(path: Path, model_class: Any, options: dict[str, Any]) -> Any:
    """Load the model of a .gguf file, in evaluation mode.  Raises ValueError with one line if it cannot be read."""
    import transformers

    GgufFile(path)  # before anybody trusts it
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        cls = model_class or (transformers.AutoModelForCausalLM if causal else transformers.AutoModel)
        family: Any = cls
        model, found = family.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=PackedConfig(),
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the readers raise whatever their formats raise; all of it means that it cannot be used
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"load: {path} cannot be loaded: {line}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"load: {path} lacks {missing[0]}")
    return model
