"""
Denoise text out of pure noise, all words at once, with a model that train.py left in out_dir:

    python sample.py --steps 8                                     # 8 steps, and one call more for the last noise
    python sample.py --prompt "def main():" --watch                # go on from a prompt; see the words settle
    python sample.py --prompt "def f(x):" --suffix "    return y"  # fill in what stands between the two
    python sample.py --prompts lines.txt --out texts.jsonl         # a prompt a line, a JSON object a text
    python sample.py --html denoising.html                         # a page with a slider over the steps

or, in a notebook:

    from sample import load, generate
    model = load('out')
    print(generate(model, 'def main():', steps=32)[0])

The samplers: 'ancestral' is the paper's; 'psi' (chapter II) also corrects words it has placed already, and wants many
steps; 'commit' keeps the words it is sure of, a heuristic. --greedy ends any of them with the likeliest words.
"""
import json
import signal
import time
from pathlib import Path

import torch

from checkpoint import export, load_model, pick_device, pick_dtype
from configurator import configure
from data import load_tokenizer
from diffusion import blank, check_sampler, reverse_process

# --- what to sample
out_dir = 'out'              # where train.py left the model
init_from = ''               # instead of out_dir: hf:org/name, a folder, or an official .ckpt
weights = 'ema'              # 'ema', or 'raw': the weights as they were trained, without averaging
steps = 128                  # network calls in the loop; removing the last noise takes one more (AR: one a token)
num_samples = 3              # texts, of each prompt
length = 0                   # tokens in a text; 0: as many as the model was trained on
prompt = ''                  # text to begin with; it stays as it is
suffix = ''                  # text to end with; likewise
prompts = ''                 # a file of prompts, one a line, instead
# --- how
sampler = 'ancestral'        # 'ancestral', 'psi', 'commit'; the last two are for a Duo
psi = 'rescale'              # kind of psi: 'rescale', 'cap', 'constant', 'loop' (diffusion.sampling_schedule)
eta = 0.0                    # how much psi re-noises; 0: as published, 0.05 for rescale, else 0.01
settle = 0.1                 # commit: words whose prediction has less entropy (nats) stay; when all do, it ends
temperature = 1.0            # of the network's softmax; below 1 is safer and duller
top_p = 0.0                  # draw from the likeliest words that hold this much probability; 0: all of it, but as
                             # published with psi, 0.9 (loop 0.95)
greedy = False               # the greedy tail: the last call takes the likeliest words
seed = 1337
# --- where to
watch = False                # show the first text while it denoises
html = ''                    # a file for a page that shows the denoising (of the first batch), with a slider
out = ''                     # a file to write the texts to, instead of printing them; *.jsonl gets JSON lines
export_official = ''         # a new folder: write the model there as the authors' code reads it, and stop
batch_size = 16              # texts at a time
device = 'auto'              # 'cuda', 'mps', 'cpu', or the best there is
dtype = 'float32'            # 'bfloat16', 'float16': faster on a GPU; 'auto': what train.py would take
compile = False              # torch.compile: pays for many samples


def load(where='out', weights='ema', device='auto'):
    """-> (model, tokenizer, info): what generate() wants; info is config.json's dict. where: a folder, hf:org/name or
    what else checkpoint.load_model takes."""
    model, info = load_model(where, weights, pick_device(device))
    return model, load_tokenizer(info['data'], info['folder']), info


def first_words(tokenizer, info, prompts, suffix='', length=0):
    """xt (B,T) for B prompts, noise around them and the suffix, and where those stand: fixed, a mask of that shape.
    Trained rows begin with bos and end with eos, so a given beginning or end has that word too."""
    data, objective = info['data'], info['objective']
    length = length or info['model']['block_size']
    if suffix and objective == 'ar':
        raise SystemExit('an autoregressive model cannot look ahead to a --suffix: it takes a --prompt only')
    x = blank(objective, (len(prompts), length), data['vocab_size'], data['bos_id'])
    fixed = torch.zeros_like(x, dtype=torch.bool)
    end = tokenizer.encode(suffix) + [data['eos_id']] if suffix else []
    for row, prompt in enumerate(prompts):
        begin = [data['bos_id']] + tokenizer.encode(prompt) if prompt else []
        if len(begin) + len(end) >= length:
            raise SystemExit(f'prompt and suffix take {len(begin) + len(end)} tokens of {length}: shorten them, or '
                             'give a larger --length')
        for place, ids in ((slice(0, len(begin)), begin), (slice(length - len(end), length), end)):
            x[row, place], fixed[row, place] = torch.tensor(ids, dtype=torch.long), True
    return x, fixed


def frames(loaded, prompts=('',), suffix='', length=0, steps=128, **how):
    """Yields xt (B,T), a row for each of B prompts, as noise and then after each network call. how: temperature, top_p,
    greedy, sampler, psi, eta, settle, as in diffusion.reverse_process."""
    model, tokenizer, info = loaded
    how['eta'], how['top_p'] = check_sampler(info['objective'], **how)
    device = model.output_layer.linear.weight.device
    x, fixed = (v.to(device) for v in first_words(tokenizer, info, prompts, suffix, length))
    yield x
    yield from reverse_process(model, x, info['objective'], info['data']['vocab_size'], steps, fixed, **how)


def generate(loaded, prompt='', num_samples=1, **how):
    """A list of num_samples texts that begin with prompt. loaded: load(...). how: suffix, length (tokens), steps, and
    what else frames() takes; torch.manual_seed(...) first makes it repeatable."""
    *_, x = frames(loaded, [prompt] * num_samples, **how)
    return [loaded[1].decode(row) for row in x.tolist()]


def page(tokenizer, xts, calls):
    """The denoising xts, a list of (B,T), as one HTML page that needs nothing else: assets/denoise.html with the data
    in it. Each place of a text holds its words and when they came: [frame, word, frame, word, ...]."""
    words, texts = {}, []
    for row in torch.stack(xts, dim=-1).tolist():                     # (B,T,frames)
        texts.append([[n for i, word in enumerate(place) if i == 0 or word != place[i - 1]
                       for n in (i, words.setdefault(word, len(words)))] for place in row])
    data = dict(words=[tokenizer.decode([word]) for word in words], texts=texts, frames=len(xts), title=calls)
    template = (Path(__file__).parent / 'assets' / 'denoise.html').read_text(encoding='utf-8')
    return template.replace('"DATA"', json.dumps(data).replace('<', '\\u003c'))   # no text may end the script


def write_text(name, path, text):
    try:
        Path(path).write_text(text, encoding='utf-8')
    except OSError as e:
        raise SystemExit(f'cannot write --{name}={path}: {e.strerror}')


if __name__ == '__main__':
    globals().update(configure(globals()))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no error
    for name, value, good in (('steps', steps, steps > 0), ('num_samples', num_samples, num_samples > 0),
                              ('batch_size', batch_size, batch_size > 0), ('settle', settle, settle >= 0),
                              ('length', length, length == 0 or length > 1), ('seed', seed, seed >= 0),
                              ('temperature', temperature, temperature > 0), ('eta', eta, 0 <= eta <= 1),
                              ('top_p', top_p, 0 <= top_p <= 1)):
        if not good:
            raise SystemExit(f'--{name}={value} makes no sense: see --help')
    device = pick_device(device)
    dtype, autocast = pick_dtype(dtype, device)
    if export_official:
        raise SystemExit(export(*load_model(init_from or out_dir, weights), export_official))
    model, tokenizer, info = loaded = load(init_from or out_dir, weights, device)
    eta, top_p = check_sampler(info['objective'], sampler, psi, eta, top_p)
    lines = [prompt]
    if prompts:
        try:
            lines = Path(prompts).read_text(encoding='utf-8').splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise SystemExit(f'cannot read --prompts={prompts}: {e}')
        if prompt or not lines:
            raise SystemExit(f'--prompts={prompts} ' + ('and --prompt: give one of them' if prompt else 'has no lines'))
    lines = [line for line in lines for _ in range(num_samples)]
    first_words(tokenizer, info, lines, suffix, length)                 # too long a line should not wait for its batch
    if compile and info['objective'] != 'ar':  # a text that grows would be compiled at every word
        model.hidden = torch.compile(model.hidden)
    torch.manual_seed(seed)

    began, texts, calls, shown = time.time(), [], 0, []
    for i in range(0, len(lines), batch_size):
        with autocast:
            for call, x in enumerate(frames(loaded, lines[i:i + batch_size], suffix, length, steps, sampler=sampler,
                                            psi=psi, eta=eta, settle=settle, temperature=temperature, top_p=top_p,
                                            greedy=greedy)):
                if watch:  # clear the terminal, write the text
                    print(f'\x1b[H\x1b[2J{tokenizer.decode(x[0].tolist())}\n\n[call {call}]', flush=True)
                if html and i == 0:
                    shown.append(x.cpu())
        texts += [tokenizer.decode(row) for row in x.tolist()]
        calls += call
    seconds = time.time() - began
    if html:
        write_text('html', html, page(tokenizer, shown, f'{init_from or out_dir}: {len(shown) - 1} network calls'))
    if out.endswith('.jsonl'):
        records = (dict(prompt=line, text=text) for line, text in zip(lines, texts))
        write_text('out', out, ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records))
    elif out:
        write_text('out', out, ''.join(f'{text}\n{"-" * 80}\n' for text in texts))
    else:
        for text in texts:
            print('-' * 80, text, sep='\n')
        print('-' * 80)
    name = {'psi': f'psi {psi}, eta {eta:g}', 'commit': f'commit below {settle:g} nats'}.get(sampler, sampler)
    name += f', top-p {top_p:g}' * (top_p < 1) + ', greedy tail' * greedy
    how = f' ({name})' if info['objective'] != 'ar' else ''
    print(f'{calls} network calls for {len(texts)} texts of {x.size(1)} tokens{how}: {seconds:.1f} s')
