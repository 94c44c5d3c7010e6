# ViT-AC between the laptop and full size: the baseline of config/hope_medium.py, 5.4 M parameters as well.
# A step takes 4.6 s on one thread of an Intel Xeon, so 4,000 take 5 hours, and 1.3 GB of memory.
# Not trained to the end yet, and not tried on a GPU, which needs no accumulation: --accumulation=1.
model = 'vit'
world = False
worlds = False
conv = False
data = 'mine'
depth = 6
width = 256
heads = 8
mlp_hidden = 1024
batch_size = 16
accumulation = 4
teacher_every = 4
max_iters = 4000
learning_rate = 1e-3
eval_clips = 64
out = 'out/vit_medium.pt'
