"""Where to cut a model in stages that fit in memory (see `onnxc.stages`).

What a stage of weights w takes, with f the tensors that follow from its constants alone (a weight
that is stored in integers and made float again), is

    w + Σ f + max f        where the session folds them, once, when it is opened,
    w + those f that other nodes read        where it computes them in every run,

and the second is for a stage that does not fit otherwise; weights that an operator keeps a packed
copy of beside the mapped one count twice. Like a weight, f belongs to no stage: it
is made in each one that reads it. No cut crosses a tensor that NumPy cannot hold (a sequence, a
string). A weight larger than the memory allowed is in a stage of its own. The plan depends on
shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto

from onnxc import weights
from onnxc.normal import graphs, nested_reads

BASE = 180 << 20  # bytes of Python with the libraries, before any model
SPARE = 48 << 20  # and what ONNX Runtime and the allocator take besides
LIGHT = 1 << 20  # bytes of weights that no cut is made for
ARENA = 1.5  # bytes that ONNX Runtime's arena takes for a byte of activations
PACKED = frozenset(("MatMulNBits",))  # operators that keep both, and that need the packed one
RANDOM = ("Random", "Multinomial", "Bernoulli", "Dropout")
CROSSING = frozenset(  # element types that may cross from one stage to the next
    (
        *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BOOL),
        *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
        *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
    )
)

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Stage:
    """Some nodes of a model. reads: what comes in: inputs, and tensors of earlier stages.

    gives: what later stages read. outputs: what was asked for. bytes: that it takes, but for
    activations, 0 where that does not matter. folds: whether the session computes what follows from
    constants when it opens. packs: whether an operator needs its weights packed, even for one run.
    """

    nodes: tuple[int, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int
    folds: bool = True
    packs: bool = False


def plan(facts: Facts, memory: int | None, taps: int = 0) -> tuple[Stage, ...]:
    """Cut a model so that no stage takes the process above `memory` bytes, where that can be.

    memory: None for no bound. taps: bytes that the caller keeps besides.
    """
    if memory is None:
        return (facts.everything(),)
    room = memory - BASE - SPARE - taps - int(ARENA * facts.live())
    return tuple(facts.stages(_cuts(facts, room), room))


class Facts:
    """What the plan is made from: who makes and reads what, and how many bytes it takes."""

    def __init__(self, proto: ModelProto, outputs: Sequence[str], feed: Feed | None) -> None:
        self.proto, self.outputs, self.feed = proto, tuple(outputs), feed
        self.nodes = proto.graph.node
        self.ports = {value.name for value in proto.graph.input}
        self.twice: set[str] = set()

    @cached_property
    def reads(self) -> list[set[str]]:
        """What each node reads, its bodies included."""
        return [nested_reads(node) for node in self.nodes]

    @cached_property
    def maker(self) -> dict[str, int]:
        return {name: i for i, node in enumerate(self.nodes) for name in node.output if name}

    @cached_property
    def types(self) -> dict[str, ValueInfoProto]:
        return _types(self.proto, self.feed)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of tensors, where they are known."""
        return {n: size for n, v in self.types.items() if (size := _bytes(v))}

    @cached_property
    def stored(self) -> dict[str, int]:
        """Bytes of weights."""
        found = {t.name: _stored(t) for t in self.proto.graph.initializer}
        for index, node in enumerate(self.nodes):
            bodies = [g for a in node.attribute if a.HasField("g") for _, g in graphs(a.g)]
            if bodies:
                found[_inside(index)] = sum(_stored(t) for g in bodies for t in g.initializer)
        return found

    @cached_property
    def order(self) -> list[int]:
        return [i for i in self.needed if i not in self.fixed]

    @cached_property
    def always(self) -> set[int]:
        """Fixed nodes of the first stage, for the outputs."""
        return self._closure(self.outputs)

    @cached_property
    def birth(self) -> dict[str, int]:
        """Positions in the order where tensors are made."""
        return {n: p for p, i in enumerate(self.order) for n in self.nodes[i].output if n}

    @cached_property
    def last(self) -> dict[str, int]:
        """Positions in the order where they are read last."""
        made = self.birth
        return {n: p for p, i in enumerate(self.order) for n in self.reads[i] if n in made}

    @cached_property
    def needed(self) -> list[int]:
        """Nodes that the outputs need, in order."""
        wanted, kept = set(self.outputs), []
        for index in range(len(self.reads) - 1, -1, -1):
            if not wanted.isdisjoint(self.nodes[index].output):
                kept.append(index)
                wanted |= self.reads[index]
        return kept[::-1]

    @cached_property
    def fixed(self) -> set[int]:
        """Nodes that follow from constants alone; what they make is like a weight."""
        fixed: set[int] = set()
        for index in self.needed:
            given = self.reads[index]
            known = all(n in self.stored or self.maker.get(n, -1) in fixed for n in given)
            if known and given and not self.nodes[index].op_type.startswith(RANDOM):
                fixed.add(index)
        return fixed

    def _closure(self, names: Iterable[str]) -> set[int]:
        """Fixed nodes that make these tensors, directly or not."""
        found: set[int] = set()
        pending = list(names)
        while pending:
            index = self.maker.get(pending.pop(), -1)
            if index in self.fixed and index not in found:
                found.add(index)
                pending += self.reads[index]
        return found

    def constants(self, index: int) -> tuple[set[str], set[int]]:
        """The weights and the fixed nodes that a node needs."""
        fixed = self._closure(self.reads[index])
        read = self.reads[index].union(*(self.reads[i] for i in fixed))
        if self.nodes[index].op_type in PACKED:
            self.twice |= read & self.stored.keys()
        return {n for n in (*read, _inside(index)) if n in self.stored}, fixed

    def cost(self, stored: Iterable[str], fixed: Iterable[int]) -> int:
        """Bytes of weights, and of what a session folds them into."""
        made = [self.sizes.get(name, 0) for i in fixed for name in self.nodes[i].output]
        kept = sum(self.stored[n] * (1 + (n in self.twice)) for n in stored)
        return kept + sum(made) + max(made, default=0)

    def live(self) -> int:
        """Largest sum of activations that are alive at once."""
        change = [0] * (len(self.order) + 1)
        for name, position in self.birth.items():
            change[position] += self.sizes.get(name, 0)
            change[self.last.get(name, position) + 1] -= self.sizes.get(name, 0)
        return max(accumulate(change))

    def whole(self) -> int:
        """Bytes that a process takes with the model in one session."""
        stored, fixed = _union(map(self.constants, self.order))
        return BASE + self.cost(stored, fixed | self.always) + int(ARENA * self.live())

    def leaving(self) -> int:
        """Bytes of the outputs of one batch."""
        return sum(self.sizes.get(name, 0) for name in self.outputs)

    def crossing(self, position: int) -> list[str]:
        """What nodes of the order before a position make for those from it on."""
        last = self.last.items()
        return [name for name, end in last if self.birth[name] < position <= end]

    def may_cross(self, name: str) -> bool:
        """Whether NumPy can hold it; a type that is not known is taken for a tensor of numbers."""
        value = self.types.get(name)
        if value is None or not value.type.WhichOneof("value"):
            return True
        return value.type.tensor_type.elem_type in CROSSING

    def everything(self) -> Stage:
        """One stage, whatever it takes."""
        read = set(self.outputs).union(*(self.reads[i] for i in self.needed))
        nodes, reads = tuple(self.needed), tuple(sorted(read & self.ports))
        packs = any(self.nodes[i].op_type in PACKED for i in nodes)
        return Stage(nodes, reads, (), self.outputs, 0, packs=packs)

    def stages(self, cuts: Sequence[int], room: int | None = None) -> Iterator[Stage]:
        """Stages of the order between cuts."""
        for start, stop in pairwise((0, *cuts, len(self.order))):
            stored, fixed = _union(map(self.constants, self.order[start:stop]))
            fixed |= set() if start else self.always
            yield self._stage(start, stop, fixed, self.cost(stored, fixed), room)

    def _stage(self, start: int, stop: int, fixed: set[int], size: int, room: int | None) -> Stage:
        nodes = sorted({*self.order[start:stop], *fixed})
        made = {n for i in nodes for n in self.nodes[i].output if n}
        wanted = set().union(*(self.reads[i] for i in nodes)) - made
        if not start:
            wanted |= self.ports.intersection(self.outputs)
        reads = sorted(n for n in wanted if n in self.birth or n in self.ports)
        own = {n for n in made if start <= self.birth.get(n, -1) < stop}
        gives = sorted(n for n in own if self.last.get(n, -1) >= stop)
        first = {n for n in self.outputs if n not in self.birth} if not start else set()
        outputs = tuple(n for n in self.outputs if n in own or n in first)
        folds = room is None or size <= room
        packs = any(self.nodes[i].op_type in PACKED for i in nodes)
        return Stage(tuple(nodes), tuple(reads), tuple(gives), outputs, size, folds, packs)


def _cuts(facts: Facts, room: int) -> list[int]:
    """Positions in the order of nodes, as few as the room allows.

    Where a node does not fit any more, the cut goes before it, behind the last node with a weight
    of note: of these places, which cost the same, to the one that the fewest bytes cross.
    """
    cuts: list[int] = []
    start, heavy, mark = 0, 0, 0  # the last node of note, and the bytes of the stage up to it
    needs = [facts.constants(index) for index in facts.order]
    stored, fixed = set[str](), set(facts.always)
    for position, more in enumerate(needs):
        size = facts.cost(stored | more[0], fixed | more[1])
        if room < size > mark + LIGHT and position > start:
            cut = _best_cut(facts, range(heavy + 1, position + 1))
            if cut is not None:
                cuts.append(cut)
                start, mark, stored, fixed = cut, -LIGHT - 1, set(), set()
                more = _union(needs[cut : position + 1])
                size = facts.cost(*more)
        if size > mark + LIGHT:
            heavy, mark = position, size
        stored, fixed = stored | more[0], fixed | more[1]
    return cuts


def _union(needs: Iterable[tuple[set[str], set[int]]]) -> tuple[set[str], set[int]]:
    stored, fixed = set[str](), set[int]()
    for more in needs:
        stored |= more[0]
        fixed |= more[1]
    return stored, fixed


def _best_cut(facts: Facts, positions: Iterable[int]) -> int | None:
    """Of some positions the one that the fewest bytes cross, the latest of equals, if any."""
    sizes = {}
    for position in positions:
        names = facts.crossing(position)
        if all(map(facts.may_cross, names)):
            sizes[position] = sum(facts.sizes.get(n, 0) for n in names), -position
    return min(sizes, key=sizes.__getitem__, default=None)


def _types(proto: ModelProto, feed: Feed | None) -> dict[str, ValueInfoProto]:
    """Types of tensors by inference, with the sizes of the feed in place of free dimensions."""
    shaped = ModelProto()
    shaped.CopyFrom(proto)
    for port in shaped.graph.input:
        if feed is not None and port.name in feed:
            _set_shape(port, feed[port.name].shape)
    for value in shaped.graph.output:
        value.type.tensor_type.ClearField("shape")
    del shaped.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(shaped, data_prop=True)
    except (RuntimeError, ValueError, TypeError, onnx.shape_inference.InferenceError):
        inferred = shaped
    listed = (*proto.graph.value_info, *proto.graph.output, *inferred.graph.value_info)
    return {v.name: v for v in (*listed, *inferred.graph.output)}


def _set_shape(port: ValueInfoProto, shape: Sequence[int]) -> None:
    port.type.tensor_type.ClearField("shape")
    for size in shape:
        port.type.tensor_type.shape.dim.add(dim_value=size)


def _bytes(value: ValueInfoProto) -> int:
    """Bytes of a tensor, 0 where its type or shape is not known."""
    kind = value.type.tensor_type
    dims = kind.shape.dim
    if not kind.elem_type or not kind.HasField("shape"):
        return 0
    if not all(d.HasField("dim_value") for d in dims):
        return 0
    stand_in = TensorProto(data_type=kind.elem_type, dims=[d.dim_value for d in dims])
    return _stored(stand_in)


def _inside(index: int) -> str:
    """A name for all weights in the bodies of a node."""
    return f"bodies of node {index}"


def _stored(tensor: TensorProto) -> int:
    """Bytes of a tensor in a file; texts count as none."""
    return 0 if tensor.data_type == TensorProto.STRING else weights.stored_bytes(tensor)
