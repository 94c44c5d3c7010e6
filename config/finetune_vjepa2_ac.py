# Fine-tunes the official V-JEPA 2-AC predictor (305 M parameters) on own clips by its published losses:
# teacher forcing and a rollout of two steps. Needs vjepa2-ac-vitg.pt, a GPU of 40 GB (not tried on one yet),
# features of ViT-g: python prepare.py --name=mine_vitg --source=clips --encoder=vitg
# Clips with states: --states. Clips of several pushes are fine.
model = 'vit'
world = False
conv = False
init_from = 'vjepa2-ac-vitg.pt'
rope = 'vjepa2'
depth = 24
width = 1024
heads = 16
mlp_hidden = 4096
data = 'mine_vitg'
loss = 'rollout'
rollout_steps = 2
# The published loss is the plain sum of the two terms. Here their weights add up to one, which halves the
# gradient. AdamW's steps do not depend on its scale, and grad_clip is half of the published 1.01.
lambda_start = 0.5
lambda_end = 0.5
batch_size = 32
accumulation = 4
teacher_every = 1
optimizer = 'adamw'
learning_rate = 7.5e-5
warmup = 0.05
decay = 0.5
beta2 = 0.999
grad_clip = 0.505
max_iters = 5000
out = 'out/vjepa2_ac_finetuned.pt'
