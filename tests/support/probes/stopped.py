"""stopped.py METHOD: the stage `finetune`, which gets Ctrl-C at the end of its fifth step."""

import os
import signal

from transformers import TrainerCallback

from lib.core.stage import run
from stages import finetune

make_trainer = finetune.make_trainer


class CtrlC(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def with_ctrl_c(*args):
    trainer = make_trainer(*args)
    trainer.add_callback(CtrlC())
    return trainer


finetune.make_trainer = with_ctrl_c
run(finetune.main)
