"""Reads the pickle of a Paddle checkpoint; nothing in the file can run.

A pickle is a program for a stack machine whose instructions may import and call anything. This
interpreter has only the instructions that dicts, text, numbers and numpy arrays need. A global is
one of a closed set of symbols, never an imported object, so there is nothing to call; neither
``pickle`` nor numpy's own unpickling takes part.
"""

import enum
import math
import pickletools
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .errors import shown

MAX_OPCODES = 1_000_000
"""The largest published network needs fewer than 100,000."""

# numpy has no bfloat16: Paddle stores its bits as uint16.
DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i4": torch.int32,
    "i8": torch.int64,
    "u2": torch.bfloat16,
}


class _Symbol(enum.Enum):
    """What a global stands for."""

    DTYPE = enum.auto()
    NDARRAY = enum.auto()
    RECONSTRUCT = enum.auto()
    FROMBUFFER = enum.auto()
    ENCODE = enum.auto()
    ORDERED_DICT = enum.auto()


# The names of numpy 1 and numpy 2. Protocol 2 writes bytes as _codecs.encode(text, "latin1"),
# protocol 5 arrays through _frombuffer.
_SYMBOLS = {
    ("numpy", "dtype"): _Symbol.DTYPE,
    ("numpy", "ndarray"): _Symbol.NDARRAY,
    ("numpy.core.multiarray", "_reconstruct"): _Symbol.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Symbol.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Symbol.FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Symbol.FROMBUFFER,
    ("_codecs", "encode"): _Symbol.ENCODE,
    ("collections", "OrderedDict"): _Symbol.ORDERED_DICT,
}

_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass
class _Array:
    """An array between its creation and the instruction that fills it."""

    tensor: Tensor | None = None


def load_arrays(data: bytes) -> Any:
    """The object that ``data`` pickles, its arrays as tensors: a dict, if it is a checkpoint.

    Raises:
        UnpicklingError: for an instruction, global or array that a checkpoint does not need.
        Exception: others for malformed data, such as IndexError for an empty stack.
    """
    result = _run(data)
    return _unwrap(result) if isinstance(result, dict) else result


def _unwrap(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tensor if isinstance(v, _Array) else v for k, v in values.items()}


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if count >= MAX_OPCODES:
            raise UnpicklingError(f"it has more than {MAX_OPCODES} instructions")
        name = opcode.name
        if name in _LITERALS:
            stack.append(value)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        else:
            match name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "EMPTY_DICT":
                    stack.append({})
                case "TUPLE":
                    stack.append(tuple(pop_to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(name[-1])
                    stack[-size:] = [tuple(stack[-size:])]
                case "SETITEM":
                    item = stack.pop()
                    _set_items(stack[-2], [stack.pop(), item])
                case "SETITEMS":
                    items = pop_to_mark()
                    _set_items(stack[-1], items)
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "GLOBAL":
                    stack.append(_symbol(*value.split(" ", 1)))
                case "STACK_GLOBAL":
                    symbol = stack.pop()
                    stack.append(_symbol(stack.pop(), symbol))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(_call(stack.pop(), arguments))
                case "BUILD":
                    state = stack.pop()
                    _build(stack[-1], state)
                case _:
                    raise UnpicklingError(f"it has the instruction {name}, which arrays never need")
    raise UnpicklingError("it ends early")


def _set_items(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    if type(target) is not dict or any(type(key) is not str for key in keys):
        raise UnpicklingError("expected dicts with text as keys")
    target.update(zip(keys, values, strict=True))


def _symbol(module: Any, name: Any) -> _Symbol:
    if type(module) is not str or type(name) is not str or (module, name) not in _SYMBOLS:
        text = shown(f"{module}.{name}") if type(module) is type(name) is str else "an odd global"
        raise UnpicklingError(f"it refers to {text}, and may hold nothing but numpy arrays")
    return _SYMBOLS[module, name]


def _call(symbol: Any, arguments: Any) -> Any:
    match symbol, arguments:
        case _Symbol.DTYPE, (str(spec), *_):
            if spec not in DTYPES:
                raise UnpicklingError(f"it holds an array of dtype {shown(spec)!r}, not of numbers")
            return DTYPES[spec]
        case _Symbol.RECONSTRUCT, (_Symbol.NDARRAY, *_):
            return _Array()
        case _Symbol.FROMBUFFER, (raw, dtype, shape, ("C" | "F") as order):
            return _Array(_to_tensor(raw, dtype, shape, order == "F"))
        case _Symbol.ENCODE, (str(text), "latin1" | "latin-1"):
            return text.encode("latin1")
        case _Symbol.ORDERED_DICT, ():
            return {}
    raise UnpicklingError("it calls something that is no array, dtype or dict")


def _build(target: Any, state: Any) -> None:
    match target, state:
        case torch.dtype(), (_, "<" | "|" | "=", *_):
            return
        case torch.dtype(), (_, ">", *_):
            raise UnpicklingError("it holds big-endian arrays, expected little-endian ones")
        case _Array(tensor=None), (_, shape, dtype, bool(fortran), raw):
            target.tensor = _to_tensor(raw, dtype, shape, fortran)
            return
    raise UnpicklingError("it sets the state of something that is no new array or dtype")


def _to_tensor(raw: Any, dtype: Any, shape: Any, fortran: bool) -> Tensor:
    if type(raw) not in (bytes, bytearray) or type(dtype) is not torch.dtype:
        raise UnpicklingError("it holds an array that is not made of numbers")
    if type(shape) is not tuple or any(type(n) is not int or n < 1 for n in shape):
        raise UnpicklingError("it holds an array without a proper shape")
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise UnpicklingError(f"it holds {len(raw)} bytes for an array of shape {shape}, {dtype}")
    flat = torch.frombuffer(bytearray(raw), dtype=dtype)
    if fortran:
        return flat.reshape(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    return flat.reshape(shape)
