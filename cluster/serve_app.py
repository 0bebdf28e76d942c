"""The Serve application: router, prefill workers and decode workers as deployments.

`build` is its import path in a Serve configuration (`import_path: cluster.serve_app:build`); `args`
are the settings. On a cluster the RAY_SERVE_* environment of cluster_configs/ray_up_*.yaml must be
set on every node, for HAProxy and its times cannot be chosen from here.
"""

import functools
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from cluster.machine import inspect_machine
from cluster.registry import RegistryAnnouncer, RegistryDirectory
from cluster.resolve import ResolvedCluster, resolve
from cluster.settings import load_settings
from cluster.worker_deployment import WorkerDeployment
from contracts.worker import Role, WorkerConfig
from router.config import RouterConfig
from router.deployment import RouterDeployment

# Serve's own limit is per replica and its refusal a bare 503: the router admits, not Serve.
_MAX_ONGOING_REQUESTS = 4096
_WORKER_NAMES = {Role.PREFILL: "PrefillWorker", Role.DECODE: "DecodeWorker"}


def build(args: dict[str, Any]) -> Application:
    """The application for the settings in `args` (and `BATON_*` of the environment).

    Runs on a node of the cluster, which may be unlike the workers' nodes: a GPU anywhere in the
    cluster counts, and memory is not checked here.

    Raises:
        ConfigurationError: a setting is wrong, or there is no cluster key.
    """
    settings = load_settings(args)
    machine = inspect_machine()
    gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else machine.gpus
    machine = replace(machine, gpus=gpus)
    return application(resolve(settings, machine, local=False))


def application(cluster: ResolvedCluster) -> Application:
    """The application for a resolved cluster. One `serve.run` starts all deployments at once."""
    app_name = cluster.settings.app_name
    workers = [_workers(cluster, Role.DECODE, cluster.decode)]
    if cluster.prefill:
        workers.append(_workers(cluster, Role.PREFILL, cluster.prefill))
    router = serve.deployment(
        RouterDeployment,
        name="Router",
        num_replicas=cluster.settings.router_replicas,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0.1 if cluster.local else 1},
        graceful_shutdown_timeout_s=cluster.settings.router_drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )
    return router.bind(
        functools.partial(configure_router, cluster),
        functools.partial(RegistryDirectory, app_name),
        functools.partial(report_failure, app_name),
        # Nothing calls these handles: they make the workers part of this application.
        *workers,
    )


def configure(
    cluster: ResolvedCluster, role: Role, worker_id: str, node_address: str
) -> WorkerConfig:
    """The configuration of the replica `worker_id` on a node."""
    host = "127.0.0.1" if cluster.local else node_address
    return cluster.located().worker_config(role, worker_id, host)


def configure_router(cluster: ResolvedCluster, router_id: str) -> RouterConfig:
    """The configuration of the router replica `router_id`."""
    return replace(cluster.located().router_config(), router_id=router_id)


async def report_failure(app_name: str, who: str, error: BaseException) -> None:
    """Tell the registry why something did not start."""
    await RegistryAnnouncer(app_name).failed(who, error)


def _workers(cluster: ResolvedCluster, role: Role, count: int) -> Application:
    settings = cluster.settings
    # One actor, so one bundle: all ranks of a worker are on one node.
    cpus = settings.worker_cpus * settings.tensor_parallel_size
    options: dict[str, float] = {"num_cpus": 0.1 if cluster.local else cpus}
    if cluster.worker_gpus:
        options["num_gpus"] = cluster.worker_gpus * settings.tensor_parallel_size
    shell = serve.deployment(
        WorkerDeployment,
        name=_WORKER_NAMES[role],
        num_replicas=count,
        ray_actor_options=options,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )
    return shell.bind(
        role,
        functools.partial(configure, cluster, role),
        functools.partial(RegistryAnnouncer, settings.app_name),
        settings.drain_timeout_s,
    )
