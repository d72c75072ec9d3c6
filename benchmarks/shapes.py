"""The lists of parameter shapes that the benchmarks run on, generated from the architectures."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

Shape = tuple[int, ...]
Shapes = list[Shape]


def count(shapes: Shapes) -> int:
    """Returns the number of parameters in the list."""
    return sum(prod(shape) for shape in shapes)


# ---- Models --------------------------------------------------------------------------------------


def resnet50() -> Shapes:
    """ResNet-50 (arXiv:1512.03385) for ImageNet: bottleneck stages of 3, 4, 6 and 3 blocks."""

    def conv_bn(inputs: int, outputs: int, kernel: int) -> Shapes:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    def bottleneck(inputs: int, width: int, downsample: bool) -> Shapes:
        outputs = 4 * width
        shapes = conv_bn(inputs, width, 1) + conv_bn(width, width, 3) + conv_bn(width, outputs, 1)
        return shapes + (conv_bn(inputs, outputs, 1) if downsample else [])

    shapes, inputs = conv_bn(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += bottleneck(inputs, width, downsample=block == 0)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def vit_b16() -> Shapes:
    """ViT-B/16 (arXiv:2010.11929) for ImageNet at 224 pixels: 12 layers, hidden size 768."""
    layers, hidden, patch, patches, classes = 12, 768, 16, 14 * 14, 1000

    def linear(inputs: int, outputs: int) -> Shapes:
        return [(outputs, inputs), (outputs,)]

    norm: Shapes = [(hidden,), (hidden,)]
    attention = linear(hidden, 3 * hidden) + linear(hidden, hidden)
    mlp = linear(hidden, 4 * hidden) + linear(4 * hidden, hidden)
    embedding: Shapes = [(1, 1, hidden), (hidden, 3, patch, patch), (hidden,)]
    position: Shapes = [(1, patches + 1, hidden)]
    blocks = layers * (norm + attention + norm + mlp)
    return embedding + position + blocks + norm + linear(hidden, classes)


def gpt2() -> Shapes:
    """GPT-2 small (124M): 12 layers, hidden size 768, biases everywhere, output head tied."""
    layers, hidden, vocabulary, context = 12, 768, 50257, 1024

    def linear(inputs: int, outputs: int) -> Shapes:
        return [(inputs, outputs), (outputs,)]

    norm: Shapes = [(hidden,), (hidden,)]
    attention = linear(hidden, 3 * hidden) + linear(hidden, hidden)
    mlp = linear(hidden, 4 * hidden) + linear(4 * hidden, hidden)
    embeddings: Shapes = [(vocabulary, hidden), (context, hidden)]
    return embeddings + layers * (norm + attention + norm + mlp) + norm


def llama_7b() -> Shapes:
    """Llama with 7B parameters (arXiv:2302.13971): no biases, gated MLP, output head untied."""
    layers, hidden, intermediate, vocabulary = 32, 4096, 11008, 32000
    attention: Shapes = [(hidden, hidden)] * 4
    mlp: Shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    embedding: Shapes = [(vocabulary, hidden)]
    norm: Shapes = [(hidden,)]
    return embedding + layers * (attention + mlp + 2 * norm) + norm + embedding  # the last: output


def moe_10k() -> Shapes:
    """One rank's share of SmallThinker-21B-A3B (arXiv:2507.20984) under FSDP over 32 ranks.

    9,984 of its tensors are those of experts: 52 layers of 64 experts with gate, up and down. The
    whole model, 21.5 billion parameters, takes 258 GB for parameters, gradients and momentum in
    float32. FSDP cuts each tensor along its first dimension, so that each rank steps all 10,351
    tensors, of a 32nd of the elements each: 8.1 GB, and 10.8 GB with an average.
    """
    layers, hidden, intermediate, experts, vocabulary, ranks = 52, 2560, 768, 64, 151936, 32
    queries, keys = 28 * 128, 4 * 128  # heads of 128
    expert: Shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    attention: Shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    norm: Shapes = [(hidden,)]
    layer = norm + attention + norm + [(experts, hidden)] + experts * expert
    embedding: Shapes = [(vocabulary, hidden)]
    whole = embedding + layers * layer + norm + embedding  # the last: output
    return [(rows // ranks, *rest) for rows, *rest in whole]


def small_500() -> Shapes:
    """500 tensors of 256 elements: launches and Python cost more than memory."""
    return [(256,)] * 500


def one_2_31() -> Shapes:
    """One tensor whose elements no 32-bit index reaches: 26 GB for SGD in float32."""
    return [(2**31,)]


def tiny() -> Shapes:
    """What the tests run: sizes around those of vectors."""
    return [(3,), (5, 7), (), (64,), (1000,)]


SHAPES: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "vit-b16": vit_b16,
    "gpt2": gpt2,
    "llama-7b": llama_7b,
    "moe-10k": moe_10k,
    "small-500": small_500,
    "one-2^31": one_2_31,
    "tiny": tiny,
}

# ---- Sweeps --------------------------------------------------------------------------------------

SWEEPS = {
    "sweep-size": [f"size-2^{power}" for power in range(12, 27, 2)],
    "sweep-count": [f"count-{number}" for number in (1, 10, 100, 1000, 10_000)],
}
QUICK_SWEEPS = {
    "sweep-size": ["size-2^14", "size-2^18", "size-2^22", "size-2^24"],
    "sweep-count": ["count-10", "count-100", "count-1000"],
}


def load(name: str) -> Shapes:
    """Returns the list of that name, of a sweep too: one tensor of so many, or so many of one."""
    if size := re.fullmatch(r"size-2\^(\d+)", name):
        return [(2 ** int(size[1]),)]
    if number := re.fullmatch(r"count-(\d+)", name):
        return [(1,)] * int(number[1])
    return SHAPES[name]()
