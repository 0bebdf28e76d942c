# ruff: noqa: RUF001  (the bars of DeepSeek's markers are not the ASCII one)
"""Which parsers a model wants, by what its chat template says. In doubt: none."""

# The first row all of whose texts are in the template.
_TOOLS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "openai"),
    (("｜DSML｜",), "deepseek_v32"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<longcat_tool_call>",), "longcat"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<arg_key>",), "glm45"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<|start_of_role|>", "<|tool_call|>"), "granite"),
    (("<|action_start|>", "<|plugin|>"), "internlm"),
    (("functools[",), "phi4_mini_json"),
    (("<tool_calls>",), "jamba"),
    (("<function_calls>",), "olmo3"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("<tool_call>", "arguments"), "hermes"),
)
_THOUGHTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "openai_gptoss"),
    (("[THINK]", "[/THINK]"), "mistral"),
    (("<seed:think>",), "seed_oss"),
    (("Here is my thought process:",), "granite"),
    (("<minimax:tool_call>", "<think>"), "minimax_m2"),
    (("<|tool_calls_section_begin|>", "<think>"), "kimi_k2"),
    (("<｜Assistant｜>", "</think>", "thinking"), "deepseek_v3"),
    (("<｜Assistant｜>", "</think>"), "deepseek_r1"),
    (("<arg_key>", "<think>"), "glm45"),
    (("<think>",), "qwen3"),
)


def detect_tool_parser(chat_template: str, model_type: str) -> str | None:
    """The name of the tool parser for a model, by its template and `config.json`'s type."""
    if model_type == "gpt_oss":
        return "openai"
    return _first(_TOOLS, chat_template)


def detect_reasoning_parser(chat_template: str, model_type: str) -> str | None:
    """The name of the reasoning parser for a model, by its template and `config.json`'s type."""
    if model_type == "gpt_oss":
        return "openai_gptoss"
    return _first(_THOUGHTS, chat_template)


def _first(table: tuple[tuple[tuple[str, ...], str], ...], template: str) -> str | None:
    for texts, name in table:
        if all(text in template for text in texts):
            return name
    return None
