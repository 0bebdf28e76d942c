"""The router as a Serve deployment: the ingress around `router.app`.

What it needs from above comes in as picklable callables, for the router does not know `cluster`.
"""

import gc
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from ray import serve

from router.config import RouterConfig
from router.directory import WorkerDirectory


class RouterShell:
    """One replica: one router, with sessions of its own to all workers.

    Args:
        configure: gives the router's configuration for a router id; called in the replica.
        directory: makes this replica's source of worker addresses.
        report_failure: told why there will be no router, as (who, error).
        workers: the worker deployments' handles, unused: being bound here makes them part of the
            same application.
    """

    def __init__(
        self,
        configure: Callable[[str], RouterConfig],
        directory: Callable[[], WorkerDirectory],
        report_failure: Callable[[str, BaseException], Awaitable[None]],
        *workers: object,
    ) -> None:
        self._configure = configure
        self._directory = directory
        self._report_failure = report_failure

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor; the app's lifespan then runs in this replica."""
        try:
            from router.app import create_app  # tokenizers and templates: not for the controller

            router_id = serve.get_replica_context().replica_id.unique_id
            app = create_app(self._configure(router_id), self._directory())
            gc.collect()
            gc.freeze()  # a full collection then stops streams for the time requests take, no more
            return app
        except Exception as error:
            await self._report_failure("router", error)
            raise


# Without an app: Serve asks `__serve_build_asgi_app__` for one in each replica.
RouterDeployment = serve.ingress()(RouterShell)
