# A 34M-parameter Duo on a subset of OpenWebText, for a few hours on a free T4 (15 GB, fp16).
#     python prepare.py owt --max_docs 100000 --name owt_t4 && python train.py config/tiny_t4_duo.py
# Recent versions of Triton may not know a T4: train.py then stops. Add --compile=False.
# Reported for this set-up: validation PPL 189.4 (NLL 5.244, BPD 7.565); AR 321.2 (5.772, 8.327).
out_dir = 'out-tiny-t4-duo'
dataset = 'owt_t4'                   # GPT-2 BPE, packed

batch_size = 8
gradient_accumulation_steps = 1
block_size = 512

n_layer = 8
n_head = 8
n_embd = 256
cond_dim = 128
dropout = 0.1

curriculum_frac = 0.5                # the first half of the run
tau = 1e-3
gamma_min = -3.55
gamma_max = -1.85

optimizer = 'adamw'
learning_rate = 5e-4
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0
grad_clip = 1.0
max_iters = 100_000                  # stop at any time, continue with --init_from=resume
warmup_iters = 2500
cooldown_frac = 0
ema_decay = 0.9999

eval_interval = 2000
eval_iters = 50
log_interval = 100
compile = True
