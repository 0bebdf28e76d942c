"""The `baton` command. Light to import: every subcommand loads what it needs when it runs."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.flags import add_api, add_engine, add_http, add_processors
from contracts.errors import ConfigurationError, ServingError

_EPILOG = """Every setting can also come from a YAML file (--config) or from the environment
(BATON_PORT=8001, BATON_KV_MEMORY=2GB, ...). Flags win over the environment, that over the file."""
_SERVE_EXAMPLES = f"""examples:
  baton serve --demo                          a tiny model with random weights, for a first look
  baton serve ./my-model --prefill 1 --decode 2
  baton serve org/name --aggregated           no disaggregation: for comparison

{_EPILOG}"""
_WORKER_EXAMPLES = f"""example: a cluster without Ray, one shell each
  export BATON_CLUSTER_KEY=any-secret-of-yours
  baton worker prefill ./my-model --port 9001
  baton worker decode  ./my-model --port 9002
  baton router ./my-model --prefill 127.0.0.1:9001 --decode 127.0.0.1:9002

{_EPILOG}"""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def make_parser() -> argparse.ArgumentParser:
    """The command's grammar."""
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve language models with prefill and decode on separate workers.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"baton {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_worker(commands)
    _add_router(commands)
    _add_status(commands)
    bench = commands.add_parser(
        "bench",
        help="measure a running server, or the engine piece by piece",
        formatter_class=_Help,
        add_help=False,
        allow_abbrev=False,
    )
    bench.add_argument("kind", choices=["load", "micro"], help="what to measure")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="see `baton bench KIND --help`")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (2: a setting is wrong, 1: anything else)."""
    args = make_parser().parse_args(argv)
    level = os.environ.get("BATON_LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(
        level=level if level in logging.getLevelNamesMapping() else "WARNING",
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    try:
        code: int = _COMMANDS[args.command](args)
    except ConfigurationError as error:
        print(f"baton: error: {error}", file=sys.stderr)
        return 2
    except ServingError as error:
        print(f"baton: error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


# The grammar


def _add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help="a model folder, or a hub id (org/name)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as YAML")


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster-key-file",
        metavar="FILE",
        help="the secret that all processes of the cluster share (or set BATON_CLUSTER_KEY)",
    )


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="start a whole cluster on this machine",
        description="Start Ray, a router, prefill and decode workers on this machine. Ctrl-C ends"
        " everything.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    _add_model(parser, optional=True)
    parser.add_argument("--demo", action="store_true", help="serve a tiny random model")
    parser.add_argument(
        "--demo-dir",
        type=Path,
        metavar="DIR",
        help="where to keep it (default ~/.cache/baton/demo)",
    )
    parser.add_argument("--timings", action="store_true", help="show where the start's time went")
    parser.add_argument(
        "--end-with-parent",
        action="store_true",
        help="end also when the process that started this one dies (for make and supervisors)",
    )
    group = parser.add_argument_group("workers")
    group.add_argument("--prefill", metavar="N", help="prefill workers (default 1)")
    group.add_argument("--decode", metavar="N", help="decode workers (default 1)")
    group.add_argument("--router-replicas", metavar="N", help="router replicas (default 1)")
    group.add_argument(
        "--aggregated",
        action="store_const",
        const=True,
        help="decode workers alone, which prefill, too",
    )
    add_engine(parser)
    add_http(parser)
    add_api(parser)


def _add_worker(commands: Any) -> None:
    parser = commands.add_parser(
        "worker",
        help="start one worker, without Ray",
        description="Start one worker as an ordinary process. SIGTERM drains it.",
        epilog=_WORKER_EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("role", choices=["prefill", "decode"])
    _add_model(parser)
    add_engine(parser)
    add_processors(parser)
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=0, dest="worker_port", help="gRPC port (default: any free one)"
    )
    parser.add_argument("--worker-id", metavar="ID", help="unique in the cluster (default: random)")
    parser.add_argument(
        "--check-ledger",
        action="store_const",
        const=True,
        help="check the block ledger after every step (slow; for tests)",
    )
    _add_drain(parser)
    _add_key(parser)


def _add_router(commands: Any) -> None:
    parser = commands.add_parser(
        "router",
        help="start one router, without Ray",
        description="Start one router as an ordinary process, for workers at given addresses.",
        epilog=_WORKER_EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    _add_model(parser)
    parser.add_argument(
        "--prefill",
        default="",
        dest="prefill_at",
        metavar="HOST:PORT,...",
        help="prefill workers; none: the decode workers do it all",
    )
    parser.add_argument(
        "--decode", required=True, dest="decode_at", metavar="HOST:PORT,...", help="decode workers"
    )
    parser.add_argument("--max-model-len", metavar="N", help="tokens (default: the workers')")
    add_http(parser)
    add_api(parser)
    _add_drain(parser)
    _add_key(parser)


def _add_status(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="show workers and their KV block ledgers",
        description="Ask workers how they are.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("addresses", nargs="+", metavar="HOST:PORT")
    parser.add_argument(
        "--check",
        action="store_true",
        help="have each worker recount its KV blocks and find whose each is; exit 1 if some are "
        "nobody's (stops a worker's steps for milliseconds)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a worker and line")
    _add_key(parser)


def _add_drain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for running requests after SIGTERM (default 30)",
    )


# The commands

_NOT_SETTINGS = {
    "addresses",
    "check",
    "command",
    "config",
    "decode_at",
    "demo",
    "demo_dir",
    "drain_timeout",
    "end_with_parent",
    "json",
    "prefill_at",
    "role",
    "timings",
    "worker_id",
    "worker_port",
}


def _settings(args: argparse.Namespace, **more: object) -> Any:
    from cluster.settings import load_settings

    flags = {key: value for key, value in vars(args).items() if key not in _NOT_SETTINGS}
    return load_settings(flags | more, file=args.config)


def _serve(args: argparse.Namespace) -> int:
    from cluster.local import serve

    if args.end_with_parent:
        from cluster.reaper import die_with_parent

        die_with_parent()
    if not args.demo:
        if args.model is None and args.config is None and "BATON_MODEL" not in os.environ:
            raise ConfigurationError("name a MODEL, or use --demo to try a tiny random one")
        return serve(_settings(args), timings=args.timings)
    if args.model is not None:
        raise ConfigurationError("--demo brings its own model; leave MODEL out")
    from cluster.demo_model import ensure_demo_model

    folder = args.demo_dir or Path.home() / ".cache" / "baton" / "demo"
    name = args.served_model_name or ["demo"]
    settings = _settings(args, model=str(ensure_demo_model(folder)), served_model_name=name)
    if settings.reasoning_parser is None:  # its noise may open thoughts, and never ends them
        settings = settings.model_copy(update={"reasoning_parser": "none"})
    return serve(settings, timings=args.timings)


def _worker(args: argparse.Namespace) -> int:
    from cluster.machine import inspect_machine
    from cluster.plain import run_worker
    from cluster.resolve import resolve
    from contracts.ids import new_request_id
    from contracts.worker import Role

    if not sys.stderr.isatty():  # no progress bars of libraries in log files
        os.environ.setdefault("TQDM_DISABLE", "1")
    cluster = resolve(_need_key(_settings(args)), inspect_machine(), local=True, num_workers=1)
    worker_id = args.worker_id or f"{args.role}-{new_request_id()[:8]}"
    config = cluster.worker_config(
        Role(args.role), worker_id, cluster.settings.host, args.worker_port
    )
    return run_worker(config, drain_s=args.drain_timeout)


def _router(args: argparse.Namespace) -> int:
    from cluster.plain import parse_addresses, run_router
    from cluster.ports import check_port
    from cluster.resolve import resolve_router
    from contracts.worker import Role

    prefill = parse_addresses(Role.PREFILL, args.prefill_at)
    decode = parse_addresses(Role.DECODE, args.decode_at)
    settings = _need_key(_settings(args, aggregated=not prefill))
    check_port(settings.host, settings.port)
    return run_router(
        resolve_router(settings),
        [*prefill, *decode],
        host=settings.host,
        port=settings.port,
        drain_s=args.drain_timeout,
    )


def _status(args: argparse.Namespace) -> int:
    from cluster.settings import read_cluster_key
    from cluster.status import show_status

    key = read_cluster_key(os.environ.get("BATON_CLUSTER_KEY"), args.cluster_key_file)
    if key is None:
        raise ConfigurationError(_NO_KEY)
    return show_status(args.addresses, cluster_key=key, check=args.check, as_json=args.json)


def _bench(args: argparse.Namespace) -> int:
    if args.kind == "micro":
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        from benchmarks.micro import main as micro_main

        return micro_main(args.rest)
    from benchmarks.load import main as load_main

    return int(load_main(args.rest) or 0)


_NO_KEY = "no cluster key; set BATON_CLUSTER_KEY or --cluster-key-file, the same for all processes"


def _need_key(settings: Any) -> Any:
    if settings.cluster_key is None and settings.cluster_key_file is None:
        raise ConfigurationError(_NO_KEY)
    return settings


def _version() -> str:
    try:
        return version("baton-serve")
    except PackageNotFoundError:
        return "(not installed)"


_COMMANDS = {
    "serve": _serve,
    "worker": _worker,
    "router": _router,
    "status": _status,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
