import json
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigurationError, InvalidRequest
from contracts.sampling import Grammar, GrammarKind, ProcessorSpec, SamplingParams
from router.config import RouterConfig
from router.model_files import ModelDefaults, read_model_files, serving_defaults
from tests.support.router_params import (
    CONTEXT,
    EOS,
    PROMPT,
    VOCABULARY,
    make_config,
    params,
    words,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RouterConfig:
    return make_config(tmp_path_factory.mktemp("model"))


NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "top_p": 1,
    "top_k": 0,
    "logit_bias": {},
    "bad_words": [],
    "logits_processors": [],
    "vllm_xargs": {},
    "length_penalty": 1,
    "min_tokens": 0,
    "stop": [],
    "stop_token_ids": [],
    "seed": 5,
}


def test_neutral_values_change_nothing(config: RouterConfig) -> None:
    plain = params(config, seed=5)
    assert params(config, **NEUTRAL) == plain
    assert not plain.looks_back
    assert (plain.temperature, plain.top_p, plain.top_k, plain.n) == (1.0, 1.0, 0, 1)
    assert plain.max_tokens == CONTEXT - PROMPT
    assert plain.eos_token_ids == EOS
    assert (plain.logprobs, plain.prompt_logprobs) == (None, None)


# Resolved values


@pytest.mark.parametrize(
    ("given", "used"), [(0, 0.0), (1e-6, 0.0), (1e-4, 0.01), (0.01, 0.01), (2, 2.0)]
)
def test_temperature(config: RouterConfig, given: float, used: float) -> None:
    got = params(config, temperature=given, top_p=0.5, top_k=3, min_p=0.1)
    assert got.temperature == used
    assert (got.top_p, got.top_k, got.min_p) == ((1.0, 0, 0.0) if used == 0.0 else (0.5, 3, 0.1))


def test_output_limit(config: RouterConfig) -> None:
    assert params(config, max_tokens=3, max_completion_tokens=4).max_tokens == 4
    assert params(config, max_tokens=CONTEXT).max_tokens == CONTEXT - PROMPT


def test_seeds(config: RouterConfig) -> None:
    assert params(config, seed=5).seed == 5
    assert params(config, seed=-5).seed == 2**64 - 5
    assert params(config, seed=-(2**63)).seed == 2**63
    assert params(config, seed=2**63 - 1).seed == 2**63 - 1
    drawn = {params(config, seed=seed).seed for seed in (None, -1, None, -1)}
    assert len(drawn) == 4


def test_ignore_eos_keeps_stop_token_ids(config: RouterConfig) -> None:
    got = params(config, ignore_eos=True, stop_token_ids=[1, 5, 5])
    assert got.eos_token_ids == ()
    assert got.stop_token_ids == (1, 5)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_masks_every_end_token(config: RouterConfig, ignore_eos: bool) -> None:
    got = params(config, min_tokens=3, ignore_eos=ignore_eos, stop_token_ids=[2, 7])
    assert (got.min_tokens, got.min_tokens_masked) == (3, (1, 2, 7))
    assert params(config, stop_token_ids=[7]).min_tokens_masked == ()


def test_logprobs(config: RouterConfig) -> None:
    assert params(config, logprobs=True).logprobs == 0
    assert params(config, logprobs=True, top_logprobs=3).logprobs == 3
    assert params(config, logprobs=True, top_logprobs=20).logprobs == 20
    assert params(config, logprobs=True, top_logprobs=None).logprobs == 0
    assert params(config, prompt_logprobs=0).prompt_logprobs == 0
    assert params(config, prompt_logprobs=20).prompt_logprobs == 20


def test_whole_vocabulary_if_the_cap_allows(tmp_path: Path) -> None:
    for cap in (-1, VOCABULARY):
        config = make_config(tmp_path, max_logprobs=cap)
        got = params(config, logprobs=True, top_logprobs=-1, prompt_logprobs=-1)
        assert (got.logprobs, got.prompt_logprobs) == (VOCABULARY, VOCABULARY)
    config = make_config(tmp_path, max_logprobs=-1)
    assert params(config, prompt_logprobs=10**9).prompt_logprobs == VOCABULARY


def test_echo_asks_for_prompt_logprobs(config: RouterConfig) -> None:
    assert params(config, echo=True).prompt_logprobs == 0
    assert params(config, echo=True, logprobs=True, top_logprobs=3).prompt_logprobs == 3
    assert params(config, echo=True, prompt_logprobs=2).prompt_logprobs == 2
    assert params(config, echo=False).prompt_logprobs is None


def test_streams_have_no_prompt_logprobs_to_compute(config: RouterConfig) -> None:
    assert params(config, stream=True, prompt_logprobs=0).prompt_logprobs is None
    assert params(config, stream=True, echo=True).prompt_logprobs is None


def test_top_k_off(config: RouterConfig) -> None:
    assert params(config, top_k=-1).top_k == 0
    assert params(config, top_k=10**12).top_k >= VOCABULARY


def test_logit_bias_is_cut_not_refused(config: RouterConfig) -> None:
    got = params(config, logit_bias={"5": 1000, "6": -1e300, "7": 0.5, "8": 0})
    assert dict(got.logit_bias) == {5: 100.0, 6: -100.0, 7: 0.5}


def test_allowed_token_ids_once_each(config: RouterConfig) -> None:
    assert params(config, allowed_token_ids=[5, 3, 5]).allowed_token_ids == (5, 3)


def test_bad_words_bare_and_behind_a_blank(config: RouterConfig) -> None:
    def tokens(*bad: str) -> set[tuple[int, ...]]:
        return set(params(config, bad_words=list(bad)).bad_words)

    assert tokens("ab") == {words("ab"), words(" ab")}
    assert tokens(" ab") == tokens("ab")
    assert tokens("qa") == {words("qa")}  # behind a blank it is longer
    assert words(" ") in tokens(" ")
    assert tokens("ab", "ab") == tokens("ab")


def test_processors_and_their_arguments(config: RouterConfig) -> None:
    got = params(
        config,
        logits_processors=["good.a", {"qualname": "good.b", "args": [1, "é"]}],
        vllm_xargs={"x": [1, "y"]},
    )
    assert got.processors == (
        ProcessorSpec("good.a"),
        ProcessorSpec("good.b", '[1,"é"]', "{}"),
    )
    assert json.loads(got.extra_args) == {"x": [1, "y"]}
    assert params(config).extra_args == ""


def test_grammar_is_taken_over(config: RouterConfig) -> None:
    grammar = Grammar(GrammarKind.REGEX, "a")
    assert params(config, grammar=grammar).grammar == grammar


def test_beams_use_probabilities_alone(config: RouterConfig) -> None:
    defaults = ModelDefaults(temperature=0.5, repetition_penalty=1.2, top_k=3)
    got = params(
        config,
        defaults=defaults,
        n=3,
        temperature=0,
        top_p=0.5,
        length_penalty=1.5,
        ignore_eos=True,
        max_tokens=4,
        logprobs=True,
        stop=[],
        repetition_penalty=1,
        response_format={"type": "text"},
        use_beam_search=True,
    )
    assert got == SamplingParams(max_tokens=4, n=3, beam=True, length_penalty=1.5, logprobs=0)


# Defaults of the model and the operator

ALL_DEFAULTS = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": -0.3,
    "max_new_tokens": 7,
    "eos_token_id": [2, 9],
}


def write_generation_config(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_model_defaults_yield_to_the_request(config: RouterConfig, tmp_path: Path) -> None:
    defaults = read_model_files(write_generation_config(tmp_path, **ALL_DEFAULTS)).defaults
    names = [name for name in ALL_DEFAULTS if name not in ("max_new_tokens", "eos_token_id")]
    got = params(config, defaults=defaults)
    assert {name: getattr(got, name) for name in names} == {n: ALL_DEFAULTS[n] for n in names}
    assert got.max_tokens == 7
    given: dict[str, Any] = {name: NEUTRAL.get(name, 1) for name in names}
    got = params(config, defaults=defaults, max_tokens=8, **given)
    assert {name: getattr(got, name) for name in names} == given
    assert got.max_tokens == 8


def test_greedy_defaults_allow_one_sample(config: RouterConfig) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(config, defaults=ModelDefaults(temperature=0.0), n=2)
    assert caught.value.param == "n"
    assert params(config, defaults=ModelDefaults(temperature=0.0), n=2, temperature=1).n == 2


def test_where_defaults_come_from(tmp_path: Path) -> None:
    model = ModelDefaults(temperature=0.5, top_k=7, eos_ids=(3,))
    other = write_generation_config(tmp_path, top_p=0.5, eos_token_id=4)
    assert serving_defaults(model) == model
    assert serving_defaults(model, "vllm") == ModelDefaults()
    assert serving_defaults(model, str(other)) == ModelDefaults(top_p=0.5, eos_ids=(4,))
    override = {"temperature": 0, "max_new_tokens": 9, "eos_token_id": [5]}
    assert serving_defaults(model, "auto", override) == ModelDefaults(
        temperature=0.0, top_k=7, max_tokens=9, eos_ids=(5,)
    )


@pytest.mark.parametrize(
    "override", [{"temprature": 1}, {"temperature": 3}, {"top_k": "x"}, {"min_p": True}]
)
def test_overrides_that_cannot_be_honoured(override: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="override_generation_config"):
        serving_defaults(ModelDefaults(), "auto", override)


def test_senseless_values_in_the_model_folder_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_generation_config(tmp_path, temperature=9, top_p=0, top_k="x", min_p=0.5)
    assert read_model_files(folder).defaults == ModelDefaults(min_p=0.5)
    assert len(caplog.records) == 3
