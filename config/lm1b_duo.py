# Duo on the One Billion Word benchmark (LM1B), sentence by sentence, the paper's recipe: 1M steps
# of 512 x 128 tokens.
#     python prepare.py lm1b && torchrun --nproc_per_node=8 train.py config/lm1b_duo.py
# Published: test PPL 29.9 (AR 22.3, MDLM 27.0; without the curriculum 31.3).
out_dir = 'out-lm1b-duo'
dataset = 'lm1b'                     # BERT's WordPiece; a row is [CLS] sentence [SEP], then padding

# 512 rows a step. On smaller or fewer GPUs: a smaller batch_size, more micro-batches
batch_size = 64
gradient_accumulation_steps = 8
block_size = 128

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 128
dropout = 0.1

# the window of noise is the authors': sigmoid(gamma) from 0.03 to 0.15
curriculum_frac = 0.5                # the first half of the run
tau = 1e-3
gamma_min = -3.5
gamma_max = -1.75

optimizer = 'adamw'
learning_rate = 3e-4
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0
grad_clip = 1.0
max_iters = 1_000_000                # the paper also reports 5M and 10M
warmup_iters = 2500
cooldown_frac = 0
ema_decay = 0.9999

eval_interval = 5000
eval_iters = 64
log_interval = 100
compile = True
