"""
Denoise text out of pure noise, all tokens at once, with a model that train.py left in out_dir:

    python sample.py --steps 8                       # 8 network calls, and one for the last noise
    python sample.py --prompt "def main():" --watch  # go on from a prompt; watch it denoise
    python sample.py --prompt "def f(x):" --suffix "    return y"    # fill in between the two
    python sample.py --infill "for[[2]] in range([[3]]):"            # fill holes of 2 and 3 tokens
    python sample.py --prompts lines.txt --out texts.jsonl           # a prompt a line, JSON lines
    python sample.py --score lines.txt               # how likely each line of a file is
    python sample.py --html denoising.html           # a page with a slider over the steps

or, in a notebook (generate, infill, edit, score, token_probs):

    from sample import load, generate
    model = load('out')
    print(generate(model, 'def main():', steps=32)[0])
"""
import inspect
import json
import math
import os
import re
import sys
import time
from collections import namedtuple
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from configurator import UserError, check, configure, progress, run

import numpy as np
import torch

from checkpoint import load_model
from data import load_tokenizer
from device import pick_device, pick_dtype, say
from diffusion import (ar_nll, categorical, cross_entropy, gibbs_step, masked_reverse_step,
                       noise_schedule, per_token, q_sample, reverse_step, stratified_times,
                       token_nll, top_p_filter)

# --- what to sample
out_dir = 'out'              # where train.py left the model; or hf:org/name
num_samples = 3              # texts per prompt
length = 0                   # tokens in a text; 0: as many as the model was trained on
prompt = ''                  # text to begin with; it stays as it is
suffix = ''                  # text to end with; likewise
prompts = ''                 # a file of prompts, one per line, instead
TASKS = dict(
    infill='',               # a text with holes, instead: [[8]] tokens, or [[words]] to replace
    score='',                # a file: say how likely each of its lines is, and sample nothing
)
seed = 1337
# --- how: the samplers' options, also eval.py's settings and generate()'s keywords
SAMPLER_OPTIONS = dict(
    sampler='auto',          # 'ancestral', the paper's; 'psi' (Duo, MDLM) and 'informed' (Duo)
                             # correct earlier tokens; 'auto': informed for a Duo, else ancestral
    steps=128,               # network calls; the last noise takes one more (AR: one a token)
    temperature=1.0,         # of the network's softmax; below 1 is safer and duller
    top_p=0.0,               # draw from the likeliest tokens that hold this probability; 0: 0.9 for
                             # informed, else 1
    greedy=False,            # of a Duo: the last call takes the likeliest tokens
    psi='rescale',           # the kind of psi: 'rescale' or 'cap'. Published for a Duo, 256 steps:
    eta=0.05,                # rescale with eta 0.05, cap with 0.01, both with top_p 0.9
    redraws=1.5,             # informed: how often a token is redrawn on average; more: less diverse
    alpha_min=0.8,           # informed: the noise level (alpha) that it assumes at first
    alpha_max=0.99,          # and at the end
)
# --- where to
watch = False                # show the first text while it denoises
html = ''                    # a file for a page that shows the denoising (of the last batch)
out = ''                     # a file for the texts as JSON lines, instead of printing them
batch_size = 16              # texts at a time
device = 'auto'              # 'cuda', 'cpu', or the best there is
dtype = 'float32'            # 'bfloat16', 'float16': faster on a GPU; 'auto': as train.py does

T_END = 1e-5                 # the time from which the last call removes the noise that is left
SCORED_TOKENS = 2 ** 15      # in a network call, noise draws included
CHECKS = [
    ('num_samples batch_size', lambda v: 1 <= v < 2 ** 63, 'at least 1 and below 2^63'),
    ('length', lambda v: v == 0 or v >= 2, '0 or at least 2'),
    ('seed', lambda v: 0 <= v < 2 ** 64, 'at least 0 and below 2^64'),
]
EXCLUDED = dict(             # options that cannot be combined
    score='infill prompts prompt suffix length out html watch',
    infill='prompts prompt suffix length',
    prompts='prompt',
)


Loaded = namedtuple('Loaded', 'model tokenizer info')      # info: config.json's


def load(where='out', device='auto'):
    """What the functions below take. where: a folder of train.py's, or hf:org/name."""
    model, info = load_model(where, device=pick_device(device))
    return Loaded(model, load_tokenizer(info['data'], info['folder']), info)

# --------------------------------------------------------------------------------------------------
# the samplers: each yields xt (B,T) after every network call. step(xt, alpha, draw) is such a call
# at noise level alpha, after which draw(logits (n,K), xt (n,)) -> (n,) picks the tokens

def denoise_along(step, xt, alphas, kappas, greedy, reverse=reverse_step):
    """Reverse steps from alphas[i] to alphas[i + 1] with kappas[i] (see reverse_step), then noise
    removal: a step to alpha 1, or with greedy the likeliest tokens."""
    alphas, kappas = alphas.tolist() + [1.0], kappas.tolist() + [1.0]
    for alpha_t, alpha_s, kappa in zip(alphas, alphas[1:], kappas):
        draw = partial(reverse, alpha_s=alpha_s, alpha_t=alpha_t, kappa=kappa)
        if greedy and alpha_s == 1:
            draw = likeliest
        xt = step(xt, alpha_t, draw)
        yield xt


def likeliest(logits, xt):
    """The published rule: the argmax of p(x0_i | all other tokens). That of p(x0 | xt) would hardly
    change anything, since at the last call nearly every token of xt counts as clean."""
    return logits.argmax(-1)


def ramp(first, last, count):
    return torch.linspace(first, last, count, dtype=torch.float64)


def ancestral(step, xt, steps, greedy, reverse=reverse_step, **_):
    """The paper's sampler: each step draws from the network's reverse process (eq. 5)."""
    alphas = noise_schedule(ramp(1, T_END, steps + 1))[0]
    return denoise_along(step, xt, alphas, torch.ones(steps), greedy, reverse)


def psi_kappas(alphas, psi, eta):
    """kappa = 1 - sigma / (1 - alpha_s), within [0, 1], of each step between alphas (n + 1): the
    larger eta is, the more is noised again.

    rescale   sigma = eta min(eta, (1 - alpha_s)/alpha_t), as in the published code, where the
              rule it is named after (ReMDM, arXiv 2503.00307) has min(1, ...): a small eta
              becomes eta squared
    cap       sigma = min(eta, (1 - alpha_s)/alpha_t)
    """
    noise_s = 1 - alphas[1:]
    sigma = (noise_s / alphas[:-1]).clamp(max=eta)
    if psi == 'rescale':
        sigma *= eta
    kappas = (1 - sigma / noise_s).clamp(0, 1)
    kappas[-1] = 1
    return kappas


def psi_sampler(step, xt, steps, greedy, psi, eta, reverse=reverse_step, **_):
    """Chapter II's sampler (arXiv 2602.21185): each step noises, or masks, some tokens again, so
    that mistakes can be corrected."""
    alphas = noise_schedule(ramp(1, T_END, steps + 1))[0]
    return denoise_along(step, xt, alphas, psi_kappas(alphas, psi, eta), greedy, reverse)


def informed(step, xt, fixed, steps, greedy, redraws, alpha_min, alpha_max, **_):
    """Corrects instead of denoising: at a level alpha that rises from alpha_min to alpha_max, each
    call redraws a share of the places, the most surprising ones, from q_i = alpha p_i +
    (1 - alpha)/K (see gibbs_step); the last call removes the noise. The share falls linearly, and
    the shares sum to redraws: in any number of steps, a place is redrawn so many times on average
    (unless they are fewer than redraws).

    With one place chosen at random the move is exact: it leaves the network's distribution of noisy
    text at alpha as it is. Many places at once, chosen by surprise, make text that is likelier and
    less diverse, the more so the larger redraws is.
    """
    alphas = ramp(alpha_min, alpha_max, steps + 1)
    shares = redraws * ramp(2, 0, steps + 1)[:-1] / (steps + 1)
    n_free = (~fixed).sum(-1, keepdim=True)                                # (B,1)
    redrawn = 0                          # places so far, (B,1)
    for alpha, so_far in zip(alphas[:-1].tolist(), shares.cumsum(0).tolist()):
        surprises = []                   # draw is called a chunk of tokens at a time

        def draw(logits, x):             # (n,K), (n,) -> (n,)
            tokens, surprise = gibbs_step(logits, x, alpha)
            surprises.append(surprise)
            return tokens
        xs = step(xt, alpha, draw)
        surprise = torch.cat(surprises).view_as(xt).masked_fill(fixed, -1)
        rank = surprise.argsort(descending=True).argsort()
        target = (so_far * n_free).round()
        xt = torch.where(rank < target - redrawn, xs, xt)
        redrawn = target
        yield xt
    yield from denoise_along(step, xt, alphas[-1:], torch.ones(0), greedy)


SAMPLERS = dict(ancestral=ancestral, psi=psi_sampler, informed=informed)
SAMPLER_CHECKS = [
    ('steps', lambda v: 1 <= v <= 1e6, 'from 1 to 1,000,000'),
    ('temperature redraws', lambda v: v > 1e-30, 'above 1e-30'),      # or float32 overflows
    ('top_p', lambda v: v == 0 or 1e-30 < v <= 1, '0, or above 1e-30 and at most 1'),
    ('eta', lambda v: 0 <= v <= 1, 'from 0 to 1'),
    ('alpha_min alpha_max', lambda v: 1e-30 < v < 1, 'above 1e-30 and below 1'),
    ('sampler', lambda v: v in ['auto', *SAMPLERS], 'auto, ' + ', '.join(SAMPLERS)),
    ('psi', lambda v: v in ('rescale', 'cap'), 'rescale or cap'),
]


def shape_logits(logits, temperature, top_p, **_):
    """logits (n,K) at a temperature, cut to the nucleus."""
    logits = logits.float() / temperature
    return top_p_filter(logits, top_p) if top_p < 1 else logits


def generate_ar(model, xt, fixed, **options):
    """Autoregressive sampling: yields xt (B,T) after each token, from left to right; the first
    column is given, and so is what stands where fixed (B,T) is true. Keys and values are cached."""
    cache = [[] for _ in model.blocks]
    for i in range(1, xt.size(1)):
        h = model.hidden(xt[:, i - 1:i], cache=cache)                      # (B,1,C)
        logits = shape_logits(model.output_layer.linear(h[:, 0]), **options)
        token = categorical(logits.softmax(-1))                            # (B,)
        xt = xt.clone()
        xt[:, i] = torch.where(fixed[:, i], xt[:, i], token)
        yield xt


@torch.no_grad()
def denoise(loaded, xt, fixed=None, **options):
    """Yields xt (B,T) after each network call. xt starts as sample_prior; tokens where fixed (B,T)
    is true stay. options: the SAMPLER_OPTIONS to change."""
    model, _, info = loaded
    o = choose_sampler(info, options)
    vocab_size = info['data']['vocab_size']
    is_masked = info['objective'] == 'mdlm'
    reverse = partial(masked_reverse_step, mask_id=vocab_size) if is_masked else reverse_step
    if fixed is None:
        fixed = torch.zeros_like(xt, dtype=torch.bool)

    def step(x, alpha, draw):
        def pick(logits, x):             # (n,K), (n,) -> (n,)
            return draw(shape_logits(logits[:, :vocab_size], **o), x)
        if is_masked:
            alpha = 1.0                  # the masked network gets no time: sigma = -log(1) = 0
        sigma = torch.full(x.shape[:1], -math.log(alpha), device=x.device)
        xs = per_token(model, x, sigma, pick, [x])                         # (B,T)
        return torch.where(fixed, xt, xs)                                  # xt: the start

    if info['objective'] == 'ar':
        yield from generate_ar(model, xt, fixed, **o)
    else:
        yield from SAMPLERS[o['sampler']](step, xt, fixed=fixed, reverse=reverse, **o)


def choose_sampler(info, options):
    """SAMPLER_OPTIONS updated with options, and with 'auto' resolved; UserError if they do not fit
    the model."""
    for name in options.keys() - SAMPLER_OPTIONS.keys():
        raise UserError(f'{name} is not a sampler option: {", ".join(SAMPLER_OPTIONS)}')
    o = SAMPLER_OPTIONS | options
    check(o, SAMPLER_CHECKS)
    objective = info['objective']
    if o['sampler'] == 'auto':
        o['sampler'] = 'informed' if objective == 'duo' else 'ancestral'
    able = dict(duo=[*SAMPLERS], mdlm=['ancestral', 'psi'], ar=['ancestral'])[objective]
    if o['sampler'] not in able:
        raise UserError(f'--sampler={o["sampler"]}: this {objective} model can use '
                        + ', '.join(able))
    for name in options:
        takers = [key for key, fn in SAMPLERS.items() if name in inspect.signature(fn).parameters]
        if takers and o['sampler'] not in takers and o[name] != SAMPLER_OPTIONS[name]:
            raise UserError(f'--{name} is for --sampler={takers[0]}, not for {o["sampler"]}')
    if o['alpha_min'] > o['alpha_max']:
        raise UserError(f'--alpha_min={o["alpha_min"]} must not be above '
                        f'--alpha_max={o["alpha_max"]}')
    if not o['top_p']:
        o['top_p'] = 0.9 if o['sampler'] == 'informed' else 1.0
    if o['greedy'] and objective != 'duo':
        raise UserError(f'--greedy is for a Duo, not for this {objective} model')
    return o


def describe_sampler(options):
    """The sampler chosen, and the options that differ from the default ones, in a few words."""
    plain = SAMPLER_OPTIONS | dict(sampler=options['sampler'], steps=options['steps'], top_p=1.0)
    return ', '.join([options['sampler']] + [
        f'{name} {value}' for name, value in options.items() if value != plain[name]])

# --------------------------------------------------------------------------------------------------
# texts

def sample_prior(info, shape, device='cpu'):
    """What sampling starts from, ids (B,T): uniformly random tokens, all masks (MDLM), or for AR
    the token that begins a text."""
    data = info['data']
    if info['objective'] == 'duo':
        return torch.randint(data['vocab_size'], shape, device=device)
    start = data['vocab_size'] if info['objective'] == 'mdlm' else data['bos_id']
    return torch.full(shape, start, device=device)


def text_length(info, length, count=1):
    """The length of a text: as given, or for 0 what the model was trained on. UserError if count
    such texts are more than can be held; a warning on stderr if the model never saw any so long."""
    trained = info['model']['block_size']
    length = length or trained
    if count * length > 1e8:
        raise UserError(f'{count} texts of {length} tokens are too many at once')
    if length > trained:
        print(f'warning: {length} tokens are more than the {trained} that this model was trained '
              'on; longer texts fall apart', file=sys.stderr)
    return length


def start_tokens(loaded, prompts, num_samples=1, suffix='', length=0):
    """xt (B,T), num_samples rows per prompt: prompt, noise, suffix; and fixed (B,T), true at prompt
    and suffix. Training rows begin with bos and end with eos, so a prompt gets a bos, and a suffix
    an eos."""
    _, tokenizer, info = loaded
    data = info['data']
    length = text_length(info, length, len(prompts) * num_samples)
    if suffix and info['objective'] == 'ar':
        raise UserError('an autoregressive model cannot look ahead to a suffix: give a prompt only')
    end = tokenizer.encode(suffix) + [data['eos_id']] if suffix else []
    rows = []
    for prompt in prompts:
        begin = [data['bos_id']] + tokenizer.encode(prompt) if prompt else []
        n_free = length - len(begin) - len(end)
        if n_free < 1:
            raise UserError(f'prompt and suffix take {length - n_free} tokens of {length}: shorten '
                            'them, or give a larger --length')
        rows.append(begin + [-1] * n_free + end)
    return fill_holes(loaded, rows, num_samples)


def fill_holes(loaded, rows, num_samples=1):
    """What denoise starts from, num_samples times each of the rows, lists of ids: xt (B,T) with
    noise where an id is -1, and fixed (B,T), true elsewhere."""
    known = torch.tensor(rows).repeat_interleave(num_samples, 0)
    fixed = known >= 0
    xt = torch.where(fixed, known, sample_prior(loaded.info, known.shape))
    device = loaded.model.output_layer.linear.weight.device
    return xt.to(device), fixed.to(device)


def with_bos_eos(loaded, ids):
    """A row as in training: bos, the ids, eos."""
    data = loaded.info['data']
    return [data['bos_id'], *ids, data['eos_id']]


def start_template(loaded, template, num_samples=1):
    """xt, fixed of fill_holes for a text with holes: [[8]] is one of 8 tokens, [[some words]] one
    of as many as these words have."""
    encode = loaded.tokenizer.encode
    parts = re.split(r'\[\[(.*?)\]\]', template, flags=re.DOTALL)   # text and holes alternate
    texts = [encode(text) for text in parts[::2]]
    # twelve digits of a number suffice: so many tokens are refused
    holes = [int(hole[:12]) if hole.isdecimal() else len(encode(hole)) for hole in parts[1::2]]
    if not sum(holes):
        raise UserError('no hole in the text: [[8]] is a hole of 8 tokens')
    if loaded.info['objective'] == 'ar':
        raise UserError('an autoregressive model cannot look ahead: only diffusion models infill')
    text_length(loaded.info, sum(holes) + sum(map(len, texts)) + 2, num_samples)
    ids = [*texts[0]]
    for hole, text in zip(holes, texts[1:]):
        ids += [-1] * hole + text
    return fill_holes(loaded, [with_bos_eos(loaded, ids)], num_samples)


def decode_rows(loaded, xt):
    """The texts of xt (B,T), without a begin token at the first place or an end token at the last.
    """
    data = loaded.info['data']
    texts = []
    for row in xt.tolist():
        first = 1 if row[0] == data['bos_id'] else 0
        last = -1 if row[-1] == data['eos_id'] else None
        texts.append(loaded.tokenizer.decode(row[first:last]))
    return texts


def sample_texts(loaded, xt, fixed, **options):
    for xt in denoise(loaded, xt, fixed, **options):
        pass
    return decode_rows(loaded, xt)


def generate(loaded, prompt='', num_samples=1, suffix='', length=0, **options):
    """A list of num_samples texts that begin with prompt and end with suffix. loaded: load(...);
    length: in tokens; options: SAMPLER_OPTIONS. torch.manual_seed(...) makes it repeatable."""
    start = start_tokens(loaded, [prompt], num_samples, suffix, length)
    return sample_texts(loaded, *start, **options)


def infill(loaded, template, num_samples=1, **options):
    """A list of num_samples texts: the template with its holes filled (see start_template)."""
    return sample_texts(loaded, *start_template(loaded, template, num_samples), **options)


def edit(loaded, text, strength=0.3, num_samples=1, **options):
    """A list of num_samples variations of a text. It is noised to alpha = 1 - strength, and the
    informed sampler continues from there; only for a Duo."""
    if options.pop('sampler', 'auto') not in ('auto', 'informed'):
        raise UserError('edit needs the informed sampler')
    alpha = 1 - strength
    row = with_bos_eos(loaded, loaded.tokenizer.encode(text))
    x0, fixed = fill_holes(loaded, [row], num_samples)
    fixed[:, 1:-1] = False
    xt = torch.where(fixed, x0, q_sample(x0, alpha, loaded.info['data']['vocab_size']))
    # a top-p would replace every token that is not among the likeliest
    options = dict(top_p=1.0, alpha_min=alpha, alpha_max=max(alpha, 0.99)) | options
    return sample_texts(loaded, xt, fixed, sampler='informed', **options)

# --------------------------------------------------------------------------------------------------
# how likely a text is

def score(loaded, texts, given='', suffix='', draws=32, seed=1337):
    """Nats of each of the texts between given and suffix, and their standard errors: two (N,)
    float64. Exact for AR (suffix is not used), else an upper bound: the mean of some draws of the
    NELBO, with noise on the text alone, from the same seeds for all texts."""
    encode = loaded.tokenizer.encode
    before, after = encode(given), encode(suffix)
    dev = loaded.model.output_layer.linear.weight.device
    with torch.random.fork_rng([dev] if dev.type == 'cuda' else []):   # keep the caller's state
        parts = [(before, encode(text), after) for text in texts]
        return score_rows(loaded, parts, draws, seed)


def equally_long(rows, max_tokens=SCORED_TOKENS):
    """Yields lists of indices of equally long rows, for network calls without padding, which a
    diffusion model would see. A list has one row, or rows of at most max_tokens in all."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for length, indices in groupby(by_length, lambda i: len(rows[i])):
        indices = list(indices)
        n = max(1, max_tokens // length)
        for first in range(0, len(indices), n):
            yield indices[first:first + n]


@torch.no_grad()
def score_rows(loaded, parts, draws=32, seed=1337):
    """The same for lists of ids: parts holds (before, text, after) for each row, without bos and
    eos."""
    model, _, info = loaded
    objective = info['objective']
    if objective == 'ar':
        draws = 1
    rows = [with_bos_eos(loaded, before + text + after) for before, text, after in parts]
    seeds = np.random.SeedSequence(seed).generate_state(draws, np.uint64).tolist()
    sums = torch.zeros(len(rows), draws, dtype=torch.float64)
    for indices in equally_long(rows, SCORED_TOKENS // draws):
        n = len(indices)
        x0, fixed = fill_holes(loaded, [rows[i] for i in indices], draws)  # (n draws,T), by row
        for i, is_fixed in zip(indices, fixed.split(draws)):               # a view, (draws,T)
            before, text, _ = parts[i]
            begin = 1 + len(before)                                        # behind bos
            is_fixed[:, begin:begin + len(text)] = False
        t = stratified_times(0.5, 0, draws, draws, device=x0.device).repeat(n, 1)
        nats = token_nll(model, x0, t, info['data']['vocab_size'], objective, n * seeds, fixed)
        nats = nats.double().masked_fill(fixed[:, -nats.size(1):], 0)
        sums[indices] = nats.sum(-1).view(n, draws).cpu()
    return sums.mean(-1), sums.std(-1, correction=0) / math.sqrt(draws)


@torch.no_grad()
def token_probs(loaded, text, alpha=0.95):
    """The ids of a text's tokens, and the probability of each: for a Duo, given all others (taken
    for noisy, at alpha) in one network call; for AR, given those before it."""
    model, tokenizer, info = loaded
    if info['objective'] == 'mdlm':
        raise UserError('a masked model treats every unmasked token as correct')
    ids = tokenizer.encode(text)
    x, _ = fill_holes(loaded, [with_bos_eos(loaded, ids)])                  # (1,T)
    if info['objective'] == 'ar':
        nats = ar_nll(model, x)                                             # (1,T-1)
    else:
        sigma = torch.full_like(x[:, :1], -math.log(alpha), dtype=torch.float32)
        nats = per_token(model, x, sigma, cross_entropy, [x])               # (1,T)
    return ids, (-nats[0, -len(ids) - 1:-1]).exp().tolist()


def print_scores(loaded, lines):
    for line, nats, error in zip(lines, *score(loaded, lines, seed=seed)):
        bpb = nats / math.log(2) / max(1, len(line.encode()))
        ppl = math.exp(min(99, nats / max(1, len(loaded.tokenizer.encode(line)))))
        say(f'{nats:.2f} +- {error:.2f} nats, {bpb:.3f} bits per byte, PPL {ppl:.2f}: {line}')

# --------------------------------------------------------------------------------------------------
# the script

def denoising_page(tokenizer, frames, title):
    """The denoising frames, a list of xt (B,T), as one HTML page that needs nothing else:
    assets/denoise.html with the data in it."""
    ids, texts = torch.stack(frames, 1).unique(return_inverse=True)    # (n,), (B,frames,T)
    tokens = [tokenizer.decode([i]) for i in ids.tolist()]
    data = json.dumps(dict(tokens=tokens, texts=texts.tolist(), title=title))
    template = (Path(__file__).parent / 'assets/denoise.html').read_text('utf-8')
    return template.replace('"DATA"', data.replace('<', '\\u003c'))        # no text ends the script


PLAIN, CHANGED, CORRECTED = '\x1b[0m', '\x1b[33m', '\x1b[35m'


def watched(frames, xt, tokenizer):
    """Yield the frames that follow xt (B,T), and draw the first text of each on the terminal's
    alternate screen: tokens that this call changed are yellow, or violet if their last change was
    more than five calls before."""
    print('\x1b[?1049h', end='')
    shown = xt[0].tolist()
    age = [-math.inf] * len(shown)                       # replacing noise is not a correction
    try:
        for call, xt in enumerate(frames, start=1):
            places = []
            for i, token in enumerate(xt[0].tolist()):
                age[i] += 1
                colour = PLAIN
                if token != shown[i]:
                    colour = CORRECTED if age[i] > 5 else CHANGED
                    age[i] = 0
                shown[i] = token
                places.append((colour, token))
            text = ''
            for colour, run in groupby(places, itemgetter(0)):   # a letter may have several tokens
                text += colour + tokenizer.decode([token for _, token in run])
            print(f'\x1b[H\x1b[J{text}{PLAIN}\n\n[call {call}]', flush=True)
            yield xt
    finally:
        print('\x1b[?1049l', end='', flush=True)


def read_lines(path):
    with open(path, encoding='utf-8', errors='replace') as file:
        lines = [line.rstrip('\n') for line in file]
    if not lines:
        raise UserError(f'{path} is empty: give a file with lines')
    return lines


def main():
    utf8 = ('prompt suffix infill', lambda v: v == v.encode(errors='replace').decode(), 'UTF-8')
    settings = configure(SAMPLER_OPTIONS | globals() | TASKS, [*CHECKS, *SAMPLER_CHECKS, utf8])
    for one, others in EXCLUDED.items():
        for other in others.split():
            if settings[one] and settings[other]:
                raise UserError(f'--{one} and --{other} do not go together')
    tasks = {name: settings.pop(name) for name in TASKS}     # named like functions here
    globals().update(settings)
    loaded = load(out_dir, device)
    options = choose_sampler(loaded.info, {name: settings[name] for name in SAMPLER_OPTIONS})
    autocast = pick_dtype(dtype, pick_device(device))[1]
    if tasks['score']:
        with autocast:
            print_scores(loaded, read_lines(tasks['score']))
        return
    if watch and not os.isatty(1):
        raise UserError('--watch draws on a terminal, not into a pipe or a file')
    for path in filter(None, (html, out)):
        open(path, 'a').close()                          # it must not fail after the sampling
    lines = read_lines(prompts) if prompts else [tasks['infill'] or prompt]
    torch.manual_seed(seed)
    began = time.time()
    texts, calls = [], 0
    if tasks['infill']:
        start, fixed = start_template(loaded, tasks['infill'], num_samples)
    else:
        start, fixed = start_tokens(loaded, lines, num_samples, suffix, length)
    for xt, is_fixed in zip(start.split(batch_size), fixed.split(batch_size)):
        frames = [xt]
        denoising = denoise(loaded, xt, is_fixed, **options)
        if watch:
            denoising = watched(denoising, xt, loaded.tokenizer)
        else:
            denoising = progress(denoising, 'network calls')
        with autocast:
            frames += denoising
        calls += len(frames) - 1
        xt = frames[-1]
        texts += decode_rows(loaded, xt)
    seconds = time.time() - began

    if html:
        title = f'{out_dir}: {len(frames) - 1} network calls'
        Path(html).write_text(denoising_page(loaded.tokenizer, frames, title), 'utf-8')
    if out:
        with open(out, 'w', encoding='utf-8') as f:
            for i, text in enumerate(texts):
                record = dict(prompt=lines[i // num_samples], text=text)
                print(json.dumps(record, ensure_ascii=False), file=f)
    else:
        for text in texts:
            say(f'{"-" * 80}\n{text}')
        say('-' * 80)
    say(f'{calls} network calls for {len(texts)} texts of {xt.size(1)} tokens '
        f'({describe_sampler(options)}): {seconds:.1f} s')


if __name__ == '__main__':
    run(main)
