"""onnxruntime: its dynamic int8 quantization, of a layer and of an encoder."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.bench.peer import Peer, Thunk, Unsupported, need


def _missing() -> str | None:
    if importlib.util.find_spec("onnx") is None:
        return "models are exported by onnx, which is not installed: pip install onnx"
    return need("onnxruntime", "onnxruntime")()


PEER = Peer("onnxruntime", _missing)


def _without_advice(record: logging.LogRecord) -> bool:
    """onnxruntime says for every model how else it could be prepared."""
    return "pre-processing before quantization" not in record.getMessage()


def _session(module: nn.Module, inputs: tuple[Tensor, ...], axes: dict[str, dict[int, str]], threads: int) -> Any:
    """`module` exported, its products quantized to int8 with a scale for each output channel."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_without_advice)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Its threads wait for more work by spinning, also when it is the next contender's turn on the same cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, inputs, plain, input_names=list(axes), dynamic_axes=axes, dynamo=False, opset_version=17
            )
        quantize_dynamic(plain, small, per_channel=True, weight_type=QuantType.QInt8)
        return onnxruntime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])


@PEER.op("int8_linear", approximate="its own int8 codes of the same weight, one scale for all activations")
def _int8_linear(call: dict[str, Any]) -> Thunk:
    from llmkern.bench.peers.pytorch import floating_linear

    x = call["x"]
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 2:
        raise Unsupported("measured on cpu, in float32, on a matrix")
    session = _session(floating_linear(call), (x,), {"x": {0: "rows"}}, torch.get_num_threads())
    inputs = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


class _Hidden(nn.Module):
    """The encoder as onnx takes it: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


class _Encoder:
    def __init__(self, session: Any) -> None:
        self.session = session

    def embed(self, ids: Tensor) -> Tensor:
        inputs = {"ids": ids.numpy(), "mask": torch.ones_like(ids).numpy()}
        hidden = torch.from_numpy(self.session.run(None, inputs)[0])
        return nn.functional.normalize(hidden.mean(1), dim=-1)


@PEER.variant("onnxruntime-int8", kinds=("encoder",), dtypes=(), int8=True)
def _int8(spec: Any) -> Any:
    from llmkern.bench.variants import loaded_model

    if spec.device.type != "cpu":
        raise Unsupported("onnxruntime is measured on cpu")
    example = torch.ones(2, 8, dtype=torch.long)
    axes = {name: {0: "batch", 1: "tokens"} for name in ("ids", "mask")}
    return _Encoder(_session(_Hidden(loaded_model(spec).model), (example, example), axes, spec.threads))
