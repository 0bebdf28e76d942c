"""Every file in cluster_configs/ is loaded by what will read it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.front import resolve_front
from cluster.ray_settings import RETRY_ON
from cluster.settings import ClusterSettings, load_settings

FOLDER = Path(__file__).parents[2] / "cluster_configs"
RAY_UP = sorted(FOLDER.glob("ray_up_*.yaml"))
SERVE = sorted(FOLDER.glob("serve_*.yaml"))
SETTINGS = sorted(FOLDER.glob("local*.yaml"))
HAPROXY = (
    "RAY_SERVE_ENABLE_HA_PROXY=1",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=",
    f"RAY_SERVE_HAPROXY_RETRY_ON='{RETRY_ON}'",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=",
)


def load(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text())
    assert isinstance(content, dict)
    return content


def name(file: Path) -> str:
    return file.stem


def test_every_file_is_of_a_known_kind() -> None:
    assert set(RAY_UP + SERVE + SETTINGS) == set(FOLDER.iterdir())
    assert {file.stem for file in RAY_UP} >= {"ray_up_aws", "ray_up_onprem"}


@pytest.mark.parametrize("file", SETTINGS, ids=name)
def test_settings(file: Path) -> None:
    settings = load_settings({"model": "demo"}, file=file, environ={})
    assert (settings.prefill, settings.decode, settings.aggregated) == (1, 1, False)
    assert settings.device == "auto"


@pytest.mark.parametrize("file", RAY_UP, ids=name)
def test_ray_up_schema(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load(file)))
    with pytest.raises(Exception, match="no_such_key"):
        validate_config(prepare_config(load(file) | {"no_such_key": 1}))


@pytest.mark.parametrize("file", RAY_UP, ids=name)
def test_ray_up_commands(file: Path) -> None:
    config = load(file)
    commands = [
        *config["setup_commands"],
        *config["head_start_ray_commands"],
        *config["worker_start_ray_commands"],
    ]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)
    # Serve takes its HAProxy settings from the raylet, so they belong in front of every start.
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert len(starts) == 1
        before, _, _ = starts[0].partition("ray start")
        assert all(f" {variable}" in before for variable in HAPROXY)
    assert "--head" in " ".join(config["head_start_ray_commands"])
    assert "--address=$RAY_HEAD_IP" in " ".join(config["worker_start_ray_commands"])


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own models
@pytest.mark.parametrize("file", SERVE, ids=name)
def test_serve_schema_and_arguments(file: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(load(file))
    (application,) = schema.applications
    module, _, function = (application.import_path or "").partition(":")
    assert (module, function) == ("cluster.serve_app", "build")
    settings = load_settings(application.args, environ={})
    assert settings.cluster_key_file is not None  # a key would stand in Serve's own records
    replicas = {one.name: one.num_replicas for one in application.deployments}
    expected = {
        "Router": settings.router_replicas,
        "PrefillWorker": settings.prefill,
        "DecodeWorker": settings.decode,
    }
    assert replicas in ({}, expected)


def test_pinned_workers_ask_for_what_the_node_types_offer() -> None:
    nodes = load(FOLDER / "ray_up_aws.yaml")["available_node_types"]
    offered = {kind: sum_of(nodes[kind]) for kind in ("prefill", "decode")}
    (application,) = load(FOLDER / "serve_pinned.yaml")["applications"]
    wanted = {
        resource: one["num_replicas"] * amount
        for one in application["deployments"]
        for resource, amount in one.get("ray_actor_options", {}).get("resources", {}).items()
    }
    assert wanted == {"prefill_node": offered["prefill"], "decode_node": offered["decode"]}


def sum_of(node_type: dict[str, Any]) -> int:
    """Workers that all nodes of a type can hold: its one custom resource times its nodes."""
    (amount,) = node_type["resources"].values()
    return int(amount) * int(node_type["max_workers"])


def test_the_deployment_names_are_those_of_the_application() -> None:
    """Serve reports an unknown name only when the cluster already runs."""
    source = (FOLDER.parent / "cluster" / "serve_app.py").read_text()
    for deployment in ("Router", "PrefillWorker", "DecodeWorker"):
        assert f'"{deployment}"' in source


def test_the_options_are_those_of_a_router(tmp_path: Path) -> None:
    settings = load_settings({"model": "m"}, file=FOLDER / "local_options.yaml", environ={})
    config = resolve_front(settings, tmp_path).router_config(settings, str(tmp_path), "0123456789")
    assert config.names == ("chat", "chat-latest")
    assert (config.tool_call_parser, config.reasoning_parser) == ("hermes", "qwen3")
    assert config.override_generation_config == {"temperature": 0.7}
    assert config.max_body_bytes == 8 << 20


def test_there_is_a_setting_for_every_key() -> None:
    for file in SETTINGS:
        assert set(load(file)) <= set(ClusterSettings.model_fields)
