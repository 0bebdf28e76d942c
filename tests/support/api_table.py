"""The table of docs/api.md: each field, where it acts, and the test that proves it.

`python -m tests.support.api_table` writes it anew. Tests name their fields by `@field(...)`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "api.md"
SUITE = REPOSITORY / "tests" / "conformance"
BEGIN, END = "<!-- table: {} -->", "<!-- end of {} -->"
ROUTER, P, PD = "router", "P", "P and D"
CHOICES = "choices.message"

REQUEST: dict[str, str] = {
    "messages": ROUTER,
    "model": ROUTER,
    "frequency_penalty": PD,
    "logit_bias": PD,
    "logprobs": "P and D (computed), router (shown)",
    "top_logprobs": "P and D (computed), router (shown)",
    "max_tokens": PD,
    "max_completion_tokens": PD,
    "n": "P (one prefill, n first tokens), D (shared blocks)",
    "presence_penalty": PD,
    "response_format": "router (checked), P and D (grammar)",
    "response_format.type": ROUTER,
    "response_format.json_schema": PD,
    "response_format.json_schema.name": "none: it only describes",
    "response_format.json_schema.description": "none: it only describes",
    "response_format.json_schema.schema": PD,
    "response_format.json_schema.strict": "none: schemas are always enforced",
    "seed": PD,
    "stop": "router (aborts P or D)",
    "stream": ROUTER,
    "stream_options": ROUTER,
    "stream_options.include_usage": ROUTER,
    "stream_options.continuous_usage_stats": ROUTER,
    "temperature": PD,
    "top_p": PD,
    "tools": "router (template, parser), P and D (grammar)",
    "tool_choice": "router (template, parser), P and D (grammar)",
    "reasoning_effort": "router (template)",
    "include_reasoning": ROUTER,
    "parallel_tool_calls": "router (parser), P and D (grammar)",
    "user": "none, by definition",
    "use_beam_search": "P (first candidates), D (all further steps)",
    "top_k": PD,
    "min_p": PD,
    "repetition_penalty": PD,
    "length_penalty": "P (if the first token is the last) and D",
    "stop_token_ids": PD,
    "include_stop_str_in_output": ROUTER,
    "ignore_eos": PD,
    "min_tokens": "P and D (mask), router (stop strings)",
    "skip_special_tokens": ROUTER,
    "spaces_between_special_tokens": ROUTER,
    "truncate_prompt_tokens": "router, before placement",
    "prompt_logprobs": P,
    "allowed_token_ids": PD,
    "bad_words": "router (tokenized), P and D (mask)",
    "echo": "router, P (log-probabilities)",
    "add_generation_prompt": "router (template)",
    "continue_final_message": "router (template)",
    "add_special_tokens": "router (tokenizer)",
    "documents": "router (template)",
    "chat_template": "router, if the operator trusts it",
    "chat_template_kwargs": "router (template, reasoning parser)",
    "mm_processor_kwargs": "router: anything but an empty object is refused",
    "structured_outputs": "router (checked), P and D (grammar)",
    "structured_outputs.json": PD,
    "structured_outputs.regex": PD,
    "structured_outputs.choice": PD,
    "structured_outputs.grammar": PD,
    "structured_outputs.json_object": PD,
    "structured_outputs.disable_fallback": PD,
    "structured_outputs.disable_any_whitespace": PD,
    "structured_outputs.disable_additional_properties": PD,
    "structured_outputs.whitespace_pattern": PD,
    "structured_outputs.structural_tag": PD,
    "structured_outputs._backend": "none: internal to vLLM",
    "structured_outputs._backend_was_auto": "none: internal to vLLM",
    "priority": "P and D (every queue)",
    "request_id": ROUTER,
    "logits_processors": "P and D, if the operator allows the name",
    "return_tokens_as_token_ids": ROUTER,
    "return_token_ids": ROUTER,
    "cache_salt": "P and D (block hashes)",
    "kv_transfer_params": "router, P and D, if the operator allows it",
    "vllm_xargs": "P and D (logits processors that want them)",
}

RESPONSE: dict[str, str] = {
    "id": ROUTER,
    "object": ROUTER,
    "created": ROUTER,
    "model": ROUTER,
    "choices": ROUTER,
    "choices.index": ROUTER,
    "choices.message": ROUTER,
    f"{CHOICES}.role": ROUTER,
    f"{CHOICES}.content": ROUTER,
    f"{CHOICES}.refusal": "router: always null",
    f"{CHOICES}.annotations": "router: always null",
    f"{CHOICES}.audio": "router: always null",
    f"{CHOICES}.function_call": "router: always null",
    f"{CHOICES}.tool_calls": "router (parser)",
    f"{CHOICES}.tool_calls.id": ROUTER,
    f"{CHOICES}.tool_calls.type": ROUTER,
    f"{CHOICES}.tool_calls.function": "router (parser)",
    f"{CHOICES}.tool_calls.function.name": "router (parser)",
    f"{CHOICES}.tool_calls.function.arguments": "router (parser)",
    f"{CHOICES}.reasoning": "router (parser)",
    f"{CHOICES}.reasoning_content": "router (parser)",
    "choices.logprobs": PD,
    "choices.logprobs.content": PD,
    "choices.logprobs.content.token": ROUTER,
    "choices.logprobs.content.logprob": PD,
    "choices.logprobs.content.bytes": ROUTER,
    "choices.logprobs.content.top_logprobs": PD,
    "choices.finish_reason": "P and D (end, length), router (stop strings, calls)",
    "choices.stop_reason": ROUTER,
    "choices.token_ids": PD,
    "usage": ROUTER,
    "usage.prompt_tokens": ROUTER,
    "usage.completion_tokens": ROUTER,
    "usage.total_tokens": ROUTER,
    "usage.prompt_tokens_details.cached_tokens": P,
    "service_tier": "router: always null",
    "system_fingerprint": ROUTER,
    "prompt_logprobs": P,
    "prompt_token_ids": ROUTER,
    "kv_transfer_params": "P",
}


def proofs(suite: Path = SUITE) -> dict[str, list[str]]:
    """By field, the tests that name it, as `file.py::test`."""
    found: dict[str, list[str]] = {}
    for file in sorted(suite.glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for name in _named(node):
                    found.setdefault(name, []).append(f"{file.name}::{node.name}")
    return found


def _named(test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for mark in test.decorator_list:
        match mark:
            case ast.Call(func=ast.Name(id="field"), args=names):
                for name in names:
                    assert isinstance(name, ast.Constant)
                    yield str(name.value)


def table(fields: dict[str, str], prefix: str = "") -> str:
    """Markdown. Raises KeyError for a field that no test names."""
    tests = proofs()
    lines = ["| field | supported | acts at | proved by |", "| --- | --- | --- | --- |"]
    for name, place in fields.items():
        by = tests[prefix + name][0]
        lines.append(f"| `{name}` | yes | {place} | `{by.replace('::', '` `')}` |")
    return "\n".join(lines)


def generated(text: str) -> str:
    """The document with its tables made anew."""
    for name, fields, prefix in (("request", REQUEST, ""), ("response", RESPONSE, "response.")):
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        assert rest, f"{begin} is missing"
        text = f"{before}{begin}\n{table(fields, prefix)}\n{end}{after}"
    return text


def main() -> None:
    """Write the document."""
    DOCUMENT.write_text(generated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
