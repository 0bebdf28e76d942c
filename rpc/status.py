"""Asking a worker how it is: for people, the command line and tests."""

import json

from grpc import aio

from contracts.errors import ServingError, Unavailable
from rpc.auth import credentials
from rpc.errors import error_of_call
from rpc.pb import worker_pb2 as pb
from rpc.pb.worker_pb2_grpc import WorkerStub
from rpc.wire import CHANNEL_OPTIONS


async def fetch_status(
    address: str, *, cluster_key: str, timeout_s: float = 5.0, audit: bool = False
) -> dict[str, object]:
    """The status of the worker at `address` (host:port).

    With `audit`, its `findings` are a list of texts: what is wrong with the worker's blocks.

    Raises:
        Unavailable: no worker answers there within `timeout_s`.
        ConfigurationError: it has another cluster key.
        ServingError: what its service raised.
    """
    metadata = aio.Metadata(*credentials(cluster_key))
    async with aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        try:
            reply = await WorkerStub(channel).Status(
                pb.StatusRequest(audit=audit), timeout=timeout_s, metadata=metadata
            )
        except aio.AioRpcError as error:
            reason = error_of_call(error)
            if isinstance(reason, Unavailable):
                raise Unavailable(f"no status from the worker at {address}: {reason}") from error
            raise reason from error
    status = json.loads(reply.json)
    if not isinstance(status, dict):
        raise ServingError(f"the status of the worker at {address} is no object")
    return status
