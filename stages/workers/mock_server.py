"""
An OpenAI completions server of known timing, for load clients: python -m stages.workers.mock_server TOKENIZER PROMPTS

Every token is a chunk of its own: the first is due TTFT after the whole request has arrived, the n-th (n - 1) x ITL
later. Deadlines count from the arrival, so that lateness never adds up, and when each chunk was really written is kept:
a client is judged against that. It runs where the tokenizer's library is, in the clients' environment.

POST /mock {"ttft_ms": 20, "itl_ms": 5}   from here on; forgets what it was sent
GET  /mock                                what it was sent since then, and when it wrote (seconds of one clock)
"""

import asyncio
import hashlib
import json
import selectors
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.serving.answers import URL

MODEL = "mock"
HEADERS = "HTTP/1.1 {}\r\nContent-Type: {}\r\n{}\r\n\r\n"
ENOUGH = 4096  # tokens of an answer for which its word is checked


@dataclass
class Mock:
    """The mock as lib.serving.process starts it."""

    tokenizer: Path
    prompts: Path
    ready = URL + "/health"
    ports = (8000,)
    served = ()

    def command(self):
        return ["python3", "-m", "stages.workers.mock_server", str(self.tokenizer), str(self.prompts)]


class State:
    """The timing that is set, and what came and went since."""

    def __init__(self, word, count):
        self.word, self.count = word, count  # what every token is; prompt -> tokens
        self.reset({"ttft_ms": 0, "itl_ms": 0})

    def reset(self, timing):
        self.ttft, self.itl = timing["ttft_ms"] / 1000, timing["itl_ms"] / 1000
        self.requests = []


def vocabulary(tokenizer, prompts):
    """(word, count): a word that is one token after itself too, so that a client that tokenises an answer again counts
    right; a function from a prompt to its number of tokens, those in the file counted beforehand."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))

    def count(text, special=True):
        """As a server counts a prompt, with the BOS that its tokenizer puts in front."""
        return len(own.encode(text, add_special_tokens=special).ids)

    # The second: in a vocabulary of words (stages/workers/random_weights.py), which has no English ones.
    words = [word for word in (" the", " " + own.decode([0])) if count(word * ENOUGH, special=False) == ENOUGH]
    if not words:
        sys.exit(f"error: {tokenizer}: no word is known that is one token there; answers would be counted wrong")
    lines = Path(prompts).read_text().splitlines()
    known = {text: count(text) for text in (json.loads(line)["text"] for line in lines)}
    return words[0], lambda text: known[text] if text in known else count(text)


async def read_request(reader):
    """(method, path, body) of the next request on a connection; None when the client has closed it."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.strip().split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(fields.get("content-length", 0)))
    method, path, _ = first.split(" ")
    return method, path.partition("?")[0], body


def chunk(data):
    """One server-sent event as one HTTP chunk."""
    event = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(event), event)


def one_prompt(prompt):
    """The prompt's text; genai-perf sends a list of one."""
    return prompt[0] if isinstance(prompt, list) else prompt


async def stream(state, writer, request, arrived):
    """Answer one completion token by token; the record of it goes to the state when the first byte is due."""
    loop = asyncio.get_running_loop()
    prompt, tokens = one_prompt(request["prompt"]), request["max_tokens"]
    asked = {name: request.get(name) for name in ("max_tokens", "min_tokens", "ignore_eos", "temperature", "stream")}
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    record = {"prompt_sha256": digest, "prompt_tokens": state.count(prompt), **asked, "arrived": arrived}
    record |= {"due": [], "written": []}
    state.requests.append(record)
    answer = {"id": f"cmpl-{len(state.requests)}", "object": "text_completion", "created": 0, "model": MODEL}
    ttft, itl = state.ttft, state.itl  # another client may set others while this one is answered
    writer.write(HEADERS.format("200 OK", "text/event-stream", "Transfer-Encoding: chunked").encode())
    for n in range(tokens):
        last = "length" if n == tokens - 1 else None
        data = chunk(answer | {"choices": [{"index": 0, "text": state.word, "logprobs": None, "finish_reason": last}]})
        due = arrived + ttft + n * itl
        if (left := due - loop.time()) > 0:
            await asyncio.sleep(left)
        writer.write(data)
        record["due"].append(due)
        record["written"].append(loop.time())
    if (request.get("stream_options") or {}).get("include_usage"):
        prompt_tokens = record["prompt_tokens"]
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
        writer.write(chunk(answer | {"choices": [], "usage": usage}))
    writer.write(chunk("[DONE]") + b"0\r\n\r\n")
    await writer.drain()


def reply(writer, data, status="200 OK"):
    body = json.dumps(data).encode()
    writer.write(HEADERS.format(status, "application/json", f"Content-Length: {len(body)}").encode() + body)


async def serve(state, reader, writer):
    """Answer the requests of one connection, one after the other."""
    while request := await read_request(reader):
        arrived = asyncio.get_running_loop().time()
        method, path, body = request
        if (method, path) == ("POST", "/v1/completions"):
            try:
                await stream(state, writer, json.loads(body), arrived)
            except ConnectionError:
                break
        elif (method, path) == ("POST", "/mock"):
            state.reset(json.loads(body))
            reply(writer, {})
        elif path == "/mock":
            reply(writer, state.requests)
        elif path == "/v1/models":
            reply(writer, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        elif path == "/health":
            reply(writer, {})
        else:
            reply(writer, {"error": f"no {method} {path} here"}, "404 Not Found")
    writer.close()


async def main():
    _, tokenizer, prompts = sys.argv
    state = State(*vocabulary(tokenizer, prompts))
    host, port = URL.removeprefix("http://").split(":")
    server = await asyncio.start_server(lambda *ends: serve(state, *ends), host, int(port))
    await server.serve_forever()


if __name__ == "__main__":
    # Not epoll, Linux' default: asyncio rounds its waits up to whole milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main())
