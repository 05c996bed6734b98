"""Models that something is wrong with: fields of valid ones changed at random, by the descriptors.

Names are taken from the same model, so that cycles, duplicates and dangling references come about;
numbers from what programs trip over; messages are dropped, doubled, swapped and put elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.parser
from google.protobuf.descriptor import FieldDescriptor

MOST = 4  # changes of a model
DEEPEST = 12  # messages in messages that are changed
NUMBERS = (0, 1, 2, 3, 5, 7, 16, 255, 1 << 16, (1 << 31) - 1, -1, -2, 1 << 40, (1 << 62) + 1)
NARROW = (1 << 31) - 1
FLOATS = (0.0, -0.0, 1e-42, 1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "nowhere", "..", "../secret.bin", "/etc/hostname", "w.bin", "9" * 5000, "\u00b2", "-4")
BYTES = (b"", b"\xff\xfe", b"\0" * 7, b"\x7f" * 64)

_WIDE = frozenset((FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64))
_UNSIGNED = frozenset((FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_UINT32))
_REAL = frozenset((FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE))

TEXT_MODELS = {
    "convolution": """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,2,6,6] x) => (float[N,3] y)
        <float[4,2,3,3] W, float[4] B, float[4,1,3,3] D, float[4,3] F,
         float[4] s, float[4] b, float[4] m, float[4] v> {
            c = Conv <pads: ints = [1,1,1,1]> (x, W, B)
            n = BatchNormalization (c, s, b, m, v)
            r = Relu (n)
            d = Conv <group: int = 4> (r, D)
            p = GlobalAveragePool (d)
            f = Flatten (p)
            i = Identity (f)
            y = MatMul (i, F) }""",
    "body": """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x, bool c) => (float[N,4] y) <float[4,4] W> {
            a = MatMul (x, W)
            t = If (c) <then_branch = p () => (float[N,4] u) { k = MatMul (a, W) u = Identity (k) },
                        else_branch = q () => (float[N,4] w) { w = Neg (a) }>
            y = Relu (t) }""",
    "loop": """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,4] x, int64 n) => (float[2,4] y) <float[4,4] W, bool go = {1}> {
            y = Loop (n, go, x) <body = b (int64 i, bool c, float[2,4] h) =>
                (bool k, float[2,4] o) { k = Identity (c) o = MatMul (h, W) }> }""",
    "shapes": """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,6] x) => (float[N,3] y) <float[3,4] W, int64[2] o = {-1, 4}, float[1] e = {1}> {
            t = Transpose <perm: ints = [1, 0]> (W)
            k = Add (t, e)
            r = Reshape (x, o)
            f = MatMul (r, k)
            q = Shape (f)
            d = ConstantOfShape <value = float[1] {0.5}> (q)
            y = Add (f, d) }""",
    "gates": """<ir_version: 8, opset_import: ["" : 17]>
        g (float[5,N,4] x) => (float[5,1,N,3] y) <float[1,12,4] W, float[1,12,3] R> {
            y, h, c = LSTM <hidden_size: int = 3> (x, W, R) }""",
    "table": """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N,T] t) => (float[N,T,3] y) <float[11,8] E, float[8] s, float[8] b, float[8,3] F> {
            x = Gather (E, t)
            l = LayerNormalization (x, s, b)
            y = MatMul (l, F) }""",
    "function": """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N,4] x) => (float[N,4] y) <float[4,4] W> { h = own.twice (x, W) y = Tanh (h) }
        <domain: "own", opset_import: ["" : 17]>
        twice (a, w) => (d) { b = MatMul (a, w) d = MatMul (b, w) }""",
}
EXTERNAL = "external"
NAMES = (*sorted(TEXT_MODELS), EXTERNAL)


@cache
def _parsed(name: str) -> bytes:
    model = onnx.parser.parse_model(TEXT_MODELS[name])
    given = {tensor.name for tensor in model.graph.initializer}
    draw = np.random.default_rng(0)
    for info in list(model.graph.value_info):
        if info.name not in given and info.type.tensor_type.HasField("shape"):
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            if 0 not in shape:
                array = 0.1 + draw.random(shape, np.float32)
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    data: bytes = model.SerializeToString()
    return data


def external(name: str = "w.bin") -> onnx.ModelProto:
    """A valid model whose weight lies in 64 bytes of a file beside it, from its 64th byte on."""
    model = onnx.ModelProto.FromString(_parsed("body"))
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", "64"), ("length", "64")):
            tensor.external_data.add(key=key, value=value)
    return model


def sound(name: str) -> onnx.ModelProto:
    """A valid model of this name."""
    if name == EXTERNAL:
        return external()
    return onnx.ModelProto.FromString(_parsed(name))


def mutate(model: onnx.ModelProto, draw: random.Random) -> None:
    """Change a model in up to MOST places."""
    for _ in range(draw.randint(1, MOST)):
        places = list(_places(model, 0))
        message = draw.choice(places)
        draw.choice(CHANGES)(message, places, draw)


def mutant(seed: int, name: str | None = None) -> onnx.ModelProto:
    """One model, changed; the same for the same seed."""
    draw = random.Random(seed)
    model = sound(name or draw.choice(NAMES))
    mutate(model, draw)
    return model


def _places(message: Any, depth: int) -> Iterator[Any]:
    yield message
    if depth == DEEPEST:
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in value if hasattr(value, "extend") else (value,):
            yield from _places(inner, depth + 1)


def _drop(message: Any, places: list[Any], draw: random.Random) -> None:
    """A field, or one of its elements."""
    fields = [field for field, _ in message.ListFields()]
    if not fields:
        return
    value = getattr(message, name := draw.choice(fields).name)
    if hasattr(value, "extend") and draw.random() < 0.8:
        del value[draw.randrange(len(value))]
    else:
        message.ClearField(name)


def _double(message: Any, places: list[Any], draw: random.Random) -> None:
    """An element, at the end of its list."""
    lists = [value for _, value in message.ListFields() if hasattr(value, "extend") and value]
    if lists:
        value = draw.choice(lists)
        value.extend([value[draw.randrange(len(value))]])


def _swap(message: Any, places: list[Any], draw: random.Random) -> None:
    """Two elements of a list."""
    lists = [value for _, value in message.ListFields() if hasattr(value, "extend")]
    longer = [value for value in lists if len(value) > 1]
    if longer:
        value = draw.choice(longer)
        items = [item if not hasattr(item, "CopyFrom") else _copy(item) for item in value]
        i, j = draw.sample(range(len(items)), 2)
        items[i], items[j] = items[j], items[i]
        del value[:]
        value.extend(items)


def _move(message: Any, places: list[Any], draw: random.Random) -> None:
    """The content of another message of the kind."""
    others = [m for m in places if m.DESCRIPTOR is message.DESCRIPTOR and m is not message]
    if others:
        message.CopyFrom(_copy(draw.choice(others)))


def _rename(message: Any, places: list[Any], draw: random.Random) -> None:
    """A text, to another one of the model or to a bad one."""
    known = [text for place in places for text in _texts(place)]
    _set(message, draw, (FieldDescriptor.TYPE_STRING,), [*known, *TEXTS])


def _renumber(message: Any, places: list[Any], draw: random.Random) -> None:
    """A number, an element type, or bytes."""
    fields = list(message.DESCRIPTOR.fields)
    draw.shuffle(fields)
    for field in fields:
        if values := _values(field, draw):
            _put(message, field, draw.choice(values), draw)
            return


def _values(field: FieldDescriptor, draw: random.Random) -> list[Any]:
    if field.message_type is not None or field.type == FieldDescriptor.TYPE_STRING:
        return []
    if field.enum_type is not None:
        return [value.number for value in field.enum_type.values]
    if field.type == FieldDescriptor.TYPE_BYTES:
        return list(BYTES)
    if field.type in _REAL:
        return list(FLOATS)
    wide = [n for n in NUMBERS if field.type in _WIDE or abs(n) <= NARROW]
    return [n for n in (*wide, draw.randint(0, 40)) if n >= 0 or field.type not in _UNSIGNED]


def _set(message: Any, draw: random.Random, kinds: tuple[int, ...], values: list[Any]) -> None:
    fields = [f for f, _ in message.ListFields() if f.type in kinds]
    if fields:
        _put(message, draw.choice(fields), draw.choice(values), draw)


def _put(message: Any, field: FieldDescriptor, value: Any, draw: random.Random) -> None:
    held = getattr(message, field.name)
    if not hasattr(held, "extend"):
        setattr(message, field.name, value)
    elif held and draw.random() < 0.8:
        held[draw.randrange(len(held))] = value
    else:
        held.append(value)


def _texts(message: Any) -> Iterator[str]:
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            yield from (value if hasattr(value, "extend") else (value,))


def _copy(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


CHANGES: tuple[Callable[[Any, list[Any], random.Random], None], ...] = (
    *(_drop, _double, _swap, _move),
    *(_rename, _rename, _renumber, _renumber),
)
