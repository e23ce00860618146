"""What a program costs: products counted in a jaxpr, collectives and buffers in XLA's own text."""

import math
import re
from typing import Any, NamedTuple

COLLECTIVES = "all-reduce all-gather reduce-scatter all-to-all collective-permute".split()


def products(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products and convolutions of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        shapes = [variable.aval.shape for variable in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            terms = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            total += _of_convolution(shapes, equation.outvars[0].aval.shape, parameters)
        for inner in parameters.values():
            inner = getattr(inner, "jaxpr", inner)
            total += _calls(name, parameters) * products(inner) if hasattr(inner, "eqns") else 0
    return total


def _calls(name: str, parameters: dict) -> int:
    """How often an operation calls the jaxpr in its parameters."""
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid)
    if name == "shard_map":  # the jaxpr is what one device computes
        return parameters["mesh"].size
    return parameters.get("length", 1)  # of a loop


def _of_convolution(shapes: list, out: tuple[int, ...], parameters: dict) -> int:
    """The products of numbers that are in the images, not in the padding or the gaps between them:
    a derivative of a convolution is one with large padding, or with gaps."""
    numbers = parameters["dimension_numbers"]
    kernel, features = shapes[1], numbers.rhs_spec[1]
    total = 2 * kernel[features] * out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    for i, axis in enumerate(numbers.out_spec[2:]):
        size, window = shapes[0][numbers.lhs_spec[2 + i]], kernel[numbers.rhs_spec[2 + i]]
        stride, (low, _) = parameters["window_strides"][i], parameters["padding"][i]
        gap, gaps = parameters["lhs_dilation"][i], parameters["rhs_dilation"][i]
        at = (o * stride - low + k * gaps for o in range(out[axis]) for k in range(window))
        total *= sum(0 <= position <= (size - 1) * gap and position % gap == 0 for position in at)
    return total


class Buffer(NamedTuple):
    """An array in a device's memory. name: of the operation that computes it, where XLA knows."""

    bytes: int
    type: str
    name: str


def size_of(types: str) -> int:
    """Bytes of the arrays in a type of HLO, such as (f32[2,3]{1,0}, bf16[4]); without padding."""
    total = 0
    for kind, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", types):
        digits = re.search(r"\d+", kind)  # bf16, s32, f8e4m3fn; none in pred, token and opaque
        bits = int(digits[0]) if digits else 8 if kind == "pred" else 0
        total += math.prod(map(int, filter(None, shape.split(",")))) * bits // 8
    return total


_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z-]+)\(")


def collectives(text: str) -> dict[str, int]:
    """{kind: bytes of the results, on each device} of the collectives in the text of a program. One
    in a loop counts once. So does one that is repeated in the text: XLA for TPUs writes a
    collective that runs beside other operations into each of these, with the same channel."""
    found, channels = dict.fromkeys(COLLECTIVES, 0), set()
    for line in text.splitlines():
        if (match := _OPERATION.match(line)) is None:
            continue
        _, types, operation = match.groups()
        kind = operation.removesuffix("-start")
        if kind in found:
            if channel := re.search(r"channel_id=\d+", line):
                if channel[0] in channels:
                    continue
                channels.add(channel[0])
            each = [size_of(one) for one in re.findall(r"[a-z]\w*\[[\d,]*\]", types)]
            # The result of a start holds the operands too, which are no larger.
            pairs = operation != kind and kind != "all-reduce"
            found[kind] += max(each) if pairs else sum(each)
    return {kind: size for kind, size in found.items() if size}


def largest_buffers(text: str, count: int = 5) -> list[Buffer]:
    """The largest arrays that the entry computation of a program computes in a device's memory."""
    entry = re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
    found = []
    for line in entry[0].splitlines() if entry else ():
        match = _OPERATION.match(line)
        no_copy = ("parameter", "bitcast", "get-tuple-element", "tuple", "copy-done")
        if match is None or match[3] in no_copy:
            continue
        for one in re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", match[2]):
            if "S(" not in one:  # in another memory, such as that of the compute unit
                name = re.search(r'op_name="([^"]*)"', line)
                said = name[1] if name else match[3]
                found.append(Buffer(size_of(one), one.partition("{")[0], said))
    return sorted(found, reverse=True)[:count]
