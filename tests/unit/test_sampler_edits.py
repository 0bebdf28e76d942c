"""Everything that changes logits before a draw, against one row at a time in plain numpy."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from contracts.sampling import Grammar, GrammarKind, ProcessorSpec, SamplingParams
from engine.guide import Guide, Matcher, Processor
from engine.noise import draw_key, gumbel
from engine.plan import Sampled, SampleSlot
from engine.sampler import sample
from engine.sampling_state import SamplingStates

VOCAB = 40
GRAMMAR = Grammar(GrammarKind.REGEX, "x")


@dataclass
class Rule:
    """A toy grammar: token t may follow after k tokens if (t + k) % step == 0; `end` ends."""

    step: int
    end: int = 39
    most: int = 10**6
    taken: list[int] = field(default_factory=list[int])
    _ended: bool = False

    def fill(self, bitmask: NDArray[np.int32]) -> None:
        bits = np.zeros(len(bitmask) * 32, dtype=np.uint8)
        if len(self.taken) < self.most:
            bits[: VOCAB - 1] = [(t + len(self.taken)) % self.step == 0 for t in range(VOCAB - 1)]
        bits[self.end] = len(self.taken) >= min(2, self.most)
        bitmask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> bool:
        mask = np.zeros(2, dtype=np.int32)
        self.fill(mask)
        if self._ended or not mask[token_id // 32] >> (token_id % 32) & 1:
            return False
        self._ended = token_id == self.end
        self.taken.append(token_id)
        return True

    @property
    def ended(self) -> bool:
        return self._ended

    def matcher(self) -> Matcher:
        return Rule(self.step, self.end, self.most)


def slot(
    position: int = 0,
    choice: int = 0,
    sequence: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    guide: Guide | None = None,
    **params: Any,
) -> SampleSlot:
    made = SamplingParams(max_tokens=99, **params)
    position = len(output) if output else position
    return SampleSlot(choice, position, made, sequence, prompt, output, guide)


def one(logits: torch.Tensor, given_slot: SampleSlot) -> Sampled:
    return sample(logits, [0], [given_slot], SamplingStates())[0]


def oracle(logits: NDArray[np.float32], s: SampleSlot) -> tuple[NDArray[np.float32], int]:
    """(what log-probabilities are reported of, the token) by the rules, one step at a time."""
    p, row = s.params, logits.astype(np.float32).copy()
    if p.grammar is not None:
        assert s.guide is not None
        assert s.guide.grammar is not None
        matcher = s.guide.grammar.matcher()
        for token in s.output_ids:
            assert matcher.accept(token)
        mask = np.zeros(2, dtype=np.int32)
        matcher.fill(mask)
        row[np.unpackbits(mask.view(np.uint8), count=VOCAB, bitorder="little") == 0] = -math.inf
    reported = row.copy()

    def rule_out(tokens: set[int]) -> None:
        trial = row.copy()
        trial[list(tokens)] = -math.inf
        if np.any(trial > -math.inf):
            row[:] = trial

    if p.allowed_token_ids:
        rule_out(set(range(VOCAB)) - set(p.allowed_token_ids))
    rule_out({w[-1] for w in p.bad_words if len(w) == 1 or s.output_ids[-(len(w) - 1) :] == w[:-1]})
    if s.position < p.min_tokens:
        rule_out(set(p.min_tokens_masked))
    for token, value in p.logit_bias:
        row[token] += np.float32(value)
    if p.processors:
        assert s.guide is not None
        assert s.guide.processors is not None
        for processor in s.guide.processors():
            given_row = torch.from_numpy(row.copy())
            row = processor(list(s.prompt_ids), list(s.output_ids), given_row).numpy()
    for token in range(VOCAB):
        if token in s.prompt_ids or token in s.output_ids:
            factor = np.float32(p.repetition_penalty)
            row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
        count = s.output_ids.count(token)
        row[token] -= np.float32(p.frequency_penalty) * np.float32(count)
        row[token] -= np.float32(p.presence_penalty) * np.float32(count > 0)
    if p.greedy:
        return reported, int(np.argmax(row))
    row = row / np.float32(p.temperature)
    if p.min_p > 0:
        row[row < row.max() + np.float32(math.log(p.min_p))] = -math.inf
    order = np.argsort(-row, kind="stable")
    kept = order[: p.top_k] if 0 < p.top_k < VOCAB else order
    weights = np.exp(row[kept] - row[kept[0]])
    before = np.cumsum(weights) - weights
    if p.top_p < 1:
        kept = kept[(before < p.top_p * weights.sum()) | (np.arange(len(kept)) == 0)]
    key = draw_key(p.seed, s.choice, s.position)
    noise = gumbel(torch.arange(VOCAB)[None, :], [key])[0].numpy()
    best = max(kept.tolist(), key=lambda token: (row[token] + noise[token], -token))
    return reported, best


def shift(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """A processor that changes its argument, as many do."""
    logits[(len(prompt_ids) + 3 * len(output_ids)) % VOCAB] += 2.5
    return logits


tokens = st.integers(0, VOCAB - 2)
few = st.integers(0, 4)  # so that they repeat
several = st.lists(tokens, max_size=4, unique=True).map(tuple)
mixed = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.6]),
        "top_k": st.sampled_from([0, 1, 5, 100]),
        "top_p": st.sampled_from([1.0, 0.35, 0.9]),
        "min_p": st.sampled_from([0.0, 0.1, 0.9]),
        "seed": st.integers(0, 2**64 - 1),
        "logprobs": st.sampled_from([0, 1, 3, VOCAB, 99]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
        "frequency_penalty": st.sampled_from([-1.5, 0.0, 0.75]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 1.25]),
        "min_tokens": st.integers(0, 6),
        "min_tokens_masked": st.just((39, 3)),
        "logit_bias": st.sampled_from([(), ((1, 100.0),), ((5, -100.0), (39, 2.5))]),
        "allowed_token_ids": several,
        "bad_words": st.lists(st.lists(few, min_size=1, max_size=3).map(tuple), max_size=4).map(
            tuple
        ),
    },
)


@st.composite
def slots(draw: st.DrawFn, index: int) -> SampleSlot:
    params: dict[str, Any] = draw(mixed)
    step = draw(st.sampled_from([0, 0, 2, 5]))
    length = draw(st.integers(0, 5))
    output = tuple(draw(st.lists(few, min_size=length, max_size=length)))
    guide = Guide()
    if step:
        params["grammar"] = GRAMMAR
        guide = Guide(grammar=Rule(step))
        output = tuple((-place) % step for place in range(length))
    if draw(st.booleans()) and draw(st.booleans()):
        params["processors"] = (ProcessorSpec("shift"),)
        guide = replace(guide, processors=lambda: [shift])
    prompt = tuple(draw(st.lists(tokens, max_size=5)))
    made = SamplingParams(max_tokens=99, **params)
    looks = made.looks_back
    return SampleSlot(
        index % 3, length, made, index, prompt if looks else (), output if looks else (), guide
    )


@given(data=st.data(), seed=st.integers(0, 10**6), count=st.integers(1, 7))
@settings(max_examples=120, deadline=None)
def test_a_mixed_batch_is_each_row_alone_and_the_oracle(
    data: st.DataObject, seed: int, count: int
) -> None:
    batch = [data.draw(slots(index)) for index in range(count)]
    logits = torch.randn((count, VOCAB), generator=torch.Generator().manual_seed(seed))
    logits[:, :5] += 2
    before = logits.clone()
    found = sample(logits, range(count), batch, SamplingStates())
    assert torch.equal(logits, before), "the model's logits are not ours to change"
    for row, (got, s) in enumerate(zip(found, batch, strict=True)):
        assert got == sample(logits, [row], [s], SamplingStates())[0]
        assert got.error == ""
        reported, token = oracle(before[row].numpy(), s)
        assert got.token_id == token
        if s.params.logprobs is None:
            assert got.logprob is None
            continue
        assert got.logprob is not None
        truth = torch.log_softmax(torch.from_numpy(reported), dim=-1)
        assert got.logprob.logprob == pytest.approx(float(truth[token]), abs=1e-5)
        order = torch.sort(truth, descending=True, stable=True).indices[: s.params.logprobs]
        assert [t for t, _ in got.logprob.top] == order.tolist()
        assert not any(math.isnan(value) for _, value in got.logprob.top)


@given(data=st.data(), seed=st.integers(0, 10**6), limit=st.sampled_from([1, 100]))
@settings(max_examples=40, deadline=None)
def test_states_that_are_carried_along_change_nothing(
    data: st.DataObject, seed: int, limit: int
) -> None:
    """Step after step, with a state kept, dropped (a bound of one) or rewound."""
    batch = [data.draw(slots(index)) for index in range(3)]
    states = SamplingStates(limit)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        logits = torch.randn((3, VOCAB), generator=generator) * 3
        found = sample(logits, [0, 1, 2], batch, states)
        assert len(states) <= limit
        alone = [one(logits[row : row + 1], s) for row, s in enumerate(batch)]
        assert found == alone
        going = data.draw(st.sampled_from([True, True, True, False]))
        if not going:
            continue  # the same draw again, as after a preemption
        batch = [
            s if got.ended else advance(s, got.token_id)
            for s, got in zip(batch, found, strict=True)
        ]


def advance(s: SampleSlot, token: int) -> SampleSlot:
    output = (*s.output_ids, token) if s.params.looks_back else ()
    return replace(s, position=s.position + 1, output_ids=output)


def test_a_grammar_ends_with_its_end_token() -> None:
    logits = torch.zeros((1, VOCAB))
    logits[0, 39] = 9.0
    states = SamplingStates()
    s = slot(guide=Guide(Rule(2)), grammar=GRAMMAR, temperature=0.0)
    drawn: list[Sampled] = []
    while not (drawn and drawn[-1].ended):
        drawn.append(sample(logits, [0], [s], states)[0])
        s = advance(s, drawn[-1].token_id)
    assert [one.token_id for one in drawn] == [0, 1, 39]


def test_a_forced_token_is_certain_and_never_lost_to_noise() -> None:
    logits = torch.zeros((1, VOCAB))
    guide = Guide(Rule(2, most=0))  # only the end token, at once
    for seed in range(50):
        found = one(logits, slot(guide=guide, grammar=GRAMMAR, seed=seed, logprobs=2))
        assert found.token_id == 39
        assert found.logprob is not None
        assert found.logprob.logprob == 0.0


def test_the_grammar_wins_over_masks_in_conflict() -> None:
    logits = torch.zeros((1, VOCAB))
    ending: dict[str, Any] = {"guide": Guide(Rule(2, most=0)), "grammar": GRAMMAR}
    ruled_out: list[dict[str, Any]] = [
        {"allowed_token_ids": (1, 2)},
        {"bad_words": ((39,),)},
        {"min_tokens": 5, "min_tokens_masked": (39,)},
    ]
    for params in (*ruled_out, ruled_out[0] | ruled_out[1] | ruled_out[2]):
        assert one(logits, slot(**ending, **params)).token_id == 39
    # Without a grammar the earlier rule wins: bad words would empty what is allowed.
    both = slot(allowed_token_ids=(4,), bad_words=((4,),))
    assert one(logits, both).token_id == 4


def test_a_grammar_that_starts_late() -> None:
    grammar = replace(GRAMMAR, start_after=(7, 8))
    guide = Guide(Rule(3))
    logits = torch.zeros((1, VOCAB))
    logits[0, 1] = 5.0  # the rule lets 0, 3, 6 … begin
    for output, token in {(): 1, (7,): 1, (8, 7): 1, (1, 7, 8): 0, (7, 8, 3): 2}.items():
        s = slot(output=output, guide=guide, grammar=grammar, temperature=0.0)
        assert one(logits, s).token_id == token, output


def test_a_grammar_that_the_first_token_puts_off() -> None:
    grammar = replace(GRAMMAR, start_after=(7, 8), opened_by=35)
    guide = Guide(Rule(3))  # lets 0, 3, 6 ... begin
    logits = torch.zeros((1, VOCAB))
    logits[0, 1] = 5.0
    thinks = torch.zeros((1, VOCAB))
    thinks[0, 35] = 5.0

    def drawn(rows: torch.Tensor, *output: int) -> int:
        s = slot(output=output, guide=guide, grammar=grammar, temperature=0.0)
        return one(rows, s).token_id

    assert drawn(thinks) == 35
    assert drawn(logits) == 0  # it does not think: bound at once
    assert drawn(logits, 0) == drawn(logits, 35, 7, 8, 0)  # either way the rule goes on from 0
    assert drawn(logits, 35) == 1  # thoughts are free
    assert drawn(logits, 35, 7, 8) == 0
    assert drawn(thinks, 35, 7, 8) == 0  # they do not open twice


def test_what_fails_fails_alone() -> None:
    def raises(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("secret")

    def nan(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits * math.nan

    def narrow(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits[:3]

    def nothing(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> Any:
        return None

    def empty(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -math.inf)

    def cannot_be_made() -> list[Processor]:
        raise OSError("/a/path")

    spec = (ProcessorSpec("x"),)
    logits = torch.randn((1, VOCAB))
    cases: list[tuple[SampleSlot, str]] = [
        (slot(processors=spec, guide=Guide(processors=lambda: [raises])), "KeyError"),
        (slot(processors=spec, guide=Guide(processors=lambda: [nan])), "NaN"),
        (slot(processors=spec, guide=Guide(processors=lambda: [narrow])), "shape"),
        (slot(processors=spec, guide=Guide(processors=lambda: [nothing])), "tensor"),
        (slot(processors=spec, guide=Guide(processors=lambda: [empty])), "no token"),
        (slot(processors=spec, guide=Guide(processors=cannot_be_made)), "OSError"),
        (slot(processors=spec), "not prepared"),
        (slot(grammar=GRAMMAR), "not prepared"),
        (slot(grammar=GRAMMAR, guide=Guide(Rule(2)), output=(1,)), "does not fit"),
        (slot(grammar=GRAMMAR, guide=Guide(Rule(99, end=39, most=1)), output=(0, 39, 1)), "fit"),
        (slot(grammar=GRAMMAR, guide=Guide(Rule(99)), output=(0,)), "leaves no token"),
    ]
    good = slot(logit_bias=((3, 50.0),), logprobs=1, sequence=77)
    batch = [replace(s, sequence=i) for i, (s, _) in enumerate(cases)] + [good, slot()]
    states = SamplingStates()
    found = sample(logits, [0] * len(batch), batch, states)
    for (_, reason), got in zip(cases, found, strict=False):
        assert reason in got.error
        assert got.token_id == 0
        assert "secret" not in got.error
        assert "/a/path" not in got.error
    assert found[-2] == one(logits, good)
    assert found[-2].token_id == 3
    assert found[-1].error == ""
    assert len(states) == 1, "a state that failed is not kept"


def test_infinite_logits_of_a_processor_force_a_token() -> None:
    def force(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[11] = math.inf
        return logits.double()

    guide = Guide(processors=lambda: [force])
    for params in ({"temperature": 0.0}, {"temperature": 0.01}, {"top_p": 0.5}, {"top_k": 3}):
        s = slot(processors=(ProcessorSpec("x"),), guide=guide, **params)
        assert one(torch.randn((1, VOCAB)), s).token_id == 11


def test_a_stateful_processor_has_one_instance_a_choice() -> None:
    made: list[int] = []

    def make() -> list[Processor]:
        made.append(0)
        mine = len(made) - 1

        def count(p: list[int], o: list[int], logits: torch.Tensor) -> torch.Tensor:
            made[mine] += 1
            return logits

        return [count]

    params = SamplingParams(max_tokens=9, processors=(ProcessorSpec("x"),))
    states, guide, logits = SamplingStates(), Guide(processors=make), torch.zeros((1, VOCAB))
    pair = [SampleSlot(choice, 0, params, 5, (1,), (), guide) for choice in (0, 1)]
    for _ in range(3):
        found = sample(logits, [0, 0], pair, states)
        pair = [advance(s, got.token_id) for s, got in zip(pair, found, strict=True)]
    assert made == [3, 3]


def test_ids_outside_the_vocabulary_do_no_harm() -> None:
    logits = torch.zeros((1, VOCAB))
    s = slot(
        prompt=(VOCAB + 5, 3),
        output=(1,),
        logit_bias=((VOCAB, 5.0), (2, 1.0)),
        bad_words=((VOCAB + 1,),),
        allowed_token_ids=(2, VOCAB),
        min_tokens=9,
        min_tokens_masked=(VOCAB + 2,),
        repetition_penalty=1.5,
    )
    assert one(logits, s).token_id == 2


def test_plain_batches_take_the_old_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing here is edited")

    monkeypatch.setattr("engine.sampler._sample_edited", never)
    monkeypatch.setattr("engine.sampler._drop_unlikely", never)
    states = SamplingStates()
    batch = [
        slot(temperature=0.0, min_tokens=2, min_tokens_masked=(1,), position=2),
        slot(top_k=3, logprobs=1),
        slot(beam=True, n=2, repetition_penalty=1.4),
    ]
    found = sample(torch.randn((3, VOCAB)), [0, 1, 2], batch, states)
    assert all(got.error == "" for got in found)
    assert len(states) == 0
