"""
Evaluate a model: the negative log-likelihood of held-out text, the Gen-PPL of its samples, or the
tasks of lm_eval:

    python eval.py --out_dir=out --draws=4                     # NLL, BPD, PPL, their standard error
    torchrun --nproc_per_node=8 eval.py --out_dir=out-owt-duo  # the same, shared by 8 processes
    python eval.py --dataset=ptb                               # on another data set: zero-shot
    python eval.py --gen_ppl=out-ar --steps=1,2,4,8,16,32,128  # Gen-PPL by an AR run
    python eval.py --gen_ppl=gpt2-large --temperature=0.8,1.0  # or by a Hugging Face model
    python eval.py --lm_eval=hellaswag,piqa                    # after pip install lm_eval

A diffusion model gets an upper bound of its NLL, an autoregressive one the exact value. Published
bounds, and these, are the diffusion term alone: the reconstruction term is zero, as alpha(0) = 1,
and the prior term, KL(q(x1|x0) || uniform), is left out. Samples take sample.py's options; the
sampler is the one that papers report, ancestral, unless another is named. The last line printed is
JSON; --gen_ppl also appends one line per trial to out_dir/gen.jsonl (for hf:org/name: ./gen.jsonl),
which plot.py --gen draws.
"""
import json
import math
import sys
import time
from collections import Counter
from itertools import groupby

from configurator import UserError, configure, progress, run

import numpy as np
import torch

from checkpoint import append_log, fetch, load_model, read_config
from data import (get_batch, get_rows, likelihood_figures, load_data, num_rows,
                  tokenizer_difference)
from device import pick_device, pick_dtype, start_distributed
from diffusion import ar_nll, cross_entropy, evaluate
from sample import (CHECKS, SAMPLER_OPTIONS, choose_sampler, denoise, describe_sampler, load,
                    sample_prior, text_length)

out_dir = 'out'              # the model to evaluate, as train.py left it; or hf:org/name
# --- likelihood
dataset = ''                 # a folder in data_dir; '' is the one it was trained on
data_dir = 'data'
split = 'val'                # 'val' or 'train'
draws = 1                    # noise levels for each row; the error shrinks with their number
max_rows = 0                 # of the split, evenly spaced; 0 is all
batch_size = 16
# --- samples
gen_ppl = ''                 # the judge: an AR run (a folder, hf:org/name), or a model of the hub
num_samples = 256            # a reverse PPL needs 30,000 tokens or more in all
length = 0                   # tokens in a sample; 0: as many as the model was trained on
sampler = 'ancestral'        # as published; see sample.py
steps = '8,32,128'           # numbers of sampling steps, with commas between them
temperature = '1.0'          # temperatures likewise
seed = 1337
# --- tasks of lm_eval
lm_eval = ''                 # their names, with commas; --max_rows questions of each
lm_eval_tasks = ''           # a folder with tasks of your own (YAML)
lm_eval_draws = 32           # noise levels for each answer
# --- system
device = 'auto'
dtype = 'float32'            # 'bfloat16', 'float16': faster on a GPU; 'auto': as train.py does

CHECKS = CHECKS + [
    ('draws lm_eval_draws', lambda v: 1 <= v <= 1e6, 'from 1 to 1,000,000'),
    ('max_rows', lambda v: v >= 0, 'at least 0'),
    ('split', lambda v: v in ('train', 'val'), "'train' or 'val'"),
]


def find_data(info):
    """The name of the data set, and what load_data returns of it."""
    name = dataset or info['settings'].get('dataset')
    if not name:
        raise UserError(f'{out_dir} does not say what it was trained on: add --dataset=NAME')
    meta, data = load_data(f'{data_dir}/{name}')
    if tokenizer_difference(meta, info['data']):
        raise UserError(f"{name} has another tokenizer than the model: prepare it with the model's")
    return name, meta, data


def likelihood(model, info, rank, world):
    """The figures of the metric on the chosen split, a dict."""
    objective = info['objective']
    block_size = info['model']['block_size']
    name, meta, data = find_data(info)
    stream = data[split]
    # 1. ROWS, shuffled, as the times grow with a row's number
    n_rows = num_rows(stream, block_size)
    rows = np.linspace(0, n_rows - 1, min(max_rows or n_rows, n_rows), dtype=int)
    np.random.default_rng(seed).shuffle(rows)

    n_draws = 1 if objective == 'ar' else draws          # AR's figure is exact

    def draw_rows(numbers):              # all rows, n_draws times over
        return get_batch(stream, rows.take(numbers, mode='wrap'), block_size, meta, device)

    # 2. NLL of each row: the mean of its draws, which are not independent of each other
    nats = evaluate(model, objective, meta['vocab_size'], draw_rows, len(rows) * n_draws,
                    batch_size, meta['pad_id'], device, rank, world)
    nats = nats.view(n_draws, -1).mean(0)
    line, figures = likelihood_figures(nats, objective, stream, rows, block_size, split)
    if rank == 0:
        bound = '' if objective == 'ar' else 'at most '
        print(f'{len(rows)} rows of {name}/{split}: {bound}{line}')
        if info['settings'].get('objective') == 'dcd':
            print('this model is distilled, for few steps: the figure is not the perplexity of a '
                  'language model')
    return dict(
        out_dir=out_dir,
        objective=objective,
        dataset=name,
        split=split,
        rows=len(rows),
        draws=n_draws,
        nll=figures['loss'],
        ppl_error=figures['ppl'] * figures['error'],
        **figures)


def diversity(rows):
    """Of token rows, averaged: unigram entropy, nats, and the share of 4-grams that stood in the
    same row before."""
    entropy = repetition = 0
    for row in rows:
        p = np.unique(row, return_counts=True)[1] / len(row)
        entropy -= p @ np.log(p)
        grams = list(zip(row, row[1:], row[2:], row[3:]))
        repetition += (len(grams) - len(set(grams))) / max(1, len(grams))
    return dict(entropy=entropy / len(rows), repetition=repetition / len(rows))


def reverse_ppl(rows, real, vocab_size):
    """Perplexity of real text under a small language model of the samples, both token rows (Zhao et
    al., arXiv 1706.04223): samples that are ungrammatical raise it, and so do samples that are all
    alike. The model: bigrams mixed with unigrams, and those with the uniform distribution, by the
    rule of Witten and Bell (1991)."""
    samples, real = np.ravel(rows).tolist(), np.ravel(real).tolist()     # one row after another
    tokens = Counter(samples)
    pairs = Counter(zip(samples, samples[1:]))
    kinds = Counter(a for a, _ in pairs)                 # of tokens that follow a
    nats = []
    for a, b in zip(real, real[1:]):
        p = (tokens[b] + len(tokens) / vocab_size) / (len(samples) + len(tokens))
        if a in kinds:
            p = (pairs[a, b] + kinds[a] * p) / (tokens[a] + kinds[a])
        nats.append(-math.log(p))
    return math.exp(np.mean(nats))


def real_rows(info, T):
    """For reverse_ppl: num_samples rows of validation text, or all if there are fewer, and as many
    of training text, in place of a perfect model's samples. Without the data set no rows, and a
    printed line that says why."""
    def some(stream, meta):
        rows = np.linspace(0, num_rows(stream, T) - 1, num_samples, dtype=int)
        return get_rows(stream, np.unique(rows), T, meta).tolist()
    try:
        _, meta, data = find_data(info)
        return some(data['val'], meta), some(data['train'], meta)
    except UserError as error:
        print(f'no reverse perplexity, because real text is missing: {error}')
        return [], []


def our_judge(folder, info, device):
    """-> score(rows), which yields the nats of the tokens in rows (N,T) by the AR model of a run,
    tensor by tensor."""
    judge, about = load_model(folder, device=device)
    if about['objective'] != 'ar' or tokenizer_difference(about['data'], info['data']):
        raise UserError(f'--gen_ppl={folder}: a judge is autoregressive, with the same vocabulary')

    def score(rows):
        for x0 in torch.tensor(rows, device=device).split(batch_size):
            yield ar_nll(judge, x0)
    return score


def hub_judge(name, tokenizer, eos_id, device):
    """The same with a Hugging Face causal LM, by the rules of the published evaluation: samples are
    decoded, tokenised again by its own tokenizer and cut to its context; only the first end-of-text
    token is scored. (The transformers of that time also removed spaces before punctuation.)
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        hub_tokenizer = AutoTokenizer.from_pretrained(name)
        judge = AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f'--gen_ppl={name}: no run here, and transformers cannot load it ({error})')
    judge.to(device).requires_grad_(False)
    window = getattr(judge.config, 'max_position_embeddings', 1024)

    def score(rows):
        for row in rows:
            text = ''
            for is_eos, ids in groupby(row, lambda i: i == eos_id):
                ids = list(ids)
                text += hub_tokenizer.eos_token * len(ids) if is_eos else tokenizer.decode(ids)
            if text:
                ids = torch.tensor(hub_tokenizer(text).input_ids[:window], device=device)
                is_eos = ids == hub_tokenizer.eos_token_id
                scored = ~is_eos | (is_eos.cumsum(0) == 1)
                nats = cross_entropy(judge(ids[None]).logits[0, :-1], ids[1:])
                yield nats[scored[1:]]
    return score


def sampling_trials(info, T):
    """The samplers' options for each number of steps and each temperature: a list of dicts."""
    all_steps = [T - 1] if info['objective'] == 'ar' else steps.split(',')
    options = {name: globals()[name] for name in SAMPLER_OPTIONS}
    try:
        return [choose_sampler(info, options | {'steps': int(n), 'temperature': float(t)})
                for n in all_steps for t in temperature.split(',')]
    except ValueError:
        raise UserError(f'--steps={steps} --temperature={temperature}: give numbers with commas '
                        'between, like 8,32')


def judge_samples(loaded, autocast):
    """Samples of each of sampling_trials, and their figures: a list of dicts."""
    info = loaded.info
    T = text_length(info, length, num_samples)
    vocab_size = info['data']['vocab_size']
    trials = sampling_trials(info, T)
    if 'objective' in read_config(fetch(gen_ppl)):       # a folder of ours, or hf:org/name
        judge = our_judge(gen_ppl, info, device)
    else:
        name = gen_ppl.removeprefix('hf:')
        judge = hub_judge(name, loaded.tokenizer, info['data']['eos_id'], device)
    real, train = real_rows(info, T)
    ideal = reverse_ppl(train, real, vocab_size) if real else None
    folder = '.' if out_dir.startswith('hf:') else out_dir
    results = []
    with open(f'{folder}/gen.jsonl', 'a', buffering=1) as file:
        for trial in trials:
            torch.manual_seed(seed)
            began = time.time()
            rows = []
            batches = sample_prior(info, (num_samples, T), device).split(batch_size)
            for xt in progress(batches, 'samples'):
                with autocast:
                    for xt in denoise(loaded, xt, **trial):
                        pass
                rows += xt.tolist()
            seconds = time.time() - began
            nats = [nat for scored in judge(rows) for nat in scored.flatten().tolist()]
            r = trial | diversity(rows) | dict(
                out_dir=out_dir,
                judge=gen_ppl,
                seed=seed,
                num_samples=num_samples,
                sampler=describe_sampler(trial | {'temperature': 1.0}),
                gen_ppl=torch.tensor(nats, dtype=torch.float64).mean().exp().item(),
                samples_per_s=num_samples / seconds)
            if not math.isfinite(r['gen_ppl']):
                raise UserError(f'--gen_ppl={gen_ppl}: the judge finds a perplexity of '
                                f'{r["gen_ppl"]}')
            results.append(r)
            line = f'{r["sampler"]}, {r["steps"]:4} steps, temperature {r["temperature"]}: ' \
                   f'Gen-PPL {r["gen_ppl"]:.2f}, entropy {r["entropy"]:.3f} nats, repetition ' \
                   f'{r["repetition"]:.3f}, {r["samples_per_s"]:.2f} samples/s'
            if real:
                r['reverse_ppl'] = reverse_ppl(rows[:len(train)], real, vocab_size)
                r['reverse_ppl_real'] = ideal
                line += f', reverse PPL {r["reverse_ppl"]:.1f} (of real text {ideal:.1f})'
            append_log(file, r)
            print(line, flush=True)
    return results


def evaluate_tasks(loaded):
    """The figures of lm_eval's tasks, a dict. Tasks that generate text use the last of --steps."""
    try:
        from harness import run_tasks
    except ImportError as error:
        raise UserError(f'--lm_eval={lm_eval}: pip install lm_eval ({error})')
    options = sampling_trials(loaded.info, loaded.info['model']['block_size'])[-1]
    names = lm_eval.split(',')
    figures = run_tasks(loaded, names, lm_eval_tasks, max_rows, lm_eval_draws, options)
    return dict(out_dir=out_dir, **figures)


def main():
    global device
    globals().update(configure(SAMPLER_OPTIONS | globals(), CHECKS))
    device, rank, world = start_distributed(pick_device(device))
    autocast = pick_dtype(dtype, device)[1]
    if gen_ppl and lm_eval or world > 1 and (gen_ppl or lm_eval):
        raise UserError('--gen_ppl and --lm_eval: give one of them, and start without torchrun')
    if gen_ppl:
        print(json.dumps(judge_samples(load(out_dir, device), autocast)))
        return
    with autocast:
        if lm_eval:
            result = evaluate_tasks(load(out_dir, device))
        else:
            result = likelihood(*load_model(out_dir, device=device), rank, world)
    if rank == 0:
        append_log(sys.stdout, result)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    run(main)
