"""A device beside the CPU, whose numbers lie in the CPU's memory: operands on different devices, looks at numbers
without a copy, and copies within what is recorded fail on it as they do on a GPU, and copies are counted."""

from collections import Counter

import torch
from torch.utils import backend_registration as backends
from torch.utils._python_dispatch import TorchDispatchMode

KIND = "simulated"
HERE = hasattr(backends, "_setup_privateuseone_for_python_backend")  # torch 2.13 has it, 2.9 does not

copied = Counter()  # "up" and "down", numbers of copies between the host and the device
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}  # on the device by indices on either


class There(torch.Tensor):
    """A tensor on the device. `held`: its numbers."""

    @staticmethod
    def __new__(cls, held):
        told = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(KIND, 0), **told)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})

    def __deepcopy__(self, memo):
        return There(self.held.clone())

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("a tensor of another device is copied to the host first")
        return self.detach().cpu().numpy()

    def __array__(self, *args, **kwargs):
        return self.numpy()


class Simulated(TorchDispatchMode):
    """Within, tensors can be made on the device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


def computed(operation, args, kwargs):
    """What `operation` gives, where it belongs."""
    given = []
    inner, named = _each((args, kwargs), lambda one: given.append(one) or getattr(one, "held", one))
    there = [one for one in given if isinstance(one, There)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type == KIND
    if there and operation not in COPIES:
        indexed = operation in INDEXED and isinstance(args[0], There)
        _refuse_mixed(operation, (args[0], *args[2:3]) if indexed else given)
        for index in args[1] if indexed else ():
            _count(isinstance(index, There) or index is None, True)  # it is brought there first
    out = operation(*inner, **(named if not wanted else {**named, "device": "cpu"}))
    ends_there = bool(there) if wanted is None else wanted
    if operation is aten.copy_.default:
        ends_there = isinstance(args[0], There)
        _count(isinstance(args[1], There), ends_there)
        return args[0]
    if operation is aten._local_scalar_dense.default:
        _count(bool(there), False)
    if operation is aten._to_copy.default:
        _count(bool(there), ends_there)
    if not ends_there:
        return out
    known = {id(one.held): one for one in there}  # what is written in place is the same tensor
    return _each(out, lambda one: known[id(one)] if id(one) in known else There(one))


def _each(one, change):
    """`one` with its tensors changed: torch's own `tree_map`, with which tests take twice as long."""
    if isinstance(one, torch.Tensor):
        return change(one)
    if isinstance(one, dict):
        return {name: _each(value, change) for name, value in one.items()}
    return type(one)([_each(value, change) for value in one]) if isinstance(one, tuple | list) else one


def _refuse_mixed(operation, tensors):
    """A single number may be anywhere."""
    mixed = [one for one in tensors if isinstance(one, torch.Tensor) and not isinstance(one, There) and one.ndim]
    if mixed:
        raise RuntimeError(f"{operation}: all tensors are to be on one device, {tuple(mixed[0].shape)} is not")


def _count(was_there, is_there):
    if was_there != is_there:
        copied["up" if is_there else "down"] += 1


class _Never(getattr(backends, "_DummyBackendModule", object)):
    """Nobody takes it of his own accord."""

    def is_available(self):
        return False

    def device_count(self):
        return 0

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


def _empty(size, *args, **kwargs):
    return There(torch.empty(size, dtype=kwargs.get("dtype")))


def _empty_strided(size, stride, **kwargs):
    return There(torch.empty_strided(size, stride, dtype=kwargs.get("dtype")))


def _copied_from(one, other, non_blocking=False):
    return computed(aten.copy_.default, (other, one), {})


def _register():
    """What `torch.tensor(..., device=...)` asks of a device, as no mode sees that."""
    backends._setup_privateuseone_for_python_backend(KIND, backend_module=_Never())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copied_from, "PrivateUse1")
    return library


if HERE:
    _library = _register()  # for as long as the process
