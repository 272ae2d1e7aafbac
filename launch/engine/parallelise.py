"""How the blocks of a method are checkpointed, compiled and sharded: one function for every family of methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...models.method import Method
from .activation_checkpointing import checkpoint_activations

# Kinds of calls of a block that get a graph each: the stacks, with and without gradients, attacked or not, at several
# lengths. Beyond torch's limit of 8 for all blocks together, blocks run uncompiled.
_GRAPHS = 64


def parallelise(
    method: Method,
    policy: str | int,
    compiled: bool,
    shard: Callable[[nn.Module], object] | None = None,
    few_shapes: bool = False,
) -> None:
    """Checkpoint the activations of a method by `policy`, compile its blocks if `compiled`, and shard it, in place.

    With `few_shapes`, as recommended masks give them, each shape gets a graph of its own; otherwise a stack has one for
    the first shape and one for all others. `shard` is called with every block, trained or frozen, and last with the
    method: a teacher is cut where its student is, or their shards would not line up for the moving average. Compiling
    sets options of torch for the process.
    """
    # First, so that the compiler sees what is computed again and the sharding's hooks stay outside of it: they gather
    # a block's weights once for its whole backward.
    checkpoint_activations(method, policy)
    blocks = [block for stack in method.stacks().values() for block in stack]
    if compiled:
        options = torch._dynamo.config
        options.recompile_limit = max(options.recompile_limit, _GRAPHS)  # pyright: ignore
        # It would cut a block's graph where DistributedDataParallel's buckets end. Gradients leave after each block
        # anyway, and torch 2.11 forgets what `selective` keeps in a graph that was cut.
        options.optimize_ddp = False  # pyright: ignore
        # Before sharding, because what sharding does around a block is not to be compiled; block by block, because
        # blocks of one kind share a graph.
        for block in blocks:
            block.compile(dynamic=False if few_shapes else None)
    if shard is not None:
        for module in (*blocks, method):
            shard(module)
