"""Chat with a running Baton through the openai package: `make serve`, then run this.

python examples/chat_openai.py "Why is the sky blue?" --url http://127.0.0.1:8000/v1
"""

import argparse

from openai import OpenAI


def main() -> None:
    """Ask once and print the answer as it comes."""
    parser = argparse.ArgumentParser(description="Ask a running Baton one question.")
    parser.add_argument("question", nargs="?", default="Tell me about the sea.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=options.max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            usage = chunk.usage
            print(f"\n[{usage.prompt_tokens} prompt, {usage.completion_tokens} answer tokens]")


if __name__ == "__main__":
    main()
