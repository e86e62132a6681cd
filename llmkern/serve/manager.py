"""transformers' continuous batching with three things that a server needs: sampling by request, errors that stay with
their request, and word of every token and of the end.

The manager schedules, prefills in chunks, shares prefixes, owns the pages and runs the model in a thread.  Its own
hooks are too few (5.23), so this class replaces methods of it; `tests/serve` fails where a release moves them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from llmkern.integrations.transformers.paged import PAGED, register_paged, why_not_paged
from llmkern.serve.options import ServeOptions
from llmkern.serve.sampling import Drawn, History, draw

__all__ = ["Arrived", "Manager", "cache_blocks"]

PAGE = 64  # tokens; a prompt's whole pages are shared with other prompts that begin alike
BATCH_TOKENS = 512  # of a step: a longer prompt goes in chunks, so that the others do not wait for all of it
CACHE_SHARE = 0.4  # of the memory that is free after loading, at most


@dataclass(frozen=True)
class Arrived:
    """Result of a step for a sequence.  outcome: a token, or the exception that ended it; started, at: perf_counter()
    when it left the queue, and now."""

    identity: str
    outcome: Drawn | Exception
    started: float
    at: float


class _StepFailed(Exception):
    """A step's forward or sampling raised; the manager's own handling would end all requests and the thread."""


class Manager(ContinuousBatchingManager):
    """`ContinuousBatchingManager` for a server.

    on_step: called in the worker's thread with what a step brought.  on_death: called there once with the exception
    that ended the worker; nothing runs after it.
    """

    def __init__(
        self,
        model: nn.Module,
        options: ServeOptions,
        on_step: Callable[[list[Arrived]], None],
        on_death: Callable[[Exception], None],
    ) -> None:
        self._on_step, self._on_death = on_step, on_death
        self.histories: dict[str, History] = {}
        self.prefix_queries = self.prefix_hits = self.steps = 0
        self._prepared: list[tuple[Any, list[int]]] = []
        pages = -(-options.max_context // PAGE)
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=cache_blocks(model, pages, options.max_concurrent),
            max_batch_tokens=max(BATCH_TOKENS, options.max_concurrent),
            max_requests_per_batch=options.max_concurrent,
            max_blocks_per_request=0,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        super().__init__(model, GenerationConfig(do_sample=False, eos_token_id=-1), config)  # type: ignore[arg-type]
        # Resolved to 0 for whatever is not flash attention; ours reads block tables too.
        if model.config._attn_implementation == PAGED:  # type: ignore[union-attr]
            self.continuous_batching_config.max_blocks_per_request = pages
        router: Any = self.output_router
        router.deliver = self._deliver_failure
        router.deliver_batch = lambda outputs: None  # tokens go through `on_step`

    def submit(self, identity: str, prompt: list[int], max_tokens: int, eos: list[int], history: History) -> None:
        """Queue a sequence.  Raises RuntimeError where the worker has ended."""
        self.histories[identity] = history
        if self.add_request(prompt, identity, max_tokens, eos_token_id=eos) is None:
            del self.histories[identity]
            raise RuntimeError("the worker has ended")

    def forget(self, identity: str, *, cancel: bool) -> None:
        """Drop a sequence; `cancel` where it is still running: its pages are free before the next step."""
        self.histories.pop(identity, None)
        if cancel:
            self.cancel_request(identity)

    @property
    def running(self) -> int:
        """Number of sequences that have pages."""
        return len(self.batch_processor.scheduler.active_requests) if self.batch_processor else 0

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for their first step."""
        queued = self.input_queue.qsize()
        return queued + (len(self.batch_processor.scheduler.waiting_requests) if self.batch_processor else 0)

    @property
    def cache_used(self) -> float:
        """Share of the cache's sectors held by sequences and shared prefixes."""
        return 1.0 - self.batch_processor.cache.compute_free_capacity() if self.batch_processor else 0.0

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Attention on the pages as they lie where the model's layers allow it, else transformers' own."""
        if why_not_paged(model.config.get_text_config()) is not None:
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
            return
        register_paged()
        original = model.config._attn_implementation
        model.set_attn_implementation(PAGED)
        if model.config._attn_implementation != original:
            self._original_attn_impl = original

    def _create_batch_processor(self) -> Any:
        existing = self.batch_processor
        processor: Any = super()._create_batch_processor()
        if processor is not existing:
            processor.model_runner._sample = self._sample
            ios, cache = processor.inputs_and_outputs, processor.cache
            self._prepare, ios.prepare_batch_tensors = ios.prepare_batch_tensors, self._prepare_and_note
            self._search, cache.search_prefix_match = cache.search_prefix_match, self._search_and_count
        return processor

    def _prepare_and_note(self, requests_in_batch: list[Any], **options: Any) -> None:
        self._prepared = [(future, future.state.tokens_to_process) for future in requests_in_batch]
        self._prepare(requests_in_batch=requests_in_batch, **options)

    def _search_and_count(self, request_id: str, prompt_ids: list[int]) -> int:
        found: int = self._search(request_id, prompt_ids)
        self.prefix_queries += len(prompt_ids)
        self.prefix_hits += found
        return found

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """`ModelRunner._sample` by request: scores fp32 [1, requests or more, V]; writes the tokens."""
        processor: Any = self.batch_processor
        states = [f.state for f in processor.inputs_and_outputs.requests_in_batch if f.has_new_token]
        pairs = [(i, state, self.histories.get(state.request_id)) for i, state in enumerate(states)]
        # A cancelled sequence may have one more step, whose token nobody reads.
        live = [(i, state, history) for i, state, history in pairs if history is not None]
        output_ids[0, : len(states)] = 0
        if not live:
            return
        rows = scores[0, : len(states)] if len(live) == len(states) else scores[0, [i for i, _, _ in live]]
        arrived = []
        now = time.perf_counter
        for (i, state, history), outcome in zip(live, draw(rows, [h for _, _, h in live]), strict=True):
            arrived.append(Arrived(state.request_id, outcome, state.lifespan[0], now()))
            if isinstance(outcome, Exception):
                processor.scheduler.set_request_cancellation(state.request_id)
            else:
                history.add(outcome.token)
                output_ids[0, i] = outcome.token
        self._on_step(arrived)

    def _generation_step(self) -> None:
        try:
            super()._generation_step()
        except Exception as error:
            raise _StepFailed from error
        self.steps += 1

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        try:
            return super()._generation_loop_body(batch_processor, bootstrapping)
        except _StepFailed:
            self._step_each(batch_processor)
            return True

    def _step_each(self, processor: Any) -> None:
        """Repeat a failed step with one request at a time, so that only those at fault fail."""
        for future, tokens in self._prepared:
            state = future.state
            state.position_offset -= future.query_length
            state.tokens_to_process = tokens
        for future, _ in list(self._prepared):
            processor.inputs_and_outputs.prepare_batch_tensors(
                requests_in_batch=[future],
                logits_processors=processor.logit_processor,
                use_decode_fast_path=False,
                num_q_tokens=future.query_length,
                max_kv_read=future.state.position_offset,
                use_padding=False,
            )
            try:
                processor._generation_step(self.model)
            except Exception as error:
                processor.handle_batch_error(error)
            else:
                processor.update_batch()

    def _deliver_failure(self, output: Any) -> None:
        if output.error is not None:
            now = time.perf_counter()
            self._on_step([Arrived(output.request_id, RuntimeError(output.error), output.lifespan[0], now)])

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        super()._handle_critical_error(error, batch_processor)
        self._on_death(error)


def cache_blocks(model: Any, pages: int, sequences: int) -> int:
    """Blocks of the cache: room for so many sequences of so many pages, within a share of the free memory."""
    import psutil

    config: Any = model.config.get_text_config()
    device, dtype = model.device, model.dtype
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block = config.num_hidden_layers * 2 * heads * head_dim * PAGE * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    affordable = int(free * CACHE_SHARE / block)
    if affordable < pages:
        raise ValueError(
            f"--max-context is {pages * PAGE}, whose keys and values take {pages * block >> 20} MiB; "
            f"{affordable * PAGE} tokens fit into memory"
        )
    return max(min(pages * sequences, affordable), pages)
