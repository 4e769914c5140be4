"""
PyTorch's caching allocator for CUDA, without a GPU: the memory that a process holds for its tensors.

The rules of c10/cuda/CUDACachingAllocator.cpp (torch 2.11, no expandable segments): a size is rounded up to 512 bytes;
up to 1 MiB it comes out of segments of 2 MiB, up to 10 MiB out of segments of 20 MiB, above that a segment of its own
is rounded up to 2 MiB. The smallest free block that is large enough serves; what is left of it is split off (above
1 MiB only if the rest is larger than that); free neighbours merge; a segment is never given back.
"""

from bisect import bisect_left, insort

MIB = 2**20
ROUND = 512


class Block:
    """A piece of a segment; `before` and `after` are its neighbours in it."""

    __slots__ = ("size", "small", "place", "free", "before", "after")

    def __init__(self, size, small, place, before=None, after=None):
        self.size, self.small, self.place, self.free = size, small, place, False
        self.before, self.after = before, after


class Allocator:
    """malloc and free of one GPU; `reserved` bytes are taken from the driver, `allocated` bytes of them are in use."""

    def __init__(self):
        self.reserved = self.allocated = self.segments = 0
        self.free_blocks = {True: [], False: []}  # by small: (size, place, block), sorted

    def malloc(self, size):
        """A block of at least `size` bytes."""
        size = max(-(-size // ROUND), 1) * ROUND
        small = size <= MIB
        pool = self.free_blocks[small]
        place = bisect_left(pool, (size, -1))
        if place < len(pool):
            block = pool.pop(place)[2]
            block.free = False
        else:
            block = self.new_segment(size, small)
        rest = block.size - size
        if rest >= ROUND if small else rest > MIB:
            after = Block(rest, small, block.place + size, block, block.after)
            if block.after:
                block.after.before = after
            block.after, block.size = after, size
            self.put(after)
        self.allocated += block.size
        return block

    def new_segment(self, size, small):
        """Memory from the driver, as one block."""
        length = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.segments += 1
        self.reserved += length
        return Block(length, small, self.segments << 48)

    def free(self, block):
        """Give a block back, as one with the free blocks beside it."""
        self.allocated -= block.size
        before, after = block.before, block.after
        if before and before.free:
            self.take(before)
            before.size, before.after = before.size + block.size, after
            if after:
                after.before = before
            block = before
        if after and after.free:
            self.take(after)
            block.size, block.after = block.size + after.size, after.after
            if after.after:
                after.after.before = block
        self.put(block)

    def put(self, block):
        block.free = True
        insort(self.free_blocks[block.small], (block.size, block.place, block))

    def take(self, block):
        pool = self.free_blocks[block.small]
        del pool[bisect_left(pool, (block.size, block.place))]
