"""Names, keys, templates and parsers: from the settings to the router's configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.front import Front, resolve_front
from cluster.settings import load_settings
from contracts.errors import ConfigurationError
from router.config import RouterConfig


def front(folder: Path, model: str = "m", **flags: object) -> Front:
    return resolve_front(load_settings({"model": model, **flags}, environ={}), folder)


def router(folder: Path, **flags: object) -> RouterConfig:
    settings = load_settings({"model": str(folder), **flags}, environ={})
    return resolve_front(settings, folder).router_config(settings, str(folder), "0123456789")


@pytest.mark.parametrize(
    ("model", "flags", "names"),
    [
        pytest.param("org/name", {}, ("org/name",), id="hub-id"),
        pytest.param("./org/name", {}, ("folder",), id="folder"),
        pytest.param("m", {"served_model_name": "a"}, ("a",), id="one"),
        pytest.param("m", {"served_model_name": ["a", "b/c"]}, ("a", "b/c"), id="several"),
        pytest.param(
            "m", {"served_model_name": "a,b", "model_aliases": "c,a"}, ("a", "b", "c"), id="aliases"
        ),
        pytest.param("org/name", {"model_aliases": ["x"]}, ("org/name", "x"), id="only-aliases"),
    ],
)
def test_names(tmp_path: Path, model: str, flags: dict[str, Any], names: tuple[str, ...]) -> None:
    folder = tmp_path / "folder"
    assert front(folder, model, **flags).names == names


def test_keys_come_from_settings_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two,2 \nthree\n", encoding="utf-8")
    found = front(tmp_path, api_keys="zero,one", api_key_file=str(file))
    assert found.api_keys == ("zero", "one", "two,2", "three")
    assert front(tmp_path).api_keys == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("\n \n", "holds no key", id="empty"),
        pytest.param("ü\n", "printable ASCII", id="umlaut"),
        pytest.param("a b\n", "without spaces", id="space"),
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b"\xff", "not UTF-8", id="bytes"),
    ],
)
def test_bad_key_files(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError, match=message):
        front(tmp_path, api_key_file=str(file))


def test_keys_are_not_shown(tmp_path: Path) -> None:
    settings = load_settings({"model": str(tmp_path), "api_keys": "hidden-key"}, environ={})
    found = resolve_front(settings, tmp_path)
    config = found.router_config(settings, str(tmp_path), "hidden-cluster-key")
    assert config.api_keys == ("hidden-key",)
    for value in (settings, found, config):
        assert "hidden" not in repr(value)
    with pytest.raises(ConfigurationError) as caught:
        front(tmp_path, api_keys="hidden key")
    assert "hidden" not in str(caught.value)


def test_a_template_is_a_file_or_the_text_itself(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    assert front(tmp_path, chat_template=str(file)).chat_template == "{{ messages }}"
    assert front(tmp_path, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    assert front(tmp_path).chat_template is None
    with pytest.raises(ConfigurationError, match=r"chat_template .*none\.jinja: No such file"):
        front(tmp_path, chat_template=str(tmp_path / "none.jinja"))


@pytest.mark.parametrize("kind", ["tool_call_parser", "reasoning_parser"])
def test_unknown_parsers_are_told_with_the_known_ones(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{kind} 'hermess' is not known.*, .*or none"):
        front(tmp_path, **{kind: "hermess"})
    assert getattr(router(tmp_path, **{kind: "none"}), kind) == "none"


def test_generation_config_is_checked(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}", encoding="utf-8")
    for value in ("auto", "vllm", str(tmp_path)):
        assert router(tmp_path, generation_config=value).generation_config == value
    with pytest.raises(ConfigurationError, match="'elsewhere' is no folder with"):
        front(tmp_path, generation_config="elsewhere")


def test_everything_arrives_at_the_router(tmp_path: Path) -> None:
    """Each setting below changes the configuration in the field of that name."""
    values: dict[str, object] = {
        "max_model_len": 100,
        "allowed_origins": ("http://a",),
        "allowed_methods": ("GET",),
        "allowed_headers": ("x-a",),
        "allow_credentials": True,
        "aggregated": True,
        "max_inflight": 7,
        "max_body_bytes": 1000,
        "max_batch": 3,
        "request_timeout_s": 5.5,
        "worker_wait_s": 6.5,
        "replay_wait_s": 7.5,
        "queue_wait_s": 8.5,
        "body_timeout_s": 9.5,
        "write_timeout_s": 10.5,
        "enable_render": False,
        "trust_request_chat_template": True,
        "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3",
        "exclude_tools_when_tool_choice_none": True,
        "logits_processor_pattern": "a.b",
        "max_logprobs": -1,
        "return_tokens_as_token_ids": True,
        "generation_config": "vllm",
        "override_generation_config": {"temperature": 0.5},
    }
    config, default = router(tmp_path, **values), router(tmp_path)
    for name, value in values.items():
        assert getattr(config, name) == value
        assert getattr(default, name) != value
    other = router(tmp_path, disable_fastapi_docs=True, enable_kv_transfer_params=True)
    assert (other.enable_openapi, other.allow_kv_transfer_params) == (False, True)
    assert (default.enable_openapi, default.allow_kv_transfer_params) == (True, False)


def test_the_same_from_a_file_and_the_environment(tmp_path: Path) -> None:
    """vLLM's names with dashes are fine in YAML; JSON and lists in the environment."""
    file = tmp_path / "baton.yaml"
    file.write_text(
        "\n".join(
            [
                f"model: {tmp_path}",
                "served-model-name: [a, b]",
                "api-key: [one]",
                "tool-call-parser: hermes",
                "enable-auto-tool-choice: true",
                "override-generation-config: {top_k: 5}",
                "logits-processor-pattern: a.*",
            ]
        ),
        encoding="utf-8",
    )
    from_file = load_settings({}, file=file, environ={})
    environ = {
        "BATON_MODEL": str(tmp_path),
        "BATON_SERVED_MODEL_NAME": "a,b",
        "BATON_API_KEY": "one",
        "BATON_TOOL_CALL_PARSER": "hermes",
        "BATON_ENABLE_AUTO_TOOL_CHOICE": "true",
        "BATON_OVERRIDE_GENERATION_CONFIG": json.dumps({"top_k": 5}),
        "BATON_LOGITS_PROCESSOR_PATTERN": "a.*",
    }
    assert load_settings({}, environ=environ) == from_file
    assert from_file.served_model_name == ("a", "b")
    with pytest.raises(ConfigurationError, match="api_keys is set twice"):
        load_settings({}, environ={**environ, "BATON_API_KEYS": "two"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enable_auto_tool_choice": False}, "it cannot be switched off"),
        ({"override_generation_config": "{"}, "not valid JSON"),
        ({"override_generation_config": "[1]"}, "valid dictionary"),
        ({"logits_processor_pattern": "("}, "not a regular expression"),
        ({"allowed_origins": "[1"}, "not valid JSON"),
        ({"max_logprobs": -2}, "greater than or equal to -1"),
        ({"served_model_name": [""]}, "at least 1 character"),
    ],
    ids=str,
)
def test_wrong_values(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_settings({"model": "m", **flags}, environ={})
    assert "\n" not in str(caught.value)
