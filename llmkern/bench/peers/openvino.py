"""OpenVINO and openvino-genai: models converted from PyTorch, their weights or all their products quantized by nncf."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from llmkern.bench.peer import Peer, Unsupported, need


def _missing() -> str | None:
    for module, package in (("nncf", "nncf"), ("openvino_genai", "openvino-genai")):
        if importlib.util.find_spec(module) is None:
            return f"{package}, which it takes beside openvino, is not installed: pip install {package}"
    return need("openvino", "openvino")()


PEER = Peer("openvino", _missing)
Change = Callable[[Any, Any], Any]  # (converted model, Loaded) → the model to compile

CALIBRATION, CALIBRATION_LENGTH = 16, 128  # sequences that nncf's static quantization sees, and tokens of each


class _Decoder(nn.Module):
    """A causal model as openvino-genai takes it, with keys and values as inputs and outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.model.config)
        for layer, key, value in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        seen = (torch.arange(attention_mask.shape[1])[None, :] <= position_ids[0][:, None])[None, None]
        out = self.model(input_ids=input_ids, attention_mask=seen, position_ids=position_ids, past_key_values=cache)
        return out.logits, *[state for layer in cache.layers for state in (layer.keys, layer.values)]


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden


def _converted(module: nn.Module, example: Any) -> Any:
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    with torch.no_grad():
        return openvino.convert_model(module, example_input=example)


def _loaded(spec: Any) -> Any:
    """The model in fp32, which OpenVINO computes in the precision that it is told."""
    from llmkern.bench.variants import loaded_model

    return loaded_model(replace(spec, dtype_name="float32"))


def _stateful_decoder(model: Any) -> Any:
    """The causal model with its keys and values as states that beams reorder: the form that OpenVINO fuses."""
    import openvino
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = model.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    past = [torch.zeros(1, heads, 3, dim) for _ in range(2 * config.num_hidden_layers)]
    tokens = torch.ones(1, 2, dtype=torch.long)
    example = {"input_ids": tokens, "attention_mask": torch.ones(1, 5, dtype=torch.long), "position_ids": tokens}
    converted = _converted(_Decoder(model), example | {"past": past})
    for name, given in zip(example, converted.inputs, strict=False):
        given.get_tensor().set_names({name})
        given.get_node().set_partial_shape(openvino.PartialShape([-1, -1]))
    converted.outputs[0].get_tensor().set_names({"logits"})
    beams = opset13.parameter([-1], openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    converted.add_parameters([beams])
    names = {}
    for i, (held, new) in enumerate(zip(converted.inputs[3:-1], converted.outputs[1:], strict=True)):
        held.get_node().set_partial_shape(openvino.PartialShape([-1, heads, -1, dim]))
        readers = held.get_node().output(0).get_target_inputs()
        reordered = opset13.gather(held.get_node(), beams, opset13.constant(0, openvino.Type.i64))
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
        held.get_tensor().set_names({f"past.{i}"})
        new.get_tensor().set_names({f"present.{i}"})
        names[f"past.{i}"] = f"present.{i}"
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, names)
    batch = opset13.gather(opset13.shape_of(converted.input("input_ids")), [0], 0)
    empty = opset13.broadcast(
        opset13.constant(0.0, openvino.Type.f32),
        opset13.concat([batch, opset13.constant([heads, 0, dim], openvino.Type.i64)], 0),
    )
    for node in converted.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty.output(0)])
    converted.validate_nodes_and_infer_types()
    return converted


def _options(threads: int, precision: str | None) -> dict[str, Any]:
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    # Without a hint OpenVINO chooses: bfloat16 where the processor has products of it.
    return options if precision is None else options | {"INFERENCE_PRECISION_HINT": precision}


def _compiled(model: Any, threads: int, precision: str | None) -> Any:
    import openvino

    return openvino.Core().compile_model(model, "CPU", _options(threads, precision)).create_infer_request()


class _CausalRunner:
    """One sequence by openvino-genai, whose pipeline makes one token a step; logits by OpenVINO alone."""

    def __init__(self, spec: Any, change: Change, precision: str | None) -> None:
        if spec.batch != 1 or spec.device.type != "cpu":
            raise Unsupported("OpenVINO is measured on cpu, with one sequence of a causal model")
        import openvino

        loaded = _loaded(spec)
        self.spec, self.precision = spec, precision
        self.folder = tempfile.TemporaryDirectory()
        self.file = f"{self.folder.name}/openvino_model.xml"
        converted = change(_stateful_decoder(loaded.model), loaded)
        openvino.save_model(converted, self.file, compress_to_fp16=False)
        self._pipeline: Any = None
        self._request: Any = None
        self._logits: Any = None

    def prefill(self, ids: Tensor) -> None:
        import openvino
        import openvino_genai

        if self._pipeline is None:
            self._logits = None
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False  # else a prompt that is repeated costs nothing
            scheduler.cache_size = 1  # GB
            scheduler.dynamic_split_fuse = False  # the whole prompt in one step
            scheduler.max_num_batched_tokens = max(4096, self.spec.capacity)
            options = _options(self.spec.threads, self.precision)
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(self.folder.name, scheduler, "CPU", options)
        if self._request is not None:
            self._request.cancel()
            self._pipeline.step()
        choice = openvino_genai.GenerationConfig()
        choice.max_new_tokens, choice.ignore_eos, choice.do_sample = self.spec.new_tokens + 1, True, False
        choice.eos_token_id, choice.stop_token_ids = 0, {0}  # ignored, but must be tokens
        self._request = self._pipeline.add_request(0, openvino.Tensor(ids.numpy()), choice)
        self._pipeline.step()

    def decode(self) -> None:
        self._pipeline.step()

    def logits(self, ids: Tensor) -> Tensor:
        if self._logits is None:
            self._logits = _compiled(self.file, self.spec.threads, self.precision)
        self._logits.reset_state()
        positions = numpy.arange(len(ids))[None]
        beams = numpy.zeros(1, numpy.int32)
        self._logits.infer([ids[None].numpy(), numpy.ones_like(positions), positions, beams], share_inputs=True)
        return torch.from_numpy(self._logits.get_output_tensor(0).data[0].copy()).float()

    def embed(self, ids: Tensor) -> Tensor:
        raise Unsupported("openvino-genai is measured on causal models")


class _EncoderRunner:
    def __init__(self, spec: Any, change: Change, precision: str | None) -> None:
        if spec.device.type != "cpu":
            raise Unsupported("OpenVINO is measured on cpu")
        loaded, example = _loaded(spec), torch.ones(2, 8, dtype=torch.long)
        converted = _converted(_Encoder(loaded.model), {"ids": example, "mask": example})
        self.request = _compiled(change(converted, loaded), spec.threads, precision)

    def embed(self, ids: Tensor) -> Tensor:
        self.request.infer([ids.numpy(), torch.ones_like(ids).numpy()], share_inputs=True)
        hidden = torch.from_numpy(self.request.get_output_tensor(0).data)
        return nn.functional.normalize(hidden.float().mean(1), dim=-1)


def _as_it_is(model: Any, loaded: Any) -> Any:
    return model


def _int8_weights(model: Any, loaded: Any) -> Any:
    import nncf

    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)


def _int4_weights(model: Any, loaded: Any) -> Any:
    """Groups of 64, asymmetric, embedding and head in int8: what optimum-intel makes of "4 bits"."""
    import nncf

    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=64, ratio=1.0)


def _static_int8(model: Any, loaded: Any) -> Any:
    """Weights and activations, whose ranges come from the end of the prose that accuracy is measured on."""
    import nncf

    from llmkern.testing.real_models import prose

    count = CALIBRATION * CALIBRATION_LENGTH
    ids = torch.tensor(loaded.tokenizer(prose(), verbose=False)["input_ids"][-count:]).view(CALIBRATION, 1, -1)
    batches = [{"ids": row.numpy(), "mask": torch.ones_like(row).numpy()} for row in ids]
    return nncf.quantize(model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)


@PEER.variant("openvino", dtypes=("bfloat16", "float32"), quick=False)
def _plain(spec: Any) -> Any:
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(spec.dtype)
    if precision is None:
        raise Unsupported("OpenVINO is measured in float32 and bfloat16")
    return _runner(spec, _as_it_is, precision)


@PEER.variant("openvino-int8", dtypes=(), int8=True)
def _int8(spec: Any) -> Any:
    """A causal model's weights; an encoder's activations too."""
    return _runner(spec, _int8_weights if spec.kind == "causal" else _static_int8, None)


@PEER.variant("openvino-int4", kinds=("causal",), dtypes=(), quick=False)
def _int4(spec: Any) -> Any:
    return _runner(spec, _int4_weights, None)


def _runner(spec: Any, change: Change, precision: str | None) -> Any:
    return (_CausalRunner if spec.kind == "causal" else _EncoderRunner)(spec, change, precision)
