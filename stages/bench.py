"""
Run one experiment of the benchmark with genai-perf: python -m stages.bench EXPERIMENT CLIENT_IMAGE SERVER=IMAGE ...

in:   results/<profile>/base_model, results/<profile>/machine/machine.json, and what the experiment serves:
      repository/base, repository/lora, or the adapters in finetune
out:  results/<profile>/bench/EXPERIMENT/SERVER/points.json   one entry a load: medians, intervals, every repeat with
                                                              its checks, and what made them
      results/<profile>/bench/EXPERIMENT/SERVER/points.csv    one line a repeat
      results/<profile>/bench/EXPERIMENT/raw/POINT/           genai-perf's own files, untouched
      results/<profile>/bench/EXPERIMENT/*.jsonl, *.log       the prompts that every server got, and what was said

DVC deletes a stage's outputs before running it, so finished points are kept in
.work/<profile>/bench-EXPERIMENT-<fingerprint>/; an interrupted sweep resumes at the first missing point. BUDGET=30m in
the environment stops after 30 minutes, at a point's end: the partial curve is written, the exit code is 75, and DVC
does not record the stage; the next run resumes.
"""

import shutil
import signal
import sys

from lib.bench.experiments import Bench, check_lengths, with_experiment
from lib.bench.results import not_measured, what_was_asked
from lib.bench.sweep import measure_experiment
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
        kind = server.partition("-")[0]
        left_out = None if kind in p.servers else f"params.yaml: bench.servers has no {kind}"
        if reason := left_out or asked.server(server, inputs)[0].not_built():
            reasons[server] = reason
    asked.servers = [server for server in asked.servers if server not in reasons]
    check_lengths(asked, name)
    if asked.servers:
        measure_experiment(out, name, asked, inputs, images)
    for server, reason in reasons.items():
        not_measured(out, what_was_asked(name, asked, inputs, server, images), reason)


if __name__ == "__main__":
    run(main)
