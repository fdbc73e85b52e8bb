"""
Train Duo, a language model that denoises all its words at once. As it stands this is the laptop demo:

    python train.py                                                     # a few minutes on two CPU cores
    python train.py config/stdlib_gpu.py                                # a larger one, on a GPU
    torchrun --nproc_per_node=8 train.py config/owt_duo.py              # the paper's OpenWebText run, 8 GPUs
    python train.py config/owt_duo.py --batch_size=8 --compile=False    # any setting below can be changed so

To go on with a stopped run, give the same command and --init_from=resume. On several nodes, start
torchrun --nnodes=2 --node_rank=0 (then 1) --master_addr=IP --nproc_per_node=8 train.py ... on each of them.
"""
import copy
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from checkpoint import load_model, load_state, pick_device, pick_dtype, save
from configurator import configure
from data import (epoch_rows, get_rows, load_data, load_tokenizer, loss_mask, num_rows, same_tokenizer,
                  words_per_row)
from diffusion import (alpha_linear, blank, corrupt, coupled_pair, evaluate, generate, head_loss, loss_of,
                       mean_and_error, nelbo, soft_tokens, stratified_times, teacher_kl, token_nll, transform)
from model import DiT, DiTConfig

# --- files and intervals, in steps
out_dir = 'out'
data_dir = 'data'
eval_interval = 600          # validate and write a checkpoint
eval_iters = 64              # micro-batches in one validation
log_interval = 50
eval_only = False            # validate once and stop
init_from = 'scratch'        # 'scratch', 'resume', or the folder of a run whose averaged weights to start from
num_samples = 3              # texts to print at the end
sample_steps = 64            # network calls for each
# --- wandb
wandb_log = False
wandb_project = 'nanoduo'
wandb_run_name = 'duo'
# --- data
dataset = 'stdlib'           # a folder in data_dir, made by prepare.py
batch_size = 8               # the micro-batch: rows at a time on one device
gradient_accumulation_steps = 1  # micro-batches a step, over all processes; the global batch is this times batch_size
block_size = 128             # tokens in a row
# --- model
n_layer = 3
n_head = 4
n_embd = 128
cond_dim = 128               # width of the time embedding
dropout = 0.0
# --- diffusion
objective = 'duo'            # 'dcd' distils a Duo (init_from); baselines: 'mdlm' (masked), 'ar' (left to right)
curriculum_iters = 1450      # steps on softened Gaussian latents before the discrete ones; 0 is UDLM
tau = 1e-3                   # the softmax's temperature meanwhile
gamma_min = -3.5             # log noise-to-signal ratio of the Gaussian: the window of noise it trains on
gamma_max = -2.25
curriculum_k = 5             # words mixed at each position
dcd_round_iters = 10_000     # distillation: then the teacher becomes the student, and its lead of 1/512 doubles
dcd_teacher = 'student'      # what it becomes: 'student', or 'ema', the student's average (Algorithm 2)
# --- optimiser: AdamW
learning_rate = 1.5e-3
max_iters = 1800
warmup_iters = 40            # linear from zero, then constant
cooldown_iters = 700         # then linear to zero over this many last steps; 0 for none
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0              # 0 for none
ema_decay = 0.99             # of the averaged weights, which are what is validated and sampled
# --- system
seed = 1337
device = 'auto'              # 'cuda', 'mps', 'cpu', or the best there is
dtype = 'auto'               # 'bfloat16', 'float16', 'float32', or what suits the device
compile = False              # torch.compile: pays from a few minutes of GPU time on
backend = 'nccl'             # of torch.distributed; on CPU it is gloo


def learning_rate_at(step):
    warm = min(1.0, (step + 1) / (warmup_iters + 1))
    cool = min(1.0, (max_iters - step) / cooldown_iters) if cooldown_iters else 1.0
    return learning_rate * min(warm, cool)


def ema_decay_at(step):
    return min(ema_decay, (1 + step) / (10 + step))  # young weights are not worth remembering


@torch.no_grad()
def update_average(average, params, decay):
    """average <- decay average + (1 - decay) params, lists of tensors, in place."""
    torch._foreach_lerp_(average, params, 1 - decay)


def training_loss(model, x0, u, step, vocab_size, mask=None, grad_scale=1.0, loss_fn=nelbo):
    """The loss of one micro-batch, a scalar. x0 (B,T) clean ids; u (B,1) float64 in [0,1), stratified; mask (B,T) or
    None weighs the tokens; loss_fn: diffusion.loss_of(...), or it compiled.

    Duo has two ways to make the noise, the curriculum's and the discrete one, and one loss.
    """
    # 1. NOISE: how much, and which words
    if objective == 'ar':
        x, sigma, weights = x0[:, :-1], None, None
        args, mask = (x0[:, 1:], torch.ones_like(x0[:, 1:])), None if mask is None else mask[:, 1:]
    elif objective == 'duo' and step < curriculum_iters:
        gamma = gamma_min + u * (gamma_max - gamma_min)
        alpha, dalpha = transform(gamma, vocab_size)
        dalpha = dalpha * (gamma_max - gamma_min)                                  # d alpha / d u
        alpha, dalpha = alpha.float().to(x0.device), dalpha.float().to(x0.device)  # (B,1)
        x, weights, xt = soft_tokens(x0, gamma, tau, vocab_size, curriculum_k)     # (B,T,k), (B,T,k), (B,T)
        sigma, args = -alpha.log(), (xt, x0, alpha, dalpha)
    else:
        alpha, dalpha = (v.float().to(x0.device) for v in alpha_linear(1e-3 + (1 - 1e-3) * u))
        xt, sigma = corrupt(x0, alpha, vocab_size, objective)                      # (B,T), (B,1)
        x, weights, args = xt, None, (xt, x0, alpha, dalpha)
    # 2. DENOISE and 3. LOSS go together in the head, so that nobody holds a (B,T,K) tensor
    head = partial(head_loss, loss_fn=loss_fn, args=args, mask=mask, grad_scale=grad_scale)
    return model(x, sigma, weights, head=head)


def distillation_loss(model, teacher, x0, u, step, vocab_size, mask=None, grad_scale=1.0, loss_fn=teacher_kl):
    """Discrete consistency distillation (Algorithm 1), a scalar: the student, at a noisy zt, is to say what the teacher
    says at a slightly cleaner zs of the same Gaussian path. Their distance delta doubles every round."""
    # 1. NOISE: one path at two times
    delta = 2 ** (step // dcd_round_iters) / 512
    t = (1e-3 + (1 - 1e-3) * u + delta).clamp(max=1)                               # (B,1) float64
    gammas = [-4 + 3 * v for v in (t, t - delta)]
    zt, zs = coupled_pair(x0, *gammas, vocab_size)                                 # (B,T), (B,T)
    sigma_t, sigma_s = (-transform(gamma, vocab_size)[0].log().float().to(x0.device) for gamma in gammas)
    # 2. DENOISE twice; the teacher learns nothing
    with torch.no_grad():
        h = teacher.hidden(zs, sigma_s)                                            # (B,T,C)
    # 3. LOSS: both heads, a few tokens at a time
    last = teacher.output_layer.linear
    loss_fn = partial(loss_fn, weight=last.weight, bias=last.bias)
    return model(zt, sigma_t, head=partial(head_loss, loss_fn=loss_fn, args=(h,), mask=mask, grad_scale=grad_scale))


def seed_from(*numbers):
    """One well-mixed seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


if __name__ == '__main__':
    settings = configure(globals())
    globals().update(settings)

    # ---- one process or many (torchrun), a device each
    ddp = 'RANK' in os.environ
    rank, local_rank, world = (int(os.environ.get(*d)) for d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    master, here = rank == 0, os.path.dirname(os.path.abspath(__file__))
    device = pick_device(device)
    device_type = device.split(':')[0]
    dtype, autocast = pick_dtype(dtype, device)
    torch.set_float32_matmul_precision('high')
    for name in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval',
                 'num_samples', 'sample_steps', 'dcd_round_iters', 'n_layer', 'n_head', 'n_embd', 'cond_dim'):
        if settings[name] < 1:
            raise SystemExit(f'--{name}={settings[name]}: it must be at least 1')
    for name in ('max_iters', 'curriculum_iters', 'warmup_iters', 'cooldown_iters', 'seed', 'learning_rate',
                 'grad_clip'):
        if settings[name] < 0:
            raise SystemExit(f'--{name}={settings[name]}: it must not be negative')
    if curriculum_iters and not (tau > 0 and curriculum_k >= 2 and gamma_min < gamma_max):
        raise SystemExit('the curriculum needs tau > 0, curriculum_k of at least 2, and gamma_min < gamma_max')
    for name, value, known in (('objective', objective, ('duo', 'dcd', 'mdlm', 'ar')),
                               ('dcd_teacher', dcd_teacher, ('student', 'ema'))):
        if value not in known:
            raise SystemExit(f'--{name}={value}: it is one of {", ".join(known)}')
    if objective == 'dcd' and init_from == 'scratch':
        raise SystemExit('distillation starts from a trained Duo: name its folder with --init_from')
    if gradient_accumulation_steps % world:
        raise SystemExit(f'gradient_accumulation_steps ({gradient_accumulation_steps}, over all processes) must be a '
                         f'multiple of the number of processes ({world})')
    if ddp:
        if device_type == 'cuda':
            device = f'cuda:{local_rank}'
            torch.cuda.set_device(device)
        dist.init_process_group(backend if device_type == 'cuda' else 'gloo')

    # ---- data
    folder = os.path.join(data_dir, dataset)
    if master and dataset == 'stdlib' and not os.path.exists(folder):
        prepare = [sys.executable, os.path.join(here, 'prepare.py'), 'stdlib', '--data_dir', data_dir]
        if subprocess.run(prepare).returncode:
            raise SystemExit('the built-in text could not be prepared')
    if ddp:
        dist.barrier()
    meta, data = load_data(folder)
    vocab_size = meta['vocab_size']
    if objective == 'duo' and curriculum_iters and curriculum_k > vocab_size:
        raise SystemExit(f'--curriculum_k={curriculum_k} is more than the {vocab_size} words there are')
    n_train, n_val = num_rows(data['train'], block_size), num_rows(data['val'], block_size)

    def get_batch(split, rows):
        """Rows of a split, x0 (B,T), on the device; the copy does not keep the CPU waiting."""
        x0 = torch.from_numpy(get_rows(data[split], rows, block_size, meta))
        return x0.pin_memory().to(device, non_blocking=True) if device_type == 'cuda' else x0.to(device)

    # ---- model, its running average, optimiser
    torch.manual_seed(seed)
    kind = 'duo' if objective == 'dcd' else objective                     # a distilled Duo is a Duo
    model = DiT(DiTConfig(vocab_size + (objective == 'mdlm'), block_size, n_layer, n_head, n_embd, cond_dim, dropout,
                          causal=objective == 'ar')).to(device)           # the mask is one word more
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(beta1, beta2), eps=1e-8,
                                  weight_decay=weight_decay, fused=device_type != 'mps')
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    teacher = copy.deepcopy(ema) if objective == 'dcd' else None
    step, best, elapsed = 0, math.inf, 0.0

    if init_from == 'resume':
        state = load_state(out_dir, device)
        old = state['settings']
        changed = ', '.join(f'{k} {old.get(k)} -> {v}' for k, v in settings.items()
                            if v != old.get(k) and k != 'init_from')
        if state['model'] != asdict(model.config):
            raise SystemExit(f'{out_dir} holds another model ({changed}): resume with the command that began it')
        if master and changed:
            print(f'resuming with changed settings: {changed}')
        model.load_state_dict(state['weights'])
        ema.load_state_dict(state['ema'])
        optimizer.load_state_dict(state['optimizer'])
        for group in optimizer.param_groups:                              # these are settings, and mine are the newer
            group.update(betas=(beta1, beta2), weight_decay=weight_decay, fused=device_type != 'mps')
        if scaler.is_enabled() and state['scaler']:
            scaler.load_state_dict(state['scaler'])
        step, best, elapsed = state['step'], state['best'], state['seconds']
        if teacher:
            teacher.load_state_dict(state['teacher'])
        del state
    elif init_from != 'scratch':
        trained, info = load_model(init_from, device=device)
        if (asdict(trained.config) != asdict(model.config) | {'dropout': trained.config.dropout}
                or not same_tokenizer(info['data'], meta)):
            raise SystemExit(f'{init_from} holds another model or tokenizer ({trained.config}): give the same')
        model.load_state_dict(trained.state_dict())
        ema.load_state_dict(trained.state_dict())
    if master and init_from != 'resume' and not eval_only and os.path.exists(os.path.join(out_dir, 'last.pt')):
        aside = time.strftime(f'{out_dir.rstrip("/")}-%Y%m%d-%H%M%S')
        os.rename(out_dir, aside)
        print(f'{out_dir} held another run: it is in {aside} now')

    loss_fn, distil_fn = loss_of(kind, vocab_size), teacher_kl
    if compile:  # the trunk in one graph, the loss in one kernel
        loss_fn, distil_fn = torch.compile(loss_fn), torch.compile(distil_fn)
        for m in filter(None, (model, ema, teacher)):
            m.hidden = torch.compile(m.hidden)
    train_model = DDP(model, device_ids=[local_rank] if device_type == 'cuda' else None) if ddp else model

    # ---- what one sees of it
    tokens_per_step = gradient_accumulation_steps * batch_size * block_size
    progress = tqdm(total=max_iters, initial=step, disable=not (master and sys.stdout.isatty()), file=sys.stdout)
    if master:
        try:
            os.makedirs(out_dir, exist_ok=True)
        except OSError as e:
            raise SystemExit(f'cannot make --out_dir={out_dir}: {e.strerror}')
        log_path = os.path.join(out_dir, 'log.jsonl')
        if init_from == 'resume' and not eval_only and os.path.exists(log_path):         # what it will say again goes
            with open(log_path) as f:
                lines = [line for line in f if line.endswith('}\n') and json.loads(line)['step'] <= step]
            with open(log_path, 'w') as f:
                f.writelines(lines)
        log_file = open(os.devnull if eval_only else log_path, 'a', buffering=1)
        print(f'{model.num_params() / 1e6:.2f}M parameters, {tokens_per_step:,} tokens a step, {device} {dtype}, '
              f'{n_train:,} rows of {block_size} ({meta["tokenizer"]}, {vocab_size} words)')
        if wandb_log:
            try:
                import wandb
            except ImportError:
                raise SystemExit('wandb_log needs a package: pip install wandb')
            wandb.init(project=wandb_project, name=wandb_run_name, config=settings)

    def log(line, **record):
        if not master:
            return
        record = {k: float(f'{v:.7g}') if isinstance(v, float) else v for k, v in record.items()}
        log_file.write(json.dumps(record) + '\n')
        if wandb_log:
            wandb.log(record, step=record['step'])
        if progress.disable:
            print(line, flush=True)
        elif 'val_loss' in record:
            progress.write(line)
        else:
            progress.set_postfix_str(line.split(': ', 1)[1])

    def validate():
        n = min(n_val, eval_iters * batch_size)
        rows = epoch_rows(np.arange(n), n_val, seed=0)                   # always the same ones
        nats = lambda x0, t: token_nll(ema, x0, t, vocab_size, kind, loss_fn)
        with autocast:
            each = evaluate(nats, lambda i: get_batch('val', rows[i]), n, batch_size, device, rank, world,
                            meta['pad_id'])
        nll, error = mean_and_error(each)
        if not math.isfinite(nll):
            raise SystemExit(f'the validation loss is {nll} at step {step}: {out_dir} keeps the last good checkpoint')
        words = words_per_row(data['val'], rows, block_size)
        scored = words + 2 - (kind == 'ar')                              # AR is given the first word of a row
        bpb = nll / math.log(2) * scored / words * meta['val_tokens'] / meta['val_bytes']
        log(f'step {step}: val loss {nll:.4f} +- {error:.4f} nats, {nll / math.log(2):.4f} bits per token, '
            f'PPL {math.exp(min(nll, 99)):.2f}, {bpb:.4f} bits per byte', step=step, val_loss=nll, val_error=error,
            val_bpd=nll / math.log(2), val_ppl=math.exp(min(nll, 99)), val_bpb=bpb, seconds=time.time() - began)
        return nll

    # ---- the loop
    params, ema_params = list(model.parameters()), list(ema.parameters())
    one, total = torch.ones((), device=device), torch.zeros((), device=device)
    ticked = time.time()
    began, logged, start = ticked - elapsed, step, step
    while True:
        done = step >= max_iters
        if done or eval_only or (step > start and step % eval_interval == 0):
            paused = time.time()
            val_loss = validate()
            best = min(best, val_loss)
            if master and not eval_only:
                info = dict(objective=kind, model=asdict(model.config), data=meta, settings=settings, step=step,
                            val_loss=val_loss)
                state = dict(weights=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                             scaler=scaler.state_dict(), teacher=teacher and teacher.state_dict(), best=best,
                             seconds=time.time() - began, **info)
                save(out_dir, state, ema, info, folder)
            ticked += time.time() - paused
        if done or eval_only:
            break

        if teacher and step % dcd_round_iters == 0:                      # a round begins
            teacher.load_state_dict((ema if dcd_teacher == 'ema' else model).state_dict())
        for group in optimizer.param_groups:
            group['lr'] = learning_rate_at(step)
        offset = np.random.default_rng([seed, step]).random()            # stratifies the times of all the step's rows
        for m in range(rank, gradient_accumulation_steps, world):        # my share of the step's micro-batches
            torch.manual_seed(seed_from(seed, step, m))                  # noise and dropout belong to the micro-batch
            first, n = m * batch_size, gradient_accumulation_steps * batch_size
            x0 = get_batch('train', epoch_rows(step * n + first + np.arange(batch_size), n_train, seed))
            u = stratified_times(offset, first, batch_size, n, device=device)
            mask, last = loss_mask(x0, meta['pad_id']), m + world >= gradient_accumulation_steps
            grad_scale = scaler.scale(one)
            with nullcontext() if last or not ddp else train_model.no_sync():
                with autocast:
                    if teacher:
                        loss = distillation_loss(train_model, teacher, x0, u, step, vocab_size, mask, grad_scale,
                                                 distil_fn)
                    else:
                        loss = training_loss(train_model, x0, u, step, vocab_size, mask, grad_scale, loss_fn)
                scaler.scale(loss * world / gradient_accumulation_steps).backward()  # DDP takes the mean over ranks
            total += loss.detach() / gradient_accumulation_steps
        scaler.unscale_(optimizer)
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(params, grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        update_average(ema_params, params, ema_decay_at(step))
        step += 1
        progress.update()

        if step % log_interval == 0 or step == max_iters:                # nowhere else does the CPU wait for the device
            if ddp:
                dist.all_reduce(total)
            loss = total.item() / (step - logged)
            if not math.isfinite(loss):
                raise SystemExit(f'the loss is {loss} near step {step}: {out_dir} keeps the last good checkpoint, if '
                                 'there is one; a lower --learning_rate may help')
            speed = (step - logged) / (time.time() - ticked)
            log(f'step {step}: loss {loss:.4f}, PPL {math.exp(min(loss, 99)):.1f}, '
                f'{speed * tokens_per_step:,.0f} tokens/s, {(max_iters - step) / speed / 60:.1f} min left', step=step,
                loss=loss, lr=learning_rate_at(step - 1), tokens_per_s=speed * tokens_per_step,
                seconds=time.time() - began)
            total.zero_()
            ticked, logged = time.time(), step

    # ---- show what it has learnt
    progress.close()
    if master and not eval_only:
        subprocess.run([sys.executable, os.path.join(here, 'plot.py'), out_dir])
        tokenizer = load_tokenizer(meta, folder)
        torch.manual_seed(seed)
        ema.__dict__.pop('hidden', None)                                  # compiled for rows, not for a growing text
        x = blank(kind, (num_samples, block_size), vocab_size, meta['bos_id'], device)
        with autocast:
            for x in generate(ema, x, kind, vocab_size, sample_steps):
                pass
        for ids in x.tolist():
            print('-' * 80, tokenizer.decode(ids), sep='\n')
    if ddp:
        dist.destroy_process_group()
