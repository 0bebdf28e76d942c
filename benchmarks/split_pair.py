"""A prefill and a decode worker in this process, with a real peer link and NIXL, to measure."""

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from contracts.events import (
    Adopted,
    PathTaken,
    PrefillStarted,
    RequestFailed,
    TokensOut,
    WorkerEvent,
)
from contracts.ids import RequestId, WorkerId, new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from contracts.worker import Role, WorkerConfig
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker

_TIMEOUT_S = 120.0


class PairError(Exception):
    """A request did not go the way that is measured."""


@dataclass(eq=False)
class Flight:
    """What has come of one request."""

    params: str = ""
    path: str = ""
    tokens: dict[int, int] = field(default_factory=dict[int, int])  # by position
    finished: bool = False
    failure: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class SplitPair:
    """One P, one D, and the smallest router there is: also their SessionSink, without a wire."""

    def __init__(self, prefill: PrefillWorker, decode: DecodeWorker) -> None:
        self.session_id = "benchmark"
        self.prefill = prefill
        self.decode = decode
        self._flights: dict[RequestId, Flight] = {}

    async def open(self) -> None:
        """Start both."""
        await self.prefill.start()
        await self.decode.start()

    async def close(self) -> None:
        """End both; also if `open` failed."""
        await self.decode.close()
        await self.prefill.close()

    def send(self, events: Iterable[WorkerEvent]) -> None:
        """See SessionSink."""
        for event in events:
            flight = self._flights.get(event.request_id)
            if flight is None:
                continue
            match event:
                case PrefillStarted():
                    flight.params = event.kv_transfer_params
                case PathTaken():
                    flight.path = event.path
                case Adopted(accepted=False):
                    flight.failure = f"refused: {event.reason}"
                case RequestFailed():
                    flight.failure = f"{event.kind}: {event.message}"
                case TokensOut():
                    flight.tokens.update(enumerate(event.token_ids, event.position))
                    flight.finished = flight.finished or event.finish is not None
            flight.changed.set()

    async def generate(self, prompt_ids: Sequence[int], new_tokens: int) -> int:
        """One request over the remote path; its output tokens.

        Raises:
            PairError: it failed, or took another path.
        """
        request, flight = self._new(prompt_ids, new_tokens)
        try:
            self.prefill.submit(request, True, self)
            await self._until(flight, "params")
            self.decode.adopt(request, flight.params, self)
            await self._until(flight, "finished")
        finally:
            del self._flights[request.request_id]
        if flight.path != "remote":
            raise PairError(f"the path was {flight.path}")
        return len(flight.tokens)

    async def handoff_s(self, prompt_ids: Sequence[int]) -> float:
        """Seconds from the Adopt of a prompt that P has computed to the sequence in D's engine.

        Raises:
            PairError: it failed, or took another path.
        """
        clock = asyncio.get_running_loop().time
        request, flight = self._new(prompt_ids, 2)
        try:
            self.prefill.submit(request, True, self)
            await self._until(flight, "tokens")
            began = clock()
            self.decode.adopt(request, flight.params, self)
            await self._until(flight, "path")
            seconds = clock() - began
            await self._until(flight, "finished")
        finally:
            del self._flights[request.request_id]
        if flight.path != "remote":
            raise PairError(f"the path was {flight.path}")
        return seconds

    def _new(self, prompt_ids: Sequence[int], new_tokens: int) -> tuple[GenerationRequest, Flight]:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        request = GenerationRequest(new_request_id(), tuple(prompt_ids), params)
        flight = self._flights[request.request_id] = Flight()
        return request, flight

    async def _until(self, flight: Flight, name: str) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while not getattr(flight, name):
                if flight.failure:
                    raise PairError(flight.failure)
                flight.changed.clear()
                await flight.changed.wait()


@asynccontextmanager
async def split_pair(model: Path, **settings: Any) -> AsyncIterator[SplitPair]:
    """A running pair on `model`; `settings` are WorkerConfig's, for both."""
    key = secrets.token_hex(16)

    def config(role: Role) -> WorkerConfig:
        return WorkerConfig(
            role=role,
            worker_id=WorkerId(f"{role}-{secrets.token_hex(3)}"),
            model_path=str(model),
            cluster_key=key,
            num_threads=1,
            **settings,
        )

    pair = SplitPair(PrefillWorker(config(Role.PREFILL)), DecodeWorker(config(Role.DECODE)))
    try:
        await pair.open()
        yield pair
    finally:
        await pair.close()


def build_model(folder: Path) -> int:
    """Write a small random Llama (4 layers of 256) into `folder`; the size of its vocabulary."""
    vocab_size, hidden, layers, heads, kv_heads, head_dim = 2048, 256, 4, 8, 4, 32
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    shapes = {"model.embed_tokens": (vocab_size, hidden), "lm_head": (vocab_size, hidden)}
    for layer in range(layers):
        for name, outputs, inputs in (
            ("self_attn.q_proj", heads * head_dim, hidden),
            ("self_attn.k_proj", kv_heads * head_dim, hidden),
            ("self_attn.v_proj", kv_heads * head_dim, hidden),
            ("self_attn.o_proj", hidden, heads * head_dim),
            ("mlp.gate_proj", hidden, hidden),
            ("mlp.up_proj", hidden, hidden),
            ("mlp.down_proj", hidden, hidden),
        ):
            shapes[f"model.layers.{layer}.{name}"] = (outputs, inputs)
    draw = np.random.default_rng(0)
    weights = {
        f"{name}.weight": draw.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    norms = [f"model.layers.{n}.{place}_layernorm" for n in range(layers)
             for place in ("input", "post_attention")]  # fmt: skip
    weights |= {f"{name}.weight": np.ones(hidden, np.float32) for name in [*norms, "model.norm"]}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return vocab_size


def prompts(draw: random.Random, vocab_size: int, num_tokens: int) -> list[int]:
    """A prompt that no cache knows."""
    return [draw.randrange(3, vocab_size) for _ in range(num_tokens)]
