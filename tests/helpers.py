"""What the tests of the scripts share: they run them as users do, in a temporary directory."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
TINY = ('--dataset=tiny --batch_size=4 --block_size=32 --n_layer=1 --n_head=2 --n_embd=32 '
        '--cond_dim=16 --dropout=0.1 --max_iters=12 --curriculum_frac=0.5 --eval_interval=4 '
        '--eval_iters=2 --log_interval=1 --warmup_iters=2 --cooldown_frac=0 --num_samples=1 '
        '--sample_steps=4 --device=cpu').split()


def run(folder, script, *args, launcher=(), env=None):
    return subprocess.run([sys.executable, *launcher, ROOT / script, *args], cwd=folder,
                          capture_output=True, text=True, env=env)


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
    return torch.load(folder / 'last.pt', weights_only=True)


def rewind(out, to, step):
    """Copy a finished run to the folder `to`, as it stood at its checkpoint of that step.

    The run must have kept that checkpoint: --checkpoint_interval, and --keep_last=99.
    """
    shutil.copytree(out, to)
    for path in to.glob('step-*.pt'):
        if int(path.stem.removeprefix('step-')) > step:
            path.unlink()
    (to / 'last.pt').unlink()  # it may be a link to the newest checkpoint
    shutil.copy(to / f'step-{step:08}.pt', to / 'last.pt')
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
