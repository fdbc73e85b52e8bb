"""Where a script runs: the console, the device, its number format, one process or many."""
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from configurator import UserError

control = None               # the group by which the processes agree on what to do


def say(line):
    """print(), by the first process only. A closed or full console does not stop a run: the log
    file is what counts."""
    if os.environ.get('RANK', '0') != '0':
        return
    try:
        print(line, flush=True)
    except RuntimeError:
        pass                                             # a signal came during another print()
    except OSError:                                      # closed or full: drop this and all later
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)     # output, also of scripts started here


def run_script(script, *arguments, **options):
    """Run another script of this folder as a user would, outside torchrun's process group;
    options: those of subprocess.run."""
    alone = {name: value for name, value in os.environ.items() if name != 'RANK'}
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    return subprocess.run(command, env=alone, **options)


def catch_signals():
    """From now on SIGTERM, Ctrl-C (SIGINT), SIGHUP (a closed terminal) and SIGUSR1 only set .caught
    (0 until then) to their number and print that .doing is finished first: words that the caller
    keeps up to date. A second SIGTERM or SIGINT (except under torchrun), or any signal while .doing
    is empty, ends the process at once."""
    noted = SimpleNamespace(caught=0, doing='the step')

    def on_signal(number, frame):
        # torchrun repeats signals to its processes, so a second one means nothing there
        torchrun = dist.is_initialized()
        repeated = (0, signal.SIGUSR1, signal.SIGHUP)    # a shell and the system each send SIGHUP
        first = noted.caught in repeated or number in repeated
        at_once = not noted.doing or not first and not torchrun
        noted.caught = number
        hint = '' if torchrun else '; a second signal stops at once'
        what = 'stopped at once' if at_once else f'finishing {noted.doing}{hint}'
        say(f'{signal.Signals(number).name}: {what}')
        if at_once:
            sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:    # as by nohup
            signal.signal(number, on_signal)
    return noted


def pick_device(device):
    """'auto' -> the best there is; any other name is checked."""
    known = [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    if known:
        known.insert(0, 'cuda')
    known.append('cpu')
    if device == 'auto':
        return known[0]
    if device not in known:
        raise UserError(f"--device={device}: torch sees {', '.join(known)}; 'auto' takes the best")
    return device


def check_memory(config, batch_size, device):
    """UserError if a network (DiTConfig) cannot be trained in the device's memory: four float32
    numbers for each weight, and one for each channel of each layer's output, are the least."""
    c = config
    n_weights = c.n_embd * (12 * c.n_layer * c.n_embd + 2 * c.vocab_size)
    n_weights += c.cond_dim * (6 * c.n_layer * c.n_embd + c.cond_dim)
    need = 16 * n_weights + 4 * batch_size * c.block_size * c.n_layer * c.n_embd
    if device.startswith('cuda'):
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if need > memory:
        raise UserError(f'these sizes take {need / 1e9:,.0f} GB at least, and {device} has '
                        f'{memory / 1e9:,.0f}: lower --batch_size, --n_layer or --n_embd')


def pick_dtype(dtype, device):
    """-> dtype's name, autocast context. 'auto': bf16 where the GPU has it, else fp16; off the GPU
    float32."""
    device_type = device.split(':')[0]
    if dtype == 'auto':
        dtype = 'float32'
        if device_type == 'cuda':  # is_bf16_supported() says yes on a T4, which only emulates bf16
            dtype = 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float16'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f"--dtype={dtype}: must be 'float32', 'bfloat16', 'float16' or 'auto'")
    return dtype, torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')


def start_distributed(device):
    """-> this process's device, rank and world size; under torchrun the processes are joined."""
    if 'RANK' not in os.environ:
        return device, 0, 1
    backend, device_id = 'gloo', None
    if device.startswith('cuda'):
        backend = 'nccl'
        number, n_gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if number >= n_gpus:
            raise UserError(f'a process for each GPU: torch sees {n_gpus}, so --nproc_per_node='
                            f'{n_gpus} at most')
        device = f'cuda:{number}'
        torch.cuda.set_device(device)
        device_id = torch.device(device)                 # NCCL connects now, and need not guess it
    # NCCL gives up after the timeout: the others wait for the first process's checkpoints
    dist.init_process_group(backend, device_id=device_id, timeout=timedelta(hours=1))
    global control
    # by gloo: never waits for the GPU, but perhaps long for the first process's score
    control = dist.new_group(backend='gloo', timeout=timedelta(days=1))
    return device, dist.get_rank(), dist.get_world_size()


def largest_of_ranks(number):
    """The largest of all processes' numbers; where one has died, the others notice it here."""
    if control is None:
        return number
    largest = torch.tensor(number, dtype=torch.float64)
    try:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=control)
    except RuntimeError:
        raise UserError(f'rank {dist.get_rank()}: another process has ended: its message is above')
    return type(number)(largest.item())


def check_same_step(step):
    """UserError unless all processes found the same step to resume from."""
    if largest_of_ranks(step) != -largest_of_ranks(-step):
        raise UserError(f'rank {dist.get_rank()} found step {step}, another did not: --out_dir '
                        'must be on a disk that all processes share')
