"""What the tests of the scripts share: they run them as users do, in a temporary directory."""
import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)    # that a run catches
TINY = ('--dataset=tiny --batch_size=4 --block_size=32 --n_layer=1 --n_head=2 --n_embd=32 '
        '--cond_dim=16 --dropout=0.1 --max_iters=12 --curriculum_frac=0.5 --eval_interval=4 '
        '--eval_iters=2 --log_interval=1 --warmup_iters=2 --cooldown_frac=0 --num_samples=1 '
        '--device=cpu').split()


def run(folder, script, *args, launcher=(), env=None):
    return subprocess.run([sys.executable, *launcher, ROOT / script, *args], cwd=folder,
                          capture_output=True, text=True, env=env)


def run_here(folder, script, *args):
    """Like run, in this process, which saves the imports. Of a project that differs from this one
    (see project_with) in more than the script itself, it would run the modules of this one. A run
    of train.py draws no picture at its end: that would be half of the time. Settings of train.py
    that bench.py changes are put back."""
    import train                                         # not there yet where soak.py begins
    said, code, message = io.StringIO(), 0, ''
    start = subprocess.run
    start_others = lambda command, **more: (
        None if str(command[1]).endswith('plot.py') else start(command, **more))
    argv, cwd = sys.argv, os.getcwd()
    handlers = {n: signal.getsignal(n) for n in SIGNALS}
    sys.argv = [str(script), *map(str, args)]
    os.chdir(folder)
    try:
        with redirect_stdout(said), mock.patch.object(subprocess, 'run', start_others), \
                mock.patch.dict(vars(train)):
            runpy.run_path(str(ROOT / script), run_name='__main__')
    except SystemExit as end:
        code = 1
        message = str(end)
    finally:
        sys.argv = argv
        os.chdir(cwd)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_float32_matmul_precision('highest')
    return subprocess.CompletedProcess(args, code, said.getvalue(), message)


def run_on_terminal(folder, script, *args):
    """What a run prints on a terminal."""
    ours, its = os.openpty()
    done = subprocess.Popen([sys.executable, ROOT / script, *args], cwd=folder, stdout=its,
                            stderr=its, stdin=its)
    os.close(its)
    said = b''
    try:
        while some := os.read(ours, 9999):
            said += some
    except OSError:                                      # Linux says so at the end
        pass
    os.close(ours)
    assert done.wait() == 0, said
    return said.decode().replace('\r\n', '\n')


def run_ranks(folder, script, *args, world=2):
    """Like run, as several processes without a launcher; the outputs one after another."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(world))
    ranks = [subprocess.Popen([sys.executable, ROOT / script, *args], cwd=folder, text=True,
                              env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
             for rank in range(world)]
    said = [rank.communicate(timeout=150) for rank in ranks]
    code = max(rank.returncode for rank in ranks)
    return subprocess.CompletedProcess(args, code, *map(''.join, zip(*said)))


def project_with(folder, code, script='train.py'):
    """A copy of the project in the folder, with more code at the end of a file, before it starts
    running: it may define one of its functions anew. Returns the path of the copy's train.py."""
    shutil.copytree(ROOT / 'assets', folder / 'assets')
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    text, start, end = (folder / script).read_text().partition("\n\n\nif __name__ == '__main__':")
    (folder / script).write_text(f'{text}\n{code}\n{start}{end}')
    return folder / 'train.py'


def wrapped_loss(expression):
    """Code for project_with that makes of train.py's loss an expression of loss and step."""
    return f'''
import os
_training_loss = training_loss


def training_loss(model, x0, u, step, *rest):
    loss = _training_loss(model, x0, u, step, *rest)
    return {expression}
'''


def good(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def one_line(done, *parts):
    """It failed, and said so in one line that has these parts."""
    assert done.returncode != 0 and 'Traceback' not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert all(part in line for part in parts), line


def log(folder, key='loss'):
    return [r[key] for r in map(json.loads, open(folder / 'log.jsonl')) if key in r]


def checkpoint(folder):
    return torch.load(max(folder.glob('step-*.pt')), weights_only=True)


def rewind(out, to, step):
    """Copy a finished run to the folder `to`, as it stood at its checkpoint of that step.

    The run must have kept that checkpoint: --checkpoint_interval, and --keep_last=99.
    """
    shutil.copytree(out, to)
    for path in to.glob('step-*.pt'):
        if int(path.stem.removeprefix('step-')) > step:
            path.unlink()
    return to


def reference(prefix):
    """{name: tensor}: arrays of the published code (data/README.md) whose names have the prefix."""
    found = {}
    for path in sorted((ROOT / 'tests' / 'data').glob('reference*.npz')):
        arrays = np.load(path)
        found |= {name.removeprefix(prefix): torch.from_numpy(arrays[name])
                  for name in arrays.files if name.startswith(prefix)}
    return found


def equal(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def mean_and_error(values):
    """The mean of independent numbers (a tensor), and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
