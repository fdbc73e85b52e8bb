"""What the tests of the scripts share: they run them as users do, in a temporary directory."""
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TINY = ('--dataset=tiny --batch_size=4 --block_size=32 --n_layer=1 --n_head=2 --n_embd=32 --cond_dim=16 --dropout=0.1 '
        '--max_iters=12 --curriculum_iters=6 --eval_interval=4 --eval_iters=2 --log_interval=1 --warmup_iters=2 '
        '--cooldown_iters=0 --num_samples=1 --sample_steps=4 --device=cpu').split()


def run(folder, script, *args, launcher=(), env=None):
    return subprocess.run([sys.executable, *launcher, ROOT / script, *args], cwd=folder, capture_output=True, text=True,
                          env=env)


def good(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def one_line(done, *words):
    """It failed, and said so in one line that has these words."""
    assert done.returncode != 0 and 'Traceback' not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def log(folder, key='loss'):
    return [r[key] for r in map(json.loads, open(folder / 'log.jsonl')) if key in r]


def checkpoint(folder):
    return torch.load(folder / 'last.pt', weights_only=True)


def equal(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
