# Duo on OpenWebText, the paper's recipe: 170M parameters, 1M steps of 512 x 1024 tokens, 8 GPUs of
# 80 GB.
#     python prepare.py owt && torchrun --nproc_per_node=8 train.py config/owt_duo.py
# Published: validation PPL 25.2 (AR 17.5, MDLM 23.2; without the curriculum 27.4).
out_dir = 'out-owt-duo'
dataset = 'owt'                      # GPT-2 BPE, packed; the last 100,000 documents are held out

# 512 rows a step. On smaller or fewer GPUs: a smaller batch_size, more micro-batches
batch_size = 64
gradient_accumulation_steps = 8
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
cond_dim = 128
dropout = 0.1

# the window of noise is the authors': sigmoid(gamma) from 0.03 to 0.14
curriculum_frac = 0.5                # the first half of the run
tau = 1e-3
gamma_min = -3.55
gamma_max = -1.85

optimizer = 'adamw'
learning_rate = 3e-4
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0
grad_clip = 1.0
max_iters = 1_000_000
warmup_iters = 2500
cooldown_frac = 0
ema_decay = 0.9999

eval_interval = 5000                 # every 20 minutes (an estimate), with a checkpoint
checkpoint_minutes = 30
eval_iters = 64
log_interval = 100
compile = True
