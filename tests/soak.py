"""
Kill it, stop it, resize it, damage its files: is it still the same run?

    python tests/soak.py --minutes=1 --seed=0

A tiny model is trained undisturbed, and then again and again with one disturbance in every launch,
until it is done: resized between 1, 2 and 3 processes, where losses and weights must be those of
the undisturbed run to float tolerance, and on a fixed number of them, where every bit must be. No
launcher stands between: the ranks are started and killed one by one, so those that live on must
find out and end by themselves.
"""
import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from itertools import cycle
from pathlib import Path

from helpers import ROOT, TINY, checkpoint, equal, good, run

EVERY, STEPS, LIMIT = 4, 40, 120  # steps between checkpoints; steps; seconds until it is a hang
ARGS = [*TINY, f'--max_iters={STEPS}', '--eval_interval=12', f'--checkpoint_interval={EVERY}',
        '--batch_size=2', '--gradient_accumulation_steps=6', '--num_samples=0', '--init_from=auto']
KILL, STOPS = signal.SIGKILL, (signal.SIGTERM, signal.SIGUSR1)
FAULTS = ('cut', 'flip a bit', 'lose', 'tear the log')


def expect(condition, *what):
    assert condition, ' '.join(map(str, what))


def start_ranks(out, world):
    """The command as so many processes, and the files of what they print."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    env = os.environ | dict(OMP_NUM_THREADS='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                            WORLD_SIZE=str(world))
    said, ranks = [], []
    for rank in range(world):
        said.append(Path(f'{out}-{rank}.txt'))
        if world > 1:
            env |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
        with open(said[-1], 'w') as file:
            ranks.append(subprocess.Popen(
                [sys.executable, ROOT / 'train.py', *ARGS, f'--out_dir={out.name}'],
                env=env, cwd=out.parent, stdout=file, stderr=file))
    return said, ranks


def launch(out, world, rng, number=0, everybody=True):
    """The command on so many processes; after a few steps one of them or everybody gets the signal,
    0 for none. Returns the steps that were taken, and whether the run is done."""
    said, ranks = start_ranks(out, world)

    def steps():
        return [int(n) for n in re.findall(r'^step (\d+): loss', said[0].read_text(), re.M)]

    def live():
        return any(rank.poll() is None for rank in ranks)

    # A kill may come before the first step, but of everybody: until ranks have met, only a launcher
    # can end the others.
    target = rng.randrange(number != KILL or not everybody, 16)
    pause, deadline = rng.random(), time.time() + LIMIT
    try:
        if number:
            while live() and len(steps()) < target and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(pause * (0.1 if target else 3))
            for rank in ranks if everybody else [rng.choice(ranks)]:
                rank.send_signal(number)
        while live() and time.time() < deadline:
            time.sleep(0.01)
        expect(not live(), 'a hang of', world, 'processes after signal', number)
    finally:
        for rank in ranks:
            rank.kill()
    codes = {rank.returncode for rank in ranks}
    text = '\n'.join(path.read_text() for path in said)
    # -number: in the interpreter's last moment, when the run is done, the handler is gone
    fine = number == KILL or codes <= {0, 128 + number, -number}
    expect(fine, 'signal', number, 'ended in', codes, text)
    # a rank in the middle of a sum with the one that was killed may fail with a traceback
    fine = 'Traceback' not in text or number == KILL and not everybody
    expect(fine, 'after signal', number, text)
    return steps(), codes == {0}


def is_whole(path):
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def whole_steps(out):
    """The steps of the step files that are not damaged, the newest first."""
    paths = sorted(out.glob('step-*.pt'), reverse=True)
    return [int(path.stem.removeprefix('step-')) for path in paths if is_whole(path)]


def spoil(out, fault, rng):
    """Damage in place."""
    last = max(out.glob('step-*.pt'))
    if fault == 'tear the log':
        with open(out / 'log.jsonl', 'a') as file:
            file.write('{"step": 7, "lo')
    elif fault == 'lose':
        last.unlink()
    else:
        raw = bytearray(last.read_bytes())
        at = rng.randrange(len(raw))
        raw[at] ^= 1 << rng.randrange(8)
        last.write_bytes(raw[:at] if fault == 'cut' else raw)


def values(folder, key):
    lines = map(json.loads, open(folder / 'log.jsonl'))
    return [(line['step'], line[key]) for line in lines if key in line]


def compare(calm, out, exact):
    """Of two runs that are done."""
    for key in ('loss', 'val_loss'):
        x, y = values(calm, key), values(out, key)
        if key == 'val_loss':
            y = list(dict.fromkeys(y))  # killed after the last step, a run validates once more
        expect(len(x) == len(y), out, 'has another number of', key, x, y)
        for (i, v), (j, w) in zip(x, y):
            near = abs(v - w) <= (0 if exact else 1e-4 * v)
            expect(i == j and near, out, 'has another', key, x, y)
    a, b = checkpoint(calm), checkpoint(out)
    for key in ('weights', 'ema', 'optimizers', 'counts') if exact else ():
        expect(equal(a[key], b[key]), out, 'has other bits in', key)
    for name, w in a['weights'].items():
        near = w.allclose(b['weights'][name], rtol=0, atol=1e-4)
        expect(near, out, 'has other weights in', name)


def disturb(out, worlds, rng, end, count):
    """One run, with a disturbance in every launch until it is done."""
    floor, last, done = 0, 0, False
    number = KILL  # once at least
    while not done:
        fault = len(whole_steps(out)) > 1 and number
        if fault and rng.random() < 0.6:
            spoil(out, rng.choice(FAULTS), rng)
            count['faults'] += 1
            floor = min(floor, whole_steps(out)[0])
        world = rng.choice(worlds)
        steps, done = launch(out, world, rng, number, everybody=rng.random() < 0.5)
        if steps:  # each once, none left out, and none again that an undamaged checkpoint had
            in_order = steps == [*range(steps[0], steps[-1] + 1)]
            expect(in_order and floor < steps[0] <= last + 1,
                   out, 'stood at', last, 'with a checkpoint of', floor, 'and took', steps)
            last = steps[-1]
            floor = last if number in STOPS else (last - 1) // EVERY * EVERY
        count.update({'launches': 1, 'steps': len(steps), number: int(not done)})
        number = rng.choice((KILL, KILL, *STOPS)) if time.time() < end else 0


def soak(folder, minutes, seed):
    rng, end, count, runs = random.Random(seed), time.time() + 60 * minutes, Counter(), 0
    lines = (f'Line {i} of a text, and {i * i} is its square.' for i in range(400))
    (folder / 'tiny.txt').write_text('\n\n'.join(lines))
    good(run(folder, 'prepare.py', 'tiny.txt', '--tokenizer', 'bytes'))
    for worlds in cycle(([1, 2, 3], [1], [2])):
        calm, out = folder / f'calm-{worlds[0]}', folder / f'run-{runs}'
        if not calm.exists():
            done = launch(calm, worlds[0], rng)[1]
            expect(done, calm, 'is not done')
        disturb(out, worlds, rng, end, count)
        compare(calm, out, exact=len(worlds) == 1)
        runs += 1
        if time.time() > end:
            break
    stops = sum(count[stop] for stop in STOPS)
    return (f'{runs} runs of {STEPS} steps in {count["launches"]} launches: {count[KILL]} kills, '
            f'{stops} stops and {count["faults"]} faults survived, '
            f'{count["steps"] - runs * STEPS} steps repeated')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--minutes', type=float, default=1)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), args.minutes, args.seed))
