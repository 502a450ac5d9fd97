"""OpenAI-compatible HTTP: the official client, with policies and steering in ``extra_body``.

    steerserve serve --http-port 8001
    python examples/openai_chat.py "Tell me about the sea."

The client's own variables say where and as whom: OPENAI_BASE_URL (http://127.0.0.1:8001/v1) and OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a guarded model through the official OpenAI client.")
    parser.add_argument("question")
    options = parser.parse_args()
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8001/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),  # any, where the server has no keys
    )
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=60,
        stream=True,
        extra_body={"policies": ["profanity-monitor"], "steering": ["profanity=block"]},
    )
    with client, stream:
        for chunk in stream:
            choice = chunk.choices[0]
            print(choice.delta.content or "", end="", flush=True)
    print()
    finished = (choice.model_extra or {})["steerserve"]  # only the last chunk of a choice has it
    for verdict in finished["verdicts"]:
        print(f"{verdict['source']}: {verdict['kind']}")
    print(f"steered, by the kernel's own count: {finished['receipt']['steered']}")


if __name__ == "__main__":
    main()
