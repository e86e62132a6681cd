"""torch.compile of an optimized model: no graph break that the untouched model has not, and the same results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Entry

import llmkern

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

NAMES = ("llama", "gemma2", "gpt2", "gpt_neox", "bert", "t5", "whisper", "vit", "torch_prenorm")
some_entries = pytest.mark.parametrize("entry", [e for e in ZOO if e.name in NAMES], ids=str)


def compiled(entry: Entry, model: nn.Module) -> tuple[int, Tensor]:
    """The number of graphs that the forward became, and its result."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        inputs = entry.inputs(padding=entry.paddings[-1])
        result = entry.at_kept_positions(entry.output(torch.compile(model, backend=backend)(**inputs)), inputs)
    return graphs, result


@some_entries
def test_compiling_breaks_no_graph(entry: Entry) -> None:
    model = entry.build()
    untouched_graphs, _ = compiled(entry, model)
    report = llmkern.report(llmkern.optimize_(model)).swap
    inputs = entry.inputs(padding=entry.paddings[-1])
    with torch.no_grad():
        eager = entry.at_kept_positions(entry.output(model(**inputs)), inputs)
    graphs, result = compiled(entry, model)
    assert report.swapped
    assert graphs <= untouched_graphs
    torch.testing.assert_close(result, eager, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_notices_the_swap_and_its_undo() -> None:
    """Guards on the modules' classes: neither swapping nor restoring leaves a stale graph behind."""
    entry = next(e for e in ZOO if e.name == "llama")
    model, inputs = entry.build(), entry.inputs()
    compiled_model = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = compiled_model(**inputs).logits
        llmkern.optimize_(model)
        torch.testing.assert_close(compiled_model(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
        llmkern.restore_(model)
        assert torch.equal(compiled_model(**inputs).logits, expected)


@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in ("llama", "gpt2", "bert")], ids=str)
@torch.no_grad()
def test_sizes_that_change_stay_in_one_graph(entry: Entry) -> None:
    """From the second shape on torch.compile traces with sizes that are no numbers, and the checks must let them by."""
    model = entry.build()
    llmkern.optimize_(model)
    torch.compiler.reset()
    compiled_model = torch.compile(model, backend="eager", fullgraph=True)
    for batch, padding in ((2, "none"), (3, "none"), (3, "right"), (4, "right")):
        inputs = entry.inputs(batch, padding)
        inputs = {name: tensor[:, batch:] for name, tensor in inputs.items()}
        result, expected = (entry.output(m(**inputs)) for m in (compiled_model, model))
        torch.testing.assert_close(
            entry.at_kept_positions(result, inputs), entry.at_kept_positions(expected, inputs), rtol=1e-4, atol=1e-4
        )
