"""
The decoder of a Llama in the memory simulation (lib/memory_model/step.py): its operations, plain, checkpointed and
compiled, as transformers 4.57 (modeling_llama.py), peft 0.17 (tuners/lora), bitsandbytes 0.48 and liger 0.6 do them.
"""

from lib.memory_model.inputs import round_up
from lib.memory_model.tensors import Leaf, Operations, Tensor


class Decoder(Operations):
    """A model and its adapter under one setting, from a batch's embeddings to the output of the last norm."""

    def __init__(self, shape, setting):
        super().__init__()
        self.shape, self.setting = shape, setting
        self.four_bits = setting.method == "qlora"
        self.liger_layers = setting.liger and not setting.compile  # else only its loss is used (training.py)
        self.rank = round_up(setting.rank, 8) if setting.compile else setting.rank  # training.widen_rank
        self.adapter = [
            {
                name: (Leaf(setting.rank * shape.linear[name][0]), Leaf(setting.rank * shape.linear[name][1]))
                for name in setting.targets
            }
            for _ in range(shape.layers)
        ]

    def norm(self, x):
        """LlamaRMSNorm, or liger's, which keeps its input as it is and writes the gradient over the one it gets."""
        count, tokens, item = x.count, x.count // self.shape.hidden, x.item
        if self.liger_layers:
            out, root = self.new(count, item), self.new(tokens, 4)
            return self.record(out, (x,), (x, root), lambda g, e, x, root: (g,))
        x = self.cast(x, 4)
        root = self.root(x, tokens)

        def run(g, edges, x, root):
            return self.new(count, 4), self.new_row(count, tokens)

        y = self.record(self.new(count, 4), (x, root), (x, Tensor(root.storage, tokens, 4)), run)
        y = self.cast(y, item)
        out = self.new(count, 4 if self.four_bits else 2)
        return self.record(out, (y,), (), lambda g, e: (self.converted(self.new(count, g.item), item),))

    def root(self, x, tokens):
        """1 / rms(x), a number a token."""
        count = x.count
        square = self.new(count, 4)
        mean = self.new(tokens, 4)
        del square
        out = self.new(tokens, 4)

        def run(g, edges, x):
            parts = [self.new(count, 4) for _ in range(4)]  # through mean, power, and the power's own gradient
            return (parts[0],)

        del mean
        return self.record(out, (x,), (x,), run)

    def new_row(self, count, tokens):
        """A product of `count` numbers, summed to one a token."""
        whole = self.new(count, 4)
        row = self.new(tokens, 4)
        del whole
        return row

    def linear(self, name, x, tokens, layer):
        """A linear layer of the block, with peft's adapter around it where it is a target."""
        inputs, outputs = self.shape.linear[name]
        out = self.four_bit(x, tokens, inputs, outputs) if self.four_bits else self.frozen(x, tokens, outputs)
        if name not in self.setting.targets:
            return out
        if self.four_bits:
            out = self.copy(out)  # peft clones what bitsandbytes gives it
        else:
            x = self.cast(x, 4)  # and takes its input to the adapter's width
        down, up = self.adapter[layer][name]
        small = self.trained(self.dropout(x, self.setting.dropout), down, tokens, self.setting.rank)
        wide = self.trained(small, up, tokens, outputs)
        del small
        update = self.scale(wide)
        del wide
        return self.add(out, update)

    def rotate(self, x, cos, sin):
        """Rotary embedding: x cos + half-turned x sin."""
        if self.liger_layers:
            return self.record(Tensor(x.storage, x.count, x.item), (x,), (cos, sin), lambda g, e, *tables: (g,))
        count, item = x.count, x.item
        parts = [self.new(count, item), self.new(count // 2, item), self.new(count, item)]  # x cos, a half, x turned
        parts[1] = self.new(count, item)  # the turned x times sin

        def run(g, edges, *tables):
            parts = [self.new(count, item), self.new(count // 2, item), self.new(count, item)]
            parts[1] = self.new(count, item)
            parts[0] = self.new(count, item)
            del parts
            return (self.new(count, item),)

        out = self.new(count, item)
        del parts
        return self.record(out, (x,), (cos, sin), run)

    def attend(self, query, key, value, batch):
        """Attention in bf16: flash, or with padding the memory-efficient kernel, which wants its mask as numbers."""
        query, key, value = (self.cast(part, 2) for part in (query, key, value))
        heads, count, grouped = self.shape.heads, query.count, key.count != query.count
        if grouped and (batch.padded or self.setting.padding_free):
            key, value, grouped = self.repeat(key, count), self.repeat(value, count), False
        saved = [query, key, value]
        if batch.padded:
            saved.append(self.new(batch.rows * batch.width * round_up(batch.width, 16), 2))
        out = self.new(count, 2)
        saved += [Tensor(out.storage, count, 2), self.new(batch.rows * heads * batch.width, 4)]

        def run(g, edges, query, key, value, *others):
            sums = [self.new(batch.rows * heads * round_up(batch.width, 128), 4), self.new(count, 4)]
            wanted = zip((query, key, value), edges, strict=True)
            grads = [self.new(part.count, 2) if edge else None for part, edge in wanted]
            if grouped:
                sums += [self.new(count, 2), self.new(count, 2)]
            return tuple(grads)

        return self.record(out, (query, key, value), saved, run)

    def repeat(self, x, count):
        """Each key or value head once for every query head of its group."""
        few = x.count
        return self.record(self.new(count, x.item), (x,), (), lambda g, e: (self.new(few, g.item),))

    def attention(self, x, batch, layer, cos, sin):
        query, key, value = (self.linear(f"{part}_proj", x, batch.tokens, layer) for part in "qkv")
        query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        out = self.attend(query, key, value, batch)
        return self.linear("o_proj", out, batch.tokens, layer)

    def inner(self, x, batch, layer):
        """LlamaMLP: down(silu(gate) * up)."""
        product = self.gated(x, batch.tokens, layer)
        return self.linear("down_proj", product, batch.tokens, layer)

    def gated(self, x, tokens, layer):
        gate = self.linear("gate_proj", x, tokens, layer)
        if not self.liger_layers:
            gate = self.silu(gate)
        up = self.linear("up_proj", x, tokens, layer)
        if self.liger_layers:  # computes silu again, and writes the gradients over what it kept
            return self.record(self.new(up.count, up.item), (gate, up), (gate, up), lambda g, e, *kept: kept)
        return self.multiply(gate, up)

    def layer(self, x, batch, layer, cos, sin):
        """LlamaDecoderLayer."""
        if self.setting.compile and self.training:
            return self.compiled_layer(x, batch, layer, cos, sin)
        rest = x
        x = self.norm(x)
        x = self.attention(x, batch, layer, cos, sin)
        x = rest = self.add(rest, x)
        x = self.norm(x)
        x = self.inner(x, batch, layer)
        return self.add(rest, x)

    def compiled_layer(self, x, batch, layer, cos, sin):
        """The layer as torch.compile runs it: what its partitioner keeps for the backward pass (found by looking at its
        graph for torch 2.13, not by theory): the inputs of the norms, not their outputs; no silu and no product, which
        it computes again; under QLoRA gate and up as the two bf16 parts that they are the sum of, and every weight
        that was written out in bf16: the partitioner does not take that for something to do twice."""
        tokens, item, hidden, inner = batch.tokens, x.item, self.shape.hidden, self.shape.inner
        queries = self.shape.heads * self.shape.head
        saved = [x, self.new(tokens, 4)] if x.source else []
        passing = self.new(tokens * hidden, 2)  # between what is kept: a norm's output, the input of a product
        for name in ("q_proj", "k_proj", "v_proj"):
            saved += self.compiled_linear(name, tokens, layer, bool(x.source))[1]
        saved += [self.new(tokens * queries, 2) for _ in range(4)] + [self.new(tokens * self.shape.heads, 4)]
        saved += self.compiled_linear("o_proj", tokens, layer, True)[1]
        saved += [self.new(tokens * hidden, 2), self.new(tokens, 4)]
        for name in ("gate_proj", "up_proj"):
            out, kept = self.compiled_linear(name, tokens, layer, True)
            saved += [*out, *kept]
        passing = self.new(tokens * inner, 2)
        out, kept = self.compiled_linear("down_proj", tokens, layer, True)
        saved += kept
        del passing, out
        leaves = [leaf for pair in self.adapter[layer].values() for leaf in pair]
        inputs = [x, *(Tensor(None, leaf.count, 4, leaf) for leaf in leaves)]

        def run(g, edges, *saved):
            parts = [self.new(tokens * inner, 2) for _ in range(4)]  # the gradients of gate, up and their product
            del parts
            grads = [self.new(leaf.count, 4) for leaf in leaves]
            return self.new(tokens * hidden, item) if edges[0] else None, *grads

        out = self.new(tokens * hidden, 4 if self.four_bits else item)
        return self.record(out, inputs, saved, run)

    def compiled_linear(self, name, tokens, layer, masked):
        """(outputs, kept) of one linear layer with its adapter, whose rank is widened."""
        inputs, outputs = self.shape.linear[name]
        weight = self.dequantised(name)
        out = [self.new(tokens * outputs, 2)]
        kept = weight if masked else []
        if name not in self.setting.targets:
            return out, kept
        kept = [*kept, self.new(tokens * inputs, 2), self.new(tokens * self.rank, 2)]
        kept += [self.new(tokens * inputs, 1)] if masked and self.setting.dropout else []
        kept += [self.new(self.rank * size, 2) for size in ([inputs] if masked else []) + [outputs]]
        wide = self.new(tokens * outputs, 2)
        if self.four_bits:
            out.append(wide)
        return out, kept

    def dequantised(self, name):
        """A 4-bit weight in bf16, in a list; empty for LoRA."""
        inputs, outputs = self.shape.linear[name]
        if not self.four_bits:
            return []
        scales = self.new(inputs * outputs // 64, 4, "dequantised")
        weight = self.new(inputs * outputs, 2, "dequantised")
        del scales
        return [weight]

    def checkpointed(self, x, batch, layer, cos, sin):
        """torch's reentrant checkpoint: only the input is kept, the layer runs again in the backward pass."""
        recording, self.recording = self.recording, False
        out = self.layer(x, batch, layer, cos, sin)
        self.recording = recording

        def run(g, edges, x):
            start = Leaf()
            out = self.layer(Tensor(x.storage, x.count, x.item, start), batch, layer, cos, sin)
            self.copies = {}
            self.backward(out, g)
            return (start.grad,)

        return self.record(out, (x,), (x,), run)

    def decoder(self, batch):
        """LlamaModel: the final norm's output."""
        shape = self.shape
        checkpointing = self.setting.gradient_checkpointing and self.training
        embedded = self.new(batch.tokens * shape.hidden, 2)
        if self.setting.gradient_checkpointing:
            embedded.source = Leaf()  # enable_input_require_grads
        cos, sin = self.new(batch.width * shape.head, 2), self.new(batch.width * shape.head, 2)
        mask = self.new(batch.rows * batch.width**2, 1) if batch.padded else None
        x = embedded
        for layer in range(shape.layers):
            x = (self.checkpointed if checkpointing else self.layer)(x, batch, layer, cos, sin)
        del mask
        return self.norm(x)
