"""
Tensors that have a size and no numbers, on a model of PyTorch's allocator: what each operation makes, what autograd
keeps of it for the backward pass, and when it is dropped. Python's own reference counts end a tensor's life, as they do
in PyTorch, so code that is written like the model's holds what the model's holds.

What an operation keeps follows from torch's derivatives.yaml, what autocast casts from its list for CUDA.
`count` is a number of elements, `item` the bytes of one.
"""

from heapq import heappop, heappush

from lib.memory_model.allocator import Allocator

# The terms of the peak. `loader`: transformers takes the model's size at once before it reads the weights.
TERMS = (
    "weights", "adapter", "gradients", "optimizer", "activations", "logits", "dequantised", "temporaries", "workspace",
    "loader",
)  # fmt: skip


class Storage:
    """Bytes in the allocator under a term, until nobody holds them."""

    __slots__ = ("memory", "block", "bytes", "term")

    def __init__(self, memory, size, term):
        self.memory, self.bytes, self.term = memory, size, term
        self.block = memory.malloc(size)
        memory.live[term] += self.block.size
        if memory.allocated > memory.peak:
            memory.peak, memory.at_peak = memory.allocated, dict(memory.live)

    def rename(self, term):
        self.memory.live[self.term] -= self.block.size
        self.memory.live[term] += self.block.size
        self.term = term

    def __del__(self):
        self.memory.live[self.term] -= self.block.size
        self.memory.free(self.block)


class Memory(Allocator):
    """The allocator, what is live by term, and the highest point since the last look."""

    def __init__(self):
        super().__init__()
        self.live = dict.fromkeys(TERMS, 0)
        self.peak, self.at_peak = 0, dict(self.live)

    def take_peak(self):
        """{allocated, reserved, terms} of the highest point since the last call."""
        peak = {"allocated": self.peak, "reserved": self.reserved, "terms": self.at_peak}
        self.peak, self.at_peak = self.allocated, dict(self.live)
        return peak


class Tensor:
    """A view of a storage; `source` is the node or the leaf that its gradient goes to, None if it needs none."""

    __slots__ = ("storage", "count", "item", "source")

    def __init__(self, storage, count, item, source=None):
        self.storage, self.count, self.item, self.source = storage, count, item, source


class Leaf:
    """The end of a gradient: a weight of the adapter (with its size), or the input of a checkpointed layer."""

    __slots__ = ("count", "grad")

    def __init__(self, count=0):
        self.count, self.grad = count, None

    def accumulate(self, grad):
        """Keep the first gradient, add the others to it in place."""
        if self.grad is None:
            self.grad = grad
            if self.count:
                grad.storage.rename("gradients")


class Node:
    """One operation of the backward pass: run(gradient, edges, *saved) gives the gradients of its inputs."""

    __slots__ = ("order", "edges", "saved", "run")

    def __init__(self, order, edges, saved, run):
        self.order, self.edges, self.saved, self.run = order, edges, saved, run


class Operations:
    """Tensors and operations on one Memory, recorded for the backward pass while `recording`."""

    def __init__(self):
        self.memory, self.recording, self.training, self.nodes = Memory(), True, True, 0
        self.copies = {}  # autocast's bf16 copies of fp32 weights, kept until it ends

    def new(self, count, item, term="temporaries"):
        return Tensor(Storage(self.memory, count * item, term), count, item)

    def record(self, out, inputs, saved, run):
        """Note how `out` came from `inputs`, if one of them needs a gradient; the saved tensors become activations."""
        edges = tuple(tensor.source for tensor in inputs)
        if self.recording and any(edges):
            self.nodes += 1
            for tensor in saved:
                if tensor.storage.term == "temporaries":
                    tensor.storage.rename("activations")
            out.source = Node(self.nodes, edges, saved, run)
        return out

    def backward(self, out, grad):
        """Run the nodes behind `out`, the latest first, as autograd's engine does."""
        root, waiting, stack = out.source, {}, [out.source]
        while stack:
            for edge in stack.pop().edges:
                if isinstance(edge, Node):
                    if edge not in waiting:
                        stack.append(edge)
                    waiting[edge] = waiting.get(edge, 0) + 1
        held, ready = {root: grad}, [(-root.order, root)]
        del out, grad
        while ready:
            node = heappop(ready)[1]
            grads = node.run(held.pop(node), node.edges, *node.saved)
            edges, node.saved, node.run = node.edges, None, None
            node.edges = ()
            for edge, grad in zip(edges, grads, strict=True):
                if isinstance(edge, Leaf):
                    edge.accumulate(grad)
                elif edge is not None:
                    held.setdefault(edge, grad)  # a second gradient is added in place
                    waiting[edge] -= 1
                    if not waiting[edge]:
                        heappush(ready, (-edge.order, edge))
            grads = grad = None

    # Element by element.

    def cast(self, x, item, term="temporaries"):
        """x in another width; itself if it has it."""
        if x.item == item:
            return x
        width = x.item
        return self.record(self.new(x.count, item, term), (x,), (), lambda g, e: (self.converted(g, width, term),))

    def converted(self, grad, item, term="temporaries"):
        return grad if grad.item == item else self.new(grad.count, item, term)

    def copy(self, x):
        return self.record(self.new(x.count, x.item), (x,), (), lambda g, e: (g,))

    def scale(self, x):
        """x times a number."""
        return self.record(self.new(x.count, x.item), (x,), (), lambda g, e: (self.new(g.count, g.item),))

    def add(self, a, b):
        items = a.item, b.item
        out = self.new(a.count, max(items))
        return self.record(out, (a, b), (), lambda g, e: tuple(self.converted(g, item) for item in items))

    def multiply(self, a, b):
        def run(g, edges, *saved):
            return tuple(self.new(g.count, g.item) if edge else None for edge in edges)

        saved = [b] * bool(a.source) + [a] * bool(b.source)
        return self.record(self.new(a.count, a.item), (a, b), saved, run)

    def silu(self, x):
        return self.record(self.new(x.count, x.item), (x,), (x,), lambda g, e, x: (self.new(g.count, g.item),))

    def dropout(self, x, share):
        """CUDA's native_dropout keeps its mask in a byte an element."""
        if not share or not self.training:
            return x
        out = self.new(x.count, x.item)
        mask = self.new(x.count, 1)
        return self.record(out, (x,), (mask,), lambda g, e, mask: (self.new(g.count, g.item),))

    # Products with weights. Autocast computes all of them in bf16.

    def frozen(self, x, tokens, outputs, term="temporaries"):
        """x times a frozen bf16 weight: nothing is kept but the weight."""
        x = self.cast(x, 2)
        count = x.count
        return self.record(self.new(tokens * outputs, 2, term), (x,), (), lambda g, e: (self.new(count, 2),))

    def four_bit(self, x, tokens, inputs, outputs):
        """bitsandbytes' Linear4bit: the weight is written out in bf16 for each product, forward and backward."""

        def product(count):
            scales = self.new(inputs * outputs // 64, 4, "dequantised")  # the block constants, themselves in 8 bits
            weight = self.new(inputs * outputs, 2, "dequantised")
            del scales
            out = self.new(count, 2)
            del weight
            return out

        item = x.item
        x = self.cast(x, 2)
        count = x.count
        out = self.record(product(tokens * outputs), (x,), (), lambda g, e: (product(count),))
        return self.cast(out, item)

    def weight_copy(self, leaf):
        """Autocast's bf16 copy of a fp32 weight of the adapter; made once in each autocast."""
        if leaf not in self.copies:
            weight = Tensor(None, leaf.count, 4, leaf)
            to_fp32 = lambda g, e: (self.new(g.count, 4),)  # noqa: E731
            self.copies[leaf] = self.record(self.new(leaf.count, 2), (weight,), (), to_fp32)
        return self.copies[leaf]

    def trained(self, x, leaf, tokens, outputs):
        """x times a trained weight: both are kept, for each other's gradient."""
        weight = self.weight_copy(leaf)
        x = self.cast(x, 2)
        sizes = leaf.count, x.count
        saved = [x] + [weight] * bool(x.source)

        def run(g, edges, *saved):
            return self.new(sizes[0], 2), self.new(sizes[1], 2) if edges[1] else None

        return self.record(self.new(tokens * outputs, 2), (weight, x), saved, run)
