"""
How good is it? The negative log-likelihood of held-out text, and what others make of its samples:

    python eval.py --out_dir=out --draws=4                         # NLL, BPD, PPL with standard error, all of the split
    torchrun --nproc_per_node=8 eval.py --out_dir=out-owt-duo      # the same, shared
    python eval.py --gen_ppl=out-ar --gen_steps=1,2,4,8,16,32,128  # samples, scored by an AR model of ours
    python eval.py --gen_ppl=gpt2-large --gen_temperatures=0.8,0.9,1.0   # or by one of the Hugging Face hub

Diffusion models get a bound (the true NLL is below it), autoregressive ones the exact value. Published bounds are the
diffusion term alone: they leave out the prior term, KL(q(x1|x0) || uniform), which --parts adds; the reconstruction
term is zero, as alpha(0) = 1. The last line printed is JSON; Gen-PPL also writes out_dir/gen.jsonl, for plot.py --gen.
"""
import json
import math
import os
import signal
import time
from collections import Counter
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import load_model, pick_device, pick_dtype
from configurator import configure
from data import get_rows, load_data, load_tokenizer, num_rows, same_tokenizer, words_per_row
from diffusion import (alpha_linear, blank, check_sampler, cross_entropy, evaluate, loss_of, mean_and_error,
                       reverse_process, token_nll)

out_dir = 'out'              # the model to evaluate, as train.py left it
init_from = ''               # instead of out_dir: hf:org/name, a folder, or an official .ckpt
weights = 'ema'              # 'ema', or 'raw': the weights as they were trained
# --- likelihood
dataset = ''                 # a folder in data_dir; '' is the one it was trained on
data_dir = 'data'
split = 'val'                # 'val' or 'train'
draws = 1                    # times and noises for each row; the error shrinks with their number
max_rows = 0                 # of the split, evenly spaced; 0 is all
batch_size = 16
parts = False                # the bound's terms one by one
# --- samples
gen_ppl = ''                 # a judge: the folder of an AR model of ours, or a Hugging Face causal LM (name or folder)
gen_steps = '8,32,128'       # network calls to sample with
gen_temperatures = '1.0'     # of the sampled softmax: together with entropy, the frontier of quality and diversity
gen_samples = 64
gen_length = 0               # tokens in a sample; 0: as many as the model was trained on
gen_greedy = False           # the greedy tail
sampler = 'ancestral'        # as in sample.py, and so are the next four
psi = 'rescale'
eta = 0.0
settle = 0.1
top_p = 0.0
seed = 1337
# --- system
device = 'auto'
dtype = 'float32'            # 'bfloat16', 'float16': faster on a GPU; 'auto': what train.py would take


def numbers(name, text, kind):
    try:
        return [kind(word) for word in text.split(',')]
    except ValueError:
        raise SystemExit(f'--{name}={text}: give numbers with commas between them, like 8,32')


def prior_term(vocab_size):
    """KL(q(x1|x0) || uniform), nats per token: what the process has not forgotten at t = 1."""
    alpha = alpha_linear(torch.ones(1, dtype=torch.float64))[0].item()
    true, other = alpha + (1 - alpha) / vocab_size, (1 - alpha) / vocab_size
    return true * math.log(true * vocab_size) + (vocab_size - 1) * other * math.log(other * vocab_size)


def likelihood(model, info, device, autocast, rank=0, world=1):
    data, objective = info['data'], info['objective']
    meta, tokens = load_data(os.path.join(data_dir, dataset or info['settings']['dataset']))
    if not same_tokenizer(meta, data):
        raise SystemExit(f'{meta.get("name")} has another tokenizer than {out_dir} was trained on: prepare it anew')
    T, K = info['model']['block_size'], data['vocab_size']
    n_rows = num_rows(tokens[split], T)
    rows = np.linspace(0, n_rows - 1, min(max_rows or n_rows, n_rows)).astype(np.int64)
    times = 1 if objective == 'ar' else draws                              # an exact number needs no second look
    n = len(rows) * times
    order = np.random.default_rng(seed).permutation(n)                     # rows and times must not march in step
    fetch = lambda i: torch.from_numpy(get_rows(tokens[split], rows[order[list(i)] % len(rows)], T, meta)).to(device)
    nats = lambda x0, t: token_nll(model, x0, t, K, objective, loss_of(objective, K))
    with autocast:
        each = evaluate(nats, fetch, n, batch_size, device, rank, world, meta['pad_id'])
    each = each[np.argsort(order)].view(times, len(rows)).mean(0)          # a row's draws are not independent: rows are
    nll, error = mean_and_error(each)
    ppl = math.exp(min(nll, 99))
    words = words_per_row(tokens[split], rows, T)
    scored = words + 2 - (objective == 'ar')                               # AR is given the first word of a row
    bytes_per_row = words * meta[f'{split}_bytes'] / meta[f'{split}_tokens']
    result = dict(out_dir=out_dir, objective=objective, dataset=meta.get('name'), split=split, rows=len(rows),
                  draws=times, exact=objective == 'ar', nll=nll, error=error, bpd=nll / math.log(2), ppl=ppl,
                  ppl_error=ppl * error, bits_per_byte=nll * scored / bytes_per_row / math.log(2))
    if parts:
        result.update(diffusion_term=nll, prior_term=prior_term(K), reconstruction_term=0.0, bound=nll + prior_term(K))
    return result


def diversity(rows):
    """Of token rows: unigram entropy (nats) of each, averaged; the share of 1- and 2-grams that are distinct; the share
    of 4-grams that stood in the same row before."""
    entropy, distinct = [], {n: [] for n in (1, 2, 4)}
    for row in rows:
        p = np.array(list(Counter(row).values())) / len(row)
        entropy.append(-(p * np.log(p)).sum())
        for n in distinct:
            grams = [tuple(row[i:i + n]) for i in range(len(row) - n + 1)]
            distinct[n].append(len(set(grams)) / max(1, len(grams)))
    mean = lambda v: float(np.mean(v))
    return dict(entropy=mean(entropy), distinct_1=mean(distinct[1]), distinct_2=mean(distinct[2]),
                repetition=1 - mean(distinct[4]))


def our_judge(folder, info, device):
    """rows (N,T) of ids -> summed nats and number of tokens scored, by an AR checkpoint of ours."""
    judge, about = load_model(folder, device=device)
    if about['objective'] != 'ar':
        raise SystemExit(f'--gen_ppl={folder} is no judge: a {about["objective"]} model, not an autoregressive one')
    if not same_tokenizer(about['data'], info['data']):
        raise SystemExit(f'--gen_ppl={folder} was trained with another vocabulary than {out_dir}: no fair judge')

    @torch.no_grad()
    def score(rows):
        nats = 0.0
        for x in torch.tensor(rows, device=device).split(batch_size):
            nats += token_nll(judge, x, None, info['data']['vocab_size'], 'ar', cross_entropy).sum().item()
        return nats, len(rows) * (len(rows[0]) - 1)
    return score


def hub_judge(name, tokenizer, eos_id, device):
    """The same by a Hugging Face causal LM, by the published evaluation's rules: samples are decoded, tokenised anew by
    its own tokenizer and cut to its context; of end-of-text tokens only the first is scored."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise SystemExit(f'--gen_ppl={name}: no run of ours, and a hub model needs a package: pip install transformers')
    try:
        words, judge = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except Exception as e:
        raise SystemExit(f'--gen_ppl={name}: cannot load it ({" ".join(str(e).split())[:160]})')

    @torch.no_grad()
    def score(rows):
        nats, count = 0.0, 0
        window = getattr(judge.config, 'max_position_embeddings', 1024)
        for row in rows:
            runs = ((end, list(ids)) for end, ids in groupby(row, eos_id.__eq__))
            text = ''.join(words.eos_token * len(ids) if end else tokenizer.decode(ids) for end, ids in runs)
            ids = torch.tensor(words(text)['input_ids'][:window], device=device)
            if len(ids) > 1:
                ends = ids == words.eos_token_id
                keep = (~ends | (ends.cumsum(0) == 1))[1:]
                each = cross_entropy(judge(ids[None]).logits[0, :-1], ids[1:], torch.ones_like(ids[1:]))
                nats, count = nats + (each * keep).sum().item(), count + keep.sum().item()
        return nats, max(1, count)
    return score


def samples_judged(model, info, tokenizer, device, autocast):
    data, objective = info['data'], info['objective']
    K = data['vocab_size']
    length = gen_length or info['model']['block_size']
    ours = os.path.exists(os.path.join(gen_ppl, 'log.jsonl'))
    judge = our_judge(gen_ppl, info, device) if ours else hub_judge(gen_ppl, tokenizer, data['eos_id'], device)
    results, (psi_eta, nucleus) = [], check_sampler(objective, sampler, psi, eta, top_p)
    name = {'psi': f'psi {psi} {psi_eta:g}', 'commit': f'commit {settle:g}'}.get(sampler, sampler)
    name += f', top-p {nucleus:g}' * (nucleus < 1) + ', greedy tail' * gen_greedy
    for steps in numbers('gen_steps', gen_steps, int) if objective != 'ar' else [length - 1]:
        for temperature in numbers('gen_temperatures', gen_temperatures, float):
            torch.manual_seed(seed)
            rows, calls, began = [], 0, time.time()
            while len(rows) < gen_samples:
                shape = min(batch_size, gen_samples - len(rows)), length
                x = blank(objective, shape, K, data['bos_id'], device)
                with autocast:
                    for x in reverse_process(model, x, objective, K, steps, None, temperature, nucleus, gen_greedy,
                                             sampler, psi, psi_eta, settle):
                        calls += len(x)
                rows += x.tolist()
            seconds = time.time() - began
            nats, count = judge(rows)
            r = dict(out_dir=out_dir, objective=objective, judge=gen_ppl, sampler=name, steps=steps,
                     calls=calls / gen_samples, temperature=temperature, gen_ppl=math.exp(nats / count),
                     **diversity(rows), samples_per_s=gen_samples / seconds)
            results.append(r)
            print(f'{name}, {steps:4} steps, temperature {temperature}: Gen-PPL {r["gen_ppl"]:.2f}, entropy '
                  f'{r["entropy"]:.3f} nats, distinct-1 {r["distinct_1"]:.3f}, distinct-2 {r["distinct_2"]:.3f}, '
                  f'repetition {r["repetition"]:.3f}, {r["samples_per_s"]:.2f} samples/s', flush=True)
    with open(os.path.join(out_dir if os.path.isdir(out_dir) else '', 'gen.jsonl'), 'a') as f:
        f.writelines(json.dumps(r) + '\n' for r in results)
    return results


if __name__ == '__main__':
    globals().update(configure(globals()))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no error
    if split not in ('train', 'val') or min(draws, batch_size, gen_samples) < 1 or min(max_rows, seed) < 0:
        raise SystemExit("--split is 'val' or 'train'; --draws, --batch_size and --gen_samples are at least 1")
    if (min(numbers('gen_steps', gen_steps, int)) < 1 or min(numbers('gen_temperatures', gen_temperatures, float)) <= 0
            or gen_length == 1 or gen_length < 0 or min(eta, settle) < 0 or eta > 1 or not 0 <= top_p <= 1):
        raise SystemExit('--gen_steps are at least 1, --gen_temperatures above 0, --gen_length is 0 or at least 2, '
                         '--top_p and --eta lie between 0 and 1, --settle is not negative')
    ddp = 'RANK' in os.environ
    rank, local_rank, world = (int(os.environ.get(*d)) for d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    device = pick_device(device)
    if ddp:
        device = f'cuda:{local_rank}' if device == 'cuda' else device
        if device.startswith('cuda'):
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
        if gen_ppl:
            raise SystemExit('--gen_ppl runs in one process: leave torchrun out')
    dtype, autocast = pick_dtype(dtype, device)
    out_dir = init_from or out_dir
    model, info = load_model(out_dir, weights, device)
    if not (gen_ppl or dataset or info['settings']):
        raise SystemExit(f'{out_dir} does not say what it was trained on: name a data set with --dataset')
    if parts and info['objective'] != 'duo':
        raise SystemExit(f'--parts are those of Duo\'s bound, and {out_dir} is a {info["objective"]} model')
    if gen_ppl:
        result = samples_judged(model, info, load_tokenizer(info['data'], info['folder']), device, autocast)
    else:
        result = likelihood(model, info, device, autocast, rank, world)
        if rank == 0:
            r = result
            print(f'{r["rows"]} rows of {r["dataset"]}/{split}: {"" if r["exact"] else "at most "}{r["nll"]:.4f} +- '
                  f'{r["error"]:.4f} nats per token, {r["bpd"]:.4f} bits, PPL {r["ppl"]:.2f} +- {r["ppl_error"]:.2f}, '
                  f'{r["bits_per_byte"]:.4f} bits per byte')
            if parts:
                print(f'diffusion term {r["nll"]:.4f} + prior term {r["prior_term"]:.6f} + reconstruction term 0 '
                      f'= {r["bound"]:.4f}')
    if rank == 0:
        print(json.dumps(result))
    if ddp:
        dist.destroy_process_group()
