"""A GPU that is not there: tensors on cuda:0 that have shapes but no numbers (FakeTensorMode),
while tensors of the CPU stay real. Whole steps of training, evaluation and sampling run on it at
any size, and what would fail on a GPU, or make it wait, is noticed. bench.py --gpu plans a run
with it."""
import ctypes
import heapq
import itertools
import traceback
import warnings
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from configurator import UserError
from device import pick_dtype

ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
# what needs a value of the device, or makes as many results as the values say
NEEDS_VALUES = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero,
                aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim,
                aten.unique_consecutive, aten.repeat_interleave}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# what reads a few places of a large tensor; what touches next to none
GATHERS = {aten.embedding, aten.gather, aten.index, aten.index_select}
FREE = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided,
        aten.scatter, aten.scatter_}


class DeviceWait(Exception):
    """The CPU needs a value that only the device has."""


class FakeMode(FakeTensorMode):
    def __deepcopy__(self, memo):                        # the copy of a model stays on the device
        return self


def tensors_in(*values):
    """The tensors among the arguments or results of an operation: by themselves, or in lists."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
    return found


def cuda_tensors(*values):
    return [t for t in tensors_in(*values) if t.is_cuda]


def num_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


class FakeCuda(TorchDispatchMode):
    """What the operations on the GPU would have taken.

    waits: the lines of code at which the CPU would have waited for the GPU.
    peak: the most bytes of tensors that were alive at one time. What the allocator loses, cuBLAS's
        workspaces and the driver's few hundred MB are not in it.
    products: (FLOPs, bytes read and written) of every matrix product and attention.
    eager: bytes that all other operations read and write, each by itself.
    fused: the same, if all operations between two products were one kernel: what they read once,
        and what is left of their results. Less than any compiler attains.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeMode()
        self.waits, self.pinned = [], WeakTensorKeyDictionary()
        self.held = {}                                   # of live storages: number, bytes
        self.numbers = itertools.count()
        self.live = 0
        self.reset()

    def reset(self):
        """Count from here on."""
        self.peak = self.live
        self.eager = self.fused = 0
        self.products = []
        self.begin_kernel()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:        # C++ asks where a tensor is
            return args[0].device
        kwargs = dict(kwargs or {})
        to_cuda = str(kwargs.get('device')).startswith(('cuda', 'meta'))
        if to_cuda:
            kwargs['device'] = torch.device('cuda:0')    # 'meta' is the stand-in guard's answer
        given = tensors_in(*args, *kwargs.values())
        if not to_cuda and not any(isinstance(t, FakeTensor) for t in given):
            return func(*args, **kwargs)                 # the CPU by itself
        self.look_for_waits(func.overloadpacket, args, kwargs, to_cuda)
        if not all(isinstance(t, FakeTensor) for t in given):
            args, kwargs = tree_map(self.to_fake, (args, kwargs))
        with self.fake:                                  # refuses operands on two devices
            result = func(*args, **kwargs)
        for t in cuda_tensors(result):
            self.hold(t.untyped_storage())
        if not func.is_view:
            self.count(func, args, kwargs, result, cuda_tensors(given), cuda_tensors(result))
        return result

    def to_fake(self, value):
        real = torch.is_tensor(value) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if real else value

    # ---- waiting

    def look_for_waits(self, op, args, kwargs, to_cuda):
        on_gpu = bool(cuda_tensors(*args))
        if on_gpu and op in NEEDS_VALUES and kwargs.get('output_size') is None:
            self.wait(f'{op} needs values of the device', stop=True)
        if on_gpu and op in INDEXING:
            indices = [t for t in args[1] if t is not None]
            fills = len(args) > 2 and args[2].numel() == 1            # that is a masked_fill_
            if not fills and any(t.dtype == torch.bool for t in indices):
                self.wait('a bool tensor as an index', stop=True)
            if not all(t.is_cuda for t in indices):
                self.wait('an index of the CPU')
        if op is aten.copy_:
            target, source, *rest = args
            to_cuda = target.is_cuda
            non_blocking = rest[0] if rest else kwargs.get('non_blocking')
        elif op is aten._to_copy:
            source, non_blocking = args[0], kwargs.get('non_blocking')
            to_cuda = to_cuda or kwargs.get('device') is None and source.is_cuda
        else:
            return
        if source.is_cuda and not to_cuda:
            self.wait('a copy to the CPU')
        if to_cuda and not source.is_cuda and not (non_blocking and source in self.pinned):
            self.wait('a copy to the device, blocking or not pinned')

    def wait(self, what, stop=False):
        lines = [f for f in traceback.extract_stack()
                 if Path(f.filename).parent in (ROOT, ROOT / 'tests')    # not in a .venv there
                 and f.filename != __file__]
        self.waits.append(f'{lines[-1].line}  # {what}')
        if stop:
            raise DeviceWait(self.waits[-1])

    # ---- memory

    def hold(self, storage):
        """Note a storage, until it is freed."""
        key = storage._cdata
        if key not in self.held:
            self.held[key] = next(self.numbers), storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key).atexit = False

    def free(self, key):
        number, size = self.held.pop(key)
        self.live -= size

    # ---- work

    def begin_kernel(self):
        self.kernel_starts = next(self.numbers)
        self.read, self.written = {}, {}

    def end_kernel(self):
        alive = {number for number, _ in self.held.values()}
        self.fused += sum(size for (number, *_), size in self.read.items()
                          if number < self.kernel_starts)
        self.fused += sum(size for (number, *_), size in self.written.items() if number in alive)
        self.begin_kernel()

    def count(self, func, args, kwargs, result, read, written):
        op = func.overloadpacket
        if op in flop_registry:
            self.end_kernel()
            flops = flop_registry[op](*args, **kwargs, out_val=result)
            self.products.append((flops, num_bytes(read + written)))
        elif '_foreach_' in func.name() or func.name().startswith('aten::_fused_'):
            # the optimiser, the EMA: what they are given is read, and parts of it are written
            self.end_kernel()
            moved = num_bytes(read + written) * 1.5
            self.eager += moved
            self.fused += moved
        elif op not in FREE:
            if op in GATHERS:
                read = written
            self.eager += num_bytes(read + written)
            for places, tensors in ((self.read, read), (self.written, written)):
                for t in tensors:
                    number = self.held[t.untyped_storage()._cdata][0]
                    places[number, t.storage_offset(), t.shape] = num_bytes([t])


# --------------------------------------------------------------------------------------------------
# autograd's engine, in Python: torch's own, built without CUDA, refuses tensors of a GPU

class Saved:
    """A tensor that a node keeps for its backward, and lets go after that."""
    used = []

    def __init__(self, tensor):
        self.tensor = tensor

    def unpack(self):
        Saved.used.append(self)
        return self.tensor


def run_node(node, grads):
    """-> the gradients of the node's inputs, as many as its next_functions."""
    Saved.used = []
    made = node.apply(*grads) if hasattr(node, 'needs_input_grad') else node(*grads)
    for saved in Saved.used:
        saved.tensor = None
    made = made if isinstance(made, tuple) else (made,)
    if not hasattr(node, 'needs_input_grad'):
        return made
    # a torch.autograd.Function answers for inputs that are no tensors, too
    needed = iter([g for g, is_needed in zip(made, node.needs_input_grad) if is_needed])
    return [None if after is None else next(needed) for after, _ in node.next_functions]


def run_backward(outputs, grads, inputs=None):
    """The backward pass from tensors and their gradients: into .grad or, with inputs, into the
    tuple of their gradients. In the order of torch's engine: last made, first run."""
    wanted = {(t.grad_fn, t.output_nr): i for i, t in enumerate(inputs or []) if t.grad_fn}
    leaves = {id(t): i for i, t in enumerate(inputs or []) if not t.grad_fn}
    found = [None] * len(inputs or [])

    roots = {t.grad_fn for t in outputs}
    missing, to_visit, seen = Counter(), [*roots], set()
    while to_visit:                                      # how many gradients does each node get?
        node = to_visit.pop()
        if node not in seen:
            seen.add(node)
            after = [n for n, _ in node.next_functions if n is not None]
            missing.update(after)
            to_visit += after
    seen.clear()

    arrived, ready, order = {}, [], itertools.count()

    def add(node, i, grad):
        given = arrived.setdefault(node, [None] * len(node._input_metadata))
        if grad is not None:
            like = node._input_metadata[i]
            grad = grad.sum_to_size(like.shape).to(like.dtype)
            given[i] = grad if given[i] is None else given[i] + grad

    def push_if_ready(node):
        if not missing[node]:
            heapq.heappush(ready, (-node._sequence_nr(), next(order), node))

    for output, grad in zip(outputs, grads):
        add(output.grad_fn, output.output_nr, grad)
    for root in roots:
        push_if_ready(root)
    while ready:
        node = heapq.heappop(ready)[-1]
        given = arrived.pop(node)
        for (owner, i), place in wanted.items():
            if owner is node:
                found[place] = given[i]
        if hasattr(node, 'variable'):                    # a leaf
            leaf, grad = node.variable, given[0]
            if inputs is not None and id(leaf) in leaves:
                found[leaves[id(leaf)]] = grad
            elif inputs is None and grad is not None:
                leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
            continue
        made = run_node(node, given)
        for (after, i), grad in zip(node.next_functions, made):
            if after is not None:
                add(after, i, grad)
                missing[after] -= 1
                push_if_ready(after)
        del made, given, grad                            # as torch's engine does, before the next
    return tuple(found)


@torch.no_grad()
def backward(tensor, gradient=None):
    run_backward([tensor], [torch.ones_like(tensor) if gradient is None else gradient])


@torch.no_grad()
def grad(outputs, inputs, grad_outputs=None):
    outputs, inputs, grads = ([v] if v is None or torch.is_tensor(v) else list(v)
                              for v in (outputs, inputs, grad_outputs))
    grads = [torch.ones_like(t) if g is None else g for t, g in zip(outputs, grads)]
    return run_backward(outputs, grads, inputs)


# --------------------------------------------------------------------------------------------------
# a torch that believes in the GPU

def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """F.scaled_dot_product_attention by the kernel that such a GPU takes."""
    if q.dtype != torch.float32 and torch.cuda.get_device_capability()[0] >= 8:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, q.requires_grad,
                                                        dropout_p, is_causal)[0]


def install_device_guard():
    """A torch without CUDA has no guard for its devices: that of meta tensors, which does nothing,
    takes its place."""
    name = '_ZN3c104impl26device_guard_impl_registryE'
    try:
        (library,) = Path(torch.__file__).parent.glob('lib/libc10.*')
        registry = (ctypes.c_void_p * 15).in_dll(ctypes.CDLL(str(library)), name)
    except (OSError, ValueError):
        raise UserError('this torch cannot simulate a GPU: it takes Linux or a Mac')
    cuda, meta = 1, 14                                   # c10::DeviceType
    registry[cuda] = registry[meta]


@contextmanager
def fake_cuda(capability=9):
    """A FakeCuda, while torch behaves as if there were such a GPU. capability: the first part of
    its compute capability, 9 for an H100."""
    gpu = FakeCuda()

    def pin_memory(tensor):
        gpu.pinned[tensor] = True
        return tensor

    stand_ins = [
        (torch.cuda, 'is_available', lambda: True),
        (torch.cuda, 'device_count', lambda: 1),
        (torch.cuda, 'current_device', lambda: 0),
        (torch.cuda, 'get_device_capability', lambda device=None: (capability, 0)),
        (torch.cuda, 'get_device_properties',
         lambda device=None: SimpleNamespace(total_memory=8e10)),
        (torch.cuda, 'is_bf16_supported', lambda including_emulation=True: capability >= 8),
        (torch.cuda, 'manual_seed_all', lambda seed: None),
        (torch.Tensor, 'pin_memory', pin_memory),
        (torch.Tensor, 'backward', backward),
        (torch.autograd, 'grad', grad),
    ]
    if torch.cuda.is_available():
        torch.cuda.init()
    else:
        stand_ins.append((torch.cuda, '_lazy_init', lambda: None))
    if not torch.backends.cuda.is_built():
        install_device_guard()
    sdpa = F.scaled_dot_product_attention
    choose = lambda q, *rest, **more: (attention if q.is_cuda else sdpa)(q, *rest, **more)
    stand_ins.append((F, 'scaled_dot_product_attention', choose))
    before = torch._C._only_lift_cpu_tensors()
    with gpu.fake:                                       # where CUDA is built, it installs a guard
        pass
    with ExitStack() as stack:
        for place, name, value in stand_ins:
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(Saved, Saved.unpack))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings('ignore', 'Accessing the data pointer of FakeTensor')
        torch._C._set_only_lift_cpu_tensors(True)        # so that torch.tensor(device=) is seen
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        yield stack.enter_context(gpu)


# --------------------------------------------------------------------------------------------------

PRODUCT_SHARE, BANDWIDTH_SHARE = 0.6, 0.8                # of the published, as good kernels attain


def simulate(bench):
    """python bench.py --gpu=...: the plan of a run on that GPU, which need not be there. bench:
    that module, as it runs."""
    capability, flops_per_s, bytes_per_s, memory = bench.GPUS[bench.gpu]
    dtype, compiled = bench.train.dtype, bench.train.compile
    if dtype == 'float32' or dtype == 'bfloat16' and capability < 8:
        raise UserError(f'--dtype={dtype} with --gpu: this GPU is simulated in the half precision '
                        "that it has: --dtype=auto")
    bench.train.compile = False

    def measure(name, fn, device, tokens):
        for _ in range(1 if peak else 2):                # the first makes the optimiser's state
            fake.reset()
            fn()
        fake.end_kernel()
        rate, speed = PRODUCT_SHARE * flops_per_s, BANDWIDTH_SHARE * bytes_per_s
        products = sum(max(flops / rate, size / speed) for flops, size in fake.products)
        peak.append(fake.peak)
        ms = [1e3 * (products + size / speed) for size in (fake.eager, fake.fused)]
        print(f'{name:<24} estimated: {ms[0]:.1f} ms eager, {ms[1]:.1f} ms compiled: '
              f'{1e3 * tokens / ms[0]:,.0f} and {1e3 * tokens / ms[1]:,.0f} tokens/s')
        return ms[compiled]

    peak = []
    print(f'simulated, not measured: a GPU of {flops_per_s / 1e12:g} TFLOP/s in half precision, '
          f'{bytes_per_s / 1e9:,.0f} GB/s and {memory / 1e9:g} GB. Assumed: {PRODUCT_SHARE:.0%} of '
          f'the FLOP/s in products and attention, {BANDWIDTH_SHARE:.0%} of the GB/s in all other '
          'work, every operation by itself (eager) or all between two products as one (compiled, '
          f'at best); the hours are those of the {"compiled" if compiled else "eager"} run, the '
          'memory that of eager mode')
    with fake_cuda(capability) as fake:
        try:
            bench.plan_run('cuda', *pick_dtype(dtype, 'cuda'), measure, lambda device: max(peak))
        except DeviceWait as wait:
            raise UserError(f'this recipe waits for the GPU, which a simulation cannot do: {wait}')
    if max(peak) > memory:
        raise UserError(f'{max(peak) / 1e9:.1f} GB do not fit in {memory / 1e9:g} GB. Lower '
                        '--batch_size, and raise --gradient_accumulation_steps instead')
