"""memory.py: MemorySampler over a process that takes 400 MiB in the middle of a phase, and more after the last one."""

import json
import threading
import time

from lib.training.memory import MIB, MemorySampler

threads = threading.active_count()
with MemorySampler() as memory:
    memory.mark("load")
    block = bytearray(400 * MIB)
    block[::4096] = b"x" * len(block[::4096])  # a page counts once it is written
    time.sleep(3 * memory.INTERVAL_SECONDS)
    del block
    memory.mark("step")
    memory.mark("eval")
    memory.mark("step")
    memory.note(1e6)  # a sample taken while the adapter is written
print(json.dumps({"summary": memory.summary(), "threads": threading.active_count() - threads}))
