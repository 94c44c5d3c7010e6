# ViT-AC at full size: 24 layers, 384 wide, 44 M parameters, on 8 steps x 256 patches x 1024 features.
# Needs a GPU (not tried on one yet) and data:
#   python prepare.py --name=slide256 --size=256 --dim=1024 --clips=5000
model = 'vit'
world = False
worlds = False
conv = False
data = 'slide256'
depth = 24
width = 384
heads = 16
mlp_hidden = 1536
batch_size = 256
accumulation = 8
teacher_every = 1
optimizer = 'adamw'
# As V-JEPA 2-AC was trained: up from 7.5e-5 over 4,500 steps, constant for 85,500, down to 0 over 4,500.
max_iters = 94_500
start_rate = 7.5e-5
learning_rate = 4.25e-4
warmup = 4_500 / 94_500
decay = 4_500 / 94_500
beta2 = 0.999
grad_clip = 1.01
out = 'out/vit_full.pt'
