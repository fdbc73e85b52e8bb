"""
Denoise text out of pure noise, all words at once, with a model that train.py left in out_dir:

    python sample.py --steps 8                                     # 8 steps, and one call more for the last noise
    python sample.py --prompt "def main():" --watch                # go on from a prompt; see the words settle
    python sample.py --prompt "def f(x):" --suffix "    return y"  # fill in what stands between the two
"""
import time

import torch

from checkpoint import export, load_model, pick_device, pick_dtype
from configurator import configure
from data import load_tokenizer
from diffusion import blank, generate

# --- what to sample
out_dir = 'out'              # where train.py left the model
init_from = ''               # instead of out_dir: hf:org/name, a folder, or an official .ckpt
weights = 'ema'              # 'ema', or 'raw': the weights as they were trained, without averaging
steps = 128                  # network calls in the loop; removing the last noise takes one more (AR: one a token)
num_samples = 3
length = 0                   # tokens in a text; 0: as many as the model was trained on
prompt = ''                  # text to begin with; it stays as it is
suffix = ''                  # text to end with; likewise
# --- how
temperature = 1.0            # of the network's softmax; below 1 is safer and duller
top_p = 1.0                  # draw from the likeliest words that hold this much probability
greedy = False               # the greedy tail: the last call takes the likeliest words
seed = 1337
# --- where to
watch = False                # show the first text while it denoises
out = ''                     # a file to write the texts to, instead of printing them
export_official = ''         # a new folder: write the model there as the authors' code reads it, and stop
device = 'auto'              # 'cuda', 'mps', 'cpu', or the best there is
dtype = 'float32'            # 'bfloat16', 'float16': faster on a GPU; 'auto': what train.py would take
compile = False              # torch.compile: pays for many samples


def load(out_dir='out', weights='ema', device='cpu'):
    """model, tokenizer, info (config.json's dict) of a trained run."""
    model, info = load_model(out_dir, weights, device)
    return model, load_tokenizer(info['data'], info['folder']), info


def first_words(tokenizer, info, num_samples, length, prompt='', suffix='', device='cpu'):
    """xt (num_samples, length), noise around the prompt and suffix, and where those stand: fixed, a mask of that shape.
    Trained rows begin with bos and end with eos, so a given beginning or end has that word too."""
    data, objective = info['data'], info['objective']
    if suffix and objective == 'ar':
        raise SystemExit('an autoregressive model cannot look ahead to a --suffix: it takes a --prompt only')
    begin = [data['bos_id']] + tokenizer.encode(prompt) if prompt else []
    end = tokenizer.encode(suffix) + [data['eos_id']] if suffix else []
    if len(begin) + len(end) >= length:
        raise SystemExit(f'prompt and suffix take {len(begin) + len(end)} tokens of {length}: shorten them, or give a '
                         'larger --length')
    x = blank(objective, (num_samples, length), data['vocab_size'], data['bos_id'])
    fixed = torch.zeros_like(x, dtype=torch.bool)
    for place, ids in ((slice(0, len(begin)), begin), (slice(length - len(end), length), end)):
        x[:, place], fixed[:, place] = torch.tensor(ids, dtype=torch.long), True
    return x.to(device), fixed.to(device)


if __name__ == '__main__':
    globals().update(configure(globals()))
    for name, value, good in (('steps', steps, steps > 0), ('num_samples', num_samples, num_samples > 0),
                              ('length', length, length == 0 or length > 1), ('seed', seed, seed >= 0),
                              ('temperature', temperature, temperature > 0),
                              ('top_p', top_p, 0 < top_p <= 1)):
        if not good:
            raise SystemExit(f'--{name}={value} makes no sense: see --help')
    device = pick_device(device)
    dtype, autocast = pick_dtype(dtype, device)
    if export_official:
        raise SystemExit(export(*load_model(init_from or out_dir, weights), export_official))
    model, tokenizer, info = load(init_from or out_dir, weights, device)
    if compile and info['objective'] != 'ar':  # a text that grows would be compiled at every word
        model.hidden = torch.compile(model.hidden)
    torch.manual_seed(seed)
    length = length or info['model']['block_size']
    x, fixed = first_words(tokenizer, info, num_samples, length, prompt, suffix, device)

    began = time.time()
    with autocast:
        for calls, x in enumerate(generate(model, x, info['objective'], info['data']['vocab_size'], steps, fixed,
                                           temperature, top_p, greedy), 1):
            if watch:  # clear the terminal, write the text
                print(f'\x1b[H\x1b[2J{tokenizer.decode(x[0].tolist())}\n\n[call {calls}]', flush=True)
    seconds = time.time() - began
    texts = [tokenizer.decode(row) for row in x.tolist()]
    if out:
        try:
            with open(out, 'w', encoding='utf-8') as f:
                f.write(''.join(f'{text}\n{"-" * 80}\n' for text in texts))
        except OSError as e:
            raise SystemExit(f'cannot write --out {out}: {e.strerror}')
    else:
        for text in texts:
            print('-' * 80, text, sep='\n')
        print('-' * 80)
    print(f'{calls} network calls for {num_samples} texts of {x.size(1)} tokens: {seconds:.1f} s')
