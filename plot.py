"""
Pictures of runs:

    python plot.py out             # out/curve.png: training and validation loss against steps; train.py ends with it
    python plot.py out out-ar ...  # compare.png: validation perplexity against steps, tokens and time
    python plot.py --denoise out   # out/denoise.png: one text at four moments of its denoising
    python plot.py --gen out ...   # gen.png: Gen-PPL and entropy against sampling steps, and their frontier (eval.py)
    python plot.py --transform K   # transform-K.png: alpha(gamma) for K words, the curriculum's window, soft tokens
"""
import argparse
import json
import os

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


def plain_numbers(axis):
    """100, not 10^2, on a logarithmic axis."""
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter(lambda x, _: f'{x:g}' if f'{x:e}'[0] in '25' else '')


def curriculum_end(info):
    settings = info['settings']
    return settings['curriculum_iters'] if settings['objective'] == 'duo' else 0


def draw_curve(out_dir):
    records, info = read_run(out_dir)
    train = [(r['step'], r['loss']) for r in records if r.get('loss') is not None]
    val = [(r['step'], r['val_loss'], r['val_error']) for r in records if 'val_loss' in r]
    if not val:
        raise SystemExit(f'{out_dir} has no validation yet: let it go on')
    end = curriculum_end(info)
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    ax.plot([s for s, _ in train], [v for _, v in train], color='#9ab8d8', lw=1,
            label='training: its own loss, raw weights')
    ax.errorbar(*zip(*val), color='#c0392b', marker='o', ms=4, capsize=3,
                label='validation, EMA weights: ' + ('exact' if info['objective'] == 'ar' else 'discrete NELBO'))
    if 0 < end < val[-1][0]:
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
            piece = ''.join(c if c.isprintable() else '·' for c in piece)
            for start in range(0, len(piece), columns):
                part = piece[start:start + columns]
                if column + len(part) > columns:
                    row, column = row + 1, 0
                if row < rows:
                    ax.text(column, row, part, family='monospace', fontsize=8.5, va='baseline',
                            color='#1b2631' if token == last else '#d98880', parse_math=False)
                column += len(part)
    ax.set(xlim=(0, columns), ylim=(rows, -1))
    ax.axis('off')


def draw_denoising(out_dir, steps=64, seed=1337):
    import torch
    from checkpoint import load_model
    from data import load_tokenizer
    from diffusion import blank, reverse_process
    model, info = load_model(out_dir)
    if info['objective'] != 'duo':
        raise SystemExit(f'{out_dir} is a {info["objective"]} model: the picture is of a Duo')
    tokenizer = load_tokenizer(info['data'], out_dir)
    torch.manual_seed(seed)
    x = blank('duo', (1, info['model']['block_size']), info['data']['vocab_size'], None)
    frames = [x] + list(reverse_process(model, x, 'duo', info['data']['vocab_size'], steps))
    fig, axes = plt.subplots(2, 2, figsize=(13, 6), layout='constrained')
    for ax, i in zip(axes.flat, (0, steps // 2, 3 * steps // 4, len(frames) - 1)):
        draw_text(ax, tokenizer, frames[i][0].tolist(), frames[-1][0].tolist(), columns=90, rows=16)
        pale = ' (pale: will change again)' if i < len(frames) - 1 else ''
        ax.set_title(f'after {i} of {len(frames) - 1} network calls{pale}', fontsize=10, loc='left', color='gray')
    write(fig, out_dir, 'denoise.png')


def compare(out_dirs):
    """Validation perplexity of several runs against steps, tokens and time; a curriculum's end is a hollow ring."""
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout='constrained')
    for out_dir in out_dirs:
        records, info = read_run(out_dir)
        name, end = os.path.basename(os.path.normpath(out_dir)), curriculum_end(info)
        s, val = info['settings'], [r for r in records if 'val_loss' in r]
        tokens = s['batch_size'] * s['gradient_accumulation_steps'] * s['block_size']
        for ax, x in zip(axes, (lambda r: r['step'], lambda r: r['step'] * tokens / 1e6, lambda r: r['seconds'] / 60)):
            line, = ax.plot([x(r) for r in val], [r['val_ppl'] for r in val], marker='.', label=name)
            for r in [r for r in val if r['step'] >= end > 0][:1]:
                ax.plot(x(r), r['val_ppl'], 'o', ms=11, mfc='none', color=line.get_color())
    for ax, label in zip(axes, ('steps', 'million tokens', 'minutes')):
        ax.set(xlabel=label, yscale='log')
        ax.grid(alpha=0.3, which='both')
        plain_numbers(ax.yaxis)
    axes[0].set_ylabel('validation perplexity')
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc='outside right upper',
               title='ring: first point\nafter the curriculum')
    write(fig, '.', 'compare.png')


def draw_gen(out_dirs):
    """Gen-PPL and entropy against steps, and against each other (the frontier), from eval.py's gen.jsonl."""
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout='constrained')
    for out_dir in out_dirs:
        path = os.path.join(out_dir, 'gen.jsonl')
        if not os.path.exists(path):
            raise SystemExit(f'no {path}: run eval.py --out_dir={out_dir} --gen_ppl=JUDGE first')
        with open(path) as f:
            runs = {}
            for r in map(json.loads, f):                                                 # the newest of each counts
                name = f'{os.path.basename(os.path.normpath(out_dir))}, {r["sampler"]}'
                runs.setdefault(name, {})[r['steps'], r['temperature']] = r
        for name, rows in runs.items():
            plain = sorted((r for r in rows.values() if r['temperature'] == 1), key=lambda r: r['steps'])
            for ax, key in zip(axes, ('gen_ppl', 'entropy')):
                ax.plot([r['steps'] for r in plain], [r[key] for r in plain], marker='o', label=name)
            axes[2].plot([r['entropy'] for r in rows.values()], [r['gen_ppl'] for r in rows.values()], 'o', label=name)
    axes[0].set(xlabel='sampling steps', ylabel='Gen-PPL', yscale='log')
    axes[1].set(xlabel='sampling steps', ylabel='unigram entropy of a sample, nats')
    for ax in axes[:2]:
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:g}')
    axes[2].set(xlabel='entropy, nats (more is more diverse)', ylabel='Gen-PPL (less is likelier)', yscale='log')
    for ax in axes:
        ax.grid(alpha=0.3, which='both')
    plain_numbers(axes[0].yaxis), plain_numbers(axes[2].yaxis)
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc='outside upper center', ncols=4)
    write(fig, '.', 'gen.png')


def draw_transform(vocab_size, window=(-3.55, -1.85), taus=(1e-3, 1e-2, 3e-2, 0.1)):
    """alpha(gamma) of a vocabulary with the curriculum's window, and the soft tokens' weights at several tau."""
    import torch
    from diffusion import soft_tokens, transform
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    gamma = torch.linspace(-6, 4, 400, dtype=torch.float64)
    left.plot(gamma, transform(gamma, vocab_size)[0], label='alpha = T(gamma)')
    left.plot(gamma, torch.sigmoid(-gamma).sqrt(), ls=':', label="the Gaussian's signal")
    left.axvspan(*window, alpha=0.15, color='C2', label='curriculum window')
    left.set(xlabel='gamma, log noise-to-signal ratio', ylabel='alpha', title=f'{vocab_size:,} words')
    right.set(xlabel='rank of the word', ylabel='mean weight in the mixture', yscale='log', ylim=(1e-6, 2),
              title='what the network sees, in the middle of the window')
    k = min(10, vocab_size)
    for tau in taus:
        x0 = torch.zeros(2000, 1, dtype=torch.long)
        weights = soft_tokens(x0, torch.full((2000, 1), sum(window) / 2), tau, vocab_size, k)[1].mean((0, 1))
        right.plot(range(1, k + 1), weights, marker='o', label=f'tau = {tau:g}')
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=9, loc='upper right')
    write(fig, '.', f'transform-{vocab_size}.png')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'plot.py: {message} (see --help)\n')
    parser.add_argument('runs', nargs='*', help='folders of runs')
    parser.add_argument('--denoise', action='store_true')
    parser.add_argument('--gen', action='store_true')
    parser.add_argument('--transform', type=int, metavar='K', help='a vocabulary size')
    args = parser.parse_args()
    if args.transform is not None:
        if args.transform < 2:
            parser.error(f'--transform {args.transform}: a vocabulary has two words at least')
        draw_transform(args.transform)
    elif not args.runs:
        parser.error('name a run')
    elif args.gen:
        draw_gen(args.runs)
    elif args.denoise:
        for out_dir in args.runs:
            draw_denoising(out_dir)
    elif len(args.runs) > 1:
        compare(args.runs)
    else:
        draw_curve(args.runs[0])
