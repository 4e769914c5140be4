"""
Faster training: attention kernels, compiled layers, wider adapters.
"""

import contextlib


def attention_kernels(p):
    """A context for training: pieces of full length take cuDNN's attention, on Hopper faster than torch's own."""
    import torch

    if not runs_ahead(p) or p.padding_free or not torch.cuda.is_available():
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True)


def runs_ahead(p):
    """True where nothing in a step has to wait for the GPU: no padding to look for, no whole logits to measure."""
    return p.liger and (p.padding_free or p.packing > 0)


def count_tokens_ahead(trainer):
    """Count the trained tokens from the shape of a batch without padding.

    TRL's own compute_loss adds metrics to its parent's and asks the GPU for each: the GPU then idles until the next
    kernel is launched, which a fast step feels. On several GPUs the first one's count stands for each of them.
    """
    from transformers import Trainer

    def compute_loss(model, inputs, *args, **kwargs):
        if model.training:
            trainer._total_train_tokens += inputs["input_ids"].numel() * trainer.accelerator.num_processes
            trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
        return Trainer.compute_loss(trainer, model, {**inputs, "use_cache": False}, *args, **kwargs)

    trainer.compute_loss = compute_loss


def compile_layers(trainer):
    """torch.compile of the decoder's layers for training; validation stays as it is, so that its losses compare.

    The compiler would keep fp32 between the operations that it fuses. It is told to round where the uncompiled layers
    round to bf16: small adapter updates vanish in that rounding, so that without it the same recipe learns otherwise.
    """
    import torch

    widen_rank(trainer.model)
    torch._inductor.config.emulate_precision_casts = True
    for layer in trainer.model.get_base_model().model.layers:  # one compilation serves them all
        layer.compile(dynamic=True)
    evaluate = trainer.evaluate

    def evaluate_uncompiled(*args, **kwargs):
        with torch.compiler.set_stance("force_eager"):
            return evaluate(*args, **kwargs)

    trainer.evaluate = evaluate_uncompiled


def widen_rank(model, to=8):
    """Compute LoRA's products at a rank that is a multiple of `to`, with zeros: the same numbers, sooner.

    The matrix units take rows of 16 bytes, eight numbers in bf16; for rank 4 the library falls back to old kernels.
    The weights that are trained and saved keep their rank.
    """
    from torch.nn import Linear
    from torch.nn.functional import linear, pad

    class WideA(Linear):
        def forward(self, x):
            return linear(x, pad(self.weight, (0, 0, 0, -self.out_features % to)))

    class WideB(Linear):
        def forward(self, x):
            return linear(x, pad(self.weight, (0, -self.in_features % to)))

    for module in model.modules():
        for layers, wide in ((getattr(module, "lora_A", {}), WideA), (getattr(module, "lora_B", {}), WideB)):
            for layer in layers.values():
                layer.__class__ = wide
