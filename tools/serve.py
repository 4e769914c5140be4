"""
One server with what this checkout has made, for `make chat SERVER=...`: python -m tools.serve SERVER [ADAPTER]

in:   params.yaml (profile, bench), and what the stages made: base_model, and finetune or repository
out:  .work/<profile>/serve-SERVER.log   what the server says, while it runs
It runs the command that the benchmark runs, and ends with Ctrl-C.
"""

import signal
import sys
from pathlib import Path

from lib.core.stage import UserError, load_yaml, results, run
from lib.serving.process import serving
from lib.serving.servers import SERVERS, Inputs
from tools.terminal import in_front, say


def every_input():
    return Inputs(results("base_model"), results("repository"), results("trtllm_serve"), results("finetune"))


def built(name, adapter):
    """The server of lib/serving/servers.py, ready to be started; UserError names the command that makes what is
    missing."""
    if name not in SERVERS:
        raise UserError(f"SERVER is {name or 'missing'}; use one of {', '.join(SERVERS)}")
    server = SERVERS[name]("base" if adapter == "none" else "lora", every_input())
    if not (results("base_model") / "model" / "config.json").exists():
        raise UserError(
            f"{results('base_model')}: there is no model; `containers/run venv:tools dvc repro dataset` makes it"
        )
    if why := server.not_built():
        raise UserError(f"there is nothing to serve with {name}: {why}")
    return server


def main():
    name, adapter = (*sys.argv[1:], "", "")[:2]
    server = built(name, adapter)
    params = load_yaml("params.yaml")
    image = load_yaml("containers/images.yaml")["images"][name]
    command = ["containers/run", image, *server.command(params["bench"]["server_options"])]
    log = Path(".work") / params["profile"] / f"serve-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    # However this ends, the server ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    say(f"starting {image}; its log: {log}")
    ready = params["bench"]["ready_seconds"]
    with in_front(), serving(server, command, log, ready, "bench.ready_seconds") as (process, seconds):
        engine, _ = server.engine()
        say(f"{engine} is ready after {seconds:.0f} s; `make chat SERVER={name}` asks it, Ctrl-C ends it")
        try:
            code = process.wait()
        except KeyboardInterrupt:
            say("stopping")
            return
    raise UserError(f"{name} stopped by itself (exit code {code}); its log: {log}")


if __name__ == "__main__":
    run(main)
