"""
Training on CPUs: the same mathematics without what a CPU does slowly.

On two cores a step of a small model spent four fifths of its time beside the matrix products: on dropout's mask, drawn
number by number; on converting between fp32 and bf16; on attention row by row and its backward pass; on the logits of
prompt tokens, which no loss looks at, and on those of the others in whole tables of fp32.
"""

import types

import numpy
import torch

ATTENTION = "rows"
CHUNK = 64  # tokens whose logits exist at once: 49,152 of them in fp32 are 12 MiB, near what a core's caches hold


def register():
    """Make `attn_implementation="rows"` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, rows_attention)


def train_on_cpu(trainer):
    """Let a trainer compute its LoRA layers and its loss as below, of padding-free batches that packing.py bounds."""
    masks = Masks()
    for module in trainer.model.modules():
        if hasattr(module, "lora_A"):
            share = getattr(module.lora_dropout["default"], "p", 0.0)
            module.forward = types.MethodType(lora_forward(masks, share), module)
    trainer.compute_loss = completion_loss(trainer, masks)


def rows_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **unused):
    """Causal attention within each row of a packed sequence, all rows at once; arguments as packing.varlen_attention's.

    Shorter rows are filled up at their end, where causal attention lets no token of theirs look. Written out: for short
    rows the backward pass of torch's own kernel is slower.
    """
    starts = cu_seq_lens_q.long()
    lengths = starts.diff()
    rows, longest = len(lengths), int(lengths.max())
    row = torch.repeat_interleave(torch.arange(rows), lengths)
    places = row * longest + torch.arange(len(row)) - starts[:-1][row]
    groups = query.shape[1] // key.shape[1]

    def filled(part, times=1):  # [1, heads, tokens, width] to [rows x heads, longest, width]
        tokens = part[0].transpose(0, 1).to(torch.bfloat16).repeat_interleave(times, dim=1)
        full = tokens.new_zeros(rows * longest, *tokens.shape[1:]).index_copy(0, places, tokens)
        return full.view(rows, longest, *tokens.shape[1:]).transpose(1, 2).flatten(0, 1)

    later = torch.full((longest, longest), -torch.inf, dtype=torch.bfloat16).triu(1)
    scores = torch.baddbmm(later, filled(query), filled(key, groups).transpose(1, 2), alpha=scaling)
    out = torch.bmm(scores.softmax(-1), filled(value, groups))
    out = out.view(rows, -1, longest, out.shape[-1]).transpose(1, 2).flatten(0, 1)[places]
    return out.unsqueeze(0), None


class Masks:
    """Dropout's masks, 16 random bits a number: torch draws one number at a time, which was a fifth of a step.

    Layers that read the same tensor (query, key and value; gate and up) share its mask.
    """

    def begin(self):
        """Seed from torch's generator: a run that resumes from a checkpoint draws as the whole run would."""
        self.bits = numpy.random.PCG64(torch.randint(2**62, ()).item())
        self.read = None, None

    def of(self, x, share):
        """(x in bf16 [tokens, in], its mask, their product); without a share the mask is None."""
        if self.read[0] is not x:
            rows = x.detach().reshape(-1, x.shape[-1]).to(torch.bfloat16)
            keep = self.draw(rows.shape, share) if share else None
            self.read = x, (rows, keep, rows if keep is None else rows * keep)
        return self.read[1]

    def draw(self, shape, share):
        """bf16 of `shape`: 0 for `share` of the numbers, 1 for the others."""
        count = shape.numel()
        drawn = self.bits.random_raw(-(-count // 4)).view(numpy.uint16)[:count]
        ones = (drawn >= round(share * 2**16)) * numpy.uint16(0x3F80)  # 1.0 in bf16
        return torch.from_numpy(ones.view(numpy.int16)).view(torch.bfloat16).view(shape)


def lora_forward(masks, share):
    """The forward method of a LoRA layer: x [..., in], bf16 or fp32, to [..., out], bf16."""

    def forward(self, x, *args, **kwargs):
        base, a, b = self.get_base_layer(), self.lora_A["default"].weight, self.lora_B["default"].weight
        dropout = share if self.training else 0
        scale = self.scaling["default"] / (1 - dropout)
        return LoraProduct.apply(x, *masks.of(x, dropout), unpacked(base.weight), a, b, scale)

    return forward


def unpacked(weight):
    """A frozen weight in bf16, [out, in]; of a 4-bit one the values that it stands for."""
    if not hasattr(weight, "quant_state"):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16)


class LoraProduct(torch.autograd.Function):
    """x W' + scale (x * keep) A' B' of a frozen W: x [..., in], W [out, in], A [r, in], B [out, r], keep as x or None.

    rows and dropped are x and x * keep in bf16, [tokens, in]. A 4-bit weight is written out once a step: what the
    forward pass unpacked is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, rows, keep, dropped, weight, a, b, scale):
        small = dropped @ a.to(rows.dtype).T
        out = (rows @ weight.T).addmm_(small, b.to(rows.dtype).T, alpha=scale)
        ctx.save_for_backward(dropped, weight, a, b, keep, small)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        dropped, weight, a, b, keep, small = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1]).to(dropped.dtype)
        inner = (grad @ b.to(grad.dtype)) * ctx.scale
        grad_a = (inner.T @ dropped).to(a.dtype)
        grad_b = (grad.T @ small).to(b.dtype) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            through = inner @ a.to(grad.dtype)
            grad_x = (through if keep is None else through.mul_(keep)).addmm_(grad, weight)
            grad_x = grad_x.view(*shape[:-1], -1)
        return grad_x, None, None, None, None, grad_a, grad_b, None


def completion_loss(trainer, masks):
    """compute_loss with logits of the completions' tokens alone; counts the trained tokens as TRL does."""

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        masks.begin()
        labels = inputs["labels"]
        if model.training:
            trainer._total_train_tokens += labels.numel()
            trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
        following = torch.nn.functional.pad(labels[0, 1:], (0, 1), value=-100)
        asked = (following != -100).nonzero().flatten()
        causal = trainer.accelerator.unwrap_model(model).get_base_model()
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = causal.model(**inputs, use_cache=False).last_hidden_state[0, asked]
        count = len(asked) if num_items_in_batch is None else int(num_items_in_batch)
        loss = LossOfLogits.apply(hidden, causal.lm_head.weight.detach(), following[asked], count)
        return (loss, {}) if return_outputs else loss

    return compute_loss


class LossOfLogits(torch.autograd.Function):
    """Cross-entropy of hidden W' against labels, summed and divided by count: hidden [tokens, in], W [vocabulary, in].

    W is frozen, so the gradient of `hidden` is made in the forward pass, CHUNK tokens at a time, and no logits stay.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        ctx.count, ctx.gradient = count, None
        if ctx.needs_input_grad[0]:
            ctx.gradient = torch.empty_like(hidden, dtype=weight.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            label = labels[part, None]
            # Not logsumexp, which is much slower on a CPU.
            logs = (hidden[part].to(weight.dtype) @ weight.T).float().log_softmax(-1)
            total -= logs.gather(1, label).sum()
            if ctx.gradient is not None:
                share = logs.exp_()
                share.scatter_add_(1, label, share.new_full(label.shape, -1.0))
                torch.mm(share.to(weight.dtype), weight, out=ctx.gradient[part])
        return total / count

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient * (grad / ctx.count), None, None, None
