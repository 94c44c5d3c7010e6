# AC-HOPE-ViT at the size of config/vit_full.py (42 M parameters for 44): 12 blocks, 384 wide, no attention.
# Needs a GPU (not tried on one yet) and data:
#   python prepare.py --name=slide256 --size=256 --dim=1024 --clips=5000
model = 'hope'
mixer = 'titan'
data = 'slide256'
depth = 12
width = 384
heads = 16
cms_hidden = 1200
batch_size = 256
accumulation = 8
teacher_every = 1
stream_clips = 16
inverse_batch = 32
optimizer = 'adamw'
# As V-JEPA 2-AC was trained: up from 7.5e-5 over 4,500 steps, constant for 85,500, down to 0 over 4,500.
max_iters = 94_500
start_rate = 7.5e-5
learning_rate = 4.25e-4
warmup = 4_500 / 94_500
decay = 4_500 / 94_500
beta2 = 0.999
grad_clip = 1.01
out = 'out/hope_full.pt'
