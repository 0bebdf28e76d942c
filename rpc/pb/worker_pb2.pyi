from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "n", "eos_token_ids", "stop_token_ids", "logprobs", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "min_tokens", "min_tokens_masked", "bias_ids", "biases", "allowed_token_ids", "bad_words", "grammar", "processors", "extra_args", "prompt_logprobs", "beam", "length_penalty")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_MASKED_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    PROCESSORS_FIELD_NUMBER: _ClassVar[int]
    EXTRA_ARGS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BEAM_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    n: int
    eos_token_ids: bytes
    stop_token_ids: bytes
    logprobs: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    min_tokens: int
    min_tokens_masked: bytes
    bias_ids: bytes
    biases: _containers.RepeatedScalarFieldContainer[float]
    allowed_token_ids: bytes
    bad_words: _containers.RepeatedScalarFieldContainer[bytes]
    grammar: Grammar
    processors: _containers.RepeatedCompositeFieldContainer[ProcessorSpec]
    extra_args: str
    prompt_logprobs: int
    beam: bool
    length_penalty: float
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., n: _Optional[int] = ..., eos_token_ids: _Optional[bytes] = ..., stop_token_ids: _Optional[bytes] = ..., logprobs: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., min_tokens: _Optional[int] = ..., min_tokens_masked: _Optional[bytes] = ..., bias_ids: _Optional[bytes] = ..., biases: _Optional[_Iterable[float]] = ..., allowed_token_ids: _Optional[bytes] = ..., bad_words: _Optional[_Iterable[bytes]] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., processors: _Optional[_Iterable[_Union[ProcessorSpec, _Mapping]]] = ..., extra_args: _Optional[str] = ..., prompt_logprobs: _Optional[int] = ..., beam: bool = ..., length_penalty: _Optional[float] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "text", "any_whitespace", "closed_objects", "whitespace_pattern", "fallback", "start_after", "end_token_ids", "opened_by")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ANY_WHITESPACE_FIELD_NUMBER: _ClassVar[int]
    CLOSED_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    WHITESPACE_PATTERN_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    START_AFTER_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OPENED_BY_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    any_whitespace: bool
    closed_objects: bool
    whitespace_pattern: str
    fallback: bool
    start_after: bytes
    end_token_ids: bytes
    opened_by: int
    def __init__(self, kind: _Optional[str] = ..., text: _Optional[str] = ..., any_whitespace: bool = ..., closed_objects: bool = ..., whitespace_pattern: _Optional[str] = ..., fallback: bool = ..., start_after: _Optional[bytes] = ..., end_token_ids: _Optional[bytes] = ..., opened_by: _Optional[int] = ...) -> None: ...

class ProcessorSpec(_message.Message):
    __slots__ = ("qualname", "args", "kwargs")
    QUALNAME_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    KWARGS_FIELD_NUMBER: _ClassVar[int]
    qualname: str
    args: str
    kwargs: str
    def __init__(self, qualname: _Optional[str] = ..., args: _Optional[str] = ..., kwargs: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_ids", "params", "output_ids", "cache_salt", "deadline_s", "handoff", "finished", "priority", "redraw", "lease_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REDRAW_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_ids: bytes
    params: SamplingParams
    output_ids: _containers.RepeatedScalarFieldContainer[bytes]
    cache_salt: str
    deadline_s: float
    handoff: bool
    finished: bytes
    priority: int
    redraw: bool
    lease_ms: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_ids: _Optional[bytes] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ..., output_ids: _Optional[_Iterable[bytes]] = ..., cache_salt: _Optional[str] = ..., deadline_s: _Optional[float] = ..., handoff: bool = ..., finished: _Optional[bytes] = ..., priority: _Optional[int] = ..., redraw: bool = ..., lease_ms: _Optional[int] = ...) -> None: ...

class Adopt(_message.Message):
    __slots__ = ("submit", "kv_transfer_params")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_PARAMS_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    kv_transfer_params: str
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., kv_transfer_params: _Optional[str] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router_id", "incarnation", "epoch", "protocol_version")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    incarnation: int
    epoch: int
    protocol_version: int
    def __init__(self, router_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class RouterFrame(_message.Message):
    __slots__ = ("sequence", "hello", "submits", "adopts", "aborts", "piece", "more_pieces")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    ADOPTS_FIELD_NUMBER: _ClassVar[int]
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    MORE_PIECES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    hello: RouterHello
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    adopts: _containers.RepeatedCompositeFieldContainer[Adopt]
    aborts: _containers.RepeatedCompositeFieldContainer[Abort]
    piece: bytes
    more_pieces: bool
    def __init__(self, sequence: _Optional[int] = ..., hello: _Optional[_Union[RouterHello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., adopts: _Optional[_Iterable[_Union[Adopt, _Mapping]]] = ..., aborts: _Optional[_Iterable[_Union[Abort, _Mapping]]] = ..., piece: _Optional[bytes] = ..., more_pieces: bool = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "role", "incarnation", "semantic_hash", "max_model_len", "max_prompt_tokens", "block_size", "total_blocks", "attention_backend", "device", "version", "epoch", "protocol_version")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_HASH_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    incarnation: int
    semantic_hash: str
    max_model_len: int
    max_prompt_tokens: int
    block_size: int
    total_blocks: int
    attention_backend: str
    device: str
    version: str
    epoch: int
    protocol_version: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., incarnation: _Optional[int] = ..., semantic_hash: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., block_size: _Optional[int] = ..., total_blocks: _Optional[int] = ..., attention_backend: _Optional[str] = ..., device: _Optional[str] = ..., version: _Optional[str] = ..., epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("step", "waiting", "running", "waiting_tokens", "free_blocks", "total_blocks", "draining", "free", "cached", "owned", "leased", "reserved", "quarantined", "expired_transfers", "revoked_transfers", "offload_free", "offload_cached", "offload_loading", "offloaded_bytes", "loaded_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    OWNED_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_FREE_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_CACHED_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_LOADING_FIELD_NUMBER: _ClassVar[int]
    OFFLOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    waiting: int
    running: int
    waiting_tokens: int
    free_blocks: int
    total_blocks: int
    draining: bool
    free: int
    cached: int
    owned: int
    leased: int
    reserved: int
    quarantined: int
    expired_transfers: int
    revoked_transfers: int
    offload_free: int
    offload_cached: int
    offload_loading: int
    offloaded_bytes: int
    loaded_bytes: int
    def __init__(self, step: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., draining: bool = ..., free: _Optional[int] = ..., cached: _Optional[int] = ..., owned: _Optional[int] = ..., leased: _Optional[int] = ..., reserved: _Optional[int] = ..., quarantined: _Optional[int] = ..., expired_transfers: _Optional[int] = ..., revoked_transfers: _Optional[int] = ..., offload_free: _Optional[int] = ..., offload_cached: _Optional[int] = ..., offload_loading: _Optional[int] = ..., offloaded_bytes: _Optional[int] = ..., loaded_bytes: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: bytes
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("request_id", "attempt", "choice", "position", "token_ids", "logprobs", "finish")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    choice: int
    position: int
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., choice: _Optional[int] = ..., position: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish: _Optional[str] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("request_id", "attempt", "position", "logprobs", "ranks", "num_top", "top_ids", "top_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    position: int
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: bytes
    num_top: bytes
    top_ids: bytes
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., position: _Optional[int] = ..., logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[bytes] = ..., num_top: _Optional[bytes] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class PrefillStarted(_message.Message):
    __slots__ = ("request_id", "attempt", "kv_transfer_params", "cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_PARAMS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    kv_transfer_params: str
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., kv_transfer_params: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ("request_id", "attempt", "accepted", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    accepted: bool
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., accepted: bool = ..., reason: _Optional[str] = ...) -> None: ...

class PathTaken(_message.Message):
    __slots__ = ("request_id", "attempt", "path", "cause", "num_bytes", "num_descriptors", "read_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    READ_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    path: str
    cause: str
    num_bytes: int
    num_descriptors: int
    read_s: float
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., path: _Optional[str] = ..., cause: _Optional[str] = ..., num_bytes: _Optional[int] = ..., num_descriptors: _Optional[int] = ..., read_s: _Optional[float] = ...) -> None: ...

class RequestFailed(_message.Message):
    __slots__ = ("request_id", "attempt", "kind", "message", "param")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    kind: str
    message: str
    param: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class WorkerEvent(_message.Message):
    __slots__ = ("tokens", "prefill_started", "adopted", "path_taken", "failed", "prompt_scores")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STARTED_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    PATH_TAKEN_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SCORES_FIELD_NUMBER: _ClassVar[int]
    tokens: Tokens
    prefill_started: PrefillStarted
    adopted: Adopted
    path_taken: PathTaken
    failed: RequestFailed
    prompt_scores: PromptScores
    def __init__(self, tokens: _Optional[_Union[Tokens, _Mapping]] = ..., prefill_started: _Optional[_Union[PrefillStarted, _Mapping]] = ..., adopted: _Optional[_Union[Adopted, _Mapping]] = ..., path_taken: _Optional[_Union[PathTaken, _Mapping]] = ..., failed: _Optional[_Union[RequestFailed, _Mapping]] = ..., prompt_scores: _Optional[_Union[PromptScores, _Mapping]] = ...) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("sequence", "hello", "events", "load", "piece", "more_pieces")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    MORE_PIECES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    hello: WorkerHello
    events: _containers.RepeatedCompositeFieldContainer[WorkerEvent]
    load: Load
    piece: bytes
    more_pieces: bool
    def __init__(self, sequence: _Optional[int] = ..., hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., events: _Optional[_Iterable[_Union[WorkerEvent, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., piece: _Optional[bytes] = ..., more_pieces: bool = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("audit",)
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    audit: bool
    def __init__(self, audit: bool = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class PeerHello(_message.Message):
    __slots__ = ("incarnation", "protocol_version", "semantic_hash", "layout", "agent_metadata")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_HASH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    AGENT_METADATA_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    protocol_version: int
    semantic_hash: str
    layout: str
    agent_metadata: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, incarnation: _Optional[int] = ..., protocol_version: _Optional[int] = ..., semantic_hash: _Optional[str] = ..., layout: _Optional[str] = ..., agent_metadata: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("transfer_id", "nonce", "prompt_digest")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    nonce: str
    prompt_digest: str
    def __init__(self, transfer_id: _Optional[str] = ..., nonce: _Optional[str] = ..., prompt_digest: _Optional[str] = ...) -> None: ...

class ClaimGranted(_message.Message):
    __slots__ = ("transfer_id", "block_ids", "generations", "num_tokens", "ready_tokens", "lease_ms", "first_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    READY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    block_ids: bytes
    generations: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: int
    ready_tokens: int
    lease_ms: int
    first_tokens: _containers.RepeatedCompositeFieldContainer[Tokens]
    def __init__(self, transfer_id: _Optional[str] = ..., block_ids: _Optional[bytes] = ..., generations: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[int] = ..., ready_tokens: _Optional[int] = ..., lease_ms: _Optional[int] = ..., first_tokens: _Optional[_Iterable[_Union[Tokens, _Mapping]]] = ...) -> None: ...

class ClaimDenied(_message.Message):
    __slots__ = ("transfer_id", "kind", "message")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    kind: str
    message: str
    def __init__(self, transfer_id: _Optional[str] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ChunkReady(_message.Message):
    __slots__ = ("transfer_id", "ready_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    READY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    ready_tokens: int
    def __init__(self, transfer_id: _Optional[str] = ..., ready_tokens: _Optional[int] = ...) -> None: ...

class FirstTokens(_message.Message):
    __slots__ = ("transfer_id", "tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    tokens: _containers.RepeatedCompositeFieldContainer[Tokens]
    def __init__(self, transfer_id: _Optional[str] = ..., tokens: _Optional[_Iterable[_Union[Tokens, _Mapping]]] = ...) -> None: ...

class Revoked(_message.Message):
    __slots__ = ("transfer_id", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    reason: str
    def __init__(self, transfer_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("transfer_id", "nonce")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    nonce: str
    def __init__(self, transfer_id: _Optional[str] = ..., nonce: _Optional[str] = ...) -> None: ...

class Reading(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    def __init__(self, transfer_id: _Optional[str] = ...) -> None: ...

class ReleaseAck(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    def __init__(self, transfer_id: _Optional[str] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class DecodeFrame(_message.Message):
    __slots__ = ("hello", "claim", "release", "beat", "reading")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    READING_FIELD_NUMBER: _ClassVar[int]
    hello: PeerHello
    claim: Claim
    release: Release
    beat: Beat
    reading: Reading
    def __init__(self, hello: _Optional[_Union[PeerHello, _Mapping]] = ..., claim: _Optional[_Union[Claim, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., reading: _Optional[_Union[Reading, _Mapping]] = ...) -> None: ...

class PrefillFrame(_message.Message):
    __slots__ = ("hello", "granted", "denied", "chunk_ready", "first_tokens", "revoked", "release_ack", "beat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    DENIED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_READY_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ACK_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    hello: PeerHello
    granted: ClaimGranted
    denied: ClaimDenied
    chunk_ready: ChunkReady
    first_tokens: FirstTokens
    revoked: Revoked
    release_ack: ReleaseAck
    beat: Beat
    def __init__(self, hello: _Optional[_Union[PeerHello, _Mapping]] = ..., granted: _Optional[_Union[ClaimGranted, _Mapping]] = ..., denied: _Optional[_Union[ClaimDenied, _Mapping]] = ..., chunk_ready: _Optional[_Union[ChunkReady, _Mapping]] = ..., first_tokens: _Optional[_Union[FirstTokens, _Mapping]] = ..., revoked: _Optional[_Union[Revoked, _Mapping]] = ..., release_ack: _Optional[_Union[ReleaseAck, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ...) -> None: ...
