"""
Run one experiment of the benchmark with genai-perf: python -m stages.bench EXPERIMENT CLIENT_IMAGE SERVER=IMAGE ...

in:   results/<profile>/base_model, results/<profile>/machine/machine.json, and what the experiment serves:
      repository/base, repository/lora, or the adapters in finetune
out:  results/<profile>/bench/EXPERIMENT/SERVER/points.json   one entry a load: medians, intervals, every repeat with
                                                              its certificate, and what made them
      results/<profile>/bench/EXPERIMENT/SERVER/points.csv    one line a repeat
      results/<profile>/bench/EXPERIMENT/SERVER/summary.json  what `dvc exp show` lists
      results/<profile>/bench/EXPERIMENT/raw/POINT/           genai-perf's own files, untouched
      results/<profile>/bench/EXPERIMENT/*.jsonl, *.log       the prompts that every server got, and what was said

BUDGET=30m in the environment stops after that time, where a partial sweep is still a curve; the rest stands as not
measured. A finished point waits in .work/<profile>/bench-EXPERIMENT-<fingerprint>/ until the experiment is whole, for
DVC deletes a stage's outs before it runs: what was stopped goes on at the first point that is missing.
"""

import shutil
import signal
import sys

from lib.bench.experiments import NOT_ASKED, Bench, asked_for, check_lengths, with_experiment
from lib.bench.results import not_measured, what_was_asked
from lib.bench.sweep import measured
from lib.core.stage import UserError, read_params, results, run
from lib.serving.servers import Inputs


def main():
    p = read_params(Bench)
    if len(sys.argv) < 4 or sys.argv[1] not in p.definitions or not all("=" in word for word in sys.argv[3:]):
        raise UserError(
            "usage: python -m stages.bench EXPERIMENT CLIENT_IMAGE SERVER=IMAGE ..., with EXPERIMENT one of "
            f"{', '.join(p.definitions)}"
        )
    name, images = sys.argv[1], {"client": sys.argv[2], **dict(word.split("=", 1) for word in sys.argv[3:])}
    asked = with_experiment(p, name)
    # DVC and Slurm end a stage with SIGTERM: leave through every `finally`, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    out, reasons = results("bench") / name, {}
    inputs = Inputs(results("base_model"), results("repository"), results("trtllm_serve"), results("finetune"))
    shutil.rmtree(out, ignore_errors=True)
    for server in asked.servers:
        left_out = None if asked_for(name, p) else f"params.yaml: bench.experiments {NOT_ASKED} {name}"
        kind = server.partition("-")[0]
        left_out = left_out or (None if kind in p.servers else f"params.yaml: bench.servers has no {kind}")
        if reason := left_out or asked.server(server, inputs)[0].not_built():
            reasons[server] = reason
    asked.servers = [server for server in asked.servers if server not in reasons]
    check_lengths(asked, name)
    if asked.servers:
        measured(out, name, asked, inputs, images)
    for server, reason in reasons.items():
        not_measured(out, what_was_asked(name, asked, inputs, server, images), reason)


if __name__ == "__main__":
    run(main)
