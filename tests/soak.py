"""
Kill it, stop it, resize it, spoil its files: is it still the same run?

    python tests/soak.py --minutes=1 --seed=0

I train a tiny model undisturbed, and then again and again with one disturbance in every launch, until it is done:
resized between 1, 2 and 3 processes, where losses and weights must be those of the undisturbed run to float tolerance,
and on a steady number of them, where every bit must be. No launcher stands between: I start the ranks and kill them, so
those that live on must find out and end by themselves.
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
from contextlib import suppress
from itertools import cycle
from pathlib import Path

from helpers import ROOT, TINY, checkpoint, equal, good, run

EVERY, STEPS, LIMIT = 4, 40, 120  # steps between checkpoints, steps in all, seconds until I call it a hang
ARGS = [*TINY, f'--max_iters={STEPS}', '--curriculum_iters=20', '--eval_interval=12', f'--checkpoint_interval={EVERY}',
        '--batch_size=2', '--gradient_accumulation_steps=6', '--init_from=auto']  # 6: for 1, 2 and 3 processes
KILL, STOPS = signal.SIGKILL, (signal.SIGTERM, signal.SIGUSR1)
FAULTS = ('cut', 'flip a bit', 'lose', 'tear the log')


def expect(condition, *what):
    if not condition:
        raise SystemExit(' '.join(map(str, ('soak:', *what))))


def launch(out, world, rng, number=0, everybody=True):
    """The command on so many processes; after a few steps one of them or everybody gets the signal, 0 for none.
    -> the steps that were taken, and whether the run is done."""
    port = socket.create_server(('127.0.0.1', 0)).getsockname()[1]  # closed again: nothing holds it
    env = os.environ | dict(OMP_NUM_THREADS='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(world))
    said, ranks = [Path(f'{out}-{rank}.txt') for rank in range(world)], []
    for rank, path in enumerate(said):
        env |= dict(RANK=str(rank), LOCAL_RANK=str(rank)) if world > 1 else {}
        with open(path, 'w') as file:
            ranks.append(subprocess.Popen([sys.executable, ROOT / 'train.py', *ARGS, f'--out_dir={out.name}'], env=env,
                                          cwd=out.parent, stdout=file, stderr=file))
    steps = lambda: [int(n) for n in re.findall(r'^step (\d+): loss', said[0].read_text(), re.M)]
    lives = lambda: any(rank.poll() is None for rank in ranks)
    # a kill may come before the first step, but of everybody: until ranks have met, a launcher must end the others
    target, pause, deadline = rng.randrange(number != KILL or not everybody, 16), rng.random(), time.time() + LIMIT
    try:
        if number:
            while lives() and len(steps()) < target and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(pause * (0.1 if target else 3))
            for rank in ranks if everybody else [rng.choice(ranks)]:
                rank.send_signal(number)
        while lives() and time.time() < deadline:
            time.sleep(0.01)
        expect(not lives(), 'a hang of', world, 'processes after signal', number)
    finally:
        for rank in ranks:
            rank.kill()
    codes, words = {rank.returncode for rank in ranks}, '\n'.join(path.read_text() for path in said)
    # -number: in the interpreter's last moment, when the run is done, the handler is gone
    expect(number == KILL or codes <= {0, 128 + number, -number}, 'signal', number, 'ended in', codes, words)
    # a rank in the middle of a sum with the one that was killed may say so at length, and nobody else
    expect('Traceback' not in words or number == KILL and not everybody, 'after signal', number, words)
    return steps(), codes == {0}


def whole(out):
    """The steps of the milestones that are not damaged, the newest first."""
    steps = []
    for path in sorted(out.glob('step-*.pt'), reverse=True):
        with suppress(Exception):
            steps += [int(path.stem[5:])] * (zipfile.ZipFile(path).testzip() is None)
    return steps


def spoil(out, fault, rng):
    """Damage in place: the newest milestone, another name of last.pt, has it too."""
    last = out / 'last.pt'
    if fault == 'tear the log':
        open(out / 'log.jsonl', 'a').write('{"step": 7, "lo')
    elif fault == 'lose':
        last.unlink()
    else:
        raw = bytearray(last.read_bytes())
        raw[at := rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        last.write_bytes(raw[:at] if fault == 'cut' else raw)


def compare(calm, out, exact):
    """Of two runs that are done."""
    a, b = ([json.loads(line) for line in open(folder / 'log.jsonl')] for folder in (calm, out))
    for key in ('loss', 'val_loss'):
        x, y = ([(r['step'], r[key]) for r in log if key in r] for log in (a, b))
        y = list(dict.fromkeys(y)) if key == 'val_loss' else y   # who is killed after the last step validates once more
        expect(len(x) == len(y) and all(i == j and abs(v - w) <= (0 if exact else 1e-4 * v)
                                        for (i, v), (j, w) in zip(x, y)), out, 'has another', key, x, y)
    a, b = checkpoint(calm), checkpoint(out)
    for key in ('weights', 'ema', 'optimizer', 'best', 'skipped') if exact else ():
        expect(equal(a[key], b[key]), out, 'has other bits in', key)
    for name, w in a['weights'].items():
        expect(w.allclose(b['weights'][name], rtol=0, atol=1e-4), out, 'has other weights in', name)


def soak(folder, minutes, seed):
    rng, end, count, runs = random.Random(seed), time.time() + 60 * minutes, Counter(), 0
    (folder / 'tiny.txt').write_text('\n\n'.join(f'Line {i} of a text, and {i * i} is its square.' for i in range(400)))
    good(run(folder, 'prepare.py', 'tiny.txt', '--tokenizer', 'bytes'))
    for worlds in cycle(([1, 2, 3], [1], [2])):
        calm, out, done, floor, last = folder / f'calm-{worlds[0]}', folder / f'run-{runs}', False, 0, 0
        if not calm.exists():
            expect(launch(calm, worlds[0], rng)[1], calm, 'is not done')
        number = KILL  # once at least
        while not done:
            if fault := len(whole(out)) > 1 and (out / 'last.pt').exists() and number and rng.random() < 0.6:
                spoil(out, rng.choice(FAULTS), rng)
                floor = min(floor, whole(out)[0])
            steps, done = launch(out, rng.choice(worlds), rng, number, everybody=rng.random() < 0.5)
            if steps:  # each once, none left out, and none again that an undamaged checkpoint had
                expect(steps == [*range(steps[0], steps[-1] + 1)] and floor < steps[0] <= last + 1,
                       out, 'stood at', last, 'with a checkpoint of', floor, 'and took', steps)
                last, floor = steps[-1], steps[-1] if number in STOPS else (steps[-1] - 1) // EVERY * EVERY
            count.update({'launches': 1, 'steps': len(steps), 'faults': int(bool(fault)), number: int(not done)})
            number = rng.choice((KILL, KILL, *STOPS)) if time.time() < end else 0
        compare(calm, out, exact=len(worlds) == 1)
        runs += 1
        if time.time() > end:
            stops, repeated = sum(count[stop] for stop in STOPS), count['steps'] - runs * STEPS
            return (f'{runs} runs of {STEPS} steps in {count["launches"]} launches: {count[KILL]} kills, {stops} stops '
                    f'and {count["faults"]} faults survived, {repeated} steps repeated')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--minutes', type=float, default=1)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), args.minutes, args.seed))
