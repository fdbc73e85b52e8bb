# A Duo on 100 English novels, for a GPU: 16M parameters, 82M tokens (four epochs). Five minutes of
# an H200 that other runs shared were enough for 2,000 of the 2,500 steps: at most 1.735 bits per
# byte, PPL 62.1 (docs/results.md).
#     git clone https://github.com/computationalstylistics/100_english_novels
#     python prepare.py 100_english_novels/corpus --name novels
#     python train.py config/novels_gpu.py
# Its baselines: --objective=ar or mdlm, each with its own --out_dir.
out_dir = 'out-novels-gpu'
dataset = 'novels'                   # 21M tokens, in a BPE of 4,096 tokens learnt from the novels

batch_size = 128
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384

learning_rate = 1.5e-3
max_iters = 2500
warmup_iters = 100
ema_decay = 0.998

eval_interval = 250
eval_iters = 8
compile = True
