import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.launch_plan import read_plan, write_plan
from cluster.machine import Machine, inspect_machine
from cluster.resolve import ResolvedCluster, resolve, resolve_router
from cluster.settings import load_settings
from contracts.errors import ConfigurationError
from contracts.worker import Role

GIB = 1 << 30
CPU = Machine(cores=8, free_bytes=32 * GIB)
GPU = Machine(cores=8, free_bytes=32 * GIB, gpus=1, gpu_free_bytes=80 * GIB)
KEY = "0123456789abcdef"


def model(folder: Path, weight_bytes: int = 1 << 20, **config: Any) -> Path:
    """A model folder with sparse weights. A token's KV has 2 * 4 * 2 * 64 = 1024 values."""
    path = folder / "my-model"
    path.mkdir()
    values = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 512,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(values | config), encoding="utf-8")
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(weight_bytes)
    return path


def resolved(
    path: Path, machine: Machine = CPU, *, local: bool = True, **flags: object
) -> ResolvedCluster:
    return resolve(load_settings({"model": str(path), **flags}, environ={}), machine, local=local)


def test_defaults_on_a_cpu(tmp_path: Path) -> None:
    cluster = resolved(model(tmp_path))
    assert (cluster.device, cluster.dtype, cluster.worker_gpus) == ("cpu", "float32", 0.0)
    assert cluster.served_model_name == "my-model"
    assert cluster.num_threads == 4  # 8 cores, two workers
    assert cluster.kv_memory_bytes == 16 * 4096 * 1024 * 4  # 16 full sequences
    assert cluster.max_model_len == 4096
    assert cluster.weight_bytes == 2 << 20  # bfloat16 -> float32
    assert len(cluster.cluster_key) == 64


@pytest.mark.parametrize(
    ("weight_gib", "flags", "dtype"),
    [
        pytest.param(1.9, {}, "float32", id="small-enough"),
        pytest.param(2.1, {}, "bfloat16", id="more-than-a-quarter-of-memory"),
        pytest.param(3.9, {"aggregated": True}, "float32", id="one-worker-alone"),
        pytest.param(0.1, {"dtype": "float16"}, "float16", id="asked-for"),
    ],
)
def test_dtype_on_a_cpu(
    tmp_path: Path, weight_gib: float, flags: dict[str, Any], dtype: str
) -> None:
    assert resolved(model(tmp_path, int(weight_gib * GIB)), **flags).dtype == dtype


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")],
)
def test_dtype_on_a_cpu_that_multiplies_bfloat16(tmp_path: Path, stored: str, dtype: str) -> None:
    machine = replace(CPU, multiplies_bfloat16=True)
    assert resolved(model(tmp_path, torch_dtype=stored), machine).dtype == dtype


def test_a_gpu_keeps_the_dtype_and_is_shared(tmp_path: Path) -> None:
    cluster = resolved(model(tmp_path, 10 * GIB), GPU)
    assert (cluster.device, cluster.dtype, cluster.num_threads) == ("cuda", "bfloat16", None)
    assert cluster.worker_gpus == 0.5
    assert cluster.kv_memory_bytes == 34 * GIB - 10 * GIB  # 85 % of 80, halved, less weights


def test_two_gpus_are_not_shared(tmp_path: Path) -> None:
    machine = Machine(cores=8, free_bytes=32 * GIB, gpus=2, gpu_free_bytes=80 * GIB)
    assert resolved(model(tmp_path), machine).worker_gpus == 1.0


def test_ranks_take_whole_gpus(tmp_path: Path) -> None:
    machine = Machine(cores=8, free_bytes=32 * GIB, gpus=4, gpu_free_bytes=80 * GIB)
    path = model(tmp_path, 10 * GIB)
    cluster = resolved(path, machine, tensor_parallel_size=2, aggregated=True, decode=2)
    assert cluster.worker_gpus == 1.0  # of each rank
    assert cluster.kv_memory_bytes == 2 * 68 * GIB - 10 * GIB  # of both GPUs of a worker
    assert cluster.worker_config(Role.DECODE, "d", "127.0.0.1").tensor_parallel_size == 2
    with pytest.raises(ConfigurationError, match=r"8 needs as many GPUs; this machine has 4"):
        resolved(path, machine, aggregated=True, tensor_parallel_size=8)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("role", Role)
def test_workers_of_both_roles_have_ranks(tmp_path: Path, role: Role, local: bool) -> None:
    cluster = resolved(model(tmp_path), local=local, tensor_parallel_size=2, cluster_key=KEY)
    assert cluster.worker_config(role, "w", "127.0.0.1").tensor_parallel_size == 2


def test_the_cache_bounds_the_context(tmp_path: Path) -> None:
    path = model(tmp_path, max_position_embeddings=1 << 20)
    cluster = resolved(path, kv_memory="64MiB", dtype="float32")
    assert cluster.max_model_len == (64 << 20) // (4 * 1024) - 16  # all blocks but one


def test_host_memory_for_prefixes_is_taken_from_the_machine(tmp_path: Path) -> None:
    path = model(tmp_path, max_position_embeddings=1 << 20)
    plain = resolved(path)
    assert plain.worker_config(Role.DECODE, "d", "h").kv_offload_bytes == 0
    cluster = resolved(path, kv_offload_memory="10GiB")
    assert cluster.worker_config(Role.DECODE, "d", "h").kv_offload_bytes == 10 * GIB
    assert cluster.kv_memory_bytes < plain.kv_memory_bytes
    with pytest.raises(ConfigurationError, match=r"need 33.0 GiB .*--kv-offload-memory"):
        resolved(path, GPU, kv_offload_memory="16.5GiB")
    with pytest.raises(ConfigurationError, match="prefix_caching"):
        resolved(path, kv_offload_memory="1GiB", prefix_caching=False)


def test_unknown_shapes_are_left_to_the_engine(tmp_path: Path) -> None:
    cluster = resolved(model(tmp_path, kv_lora_rank=512))
    assert (cluster.kv_memory_bytes, cluster.max_model_len) == (256 << 20, None)


def test_a_text_config_inside_counts(tmp_path: Path) -> None:
    path = model(tmp_path, text_config={"max_position_embeddings": 128, "dtype": "float32"})
    cluster = resolved(path)
    assert cluster.max_model_len == 128
    assert cluster.weight_bytes == 1 << 20


@pytest.mark.parametrize(
    ("weights", "machine", "flags", "message"),
    [
        pytest.param(
            20 * GIB,
            CPU,
            {},
            r"2 worker\(s\) need 40.1 GiB \(20.0 GiB weights and 64 MiB KV cache each\),"
            " 32.0 GiB is available",
            id="memory",
        ),
        pytest.param(45 * GIB, GPU, {}, "too little GPU memory: 80.0 GiB free for 2", id="gpu"),
        pytest.param(1, CPU, {"device": "cuda"}, "no NVIDIA GPU here; use --device cpu", id="cuda"),
        pytest.param(
            1,
            CPU,
            {"kv_memory": "4MiB", "max_model_len": 2000},
            "max_model_len 2000 does not fit a KV cache of 4 MiB, which holds 1008 tokens",
            id="context",
        ),
        pytest.param(1, CPU, {"kv_memory": 1000}, "holds 0 tokens", id="no-cache"),
    ],
)
def test_what_cannot_work_is_one_line_with_numbers(
    tmp_path: Path, weights: int, machine: Machine, flags: dict[str, Any], message: str
) -> None:
    path = model(tmp_path, weights)
    with pytest.raises(ConfigurationError, match=message) as caught:
        resolved(path, machine, **flags)
    assert "\n" not in str(caught.value)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no model folder '/none/such'"):
        resolved(Path("/none/such"))
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        resolved(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="has no weights"):
        resolved(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="cannot read"):
        resolved(tmp_path)


def test_a_real_cluster_needs_a_key(tmp_path: Path) -> None:
    path = model(tmp_path)
    with pytest.raises(ConfigurationError, match="set BATON_CLUSTER_KEY"):
        resolved(path, local=False)
    assert resolved(path, local=False, cluster_key=KEY).cluster_key == KEY
    settings = load_settings({"model": str(path)}, environ={})
    with pytest.raises(ConfigurationError, match="needs the cluster key"):
        resolve_router(settings)


def test_configurations_carry_the_settings(tmp_path: Path) -> None:
    cluster = resolved(
        model(tmp_path),
        cluster_key=KEY,
        served_model_name="name",
        max_running=7,
        check_ledger=True,
        max_model_len=1000,
        aggregated=True,
        prefill=3,
    )
    assert (cluster.prefill, cluster.decode) == (0, 1)
    worker = cluster.worker_config(Role.DECODE, "d1", "10.0.0.1", 9000)
    assert (worker.role, worker.worker_id, worker.host, worker.port) == (
        Role.DECODE,
        "d1",
        "10.0.0.1",
        9000,
    )
    assert (worker.max_running, worker.check_ledger, worker.max_model_len) == (7, True, 1000)
    router = cluster.router_config()
    assert (router.served_model_name, router.aggregated, router.cluster_key) == ("name", True, KEY)


def test_the_plan_survives_its_file(tmp_path: Path) -> None:
    cluster = resolved(model(tmp_path), api_keys="one,two", kv_memory="1GiB")
    write_plan(tmp_path, cluster)
    assert read_plan(tmp_path) == cluster
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o600


def test_this_machine_can_be_inspected() -> None:
    machine = inspect_machine()
    assert machine.cores >= 1
    assert machine.free_bytes > 1 << 20
