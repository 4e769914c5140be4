"""
A simulation of fine-tuning without a GPU: a training step's operations on tensors without numbers
(lib/memory_model/tensors.py), in the order and with the lifetimes that they have in transformers 4.57
(modeling_llama.py), peft 0.17 (tuners/lora), bitsandbytes 0.48, TRL 0.25 (SFTTrainer.compute_loss), accelerate 1.11
and liger 0.6 under bf16 autocast on CUDA. The real step's peak comes out, by what it is for.
"""

from lib.memory_model.allocator import MIB
from lib.memory_model.decoder import Decoder
from lib.memory_model.tensors import Tensor

# cuBLAS keeps a workspace for each thread that multiplies, the forward's and autograd's: 32 MiB on Hopper and later,
# 8 on older GPUs (ATen/cuda/CublasHandlePool.cpp).
WORKSPACE = 32 * MIB
CHUNK = 128  # tokens at a time in TRL's entropy_from_logits


class Simulation(Decoder):
    """Loading, training steps and evaluations of one model under one setting, on a fresh GPU."""

    def __init__(self, shape, setting):
        super().__init__(shape, setting)
        self.static, self.workspaces, self.states = [], [], None

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
