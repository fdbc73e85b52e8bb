# Duo against the clock: 170M parameters on FineWeb-Edu, until HellaSwag's acc_norm is 27.5%, on 8
# GPUs of 80 GB. Neither run nor tuned. For 8 H100, bench.py simulates 42 minutes for all steps,
# compiled and at best, and 96 eager:
#     python bench.py --plan config/speedrun_duo.py --gpus=8 --gpu=h100
# To compare, minutes to 27.5% on 8 H100 by the records of speedrun-dlm (not checked here): masked
# diffusion 12, Duo 43, Duo with the authors' top-k curriculum 80.
#     python prepare.py fineweb_edu && torchrun --nproc_per_node=8 train.py config/speedrun_duo.py
# In another shell, after pip install lm_eval: score the newest checkpoint until it is good enough;
# then stop the training by Ctrl-C:
#     until python eval.py --out_dir=out-speedrun-duo --lm_eval=hellaswag --dtype=auto | tail -n 1 |
#         python -c "import json; exit(json.loads(input())['hellaswag acc_norm'] < 0.275)"
#     do sleep 60; done
from pathlib import Path
exec((Path(__file__).parent / 'owt_duo.py').read_text())  # as owt_duo.py, except:
out_dir = 'out-speedrun-duo'
dataset = 'fineweb_edu'

dropout = 0.0                        # no token is seen twice
learning_rate = 1e-3
max_iters = 16_000                   # 8.4G tokens
warmup_iters = 500
cooldown_frac = 0.4
ema_decay = 0.998

eval_interval = 1000                 # each evaluation leaves a checkpoint to score
