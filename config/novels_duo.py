# A Duo on 100 English novels, for two CPU cores: 4M parameters, 10M tokens, 51 minutes measured
# while other jobs ran.
#     git clone https://github.com/computationalstylistics/100_english_novels
#     python prepare.py 100_english_novels/corpus --name novels
#     python train.py config/novels_duo.py
# Validation: at most 1.98 bits per byte, PPL 112 (docs/results.md).
out_dir = 'out-novels'
dataset = 'novels'                   # 21M tokens, in a BPE of 4,096 tokens learnt from the novels

block_size = 256

n_layer = 4
n_head = 6
n_embd = 192

learning_rate = 2e-3
max_iters = 5000
warmup_iters = 100
ema_decay = 0.995

eval_iters = 32
