"""
A rehearsal of fine-tuning without a GPU: a training step's operations on tensors without numbers (stages/sizes.py), in
the order and with the lifetimes that they have in transformers 4.57 (modeling_llama.py), peft 0.17 (tuners/lora),
bitsandbytes 0.48, TRL 0.25 (SFTTrainer.compute_loss), accelerate 1.11 and liger 0.6 under bf16 autocast on CUDA.
The real step's peak comes out, by what it is for.
"""

from dataclasses import dataclass

from stages.allocator import MIB
from stages.sizes import Leaf, Operations, Tensor

# cuBLAS keeps a workspace for each thread that multiplies, the forward's and autograd's: 32 MiB on Hopper and later,
# 8 on older GPUs (ATen/cuda/CublasHandlePool.cpp).
WORKSPACE = 32 * MIB
CHUNK = 128  # tokens at a time in TRL's entropy_from_logits


def round_up(number, to):
    return -(-number // to) * to


@dataclass
class Shape:
    """A Llama-shaped model: sizes as in its config, `linear` as {module: (inputs, outputs)} of one block."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    linear: dict


@dataclass
class Setting:
    """What decides the memory of a fine-tuning besides the model."""

    method: str
    rank: int
    dropout: float
    targets: tuple
    optimizer: str
    gradient_checkpointing: bool
    padding_free: bool
    liger: bool
    compile: bool
    gpus: int


@dataclass
class Batch:
    """Rows of `width` tokens; padded: some of them are shorter."""

    rows: int
    width: int
    padded: bool

    @property
    def tokens(self):
        return self.rows * self.width


class Rehearsal(Operations):
    """Loading, training steps and evaluations of one model under one setting, on a fresh GPU."""

    def __init__(self, shape, setting):
        super().__init__()
        self.shape, self.setting = shape, setting
        self.four_bits = setting.method == "qlora"
        self.liger_layers = setting.liger and not setting.compile  # else only its loss is used (training.py)
        self.rank = round_up(setting.rank, 8) if setting.compile else setting.rank  # training.widen_rank
        self.static, self.workspaces, self.states = [], [], None
        self.adapter = [
            {
                name: (Leaf(setting.rank * shape.linear[name][0]), Leaf(setting.rank * shape.linear[name][1]))
                for name in setting.targets
            }
            for _ in range(shape.layers)
        ]

    def weights(self):
        """Every weight of the adapter."""
        return [leaf for layer in self.adapter for pair in layer.values() for leaf in pair]

    def load(self):
        """The base model and the adapter. transformers' caching_allocator_warmup first takes the model's size at once
        (half of it for 4 bits; always without the head), so that the allocator has it."""
        shape = self.shape
        by_name = sorted(shape.linear, key=lambda name: (name[0] in "qkvo", name))  # in the file, mlp before self_attn
        linear = [inputs * outputs for inputs, outputs in map(shape.linear.get, by_name)]
        table, norms = shape.vocabulary * shape.hidden, (2 * shape.layers + 1) * shape.hidden
        warm = shape.layers * sum(linear) + table + norms
        self.new(warm, 1 if self.four_bits else 2, "loader")
        self.static += [self.new(table, 2, "weights") for _ in range(1 if shape.tied else 2)]
        for size in linear * shape.layers:
            self.static += self.quantised(size) if self.four_bits else [self.new(size, 2, "weights")]
        norm_item = 4 if self.four_bits else 2  # TRL turns the norms of a 4-bit model into fp32
        self.static += [self.new(shape.hidden, norm_item, "weights") for _ in range(2 * shape.layers + 1)]
        self.static += [self.new(leaf.count, 4, "adapter") for leaf in self.weights()]
        if self.setting.gpus > 1:  # the buckets in which DistributedDataParallel exchanges the gradients
            self.static.append(self.new(sum(leaf.count for leaf in self.weights()), 4, "gradients"))

    def quantised(self, size):
        """NF4 with double quantisation: 4 bits a value, 8 a block of 64, 32 for 256 blocks; code and offset beside."""
        weight = self.new(size, 2, "weights")
        scales = self.new(size // 64, 4)
        packed = self.new(size // 2, 1, "weights")
        kept = [self.new(size // 64, 1, "weights"), self.new(-(-size // (64 * 256)), 4, "weights")]
        del weight, scales
        return [packed, *kept, self.new(16, 4, "weights"), self.new(1, 4, "weights")]

    # The decoder.

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
            grads = [
                self.new(one.count, 2) if edge else None for one, edge in zip((query, key, value), edges, strict=True)
            ]
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
        x = self.add(rest, x)
        rest = x
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
        parts = []
        for name in ("gate_proj", "up_proj"):
            out, kept = self.compiled_linear(name, tokens, layer, True)
            parts += [*out, *kept]
        saved += parts
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

    # The loss.

    def loss(self, batch):
        """Forward pass and loss as TRL computes them; returns what backward starts from."""
        self.copies = {}
        if self.setting.liger and self.training:
            return self.fused_loss(self.decoder(batch), batch.tokens)
        logits, loss = self.whole_loss(self.decoder(batch), batch.tokens)
        self.copies = {}  # autocast ends with the model's forward
        outputs = self.new(logits.count, 4, "logits")  # accelerate gives every output back in fp32
        del logits
        if not self.setting.liger:
            self.metrics(batch)
        del outputs
        return loss

    def whole_loss(self, hidden, tokens):
        """lm_head and transformers' ForCausalLMLoss: (logits, loss)."""
        count = tokens * self.shape.vocabulary
        logits = self.frozen(hidden, tokens, self.shape.vocabulary, "logits")
        exact = self.cast(logits, 4, "logits")
        chances = self.new(count, 4, "logits")
        kept = Tensor(chances.storage, count, 4)
        self.record(chances, (exact,), (kept,), lambda g, e, kept: (self.new(count, 4, "logits"),))
        loss = self.new(1, 4)
        return logits, self.record(loss, (chances,), (kept,), lambda g, e, kept: (self.new(count, 4, "logits"),))

    def metrics(self, batch):
        """TRL's entropy (three copies of a chunk of the logits) and token accuracy (a copy of nearly all)."""
        chunk = min(CHUNK, batch.tokens) * self.shape.vocabulary
        parts = [self.new(chunk, 4, "logits") for _ in range(3)]
        del parts
        self.new(batch.rows * (batch.width - 1) * self.shape.vocabulary, 4, "logits")

    def fused_loss(self, hidden, tokens):
        """liger's fused_linear_cross_entropy: the gradient of the hidden states is made in the forward pass, by chunks
        whose logits take about as much as the hidden states; two chunks stand at a time."""
        self.copies = {}
        width, vocabulary = self.shape.hidden, self.shape.vocabulary
        grad = self.new(hidden.count, hidden.item)
        chunk = 1 << (-(-tokens // -(-vocabulary // width)) - 1).bit_length()
        loss = self.new(tokens, 4)
        parts = [self.new(min(chunk, tokens) * vocabulary, 2, "logits") for _ in range(1 if chunk >= tokens else 2)]
        parts.append(self.new(min(chunk, tokens) * width, 2))
        del parts
        return self.record(loss, (hidden,), (grad,), lambda g, e, grad: (grad,))

    # A run.

    def train(self, batches):
        """One optimiser step over its micro-batches."""
        self.recording = self.training = True
        for batch in batches:
            self.multiply_on(1)
            loss = self.loss(batch)
            self.multiply_on(2)
            self.backward(loss, self.new(1, 4))
            del loss
        self.update()

    def evaluate(self, batch):
        """One batch of the validation: no gradients, no dropout, the logits whole even with liger."""
        self.recording = self.training = False
        self.multiply_on(1)
        self.loss(batch)

    def multiply_on(self, threads):
        """cuBLAS's workspace for each thread that has multiplied."""
        while len(self.workspaces) < threads:
            self.workspaces.append(self.new(WORKSPACE, 1, "workspace"))

    def update(self):
        """The optimiser's step: its state is made at the first one, the gradients are dropped after each."""
        if self.states is None:
            sizes = [size for leaf in self.weights() for size in state_sizes(self.setting.optimizer, leaf.count)[0]]
            self.states = [self.new(size, 1, "optimizer") for size in sizes]
        for leaf in self.weights():
            leaf.grad = None


def state_sizes(optimizer, count):
    """(bytes of each tensor that the optimiser keeps for a weight of `count` elements on the GPU, bytes in paged
    memory). None for an optimiser that is not known here.

    AdamW in torch: two fp32 moments (https://arxiv.org/abs/1910.02054, section 3.1), the fused one a step count too.
    bitsandbytes in 8 bits: two moments of a byte with a fp32 scale each per 256 values (optim/optimizer.py:
    Optimizer2State), but fp32 below 4,096 elements; `paged` moves only moments of 100,000 elements and more to memory
    that the GPU and the CPU share.
    """
    if optimizer in ("adamw_torch", "adamw_torch_fused"):
        return [4 * count, 4 * count] + [4] * (optimizer == "adamw_torch_fused"), 0
    if optimizer in ("paged_adamw_8bit", "adamw_8bit", "adamw_bnb_8bit"):
        if count < 4096:
            return [4 * count, 4 * count], 0
        scales = [4 * -(-count // 256)] * 2
        if optimizer == "paged_adamw_8bit" and count >= 100_000:
            return scales, 2 * count
        return [count, count, *scales], 0
    return None
