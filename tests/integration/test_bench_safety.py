"""The benchmark of the safety machinery: what it switches off is off, and it measures all of it."""

import random
from pathlib import Path

import pytest

from benchmarks.safety import Bench, as_text, compare, measured_parts, parser, safety_off
from benchmarks.split_pair import build_model, prompts, split_pair

SMALL = (
    "--concurrency 2 --prompts 40 --pairs 2 --rounds 1 --handoffs 2 "
    "--prompt-tokens 40 --output-tokens 4"
)


async def test_on_and_off(tmp_path: Path) -> None:
    vocab_size = build_model(tmp_path)
    options = parser().parse_args(SMALL.split())
    draw = random.Random(0)
    async with split_pair(tmp_path) as pair:
        with measured_parts() as found, safety_off():
            assert await pair.generate(prompts(draw, vocab_size, 40), 4) == 4
        assert {calls for calls, _ in found.values()} == {0}

        report = await Bench(pair, vocab_size, options).report()
        assert all(part.calls_per_request > 0 for part in report.parts), report.parts
    (throughput,) = report.throughput
    assert throughput.tokens_per_s.on > 0
    assert throughput.tokens_per_s.pairs == 2
    (handoff,) = report.handoff
    assert handoff.ms.on > 0
    text = as_text(report)
    assert "tokens/s at 2 requests" in text
    assert "handoff of 40 tokens" in text


def test_a_comparison_is_of_pairs() -> None:
    on = [{"ms": 11.0}, {"ms": 22.0}, {"ms": 103.0}]
    off = [{"ms": 10.0}, {"ms": 20.0}, {"ms": 100.0}]
    compared = compare(on, off, "ms", lambda a, b: a - b)
    assert (compared.on, compared.off, compared.cost) == (22.0, 20.0, 2.0)
    assert compared.quartiles == pytest.approx((1.0, 3.0))
