"""
What a run leaves behind, written whole or not at all, and what others left, read without executing anything.

out_dir/step-00000600.pt    everything a resume needs, at some last steps; the newest is also
out_dir/last.pt
out_dir/model.safetensors   the EMA weights, and
out_dir/config.json         all else that sampling, evaluating or sharing needs, with
out_dir/tokenizer.json      where the tokenizer is our own
out_dir/README.md           its card on the Hugging Face hub
"""
import hashlib
import json
import os
import re
import shlex
import shutil
import zipfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from data import check_meta
from configurator import UserError
from model import DiT, DiTConfig

# What the authors' config.json calls the fields of DiTConfig, and the models of theirs that I know as one of mine.
AUTHORS = dict(vocab_size='vocab_size', model_length='block_size', n_blocks='n_layer', n_heads='n_head',
               hidden_dim='n_embd', cond_dim='cond_dim', causal='causal')
KINDS = dict(duo='duo', duo_base='duo', distillation='duo', udlm='duo', mdlm='mdlm', ar='ar')
WRAPPERS = re.compile(r'\b(backbone|module|_orig_mod|model)\.')  # what others put before the names of parameters
STATE = dict(weights=dict, ema=dict, optimizers=list, scaler=dict, teacher=dict | None, step=int, model=dict,
             settings=dict, seconds=float, skipped=int, fingerprint=str)  # what a resume takes
# Beside tensors their .ckpt files hold settings and a tokenizer, objects of these modules.
HARMLESS = re.compile(r'(omegaconf|transformers|tokenizers|lightning|pytorch_lightning|typing)\.'
                      r'|collections\.defaultdict$|builtins\.(dict|list|tuple|int|float|str|bool|object)$')


def pick_device(device):
    """'auto' -> the best there is; any other name is checked."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind = device.split(':')[0]
    if kind not in ('cuda', 'mps', 'cpu') or kind != 'cpu' and not getattr(torch, kind).is_available() or (
            kind == 'cuda' and device[5:] not in ('', *map(str, range(torch.cuda.device_count())))):
        raise UserError(f"--device={device}: torch sees no such device here; 'auto' takes the best there is")
    return device


def pick_dtype(dtype, device):
    """-> dtype's name, autocast context. 'auto': bf16 where the GPU has it, fp16 where not; float32 off the GPU."""
    kind = device.split(':')[0]
    if dtype == 'auto':  # a T4 only emulates bf16: I ask the hardware
        bf16 = kind == 'cuda' and torch.cuda.get_device_capability(device)[0] >= 8
        dtype = 'bfloat16' if bf16 else 'float16' if kind == 'cuda' else 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f"--dtype={dtype}: it is 'float32', 'bfloat16', 'float16' or 'auto'")
    return dtype, nullcontext() if dtype == 'float32' else torch.autocast(kind, getattr(torch, dtype))


def flush(path):
    """To the disk itself, a file or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def write_whole(path, write):
    """write(temporary path), then flush and rename: whoever looks sees the old file or the new one, never half, and so
    after a power cut."""
    temporary = f'{path}.tmp'
    write(temporary)
    flush(temporary)
    os.replace(temporary, path)
    flush(os.path.dirname(path) or '.')


def milestones(out_dir):
    """The paths of its step-*.pt, the newest first."""
    return sorted(map(str, Path(out_dir).glob(f'step-{"[0-9]" * 8}.pt')), reverse=True)


def has_state(out_dir):
    return os.path.exists(os.path.join(out_dir, 'last.pt')) or bool(milestones(out_dir))


def link(source, path):
    """A second name for a file, or where the disk knows no such thing, a copy."""
    Path(path).unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def checksum(state):
    """sha256 of tensors: names, kinds, bits. It stands in their file's header: a file beside may be another's."""
    digest = hashlib.sha256()
    for name, w in sorted(state.items()):
        digest.update(f'{name} {w.dtype} '.encode())
        digest.update(w.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_model(folder, weights, info, tokenizer_from):
    """model.safetensors, config.json and, if tokenizer_from has one, tokenizer.json: what load_model reads."""
    from safetensors.torch import save_file
    tokenizer = os.path.join(tokenizer_from, 'tokenizer.json')
    if os.path.exists(tokenizer):
        write_whole(os.path.join(folder, 'tokenizer.json'), lambda path: shutil.copyfile(tokenizer, path))
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    header = dict(format='pt', weights_sha256=checksum(weights))
    write_whole(os.path.join(folder, 'model.safetensors'), lambda path: (
        save_file(weights, path, header), os.chmod(path, 0o644)))                  # safetensors makes it mine alone
    write_whole(os.path.join(folder, 'config.json'), lambda path: Path(path).write_text(json.dumps(info)))


def save(out_dir, state, ema, info, data_folder, keep_last=2):
    """state: the resume's dict of tensors and plain values; ema: the averaged DiT; info: a JSON-able dict;
    data_folder: where the tokenizer.json is, if there is one. The newest keep_last states stay."""
    try:
        newest = str(Path(out_dir, f'step-{state["step"]:08}.pt'))
        write_whole(newest, lambda path: torch.save(state, path))
        write_whole(os.path.join(out_dir, 'last.pt'), lambda path: link(newest, path))
        kept = [path for path in milestones(out_dir) if path <= newest][:keep_last]  # I went back behind newer ones
        for old in {*milestones(out_dir), *map(str, Path(out_dir).glob('step-*.pt.tmp'))} - {*kept}:
            os.remove(old)
        write_model(out_dir, ema.state_dict(), info, data_folder)  # last: who stops me may not wait for it
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f'cannot write a checkpoint into {out_dir}: {str(e).splitlines()[0]}; the one before is kept')


def load_state(out_dir, device='cpu'):
    """The dict that save() was given last, from the newest file that is whole; if that is not last.pt, it says why."""
    broken = []
    for path in [os.path.join(out_dir, 'last.pt'), *milestones(out_dir)]:
        try:
            if bad := zipfile.ZipFile(path).testzip():               # torch writes checksums, but does not read them
                raise ValueError(f'{bad} is damaged')
            state = torch.load(path, map_location=device, weights_only=True)
            if missing := [key for key, kind in STATE.items() if not isinstance(state.get(key, ...), kind)]:
                raise ValueError(f'it has no {missing[0]}')
        except FileNotFoundError:
            continue
        except Exception as e:
            broken.append(f'{path} cannot be used ({" ".join(str(e).split())[:200] or type(e).__name__})')
            continue
        if path != os.path.join(out_dir, 'last.pt'):
            print('; '.join(broken or [f'last.pt is gone from {out_dir}']) + f': going on from {path}')
        return state
    if not broken:
        raise UserError(f'no checkpoint in {out_dir}: train first, or name another folder with --out_dir')
    raise UserError('; '.join(broken))


class Inert(dict):
    """Stands for any object of a foreign pickle: takes its state, runs nothing of its class."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


def load_lightning(path, weights):
    """state dict and config (keys as in the authors' config.json) of a Lightning .ckpt."""
    strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if payload := [name for name in strange if not HARMLESS.match(name)]:
        raise UserError(f'{path} is a pickle that wants to run {", ".join(payload)}: not opened. Ask for safetensors')
    with torch.serialization.safe_globals([(Inert, name) for name in strange]):
        ckpt = torch.load(path, map_location='cpu', weights_only=True, mmap=True)

    def plain(x):  # a dict out of omegaconf's nodes
        x = x.get('_content', x.get('_val')) if isinstance(x, Inert) else x
        return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else x

    settings = plain(ckpt.get('hyper_parameters', {}).get('config', {})) or {}
    model = settings.get('model', {})
    config = dict(model_type=settings.get('algo', {}).get('name'), n_heads=model.get('n_heads'),
                  model_length=model.get('length'), hidden_dim=model.get('hidden_size'))
    state = {name: w for name, w in ckpt['state_dict'].items() if not name.endswith('inv_freq')}
    if weights == 'ema':  # a list, in the order of the parameters: that of the state dict
        shadow = (ckpt.get('ema') or {}).get('shadow_params') or []
        if [w.shape for w in shadow] != [w.shape for w in state.values()]:
            raise UserError(f'{path}: its moving average ({len(shadow)} tensors) is none of its {len(state)} weights: '
                             '--weights=raw takes those')
        state = dict(zip(state, shadow))
    return state, {key: value for key, value in config.items() if type(value) in (str, int)}


def num_blocks(state):
    return len({name.split('.')[1] for name in state if name.startswith('blocks.')})


def infer_info(config, state, where):
    """The info of a model of the authors': from their config.json's dict, checked against the tensors, and from the
    tensors' shapes where it is silent. Leaves out of state the word that no text has."""
    if 'vocab_embed.embedding' not in state:
        raise UserError(f'{where} holds no DiT: vocab_embed.embedding is missing')
    K, C = state['vocab_embed.embedding'].shape
    cond_dim = next((w.size(1) for name, w in state.items() if name.endswith('adaLN_modulation.weight')), None)
    causal = cond_dim is None
    assumed = dict(model_type='ar' if causal else 'duo', n_heads=max(1, C // 64), model_length=1024)
    kind = str(config.get('model_type', assumed['model_type'])).lower()
    objective = 'ar' if causal else KINDS.get(kind)
    if objective is None or objective != 'duo' and K == 30522:  # BERT has a mask among its words, mine comes after them
        raise UserError(f'{where} is a {kind} model of {K} words: I know Duo, and MDLM and AR with GPT-2\'s words')
    have = dict(vocab_size=K, hidden_dim=C, cond_dim=cond_dim, causal=causal, time_conditioning=objective == 'duo',
                n_blocks=num_blocks(state))
    for key, value in have.items():
        if value is not None and config.get(key, value) != value:
            raise UserError(f'{where}: its config says {key} {config[key]}, its tensors {value}')
    words = K - (objective == 'mdlm')
    if words in (50258, 30523):  # [PAD] in Duo, a mask in AR: no text has it, so I go without
        words, assumed['its last word'] = words - 1, 'is in no text, left out'
        for name in {'vocab_embed.embedding', 'output_layer.linear.weight', 'output_layer.linear.bias'} & set(state):
            state[name] = state[name][:words]
    tokenizer, bos, eos, pad = {50257: ('gpt2', 50256, 50256, None), 30522: ('bert', 101, 102, 0)}.get(
        words, (f'of {words} words', 0, 0, None))
    if os.environ.get('RANK', '0') == '0':
        print(f'{where}: {objective}, {have["n_blocks"]} layers of {C}, {words} words ({tokenizer}); assumed: '
              + (', '.join(f'{key} {value}' for key, value in assumed.items() if key not in config) or 'nothing'))
    model = {AUTHORS[key]: value for key, value in (assumed | config | have).items() if key in AUTHORS}
    model.update(vocab_size=words + (objective == 'mdlm'), cond_dim=cond_dim or DiTConfig.cond_dim)
    return dict(objective=objective, model=model, settings={}, data=dict(
        tokenizer=tokenizer, tokenizer_sha256=None, vocab_size=words, bos_id=bos, eos_id=eos, pad_id=pad))


def check_info(info, state):
    """ValueError if a model's info is none that I write: of wrong kinds, or of another model than state's."""
    check_meta(info['data'])
    c, objective, settings = asdict(DiTConfig(**info['model'])), info['objective'], info['settings']
    good = {key: type(v) is DiTConfig.__annotations__[key] and (type(v) is int) <= v < 2**20 for key, v in c.items()}
    good.update(objective=objective in ('duo', 'mdlm', 'ar'), causal=c['causal'] is (objective == 'ar'),
                n_layer=c['n_layer'] == num_blocks(state),
                vocab_size=c['vocab_size'] == info['data']['vocab_size'] + (objective == 'mdlm'),
                settings=settings == {} or type(settings['dataset']) is str)
    if not all(good.values()):
        raise ValueError(f'its config.json has a wrong {min(good, key=good.get)}')


def find_weights(where):
    """The Path of a model's file; see load_model."""
    path, where = Path(where), str(where)
    found = lambda: [path] if path.is_file() else list(path.glob('model.safetensors')) or list(path.glob('*.ckpt'))
    if where.startswith('hf:'):
        try:
            from huggingface_hub import snapshot_download
            for weights in ('model.safetensors', '*.ckpt'):  # gigabytes: I fetch the second if there is no first
                if not found():
                    path = Path(snapshot_download(where[3:], allow_patterns=['*.json', weights]))
        except Exception as e:
            raise UserError(f'cannot fetch {where}, nor is it in the cache ({type(e).__name__}): '
                             f'{" ".join(str(e).split())[:200]}')
    if len(found()) != 1:
        raise UserError(f'no trained model in {where}, or several: run train.py first, or name another folder, '
                         'hf:org/name, or a .ckpt')
    return found()[0]


def load_model(where, weights='ema', device='cpu'):
    """model (DiT, eval mode) and info (config.json's dict, and the 'folder' it lies in).

    where: the folder of a run; or of a model of the authors' (their config.json and model.safetensors); or a Lightning
    .ckpt of theirs; or hf:org/name, such a folder on the Hugging Face hub. weights: 'ema' or 'raw'."""
    from safetensors import safe_open
    if weights not in ('ema', 'raw'):
        raise UserError(f"--weights is 'ema' or 'raw', not {weights!r}")
    path = find_weights(where)
    try:
        config = path.parent / 'config.json'
        config = json.loads(config.read_text()) if config.exists() else {}
        if path.suffix == '.ckpt':
            state, settings = load_lightning(path, weights)
            config = settings | config
        elif weights == 'raw':
            state = load_state(path.parent)['weights']
        else:
            with safe_open(path, 'pt') as file:  # mapped, not read: nothing is allocated before the shapes are right
                state, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
            if (written := header.get('weights_sha256')) and written != checksum(state):
                raise ValueError('it is damaged: the weights are not those that were written')
        state = {WRAPPERS.sub('', name): w for name, w in state.items() if not name.endswith('inv_freq')}
        info = config if 'objective' in config else infer_info(config, state, where)
        check_info(info, state)
        with torch.device('meta'):           # no memory, no random numbers: the weights come from the file
            model = DiT(DiTConfig(**info['model']))
        want, have = ({name: list(w.shape) for name, w in s.items()} for s in (model.state_dict(), state))
        if wrong := [f'{name} is {have.get(name, "missing")}, not {want.get(name, "known")}'
                     for name in want | have if have.get(name) != want.get(name)]:
            raise UserError(f'{path} is not the model that it should be: {"; ".join(wrong)}')
        model.load_state_dict({name: w.float() for name, w in state.items()}, assign=True)
    except Exception as e:
        raise UserError(f'cannot load the model in {where}: {type(e).__name__}: {" ".join(str(e).split())[:300]}')
    return model.to(device).eval().requires_grad_(False), info | {'folder': str(path.parent)}


def export(model, info, folder):
    """Write a model with the authors' names, layout and config.json, beside my own fields, into a new folder."""
    if Path(folder, 'model.safetensors').exists():
        raise UserError(f'{folder} holds a model already: name another folder')
    c, head_dim = info['model'], info['model']['n_embd'] // info['model']['n_head']
    state = {f'backbone.{name}': w for name, w in model.state_dict().items()}
    state['backbone.rotary_emb.inv_freq'] = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    config = {key: value for key, value in info.items() if key != 'folder'} | {k: c[v] for k, v in AUTHORS.items()}
    config.update(model_type=info['objective'], architectures=['DUO'])
    try:
        os.makedirs(folder, exist_ok=True)
        write_model(folder, state, config, info['folder'])
    except OSError as e:
        raise UserError(f'cannot write into {folder}: {e.strerror}')
    print(f'wrote {folder}')


MEASURED = '<!-- train.py writes what stands below this line, anew with every run -->'


def write_card(out_dir, arguments, world, chosen={}):
    """out_dir/README.md. chosen: the settings that are not train.py's own; arguments: train.py's; world: processes."""
    folder = Path(out_dir)
    info, card = json.loads((folder / 'config.json').read_text()), folder / 'README.md'
    r = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines() if '"val_loss"' in line][-1]
    head, found, _ = card.read_text('utf-8').partition(MEASURED) if card.exists() else (f'''---
# license: mit    (it is yours to choose)
library_name: nanoduo
pipeline_tag: text-generation
tags: [discrete-diffusion, {info['objective']}]
---
# {folder.resolve().name}

''', MEASURED, '')
    if not found:  # a card that somebody wrote is theirs
        return
    kind = dict(duo='Duo, a uniform-state diffusion model', mdlm='MDLM, a masked diffusion model', ar='An AR model')
    launch = f'torchrun --nproc_per_node={world}' if world > 1 else 'python'
    data, c, bound = info['data'], info['model'], '' if info['objective'] == 'ar' else 'at most '
    text = f'''{head}{MEASURED}

{kind[info['objective']]} of text, trained with nanoDuo.

| | |
| --- | --- |
| network | {c['n_layer']} layers of {c['n_embd']}, {c['n_head']} heads, rows of {c['block_size']} tokens |
| words | {data['vocab_size']:,} ({data['tokenizer']}) |
| trained on | {info['settings']['dataset']}: {data['train_tokens']:,} tokens, {r['step']:,} steps |
| validation loss | {bound}{r['val_loss']:.4f} +- {r['val_error']:.4f} nats per token (averaged weights) |
| perplexity | {bound}{r['val_ppl']:.2f} |
| bits per byte | {bound}{r['val_bpb']:.4f} |

![The losses](curve.png)

Made by

    {launch} {shlex.join(['train.py', *arguments])}

that is, the settings of train.py save {', '.join(f'{key} = {value!r}' for key, value in chosen.items()) or 'none'}.

To use it, in a checkout of nanoDuo, from the hub or from a folder:

    python sample.py --init_from=hf:ORG/NAME
    python eval.py --init_from=hf:ORG/NAME --draws=4
    python train.py --init_from=hf:ORG/NAME    # and its own settings of data and model
'''
    try:
        write_whole(card, lambda path: Path(path).write_text(text, 'utf-8'))
        print(f'wrote {card}')
    except OSError as e:
        print(f'no {card}: {e.strerror}')


def set_aside_older_run(out_dir):
    """A run that stands in out_dir is moved, not overwritten."""
    import time
    if has_state(out_dir) or os.path.exists(os.path.join(out_dir, 'model.safetensors')):
        aside = out_dir.rstrip('/') + time.strftime('-%Y%m%d-%H%M%S')
        os.rename(out_dir, aside)
        print(f'{out_dir} held another run: it is in {aside} now')


def open_log(out_dir, step):
    """log.jsonl, to append to, without the lines of steps that will be repeated."""
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot make --out_dir={out_dir}: {error.strerror}')
    path = Path(out_dir, 'log.jsonl')
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [s for s in lines if s.endswith('}\n') and step and json.loads(s)['step'] <= step]
        write_whole(path, lambda temporary: Path(temporary).write_text(''.join(kept)))
    return open(path, 'a', buffering=1)


def append_log(file, record):
    """One JSON line: seven digits of each number, null where it is not finite."""
    import math
    for name, value in record.items():
        if isinstance(value, float):
            record[name] = float(f'{value:.7g}') if math.isfinite(value) else None
    file.write(json.dumps(record) + '\n')


def check_resume(out_dir, state, settings, config, token_files):
    """What changed in the settings since state was written, as text; UserError if it is not a state
    of this very run."""
    old = state['settings']
    changed = ', '.join(f'{name} {old.get(name)} -> {value}' for name, value in settings.items()
                        if value != old.get(name) and name != 'init_from')
    if state['model'] != asdict(config):
        raise UserError(f'{out_dir} holds another model ({changed}): resume with its own command')
    if any(old[name] != settings[name] for name in ('objective', 'dataset')):
        raise UserError(f'{out_dir} holds another kind of run ({changed}): start a new one from it')
    if state['fingerprint'] != token_files:
        raise UserError(f'the token files of {settings["dataset"]} are not those that the run in '
                        f'{out_dir} began with: put them back, or start a new run')
    return changed
