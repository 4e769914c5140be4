"""memory.py: what MemorySampler makes of a process that takes 400 MiB for half a second in the middle of a phase."""

import json
import threading
import time

from stages.memory import MIB, MemorySampler

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
print(json.dumps({"summary": memory.summary(), "threads": threading.active_count() - threads}))
