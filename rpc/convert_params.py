"""Sampling parameters to protobuf messages and back. Numbers travel exactly: P and D draw alike."""

from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, GrammarKind, ProcessorSpec, SamplingParams
from rpc.packing import pack_ids, unpack_ids
from rpc.pb import worker_pb2 as pb


def params_to_pb(params: SamplingParams) -> pb.SamplingParams:
    """Sampling parameters, to the wire."""
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        n=params.n,
        eos_token_ids=pack_ids(params.eos_token_ids),
        stop_token_ids=pack_ids(params.stop_token_ids),
        logprobs=params.logprobs,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        min_tokens=params.min_tokens,
        min_tokens_masked=pack_ids(params.min_tokens_masked),
        bias_ids=pack_ids(token_id for token_id, _ in params.logit_bias),
        biases=[bias for _, bias in params.logit_bias],
        allowed_token_ids=pack_ids(params.allowed_token_ids),
        bad_words=[pack_ids(word) for word in params.bad_words],
        grammar=_grammar_to_pb(params.grammar) if params.grammar is not None else None,
        processors=[
            pb.ProcessorSpec(qualname=spec.qualname, args=spec.args, kwargs=spec.kwargs)
            for spec in params.processors
        ],
        extra_args=params.extra_args,
        prompt_logprobs=params.prompt_logprobs,
        beam=params.beam,
        length_penalty=params.length_penalty,
    )


def params_from_pb(message: pb.SamplingParams) -> SamplingParams:
    """Sampling parameters, from the wire."""
    bias_ids = unpack_ids(message.bias_ids)
    if len(bias_ids) != len(message.biases):
        raise InvalidRequest(f"{len(bias_ids)} token ids with {len(message.biases)} biases")
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        n=message.n,
        eos_token_ids=unpack_ids(message.eos_token_ids),
        stop_token_ids=unpack_ids(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        min_tokens=message.min_tokens,
        min_tokens_masked=unpack_ids(message.min_tokens_masked),
        logit_bias=tuple(zip(bias_ids, message.biases, strict=True)),
        allowed_token_ids=unpack_ids(message.allowed_token_ids),
        bad_words=tuple(unpack_ids(word) for word in message.bad_words),
        grammar=_grammar_from_pb(message.grammar) if message.HasField("grammar") else None,
        processors=tuple(
            ProcessorSpec(
                qualname=spec.qualname,
                args=spec.args if spec.HasField("args") else None,
                kwargs=spec.kwargs if spec.HasField("kwargs") else None,
            )
            for spec in message.processors
        ),
        extra_args=message.extra_args,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        beam=message.beam,
        length_penalty=message.length_penalty,
    )


def _grammar_to_pb(grammar: Grammar) -> pb.Grammar:
    return pb.Grammar(
        kind=grammar.kind.value,
        text=grammar.text,
        any_whitespace=grammar.any_whitespace,
        closed_objects=grammar.closed_objects,
        whitespace_pattern=grammar.whitespace_pattern,
        fallback=grammar.fallback,
        start_after=pack_ids(grammar.start_after),
        end_token_ids=pack_ids(grammar.end_token_ids),
        opened_by=grammar.opened_by,
    )


def _grammar_from_pb(message: pb.Grammar) -> Grammar:
    try:
        kind = GrammarKind(message.kind)
    except ValueError:
        raise InvalidRequest(f"unknown kind of grammar {message.kind!r}") from None
    return Grammar(
        kind=kind,
        text=message.text,
        any_whitespace=message.any_whitespace,
        closed_objects=message.closed_objects,
        whitespace_pattern=message.whitespace_pattern,
        fallback=message.fallback,
        start_after=unpack_ids(message.start_after),
        end_token_ids=unpack_ids(message.end_token_ids),
        opened_by=message.opened_by if message.HasField("opened_by") else None,
    )
