"""An optimized model under DDP and FSDP2, on two processes: gradients, checkpoints, and restore_."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import llmkern
from llmkern import dispatch
from llmkern.swap.derive import is_swapped
from llmkern.testing.compare import assert_as_accurate
from llmkern.testing.float64 import Float64
from llmkern.testing.recorder import Recorder

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


class Served(Recorder):
    """Whole layers have no gradient; their parts have."""

    def fell_back(self, op: str, call: dict[str, Any], to: str, reason: str) -> None:
        assert op == "layers_", f"{op} fell back to {to}: {reason}"


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, tie_word_embeddings=True, **sizes)).train()


def ids() -> Tensor:
    return torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=rows, labels=rows).loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def judge(ours: dict[str, Tensor]) -> None:
    """By the accuracy rule, beside one process's gradients of both rows."""
    untouched = gradients(llama(), ids())
    with Float64():
        exact = gradients(llama().double(), ids())
    names = list(untouched)
    assert_as_accurate(
        [ours[n] for n in names],
        baseline=[untouched[n] for n in names],
        exact=[exact[n] for n in names],
        factor=3.0,
        names=names,
    )


def ranks(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mine, mesh = ids()[rank : rank + 1], init_device_mesh("cpu", (2,))

    def served(model: nn.Module) -> dict[str, Tensor]:
        recorder = Served()
        with dispatch.recording(recorder):
            found = gradients(model, mine)
        assert "linear_cross_entropy" in [op for op, _ in recorder.calls]
        return found

    def sharded(seed: int) -> Any:
        model = llmkern.optimize_(llama(seed))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    judge(served(DistributedDataParallel(llmkern.optimize_(llama()))))
    model = sharded(0)
    judge(served(model))

    torch.optim.SGD(model.parameters(), lr=0.1).step()
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder)
    other = sharded(1)
    state = {"model": other.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor()), name

    trained = gradients(model, mine)
    model.unshard()
    llmkern.restore_(model)
    assert not any(is_swapped(module) for module in model.modules())
    assert isinstance(model, FSDPModule)
    model.reshard()
    for name, gradient in gradients(model, mine).items():
        torch.testing.assert_close(gradient, trained[name], rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(ranks, args=(port, str(tmp_path / "checkpoint")), nprocs=2)
