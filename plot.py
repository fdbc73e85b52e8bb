"""
Pictures of runs:

    python plot.py out             # out/curve.png: training and validation loss against steps; train.py ends with it
    python plot.py --denoise out   # out/denoise.png: one text at four moments of its denoising
"""
import json
import os
import sys

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt


def read_run(out_dir):
    """log.jsonl's records and config.json's dict."""
    try:
        with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as log:
            records = [json.loads(line) for line in log]
        with open(os.path.join(out_dir, 'config.json'), encoding='utf-8') as info:
            return records, json.load(info)
    except (OSError, ValueError) as e:
        raise SystemExit(f'no finished run in {out_dir} ({e}): train first')


def write(fig, out_dir, name):
    path = os.path.join(out_dir, name)
    fig.savefig(path, dpi=120)
    print(f'wrote {path}')


def draw_curve(out_dir):
    records, info = read_run(out_dir)
    train = [(r['step'], r['loss']) for r in records if 'loss' in r]
    val = [(r['step'], r['val_loss'], r['val_error']) for r in records if 'val_loss' in r]
    end = info['settings']['curriculum_iters']
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    ax.plot(*zip(*train), color='#9ab8d8', lw=1, label='training: its own loss, raw weights')
    ax.errorbar(*zip(*val), color='#c0392b', marker='o', ms=4, capsize=3,
                label='validation: discrete NELBO, EMA weights')
    if 0 < end < train[-1][0]:
        ax.axvline(end, color='gray', ls='--', lw=1)
        ax.annotate('curriculum ends', (end, 0.02), xycoords=('data', 'axes fraction'), xytext=(4, 0),
                    textcoords='offset points', color='gray')
    ax.set(xlabel='step', ylabel='nats per token',
           title=f'{info["settings"]["dataset"]}: validation {val[-1][1]:.3f} nats after {val[-1][0]:,} steps')
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    write(fig, out_dir, 'curve.png')


def draw_text(ax, tokenizer, ids, final, columns, rows):
    """A frame's words where they would stand in a terminal: dark where they are already what they will be."""
    row = column = 0
    for token, last in zip(ids, final):
        for i, piece in enumerate(tokenizer.decode([token]).split('\n')):
            row, column = (row + 1, 0) if i else (row, column)
            for start in range(0, len(piece), columns):
                part = piece[start:start + columns]
                if column + len(part) > columns:
                    row, column = row + 1, 0
                if row < rows:
                    ax.text(column, row, part, family='monospace', fontsize=7.5, va='top',
                            color='#1b2631' if token == last else '#d98880', parse_math=False)
                column += len(part)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.axis('off')


def draw_denoising(out_dir, steps=64, seed=1337):
    import torch
    from checkpoint import load_model
    from data import load_tokenizer
    from diffusion import denoise
    model, info = load_model(out_dir)
    tokenizer = load_tokenizer(info['data'], out_dir)
    torch.manual_seed(seed)
    x = torch.randint(info['data']['vocab_size'], (1, info['model']['block_size']))
    frames = [x] + list(denoise(model, x, steps))
    fig, axes = plt.subplots(1, 4, figsize=(16, 5), layout='constrained')
    for ax, i in zip(axes, (0, steps // 2, 3 * steps // 4, len(frames) - 1)):
        draw_text(ax, tokenizer, frames[i][0].tolist(), frames[-1][0].tolist(), columns=58, rows=30)
        ax.set_title(f'after {i} of {len(frames) - 1} network calls', fontsize=10, loc='left')
    write(fig, out_dir, 'denoise.png')


if __name__ == '__main__':
    args = sys.argv[1:]
    draw = draw_curve
    if '--denoise' in args:
        draw = draw_denoising
        args.remove('--denoise')
    if not args or args[0].startswith('-'):
        raise SystemExit(__doc__.strip())
    for out_dir in args:
        draw(out_dir)
