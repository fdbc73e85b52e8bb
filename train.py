"""
Train Duo, a language model that denoises all its words at once. As it stands this is the laptop demo:

    python train.py                                                     # a few minutes on two CPU cores
    python train.py config/stdlib_gpu.py                                # a larger one, on a GPU
    torchrun --nproc_per_node=8 train.py config/owt_duo.py              # the paper's OpenWebText run, 8 GPUs
    python train.py config/owt_duo.py --batch_size=8 --compile=False    # any setting below can be changed so

To go on with a stopped run, give the same command and --init_from=resume; --init_from=auto does so if there is
something to go on with, and else begins. On several nodes, start torchrun --nnodes=2 --node_rank=0 (then 1)
--master_addr=IP --nproc_per_node=8 train.py ... on each of them. What would it take? --dry_run.
"""
import copy
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from checkpoint import (has_state, load_model, load_state, pick_device, pick_dtype, save, write_card,
                        write_whole)
from configurator import configure
from data import (check_tokens, epoch_rows, fingerprint, get_rows, load_data, load_tokenizer, loss_mask, num_rows,
                  same_tokenizer, words_per_row)
from diffusion import (alpha_linear, blank, corrupt, coupled_pair, evaluate, head_loss, loss_of, mean_and_error,
                       nelbo, reverse_process, soft_tokens, stratified_times, teacher_kl, token_nll, transform)
from model import DiT, DiTConfig

# --- files and intervals, in steps
out_dir = 'out'
data_dir = 'data'
eval_interval = 600          # validate, and write a checkpoint
checkpoint_interval = 0      # write one at these steps too; 0: at no others
checkpoint_minutes = 15.0    # and whenever the last is so old; 0: never for that
keep_last = 2                # checkpoints to keep, should the newest get lost
eval_iters = 64              # micro-batches in one validation
log_interval = 50
eval_only = False            # validate once and stop
dry_run = False              # take three steps, say what the whole run would take, leave nothing
price_per_hour = 0.0         # of all devices together, for that
init_from = 'scratch'        # 'scratch', 'resume', or a model to start from: a folder, hf:org/name, an official .ckpt;
                             # 'auto': resume if there is something to resume, else scratch; 'auto:MODEL': else MODEL
init_weights = 'ema'         # their average, or 'raw'
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
dcd_delta = 1 / 512          # distillation: the teacher's lead, in time
dcd_round_iters = 10_000     # after so many steps the teacher becomes the student, and its lead doubles
dcd_teacher = 'student'      # what it becomes: 'student', or 'ema', the student's average (Algorithm 2)
dcd_kl = 'reverse'           # KL(student || teacher), as published; 'forward': KL(teacher || student)
# --- optimiser: AdamW
learning_rate = 1.5e-3
max_iters = 1800
warmup_iters = 40            # linear from zero, then constant
cooldown_iters = 700         # then linear to zero over this many last steps; 0 for none
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0              # 0 for none
max_bad_steps = 20           # steps without a finite loss and gradient are skipped; more than so many in a row end it
ema_decay = 0.99             # of the averaged weights, which are what is validated and sampled
# --- system
seed = 1337
device = 'auto'              # 'cuda', 'mps', 'cpu', or the best there is
dtype = 'auto'               # 'bfloat16', 'float16', 'float32', or what suits the device
compile = False              # torch.compile: pays from a few minutes of GPU time on
backend = 'nccl'             # of torch.distributed; on CPU it is gloo
detect_anomaly = False       # find the operation that made a nan; slow


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
    delta = 2 ** (step // dcd_round_iters) * dcd_delta
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
    chosen = {name: value for name, value in settings.items() if value != globals()[name]}  # not as they stand above
    globals().update(settings)

    # ---- a scheduler's signal, or Ctrl-C: the step is finished and a checkpoint written
    stop, looping = 0, False

    def on_signal(number, frame):
        global stop
        stop = number
        if not looping:
            print(f'{signal.Signals(number).name} outside the loop: nothing is left to save', file=sys.stderr)
            sys.exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, on_signal)

    # ---- one process or many (torchrun), a device each
    ddp = 'RANK' in os.environ
    rank, local_rank, world = (int(os.environ.get(*d)) for d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    master, here = rank == 0, os.path.dirname(os.path.abspath(__file__))
    device = pick_device(device)
    device_type = device.split(':')[0]
    dtype, autocast = pick_dtype(dtype, device)
    torch.set_float32_matmul_precision('high')
    torch.autograd.set_detect_anomaly(detect_anomaly)
    for name in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval',
                 'num_samples', 'sample_steps', 'keep_last', 'dcd_round_iters', 'n_layer', 'n_head', 'n_embd',
                 'cond_dim'):
        if settings[name] < 1:
            raise SystemExit(f'--{name}={settings[name]}: it must be at least 1')
    for name in ('max_iters', 'curriculum_iters', 'warmup_iters', 'cooldown_iters', 'seed', 'learning_rate',
                 'grad_clip', 'checkpoint_interval', 'checkpoint_minutes', 'price_per_hour', 'max_bad_steps',
                 'weight_decay'):
        if settings[name] < 0:
            raise SystemExit(f'--{name}={settings[name]}: it must not be negative')
    for name in ('dropout', 'beta1', 'beta2', 'ema_decay'):
        if not 0 <= settings[name] < 1:
            raise SystemExit(f'--{name}={settings[name]}: it must be at least 0, and less than 1')
    if curriculum_iters and not (tau > 0 and curriculum_k >= 2 and gamma_min < gamma_max):
        raise SystemExit('the curriculum needs tau > 0, curriculum_k of at least 2, and gamma_min < gamma_max')
    for name, value, known in (('objective', objective, ('duo', 'dcd', 'mdlm', 'ar')),
                               ('dcd_teacher', dcd_teacher, ('student', 'ema')),
                               ('dcd_kl', dcd_kl, ('reverse', 'forward')),
                               ('init_weights', init_weights, ('ema', 'raw'))):
        if value not in known:
            raise SystemExit(f'--{name}={value}: it is one of {", ".join(known)}')
    if init_from.split(':')[0] == 'auto':
        init_from = 'resume' if has_state(out_dir) else init_from[5:] or 'scratch'
    if objective == 'dcd' and init_from == 'scratch':
        raise SystemExit('distillation starts from a trained Duo: name it with --init_from=MODEL, or auto:MODEL')
    rounds = max(0, max_iters - 1) // dcd_round_iters
    if objective == 'dcd' and not (rounds < 99 and 0 < 2 ** rounds * dcd_delta <= 1):
        raise SystemExit(f'--dcd_delta={dcd_delta} leaves (0, 1] in {max_iters} steps of rounds of {dcd_round_iters}')
    if gradient_accumulation_steps % world:
        raise SystemExit(f'gradient_accumulation_steps ({gradient_accumulation_steps}, over all processes) must be a '
                         f'multiple of the number of processes ({world})')
    if ddp:
        if device_type == 'cuda':
            device = f'cuda:{local_rank}'
            torch.cuda.set_device(device)
        dist.init_process_group(backend if device_type == 'cuda' else 'gloo')
        control = dist.new_group(backend='gloo')                          # for what the processes must agree on

    def agree(number):
        """The largest of all processes' numbers. If one of them is gone, this is where the others notice, at once."""
        if not ddp:
            return number
        largest = torch.tensor(number)
        try:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=control)
        except RuntimeError:
            raise SystemExit(f'rank {rank}: another process has ended; what it said comes first')
        return largest.item()

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
    token_files = fingerprint(data)
    if master:
        check_tokens(data, vocab_size, folder)
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
    step, best, elapsed, skipped = 0, math.inf, 0.0, 0

    if init_from == 'resume':
        state = load_state(out_dir, device)
        old = state['settings']
        changed = ', '.join(f'{k} {old.get(k)} -> {v}' for k, v in settings.items()
                            if v != old.get(k) and k != 'init_from')
        if state['model'] != asdict(model.config):
            raise SystemExit(f'{out_dir} holds another model ({changed}): resume with the command that began it')
        if old.get('objective') != objective or old.get('dataset') != dataset:
            raise SystemExit(f'{out_dir} holds another kind of run ({changed}): to go on from it, begin a new one')
        if state['fingerprint'] != token_files:
            raise SystemExit(f'the token files in {folder} are not those that the run in {out_dir} began with: put '
                             'them back, or begin a new run')
        if master and changed:
            print(f'resuming with changed settings: {changed}')
        model.load_state_dict(state['weights'])
        ema.load_state_dict(state['ema'])
        optimizer.load_state_dict(state['optimizer'])
        for group in optimizer.param_groups:                              # these are settings, and mine are the newer
            group.update(betas=(beta1, beta2), weight_decay=weight_decay, fused=device_type != 'mps')
        if scaler.is_enabled() and state['scaler']:
            scaler.load_state_dict(state['scaler'])
        step, best, elapsed, skipped = (state[key] for key in ('step', 'best', 'seconds', 'skipped'))
        if teacher:
            teacher.load_state_dict(state['teacher'])
        del state
    elif init_from != 'scratch':
        trained, info = load_model(init_from, init_weights, device)
        if (asdict(trained.config) != asdict(model.config) | {'dropout': trained.config.dropout}
                or not same_tokenizer(info['data'], meta)):
            raise SystemExit(f'{init_from} holds another model or tokenizer ({trained.config}): give the same')
        model.load_state_dict(trained.state_dict())
        ema.load_state_dict(trained.state_dict())
        del trained
    if agree(step) != -agree(-step):
        raise SystemExit(f'rank {rank} found step {step}, another did not: --out_dir must be on a disk they share')
    leaves_nothing = eval_only or dry_run
    stands = has_state(out_dir) or os.path.exists(os.path.join(out_dir, 'model.safetensors'))
    if master and init_from != 'resume' and not leaves_nothing and stands:
        aside = time.strftime(f'{out_dir.rstrip("/")}-%Y%m%d-%H%M%S')
        os.rename(out_dir, aside)
        print(f'{out_dir} held another run: it is in {aside} now')

    loss_fn, distil_fn = loss_of(kind, vocab_size), partial(teacher_kl, forward=dcd_kl == 'forward')
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
            os.makedirs(out_dir, exist_ok=True) if not leaves_nothing else None
        except OSError as e:
            raise SystemExit(f'cannot make --out_dir={out_dir}: {e.strerror}')
        log_path = os.path.join(out_dir, 'log.jsonl')
        if init_from == 'resume' and not leaves_nothing and os.path.exists(log_path):    # what it will say again goes
            with open(log_path) as f:
                lines = [line for line in f if line.endswith('}\n') and json.loads(line)['step'] <= step]
            write_whole(log_path, lambda path: Path(path).write_text(''.join(lines)))
        log_file = open(os.devnull if leaves_nothing else log_path, 'a' if init_from == 'resume' else 'w', buffering=1)
        print(f'{model.num_params() / 1e6:.2f}M parameters, {tokens_per_step:,} tokens a step, {device} {dtype}, '
              f'{n_train:,} rows of {block_size} ({meta["tokenizer"]}, {vocab_size} words)')
        wandb_log = wandb_log and not leaves_nothing
        if wandb_log:
            try:
                import wandb
            except ImportError:
                raise SystemExit('wandb_log needs a package: pip install wandb')
            wandb.init(project=wandb_project, name=wandb_run_name, config=settings)

    def log(line, **record):
        if not master:
            return
        record = {k: v if not isinstance(v, float) else float(f'{v:.7g}') if math.isfinite(v) else None
                  for k, v in record.items()}
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

    def write_checkpoint():
        if not all(p.isfinite().all() for p in ema.parameters()):
            raise SystemExit(f'the weights are not finite at step {step}: {out_dir} keeps the last good checkpoint, if '
                             f'there is one; a lower --learning_rate may help ({chosen})')
        info = dict(objective=kind, model=asdict(model.config), data=meta, settings=settings, step=step,
                    val_loss=val_loss)
        state = dict(weights=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                     scaler=scaler.state_dict(), teacher=teacher and teacher.state_dict(), best=best,
                     skipped=skipped + round(step - logged - good.item()),
                     fingerprint=token_files, seconds=time.time() - began, **info)
        save(out_dir, state, ema, info, folder, keep_last)

    # ---- the loop
    params, ema_params = list(model.parameters()), list(ema.parameters())
    one = torch.ones((), device=device)
    total, good, in_a_row, worst, broken = (torch.zeros((), device=device) for _ in range(5))
    ticked = saved = time.time()
    began, logged, start, val_loss = ticked - elapsed, step, step, None
    times, looping, last_step = [], True, step + 3 if dry_run else max_iters
    while True:
        halt, done, paused = agree(stop), step >= last_step, time.time()  # a later signal waits for the next step
        due = step > start and (step % eval_interval == 0 or checkpoint_interval and step % checkpoint_interval == 0
                                or checkpoint_minutes and paused - saved > 60 * checkpoint_minutes)
        if not dry_run and (done and not halt or eval_only or step > start and step % eval_interval == 0):
            val_loss = validate()
            best = min(best, val_loss)
        if master and not leaves_nothing and (due or done or halt):
            write_checkpoint()
            saved = time.time()
        ticked += time.time() - paused
        if done or eval_only or halt:
            break

        if teacher and step % dcd_round_iters == 0:                      # a round begins
            teacher.load_state_dict((ema if dcd_teacher == 'ema' else model).state_dict())
        for group in optimizer.param_groups:
            group['lr'] = learning_rate_at(step)
        mean = torch.zeros((), device=device)
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
                finite = loss.detach().isfinite()
                fine = torch.where(finite, 1.0, torch.nan)               # a bad loss spoils all ranks' gradients
                scaler.scale(loss * fine * world / gradient_accumulation_steps).backward()  # DDP: the mean over ranks
            mean += loss.detach() / gradient_accumulation_steps
            broken += ~finite
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        finite = norm.isfinite()
        if optimizer.defaults['fused']:
            optimizer.found_inf = 1.0 - finite.float()                   # it skips the step by itself: nobody waits
        elif not finite:
            optimizer.zero_grad()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        total += torch.where(finite, mean, 0)
        good += finite
        in_a_row = (in_a_row + 1) * ~finite
        worst = torch.maximum(worst, in_a_row)
        update_average(ema_params, params, ema_decay_at(step))
        step += 1
        progress.update()
        if dry_run:
            norm.item()                                                  # the device has finished
            times.append(time.time())

        if step % log_interval == 0 or step == max_iters:                # nowhere else does the CPU wait for the device
            if ddp:
                dist.all_reduce(total)
            loss, lost = total.item() / good.item() if good else math.nan, round(step - logged - good.item())
            skipped += lost
            if worst > max_bad_steps:
                raise SystemExit(f'rank {rank}: no finite loss and gradient in {worst:.0f} steps in a row by {step}; '
                                 f'here {broken:.0f} micro-batches had none. {out_dir} keeps the last good checkpoint, '
                                 f'if there is one; a lower --learning_rate may help ({chosen})')
            speed = (step - logged) / (time.time() - ticked)
            log(f'step {step}: ' + (f'KL {loss:.5f}, ' if teacher else f'loss {loss:.4f}, ') +
                f'{speed * tokens_per_step:,.0f} tokens/s, {(max_iters - step) / speed / 60:.1f} min left' +
                f', {lost} steps skipped' * (lost > 0), step=step, loss=loss, lr=learning_rate_at(step - 1),
                skipped=skipped, tokens_per_s=speed * tokens_per_step, seconds=time.time() - began)
            total.zero_(), good.zero_()
            ticked, logged = time.time(), step

    # ---- show what it has learnt
    progress.close()
    if dry_run and master and len(times) > 1:                             # no signal came
        seconds = (times[-1] - times[0]) / (len(times) - 1)
        memory = (torch.cuda.max_memory_allocated(device) if device_type == 'cuda' else  # a Mac counts bytes
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))
        tokens, hours = max_iters * tokens_per_step, max_iters * seconds / 3600
        print(f'peak memory {memory / 1e9:.2f} GB, {1000 * seconds:.0f} ms a step. {max_iters:,} of them: about '
              f'{hours:.1f} hours without validation, {tokens / 1e9:.3g}G tokens, '
              f'{tokens / (n_train * block_size):.3g} epochs, ' +
              (f'a price of about {hours * price_per_hour:,.2f}' if price_per_hour else 'a price if --price_per_hour'))
    if halt and master:
        print(f'{signal.Signals(halt).name}: stopped after step {step}' + (
            '' if leaves_nothing else f'; the same command and --init_from=resume goes on from {out_dir}'))
    if master and not (leaves_nothing or halt):
        subprocess.run([sys.executable, os.path.join(here, 'plot.py'), out_dir])
        write_card(out_dir, chosen, sys.argv[1:], world)
        tokenizer = load_tokenizer(meta, folder)
        torch.manual_seed(seed)
        ema.__dict__.pop('hidden', None)                                  # compiled for rows, not for a growing text
        x = blank(kind, (num_samples, block_size), vocab_size, meta['bos_id'], device)
        with autocast:
            for x in reverse_process(ema, x, kind, vocab_size, sample_steps):
                pass
        for ids in x.tolist():
            print('-' * 80, tokenizer.decode(ids), sep='\n')
    if ddp:
        dist.destroy_process_group()
    sys.exit(128 + halt if halt else 0)
