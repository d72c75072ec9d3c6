"""The lists of parameter shapes that the benchmarks run on, generated from the architectures."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

Shape = tuple[int, ...]
Shapes = list[Shape]


def count(shapes: Shapes) -> int:
    """Returns the number of parameters in the list."""
    return sum(prod(shape) for shape in shapes)


def small() -> Shapes:
    """500 tensors of 256 elements: launches and Python cost more than memory."""
    return [(256,)] * 500


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


def llama7b() -> Shapes:
    """Llama with 7B parameters (arXiv:2302.13971): no biases, gated MLP, output head untied."""
    layers, hidden, intermediate, vocabulary = 32, 4096, 11008, 32000
    attention: Shapes = [(hidden, hidden)] * 4
    mlp: Shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    embedding: Shapes = [(vocabulary, hidden)]
    norm: Shapes = [(hidden,)]
    return embedding + layers * (attention + mlp + 2 * norm) + norm + embedding  # the last: output


SHAPES: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "gpt2": gpt2,
    "small": small,
    "llama7b": llama7b,
}

# Number of tensors and of parameters, as the published models have them.
EXPECTED = {
    "resnet50": (161, 25_557_032),
    "gpt2": (148, 124_439_808),
    "small": (500, 128_000),
    "llama7b": (291, 6_738_415_616),
}


def load(name: str) -> Shapes:
    """Returns the list of that name, checked against the counts of the published model."""
    shapes = SHAPES[name]()
    assert (len(shapes), count(shapes)) == EXPECTED[name], f"{name}: {len(shapes)}, {count(shapes)}"
    return shapes
