"""The application as Serve gets it; that it runs is tests/e2e/test_ray_serve.py's concern."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

from cluster.demo_model import ensure_demo_model
from cluster.machine import Machine
from cluster.resolve import resolve
from cluster.settings import load_settings
from contracts.errors import ConfigurationError
from contracts.worker import Role

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, about its use of pydantic
    from cluster import serve_app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(ensure_demo_model(tmp_path_factory.mktemp("models") / "demo"))


def deployments(application: Any) -> dict[str, Any]:
    """All deployments of an application by name."""
    found: dict[str, Any] = {}
    queue = [application._bound_deployment]
    while queue:
        deployment = queue.pop()
        found[deployment.name] = deployment
        queue += [
            argument._bound_deployment
            for argument in deployment.init_args
            if hasattr(argument, "_bound_deployment")
        ]
    return found


def test_build_takes_settings_and_gives_three_deployments(model: str) -> None:
    args = {"model": model, "prefill": 2, "decode": 3, "router_replicas": 4, "worker_cpus": 2.5}
    application = serve_app.build(args | {"cluster_key": "0123456789", "device": "cpu"})
    found = deployments(application)
    replicas = {name: deployment.num_replicas for name, deployment in found.items()}
    assert replicas == {"Router": 4, "PrefillWorker": 2, "DecodeWorker": 3}
    assert found["Router"].max_ongoing_requests == 4096
    assert found["DecodeWorker"].ray_actor_options["num_cpus"] == 2.5


def test_aggregated_has_no_prefill_worker(model: str) -> None:
    args = {"model": model, "aggregated": True, "cluster_key": "0123456789", "device": "cpu"}
    assert set(deployments(serve_app.build(args))) == {"Router", "DecodeWorker"}


def test_all_ranks_of_a_worker_are_one_actors(model: str) -> None:
    args = {"model": model, "aggregated": True, "cluster_key": "0123456789", "device": "cuda"}
    ranks = {"tensor_parallel_size": 4, "worker_cpus": 2, "kv_memory": "1GiB"}
    options = deployments(serve_app.build(args | ranks))["DecodeWorker"].ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (8, 4)


def test_build_refuses_what_a_cluster_cannot_use(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATON_CLUSTER_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="cluster_key_file"):
        serve_app.build({"model": model})
    with pytest.raises(ConfigurationError, match="did you mean prefill"):
        serve_app.build({"model": model, "prefil": 1})


def test_a_replica_configures_itself_from_what_travels(model: str) -> None:
    settings = load_settings({"model": model, "cluster_key": "0123456789"}, environ={})
    machine = Machine(cores=2, free_bytes=8 << 30)
    local = pickle.loads(pickle.dumps(resolve(settings, machine, local=True)))
    config = serve_app.configure(local, Role.PREFILL, "p-1", "10.0.0.9")
    assert (config.worker_id, config.host, config.model_path) == ("p-1", "127.0.0.1", model)
    spread = pickle.loads(pickle.dumps(resolve(settings, machine, local=False)))
    assert serve_app.configure(spread, Role.DECODE, "d-1", "10.0.0.9").host == "10.0.0.9"
    assert serve_app.configure_router(spread, "r-1").router_id == "r-1"


def test_the_routers_options_travel(model: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n", encoding="utf-8")
    flags = {
        "model": model,
        "cluster_key": "0123456789",
        "api_key_file": str(keys),
        "served_model_name": ["a", "b"],
        "chat_template": "{{ messages }}",
        "tool_call_parser": "hermes",
        "logits_processor_pattern": "a.b",
        "override_generation_config": {"top_k": 3},
    }
    machine = Machine(cores=2, free_bytes=8 << 30)
    cluster = resolve(load_settings(flags, environ={}), machine, local=False)
    keys.unlink()  # read where the settings were, not in the replica
    travelled = pickle.loads(pickle.dumps(cluster))
    router = serve_app.configure_router(travelled, "r-1")
    assert (router.api_keys, router.names) == (("one", "two"), ("a", "b"))
    assert (router.chat_template, router.tool_call_parser) == ("{{ messages }}", "hermes")
    assert router.override_generation_config == {"top_k": 3}
    worker = serve_app.configure(travelled, Role.DECODE, "d-1", "10.0.0.9")
    assert router.logits_processor_pattern == worker.logits_processor_pattern == "a.b"


def test_a_node_without_the_model_says_so(model: str, tmp_path: Path) -> None:
    settings = load_settings({"model": model, "cluster_key": "0123456789"}, environ={})
    cluster = resolve(settings, Machine(cores=2, free_bytes=8 << 30), local=False)
    hidden = Path(model).rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(ConfigurationError, match="no model folder"):
            serve_app.configure(cluster, Role.DECODE, "d-1", "10.0.0.9")
    finally:
        hidden.rename(model)
