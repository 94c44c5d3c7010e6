# The oracle: the trained ViT-AC fine-tuned on other clips of B, the bound for methods that do not know B.
# Needs out/vit.pt (config/vit_jump.py), takes 3 to 9 minutes on a CPU core. `val` is of A, where it gets worse.
model = 'vit'
world = False
worlds = False
conv = False
init_from = 'out/vit.pt'
split = 'fit_B'
depth = 4
lambda_start = 1.0
lambda_end = 1.0
max_iters = 1500
learning_rate = 1e-3
out = 'out/oracle.pt'
