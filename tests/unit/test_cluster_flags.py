"""Flags and settings have the same names, and flags give every kind of value."""

import argparse
from pathlib import Path

import pytest

from cluster.cli import make_parser
from cluster.settings import ClusterSettings, load_settings

VLLM = (
    "--api-key",
    "--api-key-file",
    "--allow-credentials",
    "--allowed-headers",
    "--allowed-methods",
    "--allowed-origins",
    "--chat-template",
    "--enable-auto-tool-choice",
    "--exclude-tools-when-tool-choice-none",
    "--generation-config",
    "--logits-processor-pattern",
    "--max-logprobs",
    "--override-generation-config",
    "--reasoning-parser",
    "--return-tokens-as-token-ids",
    "--served-model-name",
    "--tool-call-parser",
    "--trust-request-chat-template",
)


def subparser(command: str) -> argparse.ArgumentParser:
    (action,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = action.choices[command]
    return found


@pytest.mark.parametrize("command", ["serve", "router"])
def test_vllms_names(command: str) -> None:
    actions = subparser(command)._option_string_actions
    for flag in VLLM:
        assert actions[flag].dest in ClusterSettings.model_fields, flag


def test_workers_take_the_pattern() -> None:
    args = make_parser().parse_args(["worker", "decode", "m", "--logits-processor-pattern", "a.b"])
    assert args.logits_processor_pattern == "a.b"


@pytest.mark.parametrize(
    "given",
    [
        ["--api-key", "one", "two"],
        ["--api-key", "one", "--api-key", "two"],
        ["--api-keys", "one,two"],
        ["--api-key", '["one", "two"]'],
    ],
    ids=str,
)
def test_words_in_all_forms(given: list[str]) -> None:
    args = make_parser().parse_args(["serve", "m", *given])
    assert args.api_keys == ["one", "two"]
    assert load_settings({"model": "m", "api_keys": args.api_keys}, environ={}).api_keys == (
        "one",
        "two",
    )


def test_switches_and_values(tmp_path: Path) -> None:
    given = [
        *("serve", "m", "--trust-request-chat-template", "--no-enable-render"),
        *("--served-model-name", "a", "b", "--override-generation-config", '{"top_k": 3}'),
        *("--max-logprobs", "-1", "--enable-auto-tool-choice"),
    ]
    args = make_parser().parse_args(given)
    flags = {k: v for k, v in vars(args).items() if k in ClusterSettings.model_fields}
    settings = load_settings(flags, environ={})
    assert settings.trust_request_chat_template is True
    assert settings.enable_render is False
    assert settings.served_model_name == ("a", "b")
    assert settings.override_generation_config == {"top_k": 3}
    assert settings.max_logprobs == -1


def test_wrong_json_is_told_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["serve", "m", "--allowed-origins", "[1"])
    assert "--allowed-origins: not valid JSON" in capsys.readouterr().err
