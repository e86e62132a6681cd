"""int8 layers under FSDP2 and tensor parallelism, on two processes."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llmkern.nn import Int8Linear

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [Int8Linear.from_linear(nn.Linear(16, 32)), nn.ReLU(), Int8Linear.from_linear(nn.Linear(32, 16))]
    return nn.Sequential(*layers).eval()


def ranks(rank: int, port: int, results: list) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    wanted = model()(x)
    mesh = init_device_mesh("cpu", (2,))

    sharded = model()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    with torch.no_grad():
        out = sharded(x)
    is_sharded = isinstance(sharded.state_dict()["0.weight"], DTensor)
    codes = sharded.state_dict()["0.weight"].full_tensor()

    layer = model()[0]
    for name, parameter in list(layer.named_parameters()):
        layer.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]), False))
    layer.register_buffer("weight_scale", distribute_tensor(layer.weight_scale, mesh, [Shard(0)]))
    weight = layer.weight

    results[rank] = {
        "fsdp is exact": torch.equal(out, wanted),
        "fsdp shards codes": is_sharded and torch.equal(codes, model()[0].codes),
        "a sharded weight reads as floating point": isinstance(weight, DTensor) and weight.dtype == torch.float32,
        "with the right values": torch.equal(weight.full_tensor(), model()[0].dequantized_weight()),
    }
    dist.destroy_process_group()


def test_two_processes_agree_with_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.list([None, None])
        torch.multiprocessing.spawn(ranks, args=(port, results), nprocs=2)
        for rank in (0, 1):
            assert [what for what, holds in results[rank].items() if not holds] == []
