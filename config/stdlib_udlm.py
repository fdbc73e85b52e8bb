# The built-in text with train.py's defaults, but without the curriculum: a baseline for the laptop demo.
curriculum_iters = 0
out_dir = 'out-udlm'
