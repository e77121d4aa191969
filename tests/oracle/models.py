"""Shapes of the gradients of models: the benches use them whole, the tests cut small."""

from __future__ import annotations

Shape = tuple[int, ...]


def lstm(vocabulary: int, hidden: int, layers: int = 2) -> list[Shape]:
    """Return the shapes of an LSTM language model, TensorFlow's ptb_word_lm."""
    cells = [shape for _ in range(layers) for shape in ((2 * hidden, 4 * hidden), (4 * hidden,))]
    return [(vocabulary, hidden), *cells, (hidden, vocabulary), (vocabulary,)]


def resnet50() -> list[Shape]:
    """Return the shapes of ResNet-50 (He et al. 2015, arXiv 1512.03385, table 1)."""

    def convolution(size: int, inputs: int, outputs: int) -> list[Shape]:
        return [(size, size, inputs, outputs), (outputs,), (outputs,)]

    shapes = convolution(7, 3, 64)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(1, inputs, width)
            shapes += convolution(3, width, width)
            shapes += convolution(1, width, 4 * width)
            if block == 0:
                shapes += convolution(1, inputs, 4 * width)
            inputs = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


def gpt2() -> list[Shape]:
    """Return the shapes of GPT-2 small (Radford et al. 2019)."""
    width = 768
    block: list[Shape] = [(width,), (width,)]
    block += [(width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50_257, width), (1024, width), *(block * 12), (width,), (width,)]


MODELS: dict[str, list[Shape]] = {
    "4 small": [(64, 64), (64,), (64, 64), (10,)],
    "1000 x 256": [(256,)] * 1000,
    "PTB small": lstm(10_000, 200),
    "PTB medium": lstm(10_000, 650),
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2(),
}
