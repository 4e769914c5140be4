"""
Padding-free batches: the rows of a micro-batch lie end to end in one sequence, and attention stops at each row's end.
No token is padding, so no step is spent on any, and the result is that of the padded batch.
"""

ATTENTION = "varlen"


def register():
    """Make `attn_implementation="varlen"` known to transformers; without a mask function it builds no mask either."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, varlen_attention)


def varlen_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **unused
):
    """Causal attention within each row of a packed sequence.

    query [1, heads, tokens, width], key and value [1, kv heads, tokens, width]; cu_seq_lens_q [rows + 1], int32: where
    each row begins, and the end; max_length_q: the longest row. Returns [1, tokens, heads, width] and no weights.
    """
    import torch

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Under QLoRA the layers compute in fp32 between the matrices; the kernel takes bf16, as autocast would give it.
    dtype = value.dtype if value.dtype != torch.float32 else torch.bfloat16
    query, key, value = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0),
        )
    else:
        out = row_by_row(query, key, value, cu_seq_lens_q, scaling)
    return out.unsqueeze(0), None


def row_by_row(query, key, value, starts, scaling):
    """The same for a machine without torch's variable-length kernel: one causal attention a row."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    parts = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        row = (part[begin:end].transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        out = scaled_dot_product_attention(*row, is_causal=True, scale=scaling)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


class PackedCollator:
    """TRL's padding-free collator, with the rows' bounds that the attention above needs."""

    # The kernel wants an upper bound of the row length; few distinct ones keep torch.compile from compiling again.
    ROUND_TO = 256

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        import torch

        batch = self.collator(rows)
        positions = batch["position_ids"][0]
        starts = torch.cat([(positions == 0).nonzero().flatten(), torch.tensor([len(positions)])])
        longest = int(starts.diff().max())
        batch["cu_seq_lens_q"] = starts.to(torch.int32)
        batch["max_length_q"] = -(-longest // self.ROUND_TO) * self.ROUND_TO
        return batch


def make_padding_free(trainer):
    """Let a trainer whose model attends with `varlen` train on packed micro-batches.

    The bounds go to the decoder alone: the loss, which gets every other argument of the model, takes none it does not
    know.
    """
    trainer.data_collator = PackedCollator(trainer.data_collator)
    bounds, compute_loss = {}, trainer.compute_loss

    def compute_loss_within_bounds(model, inputs, *args, **kwargs):
        bounds.update({name: inputs.pop(name) for name in ("cu_seq_lens_q", "max_length_q")})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss_within_bounds
    decoder = trainer.model.get_base_model().model
    decoder.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, **bounds}), with_kwargs=True)
