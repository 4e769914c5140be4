"""batches.py TASK.json SYSTEM...: what each system of stages/workers/generate_batches.py computes for the task's
load, and the load."""

import json
import sys
from pathlib import Path

from stages.workers.generate_batches import prepared, read_load

task = json.loads(Path(sys.argv[1]).read_text())
load = read_load(task)
made = {}
for system in sys.argv[2:]:
    with prepared(system, task) as answer:
        made[system] = answer(load)
print(json.dumps({"load": [[len(ids), length] for ids, length in load], "made": made}), flush=True)
