"""A chat server of a few lines, as a process: `echo_chat_server.py MODEL PORT [EXTRA_TOKENS]`.

It counts prompts with the model's tokenizer (adding EXTRA_TOKENS), streams as many tokens as asked
with running usage, and at its end prints how many prompts it saw and how many differed.
"""

import json
import sys
from pathlib import Path

from aiohttp import web
from tokenizers import Tokenizer

MODEL, PORT = Path(sys.argv[1]), int(sys.argv[2])
EXTRA_TOKENS = int(sys.argv[3]) if len(sys.argv) > 3 else 0
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
SEEN: list[str] = []


async def models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "echo"}]})


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    message = body["messages"][0]["content"]
    SEEN.append(message)
    text = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    prompt_tokens = len(TOKENIZER.encode(text, add_special_tokens=False).ids) + EXTRA_TOKENS
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for count in range(1, body["max_tokens"] + 1):
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
        event = {"choices": [{"index": 0, "delta": {"content": " word"}}], "usage": usage}
        await answer.write(f"data: {json.dumps(event)}\n\n".encode())
    await answer.write(b"data: [DONE]\n\n")
    await answer.write_eof()
    return answer


if __name__ == "__main__":
    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    web.run_app(app, host="127.0.0.1", port=PORT, print=None, access_log=None)  # until SIGTERM
    print(json.dumps({"seen": len(SEEN), "different": len(set(SEEN))}), flush=True)
