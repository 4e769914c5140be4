"""
The common code of the studies streaming and multilora: the loads for stages/workers/stream_client.py, the facts at the
beginning of a server's result, and the result of a server that is not measured.
"""

import shutil
import signal
import sys
from dataclasses import asdict

from lib.core.provenance import write_metrics
from lib.core.stage import read_json
from lib.text.templates import prompt_text


def in_template(text, dataset):
    """A prompt in the template that the adapters were trained with; dataset: that stage's folder."""
    data = read_json(dataset / "metrics.json")
    return prompt_text(data["template"], data["system_prompt"], text)


def load(client, url, folder, requests, concurrency=1, **words):
    """One entry of what stages/workers/stream_client.py is asked; words: further ones that the client is made with."""
    words = {"url": url, "model_dir": str(folder), "adapters": {}, **words}
    return {
        "client": client,
        "words": words,
        "concurrency": concurrency,
        "requests": [asdict(request) for request in requests],
    }


def begin(out, base_model):
    """Empty a server's folder of results, results/<profile>/STUDY/SERVER, and let SIGTERM end the stage in order; gives
    {server, base_model}, the first facts of its result."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through every `finally`, as with Ctrl-C
    shutil.rmtree(out, ignore_errors=True)
    (out / "raw").mkdir(parents=True)
    base = read_json(base_model / "metrics.json")
    return {"server": out.name, "base_model": {name: base[name] for name in ("name", "weights", "parameters")}}


def write_not_measured(path, facts, reason):
    """The result of a server that is not measured, with the reason; path: .../STUDY/SERVER/STUDY.json."""
    nothing = {"engine": None, "engine_is_stand_in": False, "not_measured": reason}
    write_metrics(path, {**facts, **nothing})
    print(f"{path.stem}: {facts['server']} is not measured ({reason})")
