"""
The stage `finetune` with a sharded model on CPUs, as one of torchrun's processes. torch shards there too, but
accelerate does not unless it is told to, and what a GPU brings to the CPU for a checkpoint is there already.
"""

import contextlib
import runpy

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp._flat_param import FlatParamHandle

init = AcceleratorState.__init__


def init_sharded(self, *words, fsdp_plugin=None, **options):
    init(self, *words, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin:
        fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        told = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
        self.__dict__.update(told)
        PartialState._shared_state.update(told)


AcceleratorState.__init__ = init_sharded
FlatParamHandle.to_cpu = lambda self: contextlib.nullcontext()  # torch's own would free the numbers after "moving" them
runpy.run_module("stages.finetune", run_name="__main__")
