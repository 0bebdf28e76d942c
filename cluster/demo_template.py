"""The demo model's chat template: ChatML, with places for everything a request may bring.

A conversation without tools, documents, thoughts or `reasoning_effort` gets plain ChatML. The
signs of calls and thoughts are those of the Hermes and Qwen3 families, so that their parsers fit.
"""

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

CHAT_TEMPLATE = r"""
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if tools or documents or reasoning_effort -%}
    {{- '<|im_start|>system\n' -}}
    {%- if first is not none and first.content -%}{{- first.content + '\n\n' -}}{%- endif -%}
    {%- if reasoning_effort -%}{{- 'Reasoning effort: ' ~ reasoning_effort ~ '\n' -}}{%- endif -%}
    {%- if documents -%}
        {{- '# Documents\n\nAnswer from these documents.\n<documents>\n' -}}
        {%- for document in documents -%}{{- document | tojson + '\n' -}}{%- endfor -%}
        {{- '</documents>\n' -}}
    {%- endif -%}
    {%- if tools -%}
        {{- '# Tools\n\nThese functions can be called:\n<tools>\n' -}}
        {%- for tool in tools -%}{{- tool | tojson + '\n' -}}{%- endfor -%}
        {{- '</tools>\n\nTo call one, write its name and arguments as JSON between tags:\n' -}}
        {{- '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
    {%- set rest = messages[1:] if first is not none else messages -%}
{%- else -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if message.role == 'tool' or message.role == 'function' -%}
        {%- if loop.previtem is undefined or loop.previtem.role != message.role -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
        {%- if loop.nextitem is undefined or loop.nextitem.role != message.role -%}
            {{- '<|im_end|>\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\n' -}}
        {%- if message.reasoning_content -%}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' -}}
        {%- endif -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {%- if message.content or not loop.first -%}{{- '\n' -}}{%- endif -%}
            {{- '<tool_call>\n{"name": ' + call.function.name | tojson + ', "arguments": ' -}}
            {{- call.function.arguments | tojson + '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""".lstrip()
