"""Corrects bfloat16 in Triton's interpreter (3.6, 3.7), which computes with its bits as if they were integers.

There a handle of type bf16 holds an array of uint16, so that `tl.dot` and arithmetic act on raw bits, and a cast from
float32 truncates. Here it holds float32 numbers that bfloat16 has: every operation of the interpreter is then right as
it is, and a handle rounds to nearest, ties to even, when it is made. Only memory and bitcasts see bits. Atomics of bf16
are still unsupported.

`tl.fma` rounds once, and so does `tl.dot`, which sums in float64: numpy's float32 product gives a row other bits at
another place of its tile, and what is tested is that the kernels do not. `tl.sum` adds in pairs along any axis, much as
a GPU does, where numpy does so along the last one only. A comparison's result has type bool here; there it keeps its
operands' type, and becomes numbers when a scalar one is broadcast.

What takes the time is done once: `triton.language` is turned to the interpreter, which each call of a device function
does there, in a millisecond; and what Triton makes of the shape of a block, for each value, is made once for a shape.
"""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_unpatched_np_dtype = interpreter._get_np_dtype
_unpatched_fits = interpreter._validate_np_data_size
_unpatched_convert_float = interpreter._convert_float
_unpatched_patch_lang = interpreter._patch_lang
_unpatched_block_type = tl.block_type.__init__
_unpatched_tensor = tl.tensor.__init__
#: By the name of a scalar type: the interpreter makes a table of all of them each time.
_np_dtypes: dict[str, np.dtype] = {}
#: What two of these types are converted to, in any operation, is the type itself.
_PROMOTED = (tl.float32, tl.int32, tl.int64)
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


class _Builder(interpreter.InterpreterBuilder):
    """The methods of the builder that read or write the bits of bf16, comparisons, `tl.fma` and `tl.dot`."""

    def binary_op(self, lhs, rhs, op):
        if op not in _COMPARISONS:
            return super().binary_op(lhs, rhs, op)
        return interpreter.TensorHandle(op(lhs.data, rhs.data), tl.int1)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    def create_fma(self, x, y, z):
        with np.errstate(invalid="ignore"):  # ∞ − ∞
            total = x.data.astype(np.float64) * y.data + z.data  # the product of float32 is exact
        return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        if not _is_bf16(ptrs.get_element_ty()):
            return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)
        fill = np.zeros(ptrs.data.shape, np.uint16) if other is None else _bits(other.data)
        bits = interpreter._interpreter.load(ptrs.data, mask.data, fill, np.dtype(np.uint16))
        return interpreter.TensorHandle(_numbers(bits), tl.bfloat16)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        if _is_bf16(value.dtype):
            value = interpreter.TensorHandle(_bits(value.data), tl.uint16)
        return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)

    def create_bitcast(self, src, dst_type):
        if _is_bf16(src.dtype):
            src = interpreter.TensorHandle(_bits(src.data), tl.uint16)
        if _is_bf16(dst_type):
            return interpreter.TensorHandle(_numbers(src.data.view(np.uint16)), tl.bfloat16)
        return super().create_bitcast(src, dst_type)

    def create_fabs(self, arg):
        return self.unary_op(arg, np.abs) if _is_bf16(arg.dtype) else super().create_fabs(arg)


class _Handle(interpreter.TensorHandle):
    """What a program computes with; one of type bf16 holds rounded float32."""

    def __post_init__(self) -> None:
        if _is_bf16(self.dtype):
            self.data = _numbers(_bits(self.data))
        super().__post_init__()


class _Semantic(type(interpreter.interpreter_semantic)):
    """Sees at once that two operands have the same shape, or type too."""

    def binary_op_type_checking_impl(self, lhs, rhs, *rules, **more_rules):
        as_they_are = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and lhs.shape is rhs.shape
        if as_they_are and lhs.dtype is rhs.dtype and lhs.dtype in _PROMOTED:
            return lhs, rhs
        return super().binary_op_type_checking_impl(lhs, rhs, *rules, **more_rules)

    def broadcast_impl_value(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else super().broadcast_impl_value(lhs, rhs)


class _Shape(NamedTuple):
    """What Triton makes of a shape: sizes and their product, as a type has them and as a tensor has them."""

    of_type: tl.tuple
    numel: int
    text: str
    of_tensor: tl.tuple
    numel_of_tensor: tl.constexpr


def correct() -> None:
    """Patch the interpreter of this process, before any kernel is defined."""
    if issubclass(interpreter.InterpreterBuilder, _Builder):
        return
    interpreter.TensorHandle = _Handle
    interpreter.InterpreterBuilder = _Builder
    interpreter._get_np_dtype = _np_dtype
    interpreter._validate_np_data_size = _fits
    interpreter._convert_float = _convert_float
    interpreter._patch_lang = _patch_lang
    interpreter.ReduceOps.sum = _sum
    interpreter.interpreter_semantic.__class__ = _Semantic
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor
    builder = interpreter.interpreter_builder
    builder.__class__ = _Builder
    # An overflow is asserted against in debug mode only. In any mode a sum of integers takes seven more operations.
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_lang(fn: object) -> object:
    _turn_language_to_interpreter()
    return interpreter._LangPatchScope()


def _sum(self: interpreter.ReduceOps, x: tl.tensor) -> tl.tensor:
    data = x.handle.data
    if self.axis is None:
        return self.to_tensor(np.sum(data, keepdims=self.keep_dims), x.dtype)
    total = np.sum(np.ascontiguousarray(np.moveaxis(data, self.axis, -1)), axis=-1)
    return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, x.dtype)


@functools.cache
def _turn_language_to_interpreter() -> None:
    _unpatched_patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


@functools.cache
def _shape(sizes: tuple[int, ...]) -> _Shape:
    """Without sizes that of a number."""
    dtype, tensor = tl.int32, object.__new__(tl.tensor)
    if sizes:
        dtype = object.__new__(tl.block_type)
        _unpatched_block_type(dtype, tl.int32, list(sizes))
    _unpatched_tensor(tensor, None, dtype)
    return _Shape(tl.tuple(sizes), dtype.numel if sizes else 1, str(tl.tuple(sizes)), tensor.shape, tensor.numel)


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = shape.value if isinstance(shape, tl.constexpr) else shape
    found = _shape(tuple(x.value if isinstance(x, tl.constexpr) else x for x in sizes))
    self.element_ty, self.shape, self.numel = element_ty, found.of_type, found.numel
    self.name, self.made = f"<{found.text}, {element_ty}>", found


def _init_tensor(self: tl.tensor, handle: interpreter.TensorHandle, type: tl.dtype) -> None:
    made = type.made if type.is_block() else _shape(())
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = made.of_tensor, made.numel_of_tensor


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar.name == tl.bfloat16.name  # what `==` compares, in a tenth of the time


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    name = "pointer" if dtype.scalar.is_ptr() else dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = np.dtype(np.float32) if _is_bf16(dtype) else _unpatched_np_dtype(dtype)
    return _np_dtypes[name]


def _fits(array: np.ndarray, dtype: tl.dtype) -> bool:
    return (_is_bf16(dtype) and array.dtype == np.float32) or _unpatched_fits(array, dtype)


def _convert_float(array: np.ndarray, source: tl.dtype, destination: tl.dtype, rounding_mode: object) -> np.ndarray:
    if _is_bf16(source) or _is_bf16(destination):
        return array.astype(_np_dtype(destination))
    return _unpatched_convert_float(array, source, destination, rounding_mode)


def _bits(numbers: np.ndarray) -> np.ndarray:
    """bf16 bits of numbers, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded).reshape(numbers.shape)


def _numbers(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
