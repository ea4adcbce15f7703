"""A pickle reader that builds data and runs nothing.

It interprets the stream itself instead of restricting Python's unpickler: there a class or
function that is merely let through can be modified by later opcodes, and the memo can be made
to allocate gigabytes by one opcode. Here a name in the stream is looked up in a table the caller
gives, and only the table's own constructors are ever called.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusekit.errors import CheckpointError

MAX_PICKLE_BYTES = 1 << 26
MAX_OPCODES = 10_000_000


@dataclass(frozen=True, slots=True)
class Constructor:
    """A name that a pickle may call, with our function that builds the value."""

    name: str
    build: Callable[..., Any]


class Stateful(dict[Any, Any]):
    """A dict built by a constructor; attributes that the pickle sets on it are dropped."""


_MARK = object()
_KEY_TYPES = (str, int, bool, type(None))

_CONSTANTS: dict[int, Callable[[], Any]] = {
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
    ord("]"): list,
    ord("}"): dict,
    ord(")"): tuple,
    0x8F: set,
}
_NUMBERS: dict[int, struct.Struct] = {
    ord("J"): struct.Struct("<i"),
    ord("K"): struct.Struct("<B"),
    ord("M"): struct.Struct("<H"),
    ord("G"): struct.Struct(">d"),
}
_LENGTHS: dict[int, struct.Struct] = {
    0x8A: struct.Struct("<B"),  # LONG1
    0x8B: struct.Struct("<i"),  # LONG4
    0x8C: struct.Struct("<B"),  # SHORT_BINUNICODE
    ord("X"): struct.Struct("<I"),
    0x8D: struct.Struct("<Q"),
    ord("C"): struct.Struct("<B"),  # SHORT_BINBYTES
    ord("B"): struct.Struct("<I"),
    0x8E: struct.Struct("<Q"),
    ord("U"): struct.Struct("<B"),  # SHORT_BINSTRING
    ord("T"): struct.Struct("<i"),
}
_DECODERS: dict[int, Callable[[bytes], Any]] = {
    code: decode
    for codes, decode in (
        (b"\x8a\x8b", lambda raw: int.from_bytes(raw, "little", signed=True)),
        (b"\x8cX\x8d", lambda raw: raw.decode("utf-8", "surrogatepass")),
        (b"CB\x8e", bytes),
        (b"UT", lambda raw: raw.decode("latin-1")),
    )
    for code in codes
}
_MEMO_INDEX: dict[int, struct.Struct] = {
    ord("q"): struct.Struct("<B"),
    ord("r"): struct.Struct("<I"),
    ord("h"): struct.Struct("<B"),
    ord("j"): struct.Struct("<I"),
}
_OBJECTS = {
    ord("i"): "INST",
    ord("o"): "OBJ",
    0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
}


def load_pickle(
    raw: bytes, label: str, names: Mapping[str, Any], persistent: Callable[[Any], Any]
) -> Any:
    """The value a pickle (protocol 2 to 5) describes.

    Args:
        raw: the pickle.
        label: what error messages call it.
        names: what `module.name` in the pickle stands for: a `Constructor`, or plain data.
        persistent: turns a persistent id into a value; raises `ValueError` for a bad one.

    Raises:
        CheckpointError: a name that is not in `names` (quoted), an attempt to create or change any
            other object, keys that are not plain, a malformed or oversized pickle.
    """
    if len(raw) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{label}: a pickle of {len(raw)} bytes, expected at most {MAX_PICKLE_BYTES}"
        )
    return _Reader(raw, label, names, persistent).run()


class _Reader:
    def __init__(
        self, raw: bytes, label: str, names: Mapping[str, Any], persistent: Callable[[Any], Any]
    ) -> None:
        self._raw = raw
        self._at = 0
        self._label = label
        self._names = names
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[int, Callable[[], Any]] = {
            0x80: self._protocol,
            0x95: lambda: self._skip(8),  # FRAME
            ord("("): lambda: self._stack.append(_MARK),
            ord("0"): self._pop,
            ord("1"): self._to_mark,
            ord("2"): self._duplicate,
            ord("t"): lambda: self._stack.append(tuple(self._to_mark())),
            0x85: lambda: self._tuple(1),
            0x86: lambda: self._tuple(2),
            0x87: lambda: self._tuple(3),
            ord("l"): lambda: self._stack.append(self._to_mark()),
            ord("d"): lambda: self._stack.append(self._pairs(self._to_mark())),
            0x91: lambda: self._stack.append(frozenset(self._keys(self._to_mark()))),
            ord("a"): lambda: self._extend([self._pop()]),
            ord("e"): lambda: self._extend(self._to_mark()),
            ord("s"): self._set_item,
            ord("u"): lambda: self._update(self._to_mark()),
            0x90: self._add_items,
            0x94: lambda: self._remember(len(self._memo)),
            ord("c"): self._global,
            0x93: self._stack_global,
            ord("R"): self._reduce,
            ord("b"): self._build,
            ord("Q"): self._persistent_value,
        }

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            code = self._take(1)[0]
            if code == ord("."):
                return self._pop()
            self._step(code)
        raise self._error(f"more than {MAX_OPCODES} operations")

    def _step(self, code: int) -> None:
        if step := self._steps.get(code):
            step()
        elif make := _CONSTANTS.get(code):
            self._stack.append(make())
        elif number := _NUMBERS.get(code):
            self._stack.append(self._number(number))
        elif length := _LENGTHS.get(code):
            self._stack.append(self._decoded(code, self._number(length)))
        elif index := _MEMO_INDEX.get(code):
            self._memo_step(code, self._number(index))
        elif code in _OBJECTS:
            raise self._refusal(_OBJECTS[code])
        else:
            raise self._error(f"unsupported pickle operation {bytes([code])!r}")

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._label}: {problem} (at byte {self._at} of the pickle)")

    def _refusal(self, operation: str) -> CheckpointError:
        return self._error(f"refused: the pickle creates objects ({operation})")

    def _take(self, count: int) -> bytes:
        if count < 0 or self._at + count > len(self._raw):
            raise self._error("the pickle is cut short or damaged")
        taken = self._raw[self._at : self._at + count]
        self._at += count
        return taken

    def _skip(self, count: int) -> None:
        self._take(count)

    def _line(self) -> str:
        end = self._raw.find(b"\n", self._at)
        if end < 0:
            raise self._error("the pickle is cut short or damaged")
        line = self._take(end - self._at)
        self._skip(1)
        return line.decode("utf-8", "backslashreplace")

    def _number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self._take(layout.size))[0]

    def _decoded(self, code: int, length: int) -> Any:
        try:
            return _DECODERS[code](self._take(length))
        except UnicodeDecodeError:
            raise self._error("a text in the pickle is not UTF-8") from None

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._error("the pickle is damaged: nothing on the stack")
        return self._stack.pop()

    def _top(self, kind: type | tuple[type, ...], operation: str) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            found = type(self._stack[-1]).__name__ if self._stack else "nothing"
            raise self._error(f"refused: the pickle applies {operation} to {found}")
        return self._stack[-1]

    def _to_mark(self) -> list[Any]:
        for position in range(len(self._stack) - 1, -1, -1):
            if self._stack[position] is _MARK:
                taken = self._stack[position + 1 :]
                del self._stack[position:]
                return taken
        raise self._error("the pickle is damaged: no mark on the stack")

    def _protocol(self) -> None:
        version = self._take(1)[0]
        if not 2 <= version <= 5:
            raise self._error(f"pickle protocol {version}, expected 2 to 5")

    def _duplicate(self) -> None:
        value = self._pop()
        self._stack += [value, value]

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _keys(self, keys: list[Any]) -> list[Any]:
        for key in keys:
            if type(key) not in _KEY_TYPES:
                raise self._error(
                    f"a key of type {type(key).__name__}, expected a text, a number or None"
                )
        return keys

    def _pairs(self, items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise self._error("the pickle is damaged: a key without a value")
        return dict(zip(self._keys(items[::2]), items[1::2], strict=True))

    def _extend(self, items: list[Any]) -> None:
        self._top(list, "APPEND").extend(items)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _update(self, items: list[Any]) -> None:
        self._top(dict, "SETITEM").update(self._pairs(items))

    def _add_items(self) -> None:
        items = self._keys(self._to_mark())
        self._top(set, "ADDITEMS").update(items)

    def _memo_step(self, code: int, index: int) -> None:
        if code in b"qr":
            self._remember(index)
        elif index in self._memo:
            self._stack.append(self._memo[index])
        else:
            raise self._error(f"the pickle is damaged: nothing remembered under {index}")

    def _remember(self, index: int) -> None:
        value = self._pop()
        self._memo[index] = value
        self._stack.append(value)

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._push_name(f"{module}.{name}")

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self._error("the pickle is damaged: a name that is not text")
        self._push_name(f"{module}.{name}")

    def _push_name(self, name: str) -> None:
        if name not in self._names:
            raise self._error(
                f"refused: the pickle wants {name[:200]!r}, which is not plain tensor data; "
                "nothing was executed"
            )
        self._stack.append(self._names[name])

    def _reduce(self) -> None:
        arguments, target = self._pop(), self._pop()
        if not isinstance(target, Constructor):
            raise self._error(f"refused: the pickle calls a {type(target).__name__}")
        if not isinstance(arguments, tuple):
            raise self._error(f"{target.name} is called without a tuple of arguments")
        try:
            self._stack.append(target.build(*arguments))
        except (TypeError, ValueError) as error:
            raise self._error(f"{target.name}: unexpected arguments: {error}") from None

    def _persistent_value(self) -> None:
        try:
            self._stack.append(self._persistent(self._pop()))
        except ValueError as error:
            raise self._error(str(error)) from None

    def _build(self) -> None:
        self._pop()
        self._top(Stateful, "BUILD")
