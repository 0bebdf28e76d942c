from pathlib import Path

import pytest

from cluster.settings import load_settings, parse_bytes, read_cluster_key
from contracts.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        pytest.param(1 << 20, 1 << 20, id="a-number"),
        pytest.param("4096", 4096, id="digits"),
        pytest.param("512MiB", 512 << 20, id="binary"),
        pytest.param("512mi", 512 << 20, id="binary-short"),
        pytest.param("2GB", 2 * 10**9, id="decimal"),
        pytest.param("1.5 GiB", 3 << 29, id="fraction"),
        pytest.param("7b", 7, id="bytes"),
    ],
)
def test_parse_bytes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", 0, -1, "-5MB", "2 apples", "GiB", "1e9", True])
def test_parse_bytes_refuses(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


def write(folder: Path, text: str) -> Path:
    file = folder / "baton.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path, "model: from-file\nport: 1\ndecode: 5\nprefill: 3\n")
    environ = {"BATON_PORT": "2", "BATON_DECODE": "6", "UNRELATED": "x"}
    settings = load_settings({"port": "3", "host": None}, file=file, environ=environ)
    assert (settings.port, settings.decode, settings.prefill) == (3, 6, 3)
    assert (settings.model, settings.host, settings.block_size) == ("from-file", "127.0.0.1", 16)


def test_environment_gives_every_kind_of_value() -> None:
    environ = {
        "BATON_MODEL": "m",
        "BATON_AGGREGATED": "true",
        "BATON_KV_MEMORY": "2GB",
        "BATON_API_KEYS": "one,two",
        "BATON_MAX_MODEL_LEN": "",  # empty: not set
        "BATON_LOG_LEVEL": "INFO",  # not a setting
        "BATON_TEST_ANYTHING": "1",
        "BATON_NATIVE": "0",
    }
    settings = load_settings({}, environ=environ)
    assert settings.aggregated is True
    assert settings.kv_memory == 2 * 10**9
    assert settings.api_keys == ("one", "two")
    assert settings.max_model_len is None


@pytest.mark.parametrize(
    ("flags", "yaml", "environ", "message"),
    [
        pytest.param(
            {}, "model: m\nprot: 1\n", {}, r"'prot' in .*baton.yaml.*mean port", id="file"
        ),
        pytest.param({}, "", {"BATON_MODLE": "m"}, "'modle' in the environment", id="environment"),
        pytest.param({"zzzz": 1}, "", {}, "'zzzz' in the command line$", id="flag"),
        pytest.param({}, "", {}, "setting model: Field required", id="no-model"),
        pytest.param({"model": "m", "port": "x"}, "", {}, "port .from the command line", id="type"),
        pytest.param({"model": "m"}, "kv_memory: 2 apples", {}, "is no size; write", id="size"),
        pytest.param({"model": "m", "kv_memory": "0MiB"}, "", {}, "be positive", id="no-size"),
        pytest.param({"model": "m", "kv_offload_memory": -1}, "", {}, "be positive", id="less"),
        pytest.param({"model": "m", "dtype": "int3"}, "", {}, "setting dtype", id="choice"),
        pytest.param({"model": "m"}, "- 1", {}, "must hold a mapping", id="yaml-list"),
        pytest.param({"model": "m"}, "a: [", {}, "is no YAML", id="no-yaml"),
    ],
)
def test_errors_are_one_line_that_names_the_setting(
    tmp_path: Path, flags: dict[str, object], yaml: str, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_settings(flags, file=write(tmp_path, yaml), environ=environ)
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*none\.yaml: No such file"):
        load_settings({"model": "m"}, file=tmp_path / "none.yaml", environ={})


def test_cluster_key_is_not_shown_and_comes_from_a_file(tmp_path: Path) -> None:
    settings = load_settings({"model": "m", "cluster_key": "very-secret"}, environ={})
    assert "very-secret" not in repr(settings)
    file = tmp_path / "key"
    file.write_text("from-the-file\n", encoding="utf-8")
    assert read_cluster_key(None, str(file)) == "from-the-file"
    assert read_cluster_key("direct", str(file)) == "direct"
    assert read_cluster_key(None, None) is None
    file.write_text("short", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="less than 8"):
        read_cluster_key(None, str(file))
