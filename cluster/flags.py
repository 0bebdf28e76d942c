"""Flags that several commands share; each is a setting of the same name."""

import argparse
from collections.abc import Sequence
from typing import Any


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Flags of what computes."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", metavar="DEV", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype", metavar="TYPE", help="auto (default), float32, bfloat16 or float16"
    )
    group.add_argument("--max-model-len", metavar="N", help="tokens of prompt and answer together")
    group.add_argument("--block-size", metavar="N", help="tokens in a KV block (default 16)")
    group.add_argument(
        "--kv-memory", metavar="SIZE", help="KV cache of each worker: bytes, 512MiB, 2GB"
    )
    group.add_argument(
        "--kv-offload-memory",
        metavar="SIZE",
        help="host memory of each worker for blocks that leave its prefix cache (default: none)",
    )
    group.add_argument("--num-threads", metavar="N", help="CPU threads of each worker")
    group.add_argument(
        "--tensor-parallel-size",
        metavar="N",
        help="split each worker's model over N GPUs, or processes on a CPU (default 1)",
    )


def add_http(parser: argparse.ArgumentParser) -> None:
    """Flags of what listens."""
    group = parser.add_argument_group("HTTP")
    group.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    group.add_argument("--port", help="port to listen on (default 8000; 0: any free one)")
    group.add_argument(
        "--served-model-name",
        action=_Words,
        metavar="NAME",
        help="what clients call the model; the first is the one that answers carry",
    )
    group.add_argument(
        "--api-key",
        "--api-keys",
        dest="api_keys",
        action=_Words,
        metavar="KEY",
        help="clients need one of these keys (they show in `ps`: better use the file)",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="the same, one key a line")
    for name in ("origins", "methods", "headers"):
        group.add_argument(
            f"--allowed-{name}", action=_Words, metavar="WORD", help=f"{name} for CORS (default *)"
        )
    _add_switches(group, {"allow-credentials": "cookies in CORS requests"})
    group.add_argument(
        "--max-body-bytes", metavar="SIZE", help="of a request; larger: 413 (default 32MiB)"
    )
    group.add_argument(
        "--max-batch", metavar="N", help="prompts in one completion request (default 64)"
    )
    _add_switches(
        group,
        {
            "disable-fastapi-docs": "no /openapi.json",
            "enable-render": "offer /v1/.../render (default)",
        },
    )


def add_api(parser: argparse.ArgumentParser) -> None:
    """What requests may ask for and how answers are read; the names are vLLM's."""
    group = parser.add_argument_group("requests and answers")
    group.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja file (or text) instead of the model's"
    )
    group.add_argument(
        "--chat-template-content-format",
        metavar="FORM",
        help="of message content: auto (default), string or openai",
    )
    group.add_argument(
        "--default-chat-template-kwargs", metavar="JSON", help='such as {"enable_thinking": false}'
    )
    _add_switches(group, {"trust-request-chat-template": "requests may bring a chat_template"})
    group.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how calls are written (default: by the template)",
    )
    _add_switches(
        group,
        {
            "enable-auto-tool-choice": "accepted for vLLM's users: it is always on",
            "exclude-tools-when-tool-choice-none": "hide tools from the template then",
        },
    )
    group.add_argument(
        "--reasoning-parser", metavar="NAME", help="how thoughts are marked (likewise; none: off)"
    )
    add_processors(group)
    group.add_argument(
        "--max-logprobs", metavar="N", help="alternatives a token (default 20; -1: any number)"
    )
    _add_switches(group, {"return-tokens-as-token-ids": "log-probabilities name token_id:N"})
    group.add_argument(
        "--generation-config",
        metavar="WHERE",
        help="sampling defaults: auto (the model's, default), vllm (none), or a folder",
    )
    group.add_argument(
        "--override-generation-config", metavar="JSON", help='such as {"temperature": 0.6}'
    )
    _add_switches(
        group, {"enable-kv-transfer-params": "proxies may drive prefill and decode themselves"}
    )


def add_processors(group: Any) -> None:
    """The flag that workers and routers share."""
    group.add_argument(
        "--logits-processor-pattern",
        metavar="REGEX",
        help="names of importable logits processors that requests may use (default: none)",
    )


def _add_switches(group: Any, switches: dict[str, str]) -> None:
    for name, text in switches.items():
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)


class _Words(argparse.Action):
    """Gathers `--x one two`, `--x one --x two`, `--x one,two` and `--x '["one"]'` alike."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs="+", **more)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the values to those before."""
        from cluster.settings import split_words

        try:
            words = [word for value in values for word in split_words(value)]
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), *words])
