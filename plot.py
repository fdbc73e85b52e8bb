"""
Pictures of runs:

    python plot.py out                 # out/curve.png: losses by step; train.py ends with it
    python plot.py out out-ar          # out/compare.png: bits per byte by tokens and by time (they
                                       # can be compared across tokenizers)
    python plot.py --gen out out-dcd   # out/gen.png: Gen-PPL by sampling steps, and the frontier of
                                       # Gen-PPL and entropy, as eval.py --gen_ppl measured them
"""
import argparse
import json

from configurator import UserError, run

import matplotlib.pyplot as plt
import numpy as np

STYLE = {
    'backend': 'agg',                    # writes files, needs no display
    'figure.figsize': (9, 4.5),
    'axes.grid': True,
    'figure.constrained_layout.use': True,
}


def read_records(path, advice):
    """The JSON objects in the lines of a file; what else is there, such as a line that a power cut
    tore, is left out."""
    records = []
    try:
        for line in open(path, errors='replace'):
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                pass
    except OSError as error:
        raise UserError(f'cannot read {path} ({error.strerror}): {advice}')
    return [r for r in records if isinstance(r, dict)]


def read_run(out_dir):
    """-> its settings, the records of its log."""
    records = read_records(f'{out_dir}/log.jsonl', 'name the folder of a run of train.py')
    if not any('val_loss' in r for r in records):
        raise UserError(f'{out_dir} has no validation yet: let it run on')
    return json.load(open(f'{out_dir}/config.json'))['settings'], records


def columns(records, *names):
    """An array of values for each name, of the records that have the last of them."""
    rows = [[r[name] for name in names] for r in records if names[-1] in r]
    return np.array(rows, float).reshape(-1, len(names)).T         # null becomes nan


def draw_curve(out_dirs):
    [out_dir] = out_dirs
    settings, records = read_run(out_dir)
    fig, ax = plt.subplots()
    ax.plot(*columns(records, 'step', 'loss'), label='training loss, raw weights')
    ax.errorbar(*columns(records, 'step', 'val_loss', 'val_error'), marker='o',
                label='validation: NELBO (AR: NLL), EMA weights')
    end = settings['curriculum_frac'] * settings['max_iters']
    if settings['objective'] == 'duo' and end:
        ax.axvline(end, label='end of the curriculum', color='gray')
    ax.set(xlabel='step', ylabel='nats per token')
    ax.legend()
    return fig, f'{out_dir}/curve.png'


def compare(out_dirs):
    fig, (left, right) = plt.subplots(1, 2, sharey=True)
    for out_dir in out_dirs:
        settings, records = read_run(out_dir)
        rows = settings['batch_size'] * settings['gradient_accumulation_steps']
        steps, seconds, bpb = columns(records, 'step', 'seconds', 'val_bpb')
        tokens = steps * rows * settings['block_size']
        left.plot(tokens / 1e6, bpb, '.-', label=out_dir)
        right.plot(seconds / 60, bpb, '.-')
    left.set(xlabel='million tokens', ylabel='validation, bits per byte')
    right.set(xlabel='minutes')
    left.legend()
    return fig, f'{out_dirs[0]}/compare.png'


def draw_gen(out_dirs):
    fig, (left, right) = plt.subplots(1, 2, sharey=True)
    for out_dir in out_dirs:
        curves = {}
        for r in read_records(f'{out_dir}/gen.jsonl', 'run eval.py --gen_ppl=JUDGE first'):
            # for equal settings the newest record counts
            curve = curves.setdefault((r['sampler'], r['judge']), {})
            curve[r['steps'], r['temperature']] = r
        for (sampler, judge), points in curves.items():
            by_steps = [points[key] for key in sorted(points) if key[1] == 1]
            left.plot(*columns(by_steps, 'steps', 'gen_ppl'), 'o-',
                      label=f'{out_dir}, {sampler}, by {judge}')
            frontier = columns(points.values(), 'steps', 'entropy', 'gen_ppl')
            right.plot(*frontier[1:], 'o')
            for n, entropy, ppl in frontier.T:
                right.annotate(f'{n:.0f}', (entropy, ppl))
    left.set(xlabel='sampling steps (temperature 1)', ylabel='Gen-PPL', xscale='log',
             yscale='log')
    right.set(xlabel='entropy of a sample, nats (numbers: steps)')
    fig.legend(loc='outside upper center')
    return fig, f'{out_dirs[0]}/gen.png'


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--gen', action='store_true')
    args = parser.parse_args()
    plt.rcParams.update(STYLE)
    draw = compare if args.runs[1:] else draw_curve
    if args.gen:
        draw = draw_gen
    try:
        fig, path = draw(args.runs)
        fig.savefig(path)
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f'{" ".join(args.runs)}: log.jsonl, gen.jsonl or config.json is not as '
                        f'train.py and eval.py write it ({error!r:.200})')
    print(f'wrote {path}')


if __name__ == '__main__':
    run(main)
